//! The form of a topic file.

use super::feed::FeedSpec;
use super::name::TopicName;
use super::replay::ReplaySpec;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// A topic file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TopicSpec {
    /// The topic's name; the file is called `<name>.toml`.
    pub name: TopicName,
    /// One sentence that says what the topic is for.
    pub summary: String,
    /// The team that answers for it.
    pub owner: String,
    /// What the key is: `site/device`, `id`, `rule`, or `none`.
    pub key: Key,
    /// The schema's file beside this one.
    pub schema: String,
    /// Number of partitions, 1 to [`PARTITIONS_MAX`]; fixed within a major version.
    pub partitions: i32,
    /// What happens to old records.
    pub cleanup: Cleanup,
    /// How long records are kept; required with `cleanup = "delete"`, not allowed with `"compact"`.
    #[serde(default)]
    pub retention: Option<Retention>,
    /// Copies of each partition where the topic needs another number than the environment's.
    #[serde(default)]
    pub replication: Option<i16>,
    /// Further topic settings of Kafka.
    #[serde(default)]
    pub config: BTreeMap<String, String>,
    /// The ways into the topic.
    #[serde(default, rename = "feed")]
    pub feeds: Vec<FeedSpec>,
    /// When dead letters of what reads the topic are replayed without a person.
    #[serde(default, rename = "replay")]
    pub replays: Vec<ReplaySpec>,
}

/// The most partitions that a topic may have: enough for 1,000 consumers, and far below what makes a
/// controller slow.
pub const PARTITIONS_MAX: i32 = 1_000;

/// What a record's key is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Key {
    /// The device, `site/device`.
    #[serde(rename = "site/device")]
    Device,
    /// An id of any kind.
    #[serde(rename = "id")]
    Id,
    /// A rule's id.
    #[serde(rename = "rule")]
    Rule,
    /// No key: records spread over the partitions.
    #[serde(rename = "none")]
    None,
}

/// What happens to old records.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cleanup {
    /// They are deleted after the retention.
    Delete,
    /// The last record of each key is kept.
    Compact,
}

impl Cleanup {
    /// Returns the value of Kafka's `cleanup.policy`.
    pub const fn policy(self) -> &'static str {
        match self {
            Self::Delete => "delete",
            Self::Compact => "compact",
        }
    }
}

/// How long records are kept: a whole number with `s`, `m`, `h` or `d`, or `forever`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Retention {
    /// Milliseconds; −1 is for ever, as in Kafka's `retention.ms`.
    ms: i64,
}

const DAY_MS: i64 = 86_400_000;

impl Retention {
    /// Makes a retention of whole days.
    pub const fn days(days: i64) -> Self {
        Self { ms: days * DAY_MS }
    }

    /// Returns the value of Kafka's `retention.ms`.
    pub const fn as_ms(self) -> i64 {
        self.ms
    }
}

impl fmt::Display for Retention {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.ms < 0 {
            return f.write_str("forever");
        }
        for (unit_ms, unit) in [(DAY_MS, "d"), (3_600_000, "h"), (60_000, "m")] {
            if self.ms % unit_ms == 0 {
                return write!(f, "{}{unit}", self.ms / unit_ms);
            }
        }
        write!(f, "{}s", self.ms / 1_000)
    }
}

/// A text that is not a retention.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not a retention: write a whole number above 0 with `s`, `m`, `h` or `d`, for instance `7d`, or `forever`"
)]
pub struct InvalidRetention(String);

impl FromStr for Retention {
    type Err = InvalidRetention;

    fn from_str(text: &str) -> Result<Self, InvalidRetention> {
        let invalid = || InvalidRetention(text.chars().take(40).collect());
        if text == "forever" {
            return Ok(Self { ms: -1 });
        }
        let unit = text.chars().last().ok_or_else(invalid)?;
        let unit_ms = match unit {
            's' => 1_000,
            'm' => 60_000,
            'h' => 3_600_000,
            'd' => DAY_MS,
            _ => return Err(invalid()),
        };
        let digits = &text[..text.len() - 1];
        let is_number = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
        let count = is_number.then(|| digits.parse::<i64>().ok()).flatten().filter(|n| *n > 0);
        count.and_then(|n| n.checked_mul(unit_ms)).map(|ms| Self { ms }).ok_or_else(invalid)
    }
}

impl TryFrom<String> for Retention {
    type Error = InvalidRetention;

    fn try_from(text: String) -> Result<Self, InvalidRetention> {
        text.parse()
    }
}

impl From<Retention> for String {
    fn from(retention: Retention) -> Self {
        retention.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retentions_are_read_and_written() {
        for (text, ms) in
            [("7d", 7 * DAY_MS), ("12h", 43_200_000), ("90m", 5_400_000), ("5s", 5_000), ("forever", -1)]
        {
            let retention: Retention = text.parse().expect(text);
            assert_eq!((retention.as_ms(), retention.to_string().as_str()), (ms, text));
        }
        for text in ["", "d", "0d", "-1d", "7", "7w", "1.5d", "9999999999999999d", "7ö"] {
            assert!(text.parse::<Retention>().is_err(), "{text}");
        }
    }
}
