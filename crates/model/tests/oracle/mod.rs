//! apache-avro's generic reader and writer as the oracle, and arbitrary values of a schema.

use apache_avro::Schema;
use apache_avro::reader::datum::GenericDatumReader;
use apache_avro::types::Value;
use apache_avro::writer::datum::GenericDatumWriter;
use proptest::collection::vec;
use proptest::prelude::*;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::HashMap;
use throughline_model::codec::{Codec, CodecError};
use throughline_model::envelope::{
    Alert, Command, DeadLetterProgress, DeadLetterRequest, DeviceMessage, Enveloped, IDENTITY_SEQUENCE,
    Locator, RuleRecord, Session, Twin, TwinRequest, TwinResponse,
};
use throughline_model::seq_runs::Streams;
use throughline_model::topics as t;

/// Reads framed bytes as a topic's record type and writes them again.
pub type RoundTrip = fn(&Codec, &str, &[u8]) -> Result<Vec<u8>, CodecError>;

/// Writes the JSON of a topic's record type.
pub type FromJson = fn(&Codec, &str, &serde_json::Value) -> Vec<u8>;

/// A catalog topic with its record type.
#[derive(Clone, Copy)]
pub struct Subject {
    /// The topic.
    pub topic: &'static str,
    /// See [`RoundTrip`].
    pub round_trip: RoundTrip,
    /// See [`FromJson`].
    pub from_json: FromJson,
}

/// Every topic of the catalog with its record type.
pub fn subjects() -> Vec<Subject> {
    fn subject<T: Serialize + DeserializeOwned>(topic: &'static str) -> Subject {
        Subject { topic, round_trip: round_trip::<T>, from_json: from_json::<T> }
    }
    vec![
        subject::<DeviceMessage>(t::DEVICE_TELEMETRY_V1),
        subject::<DeviceMessage>(t::DEVICE_EVENT_V1),
        subject::<DeviceMessage>(t::DEVICE_HEARTBEAT_V1),
        subject::<DeviceMessage>(t::DEVICE_RESPONSE_V1),
        subject::<DeviceMessage>(t::DEVICE_REPORTED_V1),
        subject::<DeviceMessage>(t::DATA_CORE_READING_V1),
        subject::<DeviceMessage>(t::DATA_CORE_FORWARDED_V1),
        subject::<Session>(t::DEVICE_SESSION_V1),
        subject::<Command>(t::DEVICE_COMMAND_V1),
        subject::<Alert>(t::SERVICE_PLATFORM_ALERT_V1),
        subject::<DeadLetterRequest>(t::SERVICE_PLATFORM_DEAD_LETTER_REQUEST_V1),
        subject::<DeadLetterProgress>(t::SERVICE_PLATFORM_DEAD_LETTER_PROGRESS_V1),
        subject::<Locator>(t::SERVICE_PLATFORM_LOCATOR_V1),
        subject::<RuleRecord>(t::SERVICE_PLATFORM_RULE_V1),
        subject::<Twin>(t::SERVICE_PLATFORM_TWIN_V1),
        subject::<TwinRequest>(t::SERVICE_PLATFORM_TWIN_REQUEST_V1),
        subject::<TwinResponse>(t::SERVICE_PLATFORM_TWIN_RESPONSE_V1),
    ]
}

fn round_trip<T: Serialize + DeserializeOwned>(
    codec: &Codec,
    topic: &str,
    framed: &[u8],
) -> Result<Vec<u8>, CodecError> {
    let value: T = codec.decode(Some(framed))?;
    let mut out = Vec::new();
    codec.encode(topic, &value, &mut out)?;
    Ok(out)
}

fn from_json<T: Serialize + DeserializeOwned>(
    codec: &Codec,
    topic: &str,
    json: &serde_json::Value,
) -> Vec<u8> {
    let value: T = serde_json::from_value(json.clone()).expect("the vector's value has the record's form");
    let mut out = Vec::new();
    codec.encode(topic, &value, &mut out).expect("the value fits its schema");
    out
}

/// Returns the text of a topic's schema.
pub fn schema_text(topic: &str) -> &'static str {
    let file = format!("{topic}.avsc");
    t::SCHEMA_FILES
        .iter()
        .find(|(name, _)| *name == file)
        .map(|(_, text)| *text)
        .expect("every topic has one")
}

/// Frames a datum as Confluent does.
pub fn framed(id: u32, datum: &[u8]) -> Vec<u8> {
    let mut out = vec![0];
    out.extend_from_slice(&id.to_be_bytes());
    out.extend_from_slice(datum);
    out
}

