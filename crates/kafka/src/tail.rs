//! Reads partitions of one topic without being a member of a group: tables, and what operators look at.

use crate::bounds::list_offsets;
use crate::config::{KafkaConfig, REQUEST_TIMEOUT};
use crate::context::Logging;
use crate::failure::{by_code, dependency, failure, ffi_failure, refused_config};
use crate::message::push;
use rdkafka::config::FromClientConfigAndContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::Message;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use std::collections::HashMap;
use std::time::{Duration, Instant};
use throughline_kafka_ffi::OffsetSpec;
use throughline_model::record::{Batch, TopicPartition};
use throughline_runtime::ports::Failure;

/// Batches are cut here; large ones spare the reader calls, and the bytes bound the memory.
const RECORDS_MAX: usize = 10_000;
const BYTES_MAX: usize = 4 << 20;

/// What came.
#[derive(Debug)]
pub(crate) enum Tailed {
    /// Records of one partition.
    Records(Batch),
    /// The partition was read to its end.
    End(i32),
    /// Nothing within the time asked for.
    Nothing,
}

/// A consumer with partitions of one topic that it chose itself.
pub(crate) struct Tail {
    consumer: BaseConsumer<Logging>,
    topic: std::sync::Arc<str>,
    /// Found behind records that had to be delivered first.
    after: Option<Tailed>,
}

impl Tail {
    /// Makes a consumer. With `committed_only` open transactions hold it back and aborted ones are skipped.
    pub(crate) fn new(config: &KafkaConfig, topic: &str, committed_only: bool) -> Result<Self, Failure> {
        // librdkafka assigns only to a consumer that names a group; nothing is ever joined or committed.
        let mut client = config.reader(&format!("{}-reader", config.client_id));
        // A table may be compacted away beneath a reader; what it needs is read again from the beginning.
        client.set("auto.offset.reset", "earliest");
        if !committed_only {
            client.set("isolation.level", "read_uncommitted");
        }
        let consumer =
            BaseConsumer::from_config_and_context(&client, Logging).map_err(|e| refused_config(&e))?;
        Ok(Self { consumer, topic: topic.into(), after: None })
    }

    pub(crate) fn topic(&self) -> &str {
        &self.topic
    }

    /// Reads other partitions from now on, each from the offset given; what was fetched is forgotten.
    pub(crate) fn assign(&mut self, partitions: &[(i32, i64)]) -> Result<(), Failure> {
        self.after = None;
        let mut list = TopicPartitionList::new();
        for (partition, offset) in partitions {
            list.add_partition_offset(&self.topic, *partition, Offset::Offset(*offset))
                .expect("any offset from 0 can be represented");
        }
        self.consumer.assign(&list).map_err(|e| failure(&format!("cannot read `{}`", self.topic), &e))
    }

    /// Takes what has come, waiting at most `wait` for the first of it.
    pub(crate) fn poll(&mut self, wait: Duration) -> Result<Tailed, Failure> {
        if let Some(after) = self.after.take() {
            return Ok(after);
        }
        let mut batch: Option<Batch> = None;
        let mut patience = wait;
        loop {
            let message = match self.consumer.poll(patience) {
                None if batch.is_some() || patience.is_zero() => break,
                // A log line may have been served instead: the caller counts the time.
                None => return Ok(Tailed::Nothing),
                Some(Ok(message)) => message,
                Some(Err(KafkaError::PartitionEOF(partition))) => {
                    let Some(batch) = batch else { return Ok(Tailed::End(partition)) };
                    self.after = Some(Tailed::End(partition));
                    return Ok(Tailed::Records(batch));
                }
                Some(Err(error)) => match is_passing(&error) {
                    true => {
                        patience = patience.min(Duration::from_millis(10));
                        continue;
                    }
                    false => return Err(failure(&format!("cannot read `{}`", self.topic), &error)),
                },
            };
            patience = Duration::ZERO;
            let source = message.partition();
            let current = batch.get_or_insert_with(|| self.empty(source));
            if current.source.partition == source {
                push(current, &message);
                if current.len() >= RECORDS_MAX || current.bytes_held() >= BYTES_MAX {
                    break;
                }
            } else {
                // The partition changed: this record opens the next batch.
                let mut next = self.empty(source);
                push(&mut next, &message);
                self.after = Some(Tailed::Records(next));
                break;
            }
        }
        Ok(batch.map_or(Tailed::Nothing, Tailed::Records))
    }

