//! `throughline rules test`: the stage itself in memory, on readings from a file.

use super::{record, rehearsal_start};
use crate::failure::{CliError, Exit};
use crate::output;
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use throughline_model::catalog::Catalog;
use throughline_model::codec::Codec;
use throughline_model::envelope::{Alert, DeviceMessage, IDENTITY_SEQUENCE, Measurement};
use throughline_model::ids::DeviceKey;
use throughline_model::keyed::Keyed;
use throughline_model::record::{Batch, TopicPartition};
use throughline_model::stage::{Decide, Effects, Input};
use throughline_model::time::Timestamp;
use throughline_model::topics::{DEVICE_TELEMETRY_V1, SERVICE_PLATFORM_ALERT_V1, SERVICE_PLATFORM_RULE_V1};
use throughline_stages::evaluate_rules::EvaluateRules;
use uuid::Uuid;

/// A line of the readings file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    device: DeviceKey,
    /// Absent: a second after the line before.
    #[serde(default)]
    at: Option<String>,
    values: BTreeMap<String, Value>,
    /// `raised`, `cleared` or `none`; absent: anything.
    #[serde(default)]
    expect: Option<String>,
}

/// Runs the rule on the readings, prints what came out, and compares it with `expect`.
pub fn run(rule_file: &str, rule: &str, readings_file: &str, readings: &str) -> Result<Exit, CliError> {
    let definition = super::check(rule_file, rule)?;
    let codec = Arc::new(Codec::default());
    for (topic, id) in Catalog::embedded().topics().zip(1..) {
        codec
            .bind(topic.spec.name.as_str(), id, &topic.schema)
            .map_err(|e| CliError::failed(e.to_string()))?;
    }
    let mut stage = EvaluateRules::new();
    let rule = record(&definition.id, 1, true, rule);
    let table = batch_of(&codec, SERVICE_PLATFORM_RULE_V1, 0, rehearsal_start(), &definition.id, &rule)?;
    stage.table(&input(SERVICE_PLATFORM_RULE_V1, &table, &codec));

    let mut state = Keyed::default();
    let mut effects = Effects::new(Arc::clone(&codec));
    let mut now = rehearsal_start();
    let mut due: BTreeMap<String, Timestamp> = BTreeMap::new();
    let mut wrong = 0;
    for (number, text) in readings.lines().enumerate().filter(|(_, text)| !text.trim().is_empty()) {
        let place = format!("{readings_file}:{}", number + 1);
        let line: Line = serde_json::from_str(text).map_err(|e| CliError::usage(format!("{place}: {e}")))?;
        now = match &line.at {
            Some(at) => crate::records::point_in_time(at, now)
                .map_err(|e| CliError::usage(format!("{place}: {e}")))?,
            None => now.plus(Duration::from_secs(1)),
        };
        fire_due(&mut stage, &mut due, now, &mut state, &mut effects);
        let message = message_of(&line, number as i64, now);
        let key = line.device.as_str();
        let batch = batch_of(&codec, DEVICE_TELEMETRY_V1, number as i64, now, key, &message)?;
        let settled = stage.process(&input(DEVICE_TELEMETRY_V1, &batch, &codec), &mut state, &mut effects);
        if let Some(at) = state.get(key).and_then(|s| stage.due_at(s)) {
            due.insert(key.to_owned(), at);
        } else {
            due.remove(key);
        }
        let alerts = drain(&codec, &mut effects)?;
        let came = alerts.last().map_or("none", |a| a.state.as_str());
        let expected = line.expect.as_deref();
        let differs = expected.is_some_and(|e| e != came);
        wrong += u64::from(differs);
        let verdict = if differs {
            format!("  WRONG: expected {}", expected.unwrap_or_default())
        } else {
            String::new()
        };
        output::line(&format!("{place} {now} {key}: {came} ({}){verdict}", settled.outcome));
    }
    Ok(if wrong == 0 { Exit::Done } else { Exit::Found })
}

fn fire_due(
    stage: &mut EvaluateRules,
    due: &mut BTreeMap<String, Timestamp>,
    now: Timestamp,
    state: &mut Keyed<<EvaluateRules as Decide>::State>,
    effects: &mut Effects,
) {
    loop {
        let first =
            due.iter().min_by_key(|(key, at)| (**at, (*key).clone())).map(|(key, at)| (key.clone(), *at));
        let Some((key, at)) = first.filter(|(_, at)| *at < now) else { return };
        stage.fire(&key, at, state, effects);
        match state.get(&key).and_then(|s| stage.due_at(s)) {
            Some(next) => due.insert(key, next),
            None => due.remove(&key),
        };
    }
}

fn message_of(line: &Line, seq: i64, now: Timestamp) -> DeviceMessage {
    let measurements = line.values.iter().map(|(name, value)| Measurement {
        name: name.clone(),
        number: value.as_f64(),
        text: value.as_str().map(str::to_owned),
        flag: value.as_bool(),
        unit: None,
    });
    DeviceMessage {
        message_id: Uuid::from_u128(seq as u128 + 1).to_string(),
        trace_id: format!("{:032x}", seq + 1),
        identity: IDENTITY_SEQUENCE.to_owned(),
        site_id: line.device.site().to_owned(),
        device_id: line.device.device().to_owned(),
        received_by: "throughline rules test".to_owned(),
        stream: "telemetry".to_owned(),
        epoch: Some(1),
        seq: Some(seq),
        occurred_at: now,
        received_at: now,
        measurements: measurements.collect(),
        ..DeviceMessage::default()
    }
}

fn batch_of<T: serde::Serialize>(
    codec: &Codec,
    topic: &str,
    offset: i64,
    time: Timestamp,
    key: &str,
    value: &T,
) -> Result<Batch, CliError> {
    let mut bytes = Vec::new();
    codec.encode(topic, value, &mut bytes).map_err(|e| CliError::failed(e.to_string()))?;
    let mut batch = Batch::new(TopicPartition::new(topic, 0));
    batch.push(offset, time, Some(key.as_bytes()), Some(&bytes), []);
    Ok(batch)
}

fn input<'a>(topic: &'a str, batch: &'a Batch, codec: &'a Codec) -> Input<'a> {
    Input { topic, replayed: false, partition: 0, record: batch.get(0), codec }
}

fn drain(codec: &Codec, effects: &mut Effects) -> Result<Vec<Alert>, CliError> {
    if let Some(failure) = effects.take_failure() {
        return Err(CliError::failed(failure.to_string()));
    }
    let mut alerts = Vec::new();
    for record in effects.outbox().iter().filter(|r| r.topic == SERVICE_PLATFORM_ALERT_V1) {
        alerts.push(codec.decode::<Alert>(record.value).map_err(|e| CliError::failed(e.to_string()))?);
    }
    effects.outbox_mut().clear();
    Ok(alerts)
}
