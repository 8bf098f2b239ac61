//! One partition that a loop owns: where it stands, its books, and what was counted since the last commit.

use crate::clock::seconds_between;
use crate::config::LoopConfig;
use crate::dead_letter::Destination;
use crate::incarnation;
use crate::ports::{Advance, BooksFound, Failure, Position};
use serde::Deserialize;
use std::borrow::Cow;
use std::collections::VecDeque;
use std::sync::Arc;
use throughline_model::books::{Books, Origin};
use throughline_model::catalog::{dlt_topic, parking_topic, replay_topic, retry_topic};
use throughline_model::codec::Codec;
use throughline_model::outcome::{Outcome, Settled};
use throughline_model::record::{Batch, TopicPartition};
use throughline_model::stage::{Kind, StageSpec};
use throughline_model::time::Timestamp;

/// The name of a group's first volume of books; adopting a foreign offset opens another.
const FIRST_VOLUME: &str = "volume-1";

/// Counts since the last commit: small arrays, nothing is allocated for a record.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tally {
    counts: [u64; 6],
    reasons: Vec<(Outcome, Cow<'static, str>, u64)>,
    pub(crate) positions_without_record: u64,
    pub(crate) overtaken: u64,
}

impl Tally {
    pub(crate) fn count(&mut self, settled: &Settled) {
        self.counts[settled.outcome.index()] += 1;
        if settled.reason.is_empty() {
            return;
        }
        let known = self.reasons.iter_mut().find(|(o, r, _)| *o == settled.outcome && *r == settled.reason);
        match known {
            Some((_, _, n)) => *n += 1,
            None => self.reasons.push((settled.outcome, settled.reason.clone(), 1)),
        }
    }

    pub(crate) fn records(&self) -> u64 {
        self.counts.iter().sum()
    }

    pub(crate) fn of(&self, outcome: Outcome) -> u64 {
        self.counts[outcome.index()]
    }

    pub(crate) fn counts(&self) -> [u64; 6] {
        self.counts
    }

    /// Iterates over (outcome, reason, count), the records without a reason under the empty one.
    pub(crate) fn by_reason(&self) -> impl Iterator<Item = (Outcome, &str, u64)> {
        let named = self.reasons.iter().map(|(o, r, n)| (*o, &**r, *n));
        let rest = Outcome::ALL.into_iter().map(|outcome| {
            let named: u64 = self.reasons.iter().filter(|(o, _, _)| *o == outcome).map(|(_, _, n)| n).sum();
            (outcome, "", self.of(outcome) - named)
        });
        named.chain(rest).filter(|(_, _, n)| *n > 0)
    }

    /// Returns `books` with this counted on top.
    pub(crate) fn on_top_of(&self, books: &Books) -> Books {
        let mut books = books.clone();
        for (outcome, reason, n) in self.by_reason() {
            books.add(outcome, reason, n);
        }
        books.positions_without_record += self.positions_without_record;
        books.overtaken += self.overtaken;
        books
    }
}

/// How long one batch took, kept until its commit is known.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BatchTiming {
    /// From the broker's append of the first record to the hand-over, in seconds.
    pub(crate) wait_s: f64,
    /// From the first record's occurrence, by the device's corrected clock, where a sample decoded.
    pub(crate) age_s: Option<f64>,
    /// Processing, in seconds.
    pub(crate) work_s: f64,
    /// When processing ended.
    pub(crate) done_at: Timestamp,
    /// Records by outcome.
    pub(crate) counts: [u64; 6],
}

