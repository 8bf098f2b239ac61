//! Makes the records of a scenario's steps.

use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::Arc;
use throughline_model::codec::Codec;
use throughline_model::envelope::{
    DeviceMessage, Enveloped, IDENTITY_NONE, IDENTITY_SEQUENCE, Measurement, RuleRecord, TwinRequest,
};
use throughline_model::ids::{DeviceKey, TraceId, sequence_message_id};
use throughline_model::record::Outbox;
use throughline_model::stage::traceparent;
use throughline_model::time::Timestamp;
use throughline_model::topics::{SERVICE_PLATFORM_RULE_V1, SERVICE_PLATFORM_TWIN_REQUEST_V1};
use throughline_testkit::scenario::{Garbage, Message, Request};

/// Who admitted the records.
const RECEIVED_BY: &str = "scenario";

/// Makes a device message as the bridge writes it, as often as it arrives.
pub fn message(codec: &Codec, site: &str, message: &Message, now: Timestamp) -> Result<Outbox, String> {
    let key = device_of(site, &message.device)?;
    let measurements = measurements(&message.values)?;
    let occurred_at = Timestamp(now.0 - (message.late_seconds * 1e6) as i64);
    // The native form names a stream by its topic's segment, and so do our topics.
    let stream = message.topic.split('.').nth(1).unwrap_or_default();
    let (epoch, seq) = (message.seq.map(|_| message.epoch), message.seq);
    let element = format!("{now} {measurements:?}");
    let id = sequence_message_id(
        Some(occurred_at),
        key.site(),
        key.device(),
        stream,
        message.epoch,
        seq.unwrap_or_default(),
        element.as_bytes(),
    );
    let record = DeviceMessage {
        message_id: id.to_string(),
        trace_id: trace_id(now, key.as_str()),
        identity: if seq.is_some() { IDENTITY_SEQUENCE } else { IDENTITY_NONE }.to_owned(),
        site_id: key.site().to_owned(),
        device_id: key.device().to_owned(),
        received_by: RECEIVED_BY.to_owned(),
        stream: stream.to_owned(),
        epoch,
        seq,
        occurred_at,
        received_at: now,
        measurements,
        ..DeviceMessage::default()
    };
    let mut outbox = Outbox::default();
    for _ in 0..message.times {
        put(&mut outbox, codec, &message.topic, key.as_str(), &record)?;
    }
    Ok(outbox)
}

/// Makes a record that is not a message.
pub fn garbage(site: &str, garbage: &Garbage) -> Result<Outbox, String> {
    let key = device_of(site, &garbage.key)?;
    let mut outbox = Outbox::default();
    let (key, value) = (key.as_str().as_bytes(), garbage.text.as_bytes());
    outbox.push(&garbage.topic.as_str().into(), None, Some(key), Some(value), []);
    Ok(outbox)
}

/// Makes a request as `throughline twin set` writes it.
pub fn request(codec: &Codec, site: &str, request: &Request, now: Timestamp) -> Result<Outbox, String> {
    let key = device_of(site, &request.device)?;
    let id = sequence_message_id(Some(now), key.site(), key.device(), "twin_request", 0, 0, &[]);
    let record = TwinRequest {
        message_id: id.to_string(),
        trace_id: trace_id(now, key.as_str()),
        request_id: Some(id.to_string()),
        request_code: Some("twin_set".to_owned()),
        identity: IDENTITY_NONE.to_owned(),
        site_id: key.site().to_owned(),
        device_id: key.device().to_owned(),
        received_by: RECEIVED_BY.to_owned(),
        stream: "twin_request".to_owned(),
        occurred_at: now,
        received_at: now,
        desired: measurements(&request.desired)?,
        expected_version: request.expected_version,
        ..TwinRequest::default()
    };
    let mut outbox = Outbox::default();
    put(&mut outbox, codec, SERVICE_PLATFORM_TWIN_REQUEST_V1, key.as_str(), &record)?;
    Ok(outbox)
}

/// Makes a rule's record as `throughline rules apply` writes it.
pub fn rule(codec: &Codec, rule: &Value, version: i64, now: Timestamp) -> Result<Outbox, String> {
    let id = rule["id"].as_str().ok_or_else(|| format!("the rule {rule} has no id"))?;
    let definition = toml::to_string(rule).map_err(|e| format!("rule `{id}` is no TOML: {e}"))?;
    let record = RuleRecord {
        message_id: sequence_message_id(Some(now), "", id, "rule", 0, version, &[]).to_string(),
        trace_id: trace_id(now, id),
        identity: IDENTITY_NONE.to_owned(),
        received_by: RECEIVED_BY.to_owned(),
        stream: "rule".to_owned(),
        occurred_at: now,
        received_at: now,
        rule_id: id.to_owned(),
        rule_version: version,
        enabled: rule["enabled"].as_bool().unwrap_or(true),
        definition,
        ..RuleRecord::default()
    };
    let mut outbox = Outbox::default();
    put(&mut outbox, codec, SERVICE_PLATFORM_RULE_V1, id, &record)?;
    Ok(outbox)
}

/// Makes the tombstones of rules.
pub fn withdrawn<'a>(ids: impl Iterator<Item = &'a String>) -> Outbox {
    let topic: Arc<str> = SERVICE_PLATFORM_RULE_V1.into();
    let mut outbox = Outbox::default();
    for id in ids {
        outbox.push(&topic, None, Some(id.as_bytes()), None, []);
    }
    outbox
}

/// Reads `site/device`; the site must be that of the scenario.
fn device_of(site: &str, text: &str) -> Result<DeviceKey, String> {
    let named = text.split_once('/').filter(|(named, _)| *named == site);
    let (_, device) =
        named.ok_or_else(|| format!("`{text}`: a device here is `{site}/…`, the site named as the file"))?;
    DeviceKey::new(site, device).map_err(|e| e.to_string())
}

fn measurements(values: &BTreeMap<String, Value>) -> Result<Vec<Measurement>, String> {
    let mut measurements = Vec::new();
    for (name, value) in values {
        let mut measurement = Measurement { name: name.clone(), ..Measurement::default() };
        match value {
            Value::Number(number) => measurement.number = number.as_f64(),
            Value::String(text) => measurement.text = Some(text.clone()),
            Value::Bool(flag) => measurement.flag = Some(*flag),
            Value::Null => {}
            other => return Err(format!("value `{name}` is {other}; it is a number, text or boolean")),
        }
        measurements.push(measurement);
    }
    Ok(measurements)
}

fn trace_id(now: Timestamp, key: &str) -> String {
    TraceId::mint(now, key.as_bytes(), now.0.unsigned_abs()).to_hex()
}

fn put<T: Serialize + Enveloped>(
    outbox: &mut Outbox,
    codec: &Codec,
    topic: &str,
    key: &str,
    record: &T,
) -> Result<(), String> {
    let trace = traceparent(&record.envelope());
    let headers = trace.as_deref().map(|t| ("traceparent", t.as_bytes()));
    let written = outbox.push_with(&topic.into(), None, Some(key.as_bytes()), headers, |out| {
        codec.encode(topic, record, out).map(|()| true)
    });
    written.map_err(|e| e.to_string())
}
