//! The loop of act stages: Kafka to outside, at least once.
//!
//! A record's delivery is answered first; then its offset is committed, in one transaction with the dead letter
//! or the record in the retry topic that came of it. A kill or a failed commit in between repeats the delivery,
//! under the same id. At most one delivery of a partition is under way, in the order of its records.
//!
//! A delivery that fails may be the message's fault or the other side's. What tells is whether others pass:
//!
//! - Nothing passes: it is the other side's. Everything stays where it is, one delivery is tried at a time with
//!   bounded back-off, and nothing is set aside or dead-lettered, however long it lasts.
//! - A record fails again although another one passed since it failed: it is the record's. It is set aside in
//!   the stage's retry topic, which the group reads too, and the others go on. After
//!   [`LoopConfig::asides_max`] times it is dead-lettered.
//!
//! So that something can pass, the record behind one that failed is tried before that one is tried again. Only
//! then, and by the retry topic, is a record overtaken.

mod commits;
mod deliveries;
mod window;

use crate::clock::{Backoff, Clock, elapsed};
use crate::codes;
use crate::config::{LoopConfig, Shutdown, Stopped};
use crate::incarnation::{AskIncarnation, Watch};
use crate::lane::{Lane, message_age};
use crate::policy::{self, At, Response, Step};
use crate::ports::{Effector, Failure, PipelineEvent, SchemaSource, Source, Transactions};
use crate::schemas::Schemas;
use crate::signals::{Notes, Signals};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use throughline_model::codec::Codec;
use throughline_model::record::{Batch, TopicPartition};
use throughline_model::stage::{Act, Input, StageSpec};
use throughline_model::time::Timestamp;
use throughline_telemetry::RoleHealth;
use window::{Item, Piece, Window};

/// How long a turn waits for an answer while deliveries are under way: records of Kafka wait for it.
const ANSWER_WAIT: Duration = Duration::from_millis(20);
/// How many deliveries may be under way, those included whose partition was given up meanwhile.
const UNDER_WAY_MAX: usize = 64;
/// How long a revocation or the drain waits for answers. What has none by then is delivered again by the next
/// owner. Well below the 45 s that Kafka's default session lasts.
const FINISH_BUDGET: Duration = Duration::from_secs(5);

/// What an act stage runs on.
pub struct ActPorts<E, S, T, Q> {
    /// The other side.
    pub effector: E,
    /// The group's member; subscribed to the inputs, their replay topics and their retry topics.
    pub source: S,
    /// The transactional producer.
    pub transactions: T,
    /// Resolves schema ids.
    pub schemas: Q,
    /// Asks which cluster and topics these are: the inputs, their replay topics and their retry topics.
    pub incarnation: AskIncarnation,
    /// The schemas known so far.
    pub codec: Arc<Codec>,
    /// The platform's time.
    pub clock: Arc<dyn Clock>,
}

/// Runs an act stage until `shutdown`, then waits briefly for what is under way, commits, and gives the
/// partitions back. Blocks; needs a thread of its own.
///
/// # Errors
/// [`Stopped`] when a person must act.
pub fn run_act<A, E, S, T, Q>(
    stage: A,
    ports: ActPorts<E, S, T, Q>,
    config: LoopConfig,
    shutdown: &Shutdown,
    health: RoleHealth,
) -> Result<(), Stopped>
where
    A: Act,
    E: Effector,
    S: Source,
    T: Transactions,
    Q: SchemaSource,
{
    let mut act = ActLoop::new(stage, ports, config, health);
    while !shutdown.is_requested() {
        act.turn()?;
    }
    act.drain()
}

