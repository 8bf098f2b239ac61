//! The member of a group: its consumer, the rebalances it hears of, and the handle that writers share.

use crate::context::{log_error, log_line};
use crate::failure::{failure, refused_config};
use crate::message::list;
use parking_lot::{Condvar, Mutex};
use rdkafka::ClientContext;
use rdkafka::config::{ClientConfig, FromClientConfigAndContext, RDKafkaLogLevel};
use rdkafka::consumer::{
    BaseConsumer, CommitMode, Consumer, ConsumerContext, ConsumerGroupMetadata, RebalanceProtocol,
};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::topic_partition_list::TopicPartitionList;
use rdkafka::types::RDKafkaRespErr;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;
use throughline_model::record::TopicPartition;
use throughline_runtime::ports::{Advance, Failure};
use tracing::{debug, warn};

pub(super) type MemberConsumer = BaseConsumer<MemberContext>;

/// What the group's coordinator decided, in the order it came.
#[derive(Debug)]
pub(super) enum Rebalanced {
    /// These partitions are given.
    Assigned(Vec<TopicPartition>),
    /// These partitions are taken; the group waits for the release.
    Revoked(Vec<TopicPartition>),
    /// These partitions are gone already.
    Lost(Vec<TopicPartition>),
}

/// Wakes the stage's thread when any of its queues gets something.
#[derive(Debug, Default)]
pub(super) struct Wake {
    rung: Mutex<bool>,
    bell: Condvar,
}

impl Wake {
    pub(super) fn ring(&self) {
        let mut rung = self.rung.lock();
        if !*rung {
            *rung = true;
            self.bell.notify_one();
        }
    }

    /// Forgets what rang so far: call it before looking into the queues.
    pub(super) fn reset(&self) {
        *self.rung.lock() = false;
    }

    /// Waits until something rings, at most `wait`.
    pub(super) fn wait(&self, wait: Duration) {
        let mut rung = self.rung.lock();
        if !*rung {
            self.bell.wait_for(&mut rung, wait);
        }
    }
}

/// Records rebalances and does nothing about them: the stage's thread acknowledges them after state was
/// restored or work was committed. Only a consumer that closes gives its partitions back by itself.
pub(super) struct MemberContext {
    heard: Mutex<VecDeque<Rebalanced>>,
    closing: AtomicBool,
}

impl ClientContext for MemberContext {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        log_line(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        log_error(&error, reason);
    }
}

impl ConsumerContext for MemberContext {
    fn rebalance(
        &self,
        consumer: &BaseConsumer<Self>,
        event: RDKafkaRespErr,
        partitions: &mut TopicPartitionList,
    ) {
        if self.closing.load(Ordering::Acquire) {
            give_all_back(consumer);
            return;
        }
        let entries = throughline_kafka_ffi::entries(partitions);
        let named: Vec<_> = entries.iter().map(|e| TopicPartition::new(&*e.topic, e.partition)).collect();
        debug!(?event, partitions = named.len(), lost = consumer.assignment_lost(), "the group rebalanced");
        let heard = match event {
            RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS => Rebalanced::Assigned(named),
            _ if consumer.assignment_lost() => Rebalanced::Lost(named),
            _ => Rebalanced::Revoked(named),
        };
        self.heard.lock().push_back(heard);
    }

    fn commit_callback(&self, result: KafkaResult<()>, _offsets: &TopicPartitionList) {
        if let Err(error) = result {
            warn!("the offsets that lag tools see could not be mirrored: {error}");
        }
    }
}

/// A consumer that subscribed, and its closing.
pub(super) struct Member {
    consumer: Option<Arc<MemberConsumer>>,
}

impl Member {
    /// Makes a consumer and joins the group.
    pub(super) fn join(config: &ClientConfig, topics: &[&str], wake: &Arc<Wake>) -> Result<Self, Failure> {
        let context = MemberContext { heard: Mutex::default(), closing: AtomicBool::new(false) };
        let mut consumer =
            BaseConsumer::from_config_and_context(config, context).map_err(|e| refused_config(&e))?;
        let bell = Arc::clone(wake);
        consumer.set_nonempty_callback(move || bell.ring());
        consumer.subscribe(topics).map_err(|e| failure("cannot subscribe", &e))?;
        Ok(Self { consumer: Some(Arc::new(consumer)) })
    }

