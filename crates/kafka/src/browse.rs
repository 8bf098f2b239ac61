//! Looks at records without a group and without leaving a trace: tap, trace, dead letters, rules, twins.

use crate::config::{KafkaConfig, STABLE_TIMEOUT};
use crate::tail::{Tail, Tailed};
use std::collections::{HashMap, HashSet};
use std::ops::ControlFlow;
use std::time::{Duration, Instant};
use throughline_kafka_ffi::OffsetSpec;
use throughline_model::record::{Batch, TopicPartition};
use throughline_model::time::Timestamp;
use throughline_runtime::ports::Failure;

/// Where to begin in each partition. A position that does not exist any more becomes the earliest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begin {
    /// With the first record that still exists.
    Earliest,
    /// With what comes from now on.
    End,
    /// With the last `n` positions before the end; positions without a record count.
    Last(i64),
    /// At this position.
    At(i64),
    /// With the first record that is not older.
    Since(Timestamp),
}

/// When to stop, besides the caller's own word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// When everything written before the call was passed, or at the deadline.
    AtEnd {
        /// How long it may take at most.
        within: Duration,
    },
    /// After this time.
    After(Duration),
    /// Never by itself.
    Never,
}

/// Passes the records of `partitions` (all where empty) to `each` until it breaks or `stop` comes. Returns
/// whether everything that [`Stop::AtEnd`] asked for was passed. Committed records only.
///
/// # Errors
/// [`Failure::Dependency`] when Kafka cannot be asked or the topic does not exist.
pub fn browse(
    config: &KafkaConfig,
    topic: &str,
    partitions: &[i32],
    begin: Begin,
    stop: Stop,
    each: &mut dyn FnMut(&Batch) -> ControlFlow<()>,
) -> Result<bool, Failure> {
    let mut tail = Tail::new(config, topic, true)?;
    let partitions = if partitions.is_empty() { tail.partitions()? } else { partitions.to_vec() };
    let deadline = match stop {
        Stop::AtEnd { within } => Some(Instant::now() + within),
        Stop::After(time) => Some(Instant::now() + time),
        Stop::Never => None,
    };
    let ends = match stop {
        Stop::AtEnd { within } => tail.settled_ends(&partitions, within.min(STABLE_TIMEOUT))?,
        _ => tail.bounds(&partitions, OffsetSpec::Latest, false)?,
    };
    let from = positions(&tail, &partitions, begin, &ends)?;
    let at_end = matches!(stop, Stop::AtEnd { .. });
    let mut ahead: HashSet<i32> =
        from.iter().filter(|(p, o)| ends.get(p) > Some(o)).map(|(p, _)| *p).collect();
    if at_end && ahead.is_empty() {
        return Ok(true);
    }
    tail.assign(&from)?;
    loop {
        if deadline.is_some_and(|d| Instant::now() >= d) {
            return Ok(at_end && ahead.is_empty());
        }
        match tail.poll(Duration::from_millis(50))? {
            Tailed::Records(batch) => {
                let past = batch.get(batch.len() - 1).offset + 1;
                if ends.get(&batch.source.partition).is_some_and(|end| past >= *end) {
                    ahead.remove(&batch.source.partition);
                }
                if each(&batch).is_break() {
                    return Ok(ahead.is_empty());
                }
            }
            Tailed::End(partition) => drop(ahead.remove(&partition)),
            Tailed::Nothing => {}
        }
        if at_end && ahead.is_empty() {
            return Ok(true);
        }
    }
}

/// Returns the end of each partition of a topic (the high watermark).
///
/// # Errors
/// [`Failure::Dependency`] when Kafka cannot be asked or the topic does not exist.
pub fn end_offsets(config: &KafkaConfig, topic: &str) -> Result<Vec<(TopicPartition, i64)>, Failure> {
    let tail = Tail::new(config, topic, false)?;
    let ends = tail.bounds(&tail.partitions()?, OffsetSpec::Latest, false)?;
    let mut ends: Vec<_> = ends.into_iter().map(|(p, end)| (TopicPartition::new(topic, p), end)).collect();
    ends.sort();
    Ok(ends)
}

fn positions(
    tail: &Tail,
    partitions: &[i32],
    begin: Begin,
    ends: &HashMap<i32, i64>,
) -> Result<Vec<(i32, i64)>, Failure> {
    let earliest = tail.bounds(partitions, OffsetSpec::Earliest, false)?;
    let since = match begin {
        Begin::Since(time) => tail.bounds(partitions, OffsetSpec::AtOrAfter(time.as_millis()), false)?,
        _ => HashMap::new(),
    };
    let position = |p: &i32| {
        let first = earliest.get(p).copied().unwrap_or_default();
        let end = ends.get(p).copied().unwrap_or(first);
        let wanted = match begin {
            Begin::Earliest => first,
            Begin::End => end,
            Begin::Last(n) => end.saturating_sub(n.max(0)),
            Begin::At(offset) => offset,
            Begin::Since(_) => since.get(p).copied().filter(|o| *o >= 0).unwrap_or(end),
        };
        (*p, wanted.max(first))
    };
    Ok(partitions.iter().map(position).collect())
}
