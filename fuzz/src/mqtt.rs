//! What a client of the listener sends: packets and payloads.

use mqtt_protocol_core::mqtt::common::Cursor;
use mqtt_protocol_core::mqtt::connection::GenericConnection;
use mqtt_protocol_core::mqtt::connection::event::GenericEvent;
use mqtt_protocol_core::mqtt::packet::{GenericPacketTrait as _, Packet, v3_1_1, v5_0};
use mqtt_protocol_core::mqtt::result_code::{ConnectReasonCode, ConnectReturnCode};
use mqtt_protocol_core::mqtt::{Version, role};
use serde_json::value::RawValue;
use std::cell::RefCell;
use std::sync::Arc;
use throughline_model::catalog::{Catalog, FeedSpec};
use throughline_model::codec::Codec;
use throughline_model::envelope::DeviceMessage;
use throughline_model::time::Timestamp;
use throughline_model::topics::{DEVICE_TELEMETRY_V1, SERVICE_PLATFORM_LOCATOR_V1};
use throughline_mqtt::Router;
use throughline_mqtt::feeds::Publish;
use throughline_mqtt::gate::{self, Frame, Phase};
use throughline_mqtt::json::Json;
use throughline_mqtt::transform::{RECORDS_BYTES_MAX, Scope, Transformer, Verdict};

/// The strict JSON reader against serde_json: it accepts nothing that serde_json refuses, and refuses
/// more only for nesting and halves of surrogate pairs.
pub fn json(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let mut reader = Json::new(text);
    let ours = reader.skip().and_then(|()| reader.end());
    let theirs = serde_json::from_str::<&RawValue>(text);
    match ours {
        Ok(()) => assert!(theirs.is_ok(), "serde_json refuses it: {theirs:?}"),
        Err(fault) => {
            assert!(fault.at <= text.len(), "{fault} lies behind the end");
            let stricter = fault.why.contains("nesting") || fault.why.contains("surrogate");
            assert!(stricter || theirs.is_err(), "only ours refuses it: {fault}");
        }
    }
}

/// The gate, and behind it the framing library in the role in which the listener uses it.
pub fn packets(data: &[u8]) {
    let mut protocol = GenericConnection::<role::Server, u16>::new(Version::Undetermined);
    protocol.set_auto_ping_response(true);
    let mut phase = Phase::New;
    let mut used = 0;
    while let Frame::Packet { len, header } = gate::frame(&data[used..], 4_096) {
        assert!(header >= 2 && header <= len && len <= data.len() - used, "{header} of {len}");
        let packet = &data[used..used + len];
        used += len;
        match gate::check(packet, header, phase) {
            Ok(Some(level)) => phase = Phase::Connected(level),
            Ok(None) => {}
            Err(_) => return,
        }
        for event in protocol.recv(&mut Cursor::new(packet)) {
            match event {
                GenericEvent::NotifyPacketReceived(Packet::V3_1_1Connect(_)) => {
                    let connack = v3_1_1::Connack::builder().session_present(false);
                    let connack = connack.return_code(ConnectReturnCode::Accepted).build();
                    protocol.send(Packet::V3_1_1Connack(connack.expect("a sound CONNACK")));
                }
                GenericEvent::NotifyPacketReceived(Packet::V5_0Connect(_)) => {
                    let connack = v5_0::Connack::builder().session_present(false);
                    let connack = connack.reason_code(ConnectReasonCode::Success).build();
                    protocol.send(Packet::V5_0Connack(connack.expect("a sound CONNACK")));
                }
                GenericEvent::RequestSendPacket { packet, .. } => drop(packet.to_continuous_buffer()),
                GenericEvent::NotifyError(_) | GenericEvent::RequestClose => return,
                _ => {}
            }
        }
    }
}

/// Feeds of the decoders that the embedded catalog does not use.
const MORE_FEEDS: [&str; 5] = [
    "name='csv'\nfilter='csv/{device}'\ndecoder='csv'\nsite=\"'s'\"",
    "name='columns'\nfilter='columns/{device}'\ndecoder='csv'\ncolumns=['a','b']\nseparator=';'\nsite=\"'s'\"",
    "name='pairs'\nfilter='pairs/{device}'\ndecoder='key_value'\nsite=\"'s'\"",
    "name='pattern'\nfilter='pattern/{device}'\ndecoder='pattern'\npattern='^T(?<t>[0-9.]+) (?<u>.*)$'\nsite=\"'s'\"",
    "name='binary'\nfilter='binary/{device}'\ndecoder='binary'\nlayout=['t:i16be','skip1','v:u64le','f:f32be','d:f64le']\nsite=\"'s'\"",
];

struct Bench {
    codec: Arc<Codec>,
    transformer: Transformer,
}

impl Bench {
    fn new() -> Self {
        let catalog = Catalog::embedded();
        let codec = super::kafka::codec();
        let more: Vec<FeedSpec> =
            MORE_FEEDS.iter().map(|text| toml::from_str(text).expect("a feed")).collect();
        let embedded = catalog.feeds();
        let embedded = embedded.iter().map(|(topic, feed)| (topic.spec.name.as_str(), *feed));
        let feeds = embedded.chain(more.iter().map(|feed| (DEVICE_TELEMETRY_V1, feed)));
        let router = Router::of_feeds(feeds).expect("the feeds compile");
        let transformer = Transformer::new(Arc::new(router), Arc::clone(&codec), "bridge-0");
        Self { codec, transformer }
    }
}

thread_local! {
    static BENCH: RefCell<Bench> = RefCell::new(Bench::new());
}

/// A PUBLISH on its way into records, or into one dead letter that holds it byte for byte: an MQTT topic,
/// a line feed, the payload.
pub fn publish(data: &[u8]) {
    let (topic, payload) = super::parted(data, b'\n');
    let Ok(topic) = std::str::from_utf8(topic) else { return };
    let properties = [("traceparent".to_owned(), String::from_utf8_lossy(payload).into_owned())];
    let publish = Publish {
        topic,
        payload,
        client_id: "client",
        user: None,
        login_site: None,
        properties: &properties,
        received_at: Timestamp(1_769_853_600_000_000),
    };
    BENCH.with_borrow_mut(|bench| {
        let Bench { codec, transformer } = bench;
        let verdict = transformer.admit(&publish, &Scope::default(), None);
        let records = transformer.records();
        match verdict {
            Verdict::Accepted => {
                assert!(!records.is_empty(), "accepted without a record");
                assert!(records.bytes_held() <= RECORDS_BYTES_MAX, "{} bytes", records.bytes_held());
                for record in records.iter().filter(|r| r.topic != SERVICE_PLATFORM_LOCATOR_V1) {
                    let message: DeviceMessage = codec.decode(record.value).expect("what was written reads");
                    let mut again = Vec::new();
                    codec.encode(record.topic, &message, &mut again).expect("what was read is written");
                    assert_eq!(record.value, Some(again.as_slice()));
                    let key = format!("{}/{}", message.site_id, message.device_id);
                    assert_eq!(record.key, Some(key.as_bytes()));
                }
            }
            Verdict::DeadLettered(code) => {
                assert_eq!((records.len(), records.get(0).value), (1, Some(payload)), "{code}");
                let rejected = transformer.take_rejected().expect("says what was wrong");
                assert!(rejected.message.len() <= 1_100, "{code}: {} bytes", rejected.message.len());
            }
            Verdict::Forbidden(_) => assert!(records.is_empty(), "forbidden and yet written"),
        }
    });
}
