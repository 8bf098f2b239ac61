//! The loop of decide stages: Kafka to Kafka, with outputs, state changes and offsets in one transaction.
//!
//! The unit is a task: partition number p over all inputs and their replay topics. It is active while p of
//! every one of them is owned; its state lives in partition p of the changelog. There is a single way back
//! from any failed or unknown commit: drop producer and state, reset, read the committed offsets, restore,
//! go on, with bounded back-off.

mod activation;
mod commits;
mod records;
mod timers;

use crate::clock::{Backoff, Clock, elapsed};
use crate::codes;
use crate::config::{LoopConfig, Shutdown, Stopped};
use crate::incarnation::{AskIncarnation, Watch};
use crate::lane::Lane;
use crate::policy::{self, At, Response, Step};
use crate::ports::{Failure, PipelineEvent, SchemaSource, Source, TableReader, Transactions};
use crate::schemas::Schemas;
use crate::signals::{Notes, Signals};
use crate::tables::Tables;
use crate::timers::Timers;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use throughline_model::catalog::replay_topic;
use throughline_model::codec::Codec;
use throughline_model::keyed::Keyed;
use throughline_model::record::TopicPartition;
use throughline_model::stage::{Decide, Effects, StageSpec};
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
