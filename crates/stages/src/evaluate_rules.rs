//! `evaluate_rules` (decide): holds what devices say against the rules in force, raises and clears alerts,
//! sends commands and forwards messages.
//!
//! Rules are data: the compacted rule topic is a table of this stage. State, by device: the sequence runs
//! that recognise redeliveries, rules that are pending or raised, and the values that rules ask for with
//! `previous`. What a message does depends on nothing but that state, the message and the rules in force.
//!
//! Outcomes: *emitted* where an alert, command or forwarded message came out, or a rule became pending or
//! ceased to be; *filtered* where no rule did anything (reason `late` where one would have looked but the
//! message exceeds its lateness bound), also when only previous values were remembered; *ignored* with
//! reason `superseded` where the message is older than the newest of its stream; *duplicate* for a
//! redelivery.
//!
//! No message is dead-lettered for a rule: an expression that finds no value does not hold, and a rule that does
//! not compile is not in force. What a rule made carries it in the header `tl-rule`, `<id>@<version>`, so that a
//! record which a later stage refuses is known to come from it.
//!
//! A device's own time outside the bounds counts as absent here as in the other stages: one message from
//! the far future would else make every message of the device's next life look like a redelivery.

use crate::checks;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;
use throughline_model::catalog::changelog_topic;
use throughline_model::codec::{Codec, CodecError};
use throughline_model::dead_letter::header;
use throughline_model::envelope::{
    Alert, Command, DeviceMessage, EnvelopeRef, Enveloped, Measurement, RuleRecord,
};
use throughline_model::ids::{DeviceKey, derived_message_id, timed_message_id};
use throughline_model::keyed::{Keyed, KeyedState};
use throughline_model::outcome::{Outcome, Settled};
use throughline_model::record::Record;
use throughline_model::rules::{
    Active, Cause, DeviceRules, Evaluator, Facts, MeasurementRef, Phase, Rule, RuleDefinition, RuleSet, Step,
    StepKind,
};
use throughline_model::seq_runs::{Admission, Streams};
use throughline_model::stage::{Decide, Effects, Input, Kind, StageSpec};
use throughline_model::time::{TimeBounds, Timestamp};
use throughline_model::topics::{
    DEVICE_COMMAND_V1, DEVICE_EVENT_V1, DEVICE_TELEMETRY_V1, SERVICE_PLATFORM_ALERT_V1,
    SERVICE_PLATFORM_RULE_V1,
};
use uuid::Uuid;

/// The stage's name and consumer group.
pub const STAGE: &str = "evaluate_rules";
/// A person waits for an alert; shorter intervals cost more commits than they save time.
const COMMIT_INTERVAL: Duration = Duration::from_millis(50);
/// How much of a text an alert repeats.
const TEXT_KEPT_BYTES_MAX: usize = 1_024;
/// How many flags of a message an alert repeats; ours are fewer.
const FLAGS_KEPT_MAX: usize = 16;

/// The stage.
pub struct EvaluateRules {
    spec: StageSpec,
    rules: RuleSet,
    evaluator: Evaluator,
    /// Whether the table changed since the rules were last indexed.
    is_stale: bool,
    /// What is wrong with rules that other writers put into the table, by rule id.
    problems: BTreeMap<String, String>,
    bounds: TimeBounds,
}

/// What the stage keeps of one device.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RulesState {
    streams: Streams,
    #[serde(default)]
    rules: DeviceRules,
}

impl KeyedState for RulesState {
    fn encode(&self, _: &Codec, out: &mut Vec<u8>) -> Result<(), CodecError> {
        let failed =
            |e: serde_json::Error| CodecError::Encode { topic: STAGE.to_owned(), why: e.to_string() };
        serde_json::to_writer(out, self).map_err(failed)
    }

    fn decode(bytes: &[u8], _: &Codec) -> Result<Self, CodecError> {
        serde_json::from_slice(bytes).map_err(|e| CodecError::Datum { id: 0, why: e.to_string() })
    }
}

