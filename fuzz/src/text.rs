//! Texts: rules, expressions, topic files, names.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;
use throughline_model::catalog::{Catalog, Filter, TopicName, TopicSpec};
use throughline_model::ids::{DeviceKey, TraceId, partition_of};
use throughline_model::rules::{DeviceRules, Evaluator, Expression, Facts, MeasurementRef, Names, RuleSet};
use throughline_model::strict_toml::{self, FileError};
use throughline_model::topics::SCHEMA_FILES;
use throughline_mqtt::Router;
use throughline_platform::config;
use uuid::Uuid;

/// A fault lies in the text it is about, is one line, and is not much longer than that text.
fn check_place(fault: &FileError, text: &str) {
    assert!(fault.line >= 1 && fault.line <= text.matches('\n').count() + 1, "{fault}");
    assert!(fault.column >= 1 && !fault.what.is_empty() && !fault.what.contains('\n'), "{fault}");
    assert!(fault.what.len() <= 4 * text.len() + 4_096, "{} bytes: {fault}", fault.what.len());
}

/// A condition as a rule states it, alone.
pub fn expression(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Err(error) = Expression::compile(text, &mut Names::default()) {
        assert!(error.line >= 1 && error.line <= text.matches(['\n', '\r']).count() + 1, "{error}");
        assert!(error.column >= 1 && !error.what.is_empty(), "{error}");
        let shown = error.to_string();
        assert!(shown.len() <= 8 * text.len() + 4_096, "{} bytes: {shown}", shown.len());
        return;
    }
    let quoted = serde_json::Value::from(text).to_string().replace('\u{7f}', "\\u007f");
    let file = format!("id = 'r'\nsummary = 'R.'\nseverity = 'info'\nwhen = {quoted}\n");
    evaluate(&file).expect("what compiles alone compiles in a rule");
}

/// A rule's file, compiled and held against a message.
pub fn rule(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Err(fault) = evaluate(text) {
        check_place(&fault, text);
    }
}

fn evaluate(file: &str) -> Result<(), FileError> {
    let mut rules = RuleSet::default();
    rules.put("r.toml", file, 1)?;
    rules.index();
    let number = |name, n| MeasurementRef { name, number: Some(n), ..MeasurementRef::default() };
    let measurements = [
        number("a", 1.5),
        number("temperature", f64::NAN),
        MeasurementRef { name: "s", text: Some("\u{e4}b"), ..MeasurementRef::default() },
        MeasurementRef { name: "f", flag: Some(true), ..MeasurementRef::default() },
    ];
    let facts = Facts {
        site: "site-1",
        device: "pump-7",
        agent_version: None,
        config_version: Some("1"),
        stream: "telemetry",
        measurements: &measurements,
        age: i64::MIN,
    };
    let steps = Evaluator::default().evaluate(&rules, &facts, &DeviceRules::default()).to_vec();
    for step in steps {
        assert!(!rules.at(step.rule).output_key().is_empty());
    }
    Ok(())
}

/// A topic file, read strictly, checked against the catalog's schemas, its feeds compiled.
pub fn topic_file(data: &[u8]) {
    const FILE: &str = "device.telemetry.v1.toml";
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Err(fault) = strict_toml::parse::<TopicSpec>(FILE, text) {
        check_place(&fault, text);
    }
    match Catalog::parse(&[(FILE, text)], SCHEMA_FILES) {
        Ok(catalog) => drop(Router::compile(&catalog)),
        Err(faults) => {
            faults.iter().filter(|fault| fault.file == FILE).for_each(|fault| check_place(fault, text))
        }
    }
}

