//! Records in and out: between librdkafka's messages and the model's batches.

use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{BorrowedMessage, Header, Message, OwnedHeaders, Timestamp as Stamp};
use rdkafka::producer::{BaseProducer, BaseRecord, DeliveryResult, Producer, ProducerContext};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use rdkafka::util::IntoOpaque;
use std::time::Duration;
use throughline_model::record::{Batch, Outgoing, TopicPartition};
use throughline_model::time::Timestamp;

/// Appends a message to a batch.
pub(crate) fn push(batch: &mut Batch, message: &BorrowedMessage<'_>) {
    let time = time_of(message);
    let headers = throughline_kafka_ffi::headers(message);
    batch.push(message.offset(), time, message.key(), message.payload(), headers);
}

/// Returns the broker's time of a message, or the producer's where the topic keeps that.
pub(crate) fn time_of(message: &BorrowedMessage<'_>) -> Timestamp {
    match message.timestamp() {
        Stamp::LogAppendTime(ms) | Stamp::CreateTime(ms) => Timestamp::from_millis(ms),
        Stamp::NotAvailable => Timestamp(0),
    }
}

/// Hands a record to a producer. librdkafka copies it, so the buffer may be reused at once.
pub(crate) fn produce<C: ProducerContext>(
    producer: &BaseProducer<C>,
    record: Outgoing<'_>,
    opaque: C::DeliveryOpaque,
) -> Result<(), KafkaError>
where
    C::DeliveryOpaque: IntoOpaque,
{
    let mut out = BaseRecord::<[u8], [u8], _>::with_opaque_to(record.topic, opaque);
    out.partition = record.partition;
    out.key = record.key;
    out.payload = record.value;
    out.headers = owned_headers(record);
    producer.send(out).map_err(|(error, _)| error)
}

/// Returns what a delivery report says against its record being in Kafka, with the record.
///
/// An error is one thing; a report of success without an offset is the other. librdkafka 2.12.1 takes a batch
/// whose request failed for persisted once a later batch of the partition is acknowledged
/// (`rd_kafka_dr_implicit_ack`), because a broker refuses what does not follow on. But a broker that knows
/// nothing of the producer yet takes any sequence: where the first batch for a partition meets a leader that is
/// not ready and the second one does not, the first is lost and reported as delivered. What Kafka has
/// acknowledged has an offset.
pub(crate) fn unproven<'r>(
    result: &'r DeliveryResult<'r>,
) -> Option<(RDKafkaErrorCode, &'r BorrowedMessage<'r>)> {
    match result {
        Ok(message) if message.offset() >= 0 => None,
        Ok(message) => Some((RDKafkaErrorCode::RequestTimedOut, message)),
        Err((error, message)) => {
            Some((error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Fail), message))
        }
    }
}

/// A pause where a producer has nothing to report: short beside a round trip to the broker.
const PAUSE: Duration = Duration::from_micros(250);

/// Serves what a producer has to report, and sleeps for a moment where that was nothing.
///
/// rdkafka's `poll` keeps calling librdkafka until its time is over, and librdkafka counts in milliseconds:
/// the last one of every `poll` is spent spinning.
pub(crate) fn serve<C: ProducerContext>(producer: &BaseProducer<C>) {
    let before = producer.in_flight_count();
    producer.poll(Duration::ZERO);
    if producer.in_flight_count() == before {
        std::thread::sleep(PAUSE);
    }
}

fn owned_headers(record: Outgoing<'_>) -> Option<OwnedHeaders> {
    let count = record.headers.iter().count();
    if count == 0 {
        return None;
    }
    let mut headers = OwnedHeaders::new_with_capacity(count);
    for (key, value) in record.headers.iter() {
        headers = headers.insert(Header { key, value: Some(value) });
    }
    Some(headers)
}

/// Makes librdkafka's list of partitions with offsets.
pub(crate) fn list<'a>(
    partitions: impl IntoIterator<Item = (&'a TopicPartition, i64)>,
) -> TopicPartitionList {
    let mut list = TopicPartitionList::new();
    for (partition, offset) in partitions {
        list.add_partition_offset(&partition.topic, partition.partition, Offset::Offset(offset))
            .expect("any offset from 0 can be represented");
    }
    list
}

/// Makes librdkafka's list of partitions without offsets.
pub(crate) fn bare_list<'a>(partitions: impl IntoIterator<Item = &'a TopicPartition>) -> TopicPartitionList {
    let mut list = TopicPartitionList::new();
    for partition in partitions {
        list.add_partition(&partition.topic, partition.partition);
    }
    list
}
