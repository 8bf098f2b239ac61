//! Which messages of a device have been seen: bounded runs of seq per stream and epoch.
//!
//! A message with sequence identity is new when its seq lies in no run of its epoch. A seq already seen is
//! a *redelivery* when its own time is not newer than the newest received under that epoch, or, where the
//! message carries no time, when its id (a hash of its bytes) is among the last [`RECENT_MAX`] of the
//! stream. Otherwise the device has restarted under an old epoch: the message is accepted and the epoch
//! begins a new *generation* of its runs. The generation before is kept, so that a redelivery from before
//! the restart is still recognised: with a time, because that is not newer than the newest of its
//! generation; without one, by its id.
//!
//! A seq *not* seen that lies below the last one is a restart too where its time is newer than the newest:
//! a device that was first heard at seq 1,000,000 and starts again at 1 would otherwise count as late, and
//! current state would stand still until its seq caught up. Nothing else looks like that. A redelivery out
//! of order, a spool and the replay of a dead letter all bring a seq that was *sent* earlier, and so an
//! older time; that is why times of messages that could not be processed count for the newest as well. A
//! clock that is set back between a seq and the one before it can be taken for a restart; then the
//! generation begins anew where it need not, which is flagged, and no message is lost. No margin of time
//! or seq is asked for: each message within it would raise the newest time, and a device that reports more
//! often than the margin would never be recognised. Without a time of its own a device that restarts below
//! what was seen of it cannot be told from one that is late.
//!
//! What a device sent before such a restart and delivers after it (a spool) is older than the message that
//! began the generation and belongs to the one before, also where its seq lies above all that was seen.
//!
//! A message that cannot be processed is remembered by its id besides, so that its redelivery is told from
//! another message under the same seq: the bytes of the one are in a dead letter, those of the other are
//! not.
//!
//! Memory is bounded: [`RUNS_MAX`] runs a generation, the newest [`EPOCHS_MAX`] epochs, two generations an
//! epoch. What is forgotten lies below a *floor*: a message there is accepted and marked, because a gap
//! must never become "seen"; repeats there are not recognised. The number of streams is the number of
//! feeds of one topic, which its file bounds.
//!
//! [`Streams`] serializes to JSON, which is also the form in the changelog of `bridge_data` that the
//! ledger reads: per stream its epochs, each with floor, runs, open seqs and closed gaps.

mod recent;
mod runs;

pub use recent::RECENT_MAX;
pub use runs::{CLOSED_GAPS_MAX, ClosedGaps, RUNS_MAX, Received, Run};

use crate::codec::{Codec, CodecError};
use crate::envelope::EnvelopeRef;
use crate::keyed::KeyedState;
use crate::time::Timestamp;
use recent::{Recent, hash_of};
use serde::{Deserialize, Serialize};

/// Epochs kept per stream; older ones count as below the floor.
pub const EPOCHS_MAX: usize = 4;

/// Reason of a duplicate that is certainly a redelivery: the same id, or the time of the newest message.
pub const REASON_REDELIVERED: &str = "redelivered";

/// Reason of a duplicate whose time is older than the newest accepted: the redelivery of an earlier
/// message, or a restart under an old epoch whose clock went back too. The two cannot be told apart.
pub const REASON_STALE_TS: &str = "stale_ts";

/// Reason of a duplicate whose first delivery was dead-lettered.
pub const REASON_DEAD_LETTERED_BEFORE: &str = "dead_lettered_before";

/// Where a message stands in its stream; the greater is the newer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Position {
    /// Boot epoch of the sender.
    pub epoch: i64,
    /// Generation of the runs under that epoch, from 0.
    #[serde(rename = "gen", default, skip_serializing_if = "is_zero")]
    pub generation: i64,
    /// Sequence number.
    pub seq: i64,
}

const fn is_zero(n: &i64) -> bool {
    *n == 0
}

/// How an accepted message stands to what was accepted before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Newer than everything accepted in its stream.
    Newest,
    /// Older than something accepted: history takes it, current state does not.
    Late,
}

/// What the runs say of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// Seen for the first time.
    New {
        /// Where it stands.
        position: Position,
        /// Whether it is the newest.
        order: Order,
    },
    /// The device restarted under an old epoch; this message begins a generation.
    EpochReused {
        /// Where it stands, in the new generation.
        position: Position,
        /// Whether it is the newest; not so where a newer epoch was seen.
        order: Order,
    },
    /// At or below the floor: accepted without being remembered, never the newest.
    BelowFloor {
        /// Where it stands; the generation is that of the runs it lies below.
        position: Position,
    },
    /// A redelivery.
    Duplicate {
        /// One of the `REASON_…` codes.
        reason: &'static str,
    },
    /// Without sequence identity: Kafka's order decides and a redelivery cannot be recognised.
    Unsequenced,
}

