//! `throughline trace`: finds a message by the hint in its trace id, follows what was derived from it, and
//! says for every group whether it is past it or how far behind.

use crate::config::Flags;
use crate::context::Context;
use crate::failure::{CliError, Exit};
use crate::output;
use crate::records::{self, READ_WITHIN};
use serde_json::{Value, json};
use std::ops::ControlFlow;
use std::str::FromStr;
use std::time::Duration;
use throughline_kafka::browse::{Begin, Stop, browse};
use throughline_kafka::lag::{GroupLag, LagProbe};
use throughline_model::envelope::Locator;
use throughline_model::ids::{DeviceKey, TraceId, partition_of};
use throughline_model::record::Record;
use throughline_model::time::Timestamp;
use throughline_model::topics::SERVICE_PLATFORM_LOCATOR_V1;
use throughline_runtime::{Clock, WallClock};

/// A device's clock does not matter here, but the admitting bridge's may differ from the broker's by this.
const SLACK: Duration = Duration::from_secs(60);

/// Records that are shown, and of each partition held: a sender may write one trace id into all it sends.
const HOPS_MAX: usize = 10_000;

/// Arguments of `trace`.
#[derive(clap::Args)]
pub struct Args {
    /// A trace id (32 hexadecimal digits), or `site/device#seq`
    what: Subject,
}

#[derive(Clone)]
enum Subject {
    Trace(TraceId),
    Sequence(DeviceKey, i64),
}

impl FromStr for Subject {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some((device, seq)) = text.rsplit_once('#') {
            let device = device.parse().map_err(|e| format!("{e}"))?;
            let seq = seq.parse().map_err(|_| format!("`{seq}` is no sequence number"))?;
            return Ok(Self::Sequence(device, seq));
        }
        text.parse().map(Self::Trace).map_err(|e| format!("{e}; or write `site/device#seq`"))
    }
}

/// A record of the trace.
struct Hop {
    topic: String,
    partition: i32,
    offset: i64,
    time: Timestamp,
    value: Value,
}

/// Prints the trace.
///
/// # Errors
/// Exit code 1 when nothing is found, 4 when Kafka is away.
pub fn run(flags: &Flags, args: &Args) -> Result<Exit, CliError> {
    let context = Context::new(flags.load()?)?;
    let (trace, partition_of_key, since) = match &args.what {
        Subject::Trace(trace) => locate(&context, *trace)?,
        Subject::Sequence(device, seq) => by_sequence(&context, device, *seq)?,
    };
    let places: Vec<(&str, i32)> = context
        .catalog
        .topics()
        .map(|topic| (topic.spec.name.as_str(), partition_of_key(topic.spec.partitions)))
        .collect();
    let found = at_once(&places, |topic, partition| collect(&context, topic, partition, since, trace))?;
    let mut hops: Vec<Hop> = found.into_iter().flatten().collect();
    hops.sort_by_key(|hop| (hop.time, hop.topic.clone(), hop.offset));
    if cut(&mut hops) {
        tracing::warn!("the trace has more records; the first {HOPS_MAX} are shown");
    }
    if hops.is_empty() {
        return Err(CliError::failed(format!(
            "no record of trace {trace} since {since}: it never left the device, is a dead letter (`throughline dlq list`), or retention deleted it"
        )));
    }
    let groups = LagProbe::new(&context.kafka())?.snapshot()?.groups;
    report(flags, trace, &hops, &groups);
    Ok(Exit::Done)
}

/// Leaves the first [`HOPS_MAX`]. Says whether there were more.
fn cut(hops: &mut Vec<Hop>) -> bool {
    let more = hops.len() > HOPS_MAX;
    hops.truncate(HOPS_MAX);
    more
}