    fn empty(&self, partition: i32) -> Batch {
        Batch::new(TopicPartition { topic: std::sync::Arc::clone(&self.topic), partition })
    }

    /// Returns the topic's partitions.
    pub(crate) fn partitions(&self) -> Result<Vec<i32>, Failure> {
        let what = format!("cannot ask for the partitions of `{}`", self.topic);
        let metadata = self.consumer.fetch_metadata(Some(&self.topic), REQUEST_TIMEOUT);
        let metadata = metadata.map_err(|e| failure(&what, &e))?;
        let found = metadata.topics().iter().find(|t| t.name() == &*self.topic);
        match found {
            Some(topic) if topic.error().is_none() && !topic.partitions().is_empty() => {
                Ok(topic.partitions().iter().map(|p| p.id()).collect())
            }
            _ => {
                let code = RDKafkaErrorCode::UnknownTopicOrPartition;
                Err(by_code(&what, code, &code.to_string()))
            }
        }
    }

    /// Returns one bound of each partition.
    pub(crate) fn bounds(
        &self,
        partitions: &[i32],
        spec: OffsetSpec,
        committed_only: bool,
    ) -> Result<HashMap<i32, i64>, Failure> {
        let what = format!("cannot ask for the bounds of `{}`", self.topic);
        let asked: Vec<_> = partitions.iter().map(|p| (&*self.topic, *p)).collect();
        let found = list_offsets(self.consumer.client(), &asked, spec, committed_only, REQUEST_TIMEOUT);
        let found = found.map_err(|e| ffi_failure(&what, &e))?;
        match found.iter().find_map(|entry| entry.error) {
            None => Ok(found.into_iter().map(|entry| (entry.partition, entry.offset)).collect()),
            Some(code) => Err(by_code(&what, code, &code.to_string())),
        }
    }

    /// Returns the ends for readers of committed data, or `None` where the cluster does not answer `within`. An
    /// end is absent where the client does not find the partition's leader.
    pub(crate) fn ends_within(&self, partitions: &[i32], within: Duration) -> Option<HashMap<i32, i64>> {
        let asked: Vec<_> = partitions.iter().map(|p| (&*self.topic, *p)).collect();
        let found = list_offsets(self.consumer.client(), &asked, OffsetSpec::Latest, true, within).ok()?;
        Some(found.into_iter().filter(|e| e.error.is_none()).map(|e| (e.partition, e.offset)).collect())
    }

    /// Returns the high watermarks as of now, once nothing below them belongs to an open transaction.
    ///
    /// A reader of committed data that starts afterwards and reports the end of a partition has therefore
    /// seen all that was written before this call, whatever control records lie at the end.
    pub(crate) fn settled_ends(
        &self,
        partitions: &[i32],
        timeout: Duration,
    ) -> Result<HashMap<i32, i64>, Failure> {
        let highs = self.bounds(partitions, OffsetSpec::Latest, false)?;
        let deadline = Instant::now() + timeout;
        loop {
            let stable = self.bounds(partitions, OffsetSpec::Latest, true)?;
            let open = highs.iter().find(|(p, high)| stable.get(p).is_none_or(|s| s < high));
            match open {
                None => return Ok(highs),
                Some((partition, high)) if Instant::now() > deadline => {
                    return Err(dependency(format!(
                        "an open transaction holds {}/{partition} back before {high} for more than {} s",
                        self.topic,
                        timeout.as_secs()
                    )));
                }
                Some(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }
}

/// Says whether librdkafka goes on by itself after an error.
fn is_passing(error: &KafkaError) -> bool {
    matches!(
        error.rdkafka_error_code(),
        Some(
            RDKafkaErrorCode::BrokerTransportFailure
                | RDKafkaErrorCode::AllBrokersDown
                | RDKafkaErrorCode::OperationTimedOut
                | RDKafkaErrorCode::Resolve
                | RDKafkaErrorCode::NotLeaderForPartition
                | RDKafkaErrorCode::LeaderNotAvailable
        )
    )
}
