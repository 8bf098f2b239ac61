//! Tables: compacted topics read from their beginning to the end they had when asked.

use crate::bystander;
use crate::config::{KafkaConfig, STABLE_TIMEOUT};
use crate::failure::dependency;
use crate::stall::{LOOK_WITHIN, StallWatch};
use crate::tail::{Tail, Tailed};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};
use throughline_kafka_ffi::OffsetSpec;
use throughline_model::record::{Batch, TopicPartition};
use throughline_runtime::ports::{Failure, TableReader};

/// How long nothing may come before the read is given up. Restoring itself may take longer.
const PROGRESS_TIMEOUT: Duration = Duration::from_secs(15);
/// A leader that is not found so often in a row, and once more, is lost; for a moment without one is usual.
const BLIND_LOOKS_MAX: u32 = 2;

struct Followed {
    tail: Tail,
    /// Partitions whose first reading to the end is still under way.
    behind: HashSet<i32>,
    /// The next position of each partition.
    next: HashMap<i32, i64>,
    stalls: StallWatch<i32>,
    /// How often in a row a look did not find every leader.
    blind_looks: u32,
}

impl Followed {
    /// Returns a partition that delivers nothing of what it holds, or whose leader only this client does not
    /// find.
    fn stalled(&mut self, config: &KafkaConfig) -> Option<i32> {
        if !self.stalls.is_due() {
            return None;
        }
        let partitions: Vec<i32> = self.next.keys().copied().collect();
        let ends = self.tail.ends_within(&partitions, LOOK_WITHIN).unwrap_or_default();
        let Some(lost) = partitions.iter().find(|number| !ends.contains_key(number)) else {
            self.blind_looks = 0;
            return self.stalls.look(self.next.iter().map(|(p, next)| (*p, *next, ends[p])));
        };
        self.blind_looks += 1;
        if self.blind_looks <= BLIND_LOOKS_MAX {
            return None;
        }
        self.blind_looks = 0;
        bystander::kafka_answers(config).then_some(*lost)
    }
}

/// Reads tables for one stage; blocking, but for `follow` after its first call.
pub struct TopicReader {
    config: KafkaConfig,
    /// The reader of the topic restored last: a stage has one changelog.
    restoring: Option<(Arc<str>, Tail)>,
    followed: HashMap<String, Followed>,
}

impl TopicReader {
    /// Prepares a reader; connects with the first read.
    pub fn new(config: &KafkaConfig) -> Self {
        Self { config: config.clone(), restoring: None, followed: HashMap::new() }
    }

    fn begin_following(&self, topic: &str) -> Result<Followed, Failure> {
        let mut tail = Tail::new(&self.config, topic, true)?;
        let partitions = tail.partitions()?;
        let ends = tail.settled_ends(&partitions, STABLE_TIMEOUT)?;
        let begins = tail.bounds(&partitions, OffsetSpec::Earliest, false)?;
        let from: Vec<_> = begins.iter().map(|(p, b)| (*p, *b)).collect();
        tail.assign(&from)?;
        let behind = ends.iter().filter(|(p, end)| begins.get(p) < Some(end)).map(|(p, _)| *p).collect();
        Ok(Followed { tail, behind, next: begins, stalls: StallWatch::new(), blind_looks: 0 })
    }
}

impl TableReader for TopicReader {
    fn read_partitions(
        &mut self,
        topic: &Arc<str>,
        partitions: &[i32],
        each: &mut dyn FnMut(&Batch),
    ) -> Result<(), Failure> {
        let kept = self.restoring.take().filter(|(kept, _)| kept == topic);
        let mut tail = match kept {
            Some((_, tail)) => tail,
            None => Tail::new(&self.config, topic, true)?,
        };
        let ends = tail.settled_ends(partitions, STABLE_TIMEOUT)?;
        let begins = tail.bounds(partitions, OffsetSpec::Earliest, false)?;
        let mut behind = HashMap::new();
        let mut from = Vec::new();
        for number in partitions {
            let (begin, end) = (bound(&begins, topic, *number)?, bound(&ends, topic, *number)?);
            if begin < end {
                behind.insert(*number, end);
                from.push((*number, begin));
            }
        }
        if !from.is_empty() {
            tail.assign(&from)?;
            read_to(&mut tail, topic, behind, each)?;
            tail.assign(&[])?;
        }
        self.restoring = Some((Arc::clone(topic), tail));
        Ok(())
    }

