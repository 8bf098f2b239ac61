//! `dlq replay` and `dlq drop`: what they would do, and the request that does it.

use super::requests;
use super::selector::{Found, Selection, Selector};
use crate::config::Flags;
use crate::context::Context;
use crate::failure::{CliError, Exit};
use crate::output;
use crate::predict::Prediction;
use crate::roles::ROLES;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use throughline_kafka::browse::end_offsets;
use throughline_model::catalog::replay_topic;
use throughline_model::dead_letter::{Action, Fate, header, is_exhausted, parse_letters, status};
use throughline_model::envelope::{DeadLetterRequest, LetterRange};
use throughline_model::record::{Batch, Outbox, TopicPartition};
use throughline_runtime::{Clock, REPLAYS_MAX, WallClock, push_replay};
use uuid::Uuid;

/// Arguments of `dlq replay`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    selector: Selector,
    /// At most this many replays a second; 0 is no bound
    #[arg(long, value_name = "N", default_value_t = 1_000)]
    rate: u32,
    /// Replay also what was replayed before
    #[arg(long)]
    again: bool,
    /// Of how many letters of each cause the dry run shows the effects
    #[arg(long, value_name = "N", default_value_t = 20)]
    effects: usize,
    /// Why; it is kept with the request
    #[arg(long)]
    reason: Option<String>,
    #[command(flatten)]
    how: How,
}

/// Whether it is done.
#[derive(clap::Args)]
pub struct How {
    /// Ask for it; without this it only shows what it would do
    #[arg(long)]
    yes: bool,
    /// Return as soon as the request is written; it is carried out all the same
    #[arg(long)]
    no_wait: bool,
}

/// What is to become of the letters.
pub struct Wish {
    /// Replay or drop.
    pub action: Action,
    /// Why.
    pub justification: Option<String>,
    /// Whether what was replayed before is replayed too.
    pub again: bool,
    /// The bound on replays.
    pub rate_per_second: Option<i64>,
}

/// Replays, or shows what would come out.
pub fn run(flags: &Flags, context: &Context, args: &Args) -> Result<Exit, CliError> {
    let wish = Wish {
        action: Action::Replay,
        justification: args.reason.clone(),
        again: args.again,
        rate_per_second: (args.rate > 0).then_some(i64::from(args.rate)),
    };
    carry_out(flags, context, &args.selector, &wish, &args.how, args.effects)
}

/// Asks for what is wished, or shows what it would do, with the effects of `effects` letters of each cause.
///
/// # Errors
/// Exit code 2 without a topic or code, 1 when the request failed, 4 when Kafka is away.
pub fn carry_out(
    flags: &Flags,
    context: &Context,
    selector: &Selector,
    wish: &Wish,
    how: &How,
    effects: usize,
) -> Result<Exit, CliError> {
    if !selector.names_letters() {
        let verb = wish.action.label();
        return Err(CliError::usage(format!(
            "a {verb} needs `--topic`, `--code` or both; `throughline dlq list` shows them"
        )));
    }
    if wish.justification.as_deref().is_some_and(|why| why.trim().is_empty()) {
        return Err(CliError::usage("`--reason` is empty: say why, for those who look at it later"));
    }
    context.bind_schemas()?;
    let selection = selector.read(context)?;
    let mut plan = BTreeMap::new();
    let kept = if how.yes { 0 } else { effects };
    selection.each(context, |found| {
        add(&mut plan, found, wish, kept);
        ControlFlow::Continue(())
    })?;
    if how.yes {
        ask(flags, context, &selection, wish, &plan, how.no_wait)
    } else {
        show(flags, context, wish, &plan)
    }
}

/// What would be done with the letters of one topic.
#[derive(Default)]
struct Planned {
    replayed: u64,
    dropped: u64,
    parked: u64,
    skipped: u64,
    /// Copies of the first letters of each code, as their replays.
    samples: BTreeMap<String, Sample>,
}

#[derive(Default)]
struct Sample {
    letters: Vec<Then>,
    replays: Outbox,
}

