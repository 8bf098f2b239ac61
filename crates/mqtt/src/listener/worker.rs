//! A worker: one thread, one current-thread runtime, the connections that were dealt to it.

use super::asides::{self, Asides};
use super::conn::{Conn, Phase};
use super::meters::Meters;
use super::packets;
use super::slots::Slots;
use super::{Command, Shared};
use crate::inbox::{Delivery, Token};
use crate::transform::Transformer;
use mqtt_protocol_core::mqtt::connection::event::TimerKind;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use throughline_model::time::Timestamp;
use throughline_runtime::ports::{Fate, NotTaken};
use tokio::sync::Semaphore;
use tokio::task::LocalSet;

/// Deadlines are checked this often: a keep-alive is seconds, so a quarter of one is near enough.
const SWEEP: Duration = Duration::from_millis(250);

/// Bytes read from a socket at once; one buffer a worker.
const READ_BYTES: usize = 64 << 10;

/// How long session events may still be written after the last connection was drained.
const FAREWELL: Duration = Duration::from_secs(2);

/// Passwords that a worker checks at once.
pub(super) const VERIFIED_AT_ONCE: usize = 2;

/// One worker.
pub(crate) struct Worker {
    pub(crate) index: usize,
    pub(crate) shared: Arc<Shared>,
    pub(crate) slots: RefCell<Slots>,
    pub(crate) transformer: RefCell<Transformer>,
    pub(crate) asides: RefCell<Asides>,
    pub(crate) buffer: RefCell<Vec<u8>>,
    /// Connections whose records the full producer did not take, in the order they found it full.
    pub(crate) held: RefCell<VecDeque<Rc<Conn>>>,
    /// Connections whose records belong to a topic that takes none; tried again at every sweep.
    pub(crate) blocked: RefCell<VecDeque<Rc<Conn>>>,
    pub(crate) meters: Meters,
    pub(crate) now: Cell<Instant>,
    pub(crate) draining: Cell<Option<Instant>>,
    /// Whether connections wait for all of them together to hold less.
    pub(crate) crowded: Cell<bool>,
    /// Connections that are over and may still accept our last bytes.
    pub(crate) lingering: Cell<usize>,
    /// Admits so many checks of passwords at once.
    pub(crate) verifying: Semaphore,
    batch: RefCell<Vec<Delivery>>,
    counted: Cell<Counted>,
}

/// What this worker last added to the sums of all.
#[derive(Clone, Copy, Debug, Default)]
struct Counted {
    open: usize,
    bytes: usize,
    paused: usize,
    held: usize,
    blocked: usize,
    asides: usize,
}

/// Returns the time of the platform's clock.
pub(crate) fn wall_clock() -> Timestamp {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    Timestamp(i64::try_from(now.as_micros()).unwrap_or(i64::MAX))
}

/// Runs a worker until it is drained. `runtime` was made for this thread.
pub(crate) fn run(shared: Arc<Shared>, index: usize, runtime: &tokio::runtime::Runtime) {
    let local = LocalSet::new();
    local.block_on(runtime, async move {
        let worker = Rc::new(Worker::new(shared, index));
        let mut sweep = tokio::time::interval(SWEEP);
        sweep.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while !worker.is_done() {
            tokio::select! {
                () = worker.shared.inboxes.wait(index) => worker.turn(),
                _ = sweep.tick() => worker.sweep(),
            }
        }
        worker.shared.oldest(index, Duration::ZERO);
        worker.publish_sums(Counted::default());
    });
}

impl Worker {
    fn new(shared: Arc<Shared>, index: usize) -> Self {
        let transformer =
            Transformer::new(Arc::clone(&shared.router), Arc::clone(&shared.codec), &shared.instance);
        let asides = Asides::new(index as u8, &shared.config.bounds);
        Self {
            index,
            slots: RefCell::default(),
            transformer: RefCell::new(transformer),
            asides: RefCell::new(asides),
            buffer: RefCell::new(vec![0; READ_BYTES]),
            held: RefCell::default(),
            blocked: RefCell::default(),
            meters: Meters::new(super::meters::LISTENER),
            now: Cell::new(Instant::now()),
            draining: Cell::new(None),
            crowded: Cell::new(false),
            lingering: Cell::new(0),
            verifying: Semaphore::new(VERIFIED_AT_ONCE),
            batch: RefCell::default(),
            counted: Cell::default(),
            shared,
        }
    }