    fn follow(&mut self, topic: &str, each: &mut dyn FnMut(&Batch)) -> Result<(), Failure> {
        let mut followed = match self.followed.remove(topic) {
            Some(followed) => followed,
            None => self.begin_following(topic)?,
        };
        // After a failure the next call reads the table anew, with a client that finds its leaders.
        followed.take(&self.config, topic, each)?;
        self.followed.insert(topic.to_owned(), followed);
        Ok(())
    }
}

impl Followed {
    /// Takes what has come; the first time, all there is.
    fn take(
        &mut self,
        config: &KafkaConfig,
        topic: &str,
        each: &mut dyn FnMut(&Batch),
    ) -> Result<(), Failure> {
        let mut deadline = Instant::now() + PROGRESS_TIMEOUT;
        loop {
            let wait = if self.behind.is_empty() { Duration::ZERO } else { Duration::from_millis(100) };
            match self.tail.poll(wait)? {
                Tailed::Records(batch) => {
                    deadline = Instant::now() + PROGRESS_TIMEOUT;
                    let partition = batch.source.partition;
                    self.next.insert(partition, batch.get(batch.len() - 1).offset + 1);
                    self.stalls.delivered(&partition);
                    each(&batch);
                }
                Tailed::End(partition) => {
                    self.behind.remove(&partition);
                    self.stalls.reached_end(&partition);
                }
                Tailed::Nothing if self.behind.is_empty() => {
                    let Some(number) = self.stalled(config) else { return Ok(()) };
                    return Err(stalled(&TopicPartition::new(topic, number)));
                }
                Tailed::Nothing if Instant::now() > deadline => {
                    let number = self.behind.iter().next().copied().unwrap_or_default();
                    return Err(stalled(&TopicPartition::new(topic, number)));
                }
                Tailed::Nothing => {}
            }
        }
    }
}

/// Reads until every partition of `behind` reached the end stated there.
fn read_to(
    tail: &mut Tail,
    topic: &Arc<str>,
    mut behind: HashMap<i32, i64>,
    each: &mut dyn FnMut(&Batch),
) -> Result<(), Failure> {
    let mut deadline = Instant::now() + PROGRESS_TIMEOUT;
    while let Some(waiting) = behind.keys().next() {
        match tail.poll(Duration::from_millis(100))? {
            Tailed::Records(batch) => {
                deadline = Instant::now() + PROGRESS_TIMEOUT;
                let last = batch.get(batch.len() - 1).offset;
                each(&batch);
                let number = batch.source.partition;
                if behind.get(&number).is_some_and(|end| last + 1 >= *end) {
                    behind.remove(&number);
                }
            }
            Tailed::End(number) => {
                behind.remove(&number);
            }
            Tailed::Nothing if Instant::now() > deadline => {
                return Err(stalled(&TopicPartition { topic: Arc::clone(topic), partition: *waiting }));
            }
            Tailed::Nothing => {}
        }
    }
    Ok(())
}

fn bound(bounds: &HashMap<i32, i64>, topic: &str, partition: i32) -> Result<i64, Failure> {
    let found = bounds.get(&partition).copied();
    found.ok_or_else(|| dependency(format!("Kafka does not state the bounds of {topic}/{partition}")))
}

fn stalled(partition: &TopicPartition) -> Failure {
    dependency(format!("reading {partition} came to nothing for {} s", PROGRESS_TIMEOUT.as_secs()))
}
