//! What would become of replays now: a stage's own pure function on them, with today's tables, feeds and
//! schemas and the state of their keys. Nothing is written and no group is joined.

use crate::context::Context;
use crate::failure::CliError;
use crate::records::{Reader, brief};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::sync::Arc;
use throughline_kafka::TopicReader;
use throughline_model::ids::partition_of;
use throughline_model::keyed::{Keyed, KeyedState};
use throughline_model::outcome::Settled;
use throughline_model::record::{Batch, Record};
use throughline_model::rows::Rows;
use throughline_model::stage::{Act, Decide, Effects, Input, Load};
use throughline_mqtt::{ReplayBridge, Router};
use throughline_runtime::ports::{Failure, TableReader};

/// What would become of one replay.
#[derive(Clone, Debug)]
pub struct Prediction {
    /// The outcome and, for a dead letter, code and message.
    pub settled: Settled,
    /// What would come out: records with their topics and keys, or rows with their tables.
    pub outputs: Vec<Value>,
}

impl Prediction {
    /// Returns the prediction as JSON.
    pub fn to_json(&self) -> Value {
        json!({"outcome": self.settled.outcome.label(), "code": self.settled.reason,
               "message": self.settled.message, "outputs": self.outputs})
    }
}

/// Predicts the bridge's: today's feeds decode the payload.
///
/// # Errors
/// Exit code 2 when the feeds do not compile, 4 when a dependency is away.
pub fn bridge(context: &Context, topic: &str, replays: &Batch) -> Result<Vec<Prediction>, CliError> {
    let router = Arc::new(Router::compile(&context.catalog).map_err(|e| CliError::usage(e.to_string()))?);
    let stage = ReplayBridge::new(router, Arc::clone(&context.codec), "dry-run");
    decide(context, stage, topic, replays)
}

/// Predicts a decide stage's. State that one replay changes is seen by the next.
///
/// # Errors
/// Exit code 4 when a dependency is away.
pub fn decide<D: Decide>(
    context: &Context,
    mut stage: D,
    topic: &str,
    replays: &Batch,
) -> Result<Vec<Prediction>, CliError> {
    let mut reader = Reader::new(context);
    let spec = stage.spec().clone();
    let mut tables = TopicReader::new(&context.kafka());
    for table in &spec.tables {
        let mut batches = Vec::new();
        tables.follow(table, &mut |batch| batches.push(batch.clone()))?;
        for batch in &batches {
            for record in batch.iter() {
                reader.learn(record.value)?;
                stage.table(&input(context, table, batch.source.partition, false, record));
            }
        }
    }
    let mut states = Keyed::default();
    if let Some(changelog) = &spec.changelog {
        restore(context, &mut reader, &mut tables, changelog, topic, replays, &mut states)?;
    }
    let mut effects = Effects::new(Arc::clone(&context.codec));
    let mut predictions = Vec::new();
    for record in replays.iter() {
        reader.learn(record.value)?;
        let partition = partition(context, topic, &record);
        let settled =
            stage.process(&input(context, topic, partition, true, record), &mut states, &mut effects);
        if let Some(failure) = effects.take_failure() {
            return Err(CliError::failed(format!("stage `{}`: {failure}", spec.group)));
        }
        let mut outputs = Vec::new();
        for out in effects.outbox().iter() {
            let value = reader.value(out.value)?;
            outputs.push(json!({
                "topic": out.topic,
                "key": out.key.map(|key| String::from_utf8_lossy(key).into_owned()),
                "value": value.as_ref().map_or_else(|why| json!(why), brief),
            }));
        }
        effects.clear();
        predictions.push(Prediction { settled, outputs });
    }
    Ok(predictions)
}

