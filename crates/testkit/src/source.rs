//! A member of a group of the in-memory cluster.

use crate::cluster::{MemoryCluster, to_batch};
use crate::faults::Point;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use throughline_model::books::Books;
use throughline_model::record::TopicPartition;
use throughline_runtime::ports::{BooksFound, Failure, PipelineEvent, Position, Source};

struct Reading {
    next: i64,
    paused: bool,
    told_end: bool,
}

/// Reads the cluster. Where nothing is to be delivered it lets the cluster's clock pass by the time that it
/// was allowed to wait, so that a loop runs through virtual time without sleeping.
pub struct MemorySource {
    cluster: MemoryCluster,
    group: String,
    member: u64,
    batch_max: usize,
    revoking: BTreeSet<TopicPartition>,
    reading: BTreeMap<TopicPartition, Reading>,
    turn: usize,
    said_away: bool,
}

impl MemorySource {
    /// Joins `group` with `topics`; delivers at most `batch_max` records at once.
    pub fn join(cluster: &MemoryCluster, group: &str, topics: &[&str], batch_max: usize) -> Self {
        let mut inner = cluster.lock();
        inner.members += 1;
        let member = inner.members;
        let topics = topics.iter().map(|t| Arc::from(*t)).collect();
        inner.groups.entry(group.to_owned()).or_default().members.insert(member, topics);
        drop(inner);
        Self {
            cluster: cluster.clone(),
            group: group.to_owned(),
            member,
            batch_max,
            revoking: BTreeSet::new(),
            reading: BTreeMap::new(),
            turn: 0,
            said_away: false,
        }
    }

    /// Returns the member's number.
    pub fn member(&self) -> u64 {
        self.member
    }

    /// Returns what the group wants of this member: partition p goes to the p-th member, counted round, for
    /// every topic alike, so that co-partitioned topics stay together.
    fn rebalance(&mut self) -> Option<PipelineEvent> {
        let mut inner = self.cluster.lock();
        let expelled =
            inner.groups.get_mut(&self.group).is_some_and(|group| group.expelled.remove(&self.member));
        if expelled {
            let lost: Vec<_> = self.reading.keys().cloned().collect();
            self.reading.clear();
            self.revoking.clear();
            return Some(PipelineEvent::Lost(lost));
        }
        let group = inner.groups.get(&self.group)?;
        let members: Vec<u64> = group.members.keys().copied().collect();
        let topics = group.members.get(&self.member)?.clone();
        let mut wanted = BTreeSet::new();
        for topic in topics {
            let partitions = inner.partitions(&topic);
            wanted.extend(
                (0..partitions)
                    .filter(|p| members[*p as usize % members.len()] == self.member)
                    .map(|p| TopicPartition { topic: Arc::clone(&topic), partition: p }),
            );
        }
        let surplus: Vec<_> = self
            .reading
            .keys()
            .filter(|p| !wanted.contains(*p) && !self.revoking.contains(*p))
            .cloned()
            .collect();
        if !surplus.is_empty() {
            self.revoking.extend(surplus.iter().cloned());
            return Some(PipelineEvent::Revoking(surplus));
        }
        let group = inner.groups.get_mut(&self.group)?;
        let free: Vec<_> = wanted.into_iter().filter(|p| !group.owners.contains_key(p)).collect();
        if free.is_empty() {
            return None;
        }
        for partition in &free {
            group.owners.insert(partition.clone(), self.member);
            // Not started: it delivers nothing until the loop says from where.
            let waiting = Reading { next: i64::MAX, paused: false, told_end: false };
            self.reading.insert(partition.clone(), waiting);
        }
        Some(PipelineEvent::Offered(free))
    }

