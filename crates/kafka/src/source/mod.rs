//! Reads partitions as a member of a group.
//!
//! How partitions change hands: rebalances are only recorded in librdkafka's callback. A partition that is
//! given is assigned paused and offered; `start` seeks it to the position whose state was restored and
//! resumes it. A partition that is taken stays assigned until every one of that rebalance was released, so
//! that the member can still commit; the group waits for it. Assigning at once, instead of withholding the
//! acknowledgement until state is restored, keeps a slow restore from holding up the rebalance of the other
//! members, and allows a loop to start some of the offered partitions and not others.
//!
//! `pause` does not use librdkafka's: a queue that nobody drains stops its own fetching at its bound, and
//! nothing that was fetched is thrown away.

mod membership;
mod partition;
mod positions;

pub use membership::Membership;
pub use partition::BatchBounds;

use crate::config::KafkaConfig;
use crate::failure::{dependency, failure};
use crate::message::{bare_list, list};
use crate::stall::StallWatch;
use membership::{Member, MemberConsumer, Rebalanced, Wake, assign, unassign};
use partition::{Drained, Partition};
use positions::Unanswered;
use rdkafka::consumer::Consumer;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};
use throughline_kafka_ffi::{OffsetSpec, entries};
use throughline_model::record::TopicPartition;
use throughline_runtime::ports::{Failure, PipelineEvent, Position, Source};
use tracing::{info, warn};

/// The longest sleep between two looks into the queues: librdkafka's wake-ups are not relied on alone.
const NAP: Duration = Duration::from_millis(100);
/// Back-off between attempts to make a consumer anew, doubling up to the second.
const REBUILD_BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));
/// How long the end of a source may wait for the group's coordinator.
const LEAVE_WITHIN: Duration = Duration::from_secs(3);
/// A position that does not exist any more; described among the codes of the runtime.
const PAST_END: &str = "TL-KAFKA-010";
/// How long a seek may take; it is local but for the broker thread's turn.
const SEEK_TIMEOUT: Duration = Duration::from_secs(5);
/// How often the main queue is served in one turn; each serve takes one event.
const SERVES_PER_TURN: usize = 16;

/// A member of a group that delivers bounded batches of one partition each.
///
/// Owned by one thread, which must call [`Source::poll`] often: a member that does not for
/// `max.poll.interval.ms` (5 minutes) loses its partitions.
pub struct GroupSource {
    config: KafkaConfig,
    group: String,
    topics: Vec<String>,
    bounds: BatchBounds,
    wake: Arc<Wake>,
    member: Option<Member>,
    membership: Membership,
    partitions: Vec<Partition>,
    /// Taken by the group and not yet all released.
    revoking: Vec<TopicPartition>,
    /// Where the next turn begins, so that no partition starves another.
    turn: usize,
    events: VecDeque<PipelineEvent>,
    /// A trouble is reported once until records flow again.
    troubled: bool,
    /// Whether the trouble is over once the cluster answers a question.
    away: bool,
    stalls: StallWatch<TopicPartition>,
    unanswered: Unanswered,
    rebuild_at: Instant,
    backoff: Duration,
}

impl GroupSource {
    /// Joins `group` and subscribes to `topics`. Does not wait for the cluster.
    ///
    /// # Errors
    /// [`Failure::Stop`] when librdkafka refuses the configuration.
    pub fn join(
        config: &KafkaConfig,
        group: &str,
        topics: &[&str],
        bounds: BatchBounds,
    ) -> Result<Self, Failure> {
        let mut source = Self {
            config: config.clone(),
            group: group.to_owned(),
            topics: topics.iter().map(|&t| t.to_owned()).collect(),
            bounds: BatchBounds { records: bounds.records.max(1), ..bounds },
            wake: Arc::default(),
            member: None,
            membership: Membership::default(),
            partitions: Vec::new(),
            revoking: Vec::new(),
            turn: 0,
            events: VecDeque::new(),
            troubled: false,
            away: false,
            stalls: StallWatch::new(),
            unanswered: Unanswered::default(),
            rebuild_at: Instant::now(),
            backoff: REBUILD_BACKOFF.0,
        };
        source.build()?;
        Ok(source)
    }