/// A partition with its place in the stage.
#[derive(Debug)]
pub(crate) struct Lane {
    /// The partition.
    pub(crate) source: TopicPartition,
    /// The topic whose contract its records follow.
    pub(crate) topic: Arc<str>,
    /// Whether it belongs to the group's replay topic.
    pub(crate) replayed: bool,
    /// Whether it belongs to the retry topic of an act stage.
    pub(crate) retried: bool,
    /// Where its dead letters go.
    pub(crate) destination: Destination,
    /// Whether its records are taken: its state is restored and it was started.
    pub(crate) active: bool,
    /// Whether the loop asked the source to stop delivering it.
    pub(crate) paused: bool,
    /// Whether it was read to its end and nothing came since.
    pub(crate) caught_up: bool,
    /// The time of the last record that was processed.
    pub(crate) reached: Timestamp,
    /// The committed position, −1 where there is none.
    pub(crate) from: i64,
    /// The next offset to process, −1 before the first record of a new group.
    pub(crate) next: i64,
    /// The books as committed.
    pub(crate) books: Books,
    /// What was counted since.
    pub(crate) tally: Tally,
    /// What took how long since.
    pub(crate) timings: Vec<BatchTiming>,
    /// Batches that wait for a schema or for other partitions of the task, in order. Bounded by what the source
    /// had fetched when the partition was paused.
    pub(crate) held: VecDeque<Batch>,
    /// Whether the first of them waits for other partitions.
    pub(crate) waits_for_others: bool,
}

impl Lane {
    /// Places an offered partition; `None` where its topic is neither an input of the stage nor the replay or,
    /// of an act stage, the retry topic of one.
    pub(crate) fn of(spec: &StageSpec, config: &LoopConfig, source: TopicPartition) -> Option<Self> {
        let (topic, way) = place(spec, &source.topic)?;
        Some(Self {
            topic: topic.into(),
            replayed: way == Way::Replay,
            retried: way == Way::Retry,
            destination: Destination {
                letters: dlt_topic(topic, spec.group).into(),
                parking: parking_topic(topic, spec.group).into(),
                replays_max: config.replays_max,
            },
            active: false,
            paused: false,
            caught_up: false,
            reached: Timestamp(i64::MIN),
            from: -1,
            next: -1,
            books: Books::default(),
            tally: Tally::default(),
            timings: Vec::new(),
            held: VecDeque::new(),
            waits_for_others: false,
            source,
        })
    }

    /// Takes the committed position and begins to count from it. `origin` is what offsets in this partition
    /// belong to now, where the books say it.
    ///
    /// # Errors
    /// [`Failure::Stop`] where a foreign tool moved the offset, or where it belongs to something else.
    pub(crate) fn position(
        &mut self,
        group: &str,
        found: Position,
        origin: Option<Origin>,
    ) -> Result<(), Failure> {
        self.books = match found.books {
            BooksFound::New => Books::open(FIRST_VOLUME),
            BooksFound::Ours(books) => books,
            BooksFound::Foreign(metadata) => {
                let message = format!(
                    "the offset {} of group `{group}` in {} was moved by a foreign tool (metadata `{metadata}`); \
                     `throughline groups adopt {group}` shows what accepting or rejecting it would do",
                    found.next, self.source
                );
                return Err(Failure::Stop { code: crate::codes::FOREIGN_OFFSET, message });
            }
        };
        if let Some(now) = origin {
            // Books of an older version do not say where they count; they do from the next commit on.
            if let Some(then) = &self.books.origin {
                incarnation::compare(group, &self.source, found.next, then, &now)?;
            }
            self.books.origin = Some(now);
        }
        self.from = found.next;
        self.next = found.next;
        Ok(())
    }

    /// Takes no more records until the lane is positioned and started again; forgets what is not committed.
    pub(crate) fn deactivate(&mut self) {
        self.active = false;
        self.caught_up = false;
        self.reached = Timestamp(i64::MIN);
        self.tally = Tally::default();
        self.timings.clear();
        self.held.clear();
        self.waits_for_others = false;
    }

    /// Says whether nothing is left to be processed that is known of.
    pub(crate) fn is_read_to_its_end(&self) -> bool {
        self.caught_up && self.held.is_empty()
    }