    /// Takes what was delivered and commanded.
    fn turn(self: &Rc<Self>) {
        self.complete();
        for command in self.shared.take_commands(self.index) {
            match command {
                Command::Serve(stream, peer) => self.accept(stream, peer),
                Command::TakeOver(owner) => self.take_over(owner),
                Command::Drain(deadline) => {
                    self.draining.set(Some(deadline));
                    self.fire_wills(None);
                }
            }
        }
        self.send_held();
        self.asides.borrow_mut().send(&self.shared.outflow);
        self.drain_step();
    }

    /// Marks what Kafka acknowledged, and acknowledges what is finished, connection by connection.
    fn complete(self: &Rc<Self>) {
        let mut batch = self.batch.borrow_mut();
        self.shared.inboxes.take(self.index, &mut batch);
        let mut touched: Vec<Rc<Conn>> = Vec::new();
        for delivery in batch.drain(..) {
            let token = Token::unpack(delivery.token);
            if token.slot == asides::SLOT {
                self.asides.borrow_mut().settle(token.sequence, delivery.fate);
                continue;
            }
            let mut slots = self.slots.borrow_mut();
            let Some(conn) = slots.get(token.slot, token.generation) else {
                let mark = slots.answered(token);
                if let Some(mark) = mark.filter(|_| delivery.fate == Fate::Refused) {
                    self.refused_late(mark);
                }
                continue;
            };
            let mut state = conn.state.borrow_mut();
            state.outstanding = state.outstanding.saturating_sub(1);
            if delivery.fate == Fate::Refused
                && let Some(mark) = state.ring.mark(token.sequence)
            {
                self.refused_late(mark);
            }
            let ok = delivery.fate == Fate::Delivered;
            state.ring.settle(token.sequence, ok);
            state.failed |= !ok;
            if !conn.touched.replace(true) {
                touched.push(Rc::clone(conn));
            }
        }
        for conn in touched {
            conn.touched.set(false);
            self.acknowledge(&conn);
        }
    }

    /// Remembers a publish whose record Kafka refused for good after it was taken: it becomes a dead letter
    /// when its client, whose connection ends now, sends it again.
    fn refused_late(&self, mark: u64) {
        self.shared.poison.remember(mark);
        self.meters.log(|more| {
            tracing::warn!(
                more,
                "Kafka refused a record: its publish becomes a dead letter when it comes again"
            );
        });
    }

    /// Sends the PUBACKs that are due, in order, with one write.
    pub(crate) fn acknowledge(self: &Rc<Self>, conn: &Rc<Conn>) {
        if conn.is_closing() {
            return;
        }
        let mut acknowledged = 0;
        let mut refused = false;
        {
            let mut protocol = conn.protocol.borrow_mut();
            let mut state = conn.state.borrow_mut();
            while let Some(done) = state.ring.pop() {
                if done.packet_id == 0 {
                    continue;
                }
                // The crate keeps the ids that await their PUBACK, so it must see each of them; the bytes
                // are written here, because its own way costs two allocations.
                let events = packets::puback(state.level, done.packet_id).map(|p| protocol.send(p));
                refused |= events
                    .is_none_or(|events| events.iter().any(|e| matches!(e, super::Event::NotifyError(_))));
                packets::write_puback(done.packet_id, done.code, &mut state.out);
                acknowledged += 1;
            }
        }
        if acknowledged > 0 {
            self.meters.pubacks.add(acknowledged);
            if !conn.flush() {
                self.close(conn, "connection_lost", 0);
            }
        }
        if refused {
            self.close(conn, "protocol_error", 0x82);
        } else if conn.state.borrow().failed {
            // The client resends what it has no PUBACK for; nothing later of this connection is acknowledged.
            self.close(conn, "delivery_failed", 0x89);
        } else if conn.paused.get() || conn.stalled.get() || !conn.state.borrow().out.is_empty() {
            conn.wake.notify_one();
        }
    }

    /// Sends what the full producer did not take before, oldest first, and steps over connections whose topic
    /// takes nothing: the others are not to wait for it.
    fn send_held(self: &Rc<Self>) {
        let mut refused_topics = Vec::new();
        loop {
            let Some(conn) = self.held.borrow().front().cloned() else { return };
            let stop = self.send_held_of(&conn, &mut refused_topics);
            self.account(&conn);
            match stop {
                Some(NotTaken::Full) => return,
                Some(_) => self.blocked.borrow_mut().push_back(Rc::clone(&conn)),
                None => conn.wake.notify_one(),
            }
            self.held.borrow_mut().pop_front();
        }
    }

