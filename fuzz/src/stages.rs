//! Every stage behind hostile records and hostile states.

use super::letters;
use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;
use throughline_model::codec::Codec;
use throughline_model::envelope::{Alert, RuleRecord};
use throughline_model::keyed::{Keyed, KeyedState as _};
use throughline_model::outcome::Outcome;
use throughline_model::record::{Batch, TopicPartition};
use throughline_model::rows::Rows;
use throughline_model::stage::{Act as _, Decide, Delivery, Effects, Input, Load};
use throughline_model::time::Timestamp;
use throughline_model::topics::{
    SERVICE_PLATFORM_DEAD_LETTER_PROGRESS_V1, SERVICE_PLATFORM_DEAD_LETTER_REQUEST_V1,
    SERVICE_PLATFORM_RULE_V1,
};
use throughline_stages::bridge_data::BridgeData;
use throughline_stages::evaluate_rules::EvaluateRules;
use throughline_stages::load_warehouse::LoadWarehouse;
use throughline_stages::notify::Notify;
use throughline_stages::project_twins::ProjectTwins;
use throughline_stages::update_twin::UpdateTwin;

const NOW: Timestamp = Timestamp(1_800_000_000_000_000);
/// A key whose state is there too.
const OTHER: &str = "other/device";
const RULE: &str = "id = 'hot'\nsummary = 'Hot.'\nseverity = 'critical'\nwhen = 'temperature > previous.temperature || a > 1.0'\n\
                    for = '30s'\nforward = 'data_core.forwarded.v1'\n[[command]]\nname = 'stop'\n";

/// A byte that picks the topic, two with the length of a state of its changelog, that state, the datum. The
/// state is that of the record's key and of another one.
pub fn stages(data: &[u8]) {
    let [index, high, low, rest @ ..] = data else { return };
    let len = usize::from(u16::from_be_bytes([*high, *low])).min(rest.len());
    let (state, datum) = rest.split_at(len);
    let (topic, value) = super::kafka::framed(*index, datum);
    let codec = super::kafka::CODEC.with(Arc::clone);
    let record = codec.decode::<Value>(Some(&value)).unwrap_or_default();
    let text = |name: &str| record[name].as_str().map(str::to_owned);
    let key = match topic {
        SERVICE_PLATFORM_DEAD_LETTER_REQUEST_V1 => text("request_id"),
        _ => text("site_id").and_then(|site| Some(format!("{site}/{}", text("device_id")?))),
    };
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
        decide(letters::reprocess(NOW), &codec, &input, state, &key);
        act(&input);
    }
    if topic == SERVICE_PLATFORM_DEAD_LETTER_PROGRESS_V1 {
        letters::policies(&batch.get(0), &codec, NOW);
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
    for key in [key, OTHER] {
        if let Ok(restored) = S::State::decode(state, codec) {
            states.restore(key, Some(restored));
        }
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

/// JSON in which no object has a name twice; `Value` keeps the last of them.
struct UniqueNames;

impl<'de> Deserialize<'de> for UniqueNames {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Self)
    }
}

impl<'de> Visitor<'de> for UniqueNames {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_str<E>(self, _: &str) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self, A::Error> {
        while items.next_element::<Self>()?.is_some() {}
        Ok(self)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Self, A::Error> {
        let mut names = BTreeSet::new();
        while let Some(name) = entries.next_key::<String>()? {
            if names.contains(&name) {
                return Err(A::Error::custom(format!("`{name}` comes twice")));
            }
            names.insert(name);
            entries.next_value::<Self>()?;
        }
        Ok(self)
    }
}

/// What is sent of an alert is JSON that says what the alert says, and has an id by which a repeat is known.
fn act(input: &Input<'_>) {
    let age = Duration::from_secs(3_600);
    let (mut stage, mut forgetful) = (Notify::new(None), Notify::new(Some(age)));
    if !stage.spec().inputs.contains(&input.topic) {
        return;
    }
    let delivery = match stage.request(input) {
        Ok(delivery) => delivery,
        Err(settled) => return assert_eq!(settled.outcome, Outcome::DeadLettered, "{settled:?}"),
    };
    let expiring = Delivery { expires_at: Some(NOW.plus(age)), ..delivery.clone() };
    assert_eq!(forgetful.request(input).expect("it is the same alert"), expiring);
    let alert: Alert = input.decode().expect("it did just before");
    let body: Value = serde_json::from_slice(&delivery.body).expect("it is JSON");
    let unique = serde_json::from_slice::<UniqueNames>(&delivery.body);
    assert!(unique.is_ok(), "{:?}: {body}", unique.err());
    assert_eq!(delivery.id.len(), 36, "{}", delivery.id);
    for (name, expected) in [
        ("message_id", &alert.message_id),
        ("trace_id", &alert.trace_id),
        ("alert_id", &alert.alert_id),
        ("state", &alert.state),
        ("severity", &alert.severity),
        ("summary", &alert.summary),
        ("rule_id", &alert.rule_id),
        ("site_id", &alert.site_id),
        ("device_id", &alert.device_id),
        ("raised_at", &alert.raised_at.to_string()),
    ] {
        assert_eq!(body[name], **expected, "{name}");
    }
    assert_eq!(body["cleared_at"].is_null(), alert.cleared_at.is_none());
    // Of a name that comes twice the last counts.
    for measured in alert.values.iter().take(16) {
        let last = alert.values.iter().rfind(|other| other.name == measured.name).expect("it is one of them");
        let is_shown = body["values"][&measured.name]["value"] != Value::Null;
        assert_eq!(is_shown, last.number.is_some() || last.text.is_some() || last.flag.is_some(), "{body}");
    }
}

fn load(mut stage: impl Load, input: &Input<'_>) {
    if stage.spec().inputs.contains(&input.topic) {
        let mut rows = Rows::default();
        let settled = stage.rows(input, &mut rows);
        assert!(settled.outcome != Outcome::DeadLettered || rows.is_empty(), "{settled:?}");
    }
}
