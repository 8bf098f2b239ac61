//! Finds partitions that deliver nothing although there is something to deliver.
//!
//! librdkafka 2.12 may lose a partition's leader for good when the partition had none for a moment
//! (confluentinc/librdkafka issue 5430): no error is reported, nothing comes any more, and only a client that
//! is made anew finds the leader.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

/// How often a partition's end is compared with what it delivers. A stalled one is found by the second look
/// that finds it behind, so within three times this.
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// How long a look may wait for the cluster's answer; without one nothing is known.
pub(crate) const LOOK_WITHIN: Duration = Duration::from_secs(2);

/// What a partition did last since it was looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Last {
    #[default]
    Nothing,
    Record,
    End,
}

#[derive(Debug, Default)]
struct Seen {
    last: Last,
    /// The end as of the first look after the partition was read to its end. Positions below it may hold no
    /// records, only the markers of transactions, so the last record's position says nothing.
    end_when_read: Option<i64>,
    suspected: bool,
}

/// Watches the partitions of one consumer.
#[derive(Debug)]
pub(crate) struct StallWatch<K> {
    seen: HashMap<K, Seen>,
    looked: Instant,
}

impl<K: Clone + Eq + Hash> StallWatch<K> {
    pub(crate) fn new() -> Self {
        Self { seen: HashMap::new(), looked: Instant::now() }
    }

    /// Notes that records came.
    pub(crate) fn delivered(&mut self, partition: &K) {
        self.note(partition, Last::Record);
    }

    /// Notes that the partition was read to its end.
    pub(crate) fn reached_end(&mut self, partition: &K) {
        self.note(partition, Last::End);
    }

    fn note(&mut self, partition: &K, last: Last) {
        match self.seen.get_mut(partition) {
            Some(seen) => seen.last = last,
            None => drop(self.seen.insert(partition.clone(), Seen { last, ..Seen::default() })),
        }
    }

    /// Forgets a partition that begins elsewhere, or is gone.
    pub(crate) fn forget(&mut self, partition: &K) {
        self.seen.remove(partition);
    }

    /// Forgets all of them.
    pub(crate) fn clear(&mut self) {
        self.seen.clear();
    }

    /// Says whether it is time to look, and if so, that it was done.
    pub(crate) fn is_due(&mut self) -> bool {
        let due = self.looked.elapsed() >= LOOK_EVERY;
        if due {
            self.looked = Instant::now();
        }
        due
    }

    /// Takes the partitions that ought to deliver, each with its position and its present end for readers of
    /// committed data, and returns one that has delivered nothing of what there was since the look before.
    pub(crate) fn look(&mut self, partitions: impl IntoIterator<Item = (K, i64, i64)>) -> Option<K> {
        let mut stalled = None;
        for (partition, next, end) in partitions {
            let seen = self.seen.entry(partition.clone()).or_default();
            match std::mem::take(&mut seen.last) {
                Last::Record => *seen = Seen::default(),
                Last::End => *seen = Seen { end_when_read: Some(end), ..Seen::default() },
                Last::Nothing => {
                    let is_behind = end > seen.end_when_read.unwrap_or(next).max(next);
                    if is_behind && seen.suspected {
                        stalled = Some(partition);
                    }
                    seen.suspected = is_behind;
                }
            }
        }
        stalled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partition_is_stalled_when_two_looks_find_more_than_it_delivered() {
        let mut watch = StallWatch::new();
        let look = |watch: &mut StallWatch<i32>, next, end| watch.look([(0, next, end)]);
        // Read to the end, where a transaction's marker lies; then idle for ever.
        watch.delivered(&0);
        watch.reached_end(&0);
        for _ in 0..5 {
            assert_eq!(look(&mut watch, 10, 11), None);
        }
        // More comes and is not delivered.
        assert_eq!(look(&mut watch, 10, 20), None);
        assert_eq!(look(&mut watch, 10, 30), Some(0));
        // A slow one is not stalled.
        for next in 11..15 {
            watch.delivered(&0);
            assert_eq!(look(&mut watch, next, 40), None);
            assert_eq!(look(&mut watch, next, 40), None);
        }
        // One that never delivered anything is behind from the position that it was to begin at.
        watch.forget(&0);
        assert_eq!(look(&mut watch, 0, 5), None);
        assert_eq!(look(&mut watch, 0, 5), Some(0));
        // Only markers of aborted transactions came: the end is reached anew.
        watch.forget(&0);
        assert_eq!(look(&mut watch, 0, 5), None);
        watch.reached_end(&0);
        assert_eq!(look(&mut watch, 0, 5), None);
        assert_eq!(look(&mut watch, 0, 5), None);
    }
}
