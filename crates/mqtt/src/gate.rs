//! The strict gate in front of mqtt-protocol-core: frames packets and refuses what the crate accepts and
//! this listener does not (docs/bridge.md lists it). It sees whole packets only, so the result does not
//! depend on how the bytes were split over reads.

/// Where the next packet ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame {
    /// More bytes are needed; at least this many in all, as far as is known.
    Incomplete,
    /// A packet of `len` bytes, whose fixed header has `header` of them.
    Packet {
        /// Length of the packet.
        len: usize,
        /// Length of its fixed header.
        header: usize,
    },
    /// The packet announces more than the bound.
    TooLarge,
    /// The remaining length is not a variable byte integer.
    Malformed,
}

/// Finds the end of the packet that `bytes` begin with, bounded by `len_max` bytes.
pub fn frame(bytes: &[u8], len_max: usize) -> Frame {
    let mut remaining = 0usize;
    for (index, shift) in [0u32, 7, 14, 21].into_iter().enumerate() {
        let Some(byte) = bytes.get(1 + index) else { return Frame::Incomplete };
        remaining |= usize::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            let header = 2 + index;
            let len = header + remaining;
            return match bytes.len() {
                _ if len > len_max => Frame::TooLarge,
                available if available < len => Frame::Incomplete,
                _ => Frame::Packet { len, header },
            };
        }
    }
    Frame::Malformed
}

/// How far a connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Nothing was received.
    New,
    /// CONNECT was accepted under this protocol level (4: 3.1.1, 5).
    Connected(u8),
}

/// Why a packet is refused. The connection is closed after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Violation {
    /// A packet before CONNECT, a second CONNECT, or a packet that only servers send.
    Unexpected,
    /// The form of the packet is wrong.
    Malformed(&'static str),
    /// The protocol level is neither 4 nor 5.
    Version,
    /// An empty client id with clean session 0 on 3.1.1.
    ClientId,
    /// A PUBLISH topic with `+`, `#` or NUL, or none.
    TopicName,
    /// QoS 2, in a PUBLISH or a will.
    Qos,
    /// RETAIN on MQTT 5, in a PUBLISH or a will, which was told that there is none.
    Retain,
    /// Extended authentication, which there is none.
    Authentication,
}

impl Violation {
    /// Returns the reason for metrics and session events.
    pub const fn reason(self) -> &'static str {
        match self {
            Self::Unexpected => "packet_unexpected",
            Self::Malformed(what) => what,
            Self::Version => "protocol_version",
            Self::ClientId => "client_id_empty",
            Self::TopicName => "topic_name_invalid",
            Self::Qos => "qos_2",
            Self::Retain => "retain",
            Self::Authentication => "authentication_method",
        }
    }

    /// Returns the reason code of MQTT 5.
    pub const fn code(self) -> u8 {
        match self {
            Self::Unexpected => 0x82,
            Self::Malformed(_) => 0x81,
            Self::Version => 0x84,
            Self::ClientId => 0x85,
            Self::TopicName => 0x90,
            Self::Qos => 0x9b,
            Self::Retain => 0x9a,
            Self::Authentication => 0x8c,
        }
    }
}

const CONNECT: u8 = 1;
const PUBLISH: u8 = 3;
const PUBREL: u8 = 6;
const SUBSCRIBE: u8 = 8;
const UNSUBSCRIBE: u8 = 10;

/// Checks one whole packet, `packet` of [`frame`]'s `len` bytes. On a CONNECT returns its protocol level.
///
/// # Errors
/// [`Violation`]: the connection is to be closed, and the packet not passed on.
pub fn check(packet: &[u8], header: usize, phase: Phase) -> Result<Option<u8>, Violation> {
    let kind = packet[0] >> 4;
    let flags = packet[0] & 0x0f;
    let body = &packet[header..];
    match (phase, kind) {
        (Phase::New, CONNECT) => {}
        (Phase::New, _) | (Phase::Connected(_), CONNECT | 0 | 2 | 9 | 11 | 13) => {
            return Err(Violation::Unexpected);
        }
        // AUTH: no authentication method was agreed.
        (Phase::Connected(_), 15) => return Err(Violation::Unexpected),
        (Phase::Connected(_), _) => {}
    }
    let flags_expected = match kind {
        PUBLISH => flags,
        PUBREL | SUBSCRIBE | UNSUBSCRIBE => 2,
        _ => 0,
    };
    if flags != flags_expected {
        return Err(Violation::Malformed("fixed_header_flags"));
    }
    match (kind, phase) {
        (CONNECT, _) => check_connect(body).map(Some),
        (PUBLISH, Phase::Connected(level)) => check_publish(flags, body, level).map(|()| None),
        (SUBSCRIBE | UNSUBSCRIBE, _) if packet_id(body, 0)? == 0 => {
            Err(Violation::Malformed("packet_id_zero"))
        }
        _ => Ok(None),
    }
}

