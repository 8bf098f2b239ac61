//! Receives from the connection that lives, hands over, and acknowledges to it in order.

use super::connection::{FAREWELL, Status};
use super::{Parts, Stop};
use crate::feeds::Publish;
use crate::inbox::{Delivery, GENERATION_MASK, Token};
use crate::listener::meters::Meters;
use crate::listener::worker::wall_clock;
use crate::outflow::Handed;
use crate::poison::Poison;
use crate::ring::{Done, Ring};
use crate::transform::{Scope, Transformer, Verdict};
use rumqttc::v5::AsyncClient;
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::Publish as Incoming;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use throughline_model::record::Outbox;
use throughline_runtime::ports::{Fate, NotTaken};
use throughline_telemetry::{Gauge, Metric, gauge};
use tokio::sync::mpsc;

/// Value of the label `listener` of this mode.
const EXTERNAL: &str = "external";
/// The dependency's name in health.
const BROKER: &str = "mqtt_broker";
const TICK: Duration = Duration::from_millis(100);

struct Held {
    records: Outbox,
    next: usize,
    sequence: u32,
}

/// What runs on the thread.
pub(super) struct Receiver {
    parts: Parts,
    client_id: String,
    transformer: Transformer,
    meters: Meters,
    open: Gauge,
    oldest: Gauge,
    poison: Poison,
    /// The number of the connection that is served; reports of others are void.
    connection: u64,
    /// Its client; `None` between connections.
    client: Option<AsyncClient>,
    ring: Ring,
    /// What the connection before left open: Kafka may yet refuse some of it for good.
    left_open: Ring,
    /// Acknowledgements in order that the client's channel did not take yet.
    acks: VecDeque<u16>,
    held: Option<Held>,
    generation: u16,
    open_max: usize,
    resetting: Reset,
}

/// Whether the connection is to end because Kafka did not take a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reset {
    No,
    /// The client's channel had no room for the DISCONNECT.
    Wanted,
    /// The DISCONNECT is under way.
    Asked,
}

impl Receiver {
    pub(super) fn new(parts: Parts, client_id: String, open_max: usize) -> Self {
        let transformer =
            Transformer::new(Arc::clone(&parts.router), Arc::clone(&parts.codec), &parts.instance);
        Self {
            client_id,
            transformer,
            meters: Meters::new(EXTERNAL),
            open: gauge(Metric::MqttOpenPublishes, &[("listener", EXTERNAL)]),
            oldest: gauge(Metric::BufferAgeSeconds, &[("role", "bridge"), ("buffer", "external_publishes")]),
            poison: Poison::default(),
            connection: 0,
            client: None,
            ring: Ring::default(),
            left_open: Ring::default(),
            acks: VecDeque::new(),
            held: None,
            generation: 0,
            open_max,
            resetting: Reset::No,
            parts,
        }
    }

    pub(super) async fn run(
        mut self,
        mut statuses: mpsc::UnboundedReceiver<(u64, Status)>,
        mut received: mpsc::Receiver<(u64, Incoming)>,
        stop: &Stop,
    ) {
        let inboxes = Arc::clone(&self.parts.inboxes);
        let worker = self.parts.worker;
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut batch = Vec::new();
        self.parts.health.dependency(BROKER, false, "connecting");
        if self.parts.alone {
            self.parts.health.ready(false, "connecting to the MQTT broker");
        }
        loop {
            let stopping = stop.asked.load(Ordering::Acquire);
            // What comes after the end was asked for, or of a connection that is ending, is read away: it
            // comes again, and behind it wait the client's own acknowledgements and its DISCONNECT.
            let void = stopping || self.client.is_none() || self.resetting != Reset::No;
            let room = void || (self.held.is_none() && self.ring.len() < self.open_max);
            tokio::select! {
                status = statuses.recv() => match status {
                    Some((number, status)) => self.status(number, status),
                    None => return,
                },
                publish = received.recv(), if room => {
                    // A connection says that it is there before it hands over publishes.
                    while let Ok((number, status)) = statuses.try_recv() {
                        self.status(number, status);
                    }
                    match publish {
                        Some((number, publish)) => {
                            let ending = stopping || self.resetting != Reset::No;
                            if !ending && self.client.is_some() && number == self.connection {
                                self.publish(&publish);
                            }
                        }
                        None => return,
                    }
                }
                () = inboxes.wait(worker) => {
                    inboxes.take(worker, &mut batch);
                    self.settle(&mut batch);
                }
                _ = tick.tick() => self.tick(),
            }
            let deadline = *stop.deadline.lock();
            let quiet = self.ring.is_empty() && self.acks.is_empty();
            if stopping && (quiet || deadline.is_some_and(|at| Instant::now() >= at)) {
                break;
            }
        }
        if self.client.is_some_and(|client| client.try_disconnect().is_ok()) {
            tokio::time::sleep(FAREWELL).await;
        }
    }

