//! `project_twins` (load): twins as rows with a JSON document, for those who query a database.
//!
//! Outcomes: *emitted*, a tombstone too, which removes the row; *dead_lettered* with the code of the check.

use crate::checks;
use crate::json::{Time, Value};
use serde::{Serialize, Serializer, ser::SerializeMap};
use std::time::Duration;
use throughline_model::envelope::{Enveloped, Twin, TwinField};
use throughline_model::ids::DeviceKey;
use throughline_model::outcome::Settled;
use throughline_model::rows::{Rows, TwinRow};
use throughline_model::stage::{Input, Kind, Load, StageSpec};
use throughline_model::time::Timestamp;
use throughline_model::topics::SERVICE_PLATFORM_TWIN_V1;

/// The stage's name and consumer group.
pub const STAGE: &str = "project_twins";
/// As often as twins are written, at half the number of commits.
const COMMIT_INTERVAL: Duration = Duration::from_millis(100);

/// The stage.
pub struct ProjectTwins {
    spec: StageSpec,
}

impl ProjectTwins {
    /// Makes the stage.
    pub fn new() -> Self {
        Self {
            spec: StageSpec {
                group: STAGE,
                kind: Kind::Load,
                inputs: vec![SERVICE_PLATFORM_TWIN_V1],
                tables: Vec::new(),
                changelog: None,
                commit_interval: COMMIT_INTERVAL,
            },
        }
    }
}

impl Default for ProjectTwins {
    fn default() -> Self {
        Self::new()
    }
}

impl Load for ProjectTwins {
    fn spec(&self) -> &StageSpec {
        &self.spec
    }

    fn rows(&mut self, input: &Input<'_>, rows: &mut Rows) -> Settled {
        let row = if input.record.value.is_none() { removal(input) } else { projection(input) };
        match row {
            Ok(row) => {
                rows.twins.push(row);
                Settled::emitted()
            }
            Err(refused) => refused,
        }
    }
}

/// Returns the twin as the JSON document that the API and the database show.
///
/// Fields are objects by name: `{"value": 21.5, "unit": "°C", "at": "2026-…Z", "version": 3}`.
pub fn document(twin: &Twin) -> String {
    let document = Document {
        site_id: &twin.site_id,
        device_id: &twin.device_id,
        reported: Fields(&twin.reported),
        desired: Fields(&twin.desired),
        delta: Fields(&twin.delta),
        reported_version: twin.reported_version,
        desired_version: twin.desired_version,
        presence: &twin.presence,
        presence_reason: &twin.presence_reason,
        presence_at: some_time(twin.presence_at),
        last_seen_at: some_time(twin.last_seen_at),
        heartbeat_at: twin.heartbeat_at.map(Time),
        session_generation: twin.session_generation,
        agent_version: twin.agent_version.as_deref(),
        config_version: twin.config_version.as_deref(),
        message_id: &twin.message_id,
        trace_id: &twin.trace_id,
    };
    serde_json::to_string(&document).expect("texts, numbers and maps with text keys serialize")
}

#[derive(Serialize)]
struct Document<'a> {
    site_id: &'a str,
    device_id: &'a str,
    reported: Fields<'a>,
    desired: Fields<'a>,
    delta: Fields<'a>,
    reported_version: i64,
    desired_version: i64,
    presence: &'a str,
    presence_reason: &'a str,
    presence_at: Option<Time>,
    last_seen_at: Option<Time>,
    heartbeat_at: Option<Time>,
    session_generation: Option<i64>,
    agent_version: Option<&'a str>,
    config_version: Option<&'a str>,
    message_id: &'a str,
    trace_id: &'a str,
}

struct Fields<'a>(&'a [TwinField]);

impl Serialize for Fields<'_> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let mut map = to.serialize_map(Some(self.0.len()))?;
        for field in self.0 {
            map.serialize_entry(&field.name, &Field::of(field))?;
        }
        map.end()
    }
}

#[derive(Serialize)]
struct Field<'a> {
    value: Value<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    unit: Option<&'a str>,
    at: Time,
    version: i64,
}

impl<'a> Field<'a> {
    fn of(field: &'a TwinField) -> Self {
        let value = Value::of(field.number, field.text.as_deref(), field.flag);
        Self { value, unit: field.unit.as_deref(), at: Time(field.at), version: field.version }
    }
}

/// A time that was never set is absent rather than 1970.
fn some_time(time: Timestamp) -> Option<Time> {
    (time != Timestamp::default()).then_some(Time(time))
}

fn projection(input: &Input<'_>) -> Result<TwinRow, Settled> {
    let twin: Twin = input.decode().map_err(|e| checks::undecodable(&input.record, &e))?;
    checks::device_key(&input.record, &twin.envelope())?;
    let document = document(&twin);
    Ok(TwinRow {
        site_id: twin.site_id,
        device_id: twin.device_id,
        reported_version: twin.reported_version,
        desired_version: twin.desired_version,
        presence: twin.presence,
        last_seen_at: twin.last_seen_at,
        document,
        message_id: twin.message_id,
        trace_id: twin.trace_id,
    })
}

fn removal(input: &Input<'_>) -> Result<TwinRow, Settled> {
    let key = input.record.key_str().unwrap_or_default();
    match key.parse::<DeviceKey>() {
        Ok(device) => Ok(TwinRow::removal(device.site(), device.device())),
        Err(e) => Err(Settled::dead_lettered("device_invalid", format!("tombstone of `{key}`: {e}"))),
    }
}