impl Admission {
    /// Returns the position of an accepted message with sequence identity.
    pub const fn position(&self) -> Option<Position> {
        match self {
            Self::New { position, .. }
            | Self::EpochReused { position, .. }
            | Self::BelowFloor { position } => Some(*position),
            Self::Duplicate { .. } | Self::Unsequenced => None,
        }
    }

    /// Says whether current state may take the message: the newest of its stream, or without sequence.
    pub const fn is_newest(&self) -> bool {
        matches!(
            self,
            Self::New { order: Order::Newest, .. }
                | Self::EpochReused { order: Order::Newest, .. }
                | Self::Unsequenced
        )
    }
}

/// What the runs say of a message that cannot be processed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Dead-letter it. Where it has sequence identity and lies above the floor its seq is now received
    /// and open.
    DeadLetter,
    /// It is the redelivery of a message that was accepted, or dead-lettered, before.
    Duplicate {
        /// One of the `REASON_…` codes.
        reason: &'static str,
    },
}

/// The runs of all streams of one device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Streams(Vec<Stream>);

/// [`Streams`] as one JSON text within another record: the form in which a twin carries them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StreamsText(pub Streams);

impl Serialize for StreamsText {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let text = serde_json::to_string(&self.0).map_err(serde::ser::Error::custom)?;
        to.serialize_str(&text)
    }
}

impl<'de> Deserialize<'de> for StreamsText {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        serde_json::from_str(&text).map(Self).map_err(serde::de::Error::custom)
    }
}

/// The runs of one stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stream {
    /// The stream's name.
    #[serde(rename = "stream")]
    name: Box<str>,
    /// The newest accepted message.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    newest: Option<Position>,
    /// Epochs up to this one are forgotten.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    epoch_floor: Option<i64>,
    /// In rising order of epoch, at most [`EPOCHS_MAX`].
    epochs: Vec<Epoch>,
    /// Ids of the newest messages that were accepted and carried no time.
    #[serde(default, skip_serializing_if = "Recent::is_empty")]
    recent: Recent,
    /// Ids of the newest messages that could not be processed.
    #[serde(default, skip_serializing_if = "Recent::is_empty")]
    refused: Recent,
}

/// The runs of one epoch: the generation that grows and the one before it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Epoch {
    /// The epoch.
    epoch: i64,
    #[serde(flatten)]
    current: Generation,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    previous: Option<Box<Generation>>,
}

/// The runs of one generation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Generation {
    #[serde(rename = "gen", default, skip_serializing_if = "is_zero")]
    generation: i64,
    #[serde(flatten)]
    received: Received,
    /// Newest time of a device's own that was received, also of a message that could not be processed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    newest_ts: Option<Timestamp>,
    /// Time of the message that began this generation; absent in the first one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    began: Option<Timestamp>,
    /// Newest time received before this generation began: what is not newer belongs to an earlier one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    after: Option<Timestamp>,
}

impl Streams {
    /// Takes a message that can be processed: says whether it is new and remembers it if so.
    pub fn admit(&mut self, message: &EnvelopeRef<'_>) -> Admission {
        self.admit_with_time(message, message.has_own_time().then_some(message.occurred_at))
    }

    /// As [`Streams::admit`], with the device's own time as the caller trusts it: `None` where its clock
    /// is certainly wrong, so that one time from the far future does not make every later restart stale.
    pub fn admit_with_time(&mut self, message: &EnvelopeRef<'_>, ts: Option<Timestamp>) -> Admission {
        let Some((epoch, seq)) = message.sequence() else { return Admission::Unsequenced };
        let stream = self.stream_mut(message.stream);
        let hash = if ts.is_none() { hash_of(message.message_id) } else { 0 };
        let admission = match stream.epoch_mut(epoch) {
            Some(at) => stream.judge(at, seq, ts, hash),
            None => Verdict::BelowFloor { generation: 0 },
        };
        stream.accept(epoch, seq, ts, hash, admission)
    }

    /// Takes a message that cannot be processed: its seq counts as received but stays open, so that the
    /// first delivery or replay that can be processed is accepted as new. Only a message of the same id
    /// is a duplicate of one refused before. Who replays a dead letter ignores that answer: what fails
    /// again is dead-lettered again, with its count of replays.
    pub fn refuse(&mut self, message: &EnvelopeRef<'_>) -> Refusal {
        self.refuse_with_time(message, message.has_own_time().then_some(message.occurred_at))
    }

