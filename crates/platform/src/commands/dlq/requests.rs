//! `dlq requests` and `dlq cancel`; writing requests and following their progress.

use crate::config::Flags;
use crate::context::Context;
use crate::failure::{CliError, Exit};
use crate::output;
use crate::records::{self, Reader};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use throughline_kafka::admin::Admin;
use throughline_kafka::browse::{Begin, Stop, browse, end_offsets};
use throughline_model::dead_letter::{Action, STAGE, status};
use throughline_model::envelope::{DeadLetterProgress, DeadLetterRequest, Enveloped, IDENTITY_NONE};
use throughline_model::ids::TraceId;
use throughline_model::record::{Outbox, Record};
use throughline_model::stage::traceparent;
use throughline_model::topics::{
    SERVICE_PLATFORM_DEAD_LETTER_PROGRESS_V1 as PROGRESS, SERVICE_PLATFORM_DEAD_LETTER_REQUEST_V1 as REQUESTS,
};
use throughline_runtime::{Clock, WallClock};
use uuid::Uuid;

/// Reads a topic whole: the last value of each key. Values that do not read are left out.
fn last_by_key<T: DeserializeOwned>(context: &Context, topic: &str) -> Result<BTreeMap<String, T>, CliError> {
    let mut all = BTreeMap::new();
    let mut take = |record: &Record<'_>, value| {
        let key = record.key.map(|key| String::from_utf8_lossy(key).into_owned()).unwrap_or_default();
        all.insert(key, value);
    };
    records::decoded(context, topic, &[], Begin::Earliest, &|_| true, &mut take)?;
    Ok(all)
}

/// Returns the requests that were taken up, by the topic of their letters, each in their order.
///
/// # Errors
/// Exit code 4 when Kafka is away.
pub fn by_topic(context: &Context) -> Result<BTreeMap<String, Vec<DeadLetterProgress>>, CliError> {
    let mut topics: BTreeMap<String, Vec<DeadLetterProgress>> = BTreeMap::new();
    for progress in last_by_key::<DeadLetterProgress>(context, PROGRESS)?.into_values() {
        topics.entry(progress.topic.clone()).or_default().push(progress);
    }
    let admin = Admin::new(&context.kafka())?;
    let existing = admin.topics()?;
    let names: Vec<&str> = topics.keys().map(String::as_str).filter(|t| existing.contains_key(*t)).collect();
    let ids = admin.topic_ids(&names)?;
    for (topic, requests) in &mut topics {
        // What was decided about a topic that was deleted says nothing about another one of its name.
        requests.retain(|request| ids.get(topic).is_none_or(|id| request.is_of(id)));
        requests.sort_by(DeadLetterProgress::order);
    }
    Ok(topics)
}

/// Lists every request with its progress; one that no role has taken up yet is `waiting`.
pub fn list(flags: &Flags, context: &Context) -> Result<Exit, CliError> {
    let mut all = last_by_key::<DeadLetterProgress>(context, PROGRESS)?;
    for (id, request) in last_by_key::<DeadLetterRequest>(context, REQUESTS)? {
        let waiting = || DeadLetterProgress {
            status: "waiting".to_owned(),
            ..DeadLetterProgress::accepted(&request, request.occurred_at)
        };
        all.entry(id).or_insert_with(waiting);
    }
    let mut all: Vec<_> = all.into_values().collect();
    all.sort_by(DeadLetterProgress::order);
    if flags.json {
        let requests: Vec<Value> = all.iter().map(to_json).collect();
        output::json("dlq.requests", json!({ "requests": requests }));
        return Ok(Exit::Done);
    }
    let number = |n: i64| n.to_string();
    let rows: Vec<Vec<String>> = all
        .iter()
        .map(|p| {
            let mut row = vec![p.request_id.clone().unwrap_or_default(), p.received_at.to_string()];
            row.extend([p.action.clone(), p.topic.clone(), p.code.clone().unwrap_or_default()]);
            row.push(p.status.clone());
            row.extend([p.replayed, p.dropped, p.parked, p.skipped, left(p)].map(number));
            row.push(p.requested_by.clone());
            row.push(p.error.clone().or_else(|| p.justification.clone()).unwrap_or_default());
            row
        })
        .collect();
    let header = [
        "ID", "AT", "ACTION", "TOPIC", "CODE", "STATUS", "REPLAYED", "DROPPED", "PARKED", "SKIPPED", "LEFT",
        "BY", "WHY",
    ];
    output::table(&header, &rows);
    if all.iter().any(|p| p.is_open() || p.status == "waiting") {
        say_if_nobody_works(context)?;
    }
    Ok(Exit::Done)
}

/// Returns the positions that are not looked at yet; some may hold no letter that is selected, or none at all.
fn left(progress: &DeadLetterProgress) -> i64 {
    progress.ranges.iter().map(|range| range.end - range.next).sum()
}

/// Returns a request with its progress as JSON.
pub fn to_json(p: &DeadLetterProgress) -> Value {
    json!({"id": p.request_id, "at": p.received_at.to_string(), "action": p.action, "topic": p.topic,
           "code": p.code, "schema_id": p.schema_id, "replays_below": p.replays_below, "status": p.status, "replayed": p.replayed,
           "dropped": p.dropped, "parked": p.parked, "skipped": p.skipped, "overtaken": p.overtaken, "left": left(p), "again": p.again,
           "rate_per_second": p.rate_per_second, "requested_by": p.requested_by,
           "justification": p.justification, "error": p.error,
           "done_at": p.done_at.map(|at| at.to_string())})
}

