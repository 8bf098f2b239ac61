//! What became of one record in one stage.

use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::fmt;

/// The single outcome that every record read by a stage has.
///
/// Where several could apply, `DeadLettered` wins, then `Emitted`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// A row was written, a state changed, an output produced, or the record went to a retry topic.
    Emitted,
    /// The stage had nothing to do with it: no rule fired, not its device.
    Filtered,
    /// Older than, or equal to, what is already known.
    Ignored,
    /// A redelivery, recognised by its sequence identity.
    Duplicate,
    /// The record's own expiry had passed.
    Expired,
    /// It cannot be processed; its bytes are in the dead-letter topic.
    DeadLettered,
}

impl Outcome {
    /// Every outcome, in the order of their codes.
    pub const ALL: [Self; 6] =
        [Self::Emitted, Self::Filtered, Self::Ignored, Self::Duplicate, Self::Expired, Self::DeadLettered];

    /// Returns the label used in metrics, receipts and commit metadata.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Emitted => "emitted",
            Self::Filtered => "filtered",
            Self::Ignored => "ignored",
            Self::Duplicate => "duplicate",
            Self::Expired => "expired",
            Self::DeadLettered => "dead_lettered",
        }
    }

    /// Returns the position in [`Outcome::ALL`].
    pub const fn index(self) -> usize {
        self as usize
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.label())
    }
}

/// The outcome of a record with its reason code and, for dead letters, a message for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settled {
    /// What became of the record.
    pub outcome: Outcome,
    /// A short code from a closed vocabulary of the stage, empty where the outcome says it all.
    pub reason: Cow<'static, str>,
    /// What was wrong, with identifiers; only for [`Outcome::DeadLettered`].
    pub message: Option<String>,
}

impl Settled {
    /// Makes a settlement without a message.
    pub const fn new(outcome: Outcome, reason: &'static str) -> Self {
        Self { outcome, reason: Cow::Borrowed(reason), message: None }
    }

    /// The record had an effect.
    pub const fn emitted() -> Self {
        Self::new(Outcome::Emitted, "")
    }

    /// The stage had nothing to do.
    pub const fn filtered() -> Self {
        Self::new(Outcome::Filtered, "")
    }

    /// The record cannot be processed: `code` is stable, `message` says what and where.
    pub fn dead_lettered(code: &'static str, message: impl Into<String>) -> Self {
        Self { outcome: Outcome::DeadLettered, reason: Cow::Borrowed(code), message: Some(message.into()) }
    }
}
