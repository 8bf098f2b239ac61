//! Session events and wills: records that no client waits for. They are kept until Kafka has them, however
//! long it is away; those that Kafka refuses for themselves, and those beyond the bound, are lost and counted.

use crate::config::Bounds;
use crate::inbox::{SLOTS_MAX, Token};
use crate::outflow::Outflow;
use std::collections::{HashMap, VecDeque};
use throughline_model::record::Outbox;
use throughline_runtime::ports::{Fate, NotTaken};
use throughline_telemetry::{Counter, Metric, counter};

/// The slot that their tokens carry; no connection has it.
pub(crate) const SLOT: u32 = SLOTS_MAX as u32 - 1;

/// How often Kafka may refuse a record for itself before it is lost. A person who repairs the topic's limit
/// meanwhile saves it; what merely failed is not counted, because an outage says nothing about the record.
const REFUSALS_MAX: u32 = 3;

struct Aside {
    records: Outbox,
    sent: usize,
    waiting: usize,
    /// Whether Kafka did not acknowledge one of them in this attempt.
    failed: bool,
    /// Whether Kafka refused one of them in this attempt.
    refused: bool,
    refusals: u32,
}

impl Aside {
    fn new(records: Outbox) -> Self {
        Self { records, sent: 0, waiting: 0, failed: false, refused: false, refusals: 0 }
    }

    fn is_answered(&self) -> bool {
        self.waiting == 0 && self.sent == self.records.len()
    }
}

/// The records of one worker.
pub(crate) struct Asides {
    worker: u8,
    held_max: usize,
    bytes_max: usize,
    bytes: usize,
    queue: VecDeque<u32>,
    /// Those whose topic takes nothing, and those that Kafka did not acknowledge, until [`Asides::retry`]; what
    /// comes after them waits behind them.
    blocked: VecDeque<u32>,
    all: HashMap<u32, Aside>,
    next: u32,
    lost: Counter,
}

impl Asides {
    pub(crate) fn new(worker: u8, bounds: &Bounds) -> Self {
        Self {
            worker,
            held_max: bounds.asides_max,
            bytes_max: bounds.asides_bytes_max,
            bytes: 0,
            queue: VecDeque::new(),
            blocked: VecDeque::new(),
            all: HashMap::new(),
            next: 0,
            lost: counter(Metric::MqttSessionEventsLostTotal, &[]),
        }
    }

    /// Returns how many wait.
    pub(crate) fn len(&self) -> usize {
        self.all.len()
    }

    /// Adds records; beyond the bound they are lost and counted.
    pub(crate) fn push(&mut self, records: Outbox) {
        if records.is_empty() {
            return;
        }
        let bytes = self.bytes + records.bytes_held();
        if self.all.len() >= self.held_max || bytes > self.bytes_max {
            self.lost.add(1);
            return;
        }
        self.bytes = bytes;
        let sequence = self.next;
        // The bound is far below the number of sequences, so none is in use twice.
        self.next = (self.next + 1) & crate::inbox::SEQUENCE_MASK;
        self.all.insert(sequence, Aside::new(records));
        self.enqueue(sequence);
    }

    fn forget(&mut self, sequence: u32) {
        if let Some(aside) = self.all.remove(&sequence) {
            self.bytes -= aside.records.bytes_held();
        }
    }

    fn enqueue(&mut self, sequence: u32) {
        let queue = if self.blocked.is_empty() { &mut self.queue } else { &mut self.blocked };
        queue.push_back(sequence);
    }

    /// Tries those again that wait for another attempt; to be called a few times a second.
    pub(crate) fn retry(&mut self, outflow: &Outflow) {
        self.blocked.append(&mut self.queue);
        std::mem::swap(&mut self.blocked, &mut self.queue);
        self.send(outflow);
    }

    /// Sends what waits, until the producer is full.
    pub(crate) fn send(&mut self, outflow: &Outflow) {
        while let Some(sequence) = self.queue.front().copied() {
            let token = Token { worker: self.worker, slot: SLOT, generation: 0, sequence }.pack();
            if let Some(aside) = self.all.get_mut(&sequence) {
                while aside.sent < aside.records.len() {
                    match outflow.offer(aside.records.get(aside.sent), token) {
                        Ok(()) => aside.waiting += 1,
                        Err(NotTaken::Full) => return,
                        Err(NotTaken::Topic(_)) => {
                            self.blocked.push_back(sequence);
                            break;
                        }
                        Err(NotTaken::Record(_)) => aside.refused = true,
                    }
                    aside.sent += 1;
                }
            }
            self.queue.pop_front();
            self.conclude(sequence);
        }
    }

    /// Takes the fate of a record.
    pub(crate) fn settle(&mut self, sequence: u32, fate: Fate) {
        let Some(aside) = self.all.get_mut(&sequence) else { return };
        aside.waiting = aside.waiting.saturating_sub(1);
        match fate {
            Fate::Delivered => {}
            Fate::Failed => aside.failed = true,
            Fate::Refused => aside.refused = true,
        }
        self.conclude(sequence);
    }