/// An act stage at work. [`run_act`] turns it; a test may turn it step by step.
pub struct ActLoop<A, E, S, T, Q> {
    stage: A,
    spec: StageSpec,
    config: LoopConfig,
    commit_interval: Duration,
    effector: E,
    source: S,
    transactions: T,
    schemas: Schemas<Q>,
    clock: Arc<dyn Clock>,
    signals: Signals,
    watch: Watch,
    lanes: BTreeMap<TopicPartition, Lane>,
    /// One for each lane.
    windows: BTreeMap<TopicPartition, Window>,
    /// The partition of each delivery under way. It may have been given up.
    under_way: BTreeMap<u64, TopicPartition>,
    next_token: u64,
    /// Deliveries that the other side took or refused since the start: it works.
    passed: u64,
    failed_in_a_row: u32,
    /// Has failed while the other side is down: then one delivery is tried whenever it is due.
    gate: Backoff,
    pending_since: Option<Timestamp>,
    /// Whether the producer must be reset before anything else: at the start and after any failure.
    needs_reset: bool,
    recovery: Backoff,
    setup: Backoff,
}

impl<A, E, S, T, Q> ActLoop<A, E, S, T, Q>
where
    A: Act,
    E: Effector,
    S: Source,
    T: Transactions,
    Q: SchemaSource,
{
    /// Makes a loop that has not touched any port yet.
    pub fn new(stage: A, ports: ActPorts<E, S, T, Q>, config: LoopConfig, health: RoleHealth) -> Self {
        let spec = stage.spec().clone();
        let backoff = || Backoff::new(config.retry_least, config.retry_most);
        Self {
            commit_interval: config.commit_interval.unwrap_or(spec.commit_interval),
            effector: ports.effector,
            source: ports.source,
            transactions: ports.transactions,
            schemas: Schemas::new(ports.schemas, ports.codec, &config),
            clock: ports.clock,
            signals: Signals::new(spec.group, spec.kind, health),
            watch: Watch::new(spec.group, None, ports.incarnation),
            lanes: BTreeMap::new(),
            windows: BTreeMap::new(),
            under_way: BTreeMap::new(),
            next_token: 0,
            passed: 0,
            failed_in_a_row: 0,
            gate: backoff(),
            pending_since: None,
            needs_reset: true,
            recovery: backoff(),
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
        let idle = self.under_way.is_empty();
        let event = self.source.poll(if idle { self.wait() } else { Duration::ZERO });
        self.signals.turned();
        let looked = self.watch.look(self.clock.now());
        looked.or_else(|failure| policy::only(self.at(Step::Begin), failure, Response::Pause).map(drop))?;
        self.take(event)?;
        if self.needs_reset {
            self.reset()?;
        }
        if !self.needs_reset {
            self.set_up()?;
            self.fill_windows()?;
            self.begin_due();
        }
        self.hear(if idle { Duration::ZERO } else { ANSWER_WAIT.min(self.wait()) });
        if !self.needs_reset {
            self.commit_if_due()?;
        }
        self.note();
        Ok(())
    }

    /// Waits within a budget for what is under way, commits, and gives the partitions back. What has no answer
    /// by then is delivered again by the next owner.
    ///
    /// # Errors
    /// [`Stopped`] when a person must act.
    pub fn drain(mut self) -> Result<(), Stopped> {
        let owned: Vec<_> = self.lanes.keys().cloned().collect();
        let finished = self.finish(&owned);
        self.source.release(&owned);
        finished
    }

    fn take(&mut self, event: PipelineEvent) -> Result<(), Stopped> {
        match event {
            PipelineEvent::Offered(partitions) => self.offered(partitions)?,
            PipelineEvent::Revoking(partitions) => {
                self.finish(&partitions)?;
                self.give_up(&partitions);
            }
            PipelineEvent::Lost(partitions) => self.give_up(&partitions),
            PipelineEvent::Records(batch) => {
                self.signals.works("kafka");
                self.receive(batch);
            }
            PipelineEvent::CaughtUp(partition) => {
                self.signals.works("kafka");
                if let Some(lane) = self.lanes.get_mut(&partition) {
                    lane.caught_up = lane.active;
                }
            }
            PipelineEvent::Overtaken { partition, from, to } => {
                if self.lanes.get(&partition).is_some_and(|lane| lane.active) {
                    // What was read before comes first.
                    let window = self.windows.entry(partition).or_default();
                    window.queue.push_back(Piece::Gap { from, to });
                }
            }
            PipelineEvent::Stop { code, message } => return Err(self.stopped(code, message)),
            PipelineEvent::Idle => {}
            PipelineEvent::Available => self.signals.works("kafka"),
            PipelineEvent::Unavailable(message) => {
                self.signals.failed(&Failure::Dependency { dependency: "kafka", message });
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
            self.lanes.insert(partition.clone(), lane);
            self.windows.insert(partition, Window::default());
        }
        Ok(())
    }

    /// Forgets partitions. The answers of what is under way still tell whether the other side works.
    fn give_up(&mut self, partitions: &[TopicPartition]) {
        for partition in partitions {
            self.lanes.remove(partition);
            self.windows.remove(partition);
        }
        self.source.release(partitions);
    }

    fn set_up(&mut self) -> Result<(), Stopped> {
        let now = self.clock.now();
        if !self.setup.is_due(now) {
            return Ok(());
        }
        match self.activate() {
            Ok(()) => {
                if self.setup.has_failed() {
                    self.signals.works("kafka");
                    self.setup.succeeded();
                }
                self.signals.ready();
            }
            Err(failure) => {
                let failure = policy::only(self.at(Step::Begin), failure, Response::Pause)?;
                self.signals.failed(&failure);
                self.setup.failed(now);
            }
        }
        Ok(())
    }

    fn activate(&mut self) -> Result<(), Failure> {
        let waiting: Vec<_> = self.lanes.values().filter(|l| !l.active).map(|l| l.source.clone()).collect();
        if waiting.is_empty() {
            return Ok(());
        }
        let here = self.watch.ask()?;
        let positions = self.source.committed(&waiting)?;
        for (partition, found) in waiting.iter().zip(positions) {
            let lane = self.lanes.get_mut(partition).expect("it was just listed");
            lane.position(self.spec.group, found, Some(here.origin(&partition.topic, None)?))?;
        }
        let starts: Vec<_> = waiting.iter().map(|p| (p.clone(), self.lanes[p].next)).collect();
        self.source.start(&starts)?;
        tracing::info!(
            stage = self.spec.group,
            positions = %starts.iter().map(|(p, next)| format!("{p}@{next}")).collect::<Vec<_>>().join(" "),
            "partitions begin"
        );
        for partition in &waiting {
            self.lanes.get_mut(partition).expect("it was just listed").active = true;
        }
        self.resume_free();
        Ok(())
    }

    fn at(&self, step: Step) -> At {
        At { stage: self.spec.group, kind: self.spec.kind, step }
    }

    /// Resumes partitions of which nothing waits.
    fn resume_free(&mut self) {
        let windows = &self.windows;
        let is_free = |lane: &Lane| windows.get(&lane.source).is_none_or(|w| w.queue.is_empty());
        let free = self.lanes.values_mut().filter(|lane| lane.active && lane.paused && is_free(lane));
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

    /// Keeps a batch; the partition delivers no other one until its records are in the window.
    fn receive(&mut self, batch: Batch) {
        let Some(lane) = self.lanes.get_mut(&batch.source).filter(|lane| lane.active) else {
            return; // Fetched before the partition was given up or began again.
        };
        lane.caught_up = false;
        let source = batch.source.clone();
        if !std::mem::replace(&mut lane.paused, true) {
            self.source.pause(std::slice::from_ref(&source), true);
        }
        self.windows.entry(source).or_default().queue.push_back(Piece::Batch(Arc::new(batch)));
    }

    /// Takes records into the windows that have room.
    fn fill_windows(&mut self) -> Result<(), Stopped> {
        let waiting = self.windows.iter().filter(|(_, w)| !w.queue.is_empty() && w.has_room());
        let waiting: Vec<TopicPartition> = waiting.map(|(partition, _)| partition.clone()).collect();
        for partition in waiting {
            while self.fill(&partition)? {
                self.pass_settled(&partition);
            }
        }
        self.resume_free();
        Ok(())
    }

    /// Takes the next record of a partition, or what retention left of it; says whether it did.
    fn fill(&mut self, partition: &TopicPartition) -> Result<bool, Stopped> {
        let now = self.clock.now();
        let window = self.windows.get_mut(partition).expect("it was just listed");
        let lane = self.lanes.get_mut(partition).expect("each window has its lane");
        if !window.has_room() {
            return Ok(false);
        }
        let batch = match window.queue.front() {
            Some(Piece::Batch(batch)) => Arc::clone(batch),
            Some(Piece::Gap { from, to }) if window.items.is_empty() => {
                let (from, to) = (*from, *to);
                let lost = lane.overtake(from, to);
                self.signals.overtaken(partition, from, to, lost);
                self.pending_since.get_or_insert(now);
                window.queue.pop_front();
                return Ok(true);
            }
            Some(Piece::Gap { .. }) | None => return Ok(false),
        };
        if window.at == 0 && !self.schemas.are_known(&batch) {
            if !self.schemas.backoff.is_due(now) {
                return Ok(false);
            }
            if let Err(failure) = self.schemas.resolve(&batch, lane.replayed, now) {
                let at = At { stage: self.spec.group, kind: self.spec.kind, step: Step::Schema };
                let failure = policy::only(at, failure, Response::Pause)?;
                self.signals.failed(&failure);
                return Ok(false);
            }
            self.signals.works("registry");
        }
        let index = window.at;
        window.at += 1;
        if window.at >= batch.len() {
            window.queue.pop_front();
            window.at = 0;
        }
        let record = batch.get(index);
        let unread = window.items.back().map_or(lane.next, |last| last.record().offset + 1);
        if record.offset < unread {
            return Ok(true); // After a seek a batch may begin with records that were taken already.
        }
        let (topic, replayed, codec) = (&*lane.topic, lane.replayed, self.schemas.codec());
        let input = Input { topic, replayed, partition: partition.partition, record, codec };
        let wanted = self.stage.request(&input);
        let age = if index == 0 { message_age(&batch, codec, now) } else { None };
        let mut item = Item::new(Arc::clone(&batch), index, wanted, now, age);
        if lane.retried {
            item.set_aside_before(
                crate::dead_letter::Retry::of(&record),
                self.passed,
                self.config.aside_most,
            );
        }
        window.items.push_back(item);
        Ok(true)
    }

    // ---- small things ----------------------------------------------------------------------------------

    /// Returns how long the next poll may wait: not beyond the next thing that is due.
    fn wait(&self) -> Duration {
        let now = self.clock.now();
        let mut wait = self.config.poll_wait;
        if self.needs_reset {
            return wait.min(self.recovery.remaining(now));
        }
        if self.lanes.values().any(|lane| !lane.active) {
            wait = wait.min(self.setup.remaining(now));
        }
        if let Some(since) = self.pending_since {
            wait = wait.min(self.commit_interval.saturating_sub(elapsed(since, now)));
        }
        if self.windows.values().any(Window::can_take) {
            wait = wait.min(self.schemas.backoff.remaining(now));
        }
        // What is due and cannot begin waits for an answer.
        let open = self.under_way.len();
        let may_begin = if self.gate.has_failed() { open == 0 } else { open < UNDER_WAY_MAX };
        let windows = self.windows.values().filter(|window| may_begin && !window.is_under_way());
        if let Some(due) = windows.filter_map(Window::first_due).min() {
            let until = Duration::from_micros(u64::try_from(due.0.saturating_sub(now.0)).unwrap_or(0));
            wait = wait.min(until.max(self.gate.remaining(now)));
        }
        wait
    }

    fn note(&mut self) {
        let (lanes, under_way, pending_since) =
            (&self.lanes, self.under_way.len() as u64, self.pending_since);
        self.signals.note(self.clock.now(), lanes.values(), || Notes {
            in_flight: under_way + lanes.values().map(|lane| lane.tally.records()).sum::<u64>(),
            pending_since,
            state_keys: 0,
        });
    }

    fn stopped(&self, code: &'static str, message: String) -> Stopped {
        Stopped { stage: self.spec.group, code, message }
    }
}
