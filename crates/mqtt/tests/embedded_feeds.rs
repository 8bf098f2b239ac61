//! The feeds of the catalog and of docs/feeds.md take the messages that real devices send.

use std::sync::Arc;
use throughline_model::catalog::{Catalog, Cleanup};
use throughline_model::codec::Codec;
use throughline_model::envelope::DeviceMessage;
use throughline_model::time::Timestamp;
use throughline_model::topics;
use throughline_mqtt::Router;
use throughline_mqtt::feeds::Publish;
use throughline_mqtt::transform::{Scope, Transformer, Verdict};

const RECEIVED_AT: Timestamp = Timestamp(1_769_853_600_000_000);

fn bridge(catalog: &Catalog) -> (Transformer, Arc<Codec>) {
    let codec = Arc::new(Codec::default());
    for (topic, id) in catalog.topics().zip(1..) {
        codec.bind(topic.spec.name.as_str(), id, &topic.schema).expect("a sound schema");
    }
    assert!(catalog.topics().any(|t| t.spec.cleanup == Cleanup::Compact), "the whole catalog is bound");
    let router = Arc::new(Router::compile(catalog).expect("the feeds compile"));
    (Transformer::new(router, Arc::clone(&codec), "test"), codec)
}

/// Passes a message through the bridge and describes what came out, one line a record.
fn taken(bridge: &mut Transformer, codec: &Codec, topic: &str, payload: &[u8]) -> String {
    let publish = Publish {
        topic,
        payload,
        client_id: "client",
        user: None,
        login_site: Some("login-site"),
        properties: &[],
        received_at: RECEIVED_AT,
    };
    match bridge.admit(&publish, &Scope::default(), None) {
        Verdict::Accepted => {}
        other => {
            let what = bridge.records().iter().next().map(|r| {
                let message = r.headers.last("__connect.errors.exception.message").unwrap_or_default();
                format!("{} {}", r.topic, String::from_utf8_lossy(message))
            });
            return format!("{other:?} {}", what.unwrap_or_default());
        }
    }
    let described = bridge.records().iter().filter(|r| r.topic.starts_with("device.")).map(|record| {
        let message: DeviceMessage = codec.decode(record.value).expect("the bridge wrote it");
        let time = if message.flags.iter().any(|f| f == "no_ts") {
            "-".to_owned()
        } else {
            (message.occurred_at.0 - RECEIVED_AT.0).to_string()
        };
        let mut values: Vec<String> = message
            .measurements
            .iter()
            .map(|m| {
                let value = match (m.number, &m.text, m.flag) {
                    (Some(n), ..) => n.to_string(),
                    (_, Some(t), _) => format!("'{t}'"),
                    (.., Some(f)) => f.to_string(),
                    _ => "null".to_owned(),
                };
                format!("{}={value}{}", m.name, m.unit.as_deref().unwrap_or_default())
            })
            .collect();
        values.sort();
        let key = String::from_utf8_lossy(record.key.unwrap_or_default()).into_owned();
        let seq = message.seq.map_or("-".to_owned(), |s| s.to_string());
        format!("{} {key} {} {seq} {time} {}", record.topic, message.stream, values.join(" "))
    });
    described.collect::<Vec<_>>().join("\n")
}

