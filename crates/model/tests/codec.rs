//! The codec is equal to apache-avro's generic reader and writer, record type by record type, under the
//! schema of this build and under older and newer ones.

mod oracle;
mod vectors;

use apache_avro::Schema;
use apache_avro::schema_compatibility::SchemaCompatibility;
use apache_avro::types::Value;
use oracle::{Subject, framed, read, schema_text, subjects, values, write};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Value as Json, json};
use throughline_model::catalog::schema::compare;
use throughline_model::codec::{Codec, CodecError};
use throughline_model::envelope::DeviceMessage;

const ID: u32 = 7;
const OTHER_ID: u32 = 8;

/// The envelope's fields that a schema may lack.
const OPTIONAL: [&str; 9] = [
    "request_id",
    "request_code",
    "response_code",
    "reason",
    "agent_version",
    "config_version",
    "epoch",
    "seq",
    "clock_offset",
];

fn runner(cases: u32) -> TestRunner {
    TestRunner::new(Config { cases, failure_persistence: None, ..Config::default() })
}

fn codec_of(subject: &Subject) -> (Codec, Schema) {
    let codec = Codec::default();
    codec.bind(subject.topic, ID, schema_text(subject.topic)).expect("a sound schema");
    (codec, Schema::parse_str(schema_text(subject.topic)).expect("a sound schema"))
}

#[test]
fn every_topic_of_the_catalog_has_a_record_type() {
    let mut known: Vec<String> = subjects().iter().map(|s| format!("{}.avsc", s.topic)).collect();
    known.sort();
    let files: Vec<&str> = throughline_model::topics::SCHEMA_FILES.iter().map(|(name, _)| *name).collect();
    assert_eq!(known, files, "a new schema needs its record type in this test");
}

#[test]
fn reading_and_writing_equal_apache_avro_byte_for_byte() {
    for subject in subjects() {
        let (codec, schema) = codec_of(&subject);
        let outcome = runner(256).run(&values(&schema), |value| {
            let theirs = framed(ID, &write(&schema, &value));
            // Ours reads what they wrote and writes the same bytes, so each field of the schema is a field
            // of the record and the other way round.
            let ours = (subject.round_trip)(&codec, subject.topic, &theirs)
                .map_err(|e| TestCaseError::fail(e.to_string()))?;
            prop_assert_eq!(&ours, &theirs);
            // They read what ours wrote; compared as bytes, because a NaN is not equal to itself.
            prop_assert_eq!(write(&schema, &read(&schema, None, &ours[5..])), &theirs[5..]);
            Ok(())
        });
        outcome.unwrap_or_else(|e| panic!("{}: {e}", subject.topic));
    }
}

/// Removes the optional envelope fields that `mask` marks.
fn older(topic: &str, mask: u16) -> (String, Vec<&'static str>) {
    let mut json: Json = serde_json::from_str(schema_text(topic)).expect("JSON");
    let removed: Vec<&'static str> =
        OPTIONAL.iter().enumerate().filter(|(i, _)| mask & (1 << i) != 0).map(|(_, n)| *n).collect();
    let fields = json["fields"].as_array_mut().expect("a record");
    fields.retain(|f| !removed.iter().any(|r| f["name"] == *r));
    (json.to_string(), removed)
}

/// Inserts a nullable field at `at`, in the record and in the records within it.
fn newer(topic: &str, at: usize) -> String {
    fn add(json: &mut Json, at: usize) {
        match json {
            Json::Object(object) => {
                object.values_mut().for_each(|v| add(v, at));
                if let Some(Json::Array(fields)) = object.get_mut("fields") {
                    let field = json!({"name": "added_later", "type": ["null", "string"], "default": null});
                    let at = at.min(fields.len());
                    fields.insert(at, field);
                }
            }
            Json::Array(items) => items.iter_mut().for_each(|v| add(v, at)),
            _ => {}
        }
    }
    let mut json: Json = serde_json::from_str(schema_text(topic)).expect("JSON");
    add(&mut json, at);
    json.to_string()
}

#[test]
fn values_under_older_and_newer_schemas_read_as_apache_avro_resolves_them() {
    for subject in subjects() {
        let (_, current) = codec_of(&subject);
        let cases = (any::<bool>(), 0u16..512, 0usize..30);
        let outcome = runner(24).run(&cases, |(is_older, mask, at)| {
            let text = if is_older { older(subject.topic, mask).0 } else { newer(subject.topic, at) };
            let other = Schema::parse_str(&text).expect("a sound schema");
            let codec = Codec::default();
            codec.bind(subject.topic, ID, schema_text(subject.topic)).expect("sound");
            codec.add(OTHER_ID, &text).expect("sound");
            let mut inner = runner(8);
            inner
                .run(&values(&other), |value| {
                    let theirs = write(&other, &value);
                    let expected = write(&current, &read(&other, Some(&current), &theirs));
                    let ours = (subject.round_trip)(&codec, subject.topic, &framed(OTHER_ID, &theirs))
                        .map_err(|e| TestCaseError::fail(e.to_string()))?;
                    prop_assert_eq!(&ours[5..], expected);
                    Ok(())
                })
                .map_err(|e| TestCaseError::fail(format!("{text}: {e}")))
        });
        outcome.unwrap_or_else(|e| panic!("{}: {e}", subject.topic));
    }
}