    /// As [`Streams::refuse`], with the device's own time as the caller trusts it.
    pub fn refuse_with_time(&mut self, message: &EnvelopeRef<'_>, ts: Option<Timestamp>) -> Refusal {
        let Some((epoch, seq)) = message.sequence() else { return Refusal::DeadLetter };
        let stream = self.stream_mut(message.stream);
        let hash = hash_of(message.message_id);
        let at = stream.epoch_mut(epoch);
        let verdict = at.map_or(Verdict::BelowFloor { generation: 0 }, |at| stream.judge(at, seq, ts, hash));
        if let Verdict::Duplicate { reason } = verdict {
            return Refusal::Duplicate { reason };
        }
        if stream.refused.contains(hash) {
            return Refusal::Duplicate { reason: REASON_DEAD_LETTERED_BEFORE };
        }
        stream.refused.push(hash);
        // An unprocessable message neither begins a generation nor fills a gap of an earlier one.
        if let (Verdict::New { previous: false }, Some(at)) = (verdict, at) {
            let current = &mut stream.epochs[at].current;
            current.received.insert_open(seq);
            current.newest_ts = current.newest_ts.max(ts);
        }
        Refusal::DeadLetter
    }

    /// Returns the position of the newest message accepted in `stream`.
    pub fn newest(&self, stream: &str) -> Option<Position> {
        self.get(stream)?.newest
    }

    /// Returns the runs of `stream`.
    pub fn get(&self, stream: &str) -> Option<&Stream> {
        self.0.iter().find(|s| &*s.name == stream)
    }

    /// Iterates over the streams in the order in which they were first seen.
    pub fn iter(&self) -> impl Iterator<Item = &Stream> {
        self.0.iter()
    }

    fn stream_mut(&mut self, name: &str) -> &mut Stream {
        // A device has one or two streams in a topic: a search is cheaper than a hash.
        let at = self.0.iter().position(|s| &*s.name == name).unwrap_or_else(|| {
            self.0.push(Stream::new(name));
            self.0.len() - 1
        });
        &mut self.0[at]
    }
}

/// A judgement that has changed nothing yet.
enum Verdict {
    New { previous: bool },
    Reused,
    BelowFloor { generation: i64 },
    Duplicate { reason: &'static str },
}

impl Stream {
    fn new(name: &str) -> Self {
        Self {
            name: name.into(),
            newest: None,
            epoch_floor: None,
            epochs: Vec::new(),
            recent: Recent::default(),
            refused: Recent::default(),
        }
    }

    /// Returns the stream's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the epochs that are kept, oldest first.
    pub fn epochs(&self) -> &[Epoch] {
        &self.epochs
    }

    /// Returns the index of `epoch`, made where it is unknown, or `None` where it is forgotten. When one
    /// more than [`EPOCHS_MAX`] would be kept the oldest is forgotten, be it the one asked for.
    fn epoch_mut(&mut self, epoch: i64) -> Option<usize> {
        if self.epochs.last().is_some_and(|last| last.epoch == epoch) {
            return Some(self.epochs.len() - 1);
        }
        if self.epoch_floor.is_some_and(|floor| epoch <= floor) {
            return None;
        }
        let at = self.epochs.partition_point(|e| e.epoch < epoch);
        if self.epochs.get(at).is_some_and(|e| e.epoch == epoch) {
            return Some(at);
        }
        if self.epochs.len() < EPOCHS_MAX {
            self.epochs.insert(at, Epoch { epoch, current: Generation::default(), previous: None });
            return Some(at);
        }
        if at == 0 {
            return None;
        }
        self.epoch_floor = Some(self.epochs.remove(0).epoch);
        self.epochs.insert(at - 1, Epoch { epoch, current: Generation::default(), previous: None });
        Some(at - 1)
    }

    fn judge(&self, at: usize, seq: i64, ts: Option<Timestamp>, hash: u32) -> Verdict {
        let Epoch { current, previous, .. } = &self.epochs[at];
        if let Some(previous) = previous.as_deref()
            && let Some(verdict) = self.judge_by_previous(previous, current.began, seq, ts, hash)
        {
            return verdict;
        }
        let received = &current.received;
        if received.runs.last().is_none_or(|last| seq > last) {
            return Verdict::New { previous: false };
        }
        if ts.zip(current.newest_ts).is_some_and(|(ts, newest)| ts > newest) {
            return Verdict::Reused;
        }
        if seq <= received.floor {
            return Verdict::BelowFloor { generation: current.generation };
        }
        if !received.runs.contains(seq) || received.open.contains(seq) {
            return Verdict::New { previous: false };
        }
        match ts {
            Some(_) if ts == current.newest_ts => Verdict::Duplicate { reason: REASON_REDELIVERED },
            Some(_) if current.newest_ts.is_some() => Verdict::Duplicate { reason: REASON_STALE_TS },
            None if self.recent.contains(hash) => Verdict::Duplicate { reason: REASON_REDELIVERED },
            _ => Verdict::Reused,
        }
    }

