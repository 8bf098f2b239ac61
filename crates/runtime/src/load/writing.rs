//! Writing what was gathered, and the search for the record that the store refuses.

use super::{LoadLoop, push_letter, rows_of};
use crate::clock::elapsed;
use crate::codes;
use crate::config::Stopped;
use crate::lane::Lane;
use crate::policy::{self, Response, Step};
use crate::ports::{Advance, Failure, Outlet, SchemaSource, Source, Store};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::Duration;
use throughline_model::codec::Codec;
use throughline_model::outcome::{Outcome, Settled};
use throughline_model::record::{Batch, Outbox, Record, TopicPartition};
use throughline_model::rows::Rows;
use throughline_model::stage::Load;

/// How long a revocation or the drain may go on searching a refused record before it is left to the next
/// owner. Well below the 45 s that Kafka's default session lasts.
const FINISH_BUDGET: Duration = Duration::from_secs(5);

/// What was read and is not written yet, in order of arrival, hence in order within each partition.
pub(super) enum Piece {
    Batch(Batch),
    Overtaken { partition: TopicPartition, from: i64, to: i64 },
}

impl Piece {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Batch(batch) => batch.len(),
            Self::Overtaken { .. } => 1,
        }
    }
}

/// Items `[from, to)` of what is gathered, still to be written.
pub(super) struct Part {
    from: usize,
    to: usize,
    refusal: Option<Refusal>,
}

/// Why the store refused the single record of a part.
pub(super) struct Refusal {
    settled: Settled,
    letter_sent: bool,
}

/// What the loop does with what it gathered.
pub(super) enum Writing {
    /// It gathers more until a write is due.
    Gathering,
    /// The whole write waits for its next attempt.
    Retrying,
    /// The store refused the data: parts of it are written in order, the next one last.
    Searching(Vec<Part>),
}

impl<L, S, W, O, Q> LoadLoop<L, S, W, O, Q>
where
    L: Load,
    S: Source,
    W: Store,
    O: Outlet,
    Q: SchemaSource,
{
    pub(super) fn is_full(&self) -> bool {
        self.rows.len() >= self.config.records_max || self.bytes >= self.config.bytes_max
    }

    pub(super) fn write_if_due(&mut self) -> Result<(), Stopped> {
        let now = self.clock.now();
        let due = match self.writing {
            Writing::Gathering => self
                .pending_since
                .is_some_and(|since| self.is_full() || elapsed(since, now) >= self.commit_interval),
            Writing::Retrying | Writing::Searching(_) => self.retry.is_due(now),
        };
        if due { self.write() } else { Ok(()) }
    }

    /// Writes what can be written before partitions are given back. What the store cannot take now is
    /// dropped: the next owner reads it again.
    pub(super) fn finish(&mut self) -> Result<(), Stopped> {
        let began = self.clock.now();
        while self.pending_since.is_some()
            && !self.retry.has_failed()
            && elapsed(began, self.clock.now()) < FINISH_BUDGET
        {
            self.write()?;
        }
        Ok(())
    }

    /// Attempts the write, or the next part of it.
    fn write(&mut self) -> Result<(), Stopped> {
        let attempted = match &mut self.writing {
            Writing::Gathering | Writing::Retrying => self.write_all(),
            Writing::Searching(_) => self.write_part(),
        };
        let Err(failure) = attempted else {
            self.retry.succeeded();
            return Ok(());
        };
        let able = [Response::Pause, Response::BeginAgain, Response::Search];
        match policy::respond(self.at(Step::Write), failure, &able)? {
            (Response::Search, Failure::Data { code, message }) => self.search(&code, &message),
            (Response::BeginAgain, failure) => {
                self.signals.recovers(&failure);
                self.setup.failed(self.clock.now());
                self.begin_again();
                Ok(())
            }
            (_, failure) => {
                self.signals.failed(&failure);
                self.retry.failed(self.clock.now());
                if matches!(self.writing, Writing::Gathering) {
                    self.writing = Writing::Retrying;
                }
                self.pause_all();
                Ok(())
            }
        }
    }

    fn write_all(&mut self) -> Result<(), Failure> {
        if !self.letters.is_empty() {
            self.outlet.send_rest(&mut self.letters)?;
        }
        self.write_rows()?;
        self.forget_gathered();
        self.writing = Writing::Gathering;
        self.resume_free();
        Ok(())
    }

    /// Writes the rows at hand with the step of every lane that moved.
    fn write_rows(&mut self) -> Result<(), Failure> {
        let moved = self.lanes.values().filter(|lane| lane.has_moved());
        let advances: Vec<Advance> = moved.map(Lane::advance).collect();
        self.store.write(self.spec.group, &self.rows, &advances)?;
        self.signals.committed(&mut self.lanes, &advances, self.clock.now());
        self.signals.works("database");
        self.outlet.mirror(self.spec.group, &advances);
        Ok(())
    }

    pub(super) fn forget_gathered(&mut self) {
        self.pieces.clear();
        self.bytes = 0;
        self.rows.clear();
        self.letters.clear();
        self.pending_since = None;
    }

    /// Begins or goes on to search the record that the store refuses.
    fn search(&mut self, code: &str, message: &str) -> Result<(), Stopped> {
        if self.rows.is_empty() {
            let message = format!("a write without rows was refused ({code}): {message}");
            return Err(Stopped { stage: self.spec.group, code: codes::STORE_REFUSES_NOTHING, message });
        }
        let refused = match &mut self.writing {
            Writing::Searching(parts) => parts.pop(),
            Writing::Gathering | Writing::Retrying => {
                tracing::warn!(stage = self.spec.group, code, "the store refused data: {message}");
                self.pause_all();
                for lane in self.lanes.values_mut() {
                    lane.rewind();
                    lane.timings.clear();
                }
                self.writing = Writing::Searching(Vec::new());
                Some(Part { from: 0, to: self.pieces.iter().map(Piece::len).sum(), refusal: None })
            }
        };
        let Part { from, to, .. } = refused.expect("the part that was refused is still the next one");
        let Writing::Searching(parts) = &mut self.writing else { return Ok(()) };
        if to - from > 1 {
            let middle = from + (to - from) / 2;
            parts.push(Part { from: middle, to, refusal: None });
            parts.push(Part { from, to: middle, refusal: None });
        } else {
            let settled = Settled {
                outcome: Outcome::DeadLettered,
                reason: Cow::Owned(code.to_owned()),
                message: Some(message.to_owned()),
            };
            parts.push(Part { from, to, refusal: Some(Refusal { settled, letter_sent: false }) });
        }
        Ok(())
    }

    /// Writes the next part of a write that was refused.
    fn write_part(&mut self) -> Result<(), Failure> {
        let Writing::Searching(parts) = &mut self.writing else { return Ok(()) };
        self.rows.clear();
        self.lanes.values_mut().for_each(Lane::rewind);
        if let Some(part) = parts.last_mut() {
            let codec = self.schemas.codec();
            let range = part.from..part.to;
            match &mut part.refusal {
                None => apply(&mut self.stage, &self.pieces, range, &mut self.lanes, &mut self.rows, codec),
                Some(refusal) => {
                    let (lane, record) = single(&self.pieces, part.from, &mut self.lanes);
                    if !refusal.letter_sent {
                        let mut letter = Outbox::default();
                        push_letter(&mut letter, lane, &record, &refusal.settled, self.spec.group);
                        self.outlet.send_all(&letter)?;
                        refusal.letter_sent = true;
                    }
                    lane.pass(record.offset, &refusal.settled);
                }
            }
            self.write_rows()?;
        }
        let Writing::Searching(parts) = &mut self.writing else { return Ok(()) };
        parts.pop();
        if parts.is_empty() {
            self.forget_gathered();
            self.writing = Writing::Gathering;
            self.resume_free();
        }
        Ok(())
    }
}

