//! Identity: devices, traces, messages, and the hash that places a key in a partition.

use crate::time::Timestamp;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fmt;
use std::str::FromStr;
use uuid::Uuid;

/// A name that cannot be a site or device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{value}` cannot name a {what}: {why}")]
pub struct InvalidName {
    what: &'static str,
    value: String,
    why: &'static str,
}

/// The longest site or device name in bytes. MQTT topics and Kafka keys carry both, so it is bounded.
pub const NAME_BYTES_MAX: usize = 128;

/// Checks one segment of a device key: 1 to [`NAME_BYTES_MAX`] bytes of printable text without `/`, `+`,
/// `#` (MQTT's own characters) and without white space or control characters.
///
/// # Errors
/// [`InvalidName`] says which rule was broken.
pub fn check_name(what: &'static str, value: &str) -> Result<(), InvalidName> {
    let why = if value.is_empty() {
        "it is empty"
    } else if value.len() > NAME_BYTES_MAX {
        "it is longer than 128 bytes"
    } else if value.chars().any(|c| matches!(c, '/' | '+' | '#')) {
        "it contains `/`, `+` or `#`"
    } else if value.chars().any(|c| c.is_whitespace() || c.is_control()) {
        "it contains white space or a control character"
    } else {
        return Ok(());
    };
    Err(InvalidName { what, value: value.chars().take(64).collect(), why })
}

/// A device's name everywhere: `site/device`, which is the Kafka key, the twin's id and the ledger's name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DeviceKey {
    text: Box<str>,
    slash: usize,
}

impl DeviceKey {
    /// Joins a site and a device.
    ///
    /// # Errors
    /// When either is not a valid name.
    pub fn new(site: &str, device: &str) -> Result<Self, InvalidName> {
        check_name("site", site)?;
        check_name("device", device)?;
        Ok(Self { text: format!("{site}/{device}").into(), slash: site.len() })
    }

    /// Returns `site/device`.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Returns the site.
    pub fn site(&self) -> &str {
        &self.text[..self.slash]
    }

    /// Returns the device's name within its site.
    pub fn device(&self) -> &str {
        &self.text[self.slash + 1..]
    }
}

impl FromStr for DeviceKey {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let (site, device) = text.split_once('/').ok_or_else(|| InvalidName {
            what: "device",
            value: text.chars().take(64).collect(),
            why: "it has the form `site/device`",
        })?;
        Self::new(site, device)
    }
}

impl TryFrom<String> for DeviceKey {
    type Error = InvalidName;

    fn try_from(text: String) -> Result<Self, InvalidName> {
        text.parse()
    }
}

impl From<DeviceKey> for String {
    fn from(key: DeviceKey) -> Self {
        key.text.into()
    }
}

impl fmt::Display for DeviceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// A W3C trace id. Ours carry a hint: birth second, murmur2 of the key, 8 random bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TraceId(pub [u8; 16]);

impl TraceId {
    /// Mints an id born at `birth` for a record under `key`. `random` must not be all zero bits together
    /// with the rest, which a birth second above zero already ensures.
    pub fn mint(birth: Timestamp, key: &[u8], random: u64) -> Self {
        let seconds = u32::try_from(birth.as_secs().max(1)).unwrap_or(u32::MAX);
        let mut id = [0; 16];
        id[..4].copy_from_slice(&seconds.to_be_bytes());
        id[4..8].copy_from_slice(&murmur2(key).to_be_bytes());
        id[8..].copy_from_slice(&random.to_be_bytes());
        Self(id)
    }

    /// Returns the birth second that the id claims; an id from outside claims anything.
    pub fn birth_second(self) -> u32 {
        u32::from_be_bytes([self.0[0], self.0[1], self.0[2], self.0[3]])
    }

    /// Returns the partition that the id hints at, of a topic with `partitions` partitions.
    pub fn partition(self, partitions: i32) -> i32 {
        let hash = u32::from_be_bytes([self.0[4], self.0[5], self.0[6], self.0[7]]);
        partition_of_hash(hash, partitions)
    }

    /// Writes 32 lower-case hexadecimal digits.
    pub fn to_hex(self) -> String {
        self.to_string()
    }

