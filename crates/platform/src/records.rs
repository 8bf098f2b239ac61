//! Records for people: any framed value as JSON, whatever schema it was written under.

use crate::context::Context;
use crate::failure::CliError;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::ops::ControlFlow;
use std::time::Duration;
use throughline_kafka::browse::{Begin, Stop, browse};
use throughline_model::codec::framed_id;
use throughline_model::record::{Outbox, Record};
use throughline_model::time::Timestamp;
use throughline_runtime::ports::{Outlet, SchemaSource};

/// Reads values, fetching schemas that this process has not seen.
pub struct Reader<'a> {
    context: &'a Context,
    registry: throughline_kafka::RegistryClient,
}

impl<'a> Reader<'a> {
    /// Makes a reader.
    pub fn new(context: &'a Context) -> Self {
        Self { context, registry: context.registry() }
    }

    /// Reads a value as JSON; `Err` says why it does not read.
    ///
    /// # Errors
    /// The outer error when the registry cannot be asked.
    pub fn value(&mut self, value: Option<&[u8]>) -> Result<Result<Value, String>, CliError> {
        self.read(value)
    }

    /// Reads a value; `Err` says why it does not read.
    ///
    /// # Errors
    /// As [`Reader::value`].
    pub fn read<T: DeserializeOwned>(&mut self, value: Option<&[u8]>) -> Result<Result<T, String>, CliError> {
        self.learn(value)?;
        Ok(self.context.codec.decode::<T>(value).map_err(|e| e.to_string()))
    }

    /// Fetches the schema that a value names, where it is not known yet. One that the registry does not know
    /// or that is not Avro stays unknown.
    ///
    /// # Errors
    /// As [`Reader::value`].
    pub fn learn(&mut self, value: Option<&[u8]>) -> Result<(), CliError> {
        if let Some(Ok(id)) = value.map(framed_id)
            && !self.context.codec.knows(id)
            && let Some(schema) = self.registry.fetch(id)?
            && let Err(e) = self.context.codec.add(id, &schema)
        {
            tracing::debug!(schema_id = id, "cannot use a schema of the registry: {e}");
        }
        Ok(())
    }
}

/// How long reading a topic to its end may take.
pub const READ_WITHIN: Duration = Duration::from_secs(60);

