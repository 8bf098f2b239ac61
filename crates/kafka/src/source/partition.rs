//! One partition of a member: its own queue, from which batches are taken.

use super::membership::{MemberConsumer, MemberContext, Wake};
use crate::message::push;
use rdkafka::consumer::base_consumer::PartitionQueue;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::Message;
use std::sync::Arc;
use std::time::Duration;
use throughline_model::record::{Batch, TopicPartition};

/// How large a batch may become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchBounds {
    /// Records of one batch; at least 1.
    pub records: usize,
    /// Bytes of one batch; the record that passes it is still taken.
    pub bytes: usize,
    /// KiB of a partition that are fetched ahead of the stage; one fetch, of a MiB, may pass it.
    pub fetched_kib: u32,
}

impl BatchBounds {
    /// More a partition brings nothing: at 20 ms between two fetches it is 400 MB a second.
    const FETCHED_KIB_MAX: u32 = 8_192;
    /// What one fetch of a partition brings.
    const FETCHED_KIB_MIN: u32 = 1_024;

    /// Shares `kib` among `partitions`: what a member fetches ahead is then bounded in total, however many
    /// topics it reads, unless each partition's share were less than one fetch.
    #[must_use]
    pub fn fetching(self, kib: u32, partitions: usize) -> Self {
        let partitions = u32::try_from(partitions.max(1)).unwrap_or(u32::MAX);
        let fetched_kib = (kib / partitions).clamp(Self::FETCHED_KIB_MIN, Self::FETCHED_KIB_MAX);
        Self { fetched_kib, ..self }
    }
}

impl Default for BatchBounds {
    /// 10,000 records are what one COPY of the warehouse takes well; 4 MiB bound large ones.
    fn default() -> Self {
        Self { records: 10_000, bytes: 4 << 20, fetched_kib: Self::FETCHED_KIB_MAX }
    }
}

/// What a partition's queue had.
#[derive(Debug)]
pub(super) enum Drained {
    /// Nothing.
    Empty,
    /// Records.
    Records(Batch),
    /// The partition was read to its end.
    End,
    /// The position does not exist: retention overtook it, or it lies past the end.
    OutOfRange,
    /// The consumer is beyond repair.
    Fatal(String),
    /// Something that librdkafka goes on trying.
    Trouble(String),
}

/// A partition that the group gave us.
pub(super) struct Partition {
    pub(super) name: TopicPartition,
    queue: PartitionQueue<MemberContext>,
    /// The position of the next record; meaningful once started.
    pub(super) next: i64,
    pub(super) started: bool,
    pub(super) paused: bool,
    /// The group asked for it back: nothing more is delivered.
    pub(super) revoking: bool,
    /// Something found behind records that had to be delivered first.
    after: Option<Drained>,
}

impl Partition {
    /// Takes the partition's records out of the common queue, so that its batches need no sorting and the
    /// end of the partition is known without doubt (rdkafka's event names no topic).
    pub(super) fn split(
        consumer: &Arc<MemberConsumer>,
        name: TopicPartition,
        wake: &Arc<Wake>,
    ) -> Option<Self> {
        let mut queue = consumer.split_partition_queue(&name.topic, name.partition)?;
        let bell = Arc::clone(wake);
        queue.set_nonempty_callback(move || bell.ring());
        Some(Self { name, queue, next: 0, started: false, paused: false, revoking: false, after: None })
    }

    /// Forgets what was found and expects `next`.
    pub(super) fn begin(&mut self, next: i64) {
        (self.next, self.started, self.after) = (next, true, None);
    }

    /// Says whether records may be delivered.
    pub(super) fn delivers(&self) -> bool {
        self.started && !self.paused && !self.revoking
    }

    /// Takes what has come, at most a batch, without waiting.
    pub(super) fn drain(&mut self, bounds: BatchBounds) -> Drained {
        if let Some(found) = self.after.take() {
            return found;
        }
        let mut batch: Option<Batch> = None;
        let found = loop {
            let message = match self.queue.poll(Duration::ZERO) {
                None => break Drained::Empty,
                Some(Err(error)) => break sort(error, &self.name),
                Some(Ok(message)) => message,
            };
            // A seek makes what was fetched before it invisible; this keeps the order even if it did not.
            if message.offset() < self.next {
                continue;
            }
            self.next = message.offset() + 1;
            let batch = batch.get_or_insert_with(|| Batch::new(self.name.clone()));
            push(batch, &message);
            if batch.len() >= bounds.records || batch.bytes_held() >= bounds.bytes {
                break Drained::Empty;
            }
        };
        match batch {
            None => found,
            Some(batch) => {
                self.after = (!matches!(found, Drained::Empty)).then_some(found);
                Drained::Records(batch)
            }
        }
    }
}

fn sort(error: KafkaError, name: &TopicPartition) -> Drained {
    match error {
        KafkaError::PartitionEOF(_) => Drained::End,
        KafkaError::MessageConsumption(
            RDKafkaErrorCode::AutoOffsetReset | RDKafkaErrorCode::OffsetOutOfRange,
        ) => Drained::OutOfRange,
        KafkaError::MessageConsumptionFatal(code) => Drained::Fatal(format!("{name}: {code}")),
        other => Drained::Trouble(format!("cannot read {name}: {other}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_fetched_ahead_is_shared_among_partitions() {
        for (kib, partitions, each) in
            [(131_072, 36, 3_640), (131_072, 2, 8_192), (131_072, 1_000, 1_024), (131_072, 0, 8_192)]
        {
            let bounds = BatchBounds::default().fetching(kib, partitions);
            assert_eq!(bounds.fetched_kib, each, "{kib} KiB among {partitions}");
        }
    }
}