/// Writes with apache-avro's generic writer.
pub fn write(schema: &Schema, value: &Value) -> Vec<u8> {
    let writer = GenericDatumWriter::builder(schema).build().expect("a sound schema");
    let mut out = Vec::new();
    writer.write_value_ref(&mut out, value).expect("the value fits");
    out
}

/// Reads with apache-avro's generic reader, resolved to `reader` where it is given.
pub fn read(writer: &Schema, reader: Option<&Schema>, datum: &[u8]) -> Value {
    let built =
        GenericDatumReader::builder(writer).maybe_reader_schema(reader).build().expect("a sound schema");
    let mut rest = datum;
    let value = built.read_value(&mut rest).expect("the datum fits");
    assert!(rest.is_empty(), "{} bytes are left", rest.len());
    value
}

/// Returns arbitrary values of a schema, extremes included.
pub fn values(schema: &Schema) -> BoxedStrategy<Value> {
    let mut names = HashMap::new();
    collect(schema, &mut names);
    value(schema, &names)
}

fn collect(schema: &Schema, names: &mut HashMap<String, Schema>) {
    match schema {
        Schema::Record(record) => {
            names.insert(record.name.to_string(), schema.clone());
            record.fields.iter().for_each(|f| collect(&f.schema, names));
        }
        Schema::Array(array) => collect(&array.items, names),
        Schema::Union(union) => union.variants().iter().for_each(|v| collect(v, names)),
        _ => {}
    }
}

fn text() -> impl Strategy<Value = String> {
    prop_oneof![3 => "[a-z0-9/_.-]{0,20}", 1 => any::<String>()]
}

fn value(schema: &Schema, names: &HashMap<String, Schema>) -> BoxedStrategy<Value> {
    match schema {
        Schema::Null => Just(Value::Null).boxed(),
        Schema::Boolean => any::<bool>().prop_map(Value::Boolean).boxed(),
        Schema::Long => any::<i64>().prop_map(Value::Long).boxed(),
        Schema::TimestampMicros => any::<i64>().prop_map(Value::TimestampMicros).boxed(),
        Schema::Int => any::<i32>().prop_map(Value::Int).boxed(),
        Schema::Double => proptest::num::f64::ANY.prop_map(Value::Double).boxed(),
        Schema::String => text().prop_map(Value::String).boxed(),
        Schema::Uuid(_) => any::<u128>().prop_map(|n| Value::Uuid(uuid::Uuid::from_u128(n))).boxed(),
        Schema::Array(array) => vec(value(&array.items, names), 0..4).prop_map(Value::Array).boxed(),
        Schema::Union(union) => {
            let branches: Vec<BoxedStrategy<Value>> =
                union.variants().iter().map(|v| value(v, names)).collect();
            (0..branches.len())
                .prop_flat_map(move |i| {
                    branches[i].clone().prop_map(move |v| Value::Union(i as u32, Box::new(v)))
                })
                .boxed()
        }
        Schema::Record(record) => {
            let fields: Vec<BoxedStrategy<(String, Value)>> = record
                .fields
                .iter()
                .map(|f| {
                    let name = f.name.clone();
                    let of = if name == "runs" { runs() } else { value(&f.schema, names) };
                    of.prop_map(move |v| (name.clone(), v)).boxed()
                })
                .collect();
            fields.prop_map(Value::Record).boxed()
        }
        Schema::Ref { name } => value(&names[&name.to_string()], names),
        other => panic!("the catalog uses a type that the oracle does not know yet: {other:?}"),
    }
}

/// A twin's runs are a text with a form of its own: nothing, or what the runs themselves write.
fn runs() -> BoxedStrategy<Value> {
    let admitted = |sequences: Vec<(i64, i64)>| {
        let mut streams = Streams::default();
        for (epoch, seq) in sequences {
            let message = DeviceMessage {
                identity: IDENTITY_SEQUENCE.to_owned(),
                stream: "telemetry".to_owned(),
                epoch: Some(epoch),
                seq: Some(seq),
                ..DeviceMessage::default()
            };
            let _ = streams.admit(&message.envelope());
        }
        let text = serde_json::to_string(&streams).expect("runs are JSON");
        Value::Union(1, Box::new(Value::String(text)))
    };
    prop_oneof![
        Just(Value::Union(0, Box::new(Value::Null))),
        vec((0i64..3, 0i64..200), 0..20).prop_map(admitted),
    ]
    .boxed()
}
