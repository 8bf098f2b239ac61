//! Rows of the store's tables, as load stages make them and stores write them.

use crate::time::Timestamp;

/// A row of `reading`: one measurement of one reading.
#[derive(Clone, Debug, Default, PartialEq)]
#[expect(missing_docs, reason = "columns carry the envelope's names, documented there")]
pub struct ReadingRow {
    pub site_id: String,
    pub device_id: String,
    pub epoch: Option<i64>,
    pub seq: Option<i64>,
    pub name: String,
    pub number: Option<f64>,
    pub text: Option<String>,
    pub flag: Option<bool>,
    pub unit: Option<String>,
    pub occurred_at: Timestamp,
    pub received_at: Timestamp,
    pub message_id: String,
    pub trace_id: String,
    pub stream: String,
}

/// A raise or clear of an alert; the store keeps one row an alert, keyed by `alert_id`.
#[derive(Clone, Debug, Default, PartialEq)]
#[expect(missing_docs, reason = "columns carry the record's names, documented there")]
pub struct AlertRow {
    pub alert_id: String,
    pub rule_id: String,
    pub rule_version: i64,
    pub site_id: String,
    pub device_id: String,
    pub severity: String,
    pub state: String,
    pub raised_at: Timestamp,
    pub cleared_at: Option<Timestamp>,
    pub summary: String,
    pub message_id: String,
    pub trace_id: String,
    pub received_at: Timestamp,
}

/// A row of `session`: one event of one connection.
#[derive(Clone, Debug, Default, PartialEq)]
#[expect(missing_docs, reason = "columns carry the record's names, documented there")]
pub struct SessionRow {
    pub site_id: String,
    pub device_id: String,
    pub client_id: String,
    pub event: String,
    pub cause: Option<String>,
    pub protocol: String,
    pub session_generation: i64,
    pub occurred_at: Timestamp,
    pub received_at: Timestamp,
    pub message_id: String,
    pub trace_id: String,
}

/// A row of `twin`, keyed by site and device: the newest projection wins because the partition's order
/// does, and a store refuses an older one that comes by another way ([`TwinRow::is_older_than`]). `document` is the twin as JSON; an empty one removes the row, as a tombstone does ([`TwinRow::removal`]).
#[derive(Clone, Debug, Default, PartialEq)]
#[expect(missing_docs, reason = "columns carry the record's names, documented there")]
pub struct TwinRow {
    pub site_id: String,
    pub device_id: String,
    pub reported_version: i64,
    pub desired_version: i64,
    pub presence: String,
    pub last_seen_at: Timestamp,
    pub document: String,
    pub message_id: String,
    pub trace_id: String,
}

impl TwinRow {
    /// Makes the row that removes a twin.
    pub fn removal(site_id: impl Into<String>, device_id: impl Into<String>) -> Self {
        Self { site_id: site_id.into(), device_id: device_id.into(), ..Self::default() }
    }

    /// Says whether this row shows the twin as it was before `other`: the replay of a dead letter must not
    /// turn the projection back. The time last seen comes first, because a twin's topic that was lost and
    /// begun again counts its versions from the start; it only rises, as the versions do.
    pub fn is_older_than(&self, other: &Self) -> bool {
        self.last_seen_at < other.last_seen_at
            || (self.last_seen_at == other.last_seen_at
                && (self.reported_version < other.reported_version
                    || self.desired_version < other.desired_version))
    }

    /// Says whether this row removes the twin. A twin's JSON is never empty.
    pub fn is_removal(&self) -> bool {
        self.document.is_empty()
    }
}

/// The rows of one write.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rows {
    /// Appended to `reading`.
    pub readings: Vec<ReadingRow>,
    /// Raised or cleared in `alert`, in order.
    pub alerts: Vec<AlertRow>,
    /// Appended to `session`.
    pub sessions: Vec<SessionRow>,
    /// Put into `twin`, in order.
    pub twins: Vec<TwinRow>,
}

impl Rows {
    /// Returns the number of rows.
    pub fn len(&self) -> usize {
        self.readings.len() + self.alerts.len() + self.sessions.len() + self.twins.len()
    }

    /// Says whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Forgets the rows and keeps the buffers.
    pub fn clear(&mut self) {
        self.readings.clear();
        self.alerts.clear();
        self.sessions.clear();
        self.twins.clear();
    }
}
