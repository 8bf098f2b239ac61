//! Records: received, held back where they must wait, and processed with the timers that come before them.

use super::DecideLoop;
use super::timers::{fire_due, flush_beyond};
use crate::clock::seconds_between;
use crate::config::Stopped;
use crate::dead_letter::Fault;
use crate::lane::{BatchTiming, Lane, message_age, wait_seconds};
use crate::policy::{self, Response, Step};
use crate::ports::{SchemaSource, Source, TableReader, Transactions};
use throughline_model::outcome::Outcome;
use throughline_model::record::{Batch, TopicPartition};
use throughline_model::stage::{Decide, Input};
use throughline_model::time::Timestamp;

impl<D, S, T, R, Q> DecideLoop<D, S, T, R, Q>
where
    D: Decide,
    S: Source,
    T: Transactions,
    R: TableReader,
    Q: SchemaSource,
{
    pub(super) fn receive(&mut self, batch: Batch) -> Result<(), Stopped> {
        let Some(lane) = self.lanes.get_mut(&batch.source).filter(|lane| lane.active) else {
            return Ok(()); // Fetched before the partition was given up or the transaction failed.
        };
        lane.caught_up = false;
        if !lane.held.is_empty() {
            let source = batch.source.clone();
            lane.held.push_back(batch);
            self.pause(source);
            return Ok(());
        }
        match self.schemas.resolve(&batch, lane.replayed, self.clock.now()) {
            Ok(()) => self.process_or_hold(batch),
            Err(failure) => {
                let failure = policy::only(self.at(Step::Schema), failure, Response::Pause)?;
                self.signals.failed(&failure);
                self.hold(batch, false);
                Ok(())
            }
        }
    }

    /// Keeps a batch whose schema cannot be asked for now, or before whose next record a timer is due that other
    /// partitions of the task may still disarm, and everything behind it.
    fn hold(&mut self, batch: Batch, waits_for_others: bool) {
        let source = batch.source.clone();
        let lane = self.lanes.get_mut(&source).expect("the batch was received by its lane");
        lane.held.push_front(batch);
        lane.waits_for_others = waits_for_others;
        // Others are waited for briefly: the next batch is taken as well before the delivery is stopped.
        if !waits_for_others {
            self.pause(source);
        }
    }

    fn pause(&mut self, partition: TopicPartition) {
        let lane = self.lanes.get_mut(&partition).expect("a lane that holds a batch is owned");
        if !std::mem::replace(&mut lane.paused, true) {
            self.source.pause(&[partition], true);
        }
    }

    fn process_or_hold(&mut self, batch: Batch) -> Result<(), Stopped> {
        if self.process(&batch)? {
            self.hold(batch, true);
        }
        Ok(())
    }

    /// Goes on with what waits for nothing any more, and asks again for the schemas that held batches wait for.
    pub(super) fn take_held(&mut self) -> Result<(), Stopped> {
        let waiting = self.lanes.values().filter(|lane| lane.waits_for_others);
        for source in waiting.map(|lane| lane.source.clone()).collect::<Vec<_>>() {
            // A failure in between gives up everything that was held.
            let Some(lane) = self.lanes.get_mut(&source) else { continue };
            lane.waits_for_others = false;
            let Some(batch) = lane.held.pop_front() else { continue };
            self.process_or_hold(batch)?;
            self.resume_if_free(&source);
        }
        while self.schemas.backoff.is_due(self.clock.now()) {
            let mut holding = self.lanes.values_mut().filter(|lane| !lane.waits_for_others);
            let Some(lane) = holding.find(|lane| !lane.held.is_empty()) else { break };
            let batch = lane.held.front().expect("it is not empty");
            match self.schemas.resolve(batch, lane.replayed, self.clock.now()) {
                Ok(()) => {
                    let batch = lane.held.pop_front().expect("it is not empty");
                    self.signals.works("registry");
                    let source = batch.source.clone();
                    self.process_or_hold(batch)?;
                    self.resume_if_free(&source);
                }
                Err(failure) => {
                    let failure = policy::only(self.at(Step::Schema), failure, Response::Pause)?;
                    self.signals.failed(&failure);
                }
            }
        }
        Ok(())
    }

    pub(super) fn resume_if_free(&mut self, partition: &TopicPartition) {
        let Some(lane) = self.lanes.get_mut(partition) else { return };
        if lane.active && lane.paused && lane.held.is_empty() {
            lane.paused = false;
            self.source.pause(std::slice::from_ref(partition), false);
        }
    }

    /// Processes a batch, or its beginning: says whether the next record must wait, because a timer is due before
    /// it that other partitions of the task may still disarm. So what comes of records and timers does not depend
    /// on which partition is delivered first.
    fn process(&mut self, batch: &Batch) -> Result<bool, Stopped> {
        let began = self.clock.now();
        let (mut failed, mut waits, mut fired, mut records) = (None, false, false, 0);
        let others = self.reached_by_others(&batch.source);
        let lane = self.lanes.get_mut(&batch.source).expect("only active lanes process");
        let task = self.tasks.get_mut(&batch.source.partition).expect("an active lane has its task");
        let before = lane.tally.counts();
        // After a seek a batch may begin with records that were processed already.
        let unread = lane.next;
        for record in batch.iter().filter(|record| record.offset >= unread) {
            // Timers that were due before this record come first, wherever a batch begins or ends.
            let earlier = Timestamp(record.time.min(others).0.saturating_sub(1));
            let by_record = !self.stage.timers_follow_the_clock();
            while by_record && task.timers.next().is_some_and(|due| due <= earlier) {
                let bytes_max = self.config.bytes_max;
                fire_due(&mut self.stage, task, &mut self.effects, earlier, bytes_max, self.spec.group)?;
                fired = true;
                failed = flush_beyond(bytes_max, &mut self.effects, &mut self.transactions, &self.spec).err();
                if failed.is_some() {
                    break;
                }
            }
            let is_due = |due| due < record.time;
            waits = by_record && failed.is_none() && task.timers.next().is_some_and(is_due);
            if failed.is_some() || waits {
                break;
            }
            records += 1;
            let input = Input {
                topic: &lane.topic,
                replayed: lane.replayed,
                partition: batch.source.partition,
                record,
                codec: self.schemas.codec(),
            };
            let settled = self.stage.process(&input, &mut task.states, &mut self.effects);
            if settled.outcome == Outcome::DeadLettered {
                let fault = Fault {
                    stage: self.spec.group,
                    topic: &batch.source.topic,
                    partition: batch.source.partition,
                    replayed: lane.replayed,
                    step: Fault::step_of(&settled.reason),
                    code: &settled.reason,
                    message: settled.message.as_deref().unwrap_or_default(),
                };
                lane.destination.push(self.effects.outbox_mut(), &record, &fault);
            }
            lane.pass(record.offset, &settled);
            lane.reached = record.time;
            task.timers.follow(&mut task.states, |state| self.stage.due_at(state));
            let bytes_max = self.config.bytes_max;
            failed = flush_beyond(bytes_max, &mut self.effects, &mut self.transactions, &self.spec).err();
            if failed.is_some() {
                break;
            }
        }
        if fired {
            self.pending.fired.push(batch.source.partition);
            self.pending.since.get_or_insert(began);
        }
        if records == 0 && failed.is_none() {
            return Ok(waits);
        }
        let done = self.clock.now();
        let after = lane.tally.counts();
        let counts = std::array::from_fn(|i| after[i] - before[i]);
        lane.time_batch(BatchTiming {
            wait_s: wait_seconds(batch, began),
            age_s: message_age(batch, self.schemas.codec(), began),
            work_s: seconds_between(began, done),
            done_at: done,
            counts,
        });
        self.pending.since.get_or_insert(began);
        self.pending.records += records;
        self.pending.bytes += batch.bytes_held();
        failed.map_or(Ok(waits), |failure| self.recover(failure).map(|()| false))
    }

    /// Returns how far the other partitions of the task came, by the time of their records.
    fn reached_by_others(&self, source: &TopicPartition) -> Timestamp {
        let others = self.lanes.values().filter(|lane| lane.source.partition == source.partition);
        let others = others.filter(|lane| lane.source != *source).map(Lane::reached);
        others.min().unwrap_or(Timestamp(i64::MAX))
    }
}
