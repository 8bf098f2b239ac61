//! The loop of decide stages: Kafka to Kafka, with outputs, state changes and offsets in one transaction.
//!
//! The unit is a task: partition number p over all inputs and their replay topics. It is active while p of
//! every one of them is owned; its state lives in partition p of the changelog. There is a single way back
//! from any failed or unknown commit: drop producer and state, reset, read the committed offsets, restore,
//! go on, with bounded back-off.

mod activation;
mod commits;

use crate::clock::{Backoff, Clock, elapsed, seconds_between};
use crate::codes;
use crate::config::{LoopConfig, Shutdown, Stopped};
use crate::dead_letter::Fault;
use crate::incarnation::{AskIncarnation, Watch};
use crate::lane::{BatchTiming, Lane, wait_seconds};
use crate::policy::{self, At, Response, Step};
use crate::ports::{Failure, PipelineEvent, SchemaSource, Source, TableReader, Transactions};
use crate::schemas::Schemas;
use crate::signals::{Notes, Signals};
use crate::tables::Tables;
use crate::timers::Timers;
use commits::flush;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use throughline_model::catalog::replay_topic;
use throughline_model::codec::Codec;
use throughline_model::keyed::Keyed;
use throughline_model::outcome::Outcome;
use throughline_model::record::{Batch, TopicPartition};
use throughline_model::stage::{Decide, Effects, Input, StageSpec};
use throughline_model::time::Timestamp;
use throughline_telemetry::RoleHealth;

/// What a decide stage runs on.
pub struct DecidePorts<S, T, R, Q> {
    /// The group's member; subscribed to the inputs and their replay topics.
    pub source: S,
    /// The transactional producer.
    pub transactions: T,
    /// Reads tables and the changelog.
    pub tables: R,
    /// Resolves schema ids.
    pub schemas: Q,
    /// Asks which cluster and topics these are: the inputs, their replay topics, the changelog.
    pub incarnation: AskIncarnation,
    /// The schemas known so far, with the output topics bound.
    pub codec: Arc<Codec>,
    /// The platform's time.
    pub clock: Arc<dyn Clock>,
}

/// Runs a decide stage until `shutdown`, then commits what is in flight and gives the partitions back.
/// Blocks; needs a thread of its own.
///
/// # Errors
/// [`Stopped`] when a person must act.
pub fn run_decide<D, S, T, R, Q>(
    stage: D,
    ports: DecidePorts<S, T, R, Q>,
    config: LoopConfig,
    shutdown: &Shutdown,
    health: RoleHealth,
) -> Result<(), Stopped>
where
    D: Decide,
    S: Source,
    T: Transactions,
    R: TableReader,
    Q: SchemaSource,
{
    let mut decide = DecideLoop::new(stage, ports, config, health);
    while !shutdown.is_requested() {
        decide.turn()?;
    }
    decide.drain()
}

struct Task<S> {
    states: Keyed<S>,
    timers: Timers,
}

/// A decide stage at work. [`run_decide`] turns it; a test may turn it step by step.
pub struct DecideLoop<D: Decide, S, T, R, Q> {
    stage: D,
    spec: StageSpec,
    topics: Vec<Arc<str>>,
    changelog: Option<Arc<str>>,
    config: LoopConfig,
    commit_interval: Duration,
    source: S,
    transactions: T,
    reader: R,
    schemas: Schemas<Q>,
    clock: Arc<dyn Clock>,
    signals: Signals,
    watch: Watch,
    tables: Tables,
    effects: Effects,
    lanes: BTreeMap<TopicPartition, Lane>,
    tasks: BTreeMap<i32, Task<D::State>>,
    /// Whether the producer must be reset before anything else: at the start and after any failure.
    needs_reset: bool,
    recovery: Backoff,
    setup: Backoff,
    /// The last task whose activation failed, alone or with others, while tasks wait.
    failed_last: Option<i32>,
    reachable: Reach,
    /// The clock as timers saw it last.
    ticked_at: Timestamp,
    pending: Pending,
}

/// What waits for the commit.
#[derive(Default)]
struct Pending {
    since: Option<Timestamp>,
    records: usize,
    bytes: usize,
    /// Tasks whose timers fired: their positions are committed along even where they did not move, so that
    /// the group's generation fences the transaction.
    fired: Vec<i32>,
}

/// Whether Kafka delivers. A source says once that it does not; that it does again shows in an event or in
/// an answer.
enum Reach {
    Yes,
    No(Backoff),
    /// Answers again since then; what was appended meanwhile may still be on its way.
    Again(Timestamp),
}

