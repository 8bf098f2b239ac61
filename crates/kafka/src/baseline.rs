//! Plain librdkafka: what `throughline bench` measures its roles beside. The client settings are those of
//! the adapter (acks=all, idempotence, lz4; committed records only), with nothing around them.

use crate::config::KafkaConfig;
use crate::context::{Logging, log_error, log_line};
use crate::failure::{dependency, failure, refused_config};
use crate::message::{produce as hand_over, serve};
use crate::tail::Tail;
use rdkafka::ClientContext;
use rdkafka::config::{FromClientConfigAndContext, RDKafkaLogLevel};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::{BaseProducer, DeliveryResult, Producer, ProducerContext};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use throughline_model::record::Outbox;
use throughline_runtime::ports::Failure;

/// Deliveries are served after so many records.
const SERVED_EACH: u64 = 1_000;

struct Counting {
    failed: Arc<AtomicU64>,
}

impl ClientContext for Counting {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        log_line(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        log_error(&error, reason);
    }
}

impl ProducerContext for Counting {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        if result.is_err() {
            self.failed.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Writes `records` records, those of `samples` again and again, and returns the time to the last
/// acknowledgement.
///
/// # Errors
/// [`Failure::Dependency`] when a record was not acknowledged or `limit` has passed.
///
/// # Panics
/// When `samples` is empty.
pub fn produce(
    config: &KafkaConfig,
    samples: &Outbox,
    records: u64,
    limit: Duration,
) -> Result<Duration, Failure> {
    assert!(!samples.is_empty(), "there is something to write");
    let failed = Arc::new(AtomicU64::new(0));
    let context = Counting { failed: Arc::clone(&failed) };
    let producer =
        BaseProducer::from_config_and_context(&config.writer(), context).map_err(|e| refused_config(&e))?;
    let begun = Instant::now();
    let mut sent = 0;
    for sample in (0..samples.len()).cycle() {
        if sent == records {
            break;
        }
        loop {
            match hand_over(&producer, samples.get(sample), ()) {
                Ok(()) => break,
                Err(KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull))
                    if begun.elapsed() < limit =>
                {
                    serve(&producer);
                }
                Err(error) => return Err(failure("cannot write the plain records", &error)),
            }
        }
        sent += 1;
        if sent % SERVED_EACH == 0 {
            producer.poll(Duration::ZERO);
        }
    }
    producer
        .flush(limit.saturating_sub(begun.elapsed()))
        .map_err(|e| failure("the plain records were not acknowledged", &e))?;
    match failed.load(Ordering::Relaxed) {
        0 => Ok(begun.elapsed()),
        failed => Err(dependency(format!("{failed} of {records} plain records were refused"))),
    }
}

/// Reads every record of a topic and returns their number and the time from the first to the last.
///
/// # Errors
/// [`Failure::Dependency`] when the topic cannot be read to its end within `limit`.
pub fn consume(config: &KafkaConfig, topic: &str, limit: Duration) -> Result<(u64, Duration), Failure> {
    let partitions = Tail::new(config, topic, true)?.partitions()?;
    let client = config.reader(&format!("{}-reader", config.client_id));
    let consumer: BaseConsumer<Logging> =
        BaseConsumer::from_config_and_context(&client, Logging).map_err(|e| refused_config(&e))?;
    let mut list = TopicPartitionList::new();
    for partition in &partitions {
        list.add_partition_offset(topic, *partition, Offset::Beginning)
            .expect("the beginning can be represented");
    }
    consumer.assign(&list).map_err(|e| failure(&format!("cannot read `{topic}`"), &e))?;
    let deadline = Instant::now() + limit;
    let (mut begun, mut last) = (None, Instant::now());
    let (mut read, mut ended) = (0, 0);
    while ended < partitions.len() {
        match consumer.poll(Duration::from_millis(100)) {
            Some(Ok(_)) => {
                begun.get_or_insert_with(Instant::now);
                read += 1;
            }
            Some(Err(KafkaError::PartitionEOF(_))) => {
                ended += 1;
                last = Instant::now();
            }
            Some(Err(error)) => return Err(failure(&format!("cannot read `{topic}`"), &error)),
            None if Instant::now() > deadline => {
                return Err(dependency(format!("`{topic}` was not read within {} s", limit.as_secs())));
            }
            None => {}
        }
    }
    Ok((read, begun.map(|begun| last.saturating_duration_since(begun)).unwrap_or_default()))
}
