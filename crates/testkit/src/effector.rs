//! The other side of an act stage in memory: what it got, and answers by script.

use crate::clock::FakeClock;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;
use throughline_model::stage::Delivery;
use throughline_model::time::Timestamp;
use throughline_runtime::Clock;
use throughline_runtime::ports::{Answer, Effector};

type Answers = Box<dyn FnMut(&Delivery) -> Answer + Send>;

struct Inner {
    got: Vec<(Timestamp, Delivery, Answer)>,
    answers: Answers,
    latency: Duration,
}

/// The other side, shared by its clones.
#[derive(Clone)]
pub struct MemoryReceiver {
    inner: Arc<Mutex<Inner>>,
    clock: FakeClock,
}

impl MemoryReceiver {
    /// Makes one that takes everything after 10 ms.
    pub fn new(clock: &FakeClock) -> Self {
        let inner = Inner {
            got: Vec::new(),
            answers: Box::new(|_| Answer::Delivered),
            latency: Duration::from_millis(10),
        };
        Self { inner: Arc::new(Mutex::new(inner)), clock: clock.clone() }
    }

    /// Lets `answers` say what becomes of each delivery.
    pub fn answer_with(&self, answers: impl FnMut(&Delivery) -> Answer + Send + 'static) {
        self.inner.lock().answers = Box::new(answers);
    }

    /// Lets each delivery take this long.
    pub fn set_latency(&self, latency: Duration) {
        self.inner.lock().latency = latency;
    }

    /// Returns every delivery that was begun: when, what, and its answer.
    pub fn got(&self) -> Vec<(Timestamp, Delivery, Answer)> {
        self.inner.lock().got.clone()
    }

    /// Returns the ids of what was taken, in order, repeats included.
    pub fn taken(&self) -> Vec<String> {
        let inner = self.inner.lock();
        let taken = inner.got.iter().filter(|(_, _, answer)| *answer == Answer::Delivered);
        taken.map(|(_, delivery, _)| delivery.id.clone()).collect()
    }

    /// Makes the port of one process; what it has not answered when it is dropped is not heard.
    pub fn port(&self) -> MemoryEffector {
        MemoryEffector { receiver: self.clone(), under_way: VecDeque::new() }
    }
}

/// The port of one process to a [`MemoryReceiver`].
pub struct MemoryEffector {
    receiver: MemoryReceiver,
    under_way: VecDeque<(Timestamp, u64, Answer)>,
}

impl Effector for MemoryEffector {
    fn dependency(&self) -> &'static str {
        "receiver"
    }

    fn begin(&mut self, token: u64, delivery: &Delivery) {
        let now = self.receiver.clock.now();
        let mut inner = self.receiver.inner.lock();
        let answer = (inner.answers)(delivery);
        inner.got.push((now, delivery.clone(), answer.clone()));
        self.under_way.push_back((now.plus(inner.latency), token, answer));
    }

    /// Lets the clock pass as far as it is allowed to wait.
    fn answer(&mut self, wait: Duration) -> Option<(u64, Answer)> {
        let (due, _, _) = self.under_way.front()?;
        let now = self.receiver.clock.now();
        let left = Duration::from_micros(u64::try_from(due.0 - now.0).unwrap_or(0));
        self.receiver.clock.advance(left.min(wait));
        let (_, token, answer) =
            self.under_way.pop_front_if(|(due, _, _)| *due <= self.receiver.clock.now())?;
        Some((token, answer))
    }
}
