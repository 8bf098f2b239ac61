//! What one partition of an act stage has in work: a short window of records, answered in any order and
//! passed in theirs.

use crate::clock::seconds_between;
use crate::dead_letter::Retry;
use crate::lane::BatchTiming;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;
use throughline_model::outcome::{Outcome, Settled};
use throughline_model::record::{Batch, Outbox, Record};
use throughline_model::stage::Delivery;
use throughline_model::time::Timestamp;

/// How many records of a partition may be without an answer: one that failed, and one that shows whether others
/// pass.
const OPEN_MAX: usize = 2;
/// How many records a window holds, those included for which nothing is to be sent and which wait for one
/// before them.
const ITEMS_MAX: usize = 64;

/// What was read of the partition and is not in the window yet.
pub(super) enum Piece {
    Batch(Arc<Batch>),
    Gap { from: i64, to: i64 },
}

/// Where a settled record goes besides.
#[derive(Debug)]
pub(super) enum Route {
    Nowhere,
    /// To the dead letters, with Connect's name of the step that failed.
    Letters(&'static str),
    /// To the retry topic, with what went wrong.
    Retry(Retry, String),
}

#[derive(Debug)]
pub(super) enum Step {
    /// Not begun, or to be begun again.
    Waiting,
    /// Under way under this token.
    UnderWay(u64),
    /// Known; it passes once everything before it has.
    Settled(Settled, Route),
}

/// One record of the window.
pub(super) struct Item {
    batch: Arc<Batch>,
    index: usize,
    pub(super) delivery: Delivery,
    pub(super) step: Step,
    /// Not begun before.
    due: Timestamp,
    /// Since when it waits for that.
    waits_since: Timestamp,
    /// How often it was set aside before.
    pub(super) asides: u32,
    /// How many deliveries had passed when this one last failed.
    passed_at_failure: Option<u64>,
    /// Whether it failed since it is in the window.
    failed_here: bool,
    /// The token of its last attempt; tokens rise, so the lowest was tried longest ago.
    tried: Option<u64>,
    taken_at: Timestamp,
    age_s: Option<f64>,
}

impl Item {
    /// Takes record `index` of `batch` with what its stage wants for it.
    pub(super) fn new(
        batch: Arc<Batch>,
        index: usize,
        wanted: Result<Delivery, Settled>,
        now: Timestamp,
        age_s: Option<f64>,
    ) -> Self {
        let (delivery, step) = match wanted {
            Ok(delivery) => (delivery, Step::Waiting),
            Err(settled) => {
                let is_letter = settled.outcome == Outcome::DeadLettered;
                let step = crate::dead_letter::Fault::step_of(&settled.reason);
                let route = if is_letter { Route::Letters(step) } else { Route::Nowhere };
                (Delivery::default(), Step::Settled(settled, route))
            }
        };
        Self {
            batch,
            index,
            delivery,
            step,
            due: now,
            waits_since: now,
            asides: 0,
            passed_at_failure: None,
            failed_here: false,
            tried: None,
            taken_at: now,
            age_s,
        }
    }

    /// Continues what a retry topic says of the record. It failed before: what passes while it waits tells that
    /// the fault is its own.
    /// The clock of another member wrote until when it waits: never longer than `most`.
    pub(super) fn set_aside_before(&mut self, retry: Retry, passed: u64, most: Duration) {
        self.asides = retry.count;
        self.due = retry.not_before.min(self.taken_at.plus(most));
        self.passed_at_failure = (retry.count > 0).then_some(passed);
    }

    /// Lets it wait from now until it is due.
    pub(super) fn wait_until(&mut self, due: Timestamp, now: Timestamp) {
        (self.step, self.due, self.waits_since) = (Step::Waiting, due, now);
    }

    /// Says whether it may be tried. A clock that was set back makes it due.
    fn is_due(&self, now: Timestamp) -> bool {
        self.due <= now || now < self.waits_since
    }

