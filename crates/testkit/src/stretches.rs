//! The in-memory cluster as a reader of stretches.

use crate::cluster::{MemoryCluster, to_batch};
use crate::faults::Point;
use throughline_model::record::{Batch, TopicPartition};
use throughline_runtime::ports::{Extent, Failure, Stretch, StretchReader};

/// Reads stretches of partitions, a few records at a time.
pub struct MemoryStretches {
    cluster: MemoryCluster,
    batch_max: usize,
    batch: Option<Batch>,
    is_slow: bool,
    /// Where the call before wanted to read.
    wanted: Option<(TopicPartition, i64)>,
}

impl MemoryStretches {
    /// Makes a reader of `cluster` that passes at most `batch_max` records a call.
    pub fn new(cluster: &MemoryCluster, batch_max: usize) -> Self {
        Self { cluster: cluster.clone(), batch_max, batch: None, is_slow: false, wanted: None }
    }

    /// The same for a broker that answers later than a call waits: what lies at a position comes with the second
    /// call for it in a row, and is lost to who reads elsewhere meanwhile.
    pub fn slow(cluster: &MemoryCluster, batch_max: usize) -> Self {
        Self { is_slow: true, ..Self::new(cluster, batch_max) }
    }
}

impl StretchReader for MemoryStretches {
    fn bounds(&mut self, topic: &str) -> Result<Option<Extent>, Failure> {
        self.cluster.faults().pass(Point::Stretch)?;
        let mut inner = self.cluster.lock();
        if !inner.has_topic(topic) {
            return Ok(None);
        }
        let partitions = inner.partitions(topic);
        let bounds = (0..partitions).map(|p| (p, inner.start_of(topic, p), inner.end_of(topic, p)));
        let partitions = bounds.collect();
        let topic_id = inner.topic_id(topic).map(|id| id.to_string()).unwrap_or_default();
        Ok(Some(Extent { topic_id, partitions }))
    }

    fn first(&mut self, partition: &TopicPartition) -> Result<i64, Failure> {
        self.cluster.faults().pass(Point::Stretch)?;
        Ok(self.cluster.lock().start_of(&partition.topic, partition.partition))
    }

    fn read(&mut self, partition: &TopicPartition, from: i64, to: i64) -> Result<Stretch<'_>, Failure> {
        self.cluster.faults().pass(Point::Stretch)?;
        let wanted = Some((partition.clone(), from));
        if self.is_slow && std::mem::replace(&mut self.wanted, wanted.clone()) != wanted {
            return Ok(Stretch::Waiting);
        }
        let mut inner = self.cluster.lock();
        let (records, next, _) = inner.read(&partition.topic, partition.partition, from, self.batch_max);
        drop(inner);
        if records.is_empty() {
            return Ok(if next >= to { Stretch::End } else { Stretch::Waiting });
        }
        Ok(Stretch::Records(self.batch.insert(to_batch(partition, &records))))
    }
}