/// Predicts a load stage's: the rows that it would make, checked as before they are sent. What only the
/// database would refuse is not seen.
///
/// # Errors
/// Exit code 4 when a dependency is away.
pub fn load<L: Load>(
    context: &Context,
    mut stage: L,
    topic: &str,
    replays: &Batch,
) -> Result<Vec<Prediction>, CliError> {
    let mut reader = Reader::new(context);
    let mut predictions = Vec::new();
    for record in replays.iter() {
        reader.learn(record.value)?;
        let mut rows = Rows::default();
        let partition = partition(context, topic, &record);
        let mut settled = stage.rows(&input(context, topic, partition, true, record), &mut rows);
        if let Err(Failure::Data { code, message }) = throughline_store::validate(&rows) {
            settled = Settled { reason: code.into(), ..Settled::dead_lettered("", message) };
            rows = Rows::default();
        }
        let counts = [
            ("reading", rows.readings.len()),
            ("alert", rows.alerts.len()),
            ("session", rows.sessions.len()),
            ("twin", rows.twins.len()),
        ];
        let outputs =
            counts.iter().filter(|(_, n)| *n > 0).map(|(table, n)| json!({"table": table, "rows": n}));
        predictions.push(Prediction { settled, outputs: outputs.collect() });
    }
    Ok(predictions)
}

/// Predicts an act stage's: what it would send. What the other side makes of it is not seen.
///
/// # Errors
/// Exit code 4 when a dependency is away.
pub fn act<A: Act>(
    context: &Context,
    mut stage: A,
    topic: &str,
    replays: &Batch,
) -> Result<Vec<Prediction>, CliError> {
    let mut reader = Reader::new(context);
    let mut predictions = Vec::new();
    for record in replays.iter() {
        reader.learn(record.value)?;
        let partition = partition(context, topic, &record);
        predictions.push(match stage.request(&input(context, topic, partition, true, record)) {
            Ok(delivery) => {
                let value = serde_json::from_slice(&delivery.body);
                let value = value.unwrap_or_else(|_| json!(format!("{} bytes", delivery.body.len())));
                let sent = json!({"topic": "sent", "key": delivery.id, "value": brief(&value)});
                Prediction { settled: Settled::emitted(), outputs: vec![sent] }
            }
            Err(settled) => Prediction { settled, outputs: Vec::new() },
        });
    }
    Ok(predictions)
}

fn input<'a>(
    context: &'a Context,
    topic: &'a str,
    partition: i32,
    replayed: bool,
    record: Record<'a>,
) -> Input<'a> {
    Input { topic, replayed, partition, record, codec: &context.codec }
}

/// Returns the partition of the replay topic that a record goes to.
fn partition(context: &Context, topic: &str, record: &Record<'_>) -> i32 {
    let count = context.catalog.topic(topic).map_or(1, |found| found.spec.partitions);
    partition_of(record.key.unwrap_or_default(), count)
}

/// Reads the states of the keys that are replayed. The changelog has no index: the partitions that hold them
/// are read whole, and the rest is passed over.
fn restore<S: KeyedState>(
    context: &Context,
    reader: &mut Reader<'_>,
    tables: &mut TopicReader,
    changelog: &str,
    topic: &str,
    replays: &Batch,
    states: &mut Keyed<S>,
) -> Result<(), CliError> {
    let keys: BTreeSet<&str> = replays.iter().filter_map(|record| record.key_str()).collect();
    let numbers: BTreeSet<i32> = replays.iter().map(|record| partition(context, topic, &record)).collect();
    let numbers: Vec<i32> = numbers.into_iter().collect();
    let mut failed = None;
    tables.read_partitions(&changelog.into(), &numbers, &mut |batch| {
        for record in batch.iter() {
            let Some(key) = record.key_str().filter(|key| keys.contains(key)) else { continue };
            let state = reader.learn(record.value).and_then(|()| {
                let state = record.value.map(|value| S::decode(value, &context.codec)).transpose();
                state.map_err(|e| CliError::failed(format!("the state of `{key}` in `{changelog}`: {e}")))
            });
            match state {
                Ok(state) => states.restore(key, state),
                Err(error) => failed = failed.take().or(Some(error)),
            }
        }
    })?;
    failed.map_or(Ok(()), Err)
}