impl<D, S, T, R, Q> DecideLoop<D, S, T, R, Q>
where
    D: Decide,
    S: Source,
    T: Transactions,
    R: TableReader,
    Q: SchemaSource,
{
    /// Makes a loop that has not touched any port yet.
    pub fn new(stage: D, ports: DecidePorts<S, T, R, Q>, config: LoopConfig, health: RoleHealth) -> Self {
        let spec = stage.spec().clone();
        let replays = spec.inputs.iter().map(|input| replay_topic(input, spec.group).into());
        // A stage whose inputs hold what it wrote itself reads only their replays.
        let read = if stage.reads_only_replays() { &[][..] } else { &spec.inputs[..] };
        let inputs = read.iter().map(|input| Arc::from(*input));
        let backoff = || Backoff::new(config.retry_least, config.retry_most);
        Self {
            topics: inputs.chain(replays).collect(),
            changelog: spec.changelog.as_deref().map(Arc::from),
            commit_interval: config.commit_interval.unwrap_or(spec.commit_interval),
            source: ports.source,
            transactions: ports.transactions,
            reader: ports.tables,
            schemas: Schemas::new(ports.schemas, Arc::clone(&ports.codec), &config),
            clock: ports.clock,
            signals: Signals::new(spec.group, spec.kind, health),
            watch: Watch::new(spec.group, spec.changelog.as_deref(), ports.incarnation),
            tables: Tables::default(),
            effects: Effects::new(ports.codec),
            lanes: BTreeMap::new(),
            tasks: BTreeMap::new(),
            needs_reset: true,
            recovery: backoff(),
            setup: backoff(),
            failed_last: None,
            reachable: Reach::Yes,
            ticked_at: Timestamp(i64::MIN),
            pending: Pending::default(),
            stage,
            spec,
            config,
        }
    }

    /// Takes one event and does what is due after it.
    ///
    /// # Errors
    /// [`Stopped`] when a person must act; the loop must then be dropped.
    pub fn turn(&mut self) -> Result<(), Stopped> {
        let event = self.source.poll(self.wait());
        self.signals.turned();
        let looked = self.watch.look(self.clock.now());
        looked.or_else(|failure| policy::only(self.at(Step::Begin), failure, Response::Pause).map(drop))?;
        self.take(event)?;
        if self.needs_reset {
            self.reset()?;
        }
        if !self.needs_reset {
            self.set_up()?;
            self.take_held()?;
            self.tick()?;
            self.commit_if_due()?;
        }
        self.note();
        Ok(())
    }

    /// Commits what is in flight and gives the partitions back. A commit that fails is left to the next
    /// owner, which begins at the committed positions.
    ///
    /// # Errors
    /// [`Stopped`] when a person must act.
    pub fn drain(mut self) -> Result<(), Stopped> {
        let committed = if self.needs_reset { Ok(()) } else { self.commit_now() };
        let owned: Vec<_> = self.lanes.keys().cloned().collect();
        self.source.release(&owned);
        committed
    }

    fn take(&mut self, event: PipelineEvent) -> Result<(), Stopped> {
        match event {
            PipelineEvent::Offered(partitions) => self.offered(partitions)?,
            PipelineEvent::Revoking(partitions) => {
                if !self.needs_reset {
                    self.commit_now()?;
                }
                self.give_up(&partitions);
            }
            PipelineEvent::Lost(partitions) => {
                if self.is_pending() {
                    let why = "the member lost its partitions".to_owned();
                    self.recover(Failure::Fenced(why))?;
                }
                self.give_up(&partitions);
            }
            PipelineEvent::Records(batch) => {
                self.reached();
                self.receive(batch)?;
            }
            PipelineEvent::CaughtUp(partition) => {
                self.reached();
                if let Some(lane) = self.lanes.get_mut(&partition) {
                    lane.caught_up = lane.active;
                }
            }
            PipelineEvent::Overtaken { partition, from, to } => self.overtaken(&partition, from, to)?,
            PipelineEvent::Stop { code, message } => return Err(self.stopped(code, message)),
            PipelineEvent::Idle => {}
            PipelineEvent::Available => self.reached(),
            PipelineEvent::Unavailable(message) => {
                let failure = Failure::Dependency { dependency: "kafka", message };
                self.signals.failed(&policy::only(self.at(Step::Read), failure, Response::Pause)?);
                self.reachable = Reach::No(Backoff::new(self.config.retry_least, self.config.retry_most));
            }
        }
        Ok(())
    }

    // ---- partitions ------------------------------------------------------------------------------------

    fn offered(&mut self, partitions: Vec<TopicPartition>) -> Result<(), Stopped> {
        for partition in partitions {
            let Some(lane) = Lane::of(&self.spec, &self.config, partition.clone()) else {
                let message = format!("{partition} was offered to group `{}`", self.spec.group);
                return Err(self.stopped(codes::TOPIC_UNEXPECTED, message));
            };
            self.lanes.insert(partition, lane);
        }
        Ok(())
    }

    /// Forgets partitions, and the state of every task that is no longer complete.
    fn give_up(&mut self, partitions: &[TopicPartition]) {
        for partition in partitions {
            self.lanes.remove(partition);
        }
        for partition in partitions {
            if self.tasks.remove(&partition.partition).is_some() {
                self.suspend(partition.partition);
            }
        }
        self.source.release(partitions);
    }

    /// Stops the delivery of what is left of a task.
    fn suspend(&mut self, number: i32) {
        let mut paused = Vec::new();
        for lane in self.lanes.values_mut().filter(|lane| lane.source.partition == number) {
            if lane.active && !lane.paused {
                paused.push(lane.source.clone());
                lane.paused = true;
            }
            lane.deactivate();
        }
        if !paused.is_empty() {
            self.source.pause(&paused, true);
        }
    }

    fn overtaken(&mut self, partition: &TopicPartition, from: i64, to: i64) -> Result<(), Stopped> {
        let Some(lane) = self.lanes.get_mut(partition).filter(|lane| lane.active) else { return Ok(()) };
        if !lane.held.is_empty() {
            // Records that wait for a schema come first. They are fetched again from where the lane stands,
            // and the source tells again what is missing then.
            lane.held.clear();
            let start = [(partition.clone(), lane.next)];
            self.resume_if_free(partition);
            let started = self.source.start(&start);
            return started.map_or_else(|failure| self.recover(failure), Ok);
        }
        let lost = lane.overtake(from, to);
        self.signals.overtaken(partition, from, to, lost);
        self.pending.since.get_or_insert(self.clock.now());
        Ok(())
    }

    // ---- records ---------------------------------------------------------------------------------------

    fn receive(&mut self, batch: Batch) -> Result<(), Stopped> {
        let Some(lane) = self.lanes.get_mut(&batch.source).filter(|lane| lane.active) else {
            return Ok(()); // Fetched before the partition was given up or the transaction failed.
        };
        lane.caught_up = false;
        if !lane.held.is_empty() {
            let source = batch.source.clone();
            lane.held.push_back(batch);
            if !std::mem::replace(&mut lane.paused, true) {
                self.source.pause(&[source], true);
            }
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
        if !waits_for_others && !std::mem::replace(&mut lane.paused, true) {
            self.source.pause(&[source], true);
        }
    }

    fn process_or_hold(&mut self, batch: Batch) -> Result<(), Stopped> {
        if self.process(&batch)? {
            self.hold(batch, true);
        }
        Ok(())
    }

    /// Goes on with what waits for nothing any more, and asks again for the schemas that held batches wait for.
    fn take_held(&mut self) -> Result<(), Stopped> {
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

    fn resume_if_free(&mut self, partition: &TopicPartition) {
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

    // ---- timers of idle partitions ---------------------------------------------------------------------

    /// Lets timers fire by the clock where every partition of a task was read to its end.
    fn tick(&mut self) -> Result<(), Stopped> {
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

    fn reached(&mut self) {
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

    // ---- small things ----------------------------------------------------------------------------------

    /// Returns how long the next poll may wait: not beyond the next thing that is due.
    fn wait(&self) -> Duration {
        let now = self.clock.now();
        let mut wait = self.config.poll_wait;
        if self.needs_reset {
            return wait.min(self.recovery.remaining(now));
        }
        if !self.tables.are_complete() || !self.complete().is_empty() {
            wait = wait.min(self.setup.remaining(now));
        }
        if let Some(since) = self.pending.since {
            wait = wait.min(self.commit_interval.saturating_sub(elapsed(since, now)));
        }
        // Who waits for other partitions is woken by what comes of them.
        if self.lanes.values().any(|lane| !lane.held.is_empty() && !lane.waits_for_others) {
            wait = wait.min(self.schemas.backoff.remaining(now));
        }
        wait
    }

    fn note(&mut self) {
        let now = self.clock.now();
        let (lanes, tasks, pending) = (&self.lanes, &self.tasks, &self.pending);
        self.signals.note(now, lanes.values(), || Notes {
            in_flight: lanes.values().map(|lane| lane.tally.records()).sum(),
            pending_since: pending.since,
            state_keys: tasks.values().map(|task| task.states.len()).sum(),
        });
    }

    fn at(&self, step: Step) -> At {
        At { stage: self.spec.group, kind: self.spec.kind, step }
    }

    fn stopped(&self, code: &'static str, message: String) -> Stopped {
        Stopped { stage: self.spec.group, code, message }
    }
}

/// Hands what was emitted to the open transaction where it has grown large.
fn flush_beyond<T: Transactions>(
    bytes_max: usize,
    effects: &mut Effects,
    transactions: &mut T,
    spec: &StageSpec,
) -> Result<(), Failure> {
    if effects.outbox().bytes_held() < bytes_max { Ok(()) } else { flush(effects, transactions, spec) }
}

/// Lets timers of a task fire that are due at or before `now`, in order of (due time, key): all of them, or
/// until `bytes_max` bytes wait to be handed over. After an outage every timer of a partition may be due.
fn fire_due<D: Decide>(
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
