//! The typed reads: column lists and tuples that both stores share.

use crate::StoredOffset;
use throughline_model::record::TopicPartition;
use throughline_model::rows::{SessionRow, TwinRow};
use throughline_model::time::Timestamp;

/// A table of the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    /// One row a measurement.
    Reading,
    /// One row an alert.
    Alert,
    /// One row an event of a connection.
    Session,
    /// One row a device.
    Twin,
}

impl Table {
    /// Returns the statement that counts its rows. On SQLite the name is that of a view.
    pub(crate) const fn count_sql(self) -> &'static str {
        match self {
            Self::Reading => "SELECT count(*) FROM reading",
            Self::Alert => "SELECT count(*) FROM alert",
            Self::Session => "SELECT count(*) FROM session",
            Self::Twin => "SELECT count(*) FROM twin",
        }
    }
}

/// `topic, partition, cluster_id, topic_id, next, books`.
pub(crate) type OffsetTuple = (String, i32, String, String, i64, String);

pub(crate) fn offset_from(row: OffsetTuple) -> StoredOffset {
    let (topic, partition, cluster_id, topic_id, next, books) = row;
    StoredOffset { partition: TopicPartition::new(topic, partition), cluster_id, topic_id, next, books }
}

/// `site_id, device_id, reported_version, desired_version, presence, last_seen_at (µs), document,
/// message_id, trace_id`.
pub(crate) type TwinTuple = (String, String, i64, i64, String, i64, String, String, String);

pub(crate) fn twin_from(row: TwinTuple) -> TwinRow {
    let (
        site_id,
        device_id,
        reported_version,
        desired_version,
        presence,
        seen,
        document,
        message_id,
        trace_id,
    ) = row;
    TwinRow {
        site_id,
        device_id,
        reported_version,
        desired_version,
        presence,
        last_seen_at: Timestamp(seen),
        document,
        message_id,
        trace_id,
    }
}

/// `site_id, device_id, client_id, event, cause, protocol, session_generation, occurred_at (µs),
/// received_at (µs), message_id, trace_id`.
pub(crate) type SessionTuple =
    (String, String, String, String, Option<String>, String, i64, i64, i64, String, String);

pub(crate) fn session_from(row: SessionTuple) -> SessionRow {
    let (site_id, device_id, client_id, event, cause, protocol, session_generation, occurred, received, m, t) =
        row;
    SessionRow {
        site_id,
        device_id,
        client_id,
        event,
        cause,
        protocol,
        session_generation,
        occurred_at: Timestamp(occurred),
        received_at: Timestamp(received),
        message_id: m,
        trace_id: t,
    }
}
