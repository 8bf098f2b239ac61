//! Timers: of partitions that were read to their ends by the clock, and the firing that records share.

use super::commits::flush;
use super::{DecideLoop, Reach, Task};
use crate::clock::elapsed;
use crate::codes;
use crate::config::Stopped;
use crate::lane::Lane;
use crate::ports::{Failure, SchemaSource, Source, TableReader, Transactions};
use crate::timers::Timers;
use throughline_model::stage::{Decide, Effects, StageSpec};
use throughline_model::time::Timestamp;

impl<D, S, T, R, Q> DecideLoop<D, S, T, R, Q>
where
    D: Decide,
    S: Source,
    T: Transactions,
    R: TableReader,
    Q: SchemaSource,
{
    /// Lets timers fire by the clock where every partition of a task was read to its end.
    pub(super) fn tick(&mut self) -> Result<(), Stopped> {
        let now = self.clock.now().minus(self.config.tick_grace);
        if now < self.ticked_at && self.stage.timers_follow_the_clock() {
            // The clock was set back: what was put off by it would wait for the difference.
            for task in self.tasks.values_mut() {
                task.timers = Timers::of(&task.states, |state| self.stage.due_at(state));
            }
        }
        self.ticked_at = now;
        let idle: Vec<i32> = self
            .tasks
            .iter()
            .filter(|(number, task)| {
                task.timers.first_due(now).is_some()
                    && self
                        .lanes
                        .values()
                        .filter(|l| l.source.partition == **number)
                        .all(Lane::is_read_to_its_end)
            })
            .map(|(number, _)| *number)
            .collect();
        if idle.is_empty() || !self.kafka_answers() {
            return Ok(());
        }
        for number in idle {
            let task = self.tasks.get_mut(&number).expect("it was just listed");
            self.pending.fired.push(number);
            self.pending.since.get_or_insert(self.clock.now());
            let bytes_max = self.config.bytes_max;
            while task.timers.first_due(now).is_some() {
                fire_due(&mut self.stage, task, &mut self.effects, now, bytes_max, self.spec.group)?;
                let flushed = flush_beyond(bytes_max, &mut self.effects, &mut self.transactions, &self.spec);
                if let Err(failure) = flushed {
                    return self.recover(failure);
                }
            }
        }
        Ok(())
    }

    pub(super) fn reached(&mut self) {
        if matches!(self.reachable, Reach::No(_)) {
            self.reachable = Reach::Again(self.clock.now());
            self.signals.works("kafka");
        }
    }

    /// Says whether Kafka delivers now, asking it where the source said that it does not.
    fn kafka_answers(&mut self) -> bool {
        let now = self.clock.now();
        match &mut self.reachable {
            Reach::Yes => return true,
            Reach::Again(since) => {
                // As long as the longest poll once more: records appended during the outage come first.
                if elapsed(*since, now) >= self.config.poll_wait.saturating_mul(10) {
                    self.reachable = Reach::Yes;
                    return true;
                }
            }
            Reach::No(backoff) if backoff.is_due(now) => {
                let owned: Vec<_> = self.lanes.keys().cloned().collect();
                match self.source.committed(&owned) {
                    Ok(_) => self.reached(),
                    Err(_) => backoff.failed(now), // Said already, by the event.
                }
            }
            Reach::No(_) => {}
        }
        false
    }
}

/// Hands what was emitted to the open transaction where it has grown large.
pub(super) fn flush_beyond<T: Transactions>(
    bytes_max: usize,
    effects: &mut Effects,
    transactions: &mut T,
    spec: &StageSpec,
) -> Result<(), Failure> {
    if effects.outbox().bytes_held() < bytes_max { Ok(()) } else { flush(effects, transactions, spec) }
}

/// Lets timers of a task fire that are due at or before `now`, in order of (due time, key): all of them, or
/// until `bytes_max` bytes wait to be handed over. After an outage every timer of a partition may be due.
pub(super) fn fire_due<D: Decide>(
    stage: &mut D,
    task: &mut Task<D::State>,
    effects: &mut Effects,
    now: Timestamp,
    bytes_max: usize,
    group: &'static str,
) -> Result<(), Stopped> {
    while let Some((due, key)) = task.timers.first_due(now) {
        let key = key.to_owned();
        stage.fire(&key, due, &mut task.states, effects);
        task.timers.follow(&mut task.states, |state| stage.due_at(state));
        if task.timers.due(&key).is_some_and(|next| next <= due) {
            let message = format!("the timer of `{key}` in stage `{group}` was due at {due} and still is");
            return Err(Stopped { stage: group, code: codes::TIMER_STUCK, message });
        }
        if effects.outbox().bytes_held() >= bytes_max {
            break;
        }
    }
    Ok(())
}
