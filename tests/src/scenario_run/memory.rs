//! Scenarios on the cluster in memory, in virtual time.

use super::world::{Found, REASON_HEADER, World};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use throughline_model::catalog::{Catalog, Desired};
use throughline_model::codec::Codec;
use throughline_model::record::{Outbox, TopicPartition};
use throughline_runtime::ports::{Failure, Outlet};
use throughline_runtime::{AskIncarnation, Clock};
use throughline_testkit::{
    FakeClock, MemoryCluster, MemoryOutlet, MemorySchemas, MemorySource, MemoryTables, MemoryTransactions,
};

/// How far messages lie apart: two never arrive at the same instant of a real clock.
const BETWEEN_MESSAGES: Duration = Duration::from_millis(10);
/// Small, so that the messages of one key come in several batches.
const BATCH_MAX: usize = 2;

/// A cluster with the topics of the catalog.
pub struct MemoryWorld {
    clock: FakeClock,
    cluster: MemoryCluster,
    codec: Arc<Codec>,
    topics: Desired,
}

impl MemoryWorld {
    /// Makes an empty cluster.
    pub fn new() -> Self {
        let clock = FakeClock::default();
        let cluster = MemoryCluster::new(clock.clone());
        let topics = super::kafka::desired(&Catalog::embedded());
        for topic in &topics.topics {
            cluster.create_topic(&topic.name, topic.partitions);
        }
        Self { clock, cluster, codec: throughline_testkit::codec(), topics }
    }
}

impl Default for MemoryWorld {
    fn default() -> Self {
        Self::new()
    }
}

impl World for MemoryWorld {
    type Source = MemorySource;
    type Transactions = MemoryTransactions;
    type Tables = MemoryTables;
    type Schemas = MemorySchemas;

    fn name(&self) -> &'static str {
        "in memory"
    }

    fn clock(&self) -> Arc<dyn Clock> {
        Arc::new(self.clock.clone())
    }

    fn codec(&self) -> Arc<Codec> {
        Arc::clone(&self.codec)
    }

    fn join(&self, group: &str, topics: &[&str]) -> Result<(MemorySource, MemoryTransactions), Failure> {
        let source = MemorySource::join(&self.cluster, group, topics, BATCH_MAX);
        let transactions = MemoryTransactions::new(&self.cluster, group, group, &source);
        Ok((source, transactions))
    }

    fn ask_incarnation(&self, _: &[&str], _: Option<&str>) -> AskIncarnation {
        self.cluster.ask_incarnation()
    }

    fn tables(&self) -> MemoryTables {
        MemoryTables::new(&self.cluster)
    }

    fn schemas(&self) -> MemorySchemas {
        MemorySchemas::new(&self.cluster)
    }

    fn append(&mut self, records: &Outbox) -> Result<(), Failure> {
        self.clock.advance(BETWEEN_MESSAGES);
        MemoryOutlet::new(&self.cluster).send_all(records)
    }

    fn ends(&self, topic: &str) -> Result<Vec<(TopicPartition, i64)>, Failure> {
        let mut ends = BTreeMap::new();
        for record in self.cluster.records(topic) {
            ends.insert(TopicPartition::new(topic, record.partition), record.offset + 1);
        }
        Ok(ends.into_iter().collect())
    }

    fn committed(&self, group: &str) -> Result<BTreeMap<TopicPartition, (i64, String)>, Failure> {
        let mut committed = BTreeMap::new();
        for topic in &self.topics.topics {
            for number in 0..topic.partitions {
                let at = TopicPartition::new(topic.name.as_str(), number);
                committed.extend(self.cluster.committed(group, &at).map(|found| (at, found)));
            }
        }
        Ok(committed)
    }

    fn records(&self, topic: &str) -> Result<Vec<Found>, Failure> {
        let found = |record: throughline_testkit::Committed| Found {
            key: record.key_text(),
            reason: record.header(REASON_HEADER).map(|v| String::from_utf8_lossy(v).into_owned()),
            value: record.value,
        };
        Ok(self.cluster.records(topic).into_iter().map(found).collect())
    }

    fn is_compacted(&self, topic: &str) -> bool {
        super::kafka::is_compacted(&self.topics, topic)
    }
}
