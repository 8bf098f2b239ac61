//! The transform over the feeds of the embedded catalog.

mod support;

use proptest::prelude::*;
use std::sync::Arc;
use throughline_model::catalog::expression::FEED_FUNCTIONS;
use throughline_model::catalog::{Catalog, FeedSpec};
use throughline_model::codec::Codec;
use throughline_model::envelope::{DeviceMessage, Measurement};
use throughline_model::ids::{TraceId, sequence_message_id};
use throughline_model::keyed::Keyed;
use throughline_model::outcome::Outcome;
use throughline_model::record::{Batch, TopicPartition};
use throughline_model::stage::{Decide, Effects, Input};
use throughline_model::time::Timestamp;
use throughline_model::topics::DEVICE_TELEMETRY_V1;
use throughline_mqtt::feeds::Publish;
use throughline_mqtt::transform::{Replay, Scope, Transformer, Verdict};
use throughline_mqtt::{ReplayBridge, Router};

const NOW: Timestamp = Timestamp(1_769_853_600_000_000);

struct Bench {
    codec: Arc<Codec>,
    transformer: Transformer,
}

impl Bench {
    fn new() -> Self {
        let catalog = Catalog::embedded();
        Self::of(&catalog, Router::compile(&catalog).expect("the embedded feeds compile"))
    }

    fn of(catalog: &Catalog, router: Router) -> Self {
        let codec = support::codec(catalog);
        let transformer = Transformer::new(Arc::new(router), Arc::clone(&codec), "bridge-0");
        Self { codec, transformer }
    }

    fn admit(&mut self, topic: &str, payload: &[u8], replay: Option<&Replay<'_>>) -> Verdict {
        self.transformer.admit(&publish(topic, payload), &Scope::default(), replay)
    }

    fn messages(&self) -> Vec<DeviceMessage> {
        let decode = |value| self.codec.decode(value).expect("a device message");
        self.transformer.records().iter().map(|r| decode(r.value)).collect()
    }
}

fn publish<'a>(topic: &'a str, payload: &'a [u8]) -> Publish<'a> {
    Publish {
        topic,
        payload,
        client_id: "client",
        user: None,
        login_site: None,
        properties: &[],
        received_at: NOW,
    }
}

/// Writes measurements as `name=value[unit]`.
fn shown(measurements: &[Measurement]) -> String {
    let one = |m: &Measurement| {
        let value = match (m.number, &m.text, m.flag) {
            (Some(n), _, _) => n.to_string(),
            (_, Some(t), _) => format!("'{t}'"),
            (_, _, Some(f)) => f.to_string(),
            _ => "null".to_owned(),
        };
        format!("{}={value}{}", m.name, m.unit.as_deref().map(|u| format!("[{u}]")).unwrap_or_default())
    };
    measurements.iter().map(one).collect::<Vec<_>>().join(" ")
}

