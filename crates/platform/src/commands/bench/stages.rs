//! Stages that find a full topic when they start, beside a plain consume or a plain COPY.

use super::cpu::Spent;
use super::place::Place;
use super::readings::{self, Readings};
use super::{Line, Mark, limit};
use crate::commands::rules;
use crate::failure::CliError;
use crate::output;
use crate::roles::store_options;
use std::time::{Duration, Instant};
use throughline_kafka::baseline;
use throughline_model::rows::ReadingRow;
use throughline_model::topics::{DATA_CORE_READING_V1, DEVICE_TELEMETRY_V1};
use throughline_store::{SqlStore, Table};

/// First marks: CPU seconds of the role per million messages.
const EVALUATE_RULES_CPU_MOST: f64 = 5.0;
const BRIDGE_DATA_CPU_MOST: f64 = 8.0;
/// First mark: rows a second, in hundredths of those of a plain COPY.
const COPY_PERCENT_LEAST: f64 = 30.0;

/// Rules in force, all on the measurement that every reading has.
const RULES: usize = 100;
/// Messages of one plain COPY: as many rows as one write of the load loop.
const MESSAGES_PER_COPY: u64 = 3_333;
/// How often the position is looked at.
const LOOK: Duration = Duration::from_millis(60);

/// Measures `evaluate_rules` with 100 rules.
///
/// # Errors
/// When the stage does not get through.
pub fn evaluate_rules(place: &mut Place, messages: u64) -> Result<Vec<Line>, CliError> {
    let rules: Vec<(String, String)> = (0..RULES).map(rule).collect();
    rules::apply_quietly(&place.context, &rules)?;
    let run = through(place, "evaluate_rules", DEVICE_TELEMETRY_V1, messages)?;
    let line = run.line("evaluate_rules").note(format!("{RULES} rules, {}", run.start()));
    Ok(vec![line.marked(EVALUATE_RULES_CPU_MOST), plain_consume(place, DEVICE_TELEMETRY_V1)?])
}

/// A rule for a temperature that few readings have, each at its own threshold.
fn rule(index: usize) -> (String, String) {
    let id = format!("bench-{index}");
    let text = format!(
        "id = \"{id}\"\nsummary = \"The temperature is high.\"\nseverity = \"warning\"\nwhen = \"temperature > {}\"\n",
        90 + index
    );
    (format!("{id}.toml"), text)
}

/// Measures `bridge_data`.
///
/// # Errors
/// When the stage does not get through.
pub fn bridge_data(place: &mut Place, messages: u64) -> Result<Vec<Line>, CliError> {
    let run = through(place, "bridge_data", DEVICE_TELEMETRY_V1, messages)?;
    let line = run.line("bridge_data").note(run.start());
    Ok(vec![line.marked(BRIDGE_DATA_CPU_MOST), plain_consume(place, DEVICE_TELEMETRY_V1)?])
}

/// Measures `load_warehouse` on PostgreSQL.
///
/// # Errors
/// When the stage does not get through, or the given database holds readings.
pub fn load_warehouse(place: &mut Place, messages: u64) -> Result<Vec<Line>, CliError> {
    let url = place.context.config.database.url.clone();
    let is_postgres = !url.starts_with("sqlite:");
    let mut store = SqlStore::open(&url, store_options(&place.context, &[DATA_CORE_READING_V1])?)?;
    if store.count(Table::Reading)? > 0 {
        return Err(CliError::usage(
            "the given database holds readings: give the benchmark one of its own, or none".to_owned(),
        ));
    }
    let run = through(place, "load_warehouse", DATA_CORE_READING_V1, messages)?;
    let rows = store.count(Table::Reading)?;
    let rows_per_message = rows as f64 / run.messages as f64;
    let mut line = run.line("load_warehouse");
    let rate = line.per_second * rows_per_message;
    if !is_postgres {
        line.note = format!("{rate:.0} rows/s on SQLite; no mark and no COPY beside it, {}", run.start());
        return Ok(vec![line]);
    }
    let sample = rows_of(place)?;
    let times = rows.div_ceil(sample.len() as u64);
    let processes = place.processes(None);
    let (before, copied) = (processes.spent(), times * MESSAGES_PER_COPY);
    let took = throughline_store::baseline::copy(&url, &sample, times)?;
    let mut plain = Line::new("  plain COPY", copied, took, processes.spent().since(&before));
    let plain_rate = (times * sample.len() as u64) as f64 / took.as_secs_f64();
    plain.note = format!("{plain_rate:.0} rows/s");
    let percent = 100.0 * rate / plain_rate;
    line.note = format!("{rate:.0} rows/s, {percent:.0} % of plain COPY, {}", run.start());
    line.mark = Some(Mark {
        wanted: format!("rows/s >= {COPY_PERCENT_LEAST} % of COPY"),
        met: percent >= COPY_PERCENT_LEAST,
    });
    Ok(vec![line, plain])
}