fn check_publish(flags: u8, body: &[u8], level: u8) -> Result<(), Violation> {
    let qos = (flags >> 1) & 3;
    match qos {
        3 => return Err(Violation::Malformed("qos_3")),
        2 => return Err(Violation::Qos),
        0 if flags & 8 != 0 => return Err(Violation::Malformed("dup_at_qos_0")),
        _ => {}
    }
    if flags & 1 != 0 && level == 5 {
        return Err(Violation::Retain);
    }
    let (topic, rest) = text(body)?;
    // An empty topic on MQTT 5 stands for an alias, which the crate resolves or refuses.
    if topic.iter().any(|b| matches!(b, b'+' | b'#' | 0)) || (topic.is_empty() && level != 5) {
        return Err(Violation::TopicName);
    }
    if qos == 1 && packet_id(body, body.len() - rest.len())? == 0 {
        return Err(Violation::Malformed("packet_id_zero"));
    }
    Ok(())
}

fn check_connect(body: &[u8]) -> Result<u8, Violation> {
    let (name, rest) = text(body)?;
    let [level, flags, _, _, rest @ ..] = rest else { return Err(Violation::Malformed("connect_short")) };
    if name != b"MQTT" || !matches!(level, 4 | 5) {
        return Err(Violation::Version);
    }
    let has_will = flags & 0x04 != 0;
    let will_qos = (flags >> 3) & 3;
    let will_retain = flags & 0x20 != 0;
    if flags & 0x01 != 0 {
        return Err(Violation::Malformed("connect_reserved_flag"));
    }
    if will_qos == 3 || (!has_will && (will_qos != 0 || will_retain)) {
        return Err(Violation::Malformed("will_flags"));
    }
    if will_qos == 2 {
        return Err(Violation::Qos);
    }
    if will_retain && *level == 5 {
        return Err(Violation::Retain);
    }
    if *level == 4 {
        let (client_id, _) = text(rest)?;
        let clean = flags & 0x02 != 0;
        if client_id.is_empty() && !clean {
            return Err(Violation::ClientId);
        }
    }
    Ok(*level)
}

fn text(bytes: &[u8]) -> Result<(&[u8], &[u8]), Violation> {
    let short = Violation::Malformed("packet_short");
    let (len, rest) = bytes.split_first_chunk::<2>().ok_or(short)?;
    rest.split_at_checked(usize::from(u16::from_be_bytes(*len))).ok_or(short)
}

