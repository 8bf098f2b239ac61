//! The documented vectors hold: `values.json` (a record, its schema and its framed bytes) and
//! `identity.json` (ids, hashes, partitions). docs/envelope.md describes both for other languages; they
//! were written by an implementation that shares no code with this one.

use super::oracle::{read, schema_text, subjects, write};
use apache_avro::Schema;
use serde::Deserialize;
use throughline_model::codec::Codec;
use throughline_model::ids::{
    TraceId, derived_message_id, murmur2, partition_of, sequence_message_id, timed_message_id,
};
use throughline_model::time::Timestamp;
use uuid::Uuid;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ValueVector {
    name: String,
    topic: String,
    schema_id: u32,
    value: serde_json::Value,
    hex: String,
}

#[test]
fn values_have_the_documented_bytes() {
    let vectors: Vec<ValueVector> = serde_json::from_str(include_str!("values.json")).expect("JSON");
    for subject in subjects() {
        assert!(vectors.iter().any(|v| v.topic == subject.topic), "`{}` has no vector", subject.topic);
    }
    for vector in vectors {
        let subject = subjects().into_iter().find(|s| s.topic == vector.topic).expect("a catalog topic");
        let codec = Codec::default();
        codec.bind(subject.topic, vector.schema_id, schema_text(subject.topic)).expect("sound");
        let bytes = (subject.from_json)(&codec, subject.topic, &vector.value);
        assert_eq!(hex(&bytes), vector.hex, "{}", vector.name);
        let again = (subject.round_trip)(&codec, subject.topic, &bytes).expect("reads");
        assert_eq!(hex(&again), vector.hex, "{}", vector.name);
        let schema = Schema::parse_str(schema_text(subject.topic)).expect("sound");
        assert_eq!(write(&schema, &read(&schema, None, &bytes[5..])), bytes[5..], "{}", vector.name);
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Identity {
    partitions: Vec<PartitionVector>,
    sequence_message_ids: Vec<SequenceVector>,
    derived_message_ids: Vec<DerivedVector>,
    timed_message_ids: Vec<TimedVector>,
    traces: Vec<TraceVector>,
}

#[derive(Deserialize)]
struct PartitionVector {
    key: String,
    murmur2: u32,
    partitions: i32,
    partition: i32,
}

#[derive(Deserialize)]
struct SequenceVector {
    ts: Option<i64>,
    site: String,
    device: String,
    stream: String,
    epoch: i64,
    seq: i64,
    element: String,
    message_id: Uuid,
}

#[derive(Deserialize)]
struct DerivedVector {
    parent: Uuid,
    stage: String,
    output_key: String,
    message_id: Uuid,
}

#[derive(Deserialize)]
struct TimedVector {
    at: i64,
    stage: String,
    output_key: String,
    device: String,
    message_id: Uuid,
}

#[derive(Deserialize)]
struct TraceVector {
    birth: i64,
    key: String,
    random: String,
    trace_id: String,
    partitions: i32,
    partition: i32,
    message_id: Uuid,
    traceparent: String,
}

#[test]
fn ids_hashes_and_partitions_are_as_documented() {
    let vectors: Identity = serde_json::from_str(include_str!("identity.json")).expect("JSON");
    for v in vectors.partitions {
        assert_eq!(murmur2(v.key.as_bytes()), v.murmur2, "{}", v.key);
        assert_eq!(partition_of(v.key.as_bytes(), v.partitions), v.partition, "{}", v.key);
    }
    for v in vectors.sequence_message_ids {
        let time = v.ts.map(Timestamp);
        let element = v.element.as_bytes();
        let id = sequence_message_id(time, &v.site, &v.device, &v.stream, v.epoch, v.seq, element);
        assert_eq!(id, v.message_id, "{}", v.element);
    }
    for v in vectors.derived_message_ids {
        assert_eq!(derived_message_id(v.parent, &v.stage, &v.output_key), v.message_id, "{}", v.output_key);
    }
    for v in vectors.timed_message_ids {
        let id = timed_message_id(Timestamp(v.at), &v.stage, &v.output_key, &v.device);
        assert_eq!(id, v.message_id, "{}", v.output_key);
    }
    for v in vectors.traces {
        let random = u64::from_str_radix(&v.random, 16).expect("16 digits");
        let id = TraceId::mint(Timestamp(v.birth), v.key.as_bytes(), random);
        assert_eq!(id.to_hex(), v.trace_id);
        assert_eq!(id.partition(v.partitions), v.partition);
        assert_eq!(id.traceparent(v.message_id), v.traceparent);
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
