//! The bridge behind an existing broker: shared subscriptions, manual acknowledgement after Kafka's, in
//! order. MQTT 5 is needed, because only it lets the receiver bound what the broker sends ahead.

use crate::config::{BridgeError, ExternalConfig, read_secret};
use crate::feeds::{Publish, Router};
use crate::inbox::{Delivery, GENERATION_MASK, Inboxes, Token};
use crate::listener::meters::Meters;
use crate::listener::worker::wall_clock;
use crate::ring::{Done, Ring};
use crate::transform::{Scope, Transformer, Verdict};
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::{Filter, Packet, Publish as Incoming, SubscribeReasonCode};
use rumqttc::v5::{AsyncClient, Event, EventLoop, MqttOptions};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use throughline_model::codec::Codec;
use throughline_model::record::Outbox;
use throughline_runtime::ports::{Ingress, Refused};
use throughline_telemetry::{Gauge, Metric, RoleHealth, gauge};
use tokio::sync::mpsc;
use tokio::task::LocalSet;

/// Value of the label `listener` of this mode.
const EXTERNAL: &str = "external";
/// The dependency's name in health.
const BROKER: &str = "mqtt_broker";
const BACKOFF_FIRST: Duration = Duration::from_millis(200);
const BACKOFF_MAX: Duration = Duration::from_secs(30);
const TICK: Duration = Duration::from_millis(100);
/// How long the DISCONNECT may take to go out.
const FAREWELL: Duration = Duration::from_millis(300);
/// Events that may wait between the client's loop and ours, beyond the open publishes.
const EVENTS_AHEAD: usize = 64;

enum News {
    Connected,
    Subscribed,
    Publish(Incoming),
    Failed(String),
}

/// The running client.
pub(crate) struct External {
    stop: Arc<Stop>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Stop {
    asked: AtomicBool,
    deadline: parking_lot::Mutex<Option<Instant>>,
}

/// What the client needs.
pub(crate) struct Parts {
    pub(crate) instance: String,
    pub(crate) router: Arc<Router>,
    pub(crate) codec: Arc<Codec>,
    pub(crate) ingress: Arc<dyn Ingress>,
    pub(crate) inboxes: Arc<Inboxes>,
    pub(crate) worker: usize,
    pub(crate) health: RoleHealth,
    /// Whether this mode alone says that the role is ready; else the listener does.
    pub(crate) alone: bool,
}

impl External {
    /// Starts the client; it connects and reconnects by itself.
    ///
    /// # Errors
    /// [`BridgeError`] when the configuration is wrong or the thread cannot be started.
    pub(crate) fn start(config: &ExternalConfig, parts: Parts) -> Result<Self, BridgeError> {
        let client_id = format!("throughline-{}-{}", config.group, parts.instance);
        let options = options(config, &client_id)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(BridgeError::Worker)?;
        let stop = Arc::new(Stop::default());
        let open_max = usize::from(config.open_publishes_max.max(1));
        let group = config.group.clone();
        let asked = Arc::clone(&stop);
        let work = move || {
            let local = LocalSet::new();
            local.block_on(&runtime, async move {
                let subscriptions = parts.router.subscriptions();
                // Acknowledgements wait in the client's channel, so it holds all that can be open.
                let (client, events) = AsyncClient::new(options, open_max + EVENTS_AHEAD);
                let (news, inbox) = mpsc::channel(open_max + EVENTS_AHEAD);
                let filters = filters(&group, &subscriptions);
                let polling = tokio::task::spawn_local(poll(events, client.clone(), filters, news));
                Bridge::new(parts, client, client_id, open_max).run(inbox, &asked).await;
                polling.abort();
            });
        };
        let thread = std::thread::Builder::new().name("mqtt-external".to_owned()).spawn(work);
        Ok(Self { stop, thread: Some(thread.map_err(BridgeError::Worker)?) })
    }

