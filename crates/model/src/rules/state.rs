//! What is remembered of one device: rules that are pending or raised, and values before the last message.

use super::definition::Rule;
use super::evaluate::MeasurementRef;
use super::set::RuleSet;
use crate::envelope::Measurement;
use crate::time::Timestamp;
use serde::{Deserialize, Serialize};

/// Longer texts are not remembered for `previous`, so that the state fits into a record of Kafka.
pub const PAST_TEXT_BYTES_MAX: usize = 1_024;

/// The state of all rules for one device.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DeviceRules {
    /// Rules that are pending or raised, in the order of their ids.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub active: Vec<Active>,
    /// The last accepted value of every name that a rule asks for with `previous`, in the order of names.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub previous: Vec<Past>,
}

/// A value that was accepted before.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Past {
    /// The measurement's name.
    #[serde(rename = "n")]
    pub name: String,
    /// Its value.
    #[serde(rename = "v")]
    pub value: PastValue,
    /// When it came about: the device's time where it can be trusted, else the time of arrival.
    #[serde(rename = "t")]
    pub at: Timestamp,
}

/// A value of one of the three types.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum PastValue {
    /// A boolean.
    Flag(bool),
    /// A number.
    Number(f64),
    /// A text.
    Text(String),
}

/// A rule that is pending or raised for a device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Active {
    /// The rule's id.
    pub rule: String,
    /// The version under which the condition came to hold.
    pub version: i64,
    /// When it came to hold: the record's time.
    pub since: Timestamp,
    /// Pending or raised.
    #[serde(flatten)]
    pub phase: Phase,
}

/// How far an active rule has come.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "phase", rename_all = "snake_case")]
pub enum Phase {
    /// The condition holds, but not yet for long enough.
    Pending {
        /// When it will have held for long enough.
        due: Timestamp,
        /// The message at which it came to hold.
        cause: Box<Cause>,
    },
    /// The alert is raised.
    Raised {
        /// The alert's id.
        alert_id: String,
        /// The severity it was raised with.
        severity: String,
        /// The sentence it was raised with.
        summary: String,
        /// Whether an alert record was written: a rule may act without one.
        published: bool,
    },
}

/// The message behind a raise or clear, as much of it as an alert repeats.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Cause {
    /// Its trace.
    pub trace_id: String,
    /// The request that it belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
    /// `sequence` or `none`.
    pub identity: String,
    /// Its stream.
    pub stream: String,
    /// Its boot epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epoch: Option<i64>,
    /// Its seq.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seq: Option<i64>,
    /// Its own time.
    pub occurred_at: Timestamp,
    /// When it was admitted.
    pub received_at: Timestamp,
    /// The sending agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_version: Option<String>,
    /// The sender's configuration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config_version: Option<String>,
    /// Flags of the message.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub flags: Vec<String>,
    /// The values that the condition saw.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub values: Vec<Measurement>,
}

impl DeviceRules {
    /// Returns what is active under a rule's id.
    pub fn active_of(&self, rule: &str) -> Option<&Active> {
        self.active.binary_search_by(|a| a.rule.as_str().cmp(rule)).ok().map(|at| &self.active[at])
    }

    /// Puts an active rule in its place, instead of one of the same id.
    pub fn activate(&mut self, active: Active) {
        match self.active.binary_search_by(|a| a.rule.as_str().cmp(&active.rule)) {
            Ok(at) => self.active[at] = active,
            Err(at) => self.active.insert(at, active),
        }
    }

    /// Takes out what is active under a rule's id.
    pub fn deactivate(&mut self, rule: &str) -> Option<Active> {
        let at = self.active.binary_search_by(|a| a.rule.as_str().cmp(rule)).ok()?;
        Some(self.active.remove(at))
    }

    /// Takes out what was active under a rule that has since changed or gone, each with the reason:
    /// `rule_changed` or `rule_disabled`.
    pub fn take_stale(&mut self, rules: &RuleSet) -> Vec<(Active, &'static str)> {
        let stale = |a: &Active| match rules.get(&a.rule) {
            None => Some("rule_disabled"),
            Some(rule) if rule.version != a.version => Some("rule_changed"),
            Some(_) => None,
        };
        if !self.active.iter().any(|a| stale(a).is_some()) {
            return Vec::new();
        }
        let (gone, kept) = std::mem::take(&mut self.active).into_iter().partition(|a| stale(a).is_some());
        self.active = kept;
        let gone: Vec<Active> = gone;
        gone.into_iter()
            .map(|a| (stale(&a).expect("the partition says so"), a))
            .map(|(w, a)| (a, w))
            .collect()
    }

    /// Returns when the next pending rule will have held for long enough.
    pub fn due_at(&self) -> Option<Timestamp> {
        let due = |a: &Active| match &a.phase {
            Phase::Pending { due, .. } => Some(*due),
            Phase::Raised { .. } => None,
        };
        self.active.iter().filter_map(due).min()
    }

    /// Takes out the pending rules that have held for long enough at `now`.
    pub fn take_due(&mut self, now: Timestamp) -> Vec<Active> {
        let is_due = |a: &Active| matches!(&a.phase, Phase::Pending { due, .. } if *due <= now);
        let (due, kept) = std::mem::take(&mut self.active).into_iter().partition(is_due);
        self.active = kept;
        due
    }

    /// Remembers the values that rules may later ask for with `previous`, as of `at`. A message that comes
    /// out of its turn (late, or the replay of a dead letter) replaces only what is older than itself.
    pub fn remember(
        &mut self,
        rules: &RuleSet,
        measurements: &[MeasurementRef<'_>],
        at: Timestamp,
        in_turn: bool,
    ) {
        if !rules.remembers() {
            return;
        }
        for m in measurements {
            if !rules.remembers_name(m.name) {
                continue;
            }
            let value = match (m.number, m.text, m.flag) {
                (Some(number), ..) => PastValue::Number(number),
                // A cut text would compare wrongly; nothing that a rule compares with is as long.
                (_, Some(text), _) if text.len() > PAST_TEXT_BYTES_MAX => continue,
                (_, Some(text), _) => PastValue::Text(text.to_owned()),
                (.., Some(flag)) => PastValue::Flag(flag),
                _ => continue,
            };
            match self.previous.binary_search_by(|p| p.name.as_str().cmp(m.name)) {
                Ok(place) if in_turn || at > self.previous[place].at => {
                    (self.previous[place].value, self.previous[place].at) = (value, at);
                }
                Ok(_) => {}
                Err(place) => self.previous.insert(place, Past { name: m.name.to_owned(), value, at }),
            }
        }
    }
}

impl Active {
    /// Makes a rule pending from `since`.
    pub fn pending(rule: &Rule, since: Timestamp, cause: Cause) -> Self {
        let phase = Phase::Pending { due: since.plus(rule.hold), cause: Box::new(cause) };
        Self { rule: rule.id.to_string(), version: rule.version, since, phase }
    }

    /// Makes a rule raised.
    pub fn raised(rule: &Rule, since: Timestamp, alert_id: String) -> Self {
        let phase = Phase::Raised {
            alert_id,
            severity: rule.severity.to_owned(),
            summary: rule.summary.to_string(),
            published: rule.alert,
        };
        Self { rule: rule.id.to_string(), version: rule.version, since, phase }
    }
}
