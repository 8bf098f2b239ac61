//! `throughline tap`: reads a topic, decoded and filtered.

use crate::config::Flags;
use crate::context::Context;
use crate::failure::{CliError, Exit};
use crate::output;
use crate::records::{Reader, brief, place, point_in_time};
use serde_json::Value;
use std::ops::ControlFlow;
use std::time::Duration;
use throughline_kafka::admin::Admin;
use throughline_kafka::browse::{Begin, Stop, browse};
use throughline_model::catalog::name::unknown_topic;
use throughline_model::ids::{DeviceKey, partition_of};
use throughline_model::record::Record;
use throughline_runtime::{Clock, WallClock};

/// Arguments of `tap`.
#[derive(clap::Args)]
pub struct Args {
    /// The topic
    topic: String,
    /// Only this device, `site/device`
    #[arg(long)]
    device: Option<DeviceKey>,
    /// Only this site
    #[arg(long)]
    site: Option<String>,
    /// Only this request
    #[arg(long)]
    request_id: Option<String>,
    /// Only requests of this intent
    #[arg(long)]
    request_code: Option<String>,
    /// Only this result
    #[arg(long)]
    response_code: Option<String>,
    /// Where to begin: `beginning`, `end`, a time, or a span before now such as `10m`
    #[arg(long, default_value = "end")]
    from: String,
    /// End after this many records
    #[arg(long)]
    limit: Option<u64>,
    /// End when everything that is there now was read, instead of waiting for more
    #[arg(long)]
    no_follow: bool,
}

/// Prints records until Ctrl-C, the limit or the end.
///
/// # Errors
/// A usage error for an unknown topic or a wrong time; exit code 4 when Kafka is away.
pub fn run(flags: &Flags, args: &Args) -> Result<Exit, CliError> {
    let context = Context::new(flags.load()?)?;
    let kafka = context.kafka();
    let topics = Admin::new(&kafka)?.topics()?;
    let Some(partitions) = topics.get(&args.topic) else {
        return Err(CliError::usage(unknown_topic(&args.topic, topics.keys().map(String::as_str))));
    };
    let begin = match args.from.as_str() {
        "beginning" => Begin::Earliest,
        "end" => Begin::End,
        text => Begin::Since(point_in_time(text, WallClock.now())?),
    };
    let stop = if args.no_follow { Stop::AtEnd { within: Duration::from_secs(60) } } else { Stop::Never };
    // A device's records lie in one partition: the others need not be read.
    let keyed = context.catalog.topic(&args.topic).is_some_and(|t| t.spec.partitions == *partitions);
    let only =
        args.device.as_ref().filter(|_| keyed).map(|d| partition_of(d.as_str().as_bytes(), *partitions));
    let only: Vec<i32> = only.into_iter().collect();
    let mut reader = Reader::new(&context);
    let mut left = args.limit.unwrap_or(u64::MAX);
    let mut failed = None;
    let ended = browse(&kafka, &args.topic, &only, begin, stop, &mut |batch| {
        for record in batch.iter() {
            if left == 0 {
                return ControlFlow::Break(());
            }
            let value = match reader.value(record.value) {
                Ok(value) => value,
                Err(error) => {
                    failed = Some(error);
                    return ControlFlow::Break(());
                }
            };
            if args.takes(&record, value.as_ref().ok()) {
                print(flags, &args.topic, batch.source.partition, &record, &value);
                left -= 1;
            }
        }
        if left == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    match failed {
        Some(error) => Err(error),
        None if !ended && args.no_follow && left > 0 => {
            Err(CliError::unreachable("the end of the topic was not reached within 60 s"))
        }
        None => Ok(Exit::Done),
    }
}

impl Args {
    fn takes(&self, record: &Record<'_>, value: Option<&Value>) -> bool {
        let field = |name: &str| value.and_then(|v| v.get(name)).and_then(Value::as_str);
        let matches =
            |wanted: &Option<String>, name: &str| wanted.as_deref().is_none_or(|w| field(name) == Some(w));
        let device = self.device.as_ref().is_none_or(|device| {
            let by_field =
                field("site_id") == Some(device.site()) && field("device_id") == Some(device.device());
            by_field || record.key == Some(device.as_str().as_bytes())
        });
        device
            && matches(&self.site, "site_id")
            && matches(&self.request_id, "request_id")
            && matches(&self.request_code, "request_code")
            && matches(&self.response_code, "response_code")
    }
}

fn print(flags: &Flags, topic: &str, partition: i32, record: &Record<'_>, value: &Result<Value, String>) {
    if flags.json {
        let mut document = place(topic, partition, record);
        match value {
            Ok(value) => document["value"] = value.clone(),
            Err(why) => {
                document["unreadable"] = why.as_str().into();
                document["bytes"] = record.value.map(crate::records::hex).into();
            }
        }
        output::json("tap", document);
        return;
    }
    let key = record.key.map(String::from_utf8_lossy).unwrap_or_default();
    let text = match value {
        Ok(value) => brief(value).to_string(),
        Err(why) => format!("[{why}] {}", record.value.map(String::from_utf8_lossy).unwrap_or_default()),
    };
    output::line(&format!("{} {partition}/{} {key} {text}", record.time, record.offset));
}