    /// Takes no more messages, lets Kafka answer until `deadline`, acknowledges and disconnects.
    pub(crate) fn drain(&mut self, deadline: Instant) {
        *self.stop.deadline.lock() = Some(deadline);
        self.stop.asked.store(true, Ordering::Release);
        let Some(thread) = self.thread.take() else { return };
        if thread.join().is_err() {
            tracing::error!("the thread of the external MQTT broker panicked");
        }
    }
}

impl Drop for External {
    fn drop(&mut self) {
        self.drain(Instant::now());
    }
}

fn options(config: &ExternalConfig, client_id: &str) -> Result<MqttOptions, BridgeError> {
    let wrong = |why: &str| BridgeError::Config { key: "external.url".to_owned(), why: why.to_owned() };
    let rest = config.url.strip_prefix("mqtt://").ok_or_else(|| wrong("has the form `mqtt://host:port`"))?;
    let (host, port) = match rest.trim_end_matches('/').rsplit_once(':') {
        Some((host, port)) => (host, port.parse().map_err(|_| wrong("has a port that is not a number"))?),
        None => (rest.trim_end_matches('/'), 1883),
    };
    if host.is_empty() {
        return Err(wrong("names no host"));
    }
    let mut options = MqttOptions::new(client_id, host, port);
    options
        .set_keep_alive(Duration::from_secs(u64::from(config.keep_alive_s.max(5))))
        .set_clean_start(false)
        .set_manual_acks(true)
        .set_connection_timeout(10)
        .set_session_expiry_interval(Some(config.session_expiry_s))
        .set_receive_maximum(Some(config.open_publishes_max.max(1)))
        .set_max_packet_size(Some(config.packet_bytes_max));
    match (&config.user, &config.password_file) {
        (Some(user), Some(path)) => {
            let password = read_secret("external.password_file", path)?;
            options.set_credentials(user.clone(), password);
        }
        (None, None) => {}
        _ => {
            let why = "needs `external.password_file` beside it, and the other way round".to_owned();
            return Err(BridgeError::Config { key: "external.user".to_owned(), why });
        }
    }
    Ok(options)
}

fn filters(group: &str, subscriptions: &[String]) -> Vec<Filter> {
    let shared = |filter: &String| Filter::new(format!("$share/{group}/{filter}"), QoS::AtLeastOnce);
    subscriptions.iter().map(shared).collect()
}

/// Turns the client's loop, which must never be dropped halfway; connects again with bounded back-off.
async fn poll(mut events: EventLoop, client: AsyncClient, filters: Vec<Filter>, news: mpsc::Sender<News>) {
    let mut backoff = BACKOFF_FIRST;
    loop {
        let said = match events.poll().await {
            Ok(Event::Incoming(Packet::ConnAck(_))) => {
                backoff = BACKOFF_FIRST;
                match client.try_subscribe_many(filters.clone()) {
                    Ok(()) => News::Connected,
                    Err(e) => News::Failed(format!("cannot subscribe: {e}")),
                }
            }
            Ok(Event::Incoming(Packet::SubAck(ack))) => {
                let refused =
                    ack.return_codes.iter().position(|c| !matches!(c, SubscribeReasonCode::Success(_)));
                match refused {
                    None => News::Subscribed,
                    Some(at) => News::Failed(format!(
                        "the broker refuses subscription `{}`: {:?}",
                        filters.get(at).map_or("", |f| f.path.as_str()),
                        ack.return_codes[at]
                    )),
                }
            }
            Ok(Event::Incoming(Packet::Publish(publish))) => News::Publish(publish),
            Ok(_) => continue,
            Err(e) => News::Failed(e.to_string()),
        };
        let failed = matches!(said, News::Failed(_));
        if news.send(said).await.is_err() {
            return;
        }
        if failed {
            tokio::time::sleep(backoff).await;
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
    }
}

struct Held {
    records: Outbox,
    next: usize,
    sequence: u32,
}

struct Bridge {
    parts: Parts,
    client: AsyncClient,
    client_id: String,
    transformer: Transformer,
    meters: Meters,
    open: Gauge,
    ring: Ring,
    /// Acknowledgements in order that the client's channel did not take yet.
    acks: VecDeque<u16>,
    held: Option<Held>,
    generation: u16,
    open_max: usize,
    resetting: bool,
}

impl Bridge {
    fn new(parts: Parts, client: AsyncClient, client_id: String, open_max: usize) -> Self {
        let transformer =
            Transformer::new(Arc::clone(&parts.router), Arc::clone(&parts.codec), &parts.instance);
        Self {
            client,
            client_id,
            transformer,
            meters: Meters::new(EXTERNAL),
            open: gauge(Metric::MqttOpenPublishes, &[("listener", EXTERNAL)]),
            ring: Ring::default(),
            acks: VecDeque::new(),
            held: None,
            generation: 0,
            open_max,
            resetting: false,
            parts,
        }
    }

    async fn run(mut self, mut inbox: mpsc::Receiver<News>, stop: &Stop) {
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
            let room = self.held.is_none() && self.ring.len() < self.open_max && !stopping;
            tokio::select! {
                said = inbox.recv(), if room => match said {
                    Some(News::Publish(publish)) => self.publish(&publish),
                    Some(other) => self.status(other),
                    None => return,
                },
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
        if self.client.try_disconnect().is_ok() {
            tokio::time::sleep(FAREWELL).await;
        }
    }

    fn status(&mut self, news: News) {
        let health = &self.parts.health;
        match news {
            // Connected is not yet useful: the subscriptions may be refused.
            News::Connected | News::Publish(_) => {}
            News::Subscribed => {
                health.dependency(BROKER, true, "");
                tracing::info!("reading from the external MQTT broker");
            }
            News::Failed(why) => {
                health.dependency(BROKER, false, &why);
                self.meters.log(|more| {
                    tracing::warn!(error = %why, more, "the external MQTT broker cannot be used");
                });
                // What was not acknowledged comes again, so nothing of it is awaited any more.
                self.generation = (self.generation + 1) & GENERATION_MASK;
                self.ring = Ring::default();
                self.acks.clear();
                self.held = None;
                self.resetting = false;
            }
        }
        if self.parts.alone {
            // Clients are the broker's to hold, so the role is ready also while the broker is away.
            health.ready(true, "");
        }
    }

    fn publish(&mut self, publish: &Incoming) {
        let qos1 = publish.qos != QoS::AtMostOnce;
        self.meters.publishes[usize::from(qos1)].add(1);
        let Ok(topic) = std::str::from_utf8(&publish.topic) else {
            self.meters.refused("topic_name_invalid");
            self.ring.push(Done { packet_id: publish.pkid, code: 0 }, 0, 0);
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
        match self.transformer.admit(&message, &Scope::default(), None) {
            Verdict::Accepted => {}
            Verdict::DeadLettered(reason) => {
                self.meters.dead_letter(self.transformer.records().get(0).topic, reason);
            }
            Verdict::Forbidden(reason) => self.meters.refused(reason),
        }
        let sequence = self.ring.next_sequence();
        let packet_id = if qos1 { publish.pkid } else { 0 };
        let count = self.transformer.records().len();
        self.ring.push(Done { packet_id, code: 0 }, count as u32, publish.payload.len());
        if count == 0 {
            return self.acknowledge();
        }
        let records = self.transformer.take_records();
        self.send(Held { records, next: 0, sequence });
    }

    /// Hands records over; what the full producer does not take is held, and nothing more is read.
    fn send(&mut self, mut held: Held) {
        let token = Token {
            worker: self.parts.worker as u8,
            slot: 0,
            generation: self.generation,
            sequence: held.sequence,
        };
        while held.next < held.records.len() {
            match self.parts.ingress.send(held.records.get(held.next), token.pack()) {
                Ok(()) => held.next += 1,
                Err(Refused::Full) => {
                    self.held = Some(held);
                    return;
                }
                Err(Refused::Broken(why)) => {
                    // It can never be sent; leaving it unacknowledged would stop everything behind it.
                    self.meters.refused("record_too_large");
                    self.meters.log(|more| tracing::error!(why, more, "Kafka does not take a record"));
                    self.ring.settle(held.sequence, true);
                    held.next += 1;
                }
            }
        }
        self.acknowledge();
    }

    fn settle(&mut self, batch: &mut Vec<Delivery>) {
        for delivery in batch.drain(..) {
            let token = Token::unpack(delivery.token);
            if token.generation != self.generation {
                continue;
            }
            self.ring.settle(token.sequence, delivery.ok);
            if !delivery.ok && !self.resetting {
                // The broker sends again only after a reconnect.
                self.resetting = self.client.try_disconnect().is_ok();
            }
        }
        self.acknowledge();
        self.send_held();
    }

    fn send_held(&mut self) {
        if let Some(held) = self.held.take() {
            self.send(held);
        }
    }

    fn acknowledge(&mut self) {
        while let Some(done) = self.ring.pop() {
            if done.packet_id != 0 {
                self.acks.push_back(done.packet_id);
            }
        }
        while let Some(packet_id) = self.acks.front() {
            let mut publish = Incoming::new("", QoS::AtLeastOnce, "", None);
            publish.pkid = *packet_id;
            if self.client.try_ack(&publish).is_err() {
                return;
            }
            self.meters.pubacks.add(1);
            self.acks.pop_front();
        }
    }

    fn tick(&mut self) {
        self.send_held();
        self.acknowledge();
        self.open.set(self.ring.len() as f64);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broker_that_cannot_be_named_is_refused_with_the_form() {
        for (url, user, why) in [
            ("broker:1883", None, "mqtt://host:port"),
            ("mqtt://", None, "no host"),
            ("mqtt://h:x", None, "not a number"),
            ("mqtt://h", Some("u"), "password_file"),
        ] {
            let user = user.map(str::to_owned);
            let config = ExternalConfig { url: url.to_owned(), user, ..ExternalConfig::default() };
            let error = options(&config, "c").expect_err(url).to_string();
            assert!(error.contains(why), "{url}: {error}");
        }
        let config = ExternalConfig { url: "mqtt://h:1884".to_owned(), ..ExternalConfig::default() };
        assert_eq!(options(&config, "c").expect("fine").broker_address(), ("h".to_owned(), 1884));
    }
}