#[test]
fn formats_of_the_catalog_become_records_by_configuration_alone() {
    let mut bench = Bench::new();
    for (topic, payload, expected) in [
        (
            "tl/s/d/telemetry",
            r#"{"epoch":1,"seq":2,"ts":1769853600,"values":{"t":21.5,"on":true,"m":"auto","n":{"x":1}}}"#,
            "s/d telemetry sequence 1769853600000000 t=21.5 on=true m='auto' n.x=1",
        ),
        ("tl/s/d/event", r#"{"seq":3}"#, "s/d event none 1769853600000000 "),
        (
            "tele/plug/SENSOR",
            r#"{"Time":"2026-01-31T10:00:01","ENERGY":{"Power":12.5,"TotalStartTime":"x"},"TempUnit":"C"}"#,
            "home/plug tasmota_sensor none 1769853601000000 ENERGY.Power=12.5[W]",
        ),
        ("tele/plug/LWT", "Online", "home/plug tasmota_lwt none 1769853600000000 online=true"),
        (
            "zigbee2mqtt/lamp",
            r#"{"brightness":254,"color":{"x":0.5},"last_seen":1769853602000,"update":{"state":"idle"}}"#,
            "home/lamp zigbee2mqtt none 1769853602000000 brightness=254 color.x=0.5",
        ),
        (
            "zigbee2mqtt/lamp/availability",
            r#"{"state":"offline"}"#,
            "home/lamp zigbee2mqtt_availability none 1769853600000000 online=false",
        ),
        ("number/s/d/temperature", " 21.5 ", "s/d bare_number none 1769853600000000 temperature=21.5"),
        ("shellies/plug/relay/0", "on", "home/plug shelly_relay none 1769853600000000 relay.0=true"),
        (
            "shelly-1/events/rpc",
            r#"{"method":"NotifyStatus","params":{"ts":1769853603.5,"switch:0":{"apower":3}}}"#,
            "home/shelly-1 shelly_status none 1769853603500000 switch:0.apower=3",
        ),
        (
            "v3/app/devices/d/up",
            r#"{"received_at":"2026-01-31T10:00:04Z","uplink_message":{"f_cnt":7,"decoded_payload":{"t":1}}}"#,
            "app/d the_things_network none 1769853604000000 t=1",
        ),
        (
            "series/s/d",
            r#"[{"ts":1769853600,"epoch":1,"seq":1,"t":1},{"ts":1769853601,"epoch":1,"seq":2,"t":2}]"#,
            "s/d series sequence 1769853600000000 t=1 | s/d series sequence 1769853601000000 t=2",
        ),
    ] {
        assert_eq!(bench.admit(topic, payload.as_bytes(), None), Verdict::Accepted, "{topic}");
        let seen: Vec<String> = bench
            .messages()
            .iter()
            .map(|m| {
                let DeviceMessage { site_id, device_id, stream, identity, occurred_at, .. } = m;
                format!(
                    "{site_id}/{device_id} {stream} {identity} {} {}",
                    occurred_at.0,
                    shown(&m.measurements)
                )
            })
            .collect();
        assert_eq!(seen.join(" | "), expected, "{topic}");
    }
}

#[test]
fn a_record_has_the_bytes_that_the_models_own_would_have() {
    let mut bench = Bench::new();
    let payload = br#"{"epoch":1,"seq":2,"ts":"2026-01-31T10:00:00.123456Z","clock_offset":-5,"request_id":"r","request_code":"set",
        "response_code":"success","reason":"ok","agent_version":"1","config_version":"2",
        "values":{"big":9007199254740993,"none":null,"text":"\u00e9\n","deep":{"list":[1,false]}}}"#;
    for kind in ["telemetry", "event", "heartbeat", "response", "reported"] {
        let topic = format!("tl/s/d/{kind}");
        assert_eq!(bench.admit(&topic, payload, None), Verdict::Accepted);
        let record = bench.transformer.records().get(0);
        let message: DeviceMessage = bench.codec.decode(record.value).expect("decodes");
        let mut again = Vec::new();
        bench.codec.encode(record.topic, &message, &mut again).expect("encodes");
        assert_eq!(record.value, Some(again.as_slice()), "{kind}");
        assert_eq!(message.flags, ["big_integer"]);
        let time = Some(Timestamp(1_769_853_600_123_456));
        let id = sequence_message_id(time, "s", "d", kind, 1, 2, payload);
        assert_eq!(message.message_id, id.to_string());
        let trace: TraceId = message.trace_id.parse().expect("a trace id");
        assert_eq!(trace.birth_second(), 1_769_853_600);
        assert_eq!(record.headers.last("traceparent"), Some(trace.traceparent(id).as_bytes()));
        assert_eq!(record.key, Some(b"s/d".as_slice()));
    }
}

