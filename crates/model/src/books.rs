//! The books of one partition in one group: cumulative counts of outcomes that travel with the offset.
//!
//! They are the commit metadata of a decide stage and the database row of a load stage, written atomically
//! with the offset, so they survive every crash.

use crate::outcome::{Outcome, Settled};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Commit metadata is at most this long; Kafka's default bound (`offset.metadata.max.bytes`) is 4096.
pub const METADATA_BYTES_MAX: usize = 1_024;
const REASONS_MAX: usize = 16;
/// The longest name of a volume; ours have 40 bytes at most.
const VOLUME_BYTES_MAX: usize = 128;
/// The longest id of a cluster or topic; Kafka's have 22 bytes, as we write those of topics 36.
const ID_BYTES_MAX: usize = 128;
const VERSION: u32 = 1;

/// Cumulative counts since the volume began.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Books {
    /// Version of this record's form.
    #[serde(rename = "v")]
    version: u32,
    /// The volume's name: a new one begins when an operator adopts an offset that a foreign tool moved.
    #[serde(rename = "vol")]
    pub volume: String,
    /// Records by outcome, in the order of [`Outcome::ALL`].
    #[serde(rename = "n")]
    pub counts: [u64; 6],
    /// Positions that held no record (transaction markers, compacted away).
    #[serde(rename = "empty", default)]
    pub positions_without_record: u64,
    /// Positions that retention deleted before they were read.
    #[serde(rename = "over", default)]
    pub overtaken: u64,
    /// The commonest reasons, `outcome:reason` to count.
    #[serde(rename = "why", default)]
    reasons: BTreeMap<String, u64>,
    /// The sum of the reasons that are not listed.
    #[serde(rename = "rest", default)]
    other_reasons: u64,
    /// Where the offset counts. `None` in books of versions that did not say so, and in those of load
    /// stages, whose database says it in columns of its own.
    #[serde(rename = "of", default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<Origin>,
}

/// Which of the clusters and topics that ever had their names an offset, and the state beside it, belong to.
/// A topic that is deleted and made anew has another id.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// The id of the cluster.
    #[serde(rename = "cl")]
    pub cluster: String,
    /// The id of the topic that the offset counts in.
    #[serde(rename = "t")]
    pub topic: String,
    /// The id of the changelog that holds the state which the records before the offset made.
    #[serde(rename = "st", default, skip_serializing_if = "Option::is_none")]
    pub changelog: Option<String>,
}

impl Origin {
    fn ids(&self) -> impl Iterator<Item = &String> {
        [&self.cluster, &self.topic].into_iter().chain(&self.changelog)
    }
}

/// Commit metadata that is not ours.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the committed offset carries metadata that this stage did not write: `{0}`")]
pub struct ForeignMetadata(pub String);

impl Books {
    /// Opens a volume.
    pub fn open(volume: impl Into<String>) -> Self {
        Self { version: VERSION, volume: volume.into(), ..Self::default() }
    }

    /// Counts one record.
    pub fn count(&mut self, settled: &Settled) {
        self.add(settled.outcome, &settled.reason, 1);
    }

    /// Counts `n` records with the same outcome and reason.
    pub fn add(&mut self, outcome: Outcome, reason: &str, n: u64) {
        self.counts[outcome.index()] += n;
        if reason.is_empty() {
            return;
        }
        let name = format!("{outcome}:{reason}");
        if self.reasons.len() < REASONS_MAX || self.reasons.contains_key(&name) {
            *self.reasons.entry(name).or_default() += n;
        } else {
            self.other_reasons += n;
        }
    }

    /// Returns the number of records with `outcome`.
    pub fn of(&self, outcome: Outcome) -> u64 {
        self.counts[outcome.index()]
    }