    /// Returns a share in the membership, for a transactional producer or for mirrored offsets.
    pub fn membership(&self) -> Membership {
        self.membership.clone()
    }

    /// Leaves the group and waits for that at most `wait`. Commit first: what is in flight is dropped.
    /// Returns whether the coordinator was told in time; if not, the session times out there.
    pub fn leave(mut self, wait: Duration) -> bool {
        self.membership.set(None);
        self.partitions.clear();
        self.member.take().is_none_or(|member| member.leave_within(wait))
    }

    fn build(&mut self) -> Result<(), Failure> {
        let topics: Vec<&str> = self.topics.iter().map(String::as_str).collect();
        let client = self.config.member(&self.group, topics.len(), self.bounds.fetched_kib);
        let member = Member::join(&client, &topics, &self.wake)?;
        self.membership.set(Some(member.consumer()));
        self.member = Some(member);
        Ok(())
    }

    /// Drops a consumer that cannot go on and everything it owned; a new one follows after a back-off.
    fn give_up(&mut self, why: &str) {
        warn!(group = self.group, "the Kafka consumer is made anew: {why}");
        let lost: Vec<_> = self.partitions.drain(..).map(|p| p.name).collect();
        self.revoking.clear();
        self.stalls.clear();
        self.unanswered = Unanswered::default();
        self.membership.set(None);
        self.member = None;
        self.rebuild_at = Instant::now() + self.backoff;
        self.backoff = (self.backoff * 2).min(REBUILD_BACKOFF.1);
        if !lost.is_empty() {
            self.events.push_back(PipelineEvent::Lost(lost));
        }
        self.away = true;
        self.trouble(why.to_owned());
    }

    fn trouble(&mut self, why: String) {
        if !self.troubled {
            self.troubled = true;
            self.events.push_back(PipelineEvent::Unavailable(why));
        }
    }

    /// Notes that the cluster delivers.
    fn heard(&mut self) {
        (self.troubled, self.away) = (false, false);
        self.backoff = REBUILD_BACKOFF.0;
    }

    /// Serves rebalances, errors and log lines, and with them the group's liveness.
    fn serve(&mut self) {
        let mut idle = 0;
        for _ in 0..SERVES_PER_TURN {
            let Some(consumer) = self.member.as_ref().map(|m| Arc::clone(m.consumer())) else { return };
            // What was fetched before its queue was split off is fetched again by the seek of `start`.
            let polled = consumer.poll(Duration::ZERO).map(|polled| polled.map(drop));
            match polled {
                Some(Ok(())) => idle = 0,
                Some(Err(error)) => {
                    idle = 0;
                    // What gives the member up closes it, and not on this thread.
                    drop(consumer);
                    self.on_error(&error);
                    continue;
                }
                None => idle += 1,
            }
            while let Some(heard) = self.member.as_ref().and_then(Member::heard) {
                idle = 0;
                self.on_rebalance(&consumer, heard);
            }
            // `None` also means that a log line was served: look once more.
            if idle > 1 {
                return;
            }
        }
    }

    fn on_error(&mut self, error: &KafkaError) {
        match error {
            KafkaError::PartitionEOF(_) => {}
            KafkaError::MessageConsumptionFatal(code) => self.give_up(&format!("fatal: {code}")),
            KafkaError::MessageConsumption(code) => match code {
                // The classic protocol's way of saying that a static member was replaced.
                RDKafkaErrorCode::FencedInstanceId => self.give_up(&format!("fenced: {code}")),
                // One connection of several; all of them gone is said as such. librdkafka connects again.
                RDKafkaErrorCode::BrokerTransportFailure
                | RDKafkaErrorCode::Resolve
                | RDKafkaErrorCode::OperationTimedOut => {}
                RDKafkaErrorCode::AllBrokersDown => {
                    self.away = true;
                    self.trouble(format!("no Kafka broker can be reached at {}", self.config.bootstrap));
                }
                // Comes with the loss of the assignment, which says it all.
                RDKafkaErrorCode::PollExceeded => warn!(group = self.group, "not polled in time"),
                RDKafkaErrorCode::UnknownTopicOrPartition => self.trouble(format!(
                    "a topic of {} does not exist: `throughline topics apply` makes it",
                    self.topics.join(", ")
                )),
                _ => {
                    self.away = true;
                    self.trouble(format!("Kafka cannot be read: {code}"));
                }
            },
            other => self.trouble(format!("Kafka cannot be read: {other}")),
        }
    }

