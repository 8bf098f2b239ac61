//! Publishes of which Kafka refused a record for good after the producer had taken it.
//!
//! Their payload is gone by then: keeping it beside every open publish would cost its bytes a second time.
//! But the publish was not acknowledged, its connection ends, and so its sender sends it again; then it is
//! known by its mark and becomes a dead letter at once. Without that it would come back for ever.

use foldhash::quality::RandomState;
use hashbrown::HashSet;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::hash::BuildHasher as _;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Marks remembered at most, about 1 MiB; beyond it the oldest publish is tried once more in vain.
const MARKS_MAX: usize = 1 << 16;

/// Remembers them by mark: 64 bits of a hash with a seed of this process, over client id, MQTT topic and
/// payload. So a wrong match is as good as impossible, and no client can bring one about for another.
#[derive(Default)]
pub(crate) struct Poison {
    hasher: RandomState,
    count: AtomicUsize,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    marks: HashSet<u64, foldhash::fast::RandomState>,
    /// In the order they came; may hold marks that were taken.
    order: VecDeque<u64>,
}

impl Poison {
    /// Returns the mark of a publish.
    pub(crate) fn mark(&self, client_id: &str, topic: &str, payload: &[u8]) -> u64 {
        self.hasher.hash_one((client_id, topic, payload))
    }

    /// Remembers that a publish was refused for good.
    pub(crate) fn remember(&self, mark: u64) {
        let mut known = self.known.lock();
        if known.marks.insert(mark) {
            known.order.push_back(mark);
            if known.order.len() > MARKS_MAX
                && let Some(oldest) = known.order.pop_front()
            {
                known.marks.remove(&oldest);
            }
        }
        self.count.store(known.marks.len(), Ordering::Relaxed);
    }

    /// Says whether a publish was refused for good, and forgets it: its dead letter is written next, and if
    /// that fails, the publish may be tried anew.
    pub(crate) fn take(&self, mark: u64) -> bool {
        if self.count.load(Ordering::Relaxed) == 0 {
            return false;
        }
        let mut known = self.known.lock();
        let found = known.marks.remove(&mark);
        self.count.store(known.marks.len(), Ordering::Relaxed);
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_serves_one_publish_of_one_client() {
        let poison = Poison::default();
        let mark = poison.mark("c", "t", b"p");
        assert!(!poison.take(mark));
        poison.remember(mark);
        for (client_id, topic, payload) in
            [("d", "t", "p"), ("c", "u", "p"), ("c", "t", "q"), ("ct", "", "p")]
        {
            assert!(!poison.take(poison.mark(client_id, topic, payload.as_bytes())));
        }
        assert!(poison.take(poison.mark("c", "t", b"p")));
        assert!(!poison.take(mark));
    }

    #[test]
    fn marks_are_bounded_and_the_oldest_goes_first() {
        let poison = Poison::default();
        (0..=MARKS_MAX as u64).for_each(|mark| poison.remember(mark));
        assert_eq!(poison.count.load(Ordering::Relaxed), MARKS_MAX);
        assert!(!poison.take(0));
        assert!(poison.take(1));
    }
}
