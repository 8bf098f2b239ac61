//! A Kafka in memory: topics, transactions with read_committed visibility, groups with offsets.
//!
//! Like Kafka, the end of a transaction takes a position in every partition that it wrote to, an open
//! transaction holds committed readers back, and a new producer with the same id fences its predecessor.

use crate::clock::FakeClock;
use crate::faults::Faults;
use parking_lot::{Mutex, MutexGuard};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;
use throughline_model::ids::partition_of;
use throughline_model::record::{Batch, Outgoing, TopicPartition};
use throughline_model::time::Timestamp;
use throughline_runtime::ports::{Failure, PipelineEvent};
use throughline_runtime::{AskIncarnation, Clock, Incarnation};
use uuid::Uuid;

/// After this time the broker ends an open transaction and fences its producer (`transaction.timeout.ms`).
const TRANSACTION_TIMEOUT: Duration = Duration::from_secs(10);

/// A committed record, as a reader sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are Kafka's")]
pub struct Committed {
    pub partition: i32,
    pub offset: i64,
    pub time: Timestamp,
    pub key: Option<Vec<u8>>,
    pub value: Option<Vec<u8>>,
    pub headers: Vec<(String, Vec<u8>)>,
}

impl Committed {
    /// Returns the last header under `name`.
    pub fn header(&self, name: &str) -> Option<&[u8]> {
        self.headers.iter().rev().find(|(n, _)| n == name).map(|(_, v)| v.as_slice())
    }

    /// Returns the key as text.
    pub fn key_text(&self) -> String {
        String::from_utf8_lossy(self.key.as_deref().unwrap_or_default()).into_owned()
    }

    /// Returns the value as text.
    pub fn value_text(&self) -> String {
        String::from_utf8_lossy(self.value.as_deref().unwrap_or_default()).into_owned()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    Open,
    Committed,
    Aborted,
}

enum Entry {
    Record { record: Committed, transaction: Option<usize> },
    Marker,
}

#[derive(Default)]
struct Log {
    start: i64,
    /// Entry i has the offset i; deletion only moves `start`.
    entries: Vec<Entry>,
}

#[derive(Default)]
pub(crate) struct Group {
    pub(crate) offsets: BTreeMap<TopicPartition, (i64, String)>,
    pub(crate) pending: BTreeMap<usize, Vec<(TopicPartition, i64, String)>>,
    pub(crate) members: BTreeMap<u64, BTreeSet<Arc<str>>>,
    pub(crate) owners: BTreeMap<TopicPartition, u64>,
    pub(crate) expelled: BTreeSet<u64>,
    pub(crate) told: VecDeque<PipelineEvent>,
}

#[derive(Default)]
pub(crate) struct Producer {
    pub(crate) epoch: u64,
    /// The open transaction and when it began.
    pub(crate) open: Option<(usize, Timestamp)>,
}

#[derive(Default)]
pub(crate) struct Inner {
    topics: BTreeMap<Arc<str>, Vec<Log>>,
    ids: BTreeMap<Arc<str>, Uuid>,
    /// Topics that were made, for their ids.
    made: u128,
    cluster_id: String,
    pub(crate) fates: Vec<Fate>,
    pub(crate) groups: BTreeMap<String, Group>,
    pub(crate) producers: BTreeMap<String, Producer>,
    pub(crate) members: u64,
    pub(crate) away: bool,
    /// Bytes of the largest outbox that a transaction was given.
    pub(crate) sent_bytes_max: usize,
}

/// The cluster, shared by its clones.
#[derive(Clone)]
pub struct MemoryCluster {
    inner: Arc<Mutex<Inner>>,
    clock: FakeClock,
    faults: Faults,
}

impl MemoryCluster {
    /// Makes an empty cluster whose LogAppendTime is `clock`'s.
    pub fn new(clock: FakeClock) -> Self {
        Self { inner: Arc::default(), clock, faults: Faults::default() }
    }

    /// Returns the clock.
    pub fn clock(&self) -> &FakeClock {
        &self.clock
    }