    fn deliver(&mut self) -> Option<PipelineEvent> {
        let mut inner = self.cluster.lock();
        let count = self.reading.len();
        for step in 0..count {
            let index = (self.turn + step) % count;
            let (at, reading) = self.reading.iter_mut().nth(index).expect("index < count");
            if reading.paused || reading.next == i64::MAX {
                continue;
            }
            let start = inner.start_of(&at.topic, at.partition);
            if reading.next < 0 {
                reading.next = start;
            }
            if reading.next < start {
                let from = std::mem::replace(&mut reading.next, start);
                return Some(PipelineEvent::Overtaken { partition: at.clone(), from, to: start });
            }
            let (records, next, _) = inner.read(&at.topic, at.partition, reading.next, self.batch_max);
            reading.next = next;
            if !records.is_empty() {
                reading.told_end = false;
                self.turn = index + 1;
                return Some(PipelineEvent::Records(to_batch(at, &records)));
            }
            if !std::mem::replace(&mut reading.told_end, true) {
                return Some(PipelineEvent::CaughtUp(at.clone()));
            }
        }
        None
    }
}

impl Source for MemorySource {
    fn poll(&mut self, wait: Duration) -> PipelineEvent {
        let told = self.cluster.lock().groups.get_mut(&self.group).and_then(|group| group.told.pop_front());
        if let Some(event) = told {
            return event;
        }
        let away = self.cluster.lock().away;
        if away && !std::mem::replace(&mut self.said_away, true) {
            return PipelineEvent::Unavailable("the cluster is away".to_owned());
        }
        if !away {
            self.said_away = false;
            let event = self.rebalance().or_else(|| self.deliver());
            if let Some(event) = event {
                return event;
            }
        }
        // A poll takes some time even where it may not wait, or an idle loop would stand still for ever.
        self.cluster.clock().advance(wait.max(Duration::from_micros(100)));
        PipelineEvent::Idle
    }

    fn keep_alive(&mut self) {}

    fn committed(&mut self, partitions: &[TopicPartition]) -> Result<Vec<Position>, Failure> {
        self.cluster.faults().pass(Point::Committed)?;
        let inner = self.cluster.lock();
        if inner.away {
            let message = "the cluster is away".to_owned();
            return Err(Failure::Dependency { dependency: "kafka", message });
        }
        inner.require_stable(&self.group, partitions)?;
        let offsets = inner.groups.get(&self.group).map(|group| &group.offsets);
        let position = |p| match offsets.and_then(|offsets| offsets.get(p)) {
            None => Position { next: -1, books: BooksFound::New },
            Some((next, metadata)) => {
                let books = Books::from_metadata(metadata);
                Position {
                    next: *next,
                    books: books.map_or_else(|_| BooksFound::Foreign(metadata.clone()), BooksFound::Ours),
                }
            }
        };
        Ok(partitions.iter().map(position).collect())
    }

    fn start(&mut self, partitions: &[(TopicPartition, i64)]) -> Result<(), Failure> {
        self.cluster.faults().pass(Point::Start)?;
        for (partition, next) in partitions {
            if let Some(reading) = self.reading.get_mut(partition) {
                reading.next = *next;
                reading.told_end = false;
            }
        }
        Ok(())
    }

    fn release(&mut self, partitions: &[TopicPartition]) {
        let mut inner = self.cluster.lock();
        let group = inner.groups.entry(self.group.clone()).or_default();
        for partition in partitions {
            if group.owners.get(partition) == Some(&self.member) {
                group.owners.remove(partition);
            }
            self.reading.remove(partition);
            self.revoking.remove(partition);
        }
    }

    fn pause(&mut self, partitions: &[TopicPartition], paused: bool) {
        for partition in partitions {
            if let Some(reading) = self.reading.get_mut(partition) {
                reading.paused = paused;
            }
        }
    }
}

impl Drop for MemorySource {
    /// The process ended: its session is over at once.
    fn drop(&mut self) {
        let mut inner = self.cluster.lock();
        if let Some(group) = inner.groups.get_mut(&self.group) {
            group.members.remove(&self.member);
            group.owners.retain(|_, owner| *owner != self.member);
        }
    }
}
