//! `throughline dlq`: dead letters grouped by cause, shown, and sent back to the group that refused them.

use crate::config::Flags;
use crate::context::Context;
use crate::failure::{CliError, Exit};
use crate::output;
use crate::records::{self, Reader, hex, place};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;
use throughline_kafka::admin::Admin;
use throughline_kafka::browse::{Begin, Stop, browse};
use throughline_model::catalog::{parse_dlt, replay_topic};
use throughline_model::record::{Outbox, Record};
use throughline_model::time::Timestamp;
use throughline_mqtt::dead_letter::ORIGIN;
use uuid::Uuid;

/// How long reading all dead letters may take.
const READ_WITHIN: Duration = Duration::from_secs(120);
/// Replays of one record that are sent at most: beyond it something is wrong that replays do not mend.
const REPLAYS_MAX: u64 = 10;
/// Records of a replay that are sent and acknowledged together.
const CHUNK: usize = 1_000;

const CODE: &str = "__connect.errors.exception.class.name";
const MESSAGE: &str = "__connect.errors.exception.message";
const REPLAY_ID: &str = "tl-replay-id";
const REPLAY_COUNT: &str = "tl-replay-count";

/// Arguments of `dlq`.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Count dead letters by topic and code
    List {
        #[command(flatten)]
        selector: Selector,
    },
    /// Show dead letters with headers and bytes
    Show {
        #[command(flatten)]
        selector: Selector,
        /// How many at most
        #[arg(long, default_value_t = 10)]
        limit: u64,
    },
    /// Send dead letters to the replay topic of the group that refused them; shows what it would send first
    Replay {
        #[command(flatten)]
        selector: Selector,
        /// Send them
        #[arg(long)]
        yes: bool,
    },
}

/// Which dead letters.
#[derive(clap::Args)]
struct Selector {
    /// Only this dead-letter topic, `<topic>.<group>-dlt`
    #[arg(long)]
    topic: Option<String>,
    /// Only this code
    #[arg(long)]
    code: Option<String>,
    /// Only this record of the dead-letter topic, `partition/offset`
    #[arg(long, value_name = "P/O")]
    at: Option<String>,
}

/// Runs the subcommand.
///
/// # Errors
/// Exit code 2 for a wrong selector, 4 when Kafka is away.
pub fn run(flags: &Flags, args: &Args) -> Result<Exit, CliError> {
    let context = Context::new(flags.load()?)?;
    match &args.command {
        Command::List { selector } => list(flags, &context, selector),
        Command::Show { selector, limit } => show(flags, &context, selector, *limit),
        Command::Replay { selector, yes } => replay(flags, &context, selector, *yes),
    }
}

impl Selector {
    fn topics(&self, context: &Context) -> Result<Vec<String>, CliError> {
        let existing = Admin::new(&context.kafka())?.topics()?;
        let letters: Vec<String> = existing.into_keys().filter(|t| parse_dlt(t).is_some()).collect();
        match &self.topic {
            None => Ok(letters),
            Some(wanted) if letters.contains(wanted) => Ok(vec![wanted.clone()]),
            Some(wanted) => Err(CliError::usage(throughline_model::catalog::name::unknown_topic(
                wanted,
                letters.iter().map(String::as_str),
            ))),
        }
    }

    fn position(&self) -> Result<Option<(i32, i64)>, CliError> {
        let Some(text) = &self.at else { return Ok(None) };
        if self.topic.is_none() {
            return Err(CliError::usage("`--at` needs `--topic`"));
        }
        let parsed = text.split_once('/').and_then(|(p, o)| Some((p.parse().ok()?, o.parse().ok()?)));
        parsed
            .map(Some)
            .ok_or_else(|| CliError::usage(format!("`{text}` is no place: write `partition/offset`")))
    }

