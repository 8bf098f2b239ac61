//! `dlq list` and `dlq show`.

use super::selector::{Fates, Found, Selector};
use crate::config::Flags;
use crate::context::Context;
use crate::failure::{CliError, Exit};
use crate::output;
use crate::records::{Reader, brief, hex, place};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use throughline_model::dead_letter::{Fate, header, parse_letters};
use throughline_model::record::Record;
use throughline_model::time::Timestamp;

/// What letters are grouped by.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Cause {
    topic: String,
    stage: String,
    code: String,
    schema_id: Option<u32>,
    /// The rule that made the record, with its version.
    rule: Option<String>,
}

struct Group {
    fates: Fates,
    first: Timestamp,
    last: Timestamp,
    /// The newest open letter, or the newest.
    example: String,
    example_is_open: bool,
    message: String,
}

/// Counts dead letters by cause.
pub fn list(flags: &Flags, context: &Context, selector: &Selector) -> Result<Exit, CliError> {
    let mut groups: BTreeMap<Cause, Group> = BTreeMap::new();
    selector.read(context)?.each(context, |found| {
        let time = found.record.time;
        let group = groups.entry(cause(found)).or_insert_with(|| Group {
            fates: Fates::default(),
            first: time,
            last: time,
            example: String::new(),
            example_is_open: false,
            message: String::new(),
        });
        group.fates.count(found.fate);
        group.first = group.first.min(time);
        group.last = group.last.max(time);
        let is_open = found.fate == Fate::Open;
        if is_open || !group.example_is_open {
            group.example = format!("{}/{}", found.letter.partition, found.letter.offset);
            group.example_is_open = is_open;
            group.message = text(&found.record, header::MESSAGE);
        }
        ControlFlow::Continue(())
    })?;
    if flags.json {
        let causes: Vec<Value> = groups
            .iter()
            .map(|(cause, g)| {
                let count: u64 = Fates::ALL.iter().map(|fate| g.fates.of(*fate)).sum();
                json!({"topic": cause.topic, "stage": cause.stage, "code": cause.code,
                       "schema_id": cause.schema_id, "rule": cause.rule, "count": count, "fates": g.fates.by_name(),
                       "first": g.first.to_string(), "last": g.last.to_string(),
                       "example": g.example, "message": g.message})
            })
            .collect();
        output::json("dlq.list", json!({ "causes": causes }));
        return Ok(Exit::Done);
    }
    let rows: Vec<Vec<String>> = groups
        .iter()
        .map(|(cause, g)| {
            let mut row = vec![cause.topic.clone(), cause.stage.clone(), cause.code.clone()];
            row.push(cause.schema_id.map(|id| id.to_string()).unwrap_or_default());
            row.push(cause.rule.clone().unwrap_or_default());
            row.extend(Fates::ALL.iter().map(|fate| g.fates.of(*fate).to_string()));
            row.extend([g.first.to_string(), g.last.to_string(), g.example.clone(), g.message.clone()]);
            row
        })
        .collect();
    let header = [
        "TOPIC", "STAGE", "CODE", "SCHEMA", "RULE", "OPEN", "REPLAYED", "DROPPED", "PARKED", "FIRST", "LAST",
        "EXAMPLE", "MESSAGE",
    ];
    output::table(&header, &rows);
    Ok(Exit::Done)
}

fn cause(found: &Found<'_>) -> Cause {
    let stated = text(&found.record, header::STAGE);
    let owner = parse_letters(found.topic).map(|(_, group)| group.to_owned()).unwrap_or_default();
    Cause {
        topic: found.topic.to_owned(),
        stage: if stated.is_empty() { owner } else { stated },
        code: found.letter.code.to_owned(),
        schema_id: found.letter.schema_id,
        rule: Some(text(&found.record, header::RULE)).filter(|rule| !rule.is_empty()),
    }
}

/// Returns a header as text, empty where it is missing.
pub fn text(record: &Record<'_>, header: &str) -> String {
    record.headers.last(header).map(|v| String::from_utf8_lossy(v).into_owned()).unwrap_or_default()
}

/// Shows letters with everything that is known of them.
pub fn show(flags: &Flags, context: &Context, selector: &Selector, limit: u64) -> Result<Exit, CliError> {
    let mut reader = Reader::new(context);
    let mut left = limit;
    let mut failed = None;
    selector.read(context)?.each(context, |found| {
        if left == 0 {
            return ControlFlow::Break(());
        }
        left -= 1;
        match document(&mut reader, found) {
            Ok(document) if flags.json => output::json("dlq.show", document),
            Ok(document) => print(&document),
            Err(error) => {
                failed = Some(error);
                return ControlFlow::Break(());
            }
        }
        ControlFlow::Continue(())
    })?;
    failed.map_or(Ok(Exit::Done), Err)
}

fn document(reader: &mut Reader<'_>, found: &Found<'_>) -> Result<Value, CliError> {
    let record = &found.record;
    let mut document = place(found.topic, found.letter.partition, record);
    let cause = cause(found);
    document["stage"] = cause.stage.into();
    document["code"] = cause.code.into();
    document["schema_id"] = cause.schema_id.into();
    document["rule"] = cause.rule.into();
    document["message"] = text(record, header::MESSAGE).into();
    document["fate"] = found.fate.label().into();
    document["request"] = found.request.clone().into();
    let bytes = record.value.unwrap_or_default();
    match reader.value(record.value)? {
        Ok(value) => document["value"] = value,
        Err(why) => {
            document["unreadable"] = why.into();
            match std::str::from_utf8(bytes) {
                Ok(text) => document["text"] = text.into(),
                Err(_) => document["bytes"] = hex(bytes).into(),
            }
        }
    }
    // `00-<trace id>-<span id>-<flags>`
    let traceparent = text(record, "traceparent");
    let of_header = traceparent.split('-').nth(1).filter(|id| id.len() == 32).map(Value::from);
    document["trace_id"] = of_header.unwrap_or_else(|| document["value"]["trace_id"].clone());
    Ok(document)
}

fn print(document: &Value) {
    let plain = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let field = |name: &str| plain(&document[name]);
    let said = |name: &str| !document[name].is_null();
    let place = format!("{} {}/{}", field("topic"), field("partition"), field("offset"));
    output::line(&format!("{place} {} {}", field("timestamp"), field("fate")));
    output::line(&format!("  cause  {}: {}: {}", field("stage"), field("code"), field("message")));
    if said("request") {
        output::line(&format!("  request  {}", field("request")));
    }
    if said("trace_id") {
        output::line(&format!("  trace  {}", field("trace_id")));
    }
    output::line(&format!("  key  {}", field("key")));
    for header in document["headers"].as_array().into_iter().flatten() {
        output::line(&format!("  {}  {}", plain(&header["name"]), plain(&header["value"])));
    }
    if said("value") {
        output::line(&format!("  value  {}\n", brief(&document["value"])));
    }
    for form in ["text", "bytes"] {
        if said(form) {
            output::line(&format!("  {form}  {}\n", field(form)));
        }
    }
}
