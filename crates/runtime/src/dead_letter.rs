//! Dead letters: the record's own bytes with the headers of Kafka Connect and Spring, so that their tools
//! find the way back. What an act stage sets aside in its retry topic has the same headers, and two of its own.

use std::sync::Arc;
use throughline_model::dead_letter::FailureId;
use throughline_model::dead_letter::header::{
    CODE, MESSAGE, REPLAY_COUNT, REPLAY_ID, RETRY_COUNT, RETRY_NOT_BEFORE, STAGE,
};
use throughline_model::record::{Outbox, Record};
use throughline_model::time::Timestamp;

const ORIGIN: [&str; 8] = [
    "__connect.errors.topic",
    "__connect.errors.partition",
    "__connect.errors.offset",
    "kafka_dlt-original-topic",
    "kafka_dlt-original-consumer-group",
    "kafka_dlt-original-partition",
    "kafka_dlt-original-offset",
    "kafka_dlt-original-timestamp",
];
const ERROR: [&str; 6] = [
    STAGE,
    "__connect.errors.task.id",
    "__connect.errors.stage",
    "__connect.errors.class.name",
    CODE,
    MESSAGE,
];

/// Bytes of a message that a header repeats: a key that it names may itself be as large as a record.
const MESSAGE_BYTES_MAX: usize = 1_024;

/// Why a record is dead-lettered and where it was read.
#[derive(Clone, Copy, Debug)]
pub struct Fault<'a> {
    /// The stage, which is also its consumer group.
    pub stage: &'a str,
    /// The topic that the record was read from, a replay topic included.
    pub topic: &'a str,
    /// The partition that it was read from.
    pub partition: i32,
    /// Whether `topic` is the group's replay topic.
    pub replayed: bool,
    /// Connect's name of the step that failed: `VALUE_CONVERTER`, `TRANSFORMATION` or `TASK_PUT`.
    pub step: &'static str,
    /// The stable reason code.
    pub code: &'a str,
    /// What was wrong, with identifiers, without the data.
    pub message: &'a str,
}

impl<'a> Fault<'a> {
    /// Names Connect's step for a reason code of a stage: codes of the codec are conversion.
    pub(crate) fn step_of(code: &str) -> &'static str {
        let conversion = ["value_absent", "not_framed", "unknown_schema", "datum_invalid"];
        if conversion.contains(&code) { "VALUE_CONVERTER" } else { "TRANSFORMATION" }
    }
}

/// Where dead letters of one input go.
#[derive(Clone, Debug)]
pub(crate) struct Destination {
    /// The dead-letter topic.
    pub(crate) letters: Arc<str>,
    /// The parking topic, for what exhausted its replays.
    pub(crate) parking: Arc<str>,
    /// The number of replays that exhausts a letter.
    pub(crate) replays_max: u32,
}

impl Destination {
    /// Appends the dead letter of `record`.
    pub(crate) fn push(&self, outbox: &mut Outbox, record: &Record<'_>, fault: &Fault<'_>) {
        let exhausted = replays_of(record, fault.replayed) >= self.replays_max;
        push_dead_letter(outbox, if exhausted { &self.parking } else { &self.letters }, record, fault);
    }
}

/// Appends the dead letter of `record` for topic `to`: key, value and headers byte for byte, then the error
/// headers. A record that was replayed, or set aside in a retry topic, keeps the origin of its first failure
/// instead of getting a new one; one that was replayed always carries `tl-replay-count`.
pub fn push_dead_letter(outbox: &mut Outbox, to: &Arc<str>, record: &Record<'_>, fault: &Fault<'_>) {
    push_failure(outbox, to, None, record, fault, None);
}

/// How often a record was set aside, and when it may be tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retry {
    /// From 1.
    pub count: u32,
    /// The time of the platform.
    pub not_before: Timestamp,
}

impl Retry {
    /// Reads what a record of a retry topic says. Without headers of ours it was never set aside and may be
    /// tried at once.
    pub fn of(record: &Record<'_>) -> Self {
        let text = |name| record.headers.last(name).and_then(|v| std::str::from_utf8(v).ok());
        let count = text(RETRY_COUNT).and_then(|n| n.parse().ok()).unwrap_or(0);
        let not_before = text(RETRY_NOT_BEFORE).and_then(|n| n.parse().ok()).unwrap_or(0);
        Self { count, not_before: Timestamp::from_millis(not_before) }
    }
}