/// Returns the rows of [`MESSAGES_PER_COPY`] readings.
fn rows_of(place: &Place) -> Result<Vec<ReadingRow>, CliError> {
    let mut readings = Readings::new(place)?;
    let mut rows = Vec::new();
    for _ in 0..MESSAGES_PER_COPY {
        let message = readings.next_message(place)?;
        for measurement in message.measurements {
            rows.push(ReadingRow {
                site_id: message.site_id.clone(),
                device_id: message.device_id.clone(),
                epoch: message.epoch,
                seq: message.seq,
                name: measurement.name,
                number: measurement.number,
                text: measurement.text,
                flag: measurement.flag,
                unit: measurement.unit,
                occurred_at: message.occurred_at,
                received_at: message.received_at,
                message_id: message.message_id.clone(),
                trace_id: message.trace_id.clone(),
                stream: message.stream.clone(),
            });
        }
    }
    Ok(rows)
}

/// What was seen of a stage that worked through a topic.
struct Run {
    messages: u64,
    /// From the start of the process to its first commit: joining, restoring, the first batch.
    to_first_commit: Duration,
    /// Messages committed after the first commit that was seen, and how long they took.
    after_first: (u64, Duration),
    /// CPU time from the start of the process to its last commit.
    spent: Spent,
}

impl Run {
    fn line(&self, what: &'static str) -> Line {
        let mut line = Line::new(what, self.messages, Duration::from_secs(1), self.spent);
        let (messages, took) = self.after_first;
        line.per_second = messages as f64 / took.as_secs_f64().max(1e-6);
        line
    }

    fn start(&self) -> String {
        format!("first commit after {:.1} s", self.to_first_commit.as_secs_f64())
    }
}

/// Runs a stage until its position is the end of `topic`, which is filled before.
fn through(place: &Place, role: &'static str, topic: &'static str, messages: u64) -> Result<Run, CliError> {
    output::progress(&format!("{role}: writing {messages} readings …"));
    readings::fill(place, topic, messages)?;
    let end = readings::end(place, topic)?;
    let mut position = Position::of(place, role, topic)?;
    output::progress(&format!("{role}: measuring …"));
    let (mqtt, http) = Place::addresses()?;
    // Without a role everything that the services spend counts as before.
    let before = place.processes(None).spent();
    let begun = Instant::now();
    let mut child = place.start_role(role, &mqtt, &http)?;
    let processes = place.processes(Some(&child));
    let mut first: Option<(i64, Instant)> = None;
    place.wait(&mut child, limit(messages), || {
        std::thread::sleep(LOOK);
        let at = position.read(place)?;
        if at > 0 {
            first.get_or_insert_with(|| (at, Instant::now()));
        }
        Ok(at >= end)
    })?;
    let done = Instant::now();
    let spent = processes.spent().since(&before);
    let (first_at, first_seen) = first.unwrap_or((0, begun));
    // A topic that one commit takes whole leaves nothing after the first.
    let after_first = if first_at >= end { (end, done - begun) } else { (end - first_at, done - first_seen) };
    Ok(Run {
        messages: u64::try_from(end).unwrap_or_default(),
        to_first_commit: first_seen - begun,
        after_first: (u64::try_from(after_first.0).unwrap_or_default(), after_first.1),
        spent,
    })
}

/// Where a group is: decide stages commit to Kafka, load stages to their store.
enum Position {
    Group(&'static str, &'static str),
    Store(Box<SqlStore>, &'static str, &'static str),
}

impl Position {
    fn of(place: &Place, role: &'static str, topic: &'static str) -> Result<Self, CliError> {
        if topic != DATA_CORE_READING_V1 {
            return Ok(Self::Group(role, topic));
        }
        let options = store_options(&place.context, &[topic])?;
        let store = SqlStore::open(&place.context.config.database.url, options)?;
        Ok(Self::Store(Box::new(store), role, topic))
    }

    /// Returns the sum of the positions in all partitions.
    fn read(&mut self, place: &Place) -> Result<i64, CliError> {
        Ok(match self {
            Self::Group(group, topic) => {
                let groups = place.admin.group_offsets(&[group])?;
                let offsets = groups.iter().flat_map(|g| &g.offsets);
                let of_topic = offsets.filter(|o| &*o.partition.topic == *topic);
                of_topic.map(|o| o.next.max(0)).sum()
            }
            Self::Store(store, group, topic) => {
                let offsets = store.stored_offsets(group)?;
                let of_topic = offsets.iter().filter(|o| &*o.partition.topic == *topic);
                of_topic.map(|o| o.next.max(0)).sum()
            }
        })
    }
}

/// Reads the topic with a plain client, in this process.
fn plain_consume(place: &Place, topic: &str) -> Result<Line, CliError> {
    let kafka = place.context.kafka();
    let processes = place.processes(None);
    let before = processes.spent();
    let messages = u64::try_from(readings::end(place, topic)?).unwrap_or_default();
    let (read, took) = baseline::consume(&kafka, topic, limit(messages))?;
    let spent = processes.spent().since(&before);
    Ok(Line::new("  plain consume", read, took, spent))
}