    /// Returns a time that no record which is still to be processed comes before.
    pub(crate) fn reached(&self) -> Timestamp {
        if self.is_read_to_its_end() {
            return Timestamp(i64::MAX);
        }
        let next = self.held.front().and_then(|batch| batch.iter().find(|record| record.offset >= self.next));
        next.map_or(self.reached, |record| record.time.max(self.reached))
    }

    /// Moves past the record at `offset`, counting the positions before it that hold none.
    pub(crate) fn pass(&mut self, offset: i64, settled: &Settled) {
        if self.next >= 0 {
            self.tally.positions_without_record += u64::try_from(offset - self.next).unwrap_or(0);
        }
        self.tally.count(settled);
        self.next = offset + 1;
    }

    /// Moves past positions `[from, to)` that retention deleted; returns how many were lost to the stage.
    pub(crate) fn overtake(&mut self, from: i64, to: i64) -> u64 {
        let count = |from: i64, to: i64| u64::try_from(to - from).unwrap_or(0);
        if self.next >= 0 {
            // The source had read on over positions without a record.
            self.tally.positions_without_record += count(self.next, from);
        }
        let from = from.max(self.next);
        let lost = if from < 0 { 0 } else { count(from, to) };
        self.tally.overtaken += lost;
        self.next = self.next.max(to);
        lost
    }

    /// Says whether something happened since the last commit.
    pub(crate) fn has_moved(&self) -> bool {
        self.active && self.next != self.from
    }

    /// Returns the step from the committed position to the current one.
    pub(crate) fn advance(&self) -> Advance {
        Advance {
            partition: self.source.clone(),
            from: self.from,
            to: self.next,
            books: self.tally.on_top_of(&self.books),
        }
    }

    /// Goes back to the committed position and forgets what was counted since.
    pub(crate) fn rewind(&mut self) {
        self.next = self.from;
        self.tally = Tally::default();
    }

    /// Notes how long a batch took.
    pub(crate) fn time_batch(&mut self, timing: BatchTiming) {
        self.timings.push(timing);
    }

    /// Makes what was counted the committed books.
    pub(crate) fn committed(&mut self, advance: &Advance) {
        self.from = advance.to;
        self.books = advance.books.clone();
        self.tally = Tally::default();
        self.timings.clear();
    }
}

/// Returns the seconds that the first record of a batch waited for its stage.
pub(crate) fn wait_seconds(batch: &Batch, now: Timestamp) -> f64 {
    if batch.is_empty() { 0.0 } else { seconds_between(batch.get(0).time, now) }
}

#[derive(Deserialize)]
struct Occurrence {
    occurred_at: Timestamp,
    #[serde(default)]
    clock_offset: Option<i64>,
}

/// Returns the age of the first record of a batch by the device's corrected clock. One sample a batch:
/// reading the envelope of every record a second time would cost as much as the stage.
pub(crate) fn message_age(batch: &Batch, codec: &Codec, now: Timestamp) -> Option<f64> {
    let first = (!batch.is_empty()).then(|| batch.get(0))?;
    let occurrence: Occurrence = codec.decode(first.value).ok()?;
    let occurred = Timestamp(occurrence.occurred_at.0.saturating_add(occurrence.clock_offset.unwrap_or(0)));
    Some(seconds_between(occurred, now))
}

/// By which topic a record came to its stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Input,
    Replay,
    Retry,
}

/// Returns the contract's topic and which of its topics `topic` is.
fn place(spec: &StageSpec, topic: &str) -> Option<(&'static str, Way)> {
    spec.inputs.iter().find_map(|input| {
        let way = if topic == *input {
            Way::Input
        } else if topic == replay_topic(input, spec.group) {
            Way::Replay
        } else if spec.kind == Kind::Act && topic == retry_topic(input, spec.group) {
            Way::Retry
        } else {
            return None;
        };
        Some((*input, way))
    })
}
