//! What a loop tells about itself: metrics at every commit, health at every turn, notes once a second.

use crate::clock::{Backoff, elapsed, seconds_between};
use crate::config::Stopped;
use crate::lane::Lane;
use crate::policy::{self, At, Response, Step};
use crate::ports::{Advance, Failure};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use throughline_model::outcome::Outcome;
use throughline_model::record::TopicPartition;
use throughline_model::stage::{Answer, Kind};
use throughline_model::time::Timestamp;
use throughline_telemetry::{Metric, RoleHealth, counter, gauge, histogram};

/// Notes for `/v1/status` are renewed this often; they cost an allocation each.
const NOTE_INTERVAL: Duration = Duration::from_secs(1);

pub(crate) struct Signals {
    stage: &'static str,
    kind: Kind,
    health: RoleHealth,
    down: BTreeSet<&'static str>,
    last_failure: Option<String>,
    noted_at: Option<Timestamp>,
    ready: bool,
}

/// What the notes of a loop say.
pub(crate) struct Notes {
    /// Records processed and not yet committed.
    pub(crate) in_flight: u64,
    /// When the oldest of them was processed first.
    pub(crate) pending_since: Option<Timestamp>,
    /// Keys of state held.
    pub(crate) state_keys: usize,
}

impl Signals {
    pub(crate) fn new(stage: &'static str, kind: Kind, health: RoleHealth) -> Self {
        health.ready(false, "the stage has not joined its group yet");
        Self { stage, kind, health, down: BTreeSet::new(), last_failure: None, noted_at: None, ready: false }
    }

    /// Says that the loop is alive.
    pub(crate) fn turned(&self) {
        self.health.turned();
    }

    /// Says how far each table was taken: the next offset by `topic/partition`.
    pub(crate) fn tables(&self, taken: &BTreeMap<String, i64>) {
        self.health.note("tables", json!(taken));
    }

    /// Says that the member does its job; one without partitions does too.
    pub(crate) fn ready(&mut self) {
        if !std::mem::replace(&mut self.ready, true) {
            self.health.ready(true, "");
        }
    }

    /// Says once that a dependency failed, until it is back.
    pub(crate) fn failed(&mut self, failure: &Failure) {
        let dependency = match failure {
            Failure::Dependency { dependency, .. } => dependency,
            _ => "kafka",
        };
        let text = failure.to_string();
        counter(Metric::RetriesTotal, &[("stage", self.stage), ("dependency", dependency)]).add(1);
        self.health.dependency(dependency, false, &text);
        if self.down.insert(dependency) {
            tracing::warn!(stage = self.stage, dependency, "{text}; it is retried with back-off");
        }
        self.last_failure = Some(text);
    }

    /// Says that a dependency works (again).
    pub(crate) fn works(&mut self, dependency: &'static str) {
        if self.down.remove(dependency) {
            tracing::info!(stage = self.stage, dependency, "{dependency} can be used again");
            self.health.dependency(dependency, true, "");
        }
    }

    /// Says that the loop drops everything uncommitted and begins again from the committed positions.
    pub(crate) fn recovers(&mut self, failure: &Failure) {
        let reason = match failure {
            Failure::Dependency { .. } => "dependency",
            Failure::Fenced(_) => "fenced",
            Failure::Data { .. } => "data",
            Failure::Stop { .. } => "stop",
        };
        counter(Metric::RecoveriesTotal, &[("stage", self.stage), ("reason", reason)]).add(1);
        tracing::warn!(stage = self.stage, "{failure}; what is uncommitted is dropped and processed again");
        self.last_failure = Some(failure.to_string());
    }

    /// Says that every dependency works again.
    pub(crate) fn work_again(&mut self) {
        for dependency in self.down.clone() {
            self.works(dependency);
        }
    }

    /// Notes how a look at what shall begin ended: ready, or to be tried again with back-off.
    ///
    /// # Errors
    /// [`Stopped`] when a person must act.
    pub(crate) fn set_up(
        &mut self,
        done: Result<(), Failure>,
        setup: &mut Backoff,
        now: Timestamp,
    ) -> Result<(), Stopped> {
        match done {
            Ok(()) => {
                if setup.has_failed() {
                    // Whatever failed before was tried again just now.
                    self.work_again();
                    setup.succeeded();
                }
                self.ready();
            }
            Err(failure) => {
                let at = At { stage: self.stage, kind: self.kind, step: Step::Begin };
                let failure = policy::only(at, failure, Response::Pause)?;
                self.failed(&failure);
                setup.failed(now);
            }
        }
        Ok(())
    }

    /// Says loudly that retention deleted what was not read.
    pub(crate) fn overtaken(&self, partition: &TopicPartition, from: i64, to: i64, lost: u64) {
        tracing::error!(
            stage = self.stage,
            topic = &*partition.topic,
            partition = partition.partition,
            from,
            to,
            lost,
            "retention deleted positions before the stage read them"
        );
        let number = partition.partition.to_string();
        let labels = [("group", self.stage), ("topic", &*partition.topic), ("partition", number.as_str())];
        counter(Metric::OvertakenTotal, &labels).add(lost);
    }

    /// Counts what became of a record of a table, which has no books.
    pub(crate) fn table_record(&self, topic: &str, outcome: Outcome, reason: &str) {
        let labels = self.message_labels(topic, outcome, reason);
        counter(Metric::MessagesTotal, &labels).add(1);
    }

