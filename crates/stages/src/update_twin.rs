//! `update_twin` (decide): the only writer of twins.
//!
//! Telemetry and reported messages set reported fields, heartbeats and session events say whether the
//! device is there, requests set desired fields and are answered. The state *is* the twin topic: the
//! runtime writes each changed twin there once a commit.
//!
//! Outcomes: *emitted* where the twin shows the message, also for a request, whose answer says what became
//! of it; *ignored* with `superseded` where the twin knows newer; *duplicate* for a redelivery;
//! *filtered* with `no_device` for a session that is about no device; *dead_lettered* with the code of the
//! check.

use crate::checks::{self, Fault, ValueRef};
use std::time::Duration;
use throughline_model::envelope::{DeviceMessage, Enveloped, Session, TwinRequest, TwinResponse, flag};
use throughline_model::keyed::Keyed;
use throughline_model::outcome::{Outcome, Settled};
use throughline_model::seq_runs::{Admission, Refusal};
use throughline_model::stage::{Decide, Effects, Input, Kind, StageSpec};
use throughline_model::time::TimeBounds;
use throughline_model::topics::{
    DEVICE_HEARTBEAT_V1, DEVICE_REPORTED_V1, DEVICE_SESSION_V1, DEVICE_TELEMETRY_V1,
    SERVICE_PLATFORM_TWIN_REQUEST_V1, SERVICE_PLATFORM_TWIN_RESPONSE_V1, SERVICE_PLATFORM_TWIN_V1,
};
use throughline_model::twin::{
    SessionChange, Taken, TwinState, leave_open, take_heartbeat, take_request, take_session, take_values,
};

/// The stage's name and consumer group; twins' message ids are derived under it.
pub const STAGE: &str = throughline_model::twin::STAGE;
/// A person waits for the answer to a request.
const COMMIT_INTERVAL: Duration = Duration::from_millis(50);

/// The stage.
pub struct UpdateTwin {
    spec: StageSpec,
    bounds: TimeBounds,
}

impl UpdateTwin {
    /// Makes the stage. A device time outside `bounds` counts as absent.
    pub fn new(bounds: TimeBounds) -> Self {
        Self {
            spec: StageSpec {
                group: STAGE,
                kind: Kind::Decide,
                inputs: vec![
                    DEVICE_TELEMETRY_V1,
                    DEVICE_REPORTED_V1,
                    DEVICE_HEARTBEAT_V1,
                    DEVICE_SESSION_V1,
                    SERVICE_PLATFORM_TWIN_REQUEST_V1,
                ],
                tables: Vec::new(),
                changelog: Some(SERVICE_PLATFORM_TWIN_V1.to_owned()),
                commit_interval: COMMIT_INTERVAL,
            },
            bounds,
        }
    }
}

impl Default for UpdateTwin {
    fn default() -> Self {
        Self::new(TimeBounds::default())
    }
}

impl Decide for UpdateTwin {
    type State = TwinState;

    fn spec(&self) -> &StageSpec {
        &self.spec
    }

    fn process(
        &mut self,
        input: &Input<'_>,
        state: &mut Keyed<Self::State>,
        effects: &mut Effects,
    ) -> Settled {
        let settled = match input.topic {
            DEVICE_TELEMETRY_V1 | DEVICE_REPORTED_V1 | DEVICE_HEARTBEAT_V1 => {
                device_message(input, state, self.bounds)
            }
            DEVICE_SESSION_V1 => session(input, state),
            SERVICE_PLATFORM_TWIN_REQUEST_V1 => request(input, state, effects),
            other => Err(Settled::dead_lettered("unexpected_topic", format!("`{other}` is not an input"))),
        };
        settled.unwrap_or_else(|refused| refused)
    }
}

