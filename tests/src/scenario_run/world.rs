//! What a scenario runs on: a Kafka in memory or a real one.

use std::collections::BTreeMap;
use std::sync::Arc;
use throughline_model::codec::Codec;
use throughline_model::record::{Outbox, TopicPartition};
use throughline_runtime::ports::{Failure, SchemaSource, Source, TableReader, Transactions};
use throughline_runtime::{AskIncarnation, Clock};

/// What a scenario runs on.
pub trait World {
    /// A member of a group.
    type Source: Source;
    /// Its transactional producer.
    type Transactions: Transactions;
    /// What reads tables and changelogs.
    type Tables: TableReader;
    /// What resolves schemas.
    type Schemas: SchemaSource;

    /// Names the world in messages.
    fn name(&self) -> &'static str;

    /// Returns the clock that its loops read.
    fn clock(&self) -> Arc<dyn Clock>;

    /// Returns the codec with every topic bound.
    fn codec(&self) -> Arc<Codec>;

    /// Joins a group as the one instance that all runs share, so that a successor fences its predecessor.
    ///
    /// # Errors
    /// When the client cannot be made.
    fn join(&self, group: &str, topics: &[&str]) -> Result<(Self::Source, Self::Transactions), Failure>;

    /// Makes a reader.
    fn tables(&self) -> Self::Tables;

    /// Makes a schema source.
    fn schemas(&self) -> Self::Schemas;

    /// Returns what asks which cluster and topics these are.
    fn ask_incarnation(&self, topics: &[&str], changelog: Option<&str>) -> AskIncarnation;

    /// Appends records outside any transaction.
    ///
    /// # Errors
    /// When Kafka does not acknowledge.
    fn append(&mut self, records: &Outbox) -> Result<(), Failure>;

    /// Returns the position after the last record of each partition of a topic that is written outside
    /// transactions.
    ///
    /// # Errors
    /// When Kafka cannot be asked.
    fn ends(&self, topic: &str) -> Result<Vec<(TopicPartition, i64)>, Failure>;

    /// Returns the committed offsets of a group with their metadata.
    ///
    /// # Errors
    /// When Kafka cannot be asked.
    fn committed(&self, group: &str) -> Result<BTreeMap<TopicPartition, (i64, String)>, Failure>;

    /// Returns the committed records of a topic, those of a partition in order.
    ///
    /// # Errors
    /// When Kafka cannot be asked.
    fn records(&self, topic: &str) -> Result<Vec<Found>, Failure>;

    /// Says whether a topic is compacted.
    fn is_compacted(&self, topic: &str) -> bool;
}

/// A record that was read back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Its key as text.
    pub key: String,
    /// Its value; `None` is a tombstone.
    pub value: Option<Vec<u8>>,
    /// The reason code among a dead letter's headers.
    pub reason: Option<String>,
}

/// The header that holds the reason code of a dead letter.
pub(super) const REASON_HEADER: &str = "__connect.errors.exception.class.name";
