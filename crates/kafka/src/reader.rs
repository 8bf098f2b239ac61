//! Tables: compacted topics read from their beginning to the end they had when asked.

use crate::config::{KafkaConfig, STABLE_TIMEOUT};
use crate::failure::dependency;
use crate::tail::{Tail, Tailed};
use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};
use throughline_kafka_ffi::OffsetSpec;
use throughline_model::record::{Batch, TopicPartition};
use throughline_runtime::ports::{Failure, TableReader};

/// How long nothing may come before the read is given up. Restoring itself may take longer.
const PROGRESS_TIMEOUT: Duration = Duration::from_secs(15);

struct Followed {
    tail: Tail,
    /// Partitions whose first reading to the end is still under way.
    behind: HashSet<i32>,
}

/// Reads tables for one stage; blocking, but for `follow` after its first call.
pub struct TopicReader {
    config: KafkaConfig,
    /// The reader of the topic restored last: partitions of one topic are mostly restored in a row.
    restoring: Option<(String, Tail)>,
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
        Ok(Followed { tail, behind })
    }
}

impl TableReader for TopicReader {
    fn read_partition(
        &mut self,
        partition: &TopicPartition,
        each: &mut dyn FnMut(&Batch),
    ) -> Result<(), Failure> {
        let kept = self.restoring.take().filter(|(topic, _)| **topic == *partition.topic);
        let (topic, mut tail) = match kept {
            Some(kept) => kept,
            None => (partition.topic.to_string(), Tail::new(&self.config, &partition.topic, true)?),
        };
        let number = partition.partition;
        let ends = tail.settled_ends(&[number], STABLE_TIMEOUT)?;
        let begins = tail.bounds(&[number], OffsetSpec::Earliest, false)?;
        let (begin, end) = (bound(&begins, partition)?, bound(&ends, partition)?);
        if begin < end {
            tail.assign(&[(number, begin)])?;
            let mut deadline = Instant::now() + PROGRESS_TIMEOUT;
            loop {
                match tail.poll(Duration::from_millis(100))? {
                    Tailed::Records(batch) => {
                        deadline = Instant::now() + PROGRESS_TIMEOUT;
                        let last = batch.get(batch.len() - 1).offset;
                        each(&batch);
                        if last + 1 >= end {
                            break;
                        }
                    }
                    Tailed::End(_) => break,
                    Tailed::Nothing if Instant::now() > deadline => return Err(stalled(partition)),
                    Tailed::Nothing => {}
                }
            }
            tail.assign(&[])?;
        }
        self.restoring = Some((topic, tail));
        Ok(())
    }

    fn follow(&mut self, topic: &str, each: &mut dyn FnMut(&Batch)) -> Result<(), Failure> {
        if !self.followed.contains_key(topic) {
            let followed = self.begin_following(topic)?;
            self.followed.insert(topic.to_owned(), followed);
        }
        let followed = self.followed.get_mut(topic).expect("put in above");
        let mut deadline = Instant::now() + PROGRESS_TIMEOUT;
        loop {
            let wait = if followed.behind.is_empty() { Duration::ZERO } else { Duration::from_millis(100) };
            match followed.tail.poll(wait)? {
                Tailed::Records(batch) => {
                    deadline = Instant::now() + PROGRESS_TIMEOUT;
                    each(&batch);
                }
                Tailed::End(partition) => {
                    followed.behind.remove(&partition);
                }
                Tailed::Nothing if followed.behind.is_empty() => return Ok(()),
                Tailed::Nothing if Instant::now() > deadline => {
                    let number = followed.behind.iter().next().copied().unwrap_or_default();
                    return Err(stalled(&TopicPartition::new(topic, number)));
                }
                Tailed::Nothing => {}
            }
        }
    }
}

fn bound(bounds: &HashMap<i32, i64>, partition: &TopicPartition) -> Result<i64, Failure> {
    let found = bounds.get(&partition.partition).copied();
    found.ok_or_else(|| dependency(format!("Kafka does not state the bounds of {partition}")))
}

fn stalled(partition: &TopicPartition) -> Failure {
    dependency(format!("reading {partition} came to nothing for {} s", PROGRESS_TIMEOUT.as_secs()))
}