fn packet_id(body: &[u8], at: usize) -> Result<u16, Violation> {
    let id = body.get(at..at + 2).ok_or(Violation::Malformed("packet_short"))?;
    Ok(u16::from_be_bytes([id[0], id[1]]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const V311: Phase = Phase::Connected(4);
    const V5: Phase = Phase::Connected(5);

    fn reason(phase: Phase, packet: &[u8]) -> &'static str {
        let Frame::Packet { len, header } = frame(packet, 1 << 20) else {
            panic!("not a packet: {packet:?}")
        };
        assert_eq!(len, packet.len());
        check(packet, header, phase).map_or_else(Violation::reason, |_| "")
    }

    #[test]
    fn raw_bytes_that_the_crate_accepts_are_refused_here() {
        for (phase, packet, expected) in [
            // PUBLISH QoS 1, topic "a/b", packet id 0, then 1.
            (V311, b"\x32\x07\0\x03a/b\0\0".as_slice(), "packet_id_zero"),
            (V311, b"\x32\x07\0\x03a/b\0\x01", ""),
            (V5, b"\x32\x08\0\x03a/b\0\0\0", "packet_id_zero"),
            // Wildcards and NUL in a topic.
            (V311, b"\x30\x05\0\x03a/+", "topic_name_invalid"),
            (V311, b"\x30\x05\0\x03a/#", "topic_name_invalid"),
            (V311, b"\x30\x05\0\x03a\0b", "topic_name_invalid"),
            (V311, b"\x30\x02\0\0", "topic_name_invalid"),
            (V5, b"\x30\x03\0\0\0", ""),
            // DUP at QoS 0, QoS 3, QoS 2.
            (V311, b"\x38\x05\0\x03a/b", "dup_at_qos_0"),
            (V311, b"\x36\x07\0\x03a/b\0\x01", "qos_3"),
            (V311, b"\x34\x07\0\x03a/b\0\x01", "qos_2"),
            // RETAIN: accepted on 3.1.1, refused on 5.
            (V311, b"\x31\x05\0\x03a/b", ""),
            (V5, b"\x31\x06\0\x03a/b\0", "retain"),
            // Fixed-header flags: PINGREQ, SUBSCRIBE, DISCONNECT, PUBACK.
            (V311, b"\xc1\0", "fixed_header_flags"),
            (V311, b"\x80\x06\0\x01\0\x01a\0", "fixed_header_flags"),
            (V311, b"\xe2\0", "fixed_header_flags"),
            (V311, b"\x41\x02\0\x01", "fixed_header_flags"),
            (V311, b"\x82\x06\0\0\0\x01a\0", "packet_id_zero"),
            (V311, b"\x82\x06\0\x01\0\x01a\0", ""),
            // Before CONNECT, twice, and what only servers send.
            (Phase::New, b"\xc0\0", "packet_unexpected"),
            (Phase::New, b"\x30\x05\0\x03a/b", "packet_unexpected"),
            (V311, b"\x10\x0d\0\x04MQTT\x04\x02\0\0\0\x01c", "packet_unexpected"),
            (V311, b"\x20\x02\0\0", "packet_unexpected"),
            (V311, b"\xd0\0", "packet_unexpected"),
            (V5, b"\xf0\0", "packet_unexpected"),
            // CONNECT: reserved flag, empty client id, versions, will flags.
            (Phase::New, b"\x10\x0d\0\x04MQTT\x04\x02\0\0\0\x01c", ""),
            (Phase::New, b"\x10\x0d\0\x04MQTT\x04\x03\0\0\0\x01c", "connect_reserved_flag"),
            (Phase::New, b"\x10\x0c\0\x04MQTT\x04\x00\0\0\0\0", "client_id_empty"),
            (Phase::New, b"\x10\x0c\0\x04MQTT\x04\x02\0\0\0\0", ""),
            (Phase::New, b"\x10\x0d\0\x04MQTT\x05\x00\0\0\0\0\0", ""),
            (Phase::New, b"\x10\x0f\0\x06MQIsdp\x03\x02\0\0\0\x01c", "protocol_version"),
            (Phase::New, b"\x10\x0d\0\x04MQTT\x06\x02\0\0\0\x01c", "protocol_version"),
            (Phase::New, b"\x10\x0d\0\x04MQTT\x04\x22\0\0\0\x01c", "will_flags"),
            (Phase::New, b"\x10\x13\0\x04MQTT\x04\x16\0\0\0\x01c\0\x01w\0\x01x", "qos_2"),
            (Phase::New, b"\x10\x04\0\x04MQ", "packet_short"),
        ] {
            assert_eq!(reason(phase, packet), expected, "{phase:?} {packet:?}");
        }
    }

    #[test]
    fn the_length_of_a_packet_is_bounded_before_it_is_read() {
        assert_eq!(frame(b"\x30\xff\xff\xff\x7f", 1 << 20), Frame::TooLarge);
        assert_eq!(frame(b"\x30\xff\xff\xff\xff\x01", 1 << 20), Frame::Malformed);
        assert_eq!(frame(b"\x30", 10), Frame::Incomplete);
        assert_eq!(frame(b"\x30\x80", 10), Frame::Incomplete);
        assert_eq!(frame(b"\xc0\0\xc0", 10), Frame::Packet { len: 2, header: 2 });
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..64), level in 0u8..7) {
            let phase = if level < 3 { Phase::New } else { Phase::Connected(level) };
            if let Frame::Packet { len, header } = frame(&bytes, 1 << 16) {
                let _ = check(&bytes[..len], header, phase);
            }
        }
    }
}