/// Looks into several partitions at the same time: most of it is waiting for a broker.
fn at_once<T: Send>(
    places: &[(&str, i32)],
    look: impl Fn(&str, i32) -> Result<T, CliError> + Sync,
) -> Result<Vec<T>, CliError> {
    let look = &look;
    std::thread::scope(|scope| {
        let looking: Vec<_> =
            places.iter().map(|(topic, partition)| scope.spawn(move || look(topic, *partition))).collect();
        looking.into_iter().map(|thread| thread.join().expect("looking does not panic")).collect()
    })
}

type PartitionOf = Box<dyn Fn(i32) -> i32>;

/// Returns the trace id, where its key lies and since when: from the hint, or, for an id from outside, from
/// the locator.
fn locate(context: &Context, trace: TraceId) -> Result<(TraceId, PartitionOf, Timestamp), CliError> {
    let outside = trace.to_hex();
    let partitions = context.catalog.topic(SERVICE_PLATFORM_LOCATOR_V1).map_or(1, |t| t.spec.partitions);
    let partition = partition_of(outside.as_bytes(), partitions);
    let mut found: Option<(Locator, Timestamp)> = None;
    let all = Stop::AtEnd { within: READ_WITHIN };
    context.bind_schemas()?;
    browse(
        &context.kafka(),
        SERVICE_PLATFORM_LOCATOR_V1,
        &[partition],
        Begin::Earliest,
        all,
        &mut |batch| {
            for record in batch.iter().filter(|r| r.key == Some(outside.as_bytes())) {
                if let Ok(locator) = context.codec.decode::<Locator>(record.value) {
                    found = Some((locator, record.time));
                }
            }
            ControlFlow::Continue(())
        },
    )?;
    if let Some((locator, time)) = found {
        let key = format!("{}/{}", locator.site_id, locator.device_id);
        return Ok((trace, Box::new(move |n| partition_of(key.as_bytes(), n)), time.minus(SLACK)));
    }
    let birth = Timestamp(i64::from(trace.birth_second()) * 1_000_000);
    Ok((trace, Box::new(move |n| trace.partition(n)), birth.minus(SLACK)))
}

/// Finds the newest message of the device with this seq, in any stream.
fn by_sequence(
    context: &Context,
    device: &DeviceKey,
    seq: i64,
) -> Result<(TraceId, PartitionOf, Timestamp), CliError> {
    let key = device.as_str().to_owned();
    let places: Vec<(&str, i32)> = context
        .catalog
        .topics()
        .filter(|topic| !topic.spec.feeds.is_empty())
        .map(|topic| (topic.spec.name.as_str(), partition_of(key.as_bytes(), topic.spec.partitions)))
        .collect();
    let found = at_once(&places, |topic, partition| newest_of(context, topic, partition, &key, seq))?;
    let (time, trace) = found.into_iter().flatten().max().ok_or_else(|| {
        CliError::failed(format!("no message of `{device}` with seq {seq}: it never arrived, is a dead letter (`throughline dlq list`), or retention deleted it"))
    })?;
    let trace = trace
        .parse()
        .map_err(|e| CliError::failed(format!("the message of `{device}` with seq {seq}: {e}")))?;
    Ok((trace, Box::new(move |n| partition_of(key.as_bytes(), n)), time.minus(SLACK)))
}

/// Returns arrival and trace id of the newest message of `key` with this seq in one partition.
fn newest_of(
    context: &Context,
    topic: &str,
    partition: i32,
    key: &str,
    seq: i64,
) -> Result<Option<(Timestamp, String)>, CliError> {
    let mut newest = None;
    let mut take = |record: &Record<'_>, value: Value| {
        if value["seq"].as_i64() == Some(seq) {
            newest = Some((record.time, value["trace_id"].as_str().unwrap_or_default().to_owned()));
        }
    };
    records::decoded(
        context,
        topic,
        &[partition],
        Begin::Earliest,
        &|r| r.key == Some(key.as_bytes()),
        &mut take,
    )?;
    Ok(newest)
}