#[test]
fn the_embedded_feeds_read_what_devices_send() {
    let (mut bridge, codec) = bridge(&Catalog::embedded());
    for (topic, payload, expected) in [
        (
            "tl/site-1/pump-7/telemetry",
            r#"{"epoch":1,"seq":42,"ts":"2026-01-31T10:00:01Z","values":{"temperature":21.5,"running":true,"mode":"auto"}}"#,
            "device.telemetry.v1 site-1/pump-7 telemetry 42 1000000 mode='auto' running=true temperature=21.5",
        ),
        ("tl/site-1/pump-7/heartbeat", "{}", "device.heartbeat.v1 site-1/pump-7 heartbeat - - "),
        (
            "tl/site-1/pump-7/event",
            r#"{"values":{"door":"open"}}"#,
            "device.event.v1 site-1/pump-7 event - - door='open'",
        ),
        (
            "tl/site-1/pump-7/response",
            r#"{"request_id":"r","response_code":"success"}"#,
            "device.response.v1 site-1/pump-7 response - - ",
        ),
        (
            "tl/site-1/pump-7/reported",
            r#"{"values":{"target":21}}"#,
            "device.reported.v1 site-1/pump-7 reported - - target=21",
        ),
        (
            "tele/plug-1/SENSOR",
            r#"{"Time":"2026-01-31T09:59:59","ENERGY":{"TotalStartTime":"2025-01-01T00:00:00","Total":3.5,"Power":12,"Voltage":230},"AM2301":{"Temperature":21.5},"TempUnit":"C"}"#,
            "device.telemetry.v1 home/plug-1 tasmota_sensor - -1000000 AM2301.Temperature=21.5 ENERGY.Power=12W ENERGY.Total=3.5kWh ENERGY.Voltage=230V",
        ),
        ("tele/plug-1/LWT", "Online", "device.event.v1 home/plug-1 tasmota_lwt - - online=true"),
        ("tele/plug-1/LWT", "Offline", "device.event.v1 home/plug-1 tasmota_lwt - - online=false"),
        (
            "zigbee2mqtt/kitchen_lamp",
            r#"{"state":"ON","brightness":254,"linkquality":88,"color":{"x":0.3},"update":{"state":"idle"},"last_seen":"2026-01-31T11:00:00+01:00"}"#,
            "device.telemetry.v1 home/kitchen_lamp zigbee2mqtt - 0 brightness=254 color.x=0.3 linkquality=88 state='ON'",
        ),
        (
            "zigbee2mqtt/kitchen_lamp/availability",
            r#"{"state":"online"}"#,
            "device.event.v1 home/kitchen_lamp zigbee2mqtt_availability - - online=true",
        ),
        (
            "shellyplus1pm-a8/events/rpc",
            r#"{"src":"shellyplus1pm-a8","dst":"shellyplus1pm-a8/events","method":"NotifyStatus","params":{"ts":1769853600.5,"switch:0":{"id":0,"apower":8.9}}}"#,
            "device.telemetry.v1 home/shellyplus1pm-a8 shelly_status - 500000 switch:0.apower=8.9 switch:0.id=0",
        ),
        (
            "shellyplus1pm-a8/events/rpc",
            r#"{"src":"x","method":"NotifyEvent","params":{"ts":1769853600.5,"events":[{"component":"input:0","event":"single_push","ts":1769853600}]}}"#,
            "device.event.v1 home/shellyplus1pm-a8 shelly_event - 0 component='input:0' event='single_push'",
        ),
        (
            "shellies/shelly1pm-b1/relay/0/power",
            "12.34",
            "device.telemetry.v1 home/shelly1pm-b1 shelly_meter - - relay.0.power=12.34",
        ),
        (
            "shellies/shelly1pm-b1/relay/0",
            "on",
            "device.telemetry.v1 home/shelly1pm-b1 shelly_relay - - relay.0=true",
        ),
        (
            "shellies/shellyht-c1/sensor/temperature",
            "21.5",
            "device.telemetry.v1 home/shellyht-c1 shelly_sensor - - sensor.temperature=21.5",
        ),
        (
            "v3/farm@ttn/devices/soil-1/up",
            r#"{"end_device_ids":{"device_id":"soil-1"},"received_at":"2026-01-31T10:00:00.25Z","uplink_message":{"f_port":1,"f_cnt":7,"decoded_payload":{"moisture":41.5},"rx_metadata":[{"rssi":-97}]}}"#,
            "device.telemetry.v1 farm@ttn/soil-1 the_things_network 7 250000 moisture=41.5",
        ),
        (
            "v3/farm@ttn/devices/soil-1/up",
            r#"{"received_at":"2026-01-31T10:00:00Z","uplink_message":{"decoded_payload":{"moisture":41.5}}}"#,
            "device.telemetry.v1 farm@ttn/soil-1 the_things_network 0 0 moisture=41.5",
        ),
        (
            "number/site-1/tank-2/level",
            " 21.5 ",
            "device.telemetry.v1 site-1/tank-2 bare_number - - level=21.5",
        ),
        (
            "series/site-1/logger-3",
            r#"[{"ts":1769853601,"flow":1},{"ts":1769853602000,"flow":2,"epoch":1,"seq":9}]"#,
            "device.telemetry.v1 site-1/logger-3 series - 1000000 flow=1\ndevice.telemetry.v1 site-1/logger-3 series 9 2000000 flow=2",
        ),
        (
            "json/site-1/any",
            r#"{"a":{"b":[1,"x"]},"big":9007199254740993}"#,
            "device.telemetry.v1 site-1/any plain_json - - a.b.0=1 a.b.1='x' big='9007199254740993'",
        ),
    ] {
        assert_eq!(taken(&mut bridge, &codec, topic, payload.as_bytes()), expected, "{topic} {payload}");
    }
}