    fn status(&mut self, number: u64, status: Status) {
        let health = &self.parts.health;
        match status {
            // Connected is not yet useful: the subscriptions may be refused.
            Status::Connected(client) => {
                self.connection = number;
                self.client = Some(client);
            }
            Status::Subscribed => {
                health.dependency(BROKER, true, "");
                tracing::info!("reading from the external MQTT broker");
            }
            Status::Failed(why) => {
                health.dependency(BROKER, false, &why);
                self.meters.log(|more| {
                    tracing::warn!(error = %why, more, "the external MQTT broker cannot be used");
                });
                // What was not acknowledged comes again, so nothing of it is awaited any more.
                self.client = None;
                self.generation = (self.generation + 1) & GENERATION_MASK;
                self.left_open = std::mem::take(&mut self.ring);
                self.acks.clear();
                self.held = None;
                self.resetting = Reset::No;
            }
        }
        if self.parts.alone {
            // Clients are the broker's to hold, so the role is ready also while the broker is away.
            health.ready(true, "");
        }
    }

    fn publish(&mut self, publish: &Incoming) {
        let qos1 = publish.qos != QoS::AtMostOnce;
        let packet_id = if qos1 { publish.pkid } else { 0 };
        self.meters.publishes[usize::from(qos1)].add(1);
        let Ok(topic) = std::str::from_utf8(&publish.topic) else {
            self.meters.refused("topic_name_invalid");
            self.ring.push(Done { packet_id, code: 0, mark: 0 }, 0, 0, Instant::now());
            return self.acknowledge();
        };
        let properties = publish.properties.as_ref();
        let mut pairs = properties.map(|p| p.user_properties.clone()).unwrap_or_default();
        if let Some(kind) = properties.and_then(|p| p.content_type.clone()) {
            pairs.push(("content-type".to_owned(), kind));
        }
        let message = Publish {
            topic,
            payload: &publish.payload,
            client_id: &self.client_id,
            user: None,
            login_site: None,
            properties: &pairs,
            received_at: wall_clock(),
        };
        let mark = self.poison.mark(&self.client_id, topic, &publish.payload);
        let scope = Scope::default();
        let mut verdict = self.transformer.admit(&message, &scope, None);
        if verdict == Verdict::Accepted && self.poison.take(mark) {
            verdict =
                self.transformer.refuse(&message, &scope, "Kafka refused the record after it had been sent");
        }
        match verdict {
            Verdict::Accepted => {}
            Verdict::DeadLettered(reason) => {
                self.meters.dead_letter(self.transformer.records().get(0).topic, reason);
            }
            Verdict::Forbidden(reason) => self.meters.refused(reason),
        }
        let sequence = self.ring.next_sequence();
        let token = self.token(sequence);
        let mut handed = self.parts.outflow.hand_over(self.transformer.records(), 0, token);
        if verdict == Verdict::Accepted
            && handed.sent == 0
            && let Some(NotTaken::Record(why)) = &handed.stop
        {
            // The record is larger than Kafka takes: the payload itself may still fit.
            self.transformer.refuse(&message, &scope, why);
            self.meters.dead_letter(self.transformer.records().get(0).topic, "record_refused");
            handed = self.parts.outflow.hand_over(self.transformer.records(), 0, token);
        }
        let count = self.transformer.records().len() as u32;
        self.ring.push(Done { packet_id, code: 0, mark }, count, publish.payload.len(), Instant::now());
        let records = self.transformer.take_records();
        self.handed(records, sequence, handed);
    }

