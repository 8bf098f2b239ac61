//! The contracts of stages. There are three kinds and no other: *decide* (Kafka to Kafka in transactions),
//! *load* (Kafka to a store, by compare-and-swap of the offset), *act* (Kafka to outside).
//!
//! A stage is synchronous and deterministic: no IO, no clock, no randomness. The time of a record is the
//! broker's LogAppendTime. Bad data is a value ([`Settled`] with `DeadLettered`), never an `Err`.

use crate::codec::{Codec, CodecError};
use crate::envelope::{EnvelopeRef, Enveloped};
use crate::keyed::{Keyed, KeyedState};
use crate::outcome::Settled;
use crate::record::{Headers, Outbox, Record};
use crate::rows::Rows;
use crate::time::Timestamp;
use hashbrown::HashMap;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;

/// Which kind a stage is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Kafka to Kafka, in transactions.
    Decide,
    /// Kafka to a store.
    Load,
    /// Kafka to outside, at least once.
    Act,
}

/// What a stage reads and keeps. The catalog derives its dead-letter, replay, parking and changelog topics
/// from it.
#[derive(Clone, Debug)]
pub struct StageSpec {
    /// The stage's name, a verb phrase; also its consumer group.
    pub group: &'static str,
    /// Its kind.
    pub kind: Kind,
    /// Topics it consumes as a group member. Those of one stage have equal partition counts; their replay
    /// topics are consumed along with them.
    pub inputs: Vec<&'static str>,
    /// Compacted topics that every member reads whole, outside the group, before any input (rules).
    pub tables: Vec<&'static str>,
    /// The compacted topic that holds its state, co-partitioned with the inputs: a derived
    /// `…-changelog`, or a catalog topic where the state is itself published (twins).
    pub changelog: Option<String>,
    /// How long outputs may wait for the commit: 20–100 ms where a person waits.
    pub commit_interval: Duration,
}

/// A record as a stage sees it.
#[derive(Clone, Copy)]
pub struct Input<'a> {
    /// The topic whose contract the record follows: the original one for a replayed record.
    pub topic: &'a str,
    /// Whether it comes from the group's replay topic.
    pub replayed: bool,
    /// Its partition.
    pub partition: i32,
    /// The record.
    pub record: Record<'a>,
    /// Reads its value.
    pub codec: &'a Codec,
}

impl<'a> Input<'a> {
    /// Reads the value.
    ///
    /// # Errors
    /// See [`Codec::decode`]; the stage settles the record as dead-lettered with the error's code.
    pub fn decode<T: Deserialize<'a>>(&self) -> Result<T, CodecError> {
        self.codec.decode(self.record.value)
    }
}

/// A decide stage.
pub trait Decide: Send {
    /// The values of its keyed state.
    type State: KeyedState;

    /// Returns what it reads and keeps.
    fn spec(&self) -> &StageSpec;

    /// Says whether it reads only the replay topics of its inputs. The bridge does: its inputs are what it
    /// wrote itself.
    fn reads_only_replays(&self) -> bool {
        false
    }

    /// Says whether its timers are due by the clock alone. Others are due by the time of records too, so that a
    /// backlog is processed as it would have been when it came.
    fn timers_follow_the_clock(&self) -> bool {
        false
    }

    /// Takes a record of one of its tables (a rule). Tables are read to their end before any input.
    fn table(&mut self, input: &Input<'_>) -> Settled {
        let _ = input;
        Settled::filtered()
    }

    /// Processes one record. Equal state and record give equal effects, wherever a batch begins or ends.
    fn process(
        &mut self,
        input: &Input<'_>,
        state: &mut Keyed<Self::State>,
        effects: &mut Effects,
    ) -> Settled;

    /// Returns when `state` next needs [`Decide::fire`], a pure function of the state.
    fn due_at(&self, state: &Self::State) -> Option<Timestamp> {
        let _ = state;
        None
    }

    /// Lets the timer of `key` fire at `now`, which is the time it was due. Timers fire in order of (due
    /// time, key) before the first record whose time is later, once the other partitions of the same number
    /// came as far or were read to their ends. After it `due_at` of the state is later than `now` or none.
    fn fire(&mut self, key: &str, now: Timestamp, state: &mut Keyed<Self::State>, effects: &mut Effects) {
        let _ = (key, now, state, effects);
    }
}

/// A load stage: says which rows a record becomes. The store writes them once.
pub trait Load: Send {
    /// Returns what it reads.
    fn spec(&self) -> &StageSpec;

    /// Appends the rows of one record. It is pure: the runtime calls it again for parts of a batch when it
    /// searches the record that a store refused. On a dead letter it appends nothing.
    fn rows(&mut self, input: &Input<'_>, rows: &mut Rows) -> Settled;
}

/// What is to be sent to the other side of an act stage for one record.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Delivery {
    /// The same for every attempt at the same message, also after a kill, a retry or a replay: by it the other
    /// side recognises a repeat.
    pub id: String,
    /// The `traceparent` of the message, where its trace id is one.
    pub traceparent: Option<String>,
    /// What is sent, in the form that the other side expects.
    pub body: Vec<u8>,
    /// After this time it is not begun any more: the record is then expired.
    pub expires_at: Option<Timestamp>,
}

