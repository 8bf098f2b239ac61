//! `bridge_data` (decide): each reading once, checked, from the devices' topic to the data platform's.
//!
//! A reading that passes is the same message as before, so it keeps its message id and trace id; only
//! flags are added. State, by device: the sequence runs, whose changelog is also the ledger's account of
//! gaps.
//!
//! Outcomes: *emitted*, with reason `epoch_reused` or `below_floor` where the runs say so; *duplicate* with
//! `redelivered`, `stale_ts` or `dead_lettered_before`; *dead_lettered* with the code of the check. A
//! dead-lettered reading stays open in the runs, so that its first successful replay is accepted.

use crate::checks::{self, Fault, ValueRef};
use serde::{Deserialize, Serialize};
use std::time::Duration;
use throughline_model::catalog::changelog_topic;
use throughline_model::envelope::{EnvelopeRef, flag};
use throughline_model::keyed::Keyed;
use throughline_model::outcome::{Outcome, Settled};
use throughline_model::seq_runs::{Admission, Refusal, Streams};
use throughline_model::stage::{Decide, Effects, Input, Kind, StageSpec};
use throughline_model::time::{TimeBounds, Timestamp};
use throughline_model::topics::{DATA_CORE_READING_V1, DEVICE_TELEMETRY_V1};

/// The stage's name and consumer group.
pub const STAGE: &str = "bridge_data";
/// Nobody waits for a reading in the warehouse as for an alert; half as many commits cost half.
const COMMIT_INTERVAL: Duration = Duration::from_millis(100);

/// The stage.
pub struct BridgeData {
    spec: StageSpec,
    bounds: TimeBounds,
}

impl BridgeData {
    /// Makes the stage. A reading whose own time lies outside `bounds` is dead-lettered.
    pub fn new(bounds: TimeBounds) -> Self {
        Self {
            spec: StageSpec {
                group: STAGE,
                kind: Kind::Decide,
                inputs: vec![DEVICE_TELEMETRY_V1],
                tables: Vec::new(),
                changelog: Some(changelog_topic(DEVICE_TELEMETRY_V1, STAGE)),
                commit_interval: COMMIT_INTERVAL,
            },
            bounds,
        }
    }
}

impl Default for BridgeData {
    fn default() -> Self {
        Self::new(TimeBounds::default())
    }
}

impl Decide for BridgeData {
    type State = Streams;

    fn spec(&self) -> &StageSpec {
        &self.spec
    }

    fn process(
        &mut self,
        input: &Input<'_>,
        state: &mut Keyed<Self::State>,
        effects: &mut Effects,
    ) -> Settled {
        let mut reading: Reading<'_> = match input.decode() {
            Ok(reading) => reading,
            Err(e) => return checks::undecodable(&input.record, &e),
        };
        let key = match checks::device_key(&input.record, &reading.envelope()) {
            Ok(key) => key,
            Err(settled) => return settled,
        };
        if let Err(fault) = check(&reading, self.bounds) {
            return refuse(key, &reading, fault, self.bounds, input.replayed, state);
        }
        let envelope = reading.envelope();
        let admission = match envelope.sequence() {
            // Without sequence identity nothing changes, so the state is not even touched.
            None => Admission::Unsequenced,
            Some(_) => state.get_mut(key).admit(&envelope),
        };
        let reason = match admission {
            Admission::Duplicate { reason } => return Settled::new(Outcome::Duplicate, reason),
            Admission::EpochReused { .. } => flag::EPOCH_REUSED,
            Admission::BelowFloor { .. } => flag::BELOW_FLOOR,
            Admission::New { .. } | Admission::Unsequenced => "",
        };
        reading.mark(reason);
        if input.replayed {
            reading.mark(flag::REPLAYED);
        }
        effects.emit_as(DATA_CORE_READING_V1, key, &reading.envelope(), &reading);
        Settled::new(Outcome::Emitted, reason)
    }
}

/// A reading as it lies in its record, borrowed: what passes is written again without having been copied.
#[derive(Debug, Deserialize, Serialize)]
struct Reading<'a> {
    message_id: &'a str,
    trace_id: &'a str,
    #[serde(borrow, default)]
    request_id: Option<&'a str>,
    #[serde(borrow, default)]
    request_code: Option<&'a str>,
    #[serde(borrow, default)]
    response_code: Option<&'a str>,
    #[serde(borrow, default)]
    reason: Option<&'a str>,
    identity: &'a str,
    site_id: &'a str,
    device_id: &'a str,
    #[serde(borrow, default)]
    agent_version: Option<&'a str>,
    #[serde(borrow, default)]
    config_version: Option<&'a str>,
    received_by: &'a str,
    stream: &'a str,
    #[serde(default)]
    epoch: Option<i64>,
    #[serde(default)]
    seq: Option<i64>,
    occurred_at: Timestamp,
    received_at: Timestamp,
    #[serde(default)]
    clock_offset: Option<i64>,
    #[serde(default)]
    flags: Vec<String>,
    #[serde(borrow)]
    measurements: Vec<Value<'a>>,
}

#[derive(Debug, Deserialize, Serialize)]
struct Value<'a> {
    name: &'a str,
    #[serde(default)]
    number: Option<f64>,
    #[serde(borrow, default)]
    text: Option<&'a str>,
    #[serde(default)]
    flag: Option<bool>,
    #[serde(borrow, default)]
    unit: Option<&'a str>,
}

impl Reading<'_> {
    fn envelope(&self) -> EnvelopeRef<'_> {
        EnvelopeRef {
            message_id: self.message_id,
            trace_id: self.trace_id,
            request_id: self.request_id,
            identity: self.identity,
            site_id: self.site_id,
            device_id: self.device_id,
            stream: self.stream,
            epoch: self.epoch,
            seq: self.seq,
            occurred_at: self.occurred_at,
            received_at: self.received_at,
            flags: &self.flags,
        }
    }

    fn mark(&mut self, flag: &str) {
        if !flag.is_empty() && !self.flags.iter().any(|f| f == flag) {
            self.flags.push(flag.to_owned());
        }
    }
}

fn check(reading: &Reading<'_>, bounds: TimeBounds) -> Result<(), Fault> {
    checks::time(&reading.envelope(), bounds)?;
    if reading.measurements.is_empty() {
        return Err(("no_measurements", "it has no measurement".to_owned()));
    }
    checks::measurements(reading.measurements.iter().map(|v| ValueRef {
        name: v.name,
        number: v.number,
        text: v.text,
        flag: v.flag,
        unit: v.unit,
    }))
}

/// Dead-letters a reading unless it is known. What was replayed and fails again always is: its replays are
/// counted in its letters, and at last it is parked.
fn refuse(
    key: &str,
    reading: &Reading<'_>,
    fault: Fault,
    bounds: TimeBounds,
    replayed: bool,
    state: &mut Keyed<Streams>,
) -> Settled {
    let envelope = reading.envelope();
    if envelope.sequence().is_some()
        && let Refusal::Duplicate { reason } =
            state.get_mut(key).refuse_with_time(&envelope, envelope.trusted_time(bounds))
        && !replayed
    {
        return Settled::new(Outcome::Duplicate, reason);
    }
    let (code, what) = fault;
    let seq = reading.seq.map(|seq| format!(" seq {seq}")).unwrap_or_default();
    Settled::dead_lettered(code, format!("cannot take reading `{key}`{seq}: {what}"))
}