    /// Judges a message that belongs to the generation before the current one, where that can be told: by
    /// a time not newer than the newest of that generation, by a time before the current one `began`
    /// under a seq that goes on from there, or by its id.
    fn judge_by_previous(
        &self,
        previous: &Generation,
        began: Option<Timestamp>,
        seq: i64,
        ts: Option<Timestamp>,
        hash: u32,
    ) -> Option<Verdict> {
        let received = &previous.received;
        let goes_on = received.runs.last().is_some_and(|last| seq > last);
        match ts {
            Some(ts) if previous.newest_ts.is_some_and(|newest| ts <= newest) => {
                if received.open.contains(seq) {
                    Some(Verdict::New { previous: true })
                } else if received.runs.contains(seq) {
                    Some(Verdict::Duplicate { reason: REASON_STALE_TS })
                } else if seq <= received.floor || previous.after.is_some_and(|after| ts <= after) {
                    Some(Verdict::BelowFloor { generation: previous.generation })
                } else if received.runs.last().is_some_and(|last| seq < last) {
                    Some(Verdict::New { previous: true })
                } else {
                    None
                }
            }
            Some(ts) if goes_on && began.is_some_and(|began| ts < began) => {
                Some(Verdict::New { previous: true })
            }
            None if received.runs.contains(seq) && self.recent.contains(hash) => {
                Some(Verdict::Duplicate { reason: REASON_REDELIVERED })
            }
            _ => None,
        }
    }

    fn accept(
        &mut self,
        epoch: i64,
        seq: i64,
        ts: Option<Timestamp>,
        hash: u32,
        verdict: Verdict,
    ) -> Admission {
        let at = self.epochs.iter().rposition(|e| e.epoch == epoch);
        let generation = match (verdict, at) {
            (Verdict::Duplicate { reason }, _) => return Admission::Duplicate { reason },
            (Verdict::BelowFloor { generation }, _) => {
                return Admission::BelowFloor { position: Position { epoch, generation, seq } };
            }
            (Verdict::New { .. } | Verdict::Reused, None) => {
                unreachable!("a message is judged new only under an epoch that is kept")
            }
            (Verdict::New { previous }, Some(at)) => {
                let generation = self.epochs[at].generation_mut(previous);
                generation.take(seq, ts);
                generation.generation
            }
            (Verdict::Reused, Some(at)) => {
                let epoch = &mut self.epochs[at];
                let next = Generation {
                    generation: epoch.current.generation.saturating_add(1),
                    began: ts,
                    after: epoch.current.newest_ts,
                    ..Generation::default()
                };
                epoch.previous = Some(Box::new(std::mem::replace(&mut epoch.current, next)));
                epoch.current.take(seq, ts);
                let position = Position { epoch: epoch.epoch, generation: epoch.current.generation, seq };
                self.remember(ts, hash);
                return Admission::EpochReused { position, order: self.order(position) };
            }
        };
        self.remember(ts, hash);
        let position = Position { epoch, generation, seq };
        Admission::New { position, order: self.order(position) }
    }

    fn remember(&mut self, ts: Option<Timestamp>, hash: u32) {
        if ts.is_none() {
            self.recent.push(hash);
        }
    }

    fn order(&mut self, position: Position) -> Order {
        if self.newest.is_none_or(|newest| position > newest) {
            self.newest = Some(position);
            Order::Newest
        } else {
            Order::Late
        }
    }
}

impl Epoch {
    /// Returns the epoch's number.
    pub fn number(&self) -> i64 {
        self.epoch
    }

    /// Returns the generation that grows.
    pub fn current(&self) -> &Generation {
        &self.current
    }

    /// Returns the generation before it, if the epoch was reused.
    pub fn previous(&self) -> Option<&Generation> {
        self.previous.as_deref()
    }

    fn generation_mut(&mut self, previous: bool) -> &mut Generation {
        match &mut self.previous {
            Some(generation) if previous => generation,
            _ => &mut self.current,
        }
    }
}

impl Generation {
    /// Returns its number, from 0.
    pub fn number(&self) -> i64 {
        self.generation
    }

    /// Returns the seqs received in it.
    pub fn received(&self) -> &Received {
        &self.received
    }

    fn take(&mut self, seq: i64, ts: Option<Timestamp>) {
        if !self.received.open.is_empty() {
            self.received.open.remove(seq);
        }
        self.received.insert(seq);
        // Written so that a message without a time leaves the newest as it is.
        self.newest_ts = self.newest_ts.max(ts);
    }
}

impl KeyedState for Streams {
    fn encode(&self, _: &Codec, out: &mut Vec<u8>) -> Result<(), CodecError> {
        serde_json::to_writer(out, self)
            .map_err(|e| CodecError::Encode { topic: "the changelog of runs".into(), why: e.to_string() })
    }

    fn decode(bytes: &[u8], _: &Codec) -> Result<Self, CodecError> {
        serde_json::from_slice(bytes).map_err(|e| CodecError::Datum { id: 0, why: e.to_string() })
    }
}