/// Passes the records that `look` picks on, decoded, from `begin` to the end that each partition has now; no
/// partitions named means all. Values that do not read are left out.
///
/// # Errors
/// When Kafka or the registry cannot be asked, or the end was not reached within [`READ_WITHIN`].
pub fn decoded<T: DeserializeOwned>(
    context: &Context,
    topic: &str,
    partitions: &[i32],
    begin: Begin,
    look: &dyn Fn(&Record<'_>) -> bool,
    take: &mut dyn FnMut(&Record<'_>, T),
) -> Result<(), CliError> {
    let mut reader = Reader::new(context);
    let mut failed = None;
    let stop = Stop::AtEnd { within: READ_WITHIN };
    let complete = browse(&context.kafka(), topic, partitions, begin, stop, &mut |batch| {
        for record in batch.iter().filter(|record| look(record)) {
            match reader.read(record.value) {
                Ok(Ok(value)) => take(&record, value),
                Ok(Err(why)) => tracing::debug!("{}@{}: {why}", batch.source, record.offset),
                Err(error) => {
                    failed = Some(error);
                    return ControlFlow::Break(());
                }
            }
        }
        ControlFlow::Continue(())
    })?;
    match failed {
        Some(error) => Err(error),
        None if !complete => {
            Err(CliError::unreachable(format!("`{topic}` was not read to its end within {READ_WITHIN:?}")))
        }
        None => Ok(()),
    }
}

/// Returns a record's place and headers as JSON.
pub fn place(topic: &str, partition: i32, record: &Record<'_>) -> Value {
    let headers: Vec<Value> = record
        .headers
        .iter()
        .map(|(name, value)| json!({"name": name, "value": header(name, value)}))
        .collect();
    json!({
        "topic": topic,
        "partition": partition,
        "offset": record.offset,
        "timestamp": record.time.to_string(),
        "key": record.key.map(|k| String::from_utf8_lossy(k).into_owned()),
        "headers": headers,
    })
}

/// Spring's numeric headers are big-endian integers; everything else of ours is text.
pub fn header(name: &str, value: &[u8]) -> Value {
    if name.starts_with("kafka_dlt-original-") {
        if let Ok(bytes) = <[u8; 4]>::try_from(value)
            && name.ends_with("partition")
        {
            return i32::from_be_bytes(bytes).into();
        }
        if let Ok(bytes) = <[u8; 8]>::try_from(value)
            && (name.ends_with("offset") || name.ends_with("timestamp"))
        {
            return i64::from_be_bytes(bytes).into();
        }
    }
    match std::str::from_utf8(value) {
        Ok(text) => text.into(),
        Err(_) => hex(value).into(),
    }
}

/// Leaves out fields that say nothing: absent values and empty lists.
pub fn brief(value: &Value) -> Value {
    match value {
        Value::Object(fields) => {
            let says = |v: &Value| !v.is_null() && v.as_array().is_none_or(|list| !list.is_empty());
            fields.iter().filter(|(_, v)| says(v)).map(|(k, v)| (k.clone(), brief(v))).collect()
        }
        Value::Array(items) => items.iter().map(brief).collect(),
        other => other.clone(),
    }
}

/// Writes bytes as hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Sends what a command asks for and waits for Kafka's acknowledgement.
///
/// # Errors
/// Exit code 4 when Kafka does not acknowledge.
pub fn send(context: &Context, outbox: &Outbox) -> Result<(), CliError> {
    let mut producer = throughline_kafka::AckedProducer::new(&context.kafka());
    producer.send_all(outbox).map_err(CliError::from)
}

/// Reads a point in time: RFC 3339, or a span before now such as `10m` or `2h`.
///
/// # Errors
/// A usage error that shows the forms.
pub fn point_in_time(text: &str, now: Timestamp) -> Result<Timestamp, CliError> {
    if let Ok(time) = text.parse::<jiff::Timestamp>() {
        return Ok(Timestamp(time.as_microsecond()));
    }
    let unit = text.chars().last();
    let seconds_each = match unit {
        Some('s') => 1,
        Some('m') => 60,
        Some('h') => 3_600,
        Some('d') => 86_400,
        _ => 0,
    };
    let amount: Option<u64> = text.get(..text.len().saturating_sub(1)).and_then(|n| n.parse().ok());
    match amount.filter(|_| seconds_each > 0) {
        Some(amount) => Ok(now.minus(std::time::Duration::from_secs(amount.saturating_mul(seconds_each)))),
        None => Err(CliError::usage(format!(
            "`{text}` is no point in time: write `2026-01-31T10:00:00Z`, or `90s`, `10m`, `2h`, `3d` before now"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn points_in_time_are_absolute_or_before_now() {
        let now = Timestamp(1_000_000_000_000_000);
        for (text, expected) in [("10m", now.0 - 600_000_000), ("1970-01-01T00:00:01Z", 1_000_000)] {
            assert_eq!(point_in_time(text, now).expect(text).0, expected);
        }
        for text in ["", "m", "yesterday", "10", "µ"] {
            assert!(point_in_time(text, now).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn headers_and_points_in_time_of_any_form_are_shown_or_refused(
            name in prop::sample::select(vec!["kafka_dlt-original-offset", "kafka_dlt-original-partition", "tl-x"]),
            value in prop::collection::vec(any::<u8>(), 0..12),
            text in "\\PC{0,4}[0-9]{0,20}[smhdµ]?",
        ) {
            prop_assert!(!header(name, &value).is_null());
            let now = Timestamp(1_000_000_000_000_000);
            if let Ok(time) = point_in_time(&text, now) {
                prop_assert!(time <= now || text.contains('-'), "{}", text);
            }
        }
    }

    #[test]
    fn springs_numeric_headers_read_as_numbers() {
        assert_eq!(header("kafka_dlt-original-offset", &7i64.to_be_bytes()), json!(7));
        assert_eq!(header("kafka_dlt-original-partition", &3i32.to_be_bytes()), json!(3));
        assert_eq!(header("tl-mqtt-topic", b"a/b"), json!("a/b"));
        assert_eq!(header("other", &[0xff]), json!("ff"));
    }
}
