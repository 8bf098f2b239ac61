//! One broker a test process, topics of one's own, and waiting on conditions.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use throughline_kafka::admin::{Admin, NewTopic};
use throughline_kafka::{AckedProducer, BatchBounds, GroupSource, KafkaConfig, browse};
use throughline_local::kafka::{KafkaOptions, ManagedKafka};
use throughline_model::record::{Batch, Outbox, TopicPartition};
use throughline_runtime::ports::{Outlet, PipelineEvent, Source};

/// Longer than any rebalance, session time-out or open transaction on a busy machine.
pub const DEADLINE: Duration = Duration::from_secs(60);

static NAMES: AtomicU32 = AtomicU32::new(0);

/// Returns the broker that all tests of this process share; it ends with the process.
pub fn broker() -> &'static ManagedKafka {
    static BROKER: OnceLock<(ManagedKafka, tempfile::TempDir)> = OnceLock::new();
    let (kafka, _) = BROKER.get_or_init(|| {
        let dir = throughline_local::scratch_dir().expect("a scratch directory");
        let options = KafkaOptions::new(dir.path().join("kafka"));
        let kafka = ManagedKafka::start(options, &mut |_| {}).expect("a broker");
        (kafka, dir)
    });
    kafka
}

/// Returns a configuration for the shared broker with an instance name of its own.
pub fn config(instance: &str) -> KafkaConfig {
    KafkaConfig { instance: instance.to_owned(), ..KafkaConfig::new(broker().bootstrap()) }
}

/// Makes a name that no other test uses.
pub fn unique(what: &str) -> String {
    format!("e_{what}_{}", NAMES.fetch_add(1, Ordering::Relaxed))
}

/// Makes a topic under a name of its own and returns that.
pub fn topic(what: &str, partitions: i32, configs: &[(&str, &str)]) -> Arc<str> {
    let name = unique(what);
    let mut all = BTreeMap::from([("message.timestamp.type".to_owned(), "LogAppendTime".to_owned())]);
    all.extend(configs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())));
    let new = NewTopic { name: name.clone(), partitions, replication: 1, configs: all };
    let admin = Admin::new(&config("admin")).expect("an admin client");
    admin.create_topics(&[new]).expect("the topic is made");
    wait_for("the topic is known", || admin.topics().ok()?.get(&name).filter(|n| **n == partitions).copied());
    name.into()
}

/// Calls `condition` until it gives something.
pub fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(found) = condition() {
            return found;
        }
        assert!(Instant::now() < deadline, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Writes `count` records `k<i>`=`<i>` to one partition, acknowledged.
pub fn fill(topic: &Arc<str>, partition: i32, from: usize, count: usize) {
    let mut outbox = Outbox::default();
    for i in from..from + count {
        let key = format!("k{i}");
        outbox.push(topic, Some(partition), Some(key.as_bytes()), Some(i.to_string().as_bytes()), []);
    }
    AckedProducer::new(&config("filler")).send_all(&outbox).expect("acknowledged");
}

/// Returns the committed values of a topic in the order of each partition.
pub fn values(topic: &str) -> Vec<(i32, i64, String)> {
    let mut found = Vec::new();
    let stop = browse::Stop::AtEnd { within: DEADLINE };
    let all = browse::browse(&config("browser"), topic, &[], browse::Begin::Earliest, stop, &mut |batch| {
        for record in batch.iter() {
            let value = String::from_utf8_lossy(record.value.unwrap_or_default()).into_owned();
            found.push((batch.source.partition, record.offset, value));
        }
        std::ops::ControlFlow::Continue(())
    });
    assert!(all.expect("the topic can be read"), "the end of `{topic}` was reached");
    found.sort();
    found
}

/// Joins a group with small batches.
pub fn join(config: &KafkaConfig, group: &str, topics: &[&str]) -> GroupSource {
    GroupSource::join(
        config,
        group,
        topics,
        BatchBounds { records: 100, bytes: 1 << 20, ..BatchBounds::default() },
    )
    .expect("joins")
}

/// Polls until an event is picked; `Unavailable` is let pass, as a loop would.
pub fn event<T>(source: &mut GroupSource, what: &str, mut pick: impl FnMut(PipelineEvent) -> Option<T>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(found) = pick(source.poll(Duration::from_millis(50))) {
            return found;
        }
        assert!(Instant::now() < deadline, "never came: {what}");
    }
}

/// Polls until partitions are offered, `count` of them altogether; gives back at once what is asked back, as
/// a loop without work in flight does (the eager protocol takes everything before it gives).
pub fn offered(source: &mut GroupSource, count: usize) -> Vec<TopicPartition> {
    let mut all: Vec<TopicPartition> = Vec::new();
    let deadline = Instant::now() + DEADLINE;
    while all.len() < count {
        match source.poll(Duration::from_millis(50)) {
            PipelineEvent::Offered(more) => all.extend(more),
            PipelineEvent::Revoking(gone) => {
                all.retain(|p| !gone.contains(p));
                source.release(&gone);
            }
            _ => {}
        }
        assert!(Instant::now() < deadline, "never came: an offer");
    }
    all.sort();
    all
}

/// Polls for the next batch.
pub fn records(source: &mut GroupSource) -> Batch {
    event(source, "records", |e| match e {
        PipelineEvent::Records(batch) => Some(batch),
        _ => None,
    })
}

/// Starts partitions at where their group stands.
pub fn start_committed(source: &mut GroupSource, partitions: &[TopicPartition]) -> Vec<i64> {
    let positions = wait_for("committed offsets", || source.committed(partitions).ok());
    let starts: Vec<_> = partitions.iter().cloned().zip(positions.iter().map(|p| p.next)).collect();
    source.start(&starts).expect("starts");
    starts.into_iter().map(|(_, next)| next).collect()
}