    /// Passes on what the lane counted and measured since the last commit, which is now known to have
    /// happened.
    fn lane_committed(&self, lane: &Lane, now: Timestamp) {
        for (outcome, reason, n) in lane.tally.by_reason() {
            counter(Metric::MessagesTotal, &self.message_labels(&lane.source.topic, outcome, reason)).add(n);
            if outcome == Outcome::DeadLettered {
                let labels = [("stage", self.stage), ("topic", &*lane.source.topic), ("reason", reason)];
                counter(Metric::DeadLettersTotal, &labels).add(n);
            }
        }
        for (index, outcome) in Outcome::ALL.into_iter().enumerate() {
            if lane.tally.of(outcome) == 0 {
                continue;
            }
            let phase = |phase| {
                let labels = [
                    ("stage", self.stage),
                    ("topic", &*lane.source.topic),
                    ("outcome", outcome.label()),
                    ("phase", phase),
                ];
                histogram(Metric::ActionDurationTimeSeconds, &labels)
            };
            let (wait, work, effect) = (phase("wait"), phase("work"), phase("effect"));
            for timing in lane.timings.iter().filter(|t| t.counts[index] > 0) {
                wait.observe_n(timing.wait_s, timing.counts[index]);
                work.observe_n(timing.work_s, timing.counts[index]);
                effect.observe_n(seconds_between(timing.done_at, now), timing.counts[index]);
            }
        }
        let labels = [("stage", self.stage), ("topic", &*lane.source.topic)];
        let mut age = None;
        if !lane.timings.is_empty() {
            self.batches_committed(lane);
        }
        for timing in &lane.timings {
            let Some(age_s) = timing.age_s else { continue };
            let n = timing.counts.iter().sum();
            age.get_or_insert_with(|| histogram(Metric::MessageAgeSeconds, &labels))
                .observe_n(age_s + seconds_between(timing.done_at, now), n);
        }
    }

    /// The same in OpenTelemetry's names for messaging clients.
    fn batches_committed(&self, lane: &Lane) {
        let destination = [
            ("messaging_destination_name", &*lane.source.topic),
            ("messaging_consumer_group_name", self.stage),
        ];
        let records = lane.timings.iter().flat_map(|timing| timing.counts).sum();
        counter(Metric::MessagingClientConsumedMessages, &destination).add(records);
        let [topic, group] = destination;
        let labels = [("messaging_operation_name", "process"), topic, group];
        let process = histogram(Metric::MessagingProcessDuration, &labels);
        for timing in &lane.timings {
            process.observe(timing.work_s);
        }
    }

    /// Says that the advances are committed, passes on what their lanes counted, and counts the commit.
    ///
    /// # Panics
    /// When an advance is of no lane.
    pub(crate) fn committed(
        &self,
        lanes: &mut BTreeMap<TopicPartition, Lane>,
        advances: &[Advance],
        now: Timestamp,
    ) {
        for advance in advances {
            let lane = lanes.get_mut(&advance.partition).expect("its advance was just made");
            self.lane_committed(lane, now);
            lane.committed(advance);
        }
        counter(Metric::CommitsTotal, &[("stage", self.stage)]).add(1);
    }

    /// Counts requests whose answers are committed.
    pub(crate) fn answered(&self, answers: &[Answer]) {
        for Answer { request_code, response_code, reason } in answers {
            let labels =
                [("request_code", &**request_code), ("response_code", response_code), ("reason", reason)];
            counter(Metric::RequestsTotal, &labels).add(1);
        }
    }

    /// Renews the notes for `/v1/status` and the gauges, at most once a second.
    pub(crate) fn note<'a>(
        &mut self,
        now: Timestamp,
        lanes: impl Iterator<Item = &'a Lane>,
        notes: impl FnOnce() -> Notes,
    ) {
        if self.noted_at.is_some_and(|at| elapsed(at, now) < NOTE_INTERVAL) {
            return;
        }
        self.noted_at = Some(now);
        let notes = notes();
        let (mut owned, mut paused) = (0_u32, 0_u32);
        let partitions: Vec<_> = lanes
            .map(|lane| {
                owned += 1;
                paused += u32::from(lane.paused);
                json!({
                    "partition": lane.source.to_string(),
                    "next": lane.next,
                    "committed": lane.from,
                    "active": lane.active,
                    "caught_up": lane.caught_up,
                })
            })
            .collect();
        let stage = [("stage", self.stage)];
        gauge(Metric::PartitionsOwned, &stage).set(f64::from(owned));
        gauge(Metric::PartitionsPaused, &stage).set(f64::from(paused));
        gauge(Metric::StateKeys, &stage).set(notes.state_keys as f64);
        let oldest_s = notes.pending_since.map(|since| seconds_between(since, now));
        let buffer = [("role", self.stage), ("buffer", "uncommitted")];
        gauge(Metric::BufferMessages, &buffer).set(notes.in_flight as f64);
        gauge(Metric::BufferAgeSeconds, &buffer).set(oldest_s.unwrap_or_default());
        self.health.note("in_flight", json!(notes.in_flight));
        self.health.note("oldest_uncommitted_seconds", json!(oldest_s));
        self.health.note("partitions", json!(partitions));
        self.health.note("state_keys", json!(notes.state_keys));
        self.health.note("last_dependency_error", json!(self.last_failure));
    }

    fn message_labels<'l>(
        &self,
        topic: &'l str,
        outcome: Outcome,
        reason: &'l str,
    ) -> [(&'static str, &'l str); 4] {
        [("stage", self.stage), ("topic", topic), ("outcome", outcome.label()), ("reason", reason)]
    }
}