/// An act stage: says what is to be sent for a record. The runtime sends it at least once.
pub trait Act: Send {
    /// Returns what it reads.
    fn spec(&self) -> &StageSpec;

    /// Returns the delivery of one record. It is pure: the runtime calls it again after a kill, a retry or a
    /// replay, and equal bytes give an equal id and body.
    ///
    /// # Errors
    /// The settlement of a record for which nothing is to be sent: filtered, or dead-lettered.
    fn request(&mut self, input: &Input<'_>) -> Result<Delivery, Settled>;
}

/// How a request was answered; the labels of `requests_total`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// What was asked for.
    pub request_code: String,
    /// How it ended.
    pub response_code: &'static str,
    /// Why, empty where that needs no saying.
    pub reason: &'static str,
}

/// Bytes of a request code that are kept: codes are words, and a sender may write anything.
const REQUEST_CODE_BYTES_MAX: usize = 64;

/// What a decide stage brings about besides its state: records, collected in one buffer.
pub struct Effects {
    codec: Arc<Codec>,
    outbox: Outbox,
    names: HashMap<Box<str>, Arc<str>, foldhash::fast::RandomState>,
    failure: Option<CodecError>,
    answers: Vec<Answer>,
}

impl Effects {
    /// Makes an empty collection that writes through `codec`.
    pub fn new(codec: Arc<Codec>) -> Self {
        Self {
            codec,
            outbox: Outbox::default(),
            names: HashMap::default(),
            failure: None,
            answers: Vec::new(),
        }
    }

    /// Emits a record under `key`, with the `traceparent` of its envelope as header. A value that does not
    /// fit its schema is a defect: the runtime stops the stage before anything is committed.
    pub fn emit<T: Serialize + Enveloped>(&mut self, topic: &str, key: &str, value: &T) {
        self.emit_as(topic, key, &value.envelope(), value);
    }

    /// As [`Effects::emit`], with one more header.
    pub fn emit_with<T: Serialize + Enveloped>(
        &mut self,
        topic: &str,
        key: &str,
        value: &T,
        header: (&str, &[u8]),
    ) {
        self.emit_headed(topic, key, &value.envelope(), value, Some(header));
    }

    /// As [`Effects::emit`], for a value that borrows from its input and so is not itself [`Enveloped`].
    pub fn emit_as<T: Serialize>(&mut self, topic: &str, key: &str, envelope: &EnvelopeRef<'_>, value: &T) {
        self.emit_headed(topic, key, envelope, value, None);
    }

    fn emit_headed<T: Serialize>(
        &mut self,
        topic: &str,
        key: &str,
        envelope: &EnvelopeRef<'_>,
        value: &T,
        more: Option<(&str, &[u8])>,
    ) {
        let topic = self.name(topic);
        let traceparent = traceparent(envelope);
        let headers = traceparent.as_deref().map(|t| ("traceparent", t.as_bytes())).into_iter().chain(more);
        let codec = &self.codec;
        let written = self.outbox.push_with(&topic, None, Some(key.as_bytes()), headers, |out| {
            codec.encode(&topic, value, out).map(|()| true)
        });
        if let Err(e) = written {
            self.failure.get_or_insert(e);
        }
    }

    /// Emits a record as it stands: a dead letter's own bytes, a changelog entry, a tombstone.
    pub fn emit_raw(
        &mut self,
        topic: &str,
        partition: Option<i32>,
        key: Option<&[u8]>,
        value: Option<&[u8]>,
        headers: Headers<'_>,
    ) {
        let topic = self.name(topic);
        self.outbox.push(&topic, partition, key, value, headers.iter());
    }

    /// Notes that a request was answered: the runtime counts it once the answer is committed. A request code
    /// that is no word of at most 64 bytes is counted as `other`, so that nobody fills the metrics.
    pub fn answered(
        &mut self,
        request_code: Option<&str>,
        response_code: &'static str,
        reason: Option<&'static str>,
    ) {
        let is_word = |code: &str| {
            code.len() <= REQUEST_CODE_BYTES_MAX
                && code.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'.' | b'-'))
        };
        let code = request_code.unwrap_or_default();
        let request_code = if is_word(code) { code } else { "other" }.to_owned();
        self.answers.push(Answer { request_code, response_code, reason: reason.unwrap_or_default() });
    }

    /// Takes the answers noted since the last call.
    pub fn take_answers(&mut self) -> Vec<Answer> {
        std::mem::take(&mut self.answers)
    }

    /// Borrows what was emitted.
    pub fn outbox(&self) -> &Outbox {
        &self.outbox
    }

    /// Borrows what was emitted for appending and clearing.
    pub fn outbox_mut(&mut self) -> &mut Outbox {
        &mut self.outbox
    }

    /// Forgets what was emitted and the failure of what could not be, as when a transaction is given up: the
    /// record comes again, and a failure kept from before would stop the stage for it.
    pub fn clear(&mut self) {
        self.outbox.clear();
        self.failure = None;
        self.answers.clear();
    }

    /// Returns the codec.
    pub fn codec(&self) -> &Arc<Codec> {
        &self.codec
    }

    /// Takes the first value that did not fit its schema, if any.
    pub fn take_failure(&mut self) -> Option<CodecError> {
        self.failure.take()
    }

    /// Returns the shared name of `topic`.
    pub fn name(&mut self, topic: &str) -> Arc<str> {
        if let Some(name) = self.names.get(topic) {
            return Arc::clone(name);
        }
        let name: Arc<str> = topic.into();
        self.names.insert(topic.into(), Arc::clone(&name));
        name
    }
}

