//! Spans of batches, with the attributes of OpenTelemetry's messaging conventions.
//!
//! One span covers a batch, never a record. Without a subscriber that wants them a span costs a load.

use tracing::Span;

/// The target of these spans: the human log leaves them out, the OTLP layer takes them.
pub(crate) const TARGET: &str = "throughline::spans";

/// Which records a span is about.
#[derive(Clone, Copy, Debug)]
pub struct BatchOf<'a> {
    /// The topic.
    pub topic: &'a str,
    /// The partition, where it is one.
    pub partition: Option<i32>,
    /// The group that reads, empty for a producer.
    pub group: &'a str,
    /// The offset of the first record, where it is known.
    pub offset: Option<i64>,
    /// How many records.
    pub count: usize,
}

/// Begins `send T`: records are handed to Kafka.
pub fn send(batch: BatchOf<'_>) -> Span {
    messaging("send", "send", "producer", batch)
}

/// Begins `poll T`: records are taken from Kafka.
pub fn poll(batch: BatchOf<'_>) -> Span {
    messaging("poll", "receive", "client", batch)
}

/// Begins `process T`: a stage works on records.
pub fn process(batch: BatchOf<'_>) -> Span {
    messaging("process", "process", "consumer", batch)
}

/// Begins `commit T`: outputs, state and offsets become final.
pub fn commit(batch: BatchOf<'_>) -> Span {
    messaging("commit", "settle", "client", batch)
}

/// Marks the span as failed with a stable code. A failed span is kept whatever the sampling ratio is, as
/// long as no sampling decision was made for it elsewhere.
pub fn failed(span: &Span, code: &str, message: &str) {
    span.record("error.type", code);
    span.record("otel.status_code", "ERROR");
    span.record("otel.status_description", message);
}

fn messaging(name: &'static str, kind: &'static str, otel_kind: &'static str, batch: BatchOf<'_>) -> Span {
    tracing::info_span!(
        target: TARGET,
        "messaging",
        otel.name = format_args!("{name} {}", batch.topic),
        otel.kind = otel_kind,
        otel.status_code = tracing::field::Empty,
        otel.status_description = tracing::field::Empty,
        error.type = tracing::field::Empty,
        messaging.system = "kafka",
        messaging.operation.name = name,
        messaging.operation.type = kind,
        messaging.destination.name = batch.topic,
        messaging.destination.partition.id = batch.partition.map(tracing::field::display),
        messaging.consumer.group.name = (!batch.group.is_empty()).then_some(batch.group),
        messaging.kafka.offset = batch.offset,
        messaging.batch.message_count = batch.count as u64,
    )
}
