//! The loop of load stages: Kafka to a store. The store's transaction writes the rows and moves the offsets
//! by compare-and-swap; Kafka's committed offset is only a mirror for lag tools.
//!
//! Rows of several partitions are gathered for one write. When the store refuses the data, the records of
//! that write are halved until the one that is at fault is alone; it is dead-lettered and the rest is
//! written.

mod writing;

use crate::clock::{Backoff, Clock, elapsed, seconds_between};
use crate::codes;
use crate::config::{LoopConfig, Shutdown, Stopped};
use crate::dead_letter::Fault;
use crate::incarnation::{AskIncarnation, Watch};
use crate::lane::{BatchTiming, Lane, message_age, wait_seconds};
use crate::policy::{self, At, Response, Step};
use crate::ports::{BooksFound, Failure, Outlet, PipelineEvent, Position, SchemaSource, Source, Store};
use crate::schemas::Schemas;
use crate::signals::{Notes, Signals};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use throughline_model::codec::Codec;
use throughline_model::outcome::{Outcome, Settled};
use throughline_model::record::{Batch, Outbox, Record, TopicPartition};
use throughline_model::rows::Rows;
use throughline_model::stage::{Input, Load, StageSpec};
use throughline_model::time::Timestamp;
use throughline_telemetry::RoleHealth;
use writing::{Piece, Writing};

/// What a load stage runs on.
pub struct LoadPorts<S, W, O, Q> {
    /// The group's member; subscribed to the inputs and their replay topics.
    pub source: S,
    /// Where the rows and the positions are.
    pub store: W,
    /// Writes dead letters and mirrors positions.
    pub outlet: O,
    /// Resolves schema ids.
    pub schemas: Q,
    /// Asks which cluster and topics these are: the inputs and their replay topics.
    pub incarnation: AskIncarnation,
    /// The schemas known so far.
    pub codec: Arc<Codec>,
    /// The platform's time.
    pub clock: Arc<dyn Clock>,
}

/// Runs a load stage until `shutdown`, then writes what is gathered and gives the partitions back. Blocks;
/// needs a thread of its own.
///
/// # Errors
/// [`Stopped`] when a person must act.
pub fn run_load<L, S, W, O, Q>(
    stage: L,
    ports: LoadPorts<S, W, O, Q>,
    config: LoopConfig,
    shutdown: &Shutdown,
    health: RoleHealth,
) -> Result<(), Stopped>
where
    L: Load,
    S: Source,
    W: Store,
    O: Outlet,
    Q: SchemaSource,
{
    let mut load = LoadLoop::new(stage, ports, config, health);
    while !shutdown.is_requested() {
        load.turn()?;
    }
    load.drain()
}

/// A load stage at work. [`run_load`] turns it; a test may turn it step by step.
pub struct LoadLoop<L, S, W, O, Q> {
    stage: L,
    spec: StageSpec,
    config: LoopConfig,
    commit_interval: Duration,
    source: S,
    store: W,
    outlet: O,
    schemas: Schemas<Q>,
    clock: Arc<dyn Clock>,
    signals: Signals,
    watch: Watch,
    lanes: BTreeMap<TopicPartition, Lane>,
    pieces: Vec<Piece>,
    bytes: usize,
    rows: Rows,
    letters: Outbox,
    pending_since: Option<Timestamp>,
    writing: Writing,
    retry: Backoff,
    setup: Backoff,
}