/// A device message as it lies in its record, borrowed.
#[derive(Debug, Deserialize)]
struct MessageRef<'a> {
    message_id: &'a str,
    trace_id: &'a str,
    #[serde(borrow, default)]
    request_id: Option<&'a str>,
    identity: &'a str,
    site_id: &'a str,
    device_id: &'a str,
    #[serde(borrow, default)]
    agent_version: Option<&'a str>,
    #[serde(borrow, default)]
    config_version: Option<&'a str>,
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
    measurements: Vec<MeasurementRef<'a>>,
}

impl<'a> MessageRef<'a> {
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

    fn facts(&'a self, time: Timestamp) -> Facts<'a> {
        Facts {
            site: self.site_id,
            device: self.device_id,
            agent_version: self.agent_version,
            config_version: self.config_version,
            stream: self.stream,
            measurements: &self.measurements,
            age: Facts::age_of(self.occurred_at, time),
        }
    }

    /// Returns what an alert repeats of the message, with the values that `keep` names.
    fn cause(&self, keep: impl Fn(&str) -> bool) -> Cause {
        Cause {
            trace_id: self.trace_id.to_owned(),
            request_id: self.request_id.map(str::to_owned),
            identity: self.identity.to_owned(),
            stream: self.stream.to_owned(),
            epoch: self.epoch,
            seq: self.seq,
            occurred_at: self.occurred_at,
            received_at: self.received_at,
            agent_version: self.agent_version.map(str::to_owned),
            config_version: self.config_version.map(str::to_owned),
            flags: self.flags.iter().take(FLAGS_KEPT_MAX).cloned().collect(),
            values: self.measurements.iter().filter(|m| keep(m.name)).map(brief).collect(),
        }
    }
}

impl EvaluateRules {
    /// Makes the stage without rules; its table brings them. Times are trusted within the usual bounds.
    pub fn new() -> Self {
        Self::with_bounds(TimeBounds::default())
    }

    /// As [`EvaluateRules::new`]; a device time outside `bounds` counts as absent.
    pub fn with_bounds(bounds: TimeBounds) -> Self {
        Self {
            spec: StageSpec {
                group: STAGE,
                kind: Kind::Decide,
                inputs: vec![DEVICE_TELEMETRY_V1, DEVICE_EVENT_V1],
                tables: vec![SERVICE_PLATFORM_RULE_V1],
                changelog: Some(changelog_topic(DEVICE_TELEMETRY_V1, STAGE)),
                commit_interval: COMMIT_INTERVAL,
            },
            rules: RuleSet::default(),
            evaluator: Evaluator::default(),
            is_stale: false,
            problems: BTreeMap::new(),
            bounds,
        }
    }

    /// Iterates over the rules of the table that are not in force because something is wrong with them:
    /// rule id and what it is.
    pub fn problems(&self) -> impl Iterator<Item = (&str, &str)> {
        self.problems.iter().map(|(id, why)| (id.as_str(), why.as_str()))
    }

    fn settle_rules(&mut self) {
        if std::mem::take(&mut self.is_stale) {
            self.rules.index();
        }
    }

    /// Puts a rule of the table in force or takes it out.
    fn take_rule(&mut self, id: &str, input: &Input<'_>) -> Result<(), (&'static str, String)> {
        if input.record.value.is_none() {
            return Ok(());
        }
        let record: RuleRecord = input.decode().map_err(|e| (e.code(), e.to_string()))?;
        if record.rule_id != id {
            return Err(("rule_key_mismatch", format!("the record is about rule `{}`", record.rule_id)));
        }
        if !record.enabled {
            return Ok(());
        }
        let file = format!("rule {id}");
        let definition = RuleDefinition::parse(&file, &record.definition);
        let invalid = |e: throughline_model::strict_toml::FileError| ("rule_invalid", e.to_string());
        let definition = definition.map_err(invalid)?;
        if definition.id != id {
            return Err(("rule_key_mismatch", format!("the definition is about rule `{}`", definition.id)));
        }
        self.rules.put(&file, &record.definition, record.rule_version).map_err(invalid)
    }
}

impl Default for EvaluateRules {
    fn default() -> Self {
        Self::new()
    }
}

impl Decide for EvaluateRules {
    type State = RulesState;

