//! Every stage behind hostile records and hostile states.

use std::sync::Arc;
use throughline_model::codec::Codec;
use throughline_model::envelope::RuleRecord;
use throughline_model::keyed::{Keyed, KeyedState as _};
use throughline_model::outcome::Outcome;
use throughline_model::record::{Batch, TopicPartition};
use throughline_model::rows::Rows;
use throughline_model::stage::{Act, Decide, Effects, Input, Load};
use throughline_model::time::Timestamp;
use throughline_model::topics::SERVICE_PLATFORM_RULE_V1;
use throughline_stages::bridge_data::BridgeData;
use throughline_stages::evaluate_rules::EvaluateRules;
use throughline_stages::load_warehouse::LoadWarehouse;
use throughline_stages::notify::Notify;
use throughline_stages::project_twins::ProjectTwins;
use throughline_stages::update_twin::UpdateTwin;

const NOW: Timestamp = Timestamp(1_800_000_000_000_000);
const RULE: &str = "id = 'hot'\nsummary = 'Hot.'\nseverity = 'critical'\nwhen = 'temperature > previous.temperature || a > 1.0'\n\
                    for = '30s'\nforward = 'data_core.forwarded.v1'\n[[command]]\nname = 'stop'\n";

/// A byte that picks the topic, two with the length of a state of its changelog, that state, the datum.
pub fn stages(data: &[u8]) {
    let [index, high, low, rest @ ..] = data else { return };
    let len = usize::from(u16::from_be_bytes([*high, *low])).min(rest.len());
    let (state, datum) = rest.split_at(len);
    let (topic, value) = super::kafka::framed(*index, datum);
    let codec = super::kafka::CODEC.with(Arc::clone);
    let key = codec.decode::<serde_json::Value>(Some(&value)).ok().and_then(|record| {
        Some(format!("{}/{}", record["site_id"].as_str()?, record["device_id"].as_str()?))
    });
    let key = key.unwrap_or_else(|| "s/d".to_owned());
    let mut batch = Batch::new(TopicPartition::new(topic, 0));
    batch.push(0, NOW, Some(key.as_bytes()), Some(&value), []);
    for replayed in [false, true] {
        let input = Input { topic, replayed, partition: 0, record: batch.get(0), codec: &codec };
        decide(EvaluateRules::new(), &codec, &input, state, &key);
        decide(UpdateTwin::default(), &codec, &input, state, &key);
        decide(BridgeData::default(), &codec, &input, state, &key);
        load(LoadWarehouse::new(), &input);
        load(ProjectTwins::new(), &input);
        act(Notify::new(None), &input);
    }
}

/// A decide stage takes the record twice and lets timers fire. Whatever the data, its outputs and its
/// state fit their schemas: a failure of the effects would stop the stage.
fn decide<S: Decide>(mut stage: S, codec: &Arc<Codec>, input: &Input<'_>, state: &[u8], key: &str) {
    if stage.spec().tables.contains(&input.topic) {
        stage.table(input);
    }
    if !stage.spec().inputs.contains(&input.topic) {
        return;
    }
    if stage.spec().tables.contains(&SERVICE_PLATFORM_RULE_V1) {
        take_rule(&mut stage, codec);
    }
    let mut states = Keyed::default();
    if let Ok(restored) = S::State::decode(state, codec) {
        states.restore(key, Some(restored));
    }
    let mut effects = Effects::new(Arc::clone(codec));
    for _ in 0..2 {
        let settled = stage.process(input, &mut states, &mut effects);
        let explained = settled.message.as_ref().is_some_and(|m| !m.is_empty() && m.len() <= 8_192);
        assert!(explained || settled.outcome != Outcome::DeadLettered, "{settled:?}");
    }
    for _ in 0..3 {
        let Some(due) = states.get(key).and_then(|state| stage.due_at(state)) else { break };
        stage.fire(key, due, &mut states, &mut effects);
        let next = states.get(key).and_then(|state| stage.due_at(state));
        assert!(next.is_none_or(|next| next > due), "the timer of {due} is still due");
    }
    if let Some(failure) = effects.take_failure() {
        panic!("{failure}");
    }
    let written = states.drain_dirty(|_, state| {
        let mut bytes = Vec::new();
        state.encode(codec, &mut bytes)?;
        S::State::decode(&bytes, codec).map(drop)
    });
    written.expect("a state is written and reads back");
}

fn take_rule<S: Decide>(stage: &mut S, codec: &Codec) {
    let record = RuleRecord {
        rule_id: "hot".to_owned(),
        rule_version: 1,
        enabled: true,
        definition: RULE.to_owned(),
        ..RuleRecord::default()
    };
    let mut value = Vec::new();
    codec.encode(SERVICE_PLATFORM_RULE_V1, &record, &mut value).expect("a rule's record fits");
    let mut batch = Batch::new(TopicPartition::new(SERVICE_PLATFORM_RULE_V1, 0));
    batch.push(0, NOW, Some(b"hot"), Some(&value), []);
    let topic = SERVICE_PLATFORM_RULE_V1;
    let settled = stage.table(&Input { topic, replayed: false, partition: 0, record: batch.get(0), codec });
    assert_eq!(settled.outcome, Outcome::Emitted, "{settled:?}");
}

/// What is sent is JSON and has an id, whatever the data.
fn act(mut stage: impl Act, input: &Input<'_>) {
    if stage.spec().inputs.contains(&input.topic) {
        match stage.request(input) {
            Ok(delivery) => {
                assert!(!delivery.id.is_empty());
                let body = serde_json::from_slice::<serde_json::Value>(&delivery.body);
                assert!(body.is_ok(), "{body:?}");
            }
            Err(settled) => assert_ne!(settled.outcome, Outcome::Emitted),
        }
    }
}

fn load(mut stage: impl Load, input: &Input<'_>) {
    if stage.spec().inputs.contains(&input.topic) {
        let mut rows = Rows::default();
        let settled = stage.rows(input, &mut rows);
        assert!(settled.outcome != Outcome::DeadLettered || rows.is_empty(), "{settled:?}");
    }
}
