//! Names of topics: the grammar of catalog topics and the names that are derived from them. Nothing else
//! spells a suffix.

use crate::strict_toml::suggestion;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// The namespaces; there are no others.
pub const NAMESPACES: [&str; 4] = ["device", "service_platform", "data_core", "3rd_party"];

/// The longest catalog name in bytes: Kafka allows 249, and the longest derived suffix must still fit.
pub const TOPIC_NAME_BYTES_MAX: usize = 160;

/// The group under which the bridge's own dead letters and replays run.
pub const BRIDGE_GROUP: &str = "bridge";

/// Stands in for the topic of messages that no feed takes; it exists only as dead letters.
pub const UNMATCHED: &str = "device.unmatched.v1";

const DLT: &str = "-dlt";
const REPLAY: &str = "-replay";
const PARKING: &str = "-parking";
const RETRY: &str = "-retry";
const CHANGELOG: &str = "-changelog";

/// A catalog topic's name: `<namespace>.<subject>[.<qualifier>…].v<major>`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TopicName {
    text: String,
    major: u32,
}

impl TopicName {
    /// Returns the name.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Returns the namespace, one of [`NAMESPACES`].
    pub fn namespace(&self) -> &str {
        self.text.split('.').next().unwrap_or_default()
    }

    /// Returns the major version, from 1.
    pub fn major(&self) -> u32 {
        self.major
    }

    /// Returns the name of the next major version, which is how a keyed topic grows.
    pub fn next_major(&self) -> String {
        let stem = self.text.rsplit_once(".v").map_or(self.text.as_str(), |(stem, _)| stem);
        format!("{stem}.v{}", u64::from(self.major) + 1)
    }

    /// Returns the Avro namespace of its schema.
    pub fn avro_namespace(&self) -> String {
        match self.namespace() {
            "3rd_party" => "throughline.third_party".to_owned(),
            namespace => format!("throughline.{namespace}"),
        }
    }
}

impl fmt::Display for TopicName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl From<TopicName> for String {
    fn from(name: TopicName) -> Self {
        name.text
    }
}

impl TryFrom<String> for TopicName {
    type Error = InvalidTopicName;

    fn try_from(text: String) -> Result<Self, InvalidTopicName> {
        text.parse()
    }
}

/// A text that is not a topic name, with the name that was probably meant.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{name}` is not a topic name: {why}{hint}")]
pub struct InvalidTopicName {
    name: String,
    why: String,
    hint: String,
}

impl FromStr for TopicName {
    type Err = InvalidTopicName;

    fn from_str(text: &str) -> Result<Self, InvalidTopicName> {
        read(text).map_err(|why| {
            let repaired = repair(text).filter(|r| read(r).is_ok());
            let hint = match repaired {
                Some(name) => format!("; did you mean `{name}`?"),
                None if why.contains("did you mean") => String::new(),
                None => "; names have the form `<namespace>.<subject>[.<qualifier>…].v<major>`".to_owned(),
            };
            InvalidTopicName { name: text.chars().take(200).collect(), why, hint }
        })
    }
}

fn read(text: &str) -> Result<TopicName, String> {
    if text.len() > TOPIC_NAME_BYTES_MAX {
        return Err(format!("it is longer than {TOPIC_NAME_BYTES_MAX} bytes"));
    }
    let segments: Vec<&str> = text.split('.').collect();
    for segment in &segments {
        check_segment(segment)?;
    }
    let [namespace, subject @ .., version] = segments.as_slice() else {
        return Err("it has a single segment".to_owned());
    };
    if !NAMESPACES.contains(namespace) {
        return Err(format!(
            "`{namespace}` is not a namespace (known: {})",
            NAMESPACES.map(|n| format!("`{n}`")).join(", ")
        ));
    }
    let digits = version.strip_prefix('v').unwrap_or_default();
    let is_version =
        !digits.is_empty() && !digits.starts_with('0') && digits.bytes().all(|b| b.is_ascii_digit());
    let major = is_version.then(|| digits.parse().ok()).flatten();
    let Some(major) = major else {
        return Err(format!("it ends in `{version}`, not in a major version such as `v1`"));
    };
    if subject.is_empty() {
        return Err(format!("between `{namespace}` and `{version}` the subject is missing"));
    }
    Ok(TopicName { text: text.to_owned(), major })
}

/// Segments begin and end with a letter or digit, so that they stay valid labels where `_` becomes `-`.
fn check_segment(segment: &str) -> Result<(), String> {
    if segment.is_empty() {
        return Err("it has an empty segment".to_owned());
    }
    if let Some(c) = segment.chars().find(|c| !matches!(c, 'a'..='z' | '0'..='9' | '_')) {
        return Err(format!("`{c}` in `{segment}`: segments have a-z, 0-9 and `_`"));
    }
    if segment.starts_with('_') || segment.ends_with('_') {
        return Err(format!("`{segment}` begins or ends with `_`"));
    }
    Ok(())
}

/// Guesses the name that was meant: case, word separators, the nearest namespace, a missing version.
fn repair(text: &str) -> Option<String> {
    let lower = text.trim().to_lowercase().replace(['-', ' ', '/', ':'], "_");
    let mut segments: Vec<String> =
        lower.split('.').map(|s| s.trim_matches('_').to_owned()).filter(|s| !s.is_empty()).collect();
    let first = segments.first_mut()?;
    if !NAMESPACES.contains(&first.as_str()) {
        *first = match first.as_str() {
            "third_party" | "thirdparty" | "3rdparty" => "3rd_party".to_owned(),
            other => crate::strict_toml::nearest(other, NAMESPACES)?.to_owned(),
        };
    }
    let last = segments.last()?;
    let digits = last.trim_start_matches(['v', '_']).trim_start_matches('0').to_owned();
    let is_version = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()) && last.len() <= 8;
    if is_version && segments.len() > 2 {
        segments.pop();
        segments.push(format!("v{digits}"));
    } else {
        segments.push("v1".to_owned());
    }
    Some(segments.join("."))
}

