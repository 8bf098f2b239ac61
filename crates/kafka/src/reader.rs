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
use tracing::warn;

/// How long nothing may come before the read is given up. Restoring itself may take longer.
const PROGRESS_TIMEOUT: Duration = Duration::from_secs(15);
/// Of a table that is read anew at most so much is held back until all of it is there.
const HELD_BYTES_MAX: usize = 64 << 20;
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
        let topic = self.tail.topic();
        let asked: Vec<_> = partitions.iter().map(|number| (topic, *number)).collect();
        bystander::partitions_answer(config, &asked).then_some(*lost)
    }
}

/// What is held back of a table.
struct Held {
    batches: Vec<Batch>,
    /// What came so far, also what was passed on: beyond the bound nothing is held back any more.
    bytes: usize,
    bytes_max: usize,
}

impl Held {
    fn take(&mut self, batch: &Batch, each: &mut dyn FnMut(&Batch)) {
        self.bytes += batch.bytes_held();
        self.batches.push(batch.clone());
        if self.bytes > self.bytes_max {
            self.pass_on(each);
        }
    }

    fn pass_on(&mut self, each: &mut dyn FnMut(&Batch)) {
        self.batches.drain(..).for_each(|batch| each(&batch));
    }
}

/// Reads tables for one stage; blocking, but for `follow` after its first call.
pub struct TopicReader {
    config: KafkaConfig,
    /// The reader of the topic restored last: a stage has one changelog.
    restoring: Option<(Arc<str>, Tail)>,
    followed: HashMap<String, Followed>,
    /// The tables that were read to their end before.
    was_read: HashSet<String>,
}

impl TopicReader {
    /// Prepares a reader; connects with the first read.
    pub fn new(config: &KafkaConfig) -> Self {
        Self { config: config.clone(), restoring: None, followed: HashMap::new(), was_read: HashSet::new() }
    }

    /// Reads a table again with a new client and passes it on at once, when all of it is there: nobody shall
    /// see it as it was long ago. Beyond a bound it is passed on as it comes.
    fn read_anew(&self, topic: &str, each: &mut dyn FnMut(&Batch)) -> Result<Followed, Failure> {
        warn!(topic, "a table is read anew, with a new Kafka client");
        let mut followed = self.begin_following(topic)?;
        let mut held = Held { batches: Vec::new(), bytes: 0, bytes_max: HELD_BYTES_MAX };
        followed.take(&self.config, topic, &mut |batch| held.take(batch, each))?;
        held.pass_on(each);
        Ok(followed)
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
        let followed = match self.followed.remove(topic) {
            Some(mut followed) => match followed.take(&self.config, topic, each)? {
                None => followed,
                Some(number) => self.read_anew(topic, each).unwrap_or_else(|failure| {
                    warn!("{topic}/{number} delivers nothing, and cannot be read anew: {failure}");
                    followed
                }),
            },
            None if self.was_read.contains(topic) => self.read_anew(topic, each)?,
            None => {
                let mut followed = self.begin_following(topic)?;
                followed.take(&self.config, topic, each)?;
                self.was_read.insert(topic.to_owned());
                followed
            }
        };
        self.followed.insert(topic.to_owned(), followed);
        Ok(())
    }
}

impl Followed {
    /// Takes what has come; the first time, all there is. Returns a partition that is stalled.
    fn take(
        &mut self,
        config: &KafkaConfig,
        topic: &str,
        each: &mut dyn FnMut(&Batch),
    ) -> Result<Option<i32>, Failure> {
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
                    return Ok(self.stalled(config));
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

#[cfg(test)]
mod tests {
    use super::*;
    use throughline_model::time::Timestamp;

    #[test]
    fn a_table_that_is_read_anew_is_held_back_up_to_its_bound() {
        let batch = |offset| {
            let mut batch = Batch::new(TopicPartition::new("t", 0));
            batch.push(offset, Timestamp(0), Some(b"k"), Some(&[b'v'; 1_000]), []);
            batch
        };
        let bytes_max = batch(0).bytes_held() * 3;
        let mut held = Held { batches: Vec::new(), bytes: 0, bytes_max };
        let mut passed = Vec::new();
        let mut counts = Vec::new();
        for offset in 0..6 {
            held.take(&batch(offset), &mut |batch| passed.push(batch.get(0).offset));
            counts.push((passed.len(), held.batches.len()));
        }
        assert_eq!(counts, [(0, 1), (0, 2), (0, 3), (4, 0), (5, 0), (6, 0)], "passed on, held back");
        held.pass_on(&mut |batch| passed.push(batch.get(0).offset));
        assert_eq!(passed, [0, 1, 2, 3, 4, 5]);
    }
}
