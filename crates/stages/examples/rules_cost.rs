//! Prints what one message costs `evaluate_rules` with many rules that all look at the same measurement:
//! `cargo run --release -p throughline-stages --example rules_cost`.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;
use throughline_model::codec::Codec;
use throughline_model::envelope::{DeviceMessage, Measurement, RuleRecord};
use throughline_model::keyed::{Keyed, KeyedState};
use throughline_model::record::{Batch, TopicPartition};
use throughline_model::rules::{DeviceRules, Evaluator, Facts, MeasurementRef, RuleSet};
use throughline_model::stage::{Decide, Effects, Input};
use throughline_model::time::Timestamp;
use throughline_model::topics::{DEVICE_TELEMETRY_V1, SCHEMA_FILES, SERVICE_PLATFORM_RULE_V1};
use throughline_stages::evaluate_rules::EvaluateRules;

/// The least of so many rounds is printed: what else the machine does only adds.
const ROUNDS: usize = 20;
const MESSAGES_PER_ROUND: usize = 10_000;
const DEVICES: i64 = 1_000;

fn main() {
    for count in [1, 10, 100, 1_000] {
        let evaluation = evaluation_ns(count);
        let (stage, changelog) = stage_ns(count);
        #[expect(clippy::print_stdout, reason = "printing is what this program is for")]
        {
            println!(
                "{count:5} rules: evaluation {evaluation:7.0} ns, decode to settled {stage:7.0} ns a message, \
                 {changelog:5.0} ns a changelog entry"
            );
        }
    }
}

fn rule(i: usize) -> String {
    format!(
        "id = 'r{i}'\nsummary = 'S.'\nseverity = 'info'\nwhen = 'temperature > {}'\nlateness = '366d'\n",
        90 + i
    )
}

fn evaluation_ns(count: usize) -> f64 {
    let mut rules = RuleSet::default();
    for i in 0..count {
        rules.put("bench", &rule(i), 1).expect("valid");
    }
    rules.index();
    let measurement = |name, number| MeasurementRef { name, number: Some(number), ..Default::default() };
    let measurements =
        [measurement("humidity", 1.0), measurement("temperature", 20.0), measurement("x", 3.0)];
    let facts = Facts {
        site: "site-1",
        device: "pump-7",
        agent_version: None,
        config_version: None,
        stream: "telemetry",
        measurements: &measurements,
        age: 0,
    };
    let state = DeviceRules::default();
    let mut evaluator = Evaluator::default();
    let mut best = f64::INFINITY;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        for _ in 0..MESSAGES_PER_ROUND {
            black_box(evaluator.evaluate(&rules, black_box(&facts), &state));
        }
        best = best.min(start.elapsed().as_nanos() as f64 / MESSAGES_PER_ROUND as f64);
    }
    best
}

fn stage_ns(count: usize) -> (f64, f64) {
    let codec = Codec::default();
    for ((file, text), id) in SCHEMA_FILES.iter().zip(1..) {
        codec.bind(file.trim_end_matches(".avsc"), id, text).expect("valid");
    }
    let codec = Arc::new(codec);
    let mut stage = EvaluateRules::new();
    for i in 0..count {
        let record = RuleRecord {
            rule_id: format!("r{i}"),
            rule_version: 1,
            enabled: true,
            definition: rule(i),
            ..Default::default()
        };
        let mut value = Vec::new();
        codec.encode(SERVICE_PLATFORM_RULE_V1, &record, &mut value).expect("fits");
        let mut batch = Batch::new(TopicPartition::new(SERVICE_PLATFORM_RULE_V1, 0));
        batch.push(0, Timestamp(0), Some(record.rule_id.as_bytes()), Some(&value), []);
        let input = Input {
            topic: SERVICE_PLATFORM_RULE_V1,
            replayed: false,
            partition: 0,
            record: batch.get(0),
            codec: &codec,
        };
        stage.table(&input);
    }
    let batch = messages(&codec, (ROUNDS * MESSAGES_PER_ROUND) as i64);
    let mut effects = Effects::new(Arc::clone(&codec));
    let mut state = Keyed::default();
    let mut per_message = f64::INFINITY;
    for round in 0..ROUNDS {
        let start = Instant::now();
        for i in round * MESSAGES_PER_ROUND..(round + 1) * MESSAGES_PER_ROUND {
            let record = batch.get(i);
            let input =
                Input { topic: DEVICE_TELEMETRY_V1, replayed: false, partition: 0, record, codec: &codec };
            black_box(stage.process(&input, &mut state, &mut effects));
        }
        per_message = per_message.min(start.elapsed().as_nanos() as f64 / MESSAGES_PER_ROUND as f64);
    }
    let mut bytes = Vec::new();
    let start = Instant::now();
    for (_, value) in state.iter() {
        bytes.clear();
        value.encode(&codec, &mut bytes).expect("serializes");
        black_box(&bytes);
    }
    (per_message, start.elapsed().as_nanos() as f64 / state.len() as f64)
}

fn messages(codec: &Codec, count: i64) -> Batch {
    let mut batch = Batch::new(TopicPartition::new(DEVICE_TELEMETRY_V1, 0));
    let mut value = Vec::new();
    for i in 0..count {
        let number = |name: &str, number| Measurement {
            name: name.to_owned(),
            number: Some(number),
            ..Default::default()
        };
        let message = DeviceMessage {
            message_id: "018f0000-0000-8000-8000-000000000001".to_owned(),
            trace_id: "0123456789abcdef0123456789abcdef".to_owned(),
            identity: "sequence".to_owned(),
            site_id: "site-1".to_owned(),
            device_id: format!("pump-{}", i % DEVICES),
            stream: "telemetry".to_owned(),
            epoch: Some(1),
            seq: Some(i / DEVICES),
            occurred_at: Timestamp(1_800_000_000_000_000 + i),
            measurements: vec![number("humidity", 1.0), number("temperature", 20.0), number("pressure", 3.0)],
            ..DeviceMessage::default()
        };
        value.clear();
        codec.encode(DEVICE_TELEMETRY_V1, &message, &mut value).expect("fits");
        let key = format!("site-1/pump-{}", i % DEVICES);
        batch.push(i, Timestamp(1_800_000_000_000_000 + i), Some(key.as_bytes()), Some(&value), []);
    }
    batch
}