/// Returns `<topic>.<group>-dlt`, where records of `topic` go that the group cannot process.
pub fn dlt_topic(topic: &str, group: &str) -> String {
    format!("{topic}.{group}{DLT}")
}

/// Returns `<topic>.<group>-replay`, which only the group reads, along with `topic`.
pub fn replay_topic(topic: &str, group: &str) -> String {
    format!("{topic}.{group}{REPLAY}")
}

/// Returns `<topic>.<group>-parking`, where dead letters end whose replays are exhausted.
pub fn parking_topic(topic: &str, group: &str) -> String {
    format!("{topic}.{group}{PARKING}")
}

/// Returns `<topic>.<group>-retry`, which only *act* stages have.
pub fn retry_topic(topic: &str, group: &str) -> String {
    format!("{topic}.{group}{RETRY}")
}

/// Returns `<first input>.<group>-changelog`, the compacted topic that holds a decide stage's state.
pub fn changelog_topic(first_input: &str, group: &str) -> String {
    format!("{first_input}.{group}{CHANGELOG}")
}

/// Takes a replay topic's name apart into (topic, group).
pub fn parse_replay(name: &str) -> Option<(&str, &str)> {
    split(name, REPLAY)
}

/// Takes a dead-letter topic's name apart into (topic, group).
pub fn parse_dlt(name: &str) -> Option<(&str, &str)> {
    split(name, DLT)
}

/// Takes a parking topic's name apart into (topic, group).
pub fn parse_parking(name: &str) -> Option<(&str, &str)> {
    split(name, PARKING)
}

/// Says whether `name` has the form of a catalog topic or of one derived from it.
pub fn is_ours(name: &str) -> bool {
    let derived = [DLT, REPLAY, PARKING, RETRY, CHANGELOG].iter().any(|suffix| split(name, suffix).is_some());
    derived || read(name).is_ok()
}

fn split<'a>(name: &'a str, suffix: &str) -> Option<(&'a str, &'a str)> {
    let (topic, group) = name.strip_suffix(suffix)?.rsplit_once('.')?;
    (check_segment(group).is_ok() && read(topic).is_ok()).then_some((topic, group))
}

/// Returns the name of the Kubernetes object that stands for a topic: `_` and `.` become `-`.
pub fn kubernetes_name(topic: &str) -> String {
    topic.replace(['_', '.'], "-")
}

/// Returns the name as Kafka's metrics spell it; two topics that are equal here are refused.
pub fn metrics_name(topic: &str) -> String {
    topic.replace('.', "_")
}

/// Returns the registry's subject of a topic's values (TopicNameStrategy).
pub fn value_subject(topic: &str) -> String {
    format!("{topic}-value")
}

/// Returns an error text for a topic that is not in the catalog, with the one that was probably meant.
pub fn unknown_topic<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    let known: Vec<&str> = known.into_iter().collect();
    let hint = suggestion(name, known.iter().copied());
    format!("unknown topic `{name}`{hint} (known: {})", known.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_grammar_and_say_what_was_meant() {
        for (text, expected) in [
            (
                "Device.Telemetry.v1",
                "`D` in `Device`: segments have a-z, 0-9 and `_`; did you mean `device.telemetry.v1`?",
            ),
            ("device.pump-state.v1", "did you mean `device.pump_state.v1`?"),
            (
                "devices.telemetry.v1",
                "`devices` is not a namespace (known: `device`, `service_platform`, `data_core`, `3rd_party`); did you mean `device.telemetry.v1`?",
            ),
            ("third_party.weather.v1", "did you mean `3rd_party.weather.v1`?"),
            (
                "device.telemetry",
                "it ends in `telemetry`, not in a major version such as `v1`; did you mean `device.telemetry.v1`?",
            ),
            ("device.telemetry.1", "did you mean `device.telemetry.v1`?"),
            ("device.telemetry.v01", "did you mean `device.telemetry.v1`?"),
            ("device.v1", "the subject is missing"),
            ("device..v1", "it has an empty segment"),
            ("device._x.v1", "begins or ends with `_`; did you mean `device.x.v1`?"),
            ("warehouse.reading.v1", "`warehouse` is not a namespace"),
            ("", "it has an empty segment"),
            ("device.x.v99999999999", "not in a major version"),
        ] {
            let error = text.parse::<TopicName>().expect_err(text).to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
        let name: TopicName = "3rd_party.weather.dwd.v12".parse().expect("valid");
        assert_eq!(
            (name.namespace(), name.major(), name.next_major().as_str(), name.avro_namespace().as_str()),
            ("3rd_party", 12, "3rd_party.weather.dwd.v13", "throughline.third_party")
        );
    }

    #[test]
    fn derived_names_can_be_taken_apart() {
        let topic = "device.telemetry.v1";
        assert_eq!(parse_replay(&replay_topic(topic, "update_twin")), Some((topic, "update_twin")));
        assert_eq!(parse_dlt(&dlt_topic(topic, "bridge")), Some((topic, "bridge")));
        assert_eq!(parse_parking(&parking_topic(topic, "bridge")), Some((topic, "bridge")));
        for name in [topic, "device.telemetry.v1.bridge-dlt", "orders-replay", "a.b-replay", "x.y.v1.-replay"]
        {
            assert_eq!(parse_replay(name), None, "{name}");
        }
        assert!(is_ours(&changelog_topic(topic, "bridge_data")) && is_ours(&retry_topic(topic, "notify")));
        assert!(!is_ours("_schemas") && !is_ours("orders"));
    }
}
