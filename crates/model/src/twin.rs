//! The algebra of twins: what a message, a session event or a request makes of a device's twin.
//!
//! A field takes the newest value: within a stream by (epoch, generation, seq); between two streams, whose
//! numbers say nothing about each other, by the device's time; without sequence identity in the order of
//! Kafka, but for the replay of a dead letter, which comes long after its turn and is therefore taken by
//! its time. So the order in which messages arrive does not show in the twin. A redelivery is recognised
//! by the twin's own runs of seq, which it carries.
//!
//! No rule here rests on the device's clock alone: a time that is certainly wrong counts as absent.

mod size;

pub use size::{
    DESIRED_BYTES_MAX, ENVELOPE_TEXT_BYTES_MAX, FIELD_NAME_BYTES_MAX, FIELD_TEXT_BYTES_MAX,
    FIELD_UNIT_BYTES_MAX, FIELDS_MAX, REPORTED_BYTES_MAX, long_text,
};

use crate::codec::{Codec, CodecError};
use crate::envelope::{
    DeviceMessage, Enveloped, Measurement, Session, StreamPosition, Twin, TwinField, TwinRequest,
};
use crate::ids::derived_message_id;
use crate::keyed::KeyedState;
use crate::seq_runs::{Admission, Position, Refusal};
use crate::time::{TimeBounds, Timestamp};
use crate::topics;
use size::growth;

/// The only writer of twins; the name under which their message ids are derived.
pub const STAGE: &str = "update_twin";

/// `presence` of a device with a session or a heartbeat.
pub const ONLINE: &str = "online";
/// `presence` of a device whose newest session ended.
pub const OFFLINE: &str = "offline";
/// `presence` of a device of which neither session nor heartbeat was seen.
pub const UNKNOWN: &str = "unknown";

/// A twin as the keyed state of `update_twin`. Its bytes are the value of the twin topic.
#[derive(Clone, Debug, PartialEq)]
pub struct TwinState(pub Twin);

impl Default for TwinState {
    fn default() -> Self {
        Self(Twin { presence: UNKNOWN.into(), presence_reason: "no_session".into(), ..Twin::default() })
    }
}

impl KeyedState for TwinState {
    fn encode(&self, codec: &Codec, out: &mut Vec<u8>) -> Result<(), CodecError> {
        codec.encode(topics::SERVICE_PLATFORM_TWIN_V1, &self.0, out)
    }

    fn decode(bytes: &[u8], codec: &Codec) -> Result<Self, CodecError> {
        codec.decode(Some(bytes)).map(Self)
    }
}

/// What became of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// The twin shows it.
    Applied(Admission),
    /// All that it says is older than what the twin shows.
    Superseded,
    /// It is a redelivery.
    Duplicate {
        /// A code of [`crate::seq_runs`].
        reason: &'static str,
    },
    /// It would give the twin more than [`FIELDS_MAX`] reported fields; it stays open for a replay.
    TooManyFields,
    /// It would give the reported fields more than [`REPORTED_BYTES_MAX`]; it stays open for a replay.
    TooLarge,
}

/// The result of a request, as the response states it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// `success` or `rejected`.
    pub response_code: &'static str,
    /// Why: absent after a change, `unchanged`, or the reason of the rejection.
    pub reason: Option<&'static str>,
}

impl Answer {
    const fn rejected(reason: &'static str) -> Self {
        Self { response_code: "rejected", reason: Some(reason) }
    }
}

/// Takes what a device measures or reports: each value becomes a reported field where it is the newest.
pub fn take_values(twin: &mut Twin, message: &DeviceMessage, bounds: TimeBounds) -> Taken {
    let growth = growth(&twin.reported, &message.measurements, &message.stream);
    let refused = if twin.reported.len() + growth.fields > FIELDS_MAX {
        Some(Taken::TooManyFields)
    } else if growth.exceeds(&twin.reported, REPORTED_BYTES_MAX) {
        Some(Taken::TooLarge)
    } else {
        None
    };
    if let Some(refused) = refused {
        return match leave_open(twin, message, bounds) {
            Refusal::Duplicate { reason } => Taken::Duplicate { reason },
            Refusal::DeadLetter => refused,
        };
    }
    let ts = message.envelope().trusted_time(bounds);
    let admission = admit(twin, message, ts);
    if let Admission::Duplicate { reason } = admission {
        return Taken::Duplicate { reason };
    }
    let origin = Origin {
        stream: &message.stream,
        position: admission.position(),
        at: ts.unwrap_or(message.received_at),
        version: twin.reported_version + 1,
        replayed: message.envelope().is_replay(),
    };
    let mut applied = false;
    let mut changed = false;
    for value in &message.measurements {
        match find(&twin.reported, &value.name) {
            Ok(at) if !origin.is_newer_than(&twin.reported[at]) => {}
            Ok(at) => {
                applied = true;
                changed |= origin.overwrite(&mut twin.reported[at], value);
            }
            Err(at) => {
                (applied, changed) = (true, true);
                twin.reported.insert(at, origin.field(value));
            }
        }
    }
    if changed {
        twin.reported_version = origin.version;
        refresh_delta(twin);
    }
    let is_newest = is_newest(message, admission);
    note_heard(twin, message, is_newest, admission.position(), ts);
    if !applied && !is_newest {
        return Taken::Superseded;
    }
    set_cause(twin, message);
    Taken::Applied(admission)
}

