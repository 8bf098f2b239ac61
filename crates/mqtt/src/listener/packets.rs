//! Packets that the listener sends by itself, and what it reads from the crate's.

use crate::gate::Violation;
use mqtt_protocol_core::mqtt;
use mqtt_protocol_core::mqtt::packet::{Packet, Property, v3_1_1, v5_0};
use mqtt_protocol_core::mqtt::result_code::{
    ConnectReasonCode, ConnectReturnCode, SubackReasonCode, SubackReturnCode, UnsubackReasonCode,
};
use std::time::Duration;

/// What the listener tells an MQTT 5 client that it accepts.
pub(crate) struct Offer<'a> {
    pub(crate) session_present: bool,
    pub(crate) receive_maximum: u16,
    pub(crate) packet_bytes_max: u32,
    pub(crate) assigned_client_id: Option<&'a str>,
    /// Where it differs from what the client asked for.
    pub(crate) session_expiry_s: Option<u32>,
}

/// Topic aliases a client may use: devices have few topics, and each alias costs memory.
const TOPIC_ALIASES: u16 = 16;

/// Makes the CONNACK that accepts.
pub(crate) fn connack_accepted(level: u8, offer: &Offer<'_>) -> Option<Packet> {
    if level == 4 {
        let connack = v3_1_1::Connack::builder()
            .session_present(offer.session_present)
            .return_code(ConnectReturnCode::Accepted)
            .build();
        return connack.ok().map(Packet::V3_1_1Connack);
    }
    use mqtt::packet as p;
    let mut props: Vec<Property> = vec![
        p::ReceiveMaximum::new(offer.receive_maximum.max(1)).ok()?.into(),
        p::MaximumQos::new(1).ok()?.into(),
        p::RetainAvailable::new(0).ok()?.into(),
        p::MaximumPacketSize::new(offer.packet_bytes_max.max(1)).ok()?.into(),
        p::TopicAliasMaximum::new(TOPIC_ALIASES).ok()?.into(),
        p::WildcardSubscriptionAvailable::new(0).ok()?.into(),
        p::SubscriptionIdentifierAvailable::new(0).ok()?.into(),
        p::SharedSubscriptionAvailable::new(0).ok()?.into(),
    ];
    if let Some(seconds) = offer.session_expiry_s {
        props.push(p::SessionExpiryInterval::new(seconds).ok()?.into());
    }
    if let Some(id) = offer.assigned_client_id {
        props.push(p::AssignedClientIdentifier::new(id).ok()?.into());
    }
    let connack = v5_0::Connack::builder()
        .session_present(offer.session_present)
        .reason_code(ConnectReasonCode::Success)
        .props(props)
        .build();
    connack.ok().map(Packet::V5_0Connack)
}

/// Why a CONNECT is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    BadCredentials,
    NotAuthorized,
    AuthenticationMethod,
    ServerBusy,
    ClientId,
    WillQuota,
}

impl Refusal {
    pub(crate) const fn reason(self) -> &'static str {
        match self {
            Self::BadCredentials => "bad_credentials",
            Self::NotAuthorized => "not_authorized",
            Self::AuthenticationMethod => "authentication_method",
            Self::ServerBusy => "shutting_down",
            Self::ClientId => "client_id_too_long",
            Self::WillQuota => "wills_bytes_max",
        }
    }

    /// Returns the bytes of the CONNACK. They do not go through the crate: the connection ends here.
    pub(crate) const fn connack(self, level: u8) -> [u8; 5] {
        let (v3, v5) = match self {
            Self::BadCredentials => (4, 0x86),
            Self::NotAuthorized => (5, 0x87),
            Self::AuthenticationMethod => (5, 0x8c),
            Self::ServerBusy => (3, 0x89),
            Self::ClientId => (2, 0x85),
            Self::WillQuota => (3, 0x97),
        };
        if level == 5 { [0x20, 3, 0, v5, 0] } else { [0x20, 2, 0, v3, 0] }
    }
}

/// Returns how many bytes of [`Refusal::connack`] count.
pub(crate) const fn connack_len(level: u8) -> usize {
    if level == 5 { 5 } else { 4 }
}

/// Returns what to send before closing after a CONNECT that the gate refused, `body` without its fixed
/// header.
pub(crate) fn refused_connect(violation: Violation, body: &[u8]) -> Vec<u8> {
    let level = match body {
        [0, 4, b'M', b'Q', b'T', b'T', level, ..] => *level,
        _ => 0,
    };
    match (violation, level) {
        (Violation::Version, _) => vec![0x20, 2, 0, 1],
        (Violation::ClientId, _) => vec![0x20, 2, 0, 2],
        (other, 5) => vec![0x20, 3, 0, other.code(), 0],
        _ => Vec::new(),
    }
}

/// Returns a DISCONNECT of MQTT 5.
pub(crate) const fn disconnect(code: u8) -> [u8; 4] {
    [0xe0, 2, code, 0]
}

/// Appends a PUBACK; on MQTT 5 a code other than 0 is stated.
pub(crate) fn write_puback(packet_id: u16, code: u8, out: &mut Vec<u8>) {
    let [high, low] = packet_id.to_be_bytes();
    if code == 0 {
        out.extend_from_slice(&[0x40, 2, high, low]);
    } else {
        out.extend_from_slice(&[0x40, 3, high, low, code]);
    }
}

