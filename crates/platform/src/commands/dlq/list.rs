//! `dlq list`, `dlq parking` and `dlq show`.

use super::causes::{CAUSES_MAX, Causes, cause};
use super::selector::{Fates, Found, Selection, Selector};
use crate::config::Flags;
use crate::context::Context;
use crate::failure::{CliError, Exit};
use crate::output;
use crate::records::{Reader, brief, hex, place};
use serde_json::{Value, json};
use std::ops::ControlFlow;
use throughline_model::dead_letter::{Fate, header};
use throughline_model::record::Record;

/// Counts dead letters by cause.
pub fn list(flags: &Flags, context: &Context, selector: &Selector) -> Result<Exit, CliError> {
    print_causes(flags, "dlq.list", &gather(context, &selector.read(context)?)?, &Fates::ALL);
    Ok(Exit::Done)
}

/// Counts by cause what had exhausted its replays. In a parking topic nothing is parked again.
pub fn parking(flags: &Flags, context: &Context, selector: &Selector) -> Result<Exit, CliError> {
    let fates = [Fate::Open, Fate::Replayed, Fate::Dropped];
    print_causes(flags, "dlq.parking", &gather(context, &selector.read_parking(context)?)?, &fates);
    Ok(Exit::Done)
}

fn gather(context: &Context, selection: &Selection) -> Result<Causes, CliError> {
    let mut causes = Causes::default();
    selection.each(context, |found| {
        causes.count(found);
        ControlFlow::Continue(())
    })?;
    Ok(causes)
}

fn print_causes(flags: &Flags, kind: &str, causes: &Causes, fates: &[Fate]) {
    if flags.json {
        let listed: Vec<Value> = causes
            .groups
            .iter()
            .map(|(cause, g)| {
                json!({"topic": cause.topic, "stage": cause.stage, "code": cause.code,
                       "schema_id": cause.schema_id, "rule": cause.rule, "count": g.fates.sum(),
                       "fates": g.fates.by_name(fates),
                       "first": g.first.to_string(), "last": g.last.to_string(),
                       "example": g.example, "message": g.message})
            })
            .collect();
        output::json(kind, json!({"causes": listed, "letters_left_out": causes.letters_left_out}));
        return;
    }
    let rows: Vec<Vec<String>> = causes
        .groups
        .iter()
        .map(|(cause, g)| {
            let mut row = vec![cause.topic.clone(), cause.stage.clone(), cause.code.clone()];
            row.push(cause.schema_id.map(|id| id.to_string()).unwrap_or_default());
            row.push(cause.rule.clone().unwrap_or_default());
            row.push(g.fates.sum().to_string());
            row.extend(fates.iter().map(|fate| g.fates.of(*fate).to_string()));
            row.extend([g.first.to_string(), g.last.to_string(), g.example.clone(), g.message.clone()]);
            row
        })
        .collect();
    let names: Vec<String> = fates.iter().map(|fate| fate.label().to_uppercase()).collect();
    let mut header = vec!["TOPIC", "STAGE", "CODE", "SCHEMA", "RULE", "COUNT"];
    header.extend(names.iter().map(String::as_str));
    header.extend(["FIRST", "LAST", "EXAMPLE", "MESSAGE"]);
    output::table(&header, &rows);
    if causes.letters_left_out > 0 {
        output::notice(&format!(
            "{} letters of further causes are not listed: at most {CAUSES_MAX} causes are; select fewer with \
             `--topic`, `--code` or `--since`",
            causes.letters_left_out
        ));
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