    /// Returns the script of faults.
    pub fn faults(&self) -> &Faults {
        &self.faults
    }

    /// Creates a topic, or leaves it as it is.
    pub fn create_topic(&self, name: &str, partitions: i32) {
        self.lock().create(name, partitions);
    }

    /// Deletes a topic and makes an empty one under its name, which has another id. Committed offsets stay: a
    /// broker drops them, but a member that runs on may commit the old ones again.
    pub fn recreate_topic(&self, name: &str) {
        let mut inner = self.lock();
        let partitions = inner.partitions(name);
        inner.topics.remove(name);
        inner.create(name, partitions);
    }

    /// Gives the cluster another id, as where its address leads to another one.
    pub fn become_another(&self, id: &str) {
        id.clone_into(&mut self.lock().cluster_id);
    }

    /// Drops the committed offsets of a group, as a broker does after `offsets.retention.minutes`.
    pub fn forget_offsets(&self, group: &str) {
        if let Some(group) = self.lock().groups.get_mut(group) {
            group.offsets.clear();
        }
    }

    /// Returns what asks for the ids of the cluster and of every topic.
    pub fn ask_incarnation(&self) -> AskIncarnation {
        let cluster = self.clone();
        AskIncarnation::new(move || {
            let inner = cluster.lock();
            let topic_ids = inner.ids.iter().map(|(name, id)| (name.to_string(), *id)).collect();
            Ok(Incarnation { cluster_id: inner.cluster_id.clone(), topic_ids })
        })
    }

    /// Appends a record outside any transaction and returns its offset.
    pub fn append<'h>(
        &self,
        topic: &str,
        partition: i32,
        key: Option<&[u8]>,
        value: Option<&[u8]>,
        headers: impl IntoIterator<Item = (&'h str, &'h [u8])>,
    ) -> i64 {
        let headers = headers.into_iter().map(|(n, v)| (n.to_owned(), v.to_vec())).collect();
        let record = Committed {
            partition,
            offset: 0,
            time: self.clock.now(),
            key: key.map(<[u8]>::to_vec),
            value: value.map(<[u8]>::to_vec),
            headers,
        };
        self.lock().append(topic, partition, record, None)
    }

    /// Appends a record to the partition of its key.
    pub fn append_keyed(&self, topic: &str, key: &str, value: &[u8]) -> i64 {
        let partitions = self.lock().partitions(topic);
        self.append(topic, partition_of(key.as_bytes(), partitions), Some(key.as_bytes()), Some(value), [])
    }

    /// Takes the positions of an aborted transaction, so that readers meet a gap.
    pub fn append_gap(&self, topic: &str, partition: i32, positions: usize) {
        let mut inner = self.lock();
        for _ in 0..positions {
            inner.log(topic, partition).entries.push(Entry::Marker);
        }
    }

    /// Deletes what lies before `offset`, as retention does.
    pub fn delete_before(&self, topic: &str, partition: i32, offset: i64) {
        self.lock().log(topic, partition).start = offset;
    }

    /// Returns the committed records of a topic, by partition and offset.
    pub fn records(&self, topic: &str) -> Vec<Committed> {
        let mut inner = self.lock();
        let partitions = inner.partitions(topic);
        (0..partitions).flat_map(|p| inner.read(topic, p, 0, usize::MAX).0).collect()
    }

    /// Returns what a compacted topic's partition comes to: the last value of every key.
    pub fn table(&self, topic: &str, partition: i32) -> BTreeMap<String, Vec<u8>> {
        let mut table = BTreeMap::new();
        for record in self.records(topic).into_iter().filter(|r| r.partition == partition) {
            match record.value.clone() {
                Some(value) => table.insert(record.key_text(), value),
                None => table.remove(&record.key_text()),
            };
        }
        table
    }

    /// Returns the committed offset and its metadata.
    pub fn committed(&self, group: &str, partition: &TopicPartition) -> Option<(i64, String)> {
        self.lock().groups.get(group)?.offsets.get(partition).cloned()
    }