    /// Returns the value of a W3C `traceparent` header, version 00, sampled; the parent span is the last
    /// 8 bytes of the id of the message that carries it, so that it is stable under redelivery.
    pub fn traceparent(self, message_id: Uuid) -> String {
        let mut span = [0u8; 8];
        span.copy_from_slice(&message_id.as_bytes()[8..]);
        format!("00-{self}-{:016x}-01", u64::from_be_bytes(span).max(1))
    }

    /// Reads the trace id of a `traceparent` header (W3C Trace Context, section 3.2).
    pub fn from_traceparent(header: &str) -> Option<Self> {
        let mut parts = header.split('-');
        let version = parts.next()?;
        let id = parts.next()?;
        let span = parts.next()?;
        let known = version.len() == 2 && version != "ff" && span.len() == 16 && parts.next().is_some();
        known.then(|| id.parse().ok()).flatten()
    }
}

impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl fmt::Debug for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text that is not a trace id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a trace id has 32 lower-case hexadecimal digits that are not all zero")]
pub struct InvalidTraceId;

impl FromStr for TraceId {
    type Err = InvalidTraceId;

    fn from_str(text: &str) -> Result<Self, InvalidTraceId> {
        let lower_hex = text.len() == 32 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        let id = lower_hex.then(|| u128::from_str_radix(text, 16).ok()).flatten().filter(|id| *id != 0);
        id.map(|id| Self(id.to_be_bytes())).ok_or(InvalidTraceId)
    }
}

/// Returns the id of a message with sequence identity: UUIDv8 of the payload's milliseconds (0 without a
/// time of its own) and the first 74 bits of SHA-256 over the length-prefixed site, device, stream,
/// epoch, seq and the element's exact bytes. The same message always has the same id.
pub fn sequence_message_id(
    time: Option<Timestamp>,
    site: &str,
    device: &str,
    stream: &str,
    epoch: i64,
    seq: i64,
    element: &[u8],
) -> Uuid {
    let ms = time.map_or(0, Timestamp::as_millis);
    let parts = [
        site.as_bytes(),
        device.as_bytes(),
        stream.as_bytes(),
        &epoch.to_be_bytes(),
        &seq.to_be_bytes(),
        element,
    ];
    timed_hash(ms, &parts)
}

/// Returns the id of a message that a stage derived: the parent's milliseconds and a hash of parent,
/// stage and output key. The output key names the output (rule id and version), never its ordinal.
pub fn derived_message_id(parent: Uuid, stage: &str, output_key: &str) -> Uuid {
    let ms = millis_of(parent);
    timed_hash(ms, &[parent.as_bytes(), stage.as_bytes(), output_key.as_bytes()])
}

/// Returns the id of something that a timer derived (absence, windows, "for N seconds"): it has no parent
/// message, so (rule id and version, device, start of the window) stand in its place.
pub fn timed_message_id(at: Timestamp, stage: &str, output_key: &str, device: &str) -> Uuid {
    timed_hash(
        at.as_millis(),
        &[device.as_bytes(), stage.as_bytes(), output_key.as_bytes(), &at.0.to_be_bytes()],
    )
}

/// Returns the milliseconds that a time-ordered UUID starts with.
pub fn millis_of(id: Uuid) -> i64 {
    let b = id.as_bytes();
    i64::from_be_bytes([0, 0, b[0], b[1], b[2], b[3], b[4], b[5]])
}

fn timed_hash(ms: i64, parts: &[&[u8]]) -> Uuid {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    let digest = hash.finalize();
    // UUIDv8 keeps 48 + 12 + 62 bits for us: 48 of time, then the first 74 bits of the digest, in order.
    let ms = u64::try_from(ms).unwrap_or(0) & 0xffff_ffff_ffff;
    let head = u64::from_be_bytes(digest[..8].try_into().expect("8 bytes"));
    let tail = u64::from_be_bytes(digest[8..16].try_into().expect("8 bytes"));
    let first_12 = head >> 52;
    let next_62 = ((head & 0x000f_ffff_ffff_ffff) << 10) | (tail >> 54);
    let mut bytes = [0u8; 16];
    bytes[..8].copy_from_slice(&((ms << 16) | first_12).to_be_bytes());
    bytes[8..].copy_from_slice(&next_62.to_be_bytes());
    uuid::Builder::from_custom_bytes(bytes).into_uuid()
}