    fn on_rebalance(&mut self, consumer: &Arc<MemberConsumer>, heard: Rebalanced) {
        match heard {
            Rebalanced::Assigned(given) => self.on_assigned(consumer, given),
            Rebalanced::Revoked(taken) => {
                if taken.is_empty() {
                    self.acknowledge_revocation(consumer, &taken);
                    return;
                }
                for partition in self.partitions.iter_mut().filter(|p| taken.contains(&p.name)) {
                    partition.revoking = true;
                }
                self.revoking.extend(taken.iter().cloned());
                self.events.push_back(PipelineEvent::Revoking(taken));
            }
            Rebalanced::Lost(gone) => {
                // The member may join anew at once: nothing that was pending before may be committed in its
                // new name, so there is no member until the loop has heard.
                self.membership.set(None);
                self.revoking.retain(|p| !gone.contains(p));
                self.acknowledge_revocation(consumer, &gone);
                self.events.push_back(PipelineEvent::Lost(gone));
            }
        }
    }

    fn on_assigned(&mut self, consumer: &Arc<MemberConsumer>, given: Vec<TopicPartition>) {
        let mut offered = Vec::with_capacity(given.len());
        for name in given {
            self.partitions.retain(|p| p.name != name);
            match Partition::split(consumer, name.clone(), &self.wake) {
                Some(partition) => {
                    self.partitions.push(partition);
                    offered.push(name);
                }
                None => warn!("Kafka gave {name}, which the client does not know"),
            }
        }
        // Offset 0 asks nothing of the cluster, and the pause keeps it from being fetched. It comes first: a
        // fetch between the two would find offset 0 deleted by retention, and its error would arrive after the
        // seek of `start` and look as if that position did not exist. Once more afterwards, for a partition
        // that the client learnt of by the assignment only.
        let added = list(offered.iter().map(|p| (p, 0)));
        let all = list(self.partitions.iter().map(|p| (&p.name, if p.started { p.next } else { 0 })));
        let pause = || if offered.is_empty() { Ok(()) } else { consumer.pause(&added) };
        let done = pause().and_then(|()| assign(consumer, &added, &all)).and_then(|()| pause());
        if let Err(error) = done {
            self.give_up(&format!("an assignment was refused: {error}"));
        } else if !offered.is_empty() {
            self.events.push_back(PipelineEvent::Offered(offered));
        }
    }

    fn acknowledge_revocation(&mut self, consumer: &MemberConsumer, taken: &[TopicPartition]) {
        self.partitions.retain(|p| !taken.contains(&p.name));
        if let Err(error) = unassign(consumer, &bare_list(taken)) {
            self.give_up(&format!("a revocation was refused: {error}"));
        }
    }

    /// Takes the oldest event that waits. With the last loss heard, the member may commit again.
    fn take_event(&mut self) -> Option<PipelineEvent> {
        let event = self.events.pop_front()?;
        let is_loss = |event: &PipelineEvent| matches!(event, PipelineEvent::Lost(_));
        if is_loss(&event) && !self.events.iter().any(is_loss) {
            self.membership.set(self.member.as_ref().map(Member::consumer));
        }
        Some(event)
    }