    /// Passes every selected dead letter as (topic, partition, record) until `each` breaks.
    fn each(
        &self,
        context: &Context,
        mut each: impl FnMut(&str, i32, &Record<'_>) -> ControlFlow<()>,
    ) -> Result<(), CliError> {
        let position = self.position()?;
        for topic in self.topics(context)? {
            let (only, begin) = match position {
                Some((partition, offset)) => (vec![partition], Begin::At(offset)),
                None => (Vec::new(), Begin::Earliest),
            };
            let mut broken = false;
            let read_all = browse(
                &context.kafka(),
                &topic,
                &only,
                begin,
                Stop::AtEnd { within: READ_WITHIN },
                &mut |batch| {
                    let partition = batch.source.partition;
                    for record in batch.iter() {
                        let elsewhere = position.is_some_and(|(_, offset)| offset != record.offset);
                        if elsewhere || self.code.as_deref().is_some_and(|code| code != text(&record, CODE)) {
                            continue;
                        }
                        if each(&topic, partition, &record).is_break() {
                            broken = true;
                            return ControlFlow::Break(());
                        }
                    }
                    ControlFlow::Continue(())
                },
            )?;
            if broken {
                return Ok(());
            }
            if !read_all {
                return Err(CliError::unreachable(format!(
                    "`{topic}` was not read to its end within {READ_WITHIN:?}"
                )));
            }
        }
        Ok(())
    }
}

fn text(record: &Record<'_>, header: &str) -> String {
    record.headers.last(header).map(|v| String::from_utf8_lossy(v).into_owned()).unwrap_or_default()
}

#[derive(Default)]
struct Cause {
    count: u64,
    first: Option<Timestamp>,
    last: Option<Timestamp>,
    example: String,
    message: String,
}

fn list(flags: &Flags, context: &Context, selector: &Selector) -> Result<Exit, CliError> {
    let mut causes: BTreeMap<(String, String), Cause> = BTreeMap::new();
    selector.each(context, |topic, partition, record| {
        let cause = causes.entry((topic.to_owned(), text(record, CODE))).or_default();
        cause.count += 1;
        cause.first = Some(cause.first.map_or(record.time, |t| t.min(record.time)));
        cause.last = Some(cause.last.map_or(record.time, |t| t.max(record.time)));
        cause.example = format!("{partition}/{}", record.offset);
        cause.message = text(record, MESSAGE);
        ControlFlow::Continue(())
    })?;
    let time = |t: Option<Timestamp>| t.map(|t| t.to_string()).unwrap_or_default();
    if flags.json {
        let causes: Vec<Value> = causes
            .iter()
            .map(|((topic, code), c)| {
                json!({"topic": topic, "code": code, "count": c.count, "first": time(c.first), "last": time(c.last),
                       "example": c.example, "message": c.message})
            })
            .collect();
        output::json("dlq.list", json!({ "causes": causes }));
        return Ok(Exit::Done);
    }
    let rows: Vec<Vec<String>> = causes
        .iter()
        .map(|((topic, code), c)| {
            vec![
                topic.clone(),
                code.clone(),
                c.count.to_string(),
                time(c.last),
                c.example.clone(),
                c.message.clone(),
            ]
        })
        .collect();
    output::table(&["TOPIC", "CODE", "COUNT", "LAST", "EXAMPLE", "MESSAGE"], &rows);
    Ok(Exit::Done)
}

fn show(flags: &Flags, context: &Context, selector: &Selector, limit: u64) -> Result<Exit, CliError> {
    let mut reader = Reader::new(context);
    let mut left = limit;
    let mut failed = None;
    selector.each(context, |topic, partition, record| {
        if left == 0 {
            return ControlFlow::Break(());
        }
        left -= 1;
        let mut document = place(topic, partition, record);
        let bytes = record.value.unwrap_or_default();
        match reader.value(record.value) {
            Ok(Ok(value)) => document["value"] = value,
            Ok(Err(_)) => match std::str::from_utf8(bytes) {
                Ok(text) => document["text"] = text.into(),
                Err(_) => document["bytes"] = hex(bytes).into(),
            },
            Err(error) => {
                failed = Some(error);
                return ControlFlow::Break(());
            }
        }
        if flags.json {
            output::json("dlq.show", document);
        } else {
            print_letter(&document);
        }
        ControlFlow::Continue(())
    })?;
    failed.map_or(Ok(Exit::Done), Err)
}

fn print_letter(document: &Value) {
    let plain = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let field = |name: &str| plain(&document[name]);
    output::line(&format!(
        "{} {}/{} {}",
        field("topic"),
        field("partition"),
        field("offset"),
        field("timestamp")
    ));
    output::line(&format!("  key  {}", field("key")));
    for header in document["headers"].as_array().into_iter().flatten() {
        output::line(&format!("  {}  {}", plain(&header["name"]), plain(&header["value"])));
    }
    for form in ["value", "text", "bytes"] {
        if !document[form].is_null() {
            output::line(&format!("  {form}  {}\n", field(form)));
        }
    }
}

fn replay(flags: &Flags, context: &Context, selector: &Selector, yes: bool) -> Result<Exit, CliError> {
    if selector.topic.is_none() && selector.code.is_none() {
        return Err(CliError::usage(
            "a replay needs `--topic`, `--code` or both; `throughline dlq list` shows them",
        ));
    }
    let replay_id = Uuid::now_v7().to_string();
    let mut batch = Batch { context, outbox: Outbox::default(), sent: 0, yes };
    let mut targets: BTreeMap<String, u64> = BTreeMap::new();
    let mut refused = 0u64;
    let mut failed = None;
    selector.each(context, |topic, partition, record| {
        let Some(target) = target_of(topic) else {
            refused += 1;
            return ControlFlow::Continue(());
        };
        let count = text(record, REPLAY_COUNT).parse::<u64>().unwrap_or(0) + 1;
        if count > REPLAYS_MAX {
            refused += 1;
            return ControlFlow::Continue(());
        }
        *targets.entry(target.clone()).or_default() += 1;
        match batch.push(
            &target,
            record,
            &replay_id,
            count,
            &format!("{topic}/{partition}/{}", record.offset),
        ) {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                failed = Some(error);
                ControlFlow::Break(())
            }
        }
    })?;
    if let Some(error) = failed {
        return Err(error);
    }
    batch.flush()?;
    let sent = batch.sent;
    if flags.json {
        output::json(
            "dlq.replay",
            json!({"replay_id": replay_id, "targets": targets, "sent": sent, "refused": refused, "dry_run": !yes}),
        );
    } else {
        let verb = if yes { "sent" } else { "would be sent" };
        for (target, count) in &targets {
            output::line(&format!("{count} {verb} to {target}"));
        }
        if refused > 0 {
            output::line(&format!(
                "{refused} refused: no group reads them again, or they were replayed {REPLAYS_MAX} times"
            ));
        }
        if !yes {
            output::notice("nothing was sent; add --yes to send");
        }
    }
    Ok(Exit::Done)
}