    /// Ends an attempt of which every record was answered for: it is done, lost, or made again later.
    fn conclude(&mut self, sequence: u32) {
        let Some(aside) = self.all.get_mut(&sequence).filter(|aside| aside.is_answered()) else { return };
        // Where one record failed and another was refused, the one that failed is not lost for it: attempts are
        // counted only once the refused one alone is left.
        if !aside.failed {
            aside.refusals += u32::from(aside.refused);
            if !aside.refused || aside.refusals >= REFUSALS_MAX {
                self.lost.add(u64::from(aside.refused));
                self.forget(sequence);
                return;
            }
        }
        // Session events carry ids, so one that Kafka did take is recognised when it comes twice.
        aside.sent = 0;
        aside.failed = false;
        aside.refused = false;
        // Not at once: Kafka may say so without having waited, and again and again.
        self.blocked.push_back(sequence);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use parking_lot::Mutex;
    use std::sync::Arc;
    use std::time::Duration;
    use throughline_model::record::Outgoing;
    use throughline_runtime::ports::Ingress;
    use throughline_telemetry::Health;

    /// A producer that takes everything but the values that it is told not to.
    #[derive(Default)]
    struct Producer {
        taken: Mutex<Vec<(Vec<u8>, u64)>>,
        too_large: Vec<&'static [u8]>,
    }

    impl Ingress for Producer {
        fn send(&self, record: Outgoing<'_>, token: u64) -> Result<(), NotTaken> {
            let value = record.value.unwrap_or_default();
            if self.too_large.contains(&value) {
                return Err(NotTaken::Record("too large".to_owned()));
            }
            self.taken.lock().push((value.to_vec(), token));
            Ok(())
        }

        fn in_flight(&self) -> usize {
            self.taken.lock().len()
        }

        fn silent_for(&self) -> Duration {
            Duration::ZERO
        }
    }

    struct World {
        asides: Asides,
        producer: Arc<Producer>,
        outflow: Arc<Outflow>,
    }

    impl World {
        fn new(too_large: Vec<&'static [u8]>) -> Self {
            let producer = Arc::new(Producer { too_large, ..Producer::default() });
            let outflow = Outflow::new(Arc::clone(&producer) as _, Health::new().role("bridge"));
            let asides = Asides::new(0, &Bounds::default());
            Self { asides, producer, outflow }
        }

        fn push(&mut self, values: &[&[u8]]) {
            let mut records = Outbox::default();
            for value in values {
                records.push(&"device.session.v1".into(), None, None, Some(value), []);
            }
            self.asides.push(records);
            self.asides.send(&self.outflow);
        }

        /// Answers for what was taken and returns it.
        fn answer(&mut self, fate: impl Fn(&[u8]) -> Fate) -> Vec<Vec<u8>> {
            let taken = std::mem::take(&mut *self.producer.taken.lock());
            for (value, token) in &taken {
                self.asides.settle(Token::unpack(*token).sequence, fate(value));
            }
            taken.into_iter().map(|(value, _)| value).collect()
        }
    }

    fn texts(values: &[&str]) -> Vec<Vec<u8>> {
        values.iter().map(|value| value.as_bytes().to_vec()).collect()
    }

    #[test]
    fn what_kafka_does_not_acknowledge_is_tried_again_as_long_as_that_lasts() {
        let mut world = World::new(Vec::new());
        world.push(&[b"event", b"reading"]);
        for _ in 0..50 {
            assert_eq!(world.answer(|_| Fate::Failed), texts(&["event", "reading"]));
            world.asides.send(&world.outflow);
            assert_eq!(world.producer.in_flight(), 0, "not at once");
            world.asides.retry(&world.outflow);
        }
        assert_eq!(world.answer(|_| Fate::Delivered), texts(&["event", "reading"]));
        assert_eq!((world.asides.len(), world.asides.bytes), (0, 0));
    }

    #[test]
    fn what_kafka_refuses_for_itself_is_lost_after_its_attempts_and_counted() {
        // Refused at once, and after it was sent.
        for (too_large, attempts) in [(vec![&b"large"[..]], 0), (vec![], 3)] {
            let mut world = World::new(too_large);
            let before = world.asides.lost.value();
            world.push(&[b"large"]);
            for _ in 0..attempts {
                assert_eq!(world.answer(|_| Fate::Refused), texts(&["large"]));
                world.asides.retry(&world.outflow);
            }
            (0..3).for_each(|_| world.asides.retry(&world.outflow));
            assert_eq!((world.asides.len(), world.asides.bytes, world.producer.in_flight()), (0, 0, 0));
            // Other tests of this process count there too.
            assert!(world.asides.lost.value() > before);
        }
    }

    #[test]
    fn a_record_that_failed_is_not_lost_because_another_of_its_event_is_refused() {
        let mut world = World::new(Vec::new());
        let fate = |value: &[u8], then| if value == b"bad" { Fate::Refused } else { then };
        world.push(&[b"bad", b"good"]);
        for _ in 0..10 {
            assert_eq!(world.answer(|value| fate(value, Fate::Failed)), texts(&["bad", "good"]));
            world.asides.retry(&world.outflow);
        }
        for _ in 0..3 {
            assert_eq!(world.answer(|value| fate(value, Fate::Delivered)), texts(&["bad", "good"]));
            world.asides.retry(&world.outflow);
        }
        assert_eq!((world.asides.len(), world.producer.in_flight()), (0, 0));
    }
}
