//! The newest message ids of a stream, as hashes.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};
use std::collections::VecDeque;

/// Ids kept per stream: not fewer than the open publishes of a connection and the resend window of an
/// agent.
pub const RECENT_MAX: usize = 1_024;

/// Hashes of message ids, oldest first, at most [`RECENT_MAX`]. Serializes to base64 of big-endian 32-bit
/// numbers: a list of JSON numbers would be twice as long.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Recent(VecDeque<u32>);

impl Recent {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn contains(&self, hash: u32) -> bool {
        self.0.contains(&hash)
    }

    /// Remembers `hash` and forgets the oldest beyond the bound.
    pub(super) fn push(&mut self, hash: u32) {
        if self.0.len() == RECENT_MAX {
            self.0.pop_front();
        }
        self.0.push_back(hash);
    }
}

/// Returns the FNV-1a hash of a message id, folded to 32 bits. It is consulted only for a seq already
/// seen or a message refused, so a collision costs one message in four million restarts; 64 bits would
/// double the changelog.
pub(super) fn hash_of(message_id: &str) -> u32 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in message_id.bytes() {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    (hash ^ (hash >> 32)) as u32
}

impl Serialize for Recent {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let bytes: Vec<u8> = self.0.iter().flat_map(|hash| hash.to_be_bytes()).collect();
        to.serialize_str(&STANDARD_NO_PAD.encode(bytes))
    }
}

impl<'de> Deserialize<'de> for Recent {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        let bytes = STANDARD_NO_PAD.decode(text).map_err(D::Error::custom)?;
        let hashes = bytes.chunks_exact(4).map(|b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]));
        // What was written with a larger bound must not stay beyond this one for ever.
        let beyond = hashes.len().saturating_sub(RECENT_MAX);
        Ok(Self(hashes.skip(beyond).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_beyond_the_bound_are_forgotten_when_they_are_read() {
        let text = STANDARD_NO_PAD.encode(vec![7u8; 4 * RECENT_MAX + 4]);
        let mut recent: Recent = serde_json::from_value(text.into()).expect("hashes");
        assert_eq!(recent.0.len(), RECENT_MAX);
        recent.push(1);
        assert_eq!(recent.0.len(), RECENT_MAX);
    }
}