    pub(super) fn record(&self) -> Record<'_> {
        self.batch.get(self.index)
    }

    /// Notes a failure; returns whether others passed since the one before, so that the fault is this record's.
    pub(super) fn failed(&mut self, passed: u64) -> bool {
        self.failed_here = true;
        self.passed_at_failure.replace(passed).is_some_and(|before| passed > before)
    }

    pub(super) fn settle(&mut self, settled: Settled, route: Route) {
        self.step = Step::Settled(settled, route);
    }

    /// Returns how long it took, now that it is settled with `outcome`.
    pub(super) fn timing(&self, outcome: Outcome) -> BatchTiming {
        let mut counts = [0; Outcome::ALL.len()];
        counts[outcome.index()] = 1;
        BatchTiming {
            wait_s: seconds_between(self.record().time, self.taken_at),
            age_s: self.age_s,
            work_s: 0.0,
            // What follows is the effect: the delivery and its commit.
            done_at: self.taken_at,
            counts,
        }
    }

    fn is_settled(&self) -> bool {
        matches!(self.step, Step::Settled(..))
    }
}

/// The records in work of one partition, what waits behind them, and what their commit writes.
#[derive(Default)]
pub(super) struct Window {
    pub(super) queue: VecDeque<Piece>,
    /// The next record of the first batch of the queue.
    pub(super) at: usize,
    pub(super) items: VecDeque<Item>,
    /// Dead letters and records set aside of what has passed and is not committed.
    pub(super) outbox: Outbox,
}

impl Window {
    /// Says whether another record may come in: only behind one that failed, to see whether it passes.
    pub(super) fn has_room(&self) -> bool {
        let open = || self.items.iter().filter(|item| !item.is_settled());
        self.items.len() < ITEMS_MAX && open().count() < OPEN_MAX && open().all(|item| item.failed_here)
    }

    /// Says whether something of the queue can come in now.
    pub(super) fn can_take(&self) -> bool {
        match self.queue.front() {
            Some(Piece::Batch(_)) => self.has_room(),
            Some(Piece::Gap { .. }) => self.items.is_empty(),
            None => false,
        }
    }

    pub(super) fn is_under_way(&self) -> bool {
        self.items.iter().any(|item| matches!(item.step, Step::UnderWay(_)))
    }

    /// Returns the index of the item to begin next and when it was tried last: of those that are due the one
    /// tried longest ago. A record that did not fail is not overtaken.
    pub(super) fn next_to_begin(&self, now: Timestamp) -> Option<(usize, Option<u64>)> {
        if self.is_under_way() {
            return None;
        }
        let mut found: Option<(usize, Option<u64>)> = None;
        for (index, item) in self.items.iter().enumerate().filter(|(_, item)| !item.is_settled()) {
            if item.is_due(now) && found.is_none_or(|(_, tried)| item.tried < tried) {
                found = Some((index, item.tried));
            }
            if !item.failed_here {
                break;
            }
        }
        found
    }

    /// Marks an item as begun under `token` and returns its delivery.
    pub(super) fn begin(&mut self, index: usize, token: u64) -> &Delivery {
        let item = &mut self.items[index];
        item.step = Step::UnderWay(token);
        item.tried = Some(token);
        &item.delivery
    }

    pub(super) fn under(&mut self, token: u64) -> Option<&mut Item> {
        self.items.iter_mut().find(|item| matches!(item.step, Step::UnderWay(t) if t == token))
    }

    /// Takes the first item where it is settled.
    pub(super) fn pop_settled(&mut self) -> Option<Item> {
        self.items.pop_front_if(|item| item.is_settled())
    }

    /// Returns when the first record that waits is due.
    pub(super) fn first_due(&self) -> Option<Timestamp> {
        let waiting = self.items.iter().filter(|item| matches!(item.step, Step::Waiting));
        waiting.map(|item| item.due).min()
    }
}