#[test]
fn ids_are_the_same_for_a_redelivery_and_only_for_it() {
    let mut bench = Bench::new();
    let mut id = |topic: &str, payload: &str| {
        assert_eq!(bench.admit(topic, payload.as_bytes(), None), Verdict::Accepted);
        bench.messages().remove(0).message_id
    };
    let one = r#"{"epoch":1,"seq":1,"values":{"t":1}}"#;
    let first = id("tl/s/d/telemetry", one);
    assert_eq!(first, id("tl/s/d/telemetry", one));
    assert_eq!(first, id("tl/s/d/telemetry", &format!("[ {one} ]")), "an element counts by its own bytes");
    for (topic, payload) in [
        ("tl/s/e/telemetry", one),
        ("tl/t/d/telemetry", one),
        ("tl/s/d/event", one),
        ("tl/s/d/telemetry", r#"{"epoch":1,"seq":1,"values":{"t": 1}}"#),
        ("tl/s/d/telemetry", r#"{"epoch":1,"seq":2,"values":{"t":1}}"#),
    ] {
        assert_ne!(first, id(topic, payload), "{topic} {payload}");
    }
    let none = r#"{"seq":1,"values":{"t":1}}"#;
    let random = id("tl/s/d/telemetry", none);
    assert_ne!(random, id("tl/s/d/telemetry", none));
    assert_eq!(random.as_bytes()[14], b'7', "{random}");
}

#[test]
fn ids_from_outside_are_kept_and_others_ignored() {
    let mut bench = Bench::new();
    let outside = "4bf92f3577b34da6a3ce929d0e0e4736";
    let traceparent = format!("00-{outside}-00f067aa0ba902b7-01");
    let properties = [("traceparent".to_owned(), traceparent.clone())];
    let mut trace = |field: &str, properties: &[(String, String)]| {
        let payload = format!(r#"{{"trace_id":"{field}","values":{{}}}}"#);
        let publish = Publish { properties, ..publish("tl/s/d/telemetry", payload.as_bytes()) };
        assert_eq!(bench.transformer.admit(&publish, &Scope::default(), None), Verdict::Accepted);
        let value = bench.transformer.records().get(0).value;
        let message: DeviceMessage = bench.codec.decode(value).expect("decodes");
        (message.trace_id == outside, bench.transformer.records().len())
    };
    assert_eq!(trace(outside, &[]), (true, 2));
    assert_eq!(trace(&traceparent, &[]), (true, 2));
    assert_eq!(trace("", &properties), (true, 2));
    assert_eq!(trace("not an id", &[]), (false, 1));
}

#[test]
fn every_function_that_the_catalog_allows_exists() {
    let calls = [
        ("split", "'a,b'.split(',')[1] == 'b'"),
        ("join", "['a','b'].join('-') == 'a-b'"),
        ("replace", "'aXb'.replace('X','-') == 'a-b'"),
        ("lower", "'AB'.lower() == 'ab'"),
        ("upper", "'ab'.upper() == 'AB'"),
        ("trim", "' a '.trim() == 'a'"),
        ("number", "number(' 21.5 ') == 21.5"),
        ("json", "json('{\"a\":1}').a == 1"),
        ("lowerAscii", "'AB'.lowerAscii() == 'ab'"),
        ("upperAscii", "'ab'.upperAscii() == 'AB'"),
        ("charAt", "'abc'.charAt(1) == 'b'"),
        ("indexOf", "'abc'.indexOf('c') == 2"),
        ("lastIndexOf", "'aba'.lastIndexOf('a') == 2"),
        ("substring", "'abc'.substring(1) == 'bc'"),
        ("reverse", "'abc'.reverse() == 'cba'"),
        ("format", "'%d'.format([1]) == '1'"),
        ("quote", "strings.quote('a') == '\"a\"'"),
    ];
    for function in FEED_FUNCTIONS {
        let (_, expression) = calls
            .iter()
            .find(|(name, _)| *name == function)
            .unwrap_or_else(|| panic!("`{function}` has no test"));
        let toml = format!(
            "name='f'\nfilter='a/{{device}}'\ndecoder='text'\nsite=\"'s'\"\nwhen='''{expression}'''\nmeasurement=\"'x'\""
        );
        let feed: FeedSpec = toml::from_str(&toml).expect("a feed");
        let router = Router::of_feeds([(DEVICE_TELEMETRY_V1, &feed)]).expect("compiles");
        let mut bench = Bench::of(&Catalog::embedded(), router);
        assert_eq!(bench.admit("a/d", b"x", None), Verdict::Accepted, "{expression}");
    }
}

#[test]
fn what_is_wrong_with_a_message_is_said_in_its_dead_letter() {
    let mut bench = Bench::new();
    for (topic, payload, code) in [
        ("tl/s/d/telemetry", b"[]".as_slice(), "payload_empty"),
        ("tl/s/d/telemetry", b"{\"values\":{}} x", "payload_not_json"),
        ("tl/s/d/telemetry", b"[{\"values\":{}},", "payload_not_json"),
        ("tl/s/d e/telemetry", b"{}", "device_invalid"),
        ("tl//d/telemetry", b"{}", "site_invalid"),
        ("tl/s/d/other", b"{}", "topic_unmatched"),
        ("number/s/d/t", b"warm", "payload_not_number"),
        ("v3/app/devices/d/up", b"{}", "feed_expression"),
        ("zigbee2mqtt/lamp", b"[1", "payload_not_json"),
    ] {
        assert_eq!(bench.admit(topic, payload, None), Verdict::DeadLettered(code), "{topic}");
        let record = bench.transformer.records().get(0);
        assert_eq!((bench.transformer.records().len(), record.value), (1, Some(payload)));
        let exception = record.headers.last("__connect.errors.exception.class.name");
        assert_eq!(exception, Some(code.as_bytes()));
        assert!(record.topic.ends_with(".bridge-dlt"));
    }
}

#[test]
fn what_a_message_would_become_is_bounded() {
    let mut bench = Bench::new();
    let text = "x".repeat(1 << 20);
    let values = format!(r#"{{"values":{{"a":"{text}"}}}}"#);
    // An element is small and its record is not: the envelope says each time who it is from.
    let list = format!("[{}]", vec![r#"{"values":{"a":1}}"#; 40_000].join(","));
    for (payload, code) in [(values, "values_too_large"), (list, "records_too_large")] {
        let verdict = bench.admit("tl/s/d/telemetry", payload.as_bytes(), None);
        assert_eq!(verdict, Verdict::DeadLettered(code));
        assert_eq!(bench.transformer.records().len(), 1, "none of it is accepted");
    }
}

/// Makes the record that a replay of a dead letter puts into the replay topic.
fn replayed(bench: &Bench, offset: i64, fixed: &[u8]) -> Batch {
    let letter = bench.transformer.records().get(0);
    let mut batch = Batch::new(TopicPartition::new("device.telemetry.v1.bridge-replay", 3));
    let origin = ("tl-bridge-origin", b"device.telemetry.v1.bridge-dlt/0/17".as_slice());
    batch.push(
        offset,
        Timestamp(NOW.0 + 60_000_000),
        letter.key,
        Some(fixed),
        letter.headers.iter().chain([origin]),
    );
    batch
}

#[test]
fn a_second_replay_of_a_dead_letter_gives_the_same_records() {
    let catalog = Catalog::embedded();
    let mut bench = Bench::new();
    assert_eq!(bench.admit("tl/s/d/telemetry", b"{", None), Verdict::DeadLettered("payload_not_json"));
    let router = Arc::new(Router::compile(&catalog).expect("compiles"));
    let mut stage = ReplayBridge::new(router, Arc::clone(&bench.codec), "bridge-0");
    assert!(stage.reads_only_replays() && stage.spec().inputs.contains(&DEVICE_TELEMETRY_V1));
    let mut run = |batch: &Batch| {
        let mut effects = Effects::new(Arc::clone(&bench.codec));
        let record = batch.get(0);
        let input =
            Input { topic: DEVICE_TELEMETRY_V1, replayed: true, partition: 3, record, codec: &bench.codec };
        let settled = stage.process(&input, &mut Keyed::default(), &mut effects);
        let values: Vec<Vec<u8>> =
            effects.outbox().iter().map(|r| r.value.unwrap_or_default().to_vec()).collect();
        (settled, values)
    };
    let fixed = br#"[{"values":{"t":1}},{"values":{"t":1}}]"#;
    let (settled, first) = run(&replayed(&bench, 5, fixed));
    assert_eq!(settled.outcome, Outcome::Emitted);
    let (_, second) = run(&replayed(&bench, 9, fixed));
    assert_eq!(first, second);
    let messages: Vec<DeviceMessage> =
        first.iter().map(|v| bench.codec.decode(Some(v)).expect("decodes")).collect();
    assert_ne!(messages[0].message_id, messages[1].message_id);
    assert_eq!(messages[0].received_at, NOW, "the time of the first admission");
    assert!(messages.iter().all(|m| m.flags.contains(&"replayed".to_owned())));
    let (settled, none) = run(&replayed(&bench, 6, b"{"));
    assert_eq!(
        (settled.outcome, settled.reason.as_ref(), none.len()),
        (Outcome::DeadLettered, "payload_not_json", 0)
    );
}

#[test]
fn a_replay_keeps_to_what_its_sender_might_publish() {
    let catalog = Catalog::embedded();
    let mut bench = Bench::new();
    let sites = ["mine".to_owned()];
    let scope = Scope { sites: Some(&sites), devices: None };
    let verdict = bench.transformer.admit(&publish("series/mine/d", b"["), &scope, None);
    assert_eq!(verdict, Verdict::DeadLettered("payload_not_json"));
    let letter = bench.transformer.records().get(0);
    let mut batch = Batch::new(TopicPartition::new("device.telemetry.v1.bridge-replay", 0));
    let moved = ("tl-mqtt-topic", b"series/theirs/d".as_slice());
    batch.push(1, NOW, letter.key, Some(b"[{\"t\":1}]"), letter.headers.iter().chain([moved]));
    let router = Arc::new(Router::compile(&catalog).expect("compiles"));
    let mut stage = ReplayBridge::new(router, Arc::clone(&bench.codec), "bridge-0");
    let mut effects = Effects::new(Arc::clone(&bench.codec));
    let record = batch.get(0);
    let input =
        Input { topic: DEVICE_TELEMETRY_V1, replayed: true, partition: 0, record, codec: &bench.codec };
    let settled = stage.process(&input, &mut Keyed::default(), &mut effects);
    assert_eq!((settled.outcome, settled.reason.as_ref()), (Outcome::DeadLettered, "not_own_device"));
    assert!(effects.outbox().is_empty());
}

const TOPICS: [&str; 12] = [
    "tl/s/d/telemetry",
    "tl/s/d/response",
    "tele/d/SENSOR",
    "tele/d/LWT",
    "zigbee2mqtt/d",
    "number/s/d/t",
    "series/s/d",
    "v3/a/devices/d/up",
    "d/events/rpc",
    "shellies/d/relay/0",
    "json/s/d",
    "no/such/topic",
];

proptest! {
    #[test]
    fn arbitrary_bytes_become_records_or_one_dead_letter_and_never_panic(
        topic in prop::sample::select(&TOPICS[..]),
        payload in prop_oneof![
            prop::collection::vec(any::<u8>(), 0..80),
            "[\\[\\]{}\",:a-z0-9.eE+\\- ]{0,80}".prop_map(String::into_bytes),
            "\\{\"(epoch|seq|ts|values)\":[\\[\\]{}\"0-9.eE\\-]{0,12}\\}".prop_map(String::into_bytes),
        ],
    ) {
        let mut bench = Bench::new();
        match bench.admit(topic, &payload, None) {
            Verdict::Accepted => {
                for record in bench.transformer.records().iter() {
                    let message: DeviceMessage = bench.codec.decode(record.value).expect("what was written reads");
                    let mut again = Vec::new();
                    bench.codec.encode(record.topic, &message, &mut again).expect("encodes");
                    prop_assert_eq!(record.value, Some(again.as_slice()));
                }
            }
            Verdict::DeadLettered(_) => {
                prop_assert_eq!(bench.transformer.records().len(), 1);
                prop_assert_eq!(bench.transformer.records().get(0).value, Some(payload.as_slice()));
            }
            Verdict::Forbidden(_) => prop_assert!(false, "nothing is forbidden here"),
        }
    }
}
