//! Session events and wills: records that no client waits for. They are kept until Kafka has them, tried
//! again a bounded number of times, and counted where they are lost.

use crate::config::Bounds;
use crate::inbox::{SLOTS_MAX, Token};
use crate::outflow::Outflow;
use std::collections::{HashMap, VecDeque};
use throughline_model::record::Outbox;
use throughline_runtime::ports::NotTaken;
use throughline_telemetry::{Counter, Metric, counter};

/// The slot that their tokens carry; no connection has it.
pub(crate) const SLOT: u32 = SLOTS_MAX as u32 - 1;

/// Kafka's own time-out is minutes, so three attempts outlast most outages that a person attends to.
const ATTEMPTS_MAX: u32 = 3;

struct Aside {
    records: Outbox,
    sent: usize,
    waiting: usize,
    failed: bool,
    attempts: u32,
}

/// The records of one worker.
pub(crate) struct Asides {
    worker: u8,
    held_max: usize,
    bytes_max: usize,
    bytes: usize,
    queue: VecDeque<u32>,
    /// Those whose topic takes nothing, until [`Asides::retry`]; what comes after them waits behind them.
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
        self.all.insert(sequence, Aside { records, sent: 0, waiting: 0, failed: false, attempts: 1 });
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

    /// Tries those again whose topic took nothing.
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
                        Err(NotTaken::Record(_)) => self.lost.add(1),
                    }
                    aside.sent += 1;
                }
                if aside.waiting == 0 && aside.sent == aside.records.len() {
                    self.forget(sequence);
                }
            }
            self.queue.pop_front();
        }
    }

    /// Takes the fate of a record.
    pub(crate) fn settle(&mut self, sequence: u32, ok: bool) {
        let Some(aside) = self.all.get_mut(&sequence) else { return };
        aside.waiting = aside.waiting.saturating_sub(1);
        aside.failed |= !ok;
        if aside.waiting > 0 || aside.sent < aside.records.len() {
            return;
        }
        if !aside.failed || aside.attempts >= ATTEMPTS_MAX {
            if aside.failed {
                self.lost.add(1);
            }
            self.forget(sequence);
            return;
        }
        // Session events carry ids, so one that Kafka did take is recognised when it comes twice.
        aside.attempts += 1;
        aside.sent = 0;
        aside.failed = false;
        self.enqueue(sequence);
    }
}