    fn token(&self, sequence: u32) -> u64 {
        let worker = self.parts.worker as u8;
        Token { worker, slot: 0, generation: self.generation, sequence }.pack()
    }

    /// Goes on after records were handed over; what was not taken is held, and nothing more is read.
    fn handed(&mut self, records: Outbox, sequence: u32, handed: Handed) {
        self.meters.dropped_locators(handed.dropped);
        (0..handed.dropped).for_each(|_| self.ring.settle(sequence, true));
        match handed.stop {
            None => {}
            Some(NotTaken::Record(why)) => {
                // Without a dead letter it is not acknowledged either: the broker keeps it, and the log says
                // what stands in its way. Where part of a list is written, the whole becomes a dead letter
                // when it comes again.
                self.meters.refused("record_too_large");
                self.meters.log(|more| {
                    tracing::error!(why, more, "Kafka takes neither a record nor, now, its dead letter");
                });
                self.refused_for_good(self.ring.mark(sequence));
                self.ring.settle(sequence, false);
                self.acknowledge();
                return self.reset();
            }
            Some(_) => self.held = Some(Held { records, next: handed.next, sequence }),
        }
        self.acknowledge();
    }

    fn refused_for_good(&self, mark: Option<u64>) {
        if let Some(mark) = mark {
            self.poison.remember(mark);
        }
    }

    /// Ends the connection, because the broker sends again only to a new one.
    fn reset(&mut self) {
        if self.resetting != Reset::Asked {
            let asked = self.client.as_ref().is_some_and(|client| client.try_disconnect().is_ok());
            self.resetting = if asked { Reset::Asked } else { Reset::Wanted };
        }
    }

    fn settle(&mut self, batch: &mut Vec<Delivery>) {
        let mut failed = false;
        for delivery in batch.drain(..) {
            let token = Token::unpack(delivery.token);
            let current = token.generation == self.generation;
            let before = token.generation == self.generation.wrapping_sub(1) & GENERATION_MASK;
            if delivery.fate == Fate::Refused && (current || before) {
                let ring = if current { &self.ring } else { &self.left_open };
                self.refused_for_good(ring.mark(token.sequence));
            }
            if !current {
                continue;
            }
            let ok = delivery.fate == Fate::Delivered;
            self.ring.settle(token.sequence, ok);
            failed |= !ok;
        }
        // What stands before the failure is acknowledged first, so that it does not come again with it.
        self.acknowledge();
        if failed {
            self.reset();
        }
        self.send_held();
    }

    fn send_held(&mut self) {
        if let Some(Held { records, next, sequence }) = self.held.take() {
            let handed = self.parts.outflow.hand_over(&records, next, self.token(sequence));
            self.handed(records, sequence, handed);
        }
    }

    fn acknowledge(&mut self) {
        while let Some(done) = self.ring.pop() {
            if done.packet_id != 0 {
                self.acks.push_back(done.packet_id);
            }
        }
        // After DISCONNECT nothing may follow.
        let Some(client) = self.client.as_ref().filter(|_| self.resetting != Reset::Asked) else { return };
        while let Some(packet_id) = self.acks.front() {
            let mut publish = Incoming::new("", QoS::AtLeastOnce, "", None);
            publish.pkid = *packet_id;
            if client.try_ack(&publish).is_err() {
                return;
            }
            self.meters.pubacks.add(1);
            self.acks.pop_front();
        }
    }

    fn tick(&mut self) {
        self.send_held();
        self.acknowledge();
        if self.resetting == Reset::Wanted {
            self.reset();
        }
        self.open.set(self.ring.len() as f64);
        let waited = self.ring.oldest().map_or(0.0, |since| since.elapsed().as_secs_f64());
        self.oldest.set(waited);
        self.parts.outflow.report();
        self.parts.health.turned();
        self.parts.health.note(
            EXTERNAL,
            serde_json::json!({
                "open_publishes": self.ring.len(),
                "open_bytes": self.ring.bytes(),
                "waiting_for_producer": self.held.is_some(),
            }),
        );
    }
}