    /// Commits an offset as a foreign tool does.
    pub fn commit_foreign(&self, group: &str, partition: &TopicPartition, offset: i64, metadata: &str) {
        let mut inner = self.lock();
        let offsets = &mut inner.groups.entry(group.to_owned()).or_default().offsets;
        offsets.insert(partition.clone(), (offset, metadata.to_owned()));
    }

    /// Returns how many positions of `topic` lie behind the group's committed offsets; what is not
    /// committed at all counts from the beginning.
    pub fn lag(&self, group: &str, topic: &str) -> i64 {
        let mut inner = self.lock();
        let partitions = inner.partitions(topic);
        let mut lag = 0;
        for partition in 0..partitions {
            let at = TopicPartition::new(topic, partition);
            let committed =
                inner.groups.get(group).and_then(|g| g.offsets.get(&at)).map_or(0, |(offset, _)| *offset);
            lag += inner.last_record_end(topic, partition) - committed;
        }
        lag
    }

    /// Puts a member out of its group at once, as an expired session does: its partitions are free, its
    /// transactions are fenced, and it hears of it at its next poll.
    pub fn expel(&self, group: &str, member: u64) {
        let mut inner = self.lock();
        let group = inner.groups.entry(group.to_owned()).or_default();
        group.owners.retain(|_, owner| *owner != member);
        group.expelled.insert(member);
    }

    /// Lets the group's next poll return `event`, whatever else there is.
    pub fn tell(&self, group: &str, event: PipelineEvent) {
        self.lock().groups.entry(group.to_owned()).or_default().told.push_back(event);
    }

    /// Returns the bytes of the largest outbox that was handed to a transaction.
    pub fn sent_bytes_max(&self) -> usize {
        self.lock().sent_bytes_max
    }

    /// Lets consumers reach the cluster or not.
    pub fn set_away(&self, away: bool) {
        self.lock().away = away;
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Inner> {
        let mut inner = self.inner.lock();
        inner.end_overdue(self.clock.now());
        inner
    }
}

impl Inner {
    pub(crate) fn create(&mut self, name: &str, partitions: i32) {
        if !self.topics.contains_key(name) {
            self.topics.insert(name.into(), (0..partitions).map(|_| Log::default()).collect());
            self.made += 1;
            self.ids.insert(name.into(), Uuid::from_u128(self.made));
        }
    }

    pub(crate) fn partitions(&mut self, topic: &str) -> i32 {
        // As a broker that creates topics: dead-letter topics come to be when they are needed.
        self.create(topic, 1);
        self.topics[topic].len() as i32
    }

    fn log(&mut self, topic: &str, partition: i32) -> &mut Log {
        self.create(topic, 1);
        let logs = self.topics.get_mut(topic).expect("just created");
        let count = logs.len();
        logs.get_mut(partition as usize)
            .unwrap_or_else(|| panic!("topic `{topic}` has {count} partitions, not {}", partition + 1))
    }

    pub(crate) fn append(
        &mut self,
        topic: &str,
        partition: i32,
        mut record: Committed,
        transaction: Option<usize>,
    ) -> i64 {
        let log = self.log(topic, partition);
        record.offset = log.entries.len() as i64;
        record.partition = partition;
        let offset = record.offset;
        log.entries.push(Entry::Record { record, transaction });
        offset
    }

    pub(crate) fn append_outgoing(
        &mut self,
        outgoing: &Outgoing<'_>,
        now: Timestamp,
        transaction: Option<usize>,
    ) {
        let partitions = self.partitions(outgoing.topic);
        let by_key = || partition_of(outgoing.key.unwrap_or_default(), partitions);
        let partition = outgoing.partition.unwrap_or_else(by_key);
        let record = Committed {
            partition,
            offset: 0,
            time: now,
            key: outgoing.key.map(<[u8]>::to_vec),
            value: outgoing.value.map(<[u8]>::to_vec),
            headers: outgoing.headers.iter().map(|(n, v)| (n.to_owned(), v.to_vec())).collect(),
        };
        self.append(outgoing.topic, partition, record, transaction);
    }