    /// Takes the next event from the partitions, each in its turn.
    fn next_event(&mut self) -> Option<PipelineEvent> {
        for step in 0..self.partitions.len() {
            let index = (self.turn + step) % self.partitions.len();
            let partition = &mut self.partitions[index];
            if !partition.delivers() {
                continue;
            }
            let from = partition.next;
            let name = partition.name.clone();
            let drained = partition.drain(self.bounds);
            if !matches!(drained, Drained::Empty) {
                self.turn = index + 1;
            }
            match drained {
                Drained::Empty => {}
                Drained::Records(batch) => {
                    self.stalls.delivered(&name);
                    self.heard();
                    return Some(PipelineEvent::Records(batch));
                }
                Drained::End => {
                    self.stalls.reached_end(&name);
                    self.heard();
                    return Some(PipelineEvent::CaughtUp(name));
                }
                Drained::OutOfRange => {
                    self.on_out_of_range(&name, from);
                    return self.events.pop_front();
                }
                Drained::Fatal(why) => {
                    self.give_up(&why);
                    return self.events.pop_front();
                }
                Drained::Trouble(why) => {
                    self.trouble(why);
                    return self.events.pop_front();
                }
            }
        }
        None
    }

    /// The position does not exist. Before the beginning, retention overtook it: say so and go on. Anywhere
    /// else the partition lost what was read of it: it was made anew, or a broker came back with less than
    /// it had acknowledged. What came in its place may be unread, so a person decides; the position may look
    /// right again by the time Kafka is asked for the bounds.
    fn on_out_of_range(&mut self, name: &TopicPartition, from: i64) {
        let end = self.end_of(name, OffsetSpec::Latest);
        match (self.earliest(name), end) {
            (Ok(to), _) if from < to => {
                if let Err(error) = self.reassign(name, to) {
                    self.give_up(&format!("{name} cannot go on at {to}: {error}"));
                }
                self.events.push_back(PipelineEvent::Overtaken { partition: name.clone(), from, to });
            }
            (Ok(_), Ok(end)) => {
                if let Some(partition) = self.partitions.iter_mut().find(|p| p.name == *name) {
                    partition.started = false;
                }
                let message = format!(
                    "position {from} of {name} does not exist any more (its end is {end} now): the topic \
                     was made anew or lost data. `throughline explain {PAST_END}` says how to go on"
                );
                self.events.push_back(PipelineEvent::Stop { code: PAST_END, message });
            }
            (Err(error), _) | (_, Err(error)) => self.give_up(&format!("{name}: {error}")),
        }
    }

    fn consumer(&self) -> Result<&Arc<MemberConsumer>, Failure> {
        let member = self.member.as_ref();
        member.map(Member::consumer).ok_or_else(|| dependency("the consumer is being made anew"))
    }

    /// Takes a partition out and puts it in again at `next`: the way out of a position that does not exist,
    /// after which librdkafka refuses to seek.
    fn reassign(&mut self, name: &TopicPartition, next: i64) -> Result<(), Failure> {
        let consumer = Arc::clone(self.consumer()?);
        self.stalls.forget(name);
        if let Some(partition) = self.partitions.iter_mut().find(|p| p.name == *name) {
            partition.begin(next);
        }
        let one = list([(name, next)]);
        let what = format!("cannot begin {name} at {next}");
        let all = list(self.partitions.iter().map(|p| (&p.name, if p.started { p.next } else { 0 })));
        unassign(&consumer, &bare_list([name]))
            .and_then(|()| assign(&consumer, &one, &all))
            .and_then(|()| consumer.pause(&one))
            .map_err(|e| failure(&what, &e))?;
        // The queue was joined to the common one again: split it off anew, as after an assignment. The old
        // handle goes first, because its end takes the wake-up of the queue along.
        if let Some(index) = self.partitions.iter().position(|p| p.name == *name) {
            let paused = self.partitions.remove(index).paused;
            let renewed = Partition::split(&consumer, name.clone(), &self.wake);
            let mut renewed = renewed.ok_or_else(|| dependency(format!("{what}: unknown partition")))?;
            renewed.paused = paused;
            renewed.begin(next);
            self.partitions.insert(index, renewed);
        }
        // What was fetched before the queue was split off went to the common one, where it is dropped: the seek
        // fetches it again. Without it the partition would go on behind it.
        let sought = consumer.seek_partitions(one.clone(), SEEK_TIMEOUT).map_err(|e| failure(&what, &e))?;
        match entries(&sought).iter().find_map(|entry| entry.error) {
            None => consumer.resume(&one).map_err(|e| failure(&what, &e)),
            Some(code) => Err(crate::failure::by_code(&what, code, &code.to_string())),
        }
    }
}

