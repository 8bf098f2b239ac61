//! How tasks begin: tables first, then positions, state and delivery of every task that is complete.

use super::{DecideLoop, Task};
use crate::codes;
use crate::config::Stopped;
use crate::ports::{Failure, SchemaSource, Source, TableReader, Transactions};
use crate::sabotage::Sabotage;
use crate::timers::Timers;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use throughline_model::codec::Codec;
use throughline_model::keyed::{Keyed, KeyedState};
use throughline_model::record::{Batch, TopicPartition};
use throughline_model::stage::Decide;

impl<D, S, T, R, Q> DecideLoop<D, S, T, R, Q>
where
    D: Decide,
    S: Source,
    T: Transactions,
    R: TableReader,
    Q: SchemaSource,
{
    /// Reads the tables first; then activates the tasks that are complete.
    pub(super) fn set_up(&mut self) -> Result<(), Stopped> {
        let now = self.clock.now();
        if !self.setup.is_due(now) {
            return Ok(());
        }
        let mut done =
            self.tables.follow(&mut self.stage, &mut self.reader, &mut self.schemas, &self.signals, now);
        let chosen = self.next_tasks();
        if done.is_ok() && self.tables.are_complete() && !chosen.is_empty() {
            // A restore may take long: what the running tasks did must not wait for it.
            self.commit_now()?;
            if self.needs_reset {
                return Ok(());
            }
            done = self.activate(&chosen);
            self.failed_last = done.is_err().then_some(chosen[chosen.len() - 1]).or(self.failed_last);
        }
        self.signals.set_up(done, &mut self.setup, self.clock.now())
    }

    /// Returns the tasks that are complete and not active.
    pub(super) fn complete(&self) -> Vec<i32> {
        let waiting = self.lanes.values().filter(|lane| !lane.active).map(|lane| lane.source.partition);
        let numbers: BTreeSet<i32> = waiting.filter(|number| !self.tasks.contains_key(number)).collect();
        let owned = |number: &i32| {
            let named = |topic: &Arc<str>| partition_of(topic, *number);
            self.topics.iter().all(|topic| self.lanes.contains_key(&named(topic)))
        };
        numbers.into_iter().filter(owned).collect()
    }

    /// Returns the tasks to activate next: all that are complete or, after a failure and until none waits,
    /// one at a time, so that a partition which cannot be restored does not hold up the others.
    fn next_tasks(&mut self) -> Vec<i32> {
        let mut complete = self.complete();
        if complete.is_empty() {
            self.failed_last = None;
        }
        if let Some(failed) = self.failed_last {
            let following = complete.partition_point(|number| *number <= failed) % complete.len();
            complete = vec![complete[following]];
        }
        complete
    }

    /// Positions, state and delivery of several tasks with one request for each: a seek waits for the fetch
    /// in progress, however many partitions it names.
    fn activate(&mut self, numbers: &[i32]) -> Result<(), Failure> {
        let of_task = |number| self.topics.iter().map(move |topic| partition_of(topic, number));
        let partitions: Vec<_> = numbers.iter().flat_map(|number| of_task(*number)).collect();
        let here = self.watch.ask()?;
        // The committed positions come first: they wait for open transactions, whose state changes the
        // restore must see.
        let positions = self.source.committed(&partitions)?;
        for (partition, found) in partitions.iter().zip(positions) {
            let lane = self.lanes.get_mut(partition).expect("the task is complete");
            let origin = here.origin(&partition.topic, self.changelog.as_deref())?;
            lane.position(self.spec.group, found, Some(origin))?;
        }
        let restored = self.restore(numbers)?;
        self.expect_positions(&restored)?;
        let starts: Vec<_> = partitions.iter().map(|p| (p.clone(), self.lanes[p].next)).collect();
        self.source.start(&starts)?;
        for (number, states) in restored {
            let timers = Timers::of(&states, |state| self.stage.due_at(state));
            let positions = starts.iter().filter(|(p, _)| p.partition == number);
            tracing::info!(
                stage = self.spec.group,
                partition = number,
                keys = states.len(),
                positions = %positions.map(|(p, next)| format!("{p}@{next}")).collect::<Vec<_>>().join(" "),
                "a task begins"
            );
            self.tasks.insert(number, Task { states, timers });
        }
        let mut resumed = Vec::new();
        for partition in partitions {
            let lane = self.lanes.get_mut(&partition).expect("the task is complete");
            lane.active = true;
            if std::mem::take(&mut lane.paused) {
                resumed.push(partition);
            }
        }
        if !resumed.is_empty() {
            self.source.pause(&resumed, false);
        }
        Ok(())
    }

    /// Stops where there is state but no position: both are written in one transaction, so the positions were
    /// lost. One input alone may have none, because nothing ever came in it.
    fn expect_positions(&self, restored: &BTreeMap<i32, Keyed<D::State>>) -> Result<(), Failure> {
        let is_unplaced = |number: i32| {
            let mut lanes = self.lanes.values().filter(|lane| lane.source.partition == number);
            lanes.all(|lane| lane.next < 0)
        };
        let found = restored.iter().find(|(number, states)| !states.is_empty() && is_unplaced(**number));
        let Some((number, states)) = found else { return Ok(()) };
        let group = self.spec.group;
        Err(Failure::Stop {
            code: codes::STATE_WITHOUT_POSITION,
            message: format!(
                "partition {number} of `{}` holds the state of {} keys, but group `{group}` has no committed \
                 offset there; decide with `throughline groups adopt {group} --begin earliest` or `--begin end`",
                self.changelog.as_deref().unwrap_or_default(),
                states.len()
            ),
        })
    }

    fn restore(&mut self, numbers: &[i32]) -> Result<BTreeMap<i32, Keyed<D::State>>, Failure> {
        let mut states: BTreeMap<_, _> = numbers.iter().map(|number| (*number, Keyed::default())).collect();
        let Some(topic) = &self.changelog else { return Ok(states) };
        if Sabotage::ForgetState.is_chosen() {
            return Ok(states);
        }
        let now = self.clock.now();
        let mut result = Ok(());
        let (source, signals) = (&mut self.source, &self.signals);
        self.reader.read_partitions(topic, numbers, &mut |batch| {
            source.keep_alive();
            signals.turned();
            if result.is_ok() {
                result = self.schemas.resolve(batch, false, now);
            }
            if result.is_ok() {
                let states = states.get_mut(&batch.source.partition).expect("only these are read");
                result = restore_batch(batch, self.schemas.codec(), states);
            }
        })?;
        result.map(|()| states)
    }
}

fn partition_of(topic: &Arc<str>, partition: i32) -> TopicPartition {
    TopicPartition { topic: Arc::clone(topic), partition }
}

fn restore_batch<S: KeyedState>(batch: &Batch, codec: &Codec, states: &mut Keyed<S>) -> Result<(), Failure> {
    for record in batch.iter() {
        let unreadable = |why: String| Failure::Stop {
            code: codes::STATE_UNREADABLE,
            message: format!("{} at offset {}: {why}", batch.source, record.offset),
        };
        let key = record.key_str().ok_or_else(|| unreadable("the key is not text".to_owned()))?;
        let state = record.value.map(|value| S::decode(value, codec)).transpose();
        states.restore(key, state.map_err(|e| unreadable(format!("the state under `{key}`: {e}")))?);
    }
    Ok(())
}