/// A configuration file, then lines of the environment (`NAME=value`), each after a NUL. What reads is the same
/// when it is written and read again, and no fault repeats a value: it may be a secret.
pub fn configuration(data: &[u8]) {
    const SECRET: &str = "s3cret";
    let (file, variables) = super::parted(data, 0);
    let Ok(text) = std::str::from_utf8(file) else { return };
    let variables = variables.split(|byte| *byte == 0).filter(|line| !line.is_empty());
    let variables: Vec<(&[u8], &[u8])> = variables.map(|line| super::parted(line, b'=')).collect();
    let os = |bytes: &[u8]| OsString::from_vec(bytes.to_vec());
    let environment = || variables.iter().map(|(name, value)| (os(name), os(value)));
    for (text, with) in [(Some(text), false), (None, true), (Some(text), true)] {
        let file = text.map(|text| ("t.toml", text));
        let read = config::read(file, environment().filter(|_| with));
        let len = text.map_or(0, str::len) + if with { variables.len() } else { 0 };
        match read {
            Ok(config) => {
                let written = toml::to_string(&config).expect("what was read is written");
                let again = config::read(Some(("t.toml", &written)), []).expect("what was written reads");
                assert_eq!(toml::to_string(&again).expect("it is written"), written);
            }
            Err(fault) => {
                let shown = fault.to_string();
                let names: usize = variables.iter().map(|(name, _)| name.len()).sum();
                assert!(!shown.is_empty() && !shown.contains('\n'), "{shown:?}");
                assert!(shown.len() <= 8 * (len + names) + 4_096, "{} bytes: {shown}", shown.len());
                // A key or a name is repeated.
                let is_name = variables
                    .iter()
                    .any(|(name, _)| String::from_utf8_lossy(name).to_lowercase().contains(SECRET));
                let is_value = !is_name && text.is_none_or(|text| secrets_are_values(text, SECRET));
                assert!(!is_value || !shown.contains(SECRET), "{shown}");
            }
        }
    }
}

/// Says whether `secret` is nowhere in a TOML text but in texts of values.
fn secrets_are_values(text: &str, secret: &str) -> bool {
    fn count(value: &toml::Value, secret: &str) -> usize {
        match value {
            toml::Value::String(text) => text.matches(secret).count(),
            toml::Value::Array(list) => list.iter().map(|value| count(value, secret)).sum(),
            toml::Value::Table(table) => table.values().map(|value| count(value, secret)).sum(),
            _ => 0,
        }
    }
    text.parse::<toml::Table>()
        .is_ok_and(|table| count(&toml::Value::Table(table), secret) == text.matches(secret).count())
}

/// Names: trace ids, `traceparent`, device keys, topic names, and a filter (first line) with an MQTT topic
/// (the rest).
pub fn ids(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(id) = text.parse::<TraceId>() {
        assert_eq!(id.to_hex(), text);
        assert!((0..7).contains(&id.partition(7)));
    }
    if let Some(id) = TraceId::from_traceparent(text) {
        let header = id.traceparent(Uuid::from_u128(u128::from_be_bytes(id.0)));
        assert_eq!(TraceId::from_traceparent(&header), Some(id));
    }
    if let Ok(key) = text.parse::<DeviceKey>() {
        assert_eq!((key.as_str(), format!("{}/{}", key.site(), key.device())), (text, text.to_owned()));
    }
    match text.parse::<TopicName>() {
        Ok(name) => assert_eq!(name.as_str(), text),
        Err(error) => assert!(error.to_string().len() <= 8_192, "{error}"),
    }
    assert!((0..6).contains(&partition_of(data, 6)));
    let (filter, topic) = text.split_once('\n').unwrap_or((text, text));
    let Ok(filter) = filter.parse::<Filter>() else { return };
    let names: Vec<&str> = filter.captures().collect();
    let subscription = filter.subscription();
    assert!(subscription.parse::<Filter>().is_ok(), "`{subscription}`");
    let mut captured = Vec::new();
    if filter.capture(topic, &mut captured) {
        assert_eq!(captured.iter().map(|(name, _)| *name).collect::<Vec<_>>(), names);
        assert!(captured.iter().all(|(_, level)| topic.contains(level)));
    } else {
        assert!(captured.is_empty());
    }
}
