//! `load_warehouse` (load): readings, alerts and sessions as rows, each record once.
//!
//! A reading becomes one row a measurement. Numbers are finite and texts without NUL, because PostgreSQL
//! cannot hold the one and SQLite not the other: `bridge_data` refuses them, and what another producer
//! wrote into an input is refused here, before a store has to search for it.
//!
//! Outcomes: *emitted*; *filtered* with `no_measurements` for a reading without any; *dead_lettered* with
//! the code of the check.

use crate::checks::{self, Fault, TEXT_BYTES_MAX, ValueRef};
use std::time::Duration;
use throughline_model::envelope::{Alert, DeviceMessage, EnvelopeRef, Enveloped, Session};
use throughline_model::outcome::{Outcome, Settled};
use throughline_model::rows::{AlertRow, ReadingRow, Rows, SessionRow};
use throughline_model::stage::{Input, Kind, Load, StageSpec};
use throughline_model::topics::{DATA_CORE_READING_V1, DEVICE_SESSION_V1, SERVICE_PLATFORM_ALERT_V1};
use uuid::Uuid;

/// The stage's name and consumer group.
pub const STAGE: &str = "load_warehouse";
/// A query sees what came a tenth of a second ago; larger batches gain little.
const COMMIT_INTERVAL: Duration = Duration::from_millis(100);
/// The longest id, name or code in bytes: stores keep them in indexes, whose entries are bounded.
const ID_BYTES_MAX: usize = 512;

/// The stage.
pub struct LoadWarehouse {
    spec: StageSpec,
}

impl LoadWarehouse {
    /// Makes the stage.
    pub fn new() -> Self {
        Self {
            spec: StageSpec {
                group: STAGE,
                kind: Kind::Load,
                inputs: vec![DATA_CORE_READING_V1, SERVICE_PLATFORM_ALERT_V1, DEVICE_SESSION_V1],
                tables: Vec::new(),
                changelog: None,
                commit_interval: COMMIT_INTERVAL,
            },
        }
    }
}

impl Default for LoadWarehouse {
    fn default() -> Self {
        Self::new()
    }
}

impl Load for LoadWarehouse {
    fn spec(&self) -> &StageSpec {
        &self.spec
    }

    fn rows(&mut self, input: &Input<'_>, rows: &mut Rows) -> Settled {
        let settled = match input.topic {
            DATA_CORE_READING_V1 => reading(input, rows),
            SERVICE_PLATFORM_ALERT_V1 => alert(input, rows),
            DEVICE_SESSION_V1 => session(input, rows),
            other => Err(Settled::dead_lettered("unexpected_topic", format!("`{other}` is not an input"))),
        };
        settled.unwrap_or_else(|refused| refused)
    }
}

fn reading(input: &Input<'_>, rows: &mut Rows) -> Result<Settled, Settled> {
    let reading: DeviceMessage = input.decode().map_err(|e| checks::undecodable(&input.record, &e))?;
    check_envelope(&reading.envelope())
        .and_then(|()| checks::measurements(reading.measurements.iter().map(ValueRef::from)))
        .map_err(|fault| refused(input, "reading", fault))?;
    if reading.measurements.is_empty() {
        return Ok(Settled::new(Outcome::Filtered, "no_measurements"));
    }
    rows.readings.reserve(reading.measurements.len());
    for measurement in reading.measurements {
        rows.readings.push(ReadingRow {
            site_id: reading.site_id.clone(),
            device_id: reading.device_id.clone(),
            epoch: reading.epoch,
            seq: reading.seq,
            name: measurement.name,
            number: measurement.number,
            text: measurement.text,
            flag: measurement.flag,
            unit: measurement.unit,
            occurred_at: reading.occurred_at,
            received_at: reading.received_at,
            message_id: reading.message_id.clone(),
            trace_id: reading.trace_id.clone(),
            stream: reading.stream.clone(),
        });
    }
    Ok(Settled::emitted())
}

