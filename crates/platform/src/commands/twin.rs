//! `throughline twin`: asks `update_twin` by message to change a twin's desired fields.

use crate::config::Flags;
use crate::context::Context;
use crate::failure::{CliError, Exit};
use crate::{output, records};
use serde_json::json;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;
use throughline_kafka::browse::{Begin, Stop, browse, end_offsets};
use throughline_model::envelope::{Enveloped, IDENTITY_NONE, Measurement, TwinRequest, TwinResponse};
use throughline_model::ids::{DeviceKey, TraceId, partition_of};
use throughline_model::record::Outbox;
use throughline_model::stage::traceparent;
use throughline_model::topics::{SERVICE_PLATFORM_TWIN_REQUEST_V1, SERVICE_PLATFORM_TWIN_RESPONSE_V1};
use throughline_runtime::{Clock, WallClock};
use uuid::Uuid;

/// Arguments of `twin`.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Set desired fields and wait for the answer
    Set {
        /// `site/device`
        device: DeviceKey,
        /// `name=value`; a value reads as JSON where it can, else as text; `name=null` removes the field
        #[arg(required = true)]
        fields: Vec<String>,
        /// Only if the desired version is this one
        #[arg(long)]
        expected_version: Option<i64>,
        /// How long to wait for the answer, in seconds
        #[arg(long, default_value_t = 10)]
        wait: u64,
    },
}

/// Runs the subcommand.
///
/// # Errors
/// Exit code 1 when the request was rejected or not answered in time, 4 when Kafka is away.
pub fn run(flags: &Flags, args: &Args) -> Result<Exit, CliError> {
    let Command::Set { device, fields, expected_version, wait } = &args.command;
    let mut desired = Vec::new();
    for field in fields {
        desired.push(parse_field(field)?);
    }
    let context = Context::new(flags.load()?)?;
    context.bind_schemas()?;
    let now = WallClock.now();
    let request_id = Uuid::now_v7().to_string();
    let request = TwinRequest {
        message_id: request_id.clone(),
        trace_id: TraceId::mint(now, device.as_str().as_bytes(), rand::random()).to_string(),
        request_id: Some(request_id.clone()),
        request_code: Some("twin_set".to_owned()),
        identity: IDENTITY_NONE.to_owned(),
        site_id: device.site().to_owned(),
        device_id: device.device().to_owned(),
        received_by: "throughline twin".to_owned(),
        stream: "twin_request".to_owned(),
        occurred_at: now,
        received_at: now,
        desired,
        expected_version: *expected_version,
        ..TwinRequest::default()
    };
    let answer = ask(&context, device, &request, Duration::from_secs(*wait))?;
    report(flags, device, (&request_id, &request.trace_id), answer, *wait)
}

fn parse_field(text: &str) -> Result<Measurement, CliError> {
    let (name, value) = text
        .split_once('=')
        .filter(|(name, _)| !name.is_empty())
        .ok_or_else(|| CliError::usage(format!("`{text}` is no field: write `name=value`")))?;
    let mut field = Measurement { name: name.to_owned(), ..Measurement::default() };
    match serde_json::from_str(value) {
        Ok(serde_json::Value::Number(number)) => field.number = number.as_f64(),
        Ok(serde_json::Value::Bool(flag)) => field.flag = Some(flag),
        Ok(serde_json::Value::String(text)) => field.text = Some(text),
        Ok(serde_json::Value::Null) => {}
        Ok(serde_json::Value::Array(_) | serde_json::Value::Object(_)) => {
            return Err(CliError::usage(format!(
                "`{name}` takes a number, text or boolean; write nested names with dots"
            )));
        }
        Err(_) => field.text = Some(value.to_owned()),
    }
    Ok(field)
}

fn ask(
    context: &Context,
    device: &DeviceKey,
    request: &TwinRequest,
    wait: Duration,
) -> Result<Option<TwinResponse>, CliError> {
    let kafka = context.kafka();
    // Where the answers stand now, so that only later ones are read.
    let ends = end_offsets(&kafka, SERVICE_PLATFORM_TWIN_RESPONSE_V1)?;
    let partition = partition_of(device.as_str().as_bytes(), ends.len() as i32);
    let end = ends.iter().find(|(p, _)| p.partition == partition).map_or(0, |(_, end)| *end);
    let topic: Arc<str> = SERVICE_PLATFORM_TWIN_REQUEST_V1.into();
    let mut outbox = Outbox::default();
    let trace = traceparent(&request.envelope());
    let headers = trace.as_deref().map(|t| ("traceparent", t.as_bytes()));
    outbox
        .push_with(&topic, None, Some(device.as_str().as_bytes()), headers, |out| {
            context.codec.encode(SERVICE_PLATFORM_TWIN_REQUEST_V1, request, out).map(|()| true)
        })
        .map_err(|e| CliError::failed(e.to_string()))?;
    records::send(context, &outbox)?;
    let mut answer = None;
    let topic = SERVICE_PLATFORM_TWIN_RESPONSE_V1;
    browse(&kafka, topic, &[partition], Begin::At(end), Stop::After(wait), &mut |batch| {
        let answers = batch.iter().filter_map(|r| context.codec.decode::<TwinResponse>(r.value).ok());
        answer = answers.into_iter().find(|a| a.request_id == request.request_id);
        if answer.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    Ok(answer)
}

fn report(
    flags: &Flags,
    device: &DeviceKey,
    (request_id, trace_id): (&str, &str),
    answer: Option<TwinResponse>,
    wait: u64,
) -> Result<Exit, CliError> {
    let Some(answer) = answer else {
        return Err(CliError::failed(format!(
            "no answer within {wait} s: the request is in Kafka and will be carried out; `throughline trace {trace_id}` or `throughline groups list` shows where `update_twin` is"
        )));
    };
    let code = answer.response_code.unwrap_or_default();
    let reason = answer.reason.unwrap_or_default();
    if flags.json {
        output::json(
            "twin.set",
            json!({"device": device.as_str(), "request_id": request_id, "trace_id": answer.trace_id,
                   "response_code": code, "reason": reason, "desired_version": answer.desired_version}),
        );
    } else {
        let because = if reason.is_empty() { String::new() } else { format!(" ({reason})") };
        output::line(&format!("{device}: {code}{because}, desired version {}", answer.desired_version));
    }
    Ok(if code == "success" { Exit::Done } else { Exit::Failed })
}