    /// Returns the number of records read, which is the sum over outcomes.
    pub fn records_read(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Iterates over the listed reasons as (`outcome:reason`, count).
    pub fn reasons(&self) -> impl Iterator<Item = (&str, u64)> {
        self.reasons.iter().map(|(k, v)| (k.as_str(), *v))
    }

    /// Writes the metadata, at most [`METADATA_BYTES_MAX`] bytes: reasons that do not fit join the rest.
    pub fn to_metadata(&self) -> String {
        let mut books = self.clone();
        loop {
            let text = serde_json::to_string(&books).expect("a plain struct serializes");
            if text.len() <= METADATA_BYTES_MAX {
                return text;
            }
            let rarest = books.reasons.iter().min_by_key(|(_, n)| **n).map(|(k, _)| k.clone());
            let Some(rarest) = rarest else { return text };
            books.other_reasons += books.reasons.remove(&rarest).unwrap_or_default();
        }
    }

    /// Reads what [`Books::to_metadata`] wrote.
    ///
    /// # Errors
    /// [`ForeignMetadata`]: a foreign tool moved the offset. An operator decides whether to adopt it.
    pub fn from_metadata(text: &str) -> Result<Self, ForeignMetadata> {
        let books: Option<Self> = serde_json::from_str(text).ok();
        books.filter(Self::is_ours).ok_or_else(|| ForeignMetadata(text.chars().take(80).collect()))
    }

    /// Says whether this build may go on with what was read: counts that cannot overflow, because no offset
    /// is larger than 63 bits, and a volume that leaves room for the rest.
    fn is_ours(&self) -> bool {
        let counts = self.counts.iter().chain([&self.positions_without_record, &self.overtaken]);
        let total = counts.chain(self.reasons.values()).chain([&self.other_reasons]);
        let total = total.fold(0u128, |sum, n| sum + u128::from(*n));
        let fits = |text: &str, bytes_max| text.len() <= bytes_max && !text.chars().any(char::is_control);
        self.version == VERSION
            && total <= i64::MAX as u128
            && fits(&self.volume, VOLUME_BYTES_MAX)
            && self.origin.iter().flat_map(Origin::ids).all(|id| fits(id, ID_BYTES_MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn books_survive_their_metadata_and_stay_within_the_bound() {
        let mut books = Books::open("v-1");
        for i in 0..40 {
            let reason = format!("a_rather_long_reason_code_that_somebody_chose_{i:02}_{}", "x".repeat(40));
            let settled = Settled { outcome: Outcome::Ignored, reason: reason.into(), message: None };
            books.count(&settled);
        }
        books.count(&Settled::emitted());
        let id = || "9bfedc93-7451-4d36-bf31-9ebcbfd39142".to_owned();
        books.origin = Some(Origin { cluster: "x".repeat(36), topic: id(), changelog: Some(id()) });
        let text = books.to_metadata();
        assert!(text.len() <= METADATA_BYTES_MAX, "{}", text.len());
        let back = Books::from_metadata(&text).expect("ours");
        assert_eq!(back.origin, books.origin);
        assert_eq!((back.of(Outcome::Ignored), back.of(Outcome::Emitted), back.records_read()), (40, 1, 41));
    }

    #[test]
    fn books_of_a_version_that_did_not_say_where_they_count_are_read() {
        let old = r#"{"v":1,"vol":"volume-1","n":[7,0,0,0,0,0],"empty":1,"over":0,"why":{},"rest":0}"#;
        let books = Books::from_metadata(old).expect("ours");
        assert_eq!((books.records_read(), &books.origin), (7, &None));
        assert_eq!(books.to_metadata(), old, "what does not know it does not invent it");
    }

    #[test]
    fn an_offset_that_a_foreign_tool_committed_is_recognised() {
        for text in [
            "",
            "{}",
            "hello",
            r#"{"v":2,"vol":"x","n":[0,0,0,0,0,0]}"#,
            // Counts that the next record would overflow, and a volume that would not leave room to commit.
            r#"{"v":1,"vol":"x","n":[18446744073709551615,0,0,0,0,0]}"#,
            r#"{"v":1,"vol":"x","n":[9223372036854775807,1,0,0,0,0]}"#,
            r#"{"v":1,"vol":"x","n":[0,0,0,0,0,0],"why":{"a":9223372036854775807,"b":1}}"#,
            &format!(r#"{{"v":1,"vol":"{}","n":[0,0,0,0,0,0]}}"#, "x".repeat(2_000)),
            &format!(r#"{{"v":1,"vol":"x","n":[0,0,0,0,0,0],"of":{{"cl":"{}","t":""}}}}"#, "x".repeat(2_000)),
        ] {
            assert!(Books::from_metadata(text).is_err(), "{text}");
        }
    }
}