impl Source for GroupSource {
    fn poll(&mut self, wait: Duration) -> PipelineEvent {
        let deadline = Instant::now() + wait;
        loop {
            if let Some(event) = self.take_event() {
                return event;
            }
            if self.member.is_none() && Instant::now() >= self.rebuild_at {
                match self.build() {
                    Ok(()) => info!(group = self.group, "joins again"),
                    Err(error) => self.give_up(&error.to_string()),
                }
            }
            self.wake.reset();
            self.serve();
            if let Some(event) = self.take_event().or_else(|| self.next_event()) {
                return event;
            }
            if self.stalls.is_due() {
                self.look_for_stalls();
                continue;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return PipelineEvent::Idle;
            }
            self.wake.wait(left.min(NAP));
        }
    }

    fn keep_alive(&mut self) {
        self.serve();
    }

    fn committed(&mut self, partitions: &[TopicPartition]) -> Result<Vec<Position>, Failure> {
        self.ask_committed(partitions)
    }

    fn start(&mut self, partitions: &[(TopicPartition, i64)]) -> Result<(), Failure> {
        // One request for all bounds and one seek for all partitions: librdkafka answers a seek after its
        // fetch in progress, whether it names one partition or a hundred.
        let begins = self.resolved(partitions)?;
        let consumer = Arc::clone(self.consumer()?);
        for (name, next) in &begins {
            let Some(partition) = self.partitions.iter_mut().find(|p| p.name == *name) else {
                return Err(dependency(format!("{name} is not assigned to this member any more")));
            };
            partition.begin(*next);
            self.stalls.forget(name);
        }
        let sought = consumer.seek_partitions(list(begins.iter().map(|(n, next)| (n, *next))), SEEK_TIMEOUT);
        let sought = sought.map(|l| entries(&l)).unwrap_or_default();
        for (name, next) in &begins {
            let entry = sought.iter().find(|e| *e.topic == *name.topic && e.partition == name.partition);
            if entry.is_none_or(|e| e.error.is_some()) {
                self.reassign(name, *next)?;
            }
        }
        // They were assigned paused; one that runs already is left as it is.
        let all = list(begins.iter().map(|(name, next)| (name, *next)));
        consumer.resume(&all).map_err(|e| failure("cannot begin the partitions", &e))?;
        self.wake.ring();
        Ok(())
    }

    fn release(&mut self, partitions: &[TopicPartition]) {
        let before = self.revoking.len();
        let taken: Vec<_> = self.partitions.iter().filter(|p| p.revoking).map(|p| p.name.clone()).collect();
        self.revoking.retain(|p| !partitions.contains(p));
        // The group's round ends with one acknowledgement of all: an early one would end it for the rest.
        if before > 0
            && self.revoking.is_empty()
            && let Ok(consumer) = self.consumer().cloned()
        {
            self.acknowledge_revocation(&consumer, &taken);
        }
    }

    fn pause(&mut self, partitions: &[TopicPartition], paused: bool) {
        for partition in self.partitions.iter_mut().filter(|p| partitions.contains(&p.name)) {
            partition.paused = paused;
        }
        self.wake.ring();
    }
}

impl Drop for GroupSource {
    fn drop(&mut self) {
        // The queues hold the consumer, which then closes on a thread of its own. The process may end right
        // after: a group that is not told waits for the session's end before it gives the partitions away.
        self.membership.set(None);
        self.partitions.clear();
        if let Some(member) = self.member.take()
            && !member.leave_within(LEAVE_WITHIN)
        {
            info!(group = self.group, "left without an answer: the partitions move when the session ends");
        }
    }
}
