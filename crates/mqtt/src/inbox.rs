//! How Kafka's acknowledgements find their way back: a token names worker, connection and publish; the
//! producer's callback puts it into the worker's queue and wakes the worker if the queue was empty.

use parking_lot::Mutex;
use std::sync::Arc;
use throughline_runtime::ports::Fate;
use tokio::sync::Notify;

/// The most workers that a token can name.
pub const WORKERS_MAX: usize = 256;
/// The most connections that a token can name on one worker.
pub const SLOTS_MAX: usize = 1 << 20;
const GENERATION_BITS: u32 = 12;
const SEQUENCE_BITS: u32 = 24;

/// Sequences of publishes count within this many bits and then wrap: far more than can be open at once.
pub const SEQUENCE_MASK: u32 = (1 << SEQUENCE_BITS) - 1;
/// Generations of a connection's slot count within these bits.
pub const GENERATION_MASK: u16 = (1 << GENERATION_BITS) - 1;

/// Names a publish: worker (8 bits), slot (20), generation of the slot (12), sequence (24).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token {
    /// The worker.
    pub worker: u8,
    /// The connection's slot.
    pub slot: u32,
    /// How often the slot was used before, wrapping.
    pub generation: u16,
    /// The publish, wrapping.
    pub sequence: u32,
}

impl Token {
    /// Packs the token into an integer.
    pub const fn pack(self) -> u64 {
        ((self.worker as u64) << 56)
            | ((self.slot as u64) << (GENERATION_BITS + SEQUENCE_BITS))
            | (((self.generation & GENERATION_MASK) as u64) << SEQUENCE_BITS)
            | (self.sequence & SEQUENCE_MASK) as u64
    }

    /// Unpacks what [`Token::pack`] made.
    pub const fn unpack(token: u64) -> Self {
        Self {
            worker: (token >> 56) as u8,
            slot: ((token >> (GENERATION_BITS + SEQUENCE_BITS)) as u32) & (SLOTS_MAX as u32 - 1),
            generation: ((token >> SEQUENCE_BITS) as u16) & GENERATION_MASK,
            sequence: (token as u32) & SEQUENCE_MASK,
        }
    }
}

/// The fate of one record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delivery {
    /// The token that it was sent with.
    pub token: u64,
    /// What became of it.
    pub fate: Fate,
}

#[derive(Debug, Default)]
struct Inbox {
    queue: Mutex<Vec<Delivery>>,
    notify: Notify,
}

/// The queues of all workers. It exists before the producer, whose delivery callback calls
/// [`Inboxes::deliver`]. A queue is bounded by what the producer holds in flight.
#[derive(Debug)]
pub struct Inboxes(Box<[Inbox]>);

impl Inboxes {
    /// Makes a queue for each of `workers` workers, see `BridgeConfig::inboxes`.
    pub fn new(workers: usize) -> Arc<Self> {
        let workers = workers.clamp(1, WORKERS_MAX);
        Arc::new(Self((0..workers).map(|_| Inbox::default()).collect()))
    }

    /// Returns the number of workers.
    pub fn workers(&self) -> usize {
        self.0.len()
    }

    /// Takes the fate of a record from the producer's thread; never blocks for long.
    pub fn deliver(&self, token: u64, fate: Fate) {
        let worker = usize::from(Token::unpack(token).worker);
        let Some(inbox) = self.0.get(worker) else { return };
        let first = {
            let mut queue = inbox.queue.lock();
            queue.push(Delivery { token, fate });
            queue.len() == 1
        };
        if first {
            inbox.notify.notify_one();
        }
    }

    /// Waits until something was delivered to `worker` or [`Inboxes::wake`] was called.
    pub(crate) async fn wait(&self, worker: usize) {
        self.0[worker].notify.notified().await;
    }

    /// Wakes a worker for another reason than a delivery.
    pub(crate) fn wake(&self, worker: usize) {
        self.0[worker].notify.notify_one();
    }

    /// Takes everything that was delivered to `worker`; `batch` must be empty and lends its buffer.
    pub(crate) fn take(&self, worker: usize, batch: &mut Vec<Delivery>) {
        std::mem::swap(&mut *self.0[worker].queue.lock(), batch);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_gives_back_what_it_names() {
        for (worker, slot, generation, sequence) in [
            (0, 0, 0, 0),
            (255, SLOTS_MAX as u32 - 1, GENERATION_MASK, SEQUENCE_MASK),
            (3, 70_000, 9, 1_000_001),
        ] {
            let token = Token { worker, slot, generation, sequence };
            assert_eq!(Token::unpack(token.pack()), token);
        }
    }

    #[test]
    fn deliveries_reach_only_their_worker() {
        let inboxes = Inboxes::new(2);
        let token = |worker| Token { worker, slot: 1, generation: 2, sequence: 3 }.pack();
        inboxes.deliver(token(1), Fate::Delivered);
        inboxes.deliver(token(1), Fate::Failed);
        inboxes.deliver(token(9), Fate::Delivered);
        let mut batch = Vec::new();
        inboxes.take(0, &mut batch);
        assert!(batch.is_empty());
        inboxes.take(1, &mut batch);
        assert_eq!(batch.iter().map(|d| d.fate).collect::<Vec<_>>(), [Fate::Delivered, Fate::Failed]);
    }
}