    fn spec(&self) -> &StageSpec {
        &self.spec
    }

    /// Takes a rule. One that does not compile here, because another writer put it into the topic, is not
    /// in force, whatever was before it: the table holds nothing else after a restart either.
    fn table(&mut self, input: &Input<'_>) -> Settled {
        let Some(id) = input.record.key_str() else {
            return Settled::dead_lettered("rule_key_mismatch", "the record's key is not the id of a rule");
        };
        self.is_stale = true;
        self.rules.remove(id);
        self.problems.remove(id);
        match self.take_rule(id, input) {
            Ok(()) => Settled::emitted(),
            Err((code, why)) => {
                let message = format!("rule `{id}` is not in force: {why}");
                self.problems.insert(id.to_owned(), why);
                Settled::dead_lettered(code, message)
            }
        }
    }

    fn process(
        &mut self,
        input: &Input<'_>,
        state: &mut Keyed<Self::State>,
        effects: &mut Effects,
    ) -> Settled {
        self.settle_rules();
        let message: MessageRef<'_> = match input.decode() {
            Ok(message) => message,
            Err(e) => return Settled::dead_lettered(e.code(), e.to_string()),
        };
        let key = match device_key(&input.record, &message, state) {
            Ok(key) => key,
            Err(settled) => return settled,
        };
        let envelope = message.envelope();
        let more = [("agent_version", message.agent_version), ("config_version", message.config_version)];
        if let Err((code, what)) = checks::envelope_texts(&envelope, &more) {
            return Settled::dead_lettered(code, what);
        }
        let RulesState { streams, rules: device } = state.get_mut(key);
        let trusted = envelope.trusted_time(self.bounds);
        let admission = streams.admit_with_time(&envelope, trusted);
        if let Admission::Duplicate { reason } = admission {
            return Settled::new(Outcome::Duplicate, reason);
        }
        if !admission.is_newest() {
            return Settled::new(Outcome::Ignored, "superseded");
        }
        let stale = device.take_stale(&self.rules);
        let time = input.record.time;
        let steps = self.evaluator.evaluate(&self.rules, &message.facts(time), device);
        let is_quiet = stale.is_empty() && steps.is_empty();
        if !is_quiet {
            let parent = message.envelope().message_uuid();
            let mut output = Output { key, parent: Parent::Message(parent), time, effects };
            for (active, reason) in stale {
                output.clear(active, &message.cause(|_| false), Some(reason));
            }
            for step in steps {
                carry_out(*step, self.rules.at(step.rule), &message, device, &mut output);
            }
        }
        // Out of its turn a message without sequence identity must not put back an older value.
        let in_turn = !(self.evaluator.passed_over() || input.replayed || envelope.is_replay());
        let at = trusted.unwrap_or(message.received_at);
        device.remember(&self.rules, &message.measurements, at, in_turn);
        match (is_quiet, self.evaluator.passed_over()) {
            (false, _) => Settled::emitted(),
            (true, true) => Settled::new(Outcome::Filtered, "late"),
            (true, false) => Settled::filtered(),
        }
    }

    fn due_at(&self, state: &Self::State) -> Option<Timestamp> {
        state.rules.due_at()
    }