/// What became of a letter when it was refused.
struct Then {
    at: String,
    code: String,
    message: String,
}

fn add(plan: &mut BTreeMap<String, Planned>, found: &Found<'_>, wish: &Wish, effects: usize) {
    let planned = plan.entry(found.topic.to_owned()).or_default();
    let exhausted = is_exhausted(found.topic, &found.letter, REPLAYS_MAX);
    // A letter that a request at work has yet to reach is open, but belongs to that one.
    let is_free = found.fate == Fate::Open && found.request.is_none();
    let again = wish.again && found.fate == Fate::Replayed;
    if !(is_free || wish.action == Action::Replay && again) {
        planned.skipped += 1;
    } else if wish.action == Action::Drop {
        planned.dropped += 1;
    } else if exhausted {
        planned.parked += 1;
    } else {
        planned.replayed += 1;
        let sample = planned.samples.entry(found.letter.code.to_owned()).or_default();
        if sample.letters.len() < effects {
            let partition = TopicPartition::new(found.topic, found.letter.partition);
            push_replay(&mut sample.replays, &partition, &found.record, "dry-run");
            sample.letters.push(Then {
                at: format!("{}/{}", found.letter.partition, found.letter.offset),
                code: found.letter.code.to_owned(),
                message: super::list::text(&found.record, header::MESSAGE),
            });
        }
    }
}

fn show(
    flags: &Flags,
    context: &Context,
    wish: &Wish,
    plan: &BTreeMap<String, Planned>,
) -> Result<Exit, CliError> {
    let mut topics = Vec::new();
    for (topic, planned) in plan {
        let target = parse_letters(topic).map(|(origin, group)| replay_topic(origin, group));
        let mut effects = Vec::new();
        let mut unknown = false;
        for sample in planned.samples.values() {
            match predict(context, topic, sample)? {
                Some(now) => {
                    effects.extend(sample.letters.iter().zip(now).map(|(then, now)| effect(then, &now)))
                }
                None => unknown = true,
            }
        }
        let document = json!({"topic": topic, "target": target, "replayed": planned.replayed,
            "dropped": planned.dropped, "parked": planned.parked, "skipped": planned.skipped,
            "effects": effects, "effects_known": !unknown});
        if !flags.json {
            print(wish, &document);
        }
        topics.push(document);
    }
    if flags.json {
        let kind = format!("dlq.{}", wish.action.label());
        output::json(&kind, json!({"dry_run": true, "topics": topics}));
    } else {
        output::notice("nothing was asked for; add --yes to do it");
    }
    Ok(Exit::Done)
}

/// Returns what would become of the sampled letters now, or `None` where that cannot be told.
fn predict(context: &Context, letters: &str, sample: &Sample) -> Result<Option<Vec<Prediction>>, CliError> {
    let Some((topic, group)) = parse_letters(letters) else { return Ok(None) };
    let role = ROLES.iter().find(|role| role.name == group);
    let Some(predict) = role.and_then(|role| role.predict) else { return Ok(None) };
    let now = WallClock.now();
    let mut replays = Batch::new(TopicPartition::new(replay_topic(topic, group), 0));
    for (offset, out) in (0..).zip(sample.replays.iter()) {
        replays.push(offset, now, out.key, out.value, out.headers.iter());
    }
    predict(context, topic, &replays).map(Some)
}

fn effect(then: &Then, now: &Prediction) -> Value {
    json!({"at": then.at, "then": {"outcome": "dead_lettered", "code": then.code, "message": then.message},
           "now": now.to_json()})
}