/// Returns the `traceparent` header of a record, or `None` where its trace id is not one.
pub fn traceparent(envelope: &EnvelopeRef<'_>) -> Option<String> {
    // Once a record on the hot path: ids in their usual form are copied rather than parsed and printed.
    copied_traceparent(envelope.trace_id, envelope.message_id)
        .or_else(|| envelope.trace().map(|t| t.traceparent(envelope.message_uuid())))
}

/// Puts together the header of [`crate::ids::TraceId::traceparent`] from the ids' texts, where both are in
/// lower-case hexadecimal and the span is not zero.
fn copied_traceparent(trace_id: &str, message_id: &str) -> Option<String> {
    let is_hex = |text: &str| text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    let is_zero = |text: &str| text.bytes().all(|b| b == b'0');
    // The last 8 bytes of a UUID's 36 characters: `xxxxxxxx-xxxx-xxxx-SSSS-SSSSSSSSSSSS`.
    let (head, tail) = (message_id.get(19..23)?, message_id.get(24..36)?);
    let usual = trace_id.len() == 32
        && message_id.len() == 36
        && [8, 13, 18, 23].iter().all(|at| message_id.as_bytes()[*at] == b'-')
        && [trace_id, &message_id[..8], &message_id[9..13], &message_id[14..18], head, tail]
            .into_iter()
            .all(is_hex)
        && !is_zero(trace_id)
        && !(is_zero(head) && is_zero(tail));
    if !usual {
        return None;
    }
    let mut header = String::with_capacity(55);
    for part in ["00-", trace_id, "-", head, tail, "-01"] {
        header.push_str(part);
    }
    Some(header)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::envelope::DeviceMessage;

    #[test]
    fn what_is_given_up_leaves_neither_records_nor_a_failure() {
        let mut effects = Effects::new(Arc::new(Codec::default()));
        effects.emit_raw("t", None, None, Some(b"v"), Headers::default());
        effects.emit("a topic without a schema", "k", &DeviceMessage::default());
        effects.answered(Some("twin.set"), "success", None);
        assert_eq!(effects.outbox().len(), 1);
        effects.clear();
        assert!(effects.outbox().is_empty() && effects.take_failure().is_none());
        assert_eq!(effects.take_answers(), []);
    }

    #[test]
    fn a_request_code_that_is_no_word_is_counted_as_other() {
        let mut effects = Effects::new(Arc::new(Codec::default()));
        for (code, counted) in [
            (Some("twin.set"), "twin.set"),
            (None, ""),
            (Some("a b"), "other"),
            (Some(&*"x".repeat(65)), "other"),
        ] {
            effects.answered(code, "success", None);
            assert_eq!(effects.take_answers()[0].request_code, counted, "{code:?}");
        }
    }

    #[test]
    fn a_copied_traceparent_equals_the_printed_one() {
        let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
        let id = "0193f2a4-7c1e-8000-90ab-0123456789ab";
        for (trace_id, message_id, is_copied) in [
            (trace, id, true),
            (trace, "0193f2a4-7c1e-8000-0000-000000000000", false),
            (trace, "0193F2A4-7C1E-8000-90AB-0123456789AB", false),
            (trace, "0193f2a4x7c1e-8000-90ab-0123456789ab", false),
            (trace, "42", false),
            (trace, "", false),
            ("00000000000000000000000000000000", id, false),
            ("4BF92F3577B34DA6A3CE929D0E0E4736", id, false),
            ("", id, false),
        ] {
            let message = DeviceMessage {
                trace_id: trace_id.into(),
                message_id: message_id.into(),
                ..DeviceMessage::default()
            };
            let envelope = message.envelope();
            let printed = envelope.trace().map(|t| t.traceparent(envelope.message_uuid()));
            assert_eq!(traceparent(&envelope), printed, "{trace_id} {message_id}");
            let copied = copied_traceparent(trace_id, message_id);
            assert_eq!(copied.is_some(), is_copied, "{trace_id} {message_id}");
        }
    }
}
