//! Requests about dead letters, and how far each was carried out.

use super::*;

/// Positions `[first, end)` of one partition of a dead-letter topic.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LetterRange {
    /// The partition.
    pub partition: i32,
    /// The first position.
    pub first: i64,
    /// The position after the last.
    pub end: i64,
}

/// A [`LetterRange`] with how far it is done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgressRange {
    /// The partition.
    pub partition: i32,
    /// The first position.
    pub first: i64,
    /// The position after the last.
    pub end: i64,
    /// The next position to look at.
    pub next: i64,
}

record! {
    /// Asks `reprocess_dead_letters` to deal with dead letters (`service_platform.dead_letter_request.v1`,
    /// key = request id).
    DeadLetterRequest {
        /// `replay`, `drop`, or `cancel` of the request with the same id.
        action: String,
        /// The topic of the letters, a dead-letter or a parking topic.
        topic: String,
        /// Only letters with this code.
        #[serde(default)]
        code: Option<String>,
        /// Only letters whose value is framed with this schema id.
        #[serde(default)]
        schema_id: Option<i64>,
        /// Only letters that are not older, by the broker's time.
        #[serde(default)]
        since: Option<Timestamp>,
        /// Only letters that are older, by the broker's time.
        #[serde(default)]
        until: Option<Timestamp>,
        /// Where the letters lie; empty: everything that is there when the request is taken up.
        ranges: Vec<LetterRange>,
        /// Whether letters that were replayed before are replayed too.
        again: bool,
        /// At most this many replays a second; absent: no bound.
        #[serde(default)]
        rate_per_second: Option<i64>,
        /// Who asked.
        requested_by: String,
        /// Why; a drop needs it.
        #[serde(default)]
        justification: Option<String>,
        /// Only letters that were replayed less often than this.
        #[serde(default)]
        replays_below: Option<i64>,
    }
}

record! {
    /// A [`DeadLetterRequest`] and how far it was carried out (`service_platform.dead_letter_progress.v1`,
    /// compacted, key = request id). `received_at` is the broker's time of the request.
    DeadLetterProgress {
        /// As in the request.
        action: String,
        /// As in the request.
        topic: String,
        /// As in the request.
        #[serde(default)]
        code: Option<String>,
        /// As in the request.
        #[serde(default)]
        schema_id: Option<i64>,
        /// As in the request.
        #[serde(default)]
        since: Option<Timestamp>,
        /// As in the request.
        #[serde(default)]
        until: Option<Timestamp>,
        /// Where the letters lie, and how far each partition is done.
        ranges: Vec<ProgressRange>,
        /// As in the request.
        again: bool,
        /// As in the request.
        #[serde(default)]
        rate_per_second: Option<i64>,
        /// As in the request.
        requested_by: String,
        /// As in the request.
        #[serde(default)]
        justification: Option<String>,
        /// One of [`crate::dead_letter::status`].
        status: String,
        /// Letters sent to the replay topic.
        replayed: i64,
        /// Letters marked as dropped.
        dropped: i64,
        /// Letters that had exhausted their replays and went to the parking topic.
        parked: i64,
        /// Letters that another request had replayed or dropped before.
        skipped: i64,
        /// Why it failed, or what it waits for.
        #[serde(default)]
        error: Option<String>,
        /// When it ended, µs UTC.
        #[serde(default)]
        done_at: Option<Timestamp>,
        /// As in the request.
        #[serde(default)]
        replays_below: Option<i64>,
        /// The id of the topic of the letters: positions of another one under its name mean other letters.
        #[serde(default)]
        topic_id: Option<String>,
        /// Positions that retention deleted after the request was taken up and before they were looked at.
        #[serde(default)]
        overtaken: i64,
    }
}
