//! Builders: a codec with the schemas of this build, and device messages.

use std::sync::Arc;
use throughline_model::codec::Codec;
use throughline_model::envelope::{DeviceMessage, IDENTITY_SEQUENCE, Measurement};
use throughline_model::ids::{TraceId, sequence_message_id};
use throughline_model::time::Timestamp;
use throughline_model::topics::SCHEMA_FILES;

/// Makes a codec where every catalog topic is bound to its schema, with ids from 1 in the order of the
/// schema files.
pub fn codec() -> Arc<Codec> {
    let codec = Codec::default();
    for (id, (file, text)) in (1..).zip(SCHEMA_FILES) {
        let topic = file.trim_end_matches(".avsc");
        codec.bind(topic, id, text).unwrap_or_else(|e| panic!("{file}: {e}"));
    }
    Arc::new(codec)
}

/// Returns the schema of a catalog topic.
pub fn schema_of(topic: &str) -> &'static str {
    let file = SCHEMA_FILES.iter().find(|(file, _)| file.trim_end_matches(".avsc") == topic);
    file.unwrap_or_else(|| panic!("no schema file for topic `{topic}`")).1
}

/// Makes a number.
pub fn measurement(name: &str, number: f64) -> Measurement {
    Measurement { name: name.to_owned(), number: Some(number), ..Measurement::default() }
}

/// Makes a telemetry message of epoch 1 as the bridge writes it. `at` is both its own time and the time of
/// its admission.
pub fn device_message(
    site: &str,
    device: &str,
    seq: i64,
    at: Timestamp,
    measurements: Vec<Measurement>,
) -> DeviceMessage {
    let element = format!("{seq} {measurements:?}");
    let id = sequence_message_id(Some(at), site, device, "telemetry", 1, seq, element.as_bytes());
    let key = format!("{site}/{device}");
    DeviceMessage {
        message_id: id.to_string(),
        trace_id: TraceId::mint(at, key.as_bytes(), seq as u64).to_hex(),
        identity: IDENTITY_SEQUENCE.to_owned(),
        site_id: site.to_owned(),
        device_id: device.to_owned(),
        received_by: "testkit".to_owned(),
        stream: "telemetry".to_owned(),
        epoch: Some(1),
        seq: Some(seq),
        occurred_at: at,
        received_at: at,
        measurements,
        ..DeviceMessage::default()
    }
}