/// Leaves a message that cannot be taken open in the twin's runs, for a replay.
///
/// What is replayed and cannot be taken again is a dead letter again: another one would lie about how often
/// it was replayed, and none would lose it.
pub fn leave_open(twin: &mut Twin, message: &DeviceMessage, bounds: TimeBounds) -> Refusal {
    if twin.message_id.is_empty() {
        // Its first message ever: the twin is written for its runs and needs an envelope of its own.
        set_cause(twin, message);
    }
    let envelope = message.envelope();
    let runs = &mut twin.runs.get_or_insert_default().0;
    match runs.refuse_with_time(&envelope, envelope.trusted_time(bounds)) {
        Refusal::Duplicate { .. } if envelope.is_replay() => Refusal::DeadLetter,
        refusal => refusal,
    }
}

/// Takes a heartbeat: the newest says that the device is alive, also where no session tells (a device
/// behind an agent or an external broker).
pub fn take_heartbeat(twin: &mut Twin, message: &DeviceMessage, bounds: TimeBounds) -> Taken {
    let ts = message.envelope().trusted_time(bounds);
    let admission = admit(twin, message, ts);
    if let Admission::Duplicate { reason } = admission {
        return Taken::Duplicate { reason };
    }
    let is_newest = is_newest(message, admission)
        || (admission == Admission::Unsequenced && Some(message.received_at) > twin.heartbeat_at);
    note_heard(twin, message, is_newest, admission.position(), ts);
    if !is_newest {
        return Taken::Superseded;
    }
    set_cause(twin, message);
    twin.heartbeat_at = twin.heartbeat_at.max(Some(message.received_at));
    // Sessions and heartbeats come from two topics, so the platform's clock puts them in order.
    if twin.presence != ONLINE && message.received_at > twin.presence_at {
        set_presence(twin, ONLINE, "heartbeat", message.received_at);
    }
    Taken::Applied(admission)
}

/// What a session event does to presence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionChange<'a> {
    presence: &'static str,
    reason: &'a str,
}

impl<'a> SessionChange<'a> {
    /// Reads the event, or returns `None` where it is not one that is known.
    pub fn of(session: &'a Session) -> Option<Self> {
        let (presence, reason) = match session.event.as_str() {
            "connected" => (ONLINE, "connected"),
            "will" => (OFFLINE, "will"),
            "taken_over" => (OFFLINE, "taken_over"),
            "disconnected" => (OFFLINE, session.cause.as_deref().unwrap_or("disconnected")),
            _ => return None,
        };
        Some(Self { presence, reason })
    }
}

/// Takes a session event. An older generation never turns a newer one offline, and a generation neither
/// begins nor ends twice.
pub fn take_session(twin: &mut Twin, session: &Session, change: SessionChange<'_>) -> Taken {
    let generation = session.session_generation;
    let is_stale = twin.session_generation.is_some_and(|known| {
        generation < known || (generation == known && (change.presence == ONLINE || twin.presence == OFFLINE))
    });
    twin.last_seen_at = twin.last_seen_at.max(session.received_at);
    if is_stale {
        return Taken::Superseded;
    }
    twin.session_generation = Some(generation);
    set_presence(twin, change.presence, change.reason, session.received_at);
    set_cause(twin, session);
    Taken::Applied(Admission::Unsequenced)
}

