//! The in-memory cluster's other ports: transactions, tables, outlet, schemas, ingress.

use crate::cluster::{Fate, MemoryCluster, to_batch};
use crate::faults::Point;
use crate::source::MemorySource;
use parking_lot::Mutex;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;
use throughline_model::record::{Batch, Outbox, Outgoing, TopicPartition};
use throughline_runtime::Clock;
use throughline_runtime::ports::{
    Advance, Failure, Ingress, NotTaken, Outlet, SchemaSource, TableReader, Transactions,
};

/// A transactional producer of a member.
pub struct MemoryTransactions {
    cluster: MemoryCluster,
    id: String,
    group: String,
    member: u64,
    /// `None` before the first reset and after a failure.
    epoch: Option<u64>,
}

impl MemoryTransactions {
    /// Makes the producer `id` of the member that `source` is. It can be used after
    /// [`Transactions::reset`].
    pub fn new(cluster: &MemoryCluster, id: &str, group: &str, source: &MemorySource) -> Self {
        Self {
            cluster: cluster.clone(),
            id: id.to_owned(),
            group: group.to_owned(),
            member: source.member(),
            epoch: None,
        }
    }

    /// Returns the open transaction, beginning it where there is none.
    fn open(&mut self) -> Result<usize, Failure> {
        let inner = self.cluster.lock();
        let current = inner.producers.get(&self.id).map(|producer| producer.epoch);
        if self.epoch.is_none() || self.epoch != current {
            return Err(Failure::Fenced(format!(
                "producer `{}` has a successor or was never reset",
                self.id
            )));
        }
        if let Some((open, _)) = inner.producers[&self.id].open {
            return Ok(open);
        }
        drop(inner);
        self.cluster.faults().pass(Point::Begin)?;
        let mut inner = self.cluster.lock();
        let began = self.cluster.clock().now();
        inner.fates.push(Fate::Open);
        let open = inner.fates.len() - 1;
        inner.producers.get_mut(&self.id).expect("it has an epoch").open = Some((open, began));
        Ok(open)
    }

    fn try_commit(&mut self, advances: &[Advance]) -> Result<(), Failure> {
        let open = self.open()?;
        self.cluster.faults().pass(Point::SendOffsets)?;
        {
            let mut inner = self.cluster.lock();
            let group = inner.groups.entry(self.group.clone()).or_default();
            for advance in advances {
                if group.owners.get(&advance.partition) != Some(&self.member) {
                    let why = format!("member {} does not own {}", self.member, advance.partition);
                    return Err(Failure::Fenced(why));
                }
                let metadata = advance.books.to_metadata();
                group.pending.entry(open).or_default().push((
                    advance.partition.clone(),
                    advance.to,
                    metadata,
                ));
            }
        }
        self.cluster.faults().pass(Point::CommitBefore)?;
        {
            let mut inner = self.cluster.lock();
            inner.end(open, Fate::Committed);
            inner.producers.get_mut(&self.id).expect("it has an epoch").open = None;
        }
        self.cluster.faults().pass(Point::CommitAfter)
    }
}

impl Transactions for MemoryTransactions {
    fn send(&mut self, outbox: &Outbox) -> Result<(), Failure> {
        let sent = self.open().and_then(|open| {
            self.cluster.faults().pass(Point::Produce)?;
            let now = self.cluster.clock().now();
            let mut inner = self.cluster.lock();
            inner.sent_bytes_max = inner.sent_bytes_max.max(outbox.bytes_held());
            for outgoing in outbox.iter() {
                inner.append_outgoing(&outgoing, now, Some(open));
            }
            Ok(())
        });
        sent.inspect_err(|_| self.epoch = None)
    }

    fn commit(&mut self, advances: &[Advance]) -> Result<(), Failure> {
        self.try_commit(advances).inspect_err(|_| self.epoch = None)
    }

    fn reset(&mut self) -> Result<(), Failure> {
        self.cluster.faults().pass(Point::Reset)?;
        let mut inner = self.cluster.lock();
        let producer = inner.producers.entry(self.id.clone()).or_default();
        producer.epoch += 1;
        self.epoch = Some(producer.epoch);
        if let Some((open, _)) = producer.open.take() {
            inner.end(open, Fate::Aborted);
        }
        Ok(())
    }
}

/// Reads compacted topics.
pub struct MemoryTables {
    cluster: MemoryCluster,
    followed: BTreeMap<TopicPartition, i64>,
}

impl MemoryTables {
    /// Makes a reader at the beginning of every topic.
    pub fn new(cluster: &MemoryCluster) -> Self {
        Self { cluster: cluster.clone(), followed: BTreeMap::new() }
    }
}

impl TableReader for MemoryTables {
    fn read_partitions(
        &mut self,
        topic: &Arc<str>,
        partitions: &[i32],
        each: &mut dyn FnMut(&Batch),
    ) -> Result<(), Failure> {
        self.cluster.faults().pass(Point::Restore)?;
        for number in partitions {
            let partition = TopicPartition { topic: Arc::clone(topic), partition: *number };
            let mut inner = self.cluster.lock();
            let (records, next, _) = inner.read(topic, *number, 0, usize::MAX);
            if next < inner.end_of(topic, *number) {
                let message = format!("{partition} has an open transaction");
                return Err(Failure::Dependency { dependency: "kafka", message });
            }
            drop(inner);
            // In small batches, as a consumer gets them.
            for records in records.chunks(7) {
                each(&to_batch(&partition, records));
            }
        }
        Ok(())
    }