    /// Returns why the connection still waits, if it does.
    fn send_held_of(self: &Rc<Self>, conn: &Rc<Conn>, refused_topics: &mut Vec<String>) -> Option<NotTaken> {
        let held = conn.state.borrow_mut().held.take()?;
        if conn.is_closing() {
            return None;
        }
        let topic = held.records.get(held.next).topic;
        if refused_topics.iter().any(|refused| refused == topic) {
            conn.state.borrow_mut().held = Some(held);
            return Some(NotTaken::Topic(String::new()));
        }
        let stop = self.send_records(conn, held);
        if let Some(NotTaken::Topic(_)) = &stop
            && let Some(held) = &conn.state.borrow().held
        {
            refused_topics.push(held.records.get(held.next).topic.to_owned());
        }
        stop
    }

    /// Lets the connections try again whose topic took nothing. They have waited longest.
    fn unblock(&self) {
        let mut first = self.blocked.take();
        let mut held = self.held.borrow_mut();
        first.append(&mut held);
        *held = first;
    }

    /// Checks deadlines, sends what waited, states the sums.
    fn sweep(self: &Rc<Self>) {
        let now = Instant::now();
        self.now.set(now);
        let mut counted = Counted { asides: self.asides.borrow().len(), ..Counted::default() };
        let mut oldest = now;
        let connections = self.slots.borrow().all();
        let has_room = self.has_room();
        for conn in connections {
            let (expired, clogs) = {
                let state = conn.state.borrow();
                counted.open += state.ring.len();
                oldest = oldest.min(state.ring.oldest().unwrap_or(now));
                counted.bytes += state.ring.bytes() + state.out.len();
                counted.paused += usize::from(conn.paused.get());
                // A client that is not read cannot show that it lives. One that is not accepted yet has to be
                // by its deadline, also while its password is checked.
                let exempt = conn.paused.get() && state.phase == Phase::Open;
                let expired = state.deadline.is_some_and(|at| at <= now) && !exempt;
                // It takes no answers, so what it sent is never processed, and nobody else is read for it.
                let takes_nothing = state.out.len() >= self.shared.config.bounds.out_bytes_max;
                (expired, !has_room && takes_nothing && conn.held_bytes.get() > 0)
            };
            if clogs {
                self.close(&conn, "out_bytes", 0);
            } else if expired {
                self.expire(&conn);
            }
        }
        counted.held = self.held.borrow().len();
        counted.blocked = self.blocked.borrow().len();
        self.fire_wills(Some(now));
        self.unblock();
        self.asides.borrow_mut().retry(&self.shared.outflow);
        self.turn();
        self.make_use_of_room();
        self.shared.oldest(self.index, now - oldest);
        self.publish_sums(counted);
        if self.index == 0 {
            self.shared.report();
        }
    }

    fn expire(self: &Rc<Self>, conn: &Rc<Conn>) {
        match conn.phase() {
            Phase::New | Phase::Authenticating => self.close(conn, "connect_deadline", 0),
            Phase::Open => {
                conn.state.borrow_mut().deadline = None;
                let events = conn.protocol.borrow_mut().notify_timer_fired(TimerKind::PingreqRecv);
                drop(events);
                self.close(conn, "keep_alive", 0x8d);
            }
            Phase::Closing => {}
        }
    }

    fn publish_sums(&self, counted: Counted) {
        let before = self.counted.replace(counted);
        let sums = &self.shared.sums;
        for (sum, now, before) in [
            (&sums.open, counted.open, before.open),
            (&sums.bytes, counted.bytes, before.bytes),
            (&sums.paused, counted.paused, before.paused),
            (&sums.held, counted.held, before.held),
            (&sums.blocked, counted.blocked, before.blocked),
            (&sums.asides, counted.asides, before.asides),
        ] {
            // Wrapping addition is subtraction where the number fell.
            sum.fetch_add(now.wrapping_sub(before), Ordering::Relaxed);
        }
    }

    fn drain_step(self: &Rc<Self>) {
        let Some(deadline) = self.draining.get() else { return };
        let out_of_time = Instant::now() >= deadline;
        let connections = self.slots.borrow().all();
        for conn in connections {
            let quiet = {
                let state = conn.state.borrow();
                state.ring.is_empty() && state.held.is_none()
            };
            if quiet || out_of_time {
                self.close(&conn, "shutdown", 0x8b);
            } else {
                // Its task sees that reading has ended.
                conn.wake.notify_one();
            }
        }
    }

    fn is_done(&self) -> bool {
        let Some(deadline) = self.draining.get() else { return false };
        let connected = self.slots.borrow().live() + self.lingering.get();
        let empty = connected == 0 && self.asides.borrow().len() == 0;
        empty || Instant::now() >= deadline + FAREWELL
    }
}