/// Makes the rows of items `range` again and moves the lanes past them.
fn apply<L: Load>(
    stage: &mut L,
    pieces: &[Piece],
    range: std::ops::Range<usize>,
    lanes: &mut BTreeMap<TopicPartition, Lane>,
    rows: &mut Rows,
    codec: &Codec,
) {
    let mut start = 0;
    for piece in pieces {
        let here = start..start + piece.len();
        start = here.end;
        let (from, to) = (range.start.max(here.start), range.end.min(here.end));
        if from >= to {
            continue;
        }
        match piece {
            Piece::Overtaken { partition, from, to } => {
                let lane = lanes.get_mut(partition).expect("partitions given up begin again without pieces");
                lane.overtake(*from, *to);
            }
            Piece::Batch(batch) => {
                let lane =
                    lanes.get_mut(&batch.source).expect("partitions given up begin again without pieces");
                for record in (from - here.start..to - here.start).map(|index| batch.get(index)) {
                    if record.offset >= lane.next {
                        let settled = rows_of(stage, rows, lane, record, codec);
                        lane.pass(record.offset, &settled);
                    }
                }
            }
        }
    }
}

/// Returns the record at item `at`, which the store refused, with its lane.
fn single<'p, 'l>(
    pieces: &'p [Piece],
    at: usize,
    lanes: &'l mut BTreeMap<TopicPartition, Lane>,
) -> (&'l mut Lane, Record<'p>) {
    let mut start = 0;
    for piece in pieces {
        if let (Piece::Batch(batch), Some(index)) = (piece, at.checked_sub(start))
            && index < batch.len()
        {
            let lane = lanes.get_mut(&batch.source).expect("partitions given up begin again without pieces");
            return (lane, batch.get(index));
        }
        start += piece.len();
    }
    unreachable!("only a part with rows is refused, and rows come from a record")
}