    /// Ends a transaction: a marker in every partition that it wrote to, and its offsets where it commits.
    pub(crate) fn end(&mut self, transaction: usize, fate: Fate) {
        self.fates[transaction] = fate;
        for log in self.topics.values_mut().flatten() {
            let wrote = log
                .entries
                .iter()
                .any(|e| matches!(e, Entry::Record { transaction: Some(t), .. } if *t == transaction));
            if wrote {
                log.entries.push(Entry::Marker);
            }
        }
        for group in self.groups.values_mut() {
            for (partition, offset, metadata) in group.pending.remove(&transaction).unwrap_or_default() {
                if fate == Fate::Committed {
                    group.offsets.insert(partition, (offset, metadata));
                }
            }
        }
    }

    fn end_overdue(&mut self, now: Timestamp) {
        let mut overdue = Vec::new();
        for producer in self.producers.values_mut() {
            if let Some((open, _)) = producer.open.take_if(|(_, began)| began.plus(TRANSACTION_TIMEOUT) < now)
            {
                producer.epoch += 1;
                overdue.push(open);
            }
        }
        for transaction in overdue {
            self.end(transaction, Fate::Aborted);
        }
    }

    /// Returns committed records from `from` on, the position after them, and whether that is the end of
    /// what can be read (an open transaction may lie behind it).
    pub(crate) fn read(
        &mut self,
        topic: &str,
        partition: i32,
        from: i64,
        max: usize,
    ) -> (Vec<Committed>, i64, bool) {
        self.create(topic, 1);
        let log = &self.topics[topic][partition as usize];
        let mut records = Vec::new();
        let mut at = from.max(log.start);
        while let Some(entry) = log.entries.get(at as usize) {
            if let Entry::Record { record, transaction } = entry {
                match transaction.map_or(Fate::Committed, |t| self.fates[t]) {
                    Fate::Open => return (records, at, true),
                    Fate::Aborted => {}
                    Fate::Committed if records.len() == max => return (records, at, false),
                    Fate::Committed => records.push(record.clone()),
                }
            }
            at += 1;
        }
        (records, at, true)
    }

    pub(crate) fn has_topic(&self, topic: &str) -> bool {
        self.topics.contains_key(topic)
    }

    pub(crate) fn topic_id(&self, topic: &str) -> Option<Uuid> {
        self.ids.get(topic).copied()
    }

    pub(crate) fn start_of(&mut self, topic: &str, partition: i32) -> i64 {
        self.log(topic, partition).start
    }

    pub(crate) fn end_of(&mut self, topic: &str, partition: i32) -> i64 {
        self.log(topic, partition).entries.len() as i64
    }

    fn last_record_end(&mut self, topic: &str, partition: i32) -> i64 {
        let records = self.read(topic, partition, 0, usize::MAX).0;
        records.last().map_or(0, |record| record.offset + 1)
    }

    /// Fails where an open transaction holds offsets of these partitions.
    pub(crate) fn require_stable(&self, group: &str, partitions: &[TopicPartition]) -> Result<(), Failure> {
        let Some(group) = self.groups.get(group) else { return Ok(()) };
        let held = group.pending.iter().filter(|(t, _)| self.fates[**t] == Fate::Open);
        match held.flat_map(|(_, offsets)| offsets).find(|(p, _, _)| partitions.contains(p)) {
            Some((p, _, _)) => Err(Failure::Dependency {
                dependency: "kafka",
                message: format!("the offset of {p} is held by an open transaction"),
            }),
            None => Ok(()),
        }
    }
}

/// Puts records into a batch.
pub(crate) fn to_batch(source: &TopicPartition, records: &[Committed]) -> Batch {
    let mut batch = Batch::new(source.clone());
    for r in records {
        let headers = r.headers.iter().map(|(n, v)| (n.as_str(), v.as_slice()));
        batch.push(r.offset, r.time, r.key.as_deref(), r.value.as_deref(), headers);
    }
    batch
}