/// Makes the PUBACK that the crate must be told of.
pub(crate) fn puback(level: u8, packet_id: u16) -> Option<Packet> {
    if level == 4 {
        return v3_1_1::Puback::builder().packet_id(packet_id).build().ok().map(Packet::V3_1_1Puback);
    }
    v5_0::Puback::builder().packet_id(packet_id).build().ok().map(Packet::V5_0Puback)
}

/// What becomes of one topic filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Granted {
    Qos(u8),
    NotOwn,
    Wildcard,
    Shared,
    /// The session has as many subscriptions as it may have.
    Quota,
}

/// Makes the SUBACK.
pub(crate) fn suback(level: u8, packet_id: u16, granted: &[Granted]) -> Option<Packet> {
    if level == 4 {
        let code = |g: &Granted| match g {
            Granted::Qos(0) => SubackReturnCode::SuccessMaximumQos0,
            Granted::Qos(_) => SubackReturnCode::SuccessMaximumQos1,
            _ => SubackReturnCode::Failure,
        };
        let codes = granted.iter().map(code).collect();
        let suback = v3_1_1::Suback::builder().packet_id(packet_id).return_codes(codes).build();
        return suback.ok().map(Packet::V3_1_1Suback);
    }
    let code = |g: &Granted| match g {
        Granted::Qos(0) => SubackReasonCode::GrantedQos0,
        Granted::Qos(_) => SubackReasonCode::GrantedQos1,
        Granted::NotOwn => SubackReasonCode::NotAuthorized,
        Granted::Wildcard => SubackReasonCode::WildcardSubscriptionsNotSupported,
        Granted::Shared => SubackReasonCode::SharedSubscriptionsNotSupported,
        Granted::Quota => SubackReasonCode::QuotaExceeded,
    };
    let codes = granted.iter().map(code).collect();
    let suback = v5_0::Suback::builder().packet_id(packet_id).reason_codes(codes).build();
    suback.ok().map(Packet::V5_0Suback)
}

/// Makes the UNSUBACK; `existed` says for each filter whether it was subscribed.
pub(crate) fn unsuback(level: u8, packet_id: u16, existed: &[bool]) -> Option<Packet> {
    if level == 4 {
        return v3_1_1::Unsuback::builder().packet_id(packet_id).build().ok().map(Packet::V3_1_1Unsuback);
    }
    let code = |existed: &bool| {
        if *existed { UnsubackReasonCode::Success } else { UnsubackReasonCode::NoSubscriptionExisted }
    };
    let codes = existed.iter().map(code).collect();
    let unsuback = v5_0::Unsuback::builder().packet_id(packet_id).reason_codes(codes).build();
    unsuback.ok().map(Packet::V5_0Unsuback)
}

/// A CONNECT of either version.
pub(crate) struct Connect {
    pub(crate) level: u8,
    pub(crate) client_id: String,
    pub(crate) clean: bool,
    pub(crate) keep_alive: Duration,
    pub(crate) user: Option<String>,
    pub(crate) password: Option<Vec<u8>>,
    pub(crate) will: Option<super::conn::Will>,
    /// Session Expiry Interval in seconds, as asked for.
    pub(crate) session_expiry_s: u32,
    pub(crate) authentication: bool,
}

impl Connect {
    pub(crate) fn v3(packet: &v3_1_1::Connect) -> Self {
        let clean = packet.clean_session();
        Self {
            level: 4,
            client_id: packet.client_id().to_owned(),
            clean,
            keep_alive: Duration::from_secs(u64::from(packet.keep_alive())),
            user: packet.user_name().map(str::to_owned),
            password: packet.password().map(<[u8]>::to_vec),
            will: will(packet.will_topic(), packet.will_payload(), 0),
            // On 3.1.1 a session that is not clean never expires by itself.
            session_expiry_s: if clean { 0 } else { u32::MAX },
            authentication: false,
        }
    }

    pub(crate) fn v5(packet: &v5_0::Connect) -> Self {
        let mut session_expiry_s = 0;
        let mut authentication = false;
        for property in packet.props() {
            match property {
                Property::SessionExpiryInterval(p) => session_expiry_s = p.val(),
                Property::AuthenticationMethod(_) => authentication = true,
                _ => {}
            }
        }
        let delay = packet.will_props().iter().find_map(|property| match property {
            Property::WillDelayInterval(p) => Some(p.val()),
            _ => None,
        });
        Self {
            level: 5,
            client_id: packet.client_id().to_owned(),
            clean: packet.clean_start(),
            keep_alive: Duration::from_secs(u64::from(packet.keep_alive())),
            user: packet.user_name().map(str::to_owned),
            password: packet.password().map(<[u8]>::to_vec),
            will: will(packet.will_topic(), packet.will_payload(), delay.unwrap_or(0)),
            session_expiry_s,
            authentication,
        }
    }
}

fn will(topic: Option<&str>, payload: Option<&[u8]>, delay_s: u32) -> Option<super::conn::Will> {
    Some(super::conn::Will {
        topic: topic?.to_owned(),
        payload: payload.unwrap_or_default().to_vec(),
        delay: Duration::from_secs(u64::from(delay_s)),
    })
}

/// Reads the user properties and the content type of a PUBLISH.
pub(crate) fn publish_properties(properties: &[Property]) -> Vec<(String, String)> {
    let mut pairs = Vec::new();
    for property in properties {
        match property {
            Property::UserProperty(p) => pairs.push((p.key().to_owned(), p.val().to_owned())),
            Property::ContentType(p) => pairs.push(("content-type".to_owned(), p.val().to_owned())),
            _ => {}
        }
    }
    pairs
}