    fn follow(&mut self, topic: &str, each: &mut dyn FnMut(&Batch)) -> Result<(), Failure> {
        self.cluster.faults().pass(Point::Follow)?;
        let partitions = self.cluster.lock().partitions(topic);
        for number in 0..partitions {
            let partition = TopicPartition::new(topic, number);
            let from = self.followed.get(&partition).copied().unwrap_or(0);
            let (records, next, _) = self.cluster.lock().read(topic, number, from, usize::MAX);
            if !records.is_empty() {
                each(&to_batch(&partition, &records));
            }
            self.followed.insert(partition, next);
        }
        Ok(())
    }
}

/// Writes outside transactions.
pub struct MemoryOutlet {
    cluster: MemoryCluster,
}

impl MemoryOutlet {
    /// Makes an outlet to `cluster`.
    pub fn new(cluster: &MemoryCluster) -> Self {
        Self { cluster: cluster.clone() }
    }
}

impl Outlet for MemoryOutlet {
    fn send_all(&mut self, outbox: &Outbox) -> Result<(), Failure> {
        self.cluster.faults().pass(Point::Outlet)?;
        let now = self.cluster.clock().now();
        let mut inner = self.cluster.lock();
        for outgoing in outbox.iter() {
            inner.append_outgoing(&outgoing, now, None);
        }
        Ok(())
    }

    fn mirror(&mut self, group: &str, advances: &[Advance]) {
        let mut inner = self.cluster.lock();
        let group = inner.groups.entry(group.to_owned()).or_default();
        for advance in advances {
            group.offsets.insert(advance.partition.clone(), (advance.to, advance.books.to_metadata()));
        }
    }
}

/// A registry.
#[derive(Clone)]
pub struct MemorySchemas {
    cluster: MemoryCluster,
    texts: Arc<Mutex<BTreeMap<u32, String>>>,
}

impl MemorySchemas {
    /// Makes a registry without schemas; `cluster`'s script holds its faults.
    pub fn new(cluster: &MemoryCluster) -> Self {
        Self { cluster: cluster.clone(), texts: Arc::default() }
    }

    /// Registers a schema.
    pub fn register(&self, id: u32, text: &str) {
        self.texts.lock().insert(id, text.to_owned());
    }
}

impl SchemaSource for MemorySchemas {
    fn fetch(&mut self, id: u32) -> Result<Option<String>, Failure> {
        self.cluster.faults().pass(Point::Schema)?;
        Ok(self.texts.lock().get(&id).cloned())
    }
}

type Callback = Box<dyn Fn(u64, bool) + Send + Sync>;

struct Waiting {
    token: u64,
    outbox: Outbox,
}

/// Takes the bridge's records; a test decides when and whether Kafka acknowledges them.
pub struct MemoryIngress {
    cluster: MemoryCluster,
    capacity: usize,
    value_bytes_max: usize,
    callback: Callback,
    waiting: Mutex<VecDeque<Waiting>>,
}

impl MemoryIngress {
    /// Makes an ingress that holds `capacity` records and reports their fate to `callback`; records with
    /// more than `value_bytes_max` bytes of value are broken.
    pub fn new(
        cluster: &MemoryCluster,
        capacity: usize,
        value_bytes_max: usize,
        callback: impl Fn(u64, bool) + Send + Sync + 'static,
    ) -> Self {
        Self {
            cluster: cluster.clone(),
            capacity,
            value_bytes_max,
            callback: Box::new(callback),
            waiting: Mutex::default(),
        }
    }

    /// Lets Kafka take up to `count` of the oldest waiting records; returns how many it took.
    pub fn acknowledge(&self, count: usize) -> usize {
        self.finish(count, true)
    }

    /// Lets up to `count` of the oldest waiting records fail finally.
    pub fn fail(&self, count: usize) -> usize {
        self.finish(count, false)
    }

    fn finish(&self, count: usize, ok: bool) -> usize {
        for finished in 0..count {
            let Some(first) = self.waiting.lock().pop_front() else { return finished };
            if ok {
                let now = self.cluster.clock().now();
                self.cluster.lock().append_outgoing(&first.outbox.get(0), now, None);
            }
            (self.callback)(first.token, ok);
        }
        count
    }
}

impl Ingress for MemoryIngress {
    fn send(&self, record: Outgoing<'_>, token: u64) -> Result<(), NotTaken> {
        let mut waiting = self.waiting.lock();
        let bytes = record.value.map_or(0, <[u8]>::len);
        if bytes > self.value_bytes_max {
            return Err(NotTaken::Record(format!("{bytes} bytes are more than {}", self.value_bytes_max)));
        }
        if waiting.len() == self.capacity {
            return Err(NotTaken::Full);
        }
        let mut outbox = Outbox::default();
        outbox.push(&record.topic.into(), record.partition, record.key, record.value, record.headers.iter());
        waiting.push_back(Waiting { token, outbox });
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.waiting.lock().len()
    }

    /// Time stands still between two calls here.
    fn silent_for(&self) -> Duration {
        Duration::ZERO
    }
}