    /// Raises what has held for long enough. A rule that changed or went meanwhile raises nothing, and
    /// what was raised under its earlier version clears.
    fn fire(&mut self, key: &str, now: Timestamp, state: &mut Keyed<Self::State>, effects: &mut Effects) {
        self.settle_rules();
        let device = &mut state.get_mut(key).rules;
        let due = device.take_due(now);
        if due.is_empty() {
            return;
        }
        let stale = device.take_stale(&self.rules);
        let causes = due.into_iter().filter_map(|active| match active.phase {
            Phase::Pending { cause, .. } => Some((active.rule, active.version, active.since, *cause)),
            Phase::Raised { .. } => None,
        });
        let mut stale = Some(stale);
        for (id, version, since, cause) in causes {
            let mut output = Output { key, parent: Parent::Timer(now), time: now, effects };
            for (active, reason) in stale.take().into_iter().flatten() {
                output.clear(active, &Cause { values: Vec::new(), ..cause.clone() }, Some(reason));
            }
            if let Some(rule) = self.rules.get(&id).filter(|rule| rule.version == version) {
                output.parent = Parent::Timer(since);
                device.activate(output.raise(rule, since, cause));
            }
        }
    }
}

/// Copies a measurement for an alert. Long texts are cut: what is pending is state, and a state must fit into a
/// record of Kafka, whatever a device writes into its messages.
fn brief(measurement: &MeasurementRef<'_>) -> Measurement {
    let text = measurement.text.map(|text| &text[..text.floor_char_boundary(TEXT_KEPT_BYTES_MAX)]);
    MeasurementRef { text, ..*measurement }.to_owned()
}

/// Returns the record's key where it names the device that the message is about. The names of a device
/// that has a state were checked when it came about.
fn device_key<'r>(
    record: &Record<'r>,
    message: &MessageRef<'_>,
    state: &Keyed<RulesState>,
) -> Result<&'r str, Settled> {
    let key = record.key_str().unwrap_or_default();
    if key.split_once('/') != Some((message.site_id, message.device_id)) {
        let message = format!(
            "the record's key is `{key}`, but the message is about `{}/{}`",
            message.site_id, message.device_id
        );
        return Err(Settled::dead_lettered("key_mismatch", message));
    }
    if state.get(key).is_none()
        && let Err(e) = DeviceKey::new(message.site_id, message.device_id)
    {
        return Err(Settled::dead_lettered("device_invalid", e.to_string()));
    }
    Ok(key)
}

fn carry_out(
    step: Step,
    rule: &Rule,
    message: &MessageRef<'_>,
    device: &mut DeviceRules,
    output: &mut Output<'_>,
) {
    let cause = || message.cause(|name| rule.reads(name));
    match step.kind {
        StepKind::Begin if rule.hold.is_zero() => {
            let active = output.raise(rule, output.time, cause());
            device.activate(active);
        }
        StepKind::Begin => device.activate(Active::pending(rule, output.time, cause())),
        StepKind::Abandon => drop(device.deactivate(&rule.id)),
        StepKind::Clear => {
            if let Some(active) = device.deactivate(&rule.id) {
                output.clear(active, &cause(), None);
            }
        }
        StepKind::Forward => output.forward(rule, message),
    }
}

/// What ids of outputs are derived from.
enum Parent {
    /// The message that brought them about.
    Message(Uuid),
    /// The start of the window that a timer closed.
    Timer(Timestamp),
}

/// Where the outputs of one record or timer go.
struct Output<'e> {
    key: &'e str,
    parent: Parent,
    /// The record's time, or the time that the timer was due.
    time: Timestamp,
    effects: &'e mut Effects,
}

