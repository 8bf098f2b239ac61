//! Drives one stage over records in memory, with a changelog that it can be restored from.

use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::sync::Arc;
use throughline_model::codec::Codec;
use throughline_model::keyed::{Keyed, KeyedState as _};
use throughline_model::outcome::{Outcome, Settled};
use throughline_model::record::{Batch, TopicPartition};
use throughline_model::rows::Rows;
use throughline_model::stage::{Act, Answer, Decide, Delivery, Effects, Input, Load};
use throughline_model::time::Timestamp;
use throughline_testkit::codec;

/// 2027-01-15T08:00:00Z.
pub const T0: i64 = 1_800_000_000_000_000;

/// One record on its way into a stage.
#[derive(Clone, Debug)]
pub struct Fed {
    pub topic: &'static str,
    pub key: String,
    pub value: Option<Vec<u8>>,
    pub replayed: bool,
}

/// Makes a record of a value that fits its topic.
pub fn fed<T: Serialize>(codec: &Codec, topic: &'static str, key: &str, value: &T) -> Fed {
    let mut bytes = Vec::new();
    codec.encode(topic, value, &mut bytes).expect("fits its schema");
    Fed { topic, key: key.to_owned(), value: Some(bytes), replayed: false }
}

impl Fed {
    pub fn bytes(topic: &'static str, key: &str, value: Option<&[u8]>) -> Self {
        Self { topic, key: key.to_owned(), value: value.map(<[u8]>::to_vec), replayed: false }
    }

    pub fn replayed(mut self) -> Self {
        self.replayed = true;
        self
    }

    fn with_input<R>(&self, codec: &Codec, run: impl FnOnce(&Input<'_>) -> R) -> R {
        let mut batch = Batch::new(TopicPartition::new(self.topic, 0));
        batch.push(0, Timestamp(T0), Some(self.key.as_bytes()), self.value.as_deref(), []);
        let record = batch.get(0);
        run(&Input { topic: self.topic, replayed: self.replayed, partition: 0, record, codec })
    }
}

/// One record that a stage wrote.
#[derive(Clone, Debug, PartialEq)]
pub struct Out {
    pub topic: String,
    pub key: String,
    pub value: Vec<u8>,
    pub traceparent: Option<String>,
}

/// A decide stage with its state and changelog.
pub struct Driver<S: Decide> {
    pub codec: Arc<Codec>,
    stage: S,
    pub state: Keyed<S::State>,
    effects: Effects,
    changelog: BTreeMap<String, Vec<u8>>,
}

impl<S: Decide> Driver<S> {
    pub fn new(stage: S) -> Self {
        let codec = codec();
        let effects = Effects::new(Arc::clone(&codec));
        Self { codec, stage, state: Keyed::default(), effects, changelog: BTreeMap::new() }
    }

    pub fn feed(&mut self, record: &Fed) -> Settled {
        let settled = record
            .with_input(&self.codec, |input| self.stage.process(input, &mut self.state, &mut self.effects));
        if let Some(defect) = self.effects.take_failure() {
            panic!("{defect}");
        }
        settled
    }

    /// Feeds a value that fits its topic and returns the outcome with its reason.
    pub fn take<T: Serialize>(&mut self, topic: &'static str, key: &str, value: &T) -> (Outcome, String) {
        let record = fed(&self.codec, topic, key, value);
        let settled = self.feed(&record);
        (settled.outcome, settled.reason.into_owned())
    }

    /// Takes what was written since the last call.
    pub fn outputs(&mut self) -> Vec<Out> {
        let outbox = self.effects.outbox_mut();
        let outputs = (0..outbox.len()).map(|i| outbox.get(i)).map(|o| Out {
            topic: o.topic.to_owned(),
            key: String::from_utf8(o.key.expect("keyed").to_vec()).expect("text"),
            value: o.value.expect("no tombstone").to_vec(),
            traceparent: o.headers.last("traceparent").map(|h| String::from_utf8_lossy(h).into_owned()),
        });
        let outputs = outputs.collect();
        outbox.clear();
        outputs
    }

    /// Takes how requests were answered since the last call.
    pub fn answers(&mut self) -> Vec<Answer> {
        self.effects.take_answers()
    }

    pub fn outputs_as<T: DeserializeOwned>(&mut self) -> Vec<T> {
        let codec = Arc::clone(&self.codec);
        self.outputs().iter().map(|o| codec.decode(Some(&o.value)).expect("reads")).collect()
    }

    /// Commits the state to the changelog and goes on with what is read back from it.
    pub fn restart(&mut self) {
        let (codec, changelog) = (&self.codec, &mut self.changelog);
        let written = self.state.drain_dirty(|key, state| {
            let mut bytes = Vec::new();
            state.encode(codec, &mut bytes)?;
            changelog.insert(key.to_owned(), bytes);
            Ok::<(), throughline_model::codec::CodecError>(())
        });
        written.expect("a state fits its form");
        self.state = Keyed::default();
        for (key, bytes) in &self.changelog {
            let state = S::State::decode(bytes, &self.codec).expect("own bytes");
            self.state.restore(key, Some(state));
        }
    }
}

/// Runs a load stage over one record.
pub fn load(stage: &mut impl Load, codec: &Codec, record: &Fed) -> (Settled, Rows) {
    let mut rows = Rows::default();
    let settled = record.with_input(codec, |input| stage.rows(input, &mut rows));
    (settled, rows)
}

/// Asks an act stage what is to be sent for one record.
pub fn request(stage: &mut impl Act, codec: &Codec, record: &Fed) -> Result<Delivery, Settled> {
    record.with_input(codec, |input| stage.request(input))
}
