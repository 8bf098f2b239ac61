//! The form of `tests/scenarios/*.yaml`: what is given, what happens, what must come of it. The same file is
//! run against the in-memory driver and against real Kafka; this module only reads it.
//!
//! Scenarios share one Kafka, so the site of every device is the name of its file without `.yaml`: what
//! another scenario left there is about other devices.

use serde::Deserialize;
use std::collections::BTreeMap;

/// A scenario.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// What it shows, a sentence.
    pub name: String,
    /// The stage that is run.
    pub stage: String,
    /// Rules in force before anything happens, in the form of `throughline rules apply`.
    #[serde(default)]
    pub rules: Vec<serde_json::Value>,
    /// What happens, in order.
    pub steps: Vec<Step>,
    /// What must have come of it.
    pub expect: Expectation,
}

/// One thing that happens.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub enum Step {
    /// A device message arrives.
    Message(Message),
    /// Bytes arrive that are not a message.
    Garbage(Garbage),
    /// Somebody asks for a change of a twin's desired fields.
    Request(Request),
    /// What arrived is settled, then so many seconds pass and nothing arrives. 0 puts in order what arrives
    /// on several topics.
    Wait(f64),
    /// The process is killed at its next commit, its outputs already handed to Kafka, and a new one takes
    /// over; at once where nothing is left to commit.
    Kill,
    /// A rule is changed: what arrived before is settled, and the change is in force before the next step.
    Rule(serde_json::Value),
}

/// A device message.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Message {
    /// The input topic.
    pub topic: String,
    /// `site/device`.
    pub device: String,
    /// Boot epoch.
    #[serde(default = "one")]
    pub epoch: i64,
    /// Sequence number; without it the message has no sequence identity.
    #[serde(default)]
    pub seq: Option<i64>,
    /// How many seconds before its arrival it occurred; below zero for a clock that is fast.
    #[serde(default)]
    pub late_seconds: f64,
    /// Names and values: numbers, texts, booleans.
    #[serde(default)]
    pub values: BTreeMap<String, serde_json::Value>,
    /// How often it arrives.
    #[serde(default = "once")]
    pub times: u32,
}

/// A request to change a twin (`service_platform.twin_request.v1`).
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// `site/device`.
    pub device: String,
    /// The desired fields; null removes one.
    pub desired: BTreeMap<String, serde_json::Value>,
    /// The desired version that the asker saw.
    #[serde(default)]
    pub expected_version: Option<i64>,
}

/// Bytes that are not a message.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Garbage {
    /// The input topic.
    pub topic: String,
    /// The record's key.
    pub key: String,
    /// The value as text.
    pub text: String,
}

/// What must have come of a scenario.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Expectation {
    /// Outcomes of the stage over all its partitions; outcomes that are not named are zero.
    #[serde(default)]
    pub outcomes: BTreeMap<String, u64>,
    /// By topic, what its records contain, in order per key: every field named must be equal. Where they
    /// are about several devices, each names its `device_id`. Of a compacted topic the newest record of each
    /// key counts alone: how many came before depends on when commits fell.
    #[serde(default)]
    pub records: BTreeMap<String, Vec<BTreeMap<String, serde_json::Value>>>,
    /// How many dead letters of the stage's inputs there are, by reason.
    #[serde(default)]
    pub dead_letters: BTreeMap<String, u64>,
}

fn one() -> i64 {
    1
}

fn once() -> u32 {
    1
}

/// A scenario file that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("{file}: {why}")]
pub struct Unreadable {
    file: String,
    why: serde_yaml_ng::Error,
}

/// Reads a scenario; `file` is named in the error.
///
/// # Errors
/// [`Unreadable`] with line and column; an unknown key is an error.
pub fn parse(file: &str, text: &str) -> Result<Scenario, Unreadable> {
    serde_yaml_ng::from_str(text).map_err(|why| Unreadable { file: file.to_owned(), why })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"
name: a hot pump raises one alert
stage: evaluate_rules
rules:
  - id: hot
    when: temperature > 90
steps:
  - !message { topic: device.telemetry.v1, device: site-1/pump-7, seq: 1, values: { temperature: 91 }, times: 2 }
  - !wait 5
  - !kill
  - !garbage { topic: device.telemetry.v1, key: site-1/pump-7, text: "{" }
expect:
  outcomes: { emitted: 1, duplicate: 1, dead_lettered: 1 }
  records:
    service_platform.alert.v1:
      - { rule_id: hot, state: raised }
  dead_letters: { not_framed: 1 }
"#;

    #[test]
    fn a_scenario_reads_and_a_misspelt_key_names_file_and_line() {
        let scenario = parse("hot.yaml", TEXT).unwrap();
        assert_eq!((scenario.stage.as_str(), scenario.steps.len()), ("evaluate_rules", 4));
        let Step::Message(message) = &scenario.steps[0] else { panic!("{:?}", scenario.steps[0]) };
        assert_eq!((message.seq, message.times, message.epoch), (Some(1), 2, 1));
        assert_eq!(scenario.steps[2], Step::Kill);
        let error = parse("hot.yaml", &TEXT.replace("stage:", "stag:")).unwrap_err().to_string();
        assert!(error.starts_with("hot.yaml: ") && error.contains("stag"), "{error}");
    }
}