#[test]
fn what_no_embedded_feed_reads_is_dead_lettered_with_the_reason() {
    let (mut bridge, codec) = bridge(&Catalog::embedded());
    for (topic, payload, expected) in [
        ("somebody/elses/topic", "x", "device.unmatched.v1.bridge-dlt"),
        ("zigbee2mqtt/bridge", "{}", "device.unmatched.v1.bridge-dlt"),
        ("number/site-1/tank-2/level", "warm", "device.telemetry.v1.bridge-dlt"),
        ("tele/plug-1/SENSOR", "{\"Time\":\"soon\"}", "device.telemetry.v1.bridge-dlt"),
        ("tele/plug-1/SENSOR", "{", "device.telemetry.v1.bridge-dlt"),
        ("series/site-1/logger-3", "{\"ts\":1}", "device.telemetry.v1.bridge-dlt"),
    ] {
        let found = taken(&mut bridge, &codec, topic, payload.as_bytes());
        assert!(found.starts_with("DeadLettered") && found.contains(expected), "{topic} {payload}: {found}");
    }
}

/// Returns the feeds that docs/feeds.md shows.
fn documented_feeds() -> String {
    let text = include_str!("../../../docs/feeds.md");
    let blocks = text.split("```toml\n").skip(1).filter_map(|rest| rest.split("```").next());
    blocks.filter(|block| block.starts_with("[[feed]]")).collect::<Vec<_>>().join("\n")
}

#[test]
fn the_documented_examples_work() {
    let topic = format!(
        "name = \"device.sample.v1\"\nsummary = \"Samples.\"\nowner = \"docs\"\nkey = \"site/device\"\nschema = \"{}.avsc\"\npartitions = 6\ncleanup = \"delete\"\nretention = \"7d\"\n{}",
        topics::DEVICE_TELEMETRY_V1,
        documented_feeds()
    );
    let catalog = Catalog::with_extra(&[("device.sample.v1.toml", topic.as_str())], &[]).expect("sound");
    let (mut bridge, codec) = bridge(&catalog);
    for (topic, payload, expected) in [
        (
            "farm/site-1/house/bed-4/air",
            br#"{"at":"2026-01-31T11:00:00","n":5,"t":21.5,"rh":60}"#.as_slice(),
            "device.sample.v1 site-1/bed-4 greenhouse 5 0 humidity=60% temperature=21.5°C",
        ),
        (
            "logger/l-1",
            b"1769853600;1.5;2\n1769853601;1.25;2.5\n",
            "device.sample.v1 login-site/l-1 logger - 0 flow=1.5 pressure=2\ndevice.sample.v1 login-site/l-1 logger - 1000000 flow=1.25 pressure=2.5",
        ),
        (
            "senml/site-1/s-1",
            br#"[{"n":"t","u":"Cel","v":21.5},{"n":"id","vs":"x"},{"n":"rh","v":60}]"#,
            "device.sample.v1 site-1/s-1 senml - - rh=60 t=21.5Cel",
        ),
        (
            "probe/site-1/p-1",
            b"\xff\xf6\x3c\x00\x0c\xe4",
            "device.sample.v1 site-1/p-1 probe - - battery=3300 humidity=60 temperature=-1",
        ),
    ] {
        assert_eq!(taken(&mut bridge, &codec, topic, payload), expected, "{topic}");
    }
}