/// Takes a request to change what the device shall be. `now` is the platform's time of the request. A
/// rejected request changes nothing.
pub fn take_request(twin: &mut Twin, request: &TwinRequest, now: Timestamp) -> Answer {
    if request.expected_version.is_some_and(|expected| expected != twin.desired_version) {
        return Answer::rejected("version_conflict");
    }
    if request.desired.is_empty() {
        return Answer::rejected("empty_request");
    }
    if request.desired.iter().any(|m| !name_is_valid(&m.name)) {
        return Answer::rejected("invalid_name");
    }
    if request.desired.iter().any(|m| !value_is_valid(m)) {
        return Answer::rejected("invalid_value");
    }
    if request.desired.iter().any(|m| !texts_fit(m)) || long_text(&request.envelope()).is_some() {
        return Answer::rejected("text_too_long");
    }
    let growth = growth(&twin.desired, request.desired.iter().filter(|m| !is_absent(m)), &request.stream);
    if twin.desired.len() + growth.fields > FIELDS_MAX {
        return Answer::rejected("too_many_fields");
    }
    if growth.exceeds(&twin.desired, DESIRED_BYTES_MAX) {
        return Answer::rejected("twin_too_large");
    }
    let origin = Origin {
        stream: &request.stream,
        position: None,
        at: now,
        version: twin.desired_version + 1,
        replayed: false,
    };
    let mut changed = false;
    for value in &request.desired {
        match find(&twin.desired, &value.name) {
            Ok(at) if is_absent(value) => {
                twin.desired.remove(at);
                changed = true;
            }
            Ok(at) if same_value(&twin.desired[at], value) && twin.desired[at].unit == value.unit => {}
            Ok(at) => changed |= origin.overwrite(&mut twin.desired[at], value),
            Err(_) if is_absent(value) => {}
            Err(at) => {
                twin.desired.insert(at, origin.field(value));
                changed = true;
            }
        }
    }
    if !changed {
        return Answer { response_code: "success", reason: Some("unchanged") };
    }
    twin.desired_version = origin.version;
    refresh_delta(twin);
    set_cause(twin, request);
    Answer { response_code: "success", reason: None }
}

/// Says whether `name` may name a field: 1 to [`FIELD_NAME_BYTES_MAX`] bytes without control characters.
pub fn name_is_valid(name: &str) -> bool {
    !name.is_empty() && name.len() <= FIELD_NAME_BYTES_MAX && !name.chars().any(char::is_control)
}

/// Where a value comes from.
struct Origin<'a> {
    stream: &'a str,
    position: Option<Position>,
    at: Timestamp,
    version: i64,
    /// Whether it comes long after its turn, so that Kafka's order says nothing.
    replayed: bool,
}

impl Origin<'_> {
    fn is_newer_than(&self, field: &TwinField) -> bool {
        let stream = field.stream.as_deref().unwrap_or_default();
        if stream != self.stream {
            // The names make the order total, so that arrival does not decide between equal times.
            return (self.at, self.stream) > (field.at, stream);
        }
        let known = field.epoch.zip(field.generation).zip(field.seq);
        let known = known.map(|((epoch, generation), seq)| Position { epoch, generation, seq });
        match self.position.zip(known) {
            Some((position, known)) => position > known,
            None => !self.replayed || self.at > field.at,
        }
    }

    fn field(&self, value: &Measurement) -> TwinField {
        let mut field = TwinField { name: value.name.clone(), ..TwinField::default() };
        self.write(&mut field, value);
        field.version = self.version;
        field
    }

    /// Says whether the value differs from what was there; the time moves on all the same.
    fn overwrite(&self, field: &mut TwinField, value: &Measurement) -> bool {
        let changed = !same_value(field, value) || field.unit != value.unit;
        self.write(field, value);
        if changed {
            field.version = self.version;
        }
        changed
    }

    fn write(&self, field: &mut TwinField, value: &Measurement) {
        field.number = value.number;
        field.flag = value.flag;
        if field.text != value.text {
            field.text.clone_from(&value.text);
        }
        if field.unit != value.unit {
            field.unit.clone_from(&value.unit);
        }
        if field.stream.as_deref() != Some(self.stream) {
            field.stream = Some(self.stream.to_owned());
        }
        field.at = self.at;
        field.epoch = self.position.map(|p| p.epoch);
        field.generation = self.position.map(|p| p.generation);
        field.seq = self.position.map(|p| p.seq);
    }
}

fn admit(twin: &mut Twin, message: &DeviceMessage, ts: Option<Timestamp>) -> Admission {
    twin.runs.get_or_insert_default().0.admit_with_time(&message.envelope(), ts)
}

