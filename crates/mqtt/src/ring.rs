//! The publishes of a connection that wait for Kafka, in the order they came.

use crate::inbox::SEQUENCE_MASK;
use std::collections::VecDeque;
use std::time::Instant;

/// A publish whose PUBACK may be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    /// The packet id; 0 at QoS 0, which gets no PUBACK.
    pub packet_id: u16,
    /// The reason code of MQTT 5.
    pub code: u8,
    /// What the publish is known by when it comes again, see `Poison`.
    pub mark: u64,
}

#[derive(Clone, Copy, Debug)]
struct Open {
    done: Done,
    /// Records that Kafka has not acknowledged; `FAILED` holds this and everything behind it for ever.
    remaining: u32,
    bytes: u32,
    since: Instant,
}

const FAILED: u32 = u32::MAX;

/// The ring. PUBACKs leave it in the order of the publishes (MQTT-4.6.0-2), whatever the order of Kafka's
/// acknowledgements.
#[derive(Debug, Default)]
pub struct Ring {
    open: VecDeque<Open>,
    base: u32,
    bytes: usize,
}

impl Ring {
    /// Returns the number of publishes that wait.
    pub fn len(&self) -> usize {
        self.open.len()
    }

    /// Says whether none waits.
    pub fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    /// Returns the payload bytes that wait.
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    /// Returns the sequence that the next publish will have.
    pub fn next_sequence(&self) -> u32 {
        self.base.wrapping_add(self.open.len() as u32) & SEQUENCE_MASK
    }

    /// Returns when the publish came that waits longest.
    pub fn oldest(&self) -> Option<Instant> {
        self.open.front().map(|open| open.since)
    }

    /// Adds a publish that came at `since` and became `records` records.
    pub fn push(&mut self, done: Done, records: u32, bytes: usize, since: Instant) {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        self.bytes += bytes as usize;
        self.open.push_back(Open { done, remaining: records, bytes, since });
    }

    /// Takes the fate of one record of a publish.
    pub fn settle(&mut self, sequence: u32, ok: bool) {
        let index = sequence.wrapping_sub(self.base) & SEQUENCE_MASK;
        let Some(open) = self.open.get_mut(index as usize) else { return };
        if !ok {
            open.remaining = FAILED;
        } else if open.remaining != FAILED {
            open.remaining = open.remaining.saturating_sub(1);
        }
    }

    /// Returns the mark of a publish that waits.
    pub fn mark(&self, sequence: u32) -> Option<u64> {
        let index = sequence.wrapping_sub(self.base) & SEQUENCE_MASK;
        self.open.get(index as usize).map(|open| open.done.mark)
    }

    /// Takes the next publish that may be acknowledged.
    pub fn pop(&mut self) -> Option<Done> {
        let first = self.open.front().filter(|open| open.remaining == 0)?;
        let Open { done, bytes, .. } = *first;
        self.open.pop_front();
        self.base = self.base.wrapping_add(1) & SEQUENCE_MASK;
        self.bytes -= bytes as usize;
        Some(done)
    }

    /// Returns the packet ids that were not acknowledged.
    pub fn unacknowledged(&self) -> Vec<u16> {
        self.open.iter().map(|open| open.done.packet_id).filter(|id| *id != 0).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn publish(ring: &mut Ring, packet_id: u16, records: u32) -> u32 {
        let sequence = ring.next_sequence();
        ring.push(Done { packet_id, code: 0, mark: u64::from(packet_id) }, records, 10, Instant::now());
        sequence
    }

    fn popped(ring: &mut Ring) -> Vec<u16> {
        std::iter::from_fn(|| ring.pop()).map(|done| done.packet_id).collect()
    }

    #[test]
    fn a_failure_holds_everything_behind_it() {
        let mut ring = Ring::default();
        let sequences: Vec<u32> = (1..=4).map(|id| publish(&mut ring, id, 2)).collect();
        for (at, ok) in
            [(3, true), (3, true), (0, true), (1, true), (1, false), (1, true), (2, true), (2, true)]
        {
            ring.settle(sequences[at], ok);
        }
        assert!(popped(&mut ring).is_empty(), "the first waits for its second record");
        ring.settle(sequences[0], true);
        assert_eq!(popped(&mut ring), [1]);
        assert_eq!(ring.unacknowledged(), [2, 3, 4]);
        assert_eq!(ring.bytes(), 30);
        assert_eq!((ring.mark(sequences[0]), ring.mark(sequences[3])), (None, Some(4)));
    }

    proptest! {
        #[test]
        fn publishes_leave_in_order_whatever_the_order_of_deliveries(
            records in prop::collection::vec(0u32..4, 1..60), seed in any::<u64>(), start in any::<u32>()
        ) {
            let mut ring = Ring { base: start & SEQUENCE_MASK, ..Ring::default() };
            let mut deliveries = Vec::new();
            for (n, count) in records.iter().enumerate() {
                let sequence = publish(&mut ring, n as u16 + 1, *count);
                deliveries.extend(std::iter::repeat_n(sequence, *count as usize));
            }
            let mut state = seed;
            let mut left = Vec::new();
            while !deliveries.is_empty() {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let at = (state >> 33) as usize % deliveries.len();
                ring.settle(deliveries.swap_remove(at), true);
                left.extend(popped(&mut ring));
            }
            left.extend(popped(&mut ring));
            prop_assert_eq!(left, (1..=records.len() as u16).collect::<Vec<_>>());
            prop_assert_eq!(ring.bytes(), 0);
        }
    }
}
