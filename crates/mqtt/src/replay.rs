//! Replays of the bridge's dead letters: a decide stage that sends each through the same transform, so that
//! a corrected feed gives it its ordinary path.

use crate::dead_letter::Remembered;
use crate::feeds::{Publish, Router};
use crate::transform::{Replay, Scope, Transformer, Verdict};
use std::sync::Arc;
use std::time::Duration;
use throughline_model::catalog::BRIDGE_GROUP;
use throughline_model::codec::{Codec, CodecError};
use throughline_model::dead_letter::header::ORIGIN;
use throughline_model::keyed::{Keyed, KeyedState};
use throughline_model::outcome::Settled;
use throughline_model::stage::{Decide, Effects, Input, Kind, StageSpec};

/// State of a stage that has none.
#[derive(Debug, Default)]
pub struct Stateless;

impl KeyedState for Stateless {
    fn encode(&self, _: &Codec, _: &mut Vec<u8>) -> Result<(), CodecError> {
        Ok(())
    }

    fn decode(_: &[u8], _: &Codec) -> Result<Self, CodecError> {
        Ok(Self)
    }
}

/// The stage `bridge`. Its inputs are only the replay topics: the device topics themselves hold what the
/// bridge wrote.
pub struct ReplayBridge {
    spec: StageSpec,
    transformer: Transformer,
}

impl ReplayBridge {
    /// Makes the stage of `instance`. It is made once a process, and so are its topics' names.
    pub fn new(router: Arc<Router>, codec: Arc<Codec>, instance: &str) -> Self {
        let leak = |topic: String| -> &'static str { topic.leak() };
        let spec = StageSpec {
            group: BRIDGE_GROUP,
            kind: Kind::Decide,
            inputs: router.replayable().into_iter().map(leak).collect(),
            tables: Vec::new(),
            changelog: None,
            commit_interval: Duration::from_millis(100),
        };
        Self { spec, transformer: Transformer::new(router, codec, instance) }
    }
}

impl Decide for ReplayBridge {
    type State = Stateless;

    fn spec(&self) -> &StageSpec {
        &self.spec
    }

    fn reads_only_replays(&self) -> bool {
        true
    }

    fn process(&mut self, input: &Input<'_>, _: &mut Keyed<Stateless>, effects: &mut Effects) -> Settled {
        let record = &input.record;
        let Some(payload) = record.value else {
            return Settled::dead_lettered("value_absent", "a replayed dead letter has no value");
        };
        let Some(message) = Remembered::read(record.headers) else {
            return Settled::dead_lettered(
                "replay_without_topic",
                "header `tl-mqtt-topic` is missing, so the MQTT topic is not known",
            );
        };
        let own = format!("{}/{}/{}", input.topic, input.partition, record.offset);
        let origin = record.headers.last(ORIGIN).and_then(|v| std::str::from_utf8(v).ok()).unwrap_or(&own);
        let scope = Scope { sites: message.sites.as_deref(), devices: message.devices.as_deref() };
        let publish = Publish {
            topic: &message.topic,
            payload,
            client_id: &message.client_id,
            user: message.user.as_deref(),
            login_site: match message.sites.as_deref() {
                Some([site]) => Some(site),
                _ => None,
            },
            properties: &message.properties,
            received_at: message.received_at.unwrap_or(record.time),
        };
        match self.transformer.admit(&publish, &scope, Some(&Replay { origin })) {
            Verdict::Accepted => {
                for record in self.transformer.records().iter() {
                    effects.emit_raw(
                        record.topic,
                        record.partition,
                        record.key,
                        record.value,
                        record.headers,
                    );
                }
                Settled::emitted()
            }
            // The runtime writes the dead letter with the record's own headers, so its origin stays.
            Verdict::DeadLettered(code) => {
                let message = self.transformer.take_rejected().map(|r| r.message).unwrap_or_default();
                Settled::dead_lettered(code, message)
            }
            Verdict::Forbidden(reason) => {
                Settled::dead_lettered(reason, "the sender may not publish what the message has become")
            }
        }
    }
}