fn alert(input: &Input<'_>, rows: &mut Rows) -> Result<Settled, Settled> {
    let alert: Alert = input.decode().map_err(|e| checks::undecodable(&input.record, &e))?;
    check_envelope(&alert.envelope())
        .and_then(|()| check_text("alert_id", &alert.alert_id, ID_BYTES_MAX))
        .and_then(|()| check_text("rule_id", &alert.rule_id, ID_BYTES_MAX))
        .and_then(|()| check_text("severity", &alert.severity, ID_BYTES_MAX))
        .and_then(|()| check_state(&alert))
        .and_then(|()| check_text("summary", &alert.summary, TEXT_BYTES_MAX))
        .map_err(|fault| refused(input, "alert", fault))?;
    rows.alerts.push(AlertRow {
        alert_id: alert.alert_id,
        rule_id: alert.rule_id,
        rule_version: alert.rule_version,
        site_id: alert.site_id,
        device_id: alert.device_id,
        severity: alert.severity,
        state: alert.state,
        raised_at: alert.raised_at,
        cleared_at: alert.cleared_at,
        summary: alert.summary,
        message_id: alert.message_id,
        trace_id: alert.trace_id,
        received_at: alert.received_at,
    });
    Ok(Settled::emitted())
}

fn session(input: &Input<'_>, rows: &mut Rows) -> Result<Settled, Settled> {
    let session: Session = input.decode().map_err(|e| checks::undecodable(&input.record, &e))?;
    check_envelope(&session.envelope())
        .and_then(|()| check_text("client_id", &session.client_id, TEXT_BYTES_MAX))
        .and_then(|()| check_text("event", &session.event, ID_BYTES_MAX))
        .and_then(|()| check_text("cause", session.cause.as_deref().unwrap_or_default(), TEXT_BYTES_MAX))
        .and_then(|()| check_text("protocol", &session.protocol, ID_BYTES_MAX))
        .map_err(|fault| refused(input, "session", fault))?;
    rows.sessions.push(SessionRow {
        site_id: session.site_id,
        device_id: session.device_id,
        client_id: session.client_id,
        event: session.event,
        cause: session.cause,
        protocol: session.protocol,
        session_generation: session.session_generation,
        occurred_at: session.occurred_at,
        received_at: session.received_at,
        message_id: session.message_id,
        trace_id: session.trace_id,
    });
    Ok(Settled::emitted())
}

fn check_envelope(envelope: &EnvelopeRef<'_>) -> Result<(), Fault> {
    if envelope.message_id.len() != 36 || Uuid::try_parse(envelope.message_id).is_err() {
        return Err(("message_id_invalid", "its message_id is not a UUID of 36 characters".to_owned()));
    }
    if envelope.trace().is_none() {
        return Err(("trace_id_invalid", "its trace_id has not 32 hexadecimal digits".to_owned()));
    }
    check_text("site_id", envelope.site_id, ID_BYTES_MAX)?;
    check_text("device_id", envelope.device_id, ID_BYTES_MAX)?;
    check_text("stream", envelope.stream, ID_BYTES_MAX)
}

/// Stores hold an alert as raised, or as cleared with the time when.
fn check_state(alert: &Alert) -> Result<(), Fault> {
    match (alert.state.as_str(), alert.cleared_at) {
        ("raised", None) | ("cleared", Some(_)) => Ok(()),
        (state, cleared_at) => {
            let state: String = state.chars().filter(|c| !c.is_control()).take(64).collect();
            let with = if cleared_at.is_some() { "with" } else { "without" };
            Err(("alert_state_invalid", format!("its state is `{state}` {with} a time of clearing")))
        }
    }
}

fn check_text(field: &str, text: &str, bytes_max: usize) -> Result<(), Fault> {
    if text.len() > bytes_max {
        let what = format!("its {field} has {} bytes, more than {bytes_max}", text.len());
        return Err(("text_too_long", what));
    }
    if text.as_bytes().contains(&0) {
        return Err(("nul_in_text", format!("its {field} contains NUL")));
    }
    Ok(())
}

fn refused(input: &Input<'_>, kind: &str, (code, what): Fault) -> Settled {
    let key = input.record.key_str().unwrap_or("that is not text");
    Settled::dead_lettered(code, format!("cannot store the {kind} of key `{key}`: {what}"))
}
