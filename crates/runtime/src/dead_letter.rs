//! Dead letters: the record's own bytes with the headers of Kafka Connect and Spring, so that their tools
//! find the way back.

use std::sync::Arc;
use throughline_model::dead_letter::header::{CODE, MESSAGE, REPLAY_COUNT, REPLAY_ID, STAGE};
use throughline_model::record::{Outbox, Record};

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
/// headers. A record that was replayed keeps the origin of its first failure instead of getting a new one,
/// and always carries `tl-replay-count`.
pub fn push_dead_letter(outbox: &mut Outbox, to: &Arc<str>, record: &Record<'_>, fault: &Fault<'_>) {
    let replayed = is_replay(record, fault.replayed);
    let keeps_origin = replayed && record.headers.last(ORIGIN[3]).is_some();
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
        fault.message.as_bytes(),
    ];
    let count = replays_of(record, fault.replayed).to_string();
    let counts_itself = record.headers.last(REPLAY_COUNT).is_some();

    // The error headers of the failure before are replaced, not piled up, with every replay.
    let kept = record.headers.iter().filter(|(name, _)| !(replayed && ERROR.contains(name)));
    let origin = ORIGIN.into_iter().zip(origin).filter(|_| !keeps_origin);
    let count = (replayed && !counts_itself).then_some((REPLAY_COUNT, count.as_bytes()));
    let headers = kept.chain(origin).chain(ERROR.into_iter().zip(error)).chain(count);
    outbox.push(to, None, record.key, record.value, headers);
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