fn print(wish: &Wish, document: &Value) {
    let plain = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let topic = plain(&document["topic"]);
    let would = match wish.action {
        Action::Drop => format!("{} would be dropped", document["dropped"]),
        _ => format!("{} would be sent to {}", document["replayed"], plain(&document["target"])),
    };
    output::line(&format!("{topic}: {would}"));
    for (name, why) in [
        ("parked", "have exhausted their replays and would go to the parking topic"),
        ("skipped", "belong to an earlier request (--again replays what was replayed)"),
    ] {
        if document[name] != 0 {
            output::line(&format!("  {} {why}", document[name]));
        }
    }
    for effect in document["effects"].as_array().into_iter().flatten() {
        let (then, now) = (&effect["then"], &effect["now"]);
        let code = plain(&now["code"]);
        let code = if code.is_empty() { code } else { format!(" {code}") };
        let same = now["outcome"] == then["outcome"] && now["code"] == then["code"];
        let mark = if same { "  (no change)" } else { "" };
        let what = format!("{} -> {}{code}{mark}", plain(&then["code"]), plain(&now["outcome"]));
        output::line(&format!("  {}  {what}", plain(&effect["at"])));
        if !now["message"].is_null() {
            output::line(&format!("      {}", plain(&now["message"])));
        }
        for out in now["outputs"].as_array().into_iter().flatten() {
            match out["table"].as_str() {
                Some(table) => output::line(&format!("      {} row(s) of {table}", out["rows"])),
                None => {
                    let (topic, key) = (plain(&out["topic"]), plain(&out["key"]));
                    output::line(&format!("      {topic} {key} {}", out["value"]));
                }
            }
        }
    }
    if document["effects_known"] == false {
        output::line("  its stage's effects are not predicted; replay one with --at to see");
    }
}

fn ask(
    flags: &Flags,
    context: &Context,
    selection: &Selection,
    wish: &Wish,
    plan: &BTreeMap<String, Planned>,
    no_wait: bool,
) -> Result<Exit, CliError> {
    let mut wanted = Vec::new();
    for (topic, planned) in plan {
        if planned.replayed + planned.dropped + planned.parked > 0 {
            wanted.push(request(context, topic, selection, wish)?);
        }
    }
    if wanted.is_empty() && !flags.json {
        output::notice("no letter is open; `throughline dlq list` shows what became of them");
    }
    let ended = if wanted.is_empty() { Vec::new() } else { requests::submit(context, &wanted, !no_wait)? };
    if flags.json {
        let ids: Vec<_> = wanted.iter().filter_map(|request| request.request_id.clone()).collect();
        let ended: Vec<Value> = ended.iter().map(requests::to_json).collect();
        let kind = format!("dlq.{}", wish.action.label());
        output::json(&kind, json!({"dry_run": false, "ids": ids, "requests": ended}));
    } else if no_wait {
        let ids = wanted.iter().filter_map(|request| request.request_id.as_deref());
        ids.for_each(output::line);
    } else {
        ended.iter().for_each(|progress| output::line(&requests::summary(progress)));
    }
    let failed = ended.iter().any(|progress| progress.status == status::FAILED);
    Ok(if failed { Exit::Failed } else { Exit::Done })
}

/// Makes the request about one topic, which ends where the topic ends now: what a replay causes is not part
/// of it.
fn request(
    context: &Context,
    topic: &str,
    selection: &Selection,
    wish: &Wish,
) -> Result<DeadLetterRequest, CliError> {
    let ends = end_offsets(&context.kafka(), topic)?;
    let range = |(partition, end): &(TopicPartition, i64)| {
        let place = selection.place.as_ref();
        let whole = LetterRange { partition: partition.partition, first: 0, end: *end };
        match place {
            None => Some(whole),
            Some(place) if place.partition != partition.partition => None,
            Some(place) => Some(LetterRange { end: place.end.min(*end), ..place.clone() }),
        }
    };
    let filter = &selection.filter;
    Ok(DeadLetterRequest {
        code: filter.code.clone(),
        schema_id: filter.schema_id,
        since: filter.since,
        until: filter.until,
        ranges: ends.iter().filter_map(range).collect(),
        again: wish.again,
        rate_per_second: wish.rate_per_second,
        justification: wish.justification.clone(),
        ..requests::request(Uuid::now_v7().to_string(), wish.action, topic)
    })
}