/// Returns Kafka's murmur2 of `data` (`org.apache.kafka.common.utils.Utils.murmur2`).
pub fn murmur2(data: &[u8]) -> u32 {
    const M: u32 = 0x5bd1_e995;
    let mut h = 0x9747_b28c ^ (data.len() as u32);
    let mut chunks = data.chunks_exact(4);
    for chunk in &mut chunks {
        let mut k = u32::from_le_bytes(chunk.try_into().expect("4 bytes")).wrapping_mul(M);
        k ^= k >> 24;
        h = h.wrapping_mul(M) ^ k.wrapping_mul(M);
    }
    let rest = chunks.remainder();
    if !rest.is_empty() {
        for (i, byte) in rest.iter().enumerate() {
            h ^= u32::from(*byte) << (8 * i);
        }
        h = h.wrapping_mul(M);
    }
    h ^= h >> 13;
    h = h.wrapping_mul(M);
    h ^ (h >> 15)
}

/// Returns the partition of `key` as Java's default partitioner does.
pub fn partition_of(key: &[u8], partitions: i32) -> i32 {
    partition_of_hash(murmur2(key), partitions)
}

fn partition_of_hash(hash: u32, partitions: i32) -> i32 {
    ((hash & 0x7fff_ffff) % partitions.max(1) as u32) as i32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn murmur2_agrees_with_kafkas_own_vectors() {
        // org.apache.kafka.common.utils.UtilsTest#testMurmur2
        for (text, hash) in [
            ("21", -973_932_308_i32),
            ("foobar", -790_332_482),
            ("a-little-bit-long-string", -985_981_536),
            ("a-little-bit-longer-string", -1_486_304_829),
            ("lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58_897_971),
            ("abc", 479_470_107),
        ] {
            assert_eq!(murmur2(text.as_bytes()) as i32, hash, "{text}");
        }
    }

    #[test]
    fn names_that_mqtt_or_kafka_would_confuse_are_refused() {
        for (text, why) in [
            ("pump-7", "it has the form"),
            ("/pump", "it is empty"),
            ("site/", "it is empty"),
            ("site/a/b", "`/`"),
            ("site/a+", "`+`"),
            ("s t/a", "white space"),
        ] {
            let error = text.parse::<DeviceKey>().expect_err(text).to_string();
            assert!(error.contains(why), "{text}: {error}");
        }
        let key: DeviceKey = "site-1/pump-7".parse().expect("valid");
        assert_eq!((key.site(), key.device()), ("site-1", "pump-7"));
    }

    #[test]
    fn a_minted_trace_id_hints_at_second_and_partition() {
        let key = b"site-1/pump-7";
        let id = TraceId::mint(Timestamp(1_800_000_000_000_000), key, 42);
        assert_eq!(id.birth_second(), 1_800_000_000);
        assert_eq!(id.partition(6), partition_of(key, 6));
        assert_eq!(id.to_hex().parse::<TraceId>(), Ok(id));
        let header = id.traceparent(Uuid::from_u128(7));
        assert_eq!(TraceId::from_traceparent(&header), Some(id));
    }

    #[test]
    fn message_ids_are_stable_and_tell_streams_and_bytes_apart() {
        let id = |stream, element: &[u8]| {
            sequence_message_id(Some(Timestamp(5_000)), "s", "d", stream, 1, 2, element)
        };
        assert_eq!(id("telemetry", b"{}"), id("telemetry", b"{}"));
        assert_ne!(id("telemetry", b"{}"), id("event", b"{}"));
        assert_ne!(id("telemetry", b"{}"), id("telemetry", b"{ }"));
        assert_eq!(id("telemetry", b"{}").get_version_num(), 8);
        assert_eq!(millis_of(id("telemetry", b"{}")), 5);
        let child = derived_message_id(id("telemetry", b"{}"), "evaluate_rules", "hot@1");
        assert_eq!((millis_of(child), child.get_version_num()), (5, 8));
    }
}