impl<L, S, W, O, Q> LoadLoop<L, S, W, O, Q>
where
    L: Load,
    S: Source,
    W: Store,
    O: Outlet,
    Q: SchemaSource,
{
    /// Makes a loop that has not touched any port yet.
    pub fn new(stage: L, ports: LoadPorts<S, W, O, Q>, config: LoopConfig, health: RoleHealth) -> Self {
        let spec = stage.spec().clone();
        let backoff = || Backoff::new(config.retry_least, config.retry_most);
        Self {
            commit_interval: config.commit_interval.unwrap_or(spec.commit_interval),
            source: ports.source,
            store: ports.store,
            outlet: ports.outlet,
            schemas: Schemas::new(ports.schemas, ports.codec, &config),
            clock: ports.clock,
            signals: Signals::new(spec.group, spec.kind, health),
            watch: Watch::new(spec.group, None, ports.incarnation),
            lanes: BTreeMap::new(),
            pieces: Vec::new(),
            bytes: 0,
            rows: Rows::default(),
            letters: Outbox::default(),
            pending_since: None,
            writing: Writing::Gathering,
            retry: backoff(),
            setup: backoff(),
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
        self.set_up()?;
        self.write_if_due()?;
        self.take_held()?;
        self.note();
        Ok(())
    }

    /// Writes what is gathered, within a budget, and gives the partitions back. What does not get written
    /// is left to the next owner, which begins at the store's positions.
    ///
    /// # Errors
    /// [`Stopped`] when a person must act.
    pub fn drain(mut self) -> Result<(), Stopped> {
        let finished = self.finish();
        let owned: Vec<_> = self.lanes.keys().cloned().collect();
        self.source.release(&owned);
        finished
    }

    fn take(&mut self, event: PipelineEvent) -> Result<(), Stopped> {
        match event {
            PipelineEvent::Offered(partitions) => self.offered(partitions)?,
            PipelineEvent::Revoking(partitions) => {
                self.finish()?;
                self.give_up(&partitions);
            }
            PipelineEvent::Lost(partitions) => self.give_up(&partitions),
            PipelineEvent::Records(batch) => {
                self.signals.works("kafka");
                self.receive(batch)?;
            }
            PipelineEvent::CaughtUp(partition) => {
                self.signals.works("kafka");
                if let Some(lane) = self.lanes.get_mut(&partition) {
                    lane.caught_up = lane.active;
                }
            }
            PipelineEvent::Overtaken { partition, from, to } => self.overtaken(partition, from, to),
            PipelineEvent::Stop { code, message } => {
                return Err(Stopped { stage: self.spec.group, code, message });
            }
            PipelineEvent::Idle => {}
            PipelineEvent::Available => self.signals.works("kafka"),
            PipelineEvent::Unavailable(message) => {
                let failure = Failure::Dependency { dependency: "kafka", message };
                self.signals.failed(&policy::only(self.at(Step::Read), failure, Response::Pause)?);
            }
        }
        Ok(())
    }

    // ---- partitions ------------------------------------------------------------------------------------

    fn offered(&mut self, partitions: Vec<TopicPartition>) -> Result<(), Stopped> {
        for partition in partitions {
            let Some(lane) = Lane::of(&self.spec, &self.config, partition.clone()) else {
                let message = format!("{partition} was offered to group `{}`", self.spec.group);
                return Err(Stopped { stage: self.spec.group, code: codes::TOPIC_UNEXPECTED, message });
            };
            self.lanes.insert(partition, lane);
        }
        Ok(())
    }

    /// Forgets partitions. What is gathered of them cannot be taken out of the rows, so everything gathered
    /// is dropped and the other partitions begin again at their positions in the store.
    fn give_up(&mut self, partitions: &[TopicPartition]) {
        if self.pending_since.is_some() {
            self.begin_again();
        }
        for partition in partitions {
            self.lanes.remove(partition);
        }
        self.source.release(partitions);
    }

    /// Drops everything that is not written; every partition begins again at its position in the store.
    fn begin_again(&mut self) {
        self.forget_gathered();
        self.writing = Writing::Gathering;
        self.pause_all();
        for lane in self.lanes.values_mut() {
            lane.deactivate();
        }
    }

    fn set_up(&mut self) -> Result<(), Stopped> {
        if !self.setup.is_due(self.clock.now()) {
            return Ok(());
        }
        let done = self.activate();
        self.signals.set_up(done, &mut self.setup, self.clock.now())
    }

    fn activate(&mut self) -> Result<(), Failure> {
        let waiting: Vec<_> = self.lanes.values().filter(|l| !l.active).map(|l| l.source.clone()).collect();
        if waiting.is_empty() {
            return Ok(());
        }
        if !self.watch.has_begun() {
            self.watch.ask()?;
        }
        // Kafka's copies first: what another writer commits and copies meanwhile must not look like a loss.
        let copies = self.source.committed(&waiting)?;
        let positions = self.store.positions(self.spec.group, &waiting)?;
        for ((partition, found), copy) in waiting.iter().zip(positions).zip(copies) {
            expect_not_behind(self.spec.group, partition, &found, &copy)?;
            let lane = self.lanes.get_mut(partition).expect("it was just listed");
            // The store compares where its offsets count.
            lane.position(self.spec.group, found, None)?;
        }
        let starts: Vec<_> = waiting.iter().map(|p| (p.clone(), self.lanes[p].next)).collect();
        self.source.start(&starts)?;
        tracing::info!(
            stage = self.spec.group,
            positions = %starts.iter().map(|(p, next)| format!("{p}@{next}")).collect::<Vec<_>>().join(" "),
            "partitions begin"
        );
        for partition in waiting {
            self.lanes.get_mut(&partition).expect("it was just listed").active = true;
        }
        if matches!(self.writing, Writing::Gathering) {
            self.resume_free();
        } else {
            // A store may tell positions and yet take no rows: what begins now waits like the rest.
            self.pause_all();
        }
        Ok(())
    }

    /// Stops the delivery of every partition.
    fn pause_all(&mut self) {
        let running = self.lanes.values_mut().filter(|lane| lane.active && !lane.paused);
        let paused: Vec<_> = running
            .map(|lane| {
                lane.paused = true;
                lane.source.clone()
            })
            .collect();
        if !paused.is_empty() {
            self.source.pause(&paused, true);
        }
    }

    /// Resumes partitions that wait for nothing.
    fn resume_free(&mut self) {
        if !matches!(self.writing, Writing::Gathering) {
            return;
        }
        let free = self.lanes.values_mut().filter(|l| l.active && l.paused && l.held.is_empty());
        let resumed: Vec<_> = free
            .map(|lane| {
                lane.paused = false;
                lane.source.clone()
            })
            .collect();
        if !resumed.is_empty() {
            self.source.pause(&resumed, false);
        }
    }

    // ---- records ---------------------------------------------------------------------------------------

    fn receive(&mut self, batch: Batch) -> Result<(), Stopped> {
        let Some(lane) = self.lanes.get_mut(&batch.source).filter(|lane| lane.active) else {
            return Ok(()); // Fetched before the partition was given up or began again.
        };
        lane.caught_up = false;
        if !lane.held.is_empty() || !matches!(self.writing, Writing::Gathering) {
            lane.held.push_back(batch);
            return Ok(());
        }
        match self.schemas.resolve(&batch, lane.replayed, self.clock.now()) {
            Ok(()) => {
                self.gather(batch);
                Ok(())
            }
            Err(failure) => self.hold(batch, failure),
        }
    }

    /// Keeps a batch whose schema cannot be asked for now, and everything behind it.
    fn hold(&mut self, batch: Batch, failure: Failure) -> Result<(), Stopped> {
        let failure = policy::only(self.at(Step::Schema), failure, Response::Pause)?;
        self.signals.failed(&failure);
        let source = batch.source.clone();
        let lane = self.lanes.get_mut(&source).expect("the batch was received by its lane");
        lane.held.push_back(batch);
        if !std::mem::replace(&mut lane.paused, true) {
            self.source.pause(&[source], true);
        }
        Ok(())
    }

    /// Takes batches that waited for a schema or for the store.
    fn take_held(&mut self) -> Result<(), Stopped> {
        while matches!(self.writing, Writing::Gathering) && !self.is_full() {
            let Some(lane) = self.lanes.values_mut().find(|lane| !lane.held.is_empty()) else { break };
            let batch = lane.held.front().expect("it is not empty");
            if !self.schemas.are_known(batch) {
                if !self.schemas.backoff.is_due(self.clock.now()) {
                    break;
                }
                if let Err(failure) = self.schemas.resolve(batch, lane.replayed, self.clock.now()) {
                    let failure = policy::only(self.at(Step::Schema), failure, Response::Pause)?;
                    self.signals.failed(&failure);
                    break;
                }
                self.signals.works("registry");
            }
            let batch = lane.held.pop_front().expect("it is not empty");
            self.gather(batch);
        }
        self.resume_free();
        Ok(())
    }

    /// Makes the rows of a batch and keeps the batch until they are written.
    fn gather(&mut self, batch: Batch) {
        let began = self.clock.now();
        let lane = self.lanes.get_mut(&batch.source).expect("only active lanes gather");
        let before = lane.tally.counts();
        // After a seek a batch may begin with records that were processed already.
        let unread = lane.next;
        for record in batch.iter().filter(|record| record.offset >= unread) {
            let settled = rows_of(&mut self.stage, &mut self.rows, lane, record, self.schemas.codec());
            if settled.outcome == Outcome::DeadLettered {
                push_letter(&mut self.letters, lane, &record, &settled, self.spec.group);
            }
            lane.pass(record.offset, &settled);
        }
        let done = self.clock.now();
        let after = lane.tally.counts();
        lane.time_batch(BatchTiming {
            wait_s: wait_seconds(&batch, began),
            age_s: message_age(&batch, self.schemas.codec(), began),
            work_s: seconds_between(began, done),
            done_at: done,
            counts: std::array::from_fn(|i| after[i] - before[i]),
        });
        self.pending_since.get_or_insert(began);
        self.bytes += batch.bytes_held();
        self.pieces.push(Piece::Batch(batch));
    }

    fn overtaken(&mut self, partition: TopicPartition, from: i64, to: i64) {
        let Some(lane) = self.lanes.get_mut(&partition).filter(|lane| lane.active) else { return };
        if !matches!(self.writing, Writing::Gathering) || !lane.held.is_empty() {
            // What is read but not gathered comes first; the positions in the store tell again what is
            // missing once the partition begins again.
            self.begin_again();
            return;
        }
        let lost = lane.overtake(from, to);
        self.signals.overtaken(&partition, from, to, lost);
        self.pending_since.get_or_insert(self.clock.now());
        self.pieces.push(Piece::Overtaken { partition, from, to });
    }

    // ---- small things ----------------------------------------------------------------------------------

    fn at(&self, step: Step) -> At {
        At { stage: self.spec.group, kind: self.spec.kind, step }
    }

    /// Returns how long the next poll may wait: not beyond the next thing that is due.
    fn wait(&self) -> Duration {
        let now = self.clock.now();
        let mut wait = self.config.poll_wait;
        if self.lanes.values().any(|lane| !lane.active) {
            wait = wait.min(self.setup.remaining(now));
        }
        match (&self.writing, self.pending_since) {
            (Writing::Gathering, Some(since)) => {
                wait = wait.min(self.commit_interval.saturating_sub(elapsed(since, now)));
            }
            (Writing::Gathering, None) => {}
            (Writing::Retrying | Writing::Searching(_), _) => wait = wait.min(self.retry.remaining(now)),
        }
        let holds = self.lanes.values().any(|lane| !lane.held.is_empty());
        if holds && matches!(self.writing, Writing::Gathering) {
            wait = wait.min(self.schemas.backoff.remaining(now));
        }
        wait
    }

    fn note(&mut self) {
        let (lanes, pending_since) = (&self.lanes, self.pending_since);
        let in_flight = || self.pieces.iter().map(Piece::len).sum::<usize>() as u64;
        self.signals.note(self.clock.now(), lanes.values(), || Notes {
            in_flight: in_flight(),
            pending_since,
            state_keys: 0,
        });
    }
}

/// Stops where the database stands before Kafka's copy of its position, which is written after the database's
/// commit. What a foreign tool committed says nothing about the database.
fn expect_not_behind(
    group: &str,
    partition: &TopicPartition,
    found: &Position,
    copy: &Position,
) -> Result<(), Failure> {
    if !matches!(copy.books, BooksFound::Ours(_)) || copy.next <= found.next {
        return Ok(());
    }
    let stands = match found.next {
        ..0 => "has no position".to_owned(),
        next => format!("stands at {next}"),
    };
    Err(Failure::Stop {
        code: codes::STORE_FELL_BACK,
        message: format!(
            "the database {stands} in {partition}, but group `{group}` had stored everything up to {} there: it \
             was restored from a backup, or is another one; `throughline groups adopt {group}` shows how to go on",
            copy.next
        ),
    })
}

fn rows_of<L: Load>(
    stage: &mut L,
    rows: &mut Rows,
    lane: &Lane,
    record: Record<'_>,
    codec: &Codec,
) -> Settled {
    let partition = lane.source.partition;
    let input = Input { topic: &lane.topic, replayed: lane.replayed, partition, record, codec };
    stage.rows(&input, rows)
}

fn push_letter(
    outbox: &mut Outbox,
    lane: &Lane,
    record: &Record<'_>,
    settled: &Settled,
    group: &'static str,
) {
    let refused_by_store = matches!(settled.reason, Cow::Owned(_));
    let fault = Fault {
        stage: group,
        topic: &lane.source.topic,
        partition: lane.source.partition,
        replayed: lane.replayed,
        step: if refused_by_store { "TASK_PUT" } else { Fault::step_of(&settled.reason) },
        code: &settled.reason,
        message: settled.message.as_deref().unwrap_or_default(),
    };
    lane.destination.push(outbox, record, &fault);
}