    pub(super) fn consumer(&self) -> &Arc<MemberConsumer> {
        self.consumer.as_ref().expect("taken only by drop")
    }

    /// Takes the oldest rebalance that was not yet handled.
    pub(super) fn heard(&self) -> Option<Rebalanced> {
        self.consumer().context().heard.lock().pop_front()
    }

    fn leave(&mut self) -> Receiver<()> {
        let (done, left) = channel();
        if let Some(consumer) = self.consumer.take() {
            consumer.context().closing.store(true, Ordering::Release);
            // A rebalance that was heard and not acknowledged would hold the closing up for ever.
            give_all_back(&consumer);
            // Closing waits for the coordinator: seconds where Kafka is away. A thread of its own does it.
            let spawned = std::thread::Builder::new().name("kafka-leave".to_owned()).spawn(move || {
                drop(consumer);
                // The receiver may be gone: then nobody waits.
                let _ = done.send(());
            });
            if let Err(error) = spawned {
                warn!("no thread to close a Kafka consumer on: {error}");
            }
        }
        left
    }

    /// Leaves the group and waits for that, at most `wait`.
    pub(super) fn leave_within(mut self, wait: Duration) -> bool {
        self.leave().recv_timeout(wait).is_ok()
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.leave();
    }
}

/// Adds partitions to what is fetched; `all` is the whole assignment after it, for the eager protocol.
pub(super) fn assign(
    consumer: &MemberConsumer,
    added: &TopicPartitionList,
    all: &TopicPartitionList,
) -> KafkaResult<()> {
    match consumer.rebalance_protocol() {
        RebalanceProtocol::Cooperative => consumer.incremental_assign(added),
        RebalanceProtocol::Eager | RebalanceProtocol::None => consumer.assign(all),
    }
}

/// Takes partitions out of what is fetched; under the eager protocol that is always all of them.
pub(super) fn unassign(consumer: &MemberConsumer, removed: &TopicPartitionList) -> KafkaResult<()> {
    match consumer.rebalance_protocol() {
        RebalanceProtocol::Cooperative => consumer.incremental_unassign(removed),
        RebalanceProtocol::Eager | RebalanceProtocol::None => consumer.unassign(),
    }
}

fn give_all_back(consumer: &MemberConsumer) {
    let given = consumer.assignment().and_then(|all| unassign(consumer, &all));
    if let Err(error) = given {
        debug!("a closing Kafka consumer could not give its partitions back: {error}");
    }
}

/// A share in the membership of a [`super::GroupSource`], for those who write its offsets.
#[derive(Clone, Default)]
pub struct Membership(Arc<Mutex<Option<Arc<MemberConsumer>>>>);

impl Membership {
    pub(super) fn set(&self, consumer: Option<&Arc<MemberConsumer>>) {
        *self.0.lock() = consumer.cloned();
    }

    /// Runs `act` with the consumer, or returns `None` while the source makes a new one.
    fn with<T>(&self, act: impl FnOnce(&MemberConsumer) -> T) -> Option<T> {
        let consumer = self.0.lock().clone();
        consumer.map(|c| act(&c))
    }

    /// Returns what a transaction says about the member that its offsets belong to.
    pub(crate) fn group_metadata(&self) -> Option<ConsumerGroupMetadata> {
        self.with(|consumer| consumer.group_metadata()).flatten()
    }

    /// Commits positions with their books as metadata, as this member, without waiting. What the group
    /// refuses (a partition that moved on, say) is logged: these offsets only inform lag tools.
    pub fn mirror(&self, advances: &[Advance]) {
        if advances.is_empty() {
            return;
        }
        let offsets = list(advances.iter().map(|a| (&a.partition, a.to)));
        for advance in advances {
            let entry = offsets.find_partition(&advance.partition.topic, advance.partition.partition);
            entry.expect("put in above").set_metadata(advance.books.to_metadata());
        }
        match self.with(|consumer| consumer.commit(&offsets, CommitMode::Async)) {
            Some(Ok(())) => {}
            Some(Err(error)) => warn!("the offsets that lag tools see could not be mirrored: {error}"),
            None => debug!("no member to mirror offsets as; the next commit does it"),
        }
    }
}

impl std::fmt::Debug for Membership {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Membership").field(&self.0.lock().is_some()).finish()
    }
}
