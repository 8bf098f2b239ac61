//! Stretches of partitions: dead letters between two positions.

use crate::config::KafkaConfig;
use crate::failure::dependency;
use crate::tail::{Tail, Tailed};
use std::time::{Duration, Instant};
use throughline_kafka_ffi::OffsetSpec;
use throughline_model::record::{Batch, TopicPartition};
use throughline_runtime::ports::{Extent, Failure, Stretch, StretchReader};

/// Readings that are kept open, each a client with its buffers: requests at work at the same time beyond this
/// number seek with every stretch.
const OPEN_MAX: usize = 4;
/// How long one call waits for records: the loop that makes it also serves its group.
const WAIT: Duration = Duration::from_millis(50);
/// How long nothing may come of what is there; then a new client is made, which finds the leader.
const PROGRESS_TIMEOUT: Duration = Duration::from_secs(15);

/// Reads stretches of partitions; no group is joined and nothing committed.
pub struct PartitionReader {
    config: KafkaConfig,
    /// The one used last at the end.
    open: Vec<Reading>,
}

/// A client at work on one partition.
struct Reading {
    partition: TopicPartition,
    tail: Tail,
    /// Every position below is settled: no open transaction lies there.
    settled: i64,
    /// Where the client reads on.
    next: i64,
    batch: Option<Batch>,
    /// When something came last.
    since: Instant,
}

impl PartitionReader {
    /// Prepares a reader; connects with the first call.
    pub fn new(config: &KafkaConfig) -> Self {
        Self { config: config.clone(), open: Vec::new() }
    }

    /// Takes the reading of `partition` that stands at `from` out of those open, or makes one.
    fn take(&mut self, partition: &TopicPartition, from: i64) -> Result<Reading, Failure> {
        let found = self.open.iter().position(|r| r.partition == *partition && r.stands_at(from));
        if let Some(index) = found {
            return Ok(self.open.remove(index));
        }
        let tail = Tail::new(&self.config, &partition.topic, true)?;
        tail.partitions()?;
        let partition = partition.clone();
        Ok(Reading { partition, tail, settled: -1, next: -1, batch: None, since: Instant::now() })
    }
}

impl Reading {
    fn stands_at(&self, from: i64) -> bool {
        self.next == from || self.holds(from)
    }

    /// Says whether records from `from` on were fetched already.
    fn holds(&self, from: i64) -> bool {
        let Some(batch) = self.batch.as_ref().filter(|batch| !batch.is_empty()) else { return false };
        batch.get(0).offset <= from && from <= batch.get(batch.len() - 1).offset
    }

    /// Fetches what lies from `from` on; returns whether it is known that there is nothing before `to`.
    fn fetch(&mut self, from: i64, to: i64) -> Result<bool, Failure> {
        if self.settled < to {
            let number = self.partition.partition;
            let stable = self.tail.bounds(&[number], OffsetSpec::Latest, true)?;
            self.settled = stable.get(&number).copied().unwrap_or(-1);
            // The end that the client reports is one after this: it is asked anew.
            self.next = -1;
        }
        if self.settled < to {
            return Ok(false);
        }
        if self.next != from {
            self.tail.assign(&[(self.partition.partition, from)])?;
            self.next = from;
            self.since = Instant::now();
        }
        match self.tail.poll(WAIT)? {
            Tailed::Records(batch) => {
                self.next = batch.get(batch.len() - 1).offset + 1;
                self.since = Instant::now();
                self.batch = Some(batch);
                Ok(false)
            }
            Tailed::End(_) => Ok(true),
            Tailed::Nothing if self.since.elapsed() > PROGRESS_TIMEOUT => {
                let seconds = PROGRESS_TIMEOUT.as_secs();
                Err(dependency(format!("reading {} came to nothing for {seconds} s", self.partition)))
            }
            Tailed::Nothing => Ok(false),
        }
    }
}

impl StretchReader for PartitionReader {
    fn bounds(&mut self, topic: &str) -> Result<Option<Extent>, Failure> {
        let admin = crate::admin::Admin::new(&self.config)?;
        if !admin.topics()?.contains_key(topic) {
            return Ok(None);
        }
        let topic_id = admin.topic_ids(&[topic])?.remove(topic).unwrap_or_default();
        let tail = Tail::new(&self.config, topic, true)?;
        let partitions = tail.partitions()?;
        let first = tail.bounds(&partitions, OffsetSpec::Earliest, false)?;
        let end = tail.bounds(&partitions, OffsetSpec::Latest, false)?;
        let bound = |p: &i32| Some((*p, *first.get(p)?, *end.get(p)?));
        Ok(Some(Extent { topic_id, partitions: partitions.iter().filter_map(bound).collect() }))
    }

    fn first(&mut self, partition: &TopicPartition) -> Result<i64, Failure> {
        let number = partition.partition;
        // Whoever asks is reading it.
        let open = self.open.iter().rev().find(|reading| reading.partition == *partition);
        let bounds = match open {
            Some(reading) => reading.tail.bounds(&[number], OffsetSpec::Earliest, false)?,
            None => Tail::new(&self.config, &partition.topic, true)?.bounds(
                &[number],
                OffsetSpec::Earliest,
                false,
            )?,
        };
        bounds.get(&number).copied().ok_or_else(|| dependency(format!("{partition} has no first position")))
    }

    fn read(&mut self, partition: &TopicPartition, from: i64, to: i64) -> Result<Stretch<'_>, Failure> {
        let mut reading = self.take(partition, from)?;
        if !reading.holds(from) {
            reading.batch = None;
            // Dropped where it fails: the next call makes a new client.
            let at_end = reading.fetch(from, to)?;
            if at_end && reading.batch.is_none() {
                return Ok(Stretch::End);
            }
        }
        if self.open.len() >= OPEN_MAX {
            self.open.remove(0);
        }
        self.open.push(reading);
        let batch = self.open.last().and_then(|reading| reading.batch.as_ref());
        Ok(batch.map_or(Stretch::Waiting, Stretch::Records))
    }
}
