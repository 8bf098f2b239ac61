//! Policies that replay dead letters without a person: which cause, after how much quiet, how often.

use super::spec::TopicSpec;
use super::{BRIDGE_GROUP, Catalog, dlt_topic};
use crate::dead_letter::{Letter, code_fault, policy_name};
use crate::rules::Span;
use crate::stage::StageSpec;
use crate::strict_toml::{FileError, suggestion};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// An entry `[[replay]]` of a topic file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReplaySpec {
    /// Whose letters; absent: those of every stage that reads the topic, and of the bridge where it has feeds.
    #[serde(default)]
    pub stage: Option<String>,
    /// The code of the letters.
    pub code: String,
    /// How long no further letter of that cause must have come.
    pub after: Span,
    /// A letter that was replayed this often, by whomever, is left to people.
    #[serde(default = "once")]
    pub times: u32,
    /// At most this many replays a second.
    #[serde(default = "rate")]
    pub rate: u32,
    /// Line and column of what the policy is about, for faults that only the stages tell.
    #[serde(skip)]
    pub place: (usize, usize),
}

fn once() -> u32 {
    1
}

/// As `throughline dlq replay` has it.
fn rate() -> u32 {
    1_000
}

/// The least quiet: a stage believes for 10 s that a schema is absent, so letters come that far apart.
const QUIET_LEAST: Duration = Duration::from_secs(15);
/// The longest quiet: dead letters are kept for 90 days.
const QUIET_MOST: Duration = Duration::from_secs(30 * 86_400);
/// One less than the replays after which a letter is parked: a policy alone parks nothing.
pub const TIMES_MAX: u32 = 9;

/// A policy about the letters of one stage.
#[derive(Clone, Debug, PartialEq)]
pub struct ReplayPolicy {
    /// The topic of the letters.
    pub letters: String,
    /// Their code.
    pub code: String,
    /// How long no further letter of that cause must have come.
    pub after: Duration,
    /// A letter that was replayed this often is left to people.
    pub times: u32,
    /// At most this many replays a second.
    pub rate: u32,
}

impl ReplayPolicy {
    /// Returns the name under which it asks.
    pub fn name(&self) -> String {
        policy_name(&self.letters, &self.code)
    }

    /// Says whether a letter of its topic is one of those that it replays.
    pub fn takes(&self, letter: &Letter<'_>) -> bool {
        letter.code == self.code && letter.replays < self.times
    }
}

/// Returns every fault of a file's policies by themselves: (number of the policy, key, what).
pub(super) fn check(spec: &TopicSpec) -> Vec<(usize, &'static str, String)> {
    let mut faults = Vec::new();
    for (index, replay) in spec.replays.iter().enumerate() {
        let mut fault = |key, what: String| faults.push((index, key, what));
        if let Some(what) = code_fault(&replay.code) {
            fault("code", what);
        }
        if !(QUIET_LEAST..=QUIET_MOST).contains(&replay.after.0) {
            fault("after", "`after` is 15 seconds to 30 days, for instance \"10m\"".to_owned());
        }
        if !(1..=TIMES_MAX).contains(&replay.times) {
            fault("times", format!("`times` is 1 to {TIMES_MAX}: then a person should look"));
        }
        if replay.rate == 0 {
            fault("rate", "`rate` is at least 1 replay a second".to_owned());
        }
        let is_same = |other: &ReplaySpec| {
            let same_stage = other.stage == replay.stage || other.stage.is_none() || replay.stage.is_none();
            other.code == replay.code && same_stage
        };
        if spec.replays[..index].iter().any(is_same) {
            fault("code", format!("an earlier policy of this file is about `{}` already", replay.code));
        }
    }
    faults
}

impl Catalog {
    /// Returns the policies about the letters of `stages` and of the bridge, by topic and code.
    ///
    /// # Errors
    /// A policy about a stage that does not read its topic, with file and line.
    pub fn replay_policies(&self, stages: &[StageSpec]) -> Result<Vec<ReplayPolicy>, Vec<FileError>> {
        let mut policies = Vec::new();
        let mut faults = Vec::new();
        for topic in self.topics().filter(|topic| !topic.spec.replays.is_empty()) {
            let name = topic.spec.name.as_str();
            let readers = stages.iter().filter(|stage| stage.inputs.contains(&name)).map(|stage| stage.group);
            let bridge = (!topic.spec.feeds.is_empty()).then_some(BRIDGE_GROUP);
            let groups: Vec<&str> = readers.chain(bridge).collect();
            for replay in &topic.spec.replays {
                let is_meant = |group: &&&str| replay.stage.as_deref().is_none_or(|stage| stage == **group);
                let meant: Vec<&&str> = groups.iter().filter(is_meant).collect();
                if meant.is_empty() {
                    faults.push(unread(name, replay, &groups));
                }
                policies.extend(meant.into_iter().map(|group| ReplayPolicy {
                    letters: dlt_topic(name, group),
                    code: replay.code.clone(),
                    after: replay.after.0,
                    times: replay.times,
                    rate: replay.rate,
                }));
            }
        }
        if faults.is_empty() { Ok(policies) } else { Err(faults) }
    }
}

fn unread(topic: &str, replay: &ReplaySpec, groups: &[&str]) -> FileError {
    let (line, column) = replay.place;
    let what = match &replay.stage {
        Some(stage) => {
            let hint = suggestion(stage, groups.iter().copied());
            format!("`{stage}` does not read `{topic}`{hint} (known: {})", groups.join(", "))
        }
        None => format!("no stage reads `{topic}`, so it has no dead letters"),
    };
    FileError { file: format!("{topic}.toml"), line, column, what }
}