/// Says whether current state may take the message. Without sequence identity Kafka's order decides, which
/// says nothing of a replay: its fields are taken by their times, one by one.
fn is_newest(message: &DeviceMessage, admission: Admission) -> bool {
    admission.is_newest() && !(admission == Admission::Unsequenced && message.envelope().is_replay())
}

/// Notes that the device was heard and, of its newest message, where its stream stands and what it runs.
fn note_heard(
    twin: &mut Twin,
    message: &DeviceMessage,
    is_newest: bool,
    position: Option<Position>,
    ts: Option<Timestamp>,
) {
    twin.last_seen_at = twin.last_seen_at.max(message.received_at);
    if !is_newest {
        return;
    }
    if message.agent_version.is_some() {
        twin.agent_version.clone_from(&message.agent_version);
    }
    if message.config_version.is_some() {
        twin.config_version.clone_from(&message.config_version);
    }
    let Some(position) = position else { return };
    let at = twin.positions.iter().position(|p| p.stream == message.stream).unwrap_or_else(|| {
        twin.positions.push(StreamPosition { stream: message.stream.clone(), ..StreamPosition::default() });
        twin.positions.len() - 1
    });
    let newest = &mut twin.positions[at];
    newest.epoch = position.epoch;
    newest.generation = position.generation;
    newest.seq = position.seq;
    newest.occurred_at = ts.unwrap_or(message.received_at);
}

/// Gives the twin the envelope of the message that changed it: its trace, and an id derived from it.
fn set_cause(twin: &mut Twin, message: &dyn Enveloped) {
    let parent = message.envelope();
    let id = derived_message_id(parent.message_uuid(), STAGE, "twin");
    put(&mut twin.message_id, id.hyphenated().encode_lower(&mut uuid::Uuid::encode_buffer()));
    put(&mut twin.trace_id, parent.trace_id);
    put(&mut twin.identity, parent.identity);
    put(&mut twin.site_id, parent.site_id);
    put(&mut twin.device_id, parent.device_id);
    put(&mut twin.stream, parent.stream);
    put(&mut twin.received_by, STAGE);
    twin.request_id = parent.request_id.map(str::to_owned);
    twin.epoch = parent.epoch;
    twin.seq = parent.seq;
    twin.occurred_at = parent.occurred_at;
    twin.received_at = parent.received_at;
}

fn put(target: &mut String, text: &str) {
    target.clear();
    target.push_str(text);
}

fn set_presence(twin: &mut Twin, presence: &str, reason: &str, at: Timestamp) {
    put(&mut twin.presence, presence);
    put(&mut twin.presence_reason, reason);
    twin.presence_at = at;
}

fn refresh_delta(twin: &mut Twin) {
    if twin.desired.is_empty() && twin.delta.is_empty() {
        return;
    }
    let reported = &twin.reported;
    let is_met = |desired: &TwinField| {
        find(reported, &desired.name).is_ok_and(|at| {
            let is = &reported[at];
            same_number(is.number, desired.number) && is.text == desired.text && is.flag == desired.flag
        })
    };
    twin.delta = twin.desired.iter().filter(|desired| !is_met(desired)).cloned().collect();
}

fn find(fields: &[TwinField], name: &str) -> Result<usize, usize> {
    fields.binary_search_by(|field| field.name.as_str().cmp(name))
}

fn is_absent(value: &Measurement) -> bool {
    value.number.is_none() && value.text.is_none() && value.flag.is_none()
}

fn value_is_valid(value: &Measurement) -> bool {
    let given = [value.number.is_some(), value.text.is_some(), value.flag.is_some()];
    given.iter().filter(|is| **is).count() <= 1 && value.number.is_none_or(f64::is_finite)
}

fn texts_fit(value: &Measurement) -> bool {
    value.text.as_deref().is_none_or(|text| text.len() <= FIELD_TEXT_BYTES_MAX)
        && value.unit.as_deref().is_none_or(|unit| unit.len() <= FIELD_UNIT_BYTES_MAX)
}

fn same_value(field: &TwinField, value: &Measurement) -> bool {
    same_number(field.number, value.number) && field.text == value.text && field.flag == value.flag
}

/// Compares bits as well, so that a foreign producer's NaN equals itself and is not a change each time.
fn same_number(a: Option<f64>, b: Option<f64>) -> bool {
    a == b || a.map(f64::to_bits) == b.map(f64::to_bits)
}
