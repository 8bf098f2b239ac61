//! Commits of what was answered, and the single way back from one that failed or whose fate is unknown.

use super::ActLoop;
use super::window::Window;
use crate::clock::elapsed;
use crate::config::Stopped;
use crate::lane::Lane;
use crate::policy::{self, Response, Step};
use crate::ports::{Effector, Failure, SchemaSource, Source, Transactions};
use throughline_model::stage::Act;

impl<A, E, S, T, Q> ActLoop<A, E, S, T, Q>
where
    A: Act,
    E: Effector,
    S: Source,
    T: Transactions,
    Q: SchemaSource,
{
    pub(super) fn commit_if_due(&mut self) -> Result<(), Stopped> {
        let now = self.clock.now();
        let is_due = self.pending_since.is_some_and(|since| elapsed(since, now) >= self.commit_interval);
        if is_due { self.commit_now() } else { Ok(()) }
    }

    /// Commits what is pending, or takes the single way back.
    pub(super) fn commit_now(&mut self) -> Result<(), Stopped> {
        if self.pending_since.is_none() {
            return Ok(());
        }
        match self.commit() {
            Ok(()) => Ok(()),
            Err(failure) => self.recover(failure),
        }
    }

    fn commit(&mut self) -> Result<(), Failure> {
        let moved = self.lanes.values().filter(|lane| lane.has_moved());
        let advances: Vec<_> = moved.map(Lane::advance).collect();
        if !advances.is_empty() {
            for window in self.windows.values().filter(|window| !window.outbox.is_empty()) {
                self.transactions.send(&window.outbox)?;
            }
            self.transactions.commit(&advances)?;
            for window in self.windows.values_mut() {
                window.outbox.clear();
            }
            self.signals.committed(&mut self.lanes, &advances, self.clock.now());
            self.signals.works("kafka");
            self.recovery.succeeded();
        }
        self.pending_since = None;
        Ok(())
    }

    /// Drops everything that is not committed; the loop begins again at the committed positions and delivers
    /// what lies behind them once more, under the same ids.
    fn recover(&mut self, failure: Failure) -> Result<(), Stopped> {
        let failure = policy::only(self.at(Step::Write), failure, Response::BeginAgain)?;
        self.signals.recovers(&failure);
        if matches!(failure, Failure::Dependency { .. }) {
            self.signals.failed(&failure);
        }
        self.recovery.failed(self.clock.now());
        self.needs_reset = true;
        self.pending_since = None;
        let mut paused = Vec::new();
        for lane in self.lanes.values_mut() {
            if lane.active && !std::mem::replace(&mut lane.paused, true) {
                paused.push(lane.source.clone());
            }
            lane.deactivate();
        }
        for window in self.windows.values_mut() {
            *window = Window::default();
        }
        if !paused.is_empty() {
            self.source.pause(&paused, true);
        }
        Ok(())
    }

    pub(super) fn reset(&mut self) -> Result<(), Stopped> {
        if !self.recovery.is_due(self.clock.now()) {
            return Ok(());
        }
        match self.transactions.reset() {
            Ok(()) => self.needs_reset = false,
            Err(failure) => {
                let failure = policy::only(self.at(Step::Begin), failure, Response::Pause)?;
                self.signals.failed(&failure);
                self.recovery.failed(self.clock.now());
            }
        }
        Ok(())
    }
}