fn device_message(
    input: &Input<'_>,
    state: &mut Keyed<TwinState>,
    bounds: TimeBounds,
) -> Result<Settled, Settled> {
    let mut message: DeviceMessage = input.decode().map_err(|e| checks::undecodable(&input.record, &e))?;
    let key = checks::device_key(&input.record, &message.envelope())?;
    if input.replayed && !message.envelope().is_replay() {
        message.flags.push(flag::REPLAYED.to_owned());
    }
    // A name of any length must not get into the runs, so this leaves no trace in the twin.
    if let Err((code, what)) = envelope_texts(&message) {
        return Err(refused(input.topic, key, &message, code, &what));
    }
    if let Err((code, what)) = checks::measurements(message.measurements.iter().map(ValueRef::from)) {
        return Err(match leave_open(&mut state.get_mut(key).0, &message, bounds) {
            Refusal::Duplicate { reason } => Settled::new(Outcome::Duplicate, reason),
            Refusal::DeadLetter => refused(input.topic, key, &message, code, &what),
        });
    }
    let twin = &mut state.get_mut(key).0;
    let taken = if input.topic == DEVICE_HEARTBEAT_V1 {
        take_heartbeat(twin, &message, bounds)
    } else {
        take_values(twin, &message, bounds)
    };
    Ok(match taken {
        Taken::TooManyFields => {
            let what = "the twin would have more fields than it may";
            refused(input.topic, key, &message, "too_many_fields", what)
        }
        Taken::TooLarge => {
            let what = "the twin's reported fields would take more bytes than they may";
            refused(input.topic, key, &message, "twin_too_large", what)
        }
        taken => settled(taken),
    })
}

fn envelope_texts(message: &DeviceMessage) -> Result<(), Fault> {
    let versions = [
        ("agent_version", message.agent_version.as_deref()),
        ("config_version", message.config_version.as_deref()),
    ];
    checks::envelope_texts(&message.envelope(), &versions)
}

fn session(input: &Input<'_>, state: &mut Keyed<TwinState>) -> Result<Settled, Settled> {
    let session: Session = input.decode().map_err(|e| checks::undecodable(&input.record, &e))?;
    if session.device_id.is_empty() {
        return Ok(Settled::new(Outcome::Filtered, "no_device"));
    }
    let key = checks::device_key(&input.record, &session.envelope())?;
    let Some(change) = SessionChange::of(&session) else {
        let what = format!("session of `{key}`: event `{}` is not known", session.event);
        return Err(Settled::dead_lettered("event_unknown", what));
    };
    if let Err((code, what)) =
        checks::envelope_texts(&session.envelope(), &[("cause", session.cause.as_deref())])
    {
        return Err(Settled::dead_lettered(code, format!("cannot take a session of `{key}`: {what}")));
    }
    Ok(settled(take_session(&mut state.get_mut(key).0, &session, change)))
}

fn request(
    input: &Input<'_>,
    state: &mut Keyed<TwinState>,
    effects: &mut Effects,
) -> Result<Settled, Settled> {
    let request: TwinRequest = input.decode().map_err(|e| checks::undecodable(&input.record, &e))?;
    let key = checks::device_key(&input.record, &request.envelope())?;
    // Applied to a copy: a rejected request writes no twin, in particular none for a device that has none.
    let mut twin = state.get(key).cloned().unwrap_or_default();
    let before = twin.0.desired_version;
    let answer = take_request(&mut twin.0, &request, input.record.time);
    let response = TwinResponse {
        request_code: request.request_code.clone(),
        response_code: Some(answer.response_code.to_owned()),
        reason: answer.reason.map(str::to_owned),
        desired_version: twin.0.desired_version,
        ..TwinResponse::derived_from(&request, STAGE, "response")
    };
    if twin.0.desired_version != before {
        *state.get_mut(key) = twin;
    }
    effects.emit(SERVICE_PLATFORM_TWIN_RESPONSE_V1, key, &response);
    effects.answered(request.request_code.as_deref(), answer.response_code, answer.reason);
    Ok(Settled::new(Outcome::Emitted, answer.reason.unwrap_or_default()))
}

fn settled(taken: Taken) -> Settled {
    match taken {
        Taken::Applied(Admission::EpochReused { .. }) => Settled::new(Outcome::Emitted, flag::EPOCH_REUSED),
        Taken::Applied(Admission::BelowFloor { .. }) => Settled::new(Outcome::Emitted, flag::BELOW_FLOOR),
        Taken::Applied(_) => Settled::emitted(),
        Taken::Superseded => Settled::new(Outcome::Ignored, "superseded"),
        Taken::Duplicate { reason } => Settled::new(Outcome::Duplicate, reason),
        Taken::TooManyFields => Settled::dead_lettered("too_many_fields", "the twin has too many fields"),
        Taken::TooLarge => Settled::dead_lettered("twin_too_large", "the twin has too many bytes"),
    }
}

fn refused(topic: &str, key: &str, message: &DeviceMessage, code: &'static str, what: &str) -> Settled {
    let seq = message.seq.map(|seq| format!(" seq {seq}")).unwrap_or_default();
    Settled::dead_lettered(code, format!("cannot take `{key}`{seq} of {topic}: {what}"))
}