/// Appends what sets `record` aside in the retry topic `to`, in the partition of the same number.
pub fn push_retry(outbox: &mut Outbox, to: &Arc<str>, record: &Record<'_>, fault: &Fault<'_>, retry: Retry) {
    push_failure(outbox, to, Some(fault.partition), record, fault, Some(retry));
}

fn push_failure(
    outbox: &mut Outbox,
    to: &Arc<str>,
    to_partition: Option<i32>,
    record: &Record<'_>,
    fault: &Fault<'_>,
    retry: Option<Retry>,
) {
    let replayed = is_replay(record, fault.replayed);
    let failed_before = replayed || record.headers.last(RETRY_COUNT).is_some();
    let keeps_origin = failed_before && record.headers.last(ORIGIN[3]).is_some();
    let partition = fault.partition.to_string();
    let offset = record.offset.to_string();
    let class = format!("throughline.stages.{}", fault.stage);
    let origin: [&[u8]; 8] = [
        fault.topic.as_bytes(),
        partition.as_bytes(),
        offset.as_bytes(),
        fault.topic.as_bytes(),
        fault.stage.as_bytes(),
        &fault.partition.to_be_bytes(),
        &record.offset.to_be_bytes(),
        &record.time.as_millis().to_be_bytes(),
    ];
    let error: [&[u8]; 6] = [
        fault.stage.as_bytes(),
        partition.as_bytes(),
        fault.step.as_bytes(),
        class.as_bytes(),
        fault.code.as_bytes(),
        &fault.message.as_bytes()[..fault.message.floor_char_boundary(MESSAGE_BYTES_MAX)],
    ];
    let count = replays_of(record, fault.replayed).to_string();
    let counts_itself = record.headers.last(REPLAY_COUNT).is_some();

    let retry = retry.map(|retry| [retry.count.to_string(), retry.not_before.as_millis().max(0).to_string()]);

    // The error headers of the failure before are replaced, not piled up, with every replay and retry.
    let kept = record.headers.iter().filter(|(name, _)| !(failed_before && ERROR.contains(name)));
    // A dead letter says nothing of retries: its replay begins their count anew.
    let kept = kept.filter(|(name, _)| ![RETRY_COUNT, RETRY_NOT_BEFORE].contains(name));
    let origin = ORIGIN.into_iter().zip(origin).filter(|_| !keeps_origin);
    let count = (replayed && !counts_itself).then_some((REPLAY_COUNT, count.as_bytes()));
    let retry = retry.iter().flat_map(|retry| {
        [RETRY_COUNT, RETRY_NOT_BEFORE].into_iter().zip(retry.iter().map(String::as_bytes))
    });
    let headers = kept.chain(origin).chain(ERROR.into_iter().zip(error)).chain(count).chain(retry);
    outbox.push(to, to_partition, record.key, record.value, headers);
}

/// Returns which failure a dead letter tells of; `None` where its headers do not say it, as those of the bridge.
pub(crate) fn failure_of(letter: &Record<'_>) -> Option<FailureId> {
    let header = |name| letter.headers.last(name);
    let topic = std::str::from_utf8(header(ORIGIN[3])?).ok()?.to_owned();
    let partition = i32::from_be_bytes(header(ORIGIN[5])?.try_into().ok()?);
    let number = |name| Some(i64::from_be_bytes(header(name)?.try_into().ok()?));
    Some((topic, partition, number(ORIGIN[6])?, number(ORIGIN[7])?, replays_of(letter, false)))
}

fn is_replay(record: &Record<'_>, from_replay_topic: bool) -> bool {
    from_replay_topic || record.headers.last(REPLAY_ID).is_some()
}

/// Returns how often the record was replayed. Who replays writes the count; a record put into the replay
/// topic by hand counts as one.
fn replays_of(record: &Record<'_>, from_replay_topic: bool) -> u32 {
    let stated = record.headers.last(REPLAY_COUNT).and_then(|v| std::str::from_utf8(v).ok()?.parse().ok());
    stated.unwrap_or(u32::from(is_replay(record, from_replay_topic)))
}