#[test]
fn writing_under_an_older_schema_equals_apache_avro_and_loses_nothing() {
    for subject in subjects() {
        let (_, current) = codec_of(&subject);
        let outcome = runner(24).run(&(1u16..512), |mask| {
            let (text, removed) = older(subject.topic, mask);
            let other = Schema::parse_str(&text).expect("a sound schema");
            let codec = Codec::default();
            codec.bind(subject.topic, OTHER_ID, &text).expect("sound");
            codec.add(ID, schema_text(subject.topic)).expect("sound");
            runner(8)
                .run(&values(&current), |value| {
                    let has_value = |name: &str| match &value {
                        Value::Record(fields) => {
                            fields.iter().any(|(n, v)| n == name && !matches!(v, Value::Union(0, _)))
                        }
                        _ => false,
                    };
                    let loses = removed.iter().any(|name| has_value(name));
                    let theirs = framed(ID, &write(&current, &value));
                    match (subject.round_trip)(&codec, subject.topic, &theirs) {
                        Ok(ours) => {
                            prop_assert!(!loses, "a value was dropped without a word");
                            let expected = write(&other, &read(&current, Some(&other), &theirs[5..]));
                            prop_assert_eq!(&ours[5..], expected);
                        }
                        Err(e) => prop_assert!(loses, "{}", e),
                    }
                    Ok(())
                })
                .map_err(|e| TestCaseError::fail(e.to_string()))
        });
        outcome.unwrap_or_else(|e| panic!("{}: {e}", subject.topic));
    }
}

#[test]
fn our_rule_of_evolution_agrees_with_avros_resolution() {
    for subject in subjects() {
        let text = schema_text(subject.topic);
        let current = Schema::parse_str(text).expect("sound");
        let added = newer(subject.topic, 30);
        let evolution = compare(text, &added).expect("nullable fields may be added");
        assert!(evolution.added.contains(&"added_later".to_owned()), "{:?}", evolution.added);
        let added = Schema::parse_str(&added).expect("sound");
        assert!(SchemaCompatibility::can_read(&current, &added).is_ok());
        assert!(SchemaCompatibility::can_read(&added, &current).is_ok());
        // A renamed field breaks readers by Avro's rules, and is refused by ours.
        let renamed = text.replacen("\"name\": \"stream\"", "\"name\": \"channel\"", 1);
        assert!(compare(text, &renamed).is_err());
        let renamed = Schema::parse_str(&renamed).expect("sound");
        assert!(SchemaCompatibility::can_read(&current, &renamed).is_err());
    }
}

#[test]
fn a_value_that_does_not_read_is_the_datas_fault_and_says_why() {
    let subject = subjects()[0];
    let (codec, _) = codec_of(&subject);
    for (value, code) in [
        (None, "value_absent"),
        (Some(b"".as_slice()), "not_framed"),
        (Some(b"{\"a\":1}"), "not_framed"),
        (Some(b"\x00\x00\x00"), "not_framed"),
        (Some(b"\x00\x00\x00\x00\x09abc"), "unknown_schema"),
        (Some(b"\x00\x00\x00\x00\x07"), "datum_invalid"),
        (Some(b"\x00\x00\x00\x00\x07\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"), "datum_invalid"),
    ] {
        let error = codec.decode::<DeviceMessage>(value).expect_err(code);
        assert_eq!(error.code(), code, "{error}");
    }
    let unbound = codec.encode("device.other.v1", &DeviceMessage::default(), &mut Vec::new());
    assert!(matches!(unbound, Err(CodecError::UnboundTopic(_))));
}

#[test]
fn a_schema_under_which_few_bytes_are_many_items_is_refused() {
    let empty = r#"{"type":"record","name":"E","fields":[{"name":"n","type":"null"}]}"#;
    let none = r#"{"type":"fixed","name":"F","size":0}"#;
    for (items, refused) in [("\"null\"", true), (empty, true), (none, true), ("\"long\"", false)] {
        let text = format!(
            r#"{{"type":"record","name":"R","fields":[{{"name":"x","type":{{"type":"array","items":{items}}}}}]}}"#
        );
        let added = Codec::default().add(ID, &text);
        assert_eq!(matches!(added, Err(CodecError::Schema { .. })), refused, "{items}: {added:?}");
    }
}

#[test]
fn arbitrary_bytes_never_panic_the_reader() {
    for subject in subjects() {
        let (codec, schema) = codec_of(&subject);
        let garbage = proptest::collection::vec(any::<u8>(), 0..200).boxed();
        // Bytes that begin well reach further in than garbage does.
        let damaged = (values(&schema), any::<prop::sample::Index>(), any::<u8>(), any::<bool>())
            .prop_map(move |(value, at, byte, cut)| {
                let mut datum = write(&schema, &value);
                let at = at.index(datum.len());
                if cut {
                    datum.truncate(at)
                } else {
                    datum[at] = byte
                }
                datum
            })
            .boxed();
        let outcome = runner(512).run(&prop_oneof![garbage, damaged], |datum| {
            let _ = (subject.round_trip)(&codec, subject.topic, &framed(ID, &datum));
            let _ = (subject.round_trip)(&codec, subject.topic, &datum);
            Ok(())
        });
        outcome.unwrap_or_else(|e| panic!("{}: {e}", subject.topic));
    }
}