/// Returns the replay topic of a dead-letter topic.
fn target_of(dead_letters: &str) -> Option<String> {
    parse_dlt(dead_letters).map(|(topic, group)| replay_topic(topic, group))
}

struct Batch<'a> {
    context: &'a Context,
    outbox: Outbox,
    sent: u64,
    yes: bool,
}

impl Batch<'_> {
    /// Adds a replay. `origin` says where the dead letter lies: the bridge derives the ids of what it could
    /// not decode from it, so that a second replay changes nothing. The first origin stays.
    fn push(
        &mut self,
        target: &str,
        record: &Record<'_>,
        replay_id: &str,
        count: u64,
        origin: &str,
    ) -> Result<(), CliError> {
        if !self.yes {
            return Ok(());
        }
        let count = count.to_string();
        let kept = record.headers.iter().filter(|(name, _)| !matches!(*name, REPLAY_ID | REPLAY_COUNT));
        let added = [(REPLAY_ID, replay_id.as_bytes()), (REPLAY_COUNT, count.as_bytes())];
        let first = record.headers.last(ORIGIN).is_none().then_some((ORIGIN, origin.as_bytes()));
        let topic: Arc<str> = target.into();
        self.outbox.push(&topic, None, record.key, record.value, kept.chain(added).chain(first));
        if self.outbox.len() >= CHUNK { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), CliError> {
        if self.outbox.is_empty() {
            return Ok(());
        }
        records::send(self.context, &self.outbox)?;
        self.sent += self.outbox.len() as u64;
        self.outbox.clear();
        Ok(())
    }
}
