//! Commits, and the single way back from one that failed or whose fate is unknown.

use super::{DecideLoop, Pending};
use crate::clock::elapsed;
use crate::codes;
use crate::config::Stopped;
use crate::lane::Lane;
use crate::policy::{self, Response, Step};
use crate::ports::{Failure, SchemaSource, Source, TableReader, Transactions};
use std::sync::Arc;
use throughline_model::keyed::KeyedState;
use throughline_model::stage::{Decide, Effects, StageSpec};

impl<D, S, T, R, Q> DecideLoop<D, S, T, R, Q>
where
    D: Decide,
    S: Source,
    T: Transactions,
    R: TableReader,
    Q: SchemaSource,
{
    pub(super) fn is_pending(&self) -> bool {
        self.pending.since.is_some()
    }

    pub(super) fn commit_if_due(&mut self) -> Result<(), Stopped> {
        let Some(since) = self.pending.since else { return Ok(()) };
        let due = elapsed(since, self.clock.now()) >= self.commit_interval
            || self.pending.records >= self.config.records_max
            || self.pending.bytes >= self.config.bytes_max;
        if due { self.commit_now() } else { Ok(()) }
    }

    /// Commits what is pending, or takes the single way back.
    pub(super) fn commit_now(&mut self) -> Result<(), Stopped> {
        if !self.is_pending() {
            return Ok(());
        }
        match self.commit() {
            Ok(()) => Ok(()),
            Err(failure) => self.recover(failure),
        }
    }

    pub(super) fn commit(&mut self) -> Result<(), Failure> {
        self.write_states()?;
        flush(&mut self.effects, &mut self.transactions, &self.spec)?;
        let fired = |lane: &Lane| self.pending.fired.contains(&lane.source.partition) && lane.next >= 0;
        let moved = self.lanes.values().filter(|lane| lane.active && (lane.has_moved() || fired(lane)));
        let advances: Vec<_> = moved.map(Lane::advance).collect();
        self.transactions.commit(&advances)?;
        self.signals.committed(&mut self.lanes, &advances, self.clock.now());
        self.signals.answered(&self.effects.take_answers());
        self.signals.works("kafka");
        self.recovery.succeeded();
        self.pending = Pending::default();
        Ok(())
    }

    /// Puts the changed states of every task into the outbox, handing it over where it grows large.
    pub(super) fn write_states(&mut self) -> Result<(), Failure> {
        let Some(topic) = self.changelog.clone() else { return Ok(()) };
        let codec = Arc::clone(self.schemas.codec());
        for (number, task) in &mut self.tasks {
            let (effects, transactions, spec) = (&mut self.effects, &mut self.transactions, &self.spec);
            task.states.drain_dirty(|key, state| {
                let outbox = effects.outbox_mut();
                let bytes = Some(key.as_bytes());
                let written = outbox.push_with(&topic, Some(*number), bytes, None, |out| {
                    state.encode(&codec, out).map(|()| true)
                });
                written.map_err(|e| Failure::Stop {
                    code: codes::STATE_UNWRITABLE,
                    message: format!("the state under `{key}` of stage `{}`: {e}", spec.group),
                })?;
                if outbox.bytes_held() >= self.config.bytes_max {
                    flush(effects, transactions, spec)?;
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Drops everything that is not committed; the loop begins again at the committed positions.
    pub(super) fn recover(&mut self, failure: Failure) -> Result<(), Stopped> {
        let failure = policy::only(self.at(Step::Write), failure, Response::BeginAgain)?;
        self.signals.recovers(&failure);
        if matches!(failure, Failure::Dependency { .. }) {
            self.signals.failed(&failure);
        }
        self.recovery.failed(self.clock.now());
        self.needs_reset = true;
        self.effects.clear();
        self.pending = Pending::default();
        for number in std::mem::take(&mut self.tasks).into_keys() {
            self.suspend(number);
        }
        Ok(())
    }

    pub(super) fn reset(&mut self) -> Result<(), Stopped> {
        if !self.recovery.is_due(self.clock.now()) {
            return Ok(());
        }
        match self.transactions.reset() {
            Ok(()) => {
                self.needs_reset = false;
                Ok(())
            }
            Err(failure) => {
                let failure = policy::only(self.at(Step::Begin), failure, Response::Pause)?;
                self.signals.failed(&failure);
                self.recovery.failed(self.clock.now());
                Ok(())
            }
        }
    }
}

/// Hands what was emitted to the open transaction.
pub(super) fn flush<T: Transactions>(
    effects: &mut Effects,
    transactions: &mut T,
    spec: &StageSpec,
) -> Result<(), Failure> {
    if let Some(error) = effects.take_failure() {
        let message = format!("stage `{}`: {error}", spec.group);
        return Err(Failure::Stop { code: codes::OUTPUT_INVALID, message });
    }
    if !effects.outbox().is_empty() {
        transactions.send(effects.outbox())?;
        effects.outbox_mut().clear();
    }
    Ok(())
}