impl Output<'_> {
    fn id(&self, output_key: &str) -> String {
        match &self.parent {
            Parent::Message(parent) => derived_message_id(*parent, STAGE, output_key),
            Parent::Timer(start) => timed_message_id(*start, STAGE, output_key, self.key),
        }
        .to_string()
    }

    /// Emits a record with the rule and its version as header.
    fn emit<T: Serialize + Enveloped>(&mut self, topic: &str, output_key: &str, value: &T) {
        self.effects.emit_with(topic, self.key, value, (header::RULE, output_key.as_bytes()));
    }

    /// Writes the alert and the commands of a rule whose condition has held since `since`, and returns it
    /// as raised.
    fn raise(&mut self, rule: &Rule, since: Timestamp, cause: Cause) -> Active {
        let output_key = rule.output_key();
        let alert_id = self.id(&output_key);
        for command in &rule.commands {
            let command = Command {
                message_id: self.id(&format!("{output_key}/command/{}", command.name)),
                request_id: Some(format!("rule:{}", rule.id)),
                request_code: Some(command.request_code.clone()),
                command: command.name.clone(),
                arguments: command.arguments.clone(),
                expires_at: self.time.plus(command.expires_in),
                ..Command::from_cause(&cause, self.key)
            };
            self.emit(DEVICE_COMMAND_V1, &output_key, &command);
        }
        if rule.alert {
            let alert = Alert {
                message_id: alert_id.clone(),
                alert_id: alert_id.clone(),
                rule_id: rule.id.to_string(),
                rule_version: rule.version,
                severity: rule.severity.to_owned(),
                state: "raised".to_owned(),
                raised_at: since,
                summary: rule.summary.to_string(),
                values: cause.values.clone(),
                ..Alert::from_cause(&cause, self.key)
            };
            self.emit(SERVICE_PLATFORM_ALERT_V1, &output_key, &alert);
        }
        Active::raised(rule, since, alert_id)
    }

    /// Writes the clear of an alert. What was only pending, or never published, ends silently.
    fn clear(&mut self, active: Active, cause: &Cause, reason: Option<&str>) {
        let Phase::Raised { alert_id, severity, summary, published: true } = active.phase else { return };
        let output_key = format!("{}@{}", active.rule, active.version);
        let alert = Alert {
            message_id: self.id(&format!("{output_key}/clear")),
            reason: reason.map(str::to_owned),
            alert_id,
            rule_id: active.rule,
            rule_version: active.version,
            severity,
            state: "cleared".to_owned(),
            raised_at: active.since,
            cleared_at: Some(self.time),
            summary,
            values: cause.values.clone(),
            ..Alert::from_cause(cause, self.key)
        };
        self.emit(SERVICE_PLATFORM_ALERT_V1, &output_key, &alert);
    }

    /// Copies a message for which a rule holds.
    fn forward(&mut self, rule: &Rule, message: &MessageRef<'_>) {
        let Some(topic) = rule.forward else { return };
        let output_key = rule.output_key();
        let copy = DeviceMessage {
            message_id: self.id(&format!("{output_key}/forward")),
            clock_offset: message.clock_offset,
            measurements: message.measurements.iter().map(MeasurementRef::to_owned).collect(),
            ..DeviceMessage::from_cause(&message.cause(|_| false), self.key)
        };
        self.emit(topic, &output_key, &copy);
    }
}

/// A record that begins with the envelope of a cause.
trait FromCause: Default {
    /// Takes over everything but the id, which the caller derives.
    fn from_cause(cause: &Cause, key: &str) -> Self;
}

macro_rules! from_cause {
    ($($record:ident),*) => {$(
        impl FromCause for $record {
            fn from_cause(cause: &Cause, key: &str) -> Self {
                let (site, device) = key.split_once('/').unwrap_or((key, ""));
                Self {
                    trace_id: cause.trace_id.clone(),
                    request_id: cause.request_id.clone(),
                    identity: cause.identity.clone(),
                    site_id: site.to_owned(),
                    device_id: device.to_owned(),
                    agent_version: cause.agent_version.clone(),
                    config_version: cause.config_version.clone(),
                    received_by: STAGE.to_owned(),
                    stream: cause.stream.clone(),
                    epoch: cause.epoch,
                    seq: cause.seq,
                    occurred_at: cause.occurred_at,
                    received_at: cause.received_at,
                    flags: cause.flags.clone(),
                    ..Self::default()
                }
            }
        }
    )*};
}

from_cause!(Alert, Command, DeviceMessage);

#[cfg(test)]
mod tests;