/// Returns the records of one partition that belong to a trace.
fn collect(
    context: &Context,
    topic: &str,
    partition: i32,
    since: Timestamp,
    trace: TraceId,
) -> Result<Vec<Hop>, CliError> {
    let wanted = trace.to_hex();
    let mut hops = Vec::new();
    let mut take = |record: &Record<'_>, value: Value| {
        if value["trace_id"].as_str() == Some(&wanted) {
            let (topic, offset, time) = (topic.to_owned(), record.offset, record.time);
            if hops.len() <= HOPS_MAX {
                hops.push(Hop { topic, partition, offset, time, value });
            }
        }
    };
    let begin = Begin::Since(since);
    records::decoded(context, topic, &[partition], begin, &|r| mentions(r, wanted.as_bytes()), &mut take)?;
    Ok(hops)
}

/// A cheap look before decoding: the id stands as text in every value that carries it.
fn mentions(record: &Record<'_>, wanted: &[u8]) -> bool {
    record.value.is_some_and(|value| value.windows(wanted.len()).any(|window| window == wanted))
}

/// What a group says about a record.
fn standing(hop: &Hop, lag: &GroupLag, now: Timestamp) -> (bool, i64, f64) {
    let behind = (hop.offset + 1 - lag.next).max(0);
    (behind == 0, behind, if behind == 0 { 0.0 } else { lag.seconds(now).unwrap_or(0.0) })
}

fn report(flags: &Flags, trace: TraceId, hops: &[Hop], groups: &[GroupLag]) {
    let now = WallClock.now();
    let readers = |hop: &Hop| {
        let here =
            |lag: &&GroupLag| *lag.partition.topic == *hop.topic && lag.partition.partition == hop.partition;
        groups.iter().filter(here).collect::<Vec<_>>()
    };
    if flags.json {
        let hops: Vec<Value> = hops
            .iter()
            .map(|hop| {
                let groups: Vec<Value> = readers(hop)
                    .iter()
                    .map(|lag| {
                        let (past, records, seconds) = standing(hop, lag, now);
                        json!({"group": lag.group, "past": past, "behind_records": records, "behind_seconds": seconds})
                    })
                    .collect();
                json!({"topic": hop.topic, "partition": hop.partition, "offset": hop.offset,
                       "timestamp": hop.time.to_string(), "value": hop.value, "groups": groups})
            })
            .collect();
        output::json("trace", json!({"trace_id": trace.to_hex(), "hops": hops}));
        return;
    }
    let first = &hops[0];
    let device = |hop: &Hop| {
        let field = |name: &str| hop.value[name].as_str().unwrap_or_default().to_owned();
        format!("{}/{}", field("site_id"), field("device_id"))
    };
    output::line(&format!("trace {trace}  {}  {}", device(first), first.time));
    for hop in hops {
        let ms = (hop.time.0 - first.time.0) as f64 / 1e3;
        let state = hop.value["state"].as_str().map(|s| format!("  {s}")).unwrap_or_default();
        output::line(&format!("{ms:>9.0} ms  {}/{}@{}{state}", hop.topic, hop.partition, hop.offset));
        for lag in readers(hop) {
            let (past, records, seconds) = standing(hop, lag, now);
            let text = if past {
                "past it".to_owned()
            } else {
                format!("behind by {records} records, {seconds:.1} s")
            };
            output::line(&format!("              {:<16} {text}", lag.group));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_records_of_a_trace_than_are_shown_are_said_to_be_there() {
        let hop = |offset| Hop {
            topic: "device.thing.v1".to_owned(),
            partition: 0,
            offset,
            time: Timestamp(offset),
            value: Value::Null,
        };
        let mut hops: Vec<Hop> = (0..HOPS_MAX as i64).map(hop).collect();
        assert!(!cut(&mut hops));
        hops.push(hop(HOPS_MAX as i64));
        assert!(cut(&mut hops));
        assert_eq!(hops.len(), HOPS_MAX);
    }
}