/// Makes a request under `id`.
pub fn request(id: String, action: Action, topic: &str) -> DeadLetterRequest {
    let now = WallClock.now();
    DeadLetterRequest {
        message_id: Uuid::now_v7().to_string(),
        trace_id: TraceId::mint(now, id.as_bytes(), rand::random()).to_string(),
        request_id: Some(id),
        request_code: Some(format!("dead_letter_{}", action.label())),
        identity: IDENTITY_NONE.to_owned(),
        received_by: "throughline dlq".to_owned(),
        stream: "dead_letter_request".to_owned(),
        occurred_at: now,
        received_at: now,
        action: action.label().to_owned(),
        topic: topic.to_owned(),
        requested_by: std::env::var("USER").unwrap_or_else(|_| "unknown".to_owned()),
        ..DeadLetterRequest::default()
    }
}

/// Writes requests, and waits for their end where `wait` is asked for. Returns how they stand.
///
/// # Errors
/// Exit code 4 when Kafka does not acknowledge.
pub fn submit(
    context: &Context,
    requests: &[DeadLetterRequest],
    wait: bool,
) -> Result<Vec<DeadLetterProgress>, CliError> {
    // Where the progress stands now, so that only what comes later is read.
    let end = end_offsets(&context.kafka(), PROGRESS)?.first().map_or(0, |(_, end)| *end);
    let topic: Arc<str> = REQUESTS.into();
    let mut outbox = Outbox::default();
    for request in requests {
        let id = request.request_id.as_deref().unwrap_or_default();
        let trace = traceparent(&request.envelope());
        let headers = trace.as_deref().map(|t| ("traceparent", t.as_bytes()));
        let written = outbox.push_with(&topic, None, Some(id.as_bytes()), headers, |out| {
            context.codec.encode(REQUESTS, request, out).map(|()| true)
        });
        written.map_err(|e| CliError::failed(e.to_string()))?;
    }
    records::send(context, &outbox)?;
    for request in requests {
        let id = request.request_id.as_deref().unwrap_or_default();
        output::notice(&format!("request {id}: {} of {}", request.action, request.topic));
    }
    say_if_nobody_works(context)?;
    if wait { follow(context, requests, end) } else { Ok(Vec::new()) }
}

/// Says that no member of the role's group runs, and what helps.
fn say_if_nobody_works(context: &Context) -> Result<(), CliError> {
    let groups = Admin::new(&context.kafka())?.describe_groups(&[STAGE])?;
    if groups.iter().all(|group| group.members.is_empty()) {
        output::notice(&format!(
            "no `{STAGE}` runs: the request waits and is carried out as soon as one does (`throughline run {STAGE}`)"
        ));
    }
    Ok(())
}

/// Reads the progress from `begin` on until every request has ended.
fn follow(
    context: &Context,
    requests: &[DeadLetterRequest],
    begin: i64,
) -> Result<Vec<DeadLetterProgress>, CliError> {
    let mut ended: BTreeMap<String, Option<DeadLetterProgress>> =
        requests.iter().filter_map(|request| Some((request.request_id.clone()?, None))).collect();
    let mut reader = Reader::new(context);
    let mut failed = None;
    browse(&context.kafka(), PROGRESS, &[0], Begin::At(begin), Stop::Never, &mut |batch| {
        for record in batch.iter() {
            let Some(slot) = record.key_str().and_then(|key| ended.get_mut(key)) else { continue };
            match reader.read::<DeadLetterProgress>(record.value) {
                Ok(Ok(progress)) => {
                    output::progress(&summary(&progress));
                    *slot = (!progress.is_open()).then_some(progress);
                }
                Ok(Err(_)) => {}
                Err(error) => failed = Some(error),
            }
        }
        let is_over = failed.is_some() || ended.values().all(Option::is_some);
        if is_over { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    failed.map_or_else(|| Ok(ended.into_values().flatten().collect()), Err)
}

/// Says in one line how a request stands.
pub fn summary(p: &DeadLetterProgress) -> String {
    let counts = [
        (p.replayed, "replayed"),
        (p.dropped, "dropped"),
        (p.parked, "parked"),
        (p.skipped, "skipped"),
        (p.overtaken, "deleted by retention before"),
        (left(p), "positions left"),
    ];
    let counts: Vec<String> =
        counts.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{n} {what}")).collect();
    let error = p.error.as_deref().map(|why| format!(": {why}")).unwrap_or_default();
    let id = p.request_id.as_deref().unwrap_or_default();
    format!("{id} {} of {}: {}{error} {}", p.action, p.topic, p.status, counts.join(", "))
        .trim_end()
        .to_owned()
}

/// Ends a replay where it is, or undoes a drop.
pub fn cancel(flags: &Flags, context: &Context, id: &str) -> Result<Exit, CliError> {
    let known = last_by_key::<DeadLetterProgress>(context, PROGRESS)?.remove(id);
    let asked = last_by_key::<DeadLetterRequest>(context, REQUESTS)?.remove(id);
    let topic = match (&known, &asked) {
        (Some(progress), _) if !progress.is_open() && !is_done_drop(progress) => {
            return Err(CliError::failed(format!("nothing is left to cancel: {}", summary(progress))));
        }
        (Some(progress), _) => progress.topic.clone(),
        (None, Some(request)) => request.topic.clone(),
        (None, None) => {
            return Err(CliError::usage(format!(
                "there is no request `{id}`; `throughline dlq requests` lists them"
            )));
        }
    };
    context.bind_schemas()?;
    let ended = submit(context, &[request(id.to_owned(), Action::Cancel, &topic)], true)?;
    for progress in &ended {
        match flags.json {
            true => output::json("dlq.cancel", to_json(progress)),
            false => output::line(&summary(progress)),
        }
    }
    Ok(Exit::Done)
}

fn is_done_drop(progress: &DeadLetterProgress) -> bool {
    progress.wants() == Some(Action::Drop) && progress.status == status::DONE
}
