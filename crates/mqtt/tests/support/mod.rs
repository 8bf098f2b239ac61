//! A bridge over an in-memory Kafka whose acknowledgements the test scripts, and a raw MQTT client.

#![allow(dead_code, reason = "each test binary uses its part")]
#![allow(clippy::allow_attributes, reason = "an expectation would be unfulfilled in some test binaries")]

use parking_lot::{Condvar, Mutex};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};
use throughline_model::catalog::Catalog;
use throughline_model::codec::Codec;
use throughline_model::envelope::{DeviceMessage, Session};
use throughline_model::record::Outgoing;
use throughline_model::topics::{DEVICE_SESSION_V1, DEVICE_TELEMETRY_V1};
use throughline_mqtt::{
    Bridge, BridgeConfig, ExternalConfig, Inboxes, ListenerConfig, Router, RunningBridge,
};
use throughline_runtime::ports::{Fate, Ingress, NotTaken};
use throughline_telemetry::{Counter, Health, Metric, counter};

/// How long anything may take that is expected to happen.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A record that the bridge sent.
#[derive(Clone, Debug)]
pub struct Sent {
    pub topic: String,
    pub key: Vec<u8>,
    pub value: Vec<u8>,
    pub headers: Vec<(String, Vec<u8>)>,
    pub token: u64,
    pub answered: bool,
}

impl Sent {
    pub fn header(&self, name: &str) -> &str {
        let found = self.headers.iter().find(|(n, _)| n == name);
        found.map_or("", |(_, v)| std::str::from_utf8(v).expect("UTF-8"))
    }
}

#[derive(Default)]
struct State {
    sent: Vec<Sent>,
    hold: bool,
    capacity: Option<usize>,
    bytes_max: Option<usize>,
    /// Topics that take nothing.
    closed: Vec<String>,
    /// Topics that take no record ever.
    broken: Vec<String>,
    silent_for: Duration,
}

/// Kafka, in memory.
pub struct Memory {
    inboxes: Arc<Inboxes>,
    state: Mutex<State>,
    changed: Condvar,
}

impl Memory {
    /// Kafka was not heard of for so long.
    pub fn is_silent_for(&self, silence: Duration) {
        self.state.lock().silent_for = silence;
    }

    /// From now on acknowledgements wait for [`Memory::answer`].
    pub fn hold(&self) {
        self.state.lock().hold = true;
    }

    /// From now on everything is acknowledged at once, and what waited too.
    pub fn flow(&self) {
        self.state.lock().hold = false;
        self.answer_where(|_| true, Fate::Delivered);
    }

    pub fn capacity(&self, records: Option<usize>) {
        self.state.lock().capacity = records;
    }

    pub fn bytes_max(&self, bytes: usize) {
        self.state.lock().bytes_max = Some(bytes);
    }

    /// Topics that take nothing from now on, as if they were missing.
    pub fn close_topics(&self, topics: &[&str]) {
        self.state.lock().closed = topics.iter().map(|t| (*t).to_owned()).collect();
    }

    /// Refuses every record of a topic for its own sake from now on.
    pub fn break_topic(&self, topic: &str) {
        self.state.lock().broken.push(topic.to_owned());
    }

    /// Answers for what was sent and not answered yet.
    pub fn answer_all(&self, topic: &str, fate: Fate) {
        self.answer_where(|s| s.topic == topic, fate);
    }

    fn answer_where(&self, choose: impl Fn(&Sent) -> bool, fate: Fate) {
        let tokens: Vec<u64> = {
            let mut state = self.state.lock();
            let waiting = state.sent.iter_mut().filter(|s| !s.answered && choose(s));
            waiting
                .map(|s| {
                    s.answered = true;
                    s.token
                })
                .collect()
        };
        for token in tokens {
            self.inboxes.deliver(token, fate);
        }
        self.changed.notify_all();
    }

    /// Answers for the telemetry record whose seq is `seq`.
    pub fn answer(&self, seq: i64, ok: bool, codec: &Codec) {
        self.answer_with(seq, if ok { Fate::Delivered } else { Fate::Failed }, codec);
    }

    /// The same with a fate.
    pub fn answer_with(&self, seq: i64, fate: Fate, codec: &Codec) {
        self.answer_where(
            |s| {
                s.topic == DEVICE_TELEMETRY_V1
                    && codec.decode::<DeviceMessage>(Some(&s.value)).expect("decodes").seq == Some(seq)
            },
            fate,
        );
    }

    /// Waits until the records sent so far satisfy `done`, and returns them.
    pub fn wait(&self, what: &str, done: impl Fn(&[Sent]) -> bool) -> Vec<Sent> {
        let deadline = Instant::now() + PATIENCE;
        let mut state = self.state.lock();
        while !done(&state.sent) {
            if self.changed.wait_until(&mut state, deadline).timed_out() {
                let topics: Vec<&str> = state.sent.iter().map(|s| s.topic.as_str()).collect();
                panic!("waited in vain for {what}; sent so far: {topics:?}");
            }
        }
        state.sent.clone()
    }

    pub fn of(&self, topic: &str) -> Vec<Sent> {
        self.state.lock().sent.iter().filter(|s| s.topic == topic).cloned().collect()
    }

    pub fn wait_for(&self, topic: &str, count: usize) -> Vec<Sent> {
        let all = self.wait(&format!("{count} of {topic}"), |sent| {
            sent.iter().filter(|s| s.topic == topic).count() >= count
        });
        all.into_iter().filter(|s| s.topic == topic).collect()
    }
}

impl Ingress for Memory {
    fn send(&self, record: Outgoing<'_>, token: u64) -> Result<(), NotTaken> {
        let mut state = self.state.lock();
        let waiting = state.sent.iter().filter(|s| !s.answered).count();
        if state.closed.iter().any(|topic| topic == record.topic) {
            return Err(NotTaken::Topic("it does not exist".to_owned()));
        }
        if state.capacity.is_some_and(|max| waiting >= max) {
            return Err(NotTaken::Full);
        }
        let too_large = state.bytes_max.is_some_and(|max| record.value.map_or(0, <[u8]>::len) > max);
        if too_large || state.broken.iter().any(|topic| topic == record.topic) {
            return Err(NotTaken::Record("the record is too large".to_owned()));
        }
        let now = !state.hold;
        state.sent.push(Sent {
            topic: record.topic.to_owned(),
            key: record.key.unwrap_or_default().to_vec(),
            value: record.value.unwrap_or_default().to_vec(),
            headers: record.headers.iter().map(|(n, v)| (n.to_owned(), v.to_vec())).collect(),
            token,
            answered: now,
        });
        drop(state);
        if now {
            self.inboxes.deliver(token, Fate::Delivered);
        }
        self.changed.notify_all();
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.state.lock().sent.iter().filter(|s| !s.answered).count()
    }

    fn silent_for(&self) -> Duration {
        self.state.lock().silent_for
    }
}

/// Makes a codec that knows every topic of the catalog.
pub fn codec(catalog: &Catalog) -> Arc<Codec> {
    let codec = Codec::default();
    for (id, topic) in catalog.topics().enumerate() {
        codec.bind(&topic.spec.name.to_string(), id as u32 + 1, &topic.schema).expect("a schema");
    }
    Arc::new(codec)
}

/// A running bridge.
pub struct Rig {
    pub memory: Arc<Memory>,
    pub codec: Arc<Codec>,
    pub bridge: RunningBridge,
    pub health: Health,
}

impl Rig {
    pub fn start() -> Self {
        Self::with(|_| ())
    }

    /// Starts a listener on a free port of loopback after `change` of its configuration.
    pub fn with(change: impl FnOnce(&mut ListenerConfig)) -> Self {
        let mut listener =
            ListenerConfig { address: SocketAddr::from(([127, 0, 0, 1], 0)), ..ListenerConfig::default() };
        change(&mut listener);
        Self::of(BridgeConfig { instance: "test-0".to_owned(), listener: Some(listener), external: None })
    }

    pub fn external(external: ExternalConfig) -> Self {
        Self::of(BridgeConfig { instance: "test-0".to_owned(), listener: None, external: Some(external) })
    }

    fn of(config: BridgeConfig) -> Self {
        let catalog = Catalog::embedded();
        let codec = codec(&catalog);
        let router = Arc::new(Router::compile(&catalog).expect("the embedded feeds compile"));
        let inboxes = Inboxes::new(config.inboxes());
        let memory = Arc::new(Memory {
            inboxes: Arc::clone(&inboxes),
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let health = Health::new();
        let producer: Arc<dyn Ingress> = Arc::clone(&memory) as _;
        let role = health.role("bridge");
        let bridge =
            Bridge::start(&config, router, Arc::clone(&codec), producer, inboxes, role).expect("starts");
        Self { memory, codec, bridge, health }
    }

    pub fn address(&self) -> SocketAddr {
        self.bridge.local_addr().expect("a listener")
    }

    pub fn raw(&self) -> Raw {
        Raw(TcpStream::connect(self.address()).expect("connects"))
    }

    /// Connects a client of a protocol level (4 or 5) with a clean session and without keep-alive.
    pub fn client(&self, level: u8, client_id: &str) -> Raw {
        let mut raw = self.raw();
        raw.send(&connect(level, client_id, 2, 0, &[]));
        assert_eq!(raw.connack(level), (0, 0), "session present, code");
        raw
    }

    /// Returns what health says of a dependency.
    pub fn dependency(&self, name: &str) -> serde_json::Value {
        self.health.status()["roles"]["bridge"]["dependencies"][name].clone()
    }

    pub fn message(&self, sent: &Sent) -> DeviceMessage {
        self.codec.decode(Some(&sent.value)).expect("a device message")
    }

    /// Waits for `count` session events and returns (event, cause) of all.
    pub fn sessions(&self, count: usize) -> Vec<Session> {
        let sent = self.memory.wait_for(DEVICE_SESSION_V1, count);
        sent.iter().map(|s| self.codec.decode(Some(&s.value)).expect("a session")).collect()
    }
}

/// A counter of the listener as it was. Other tests of the process may make it grow meanwhile, so it shows that
/// something counts under this name and these labels, and not who.
pub struct Before(String, Counter, u64);

impl Before {
    pub fn of(metric: Metric, label: &'static str, value: &str) -> Self {
        let counter = counter(metric, &[("listener", "mqtt"), (label, value)]);
        let count = counter.value();
        Self(format!("{metric:?} with {label}={value} to grow"), counter, count)
    }

    pub fn connects(result: &str) -> Self {
        Self::of(Metric::MqttConnectsTotal, "result", result)
    }

    pub fn disconnects(reason: &str) -> Self {
        Self::of(Metric::MqttDisconnectsTotal, "reason", reason)
    }

    pub fn refused(reason: &str) -> Self {
        Self::of(Metric::MqttRefusedTotal, "reason", reason)
    }

    /// Waits until it has grown by `n`: a client may see the answer before it is counted.
    pub fn grew_by(&self, n: u64) {
        until(&self.0, || self.1.value() >= self.2 + n);
    }
}

/// Waits until something is so.
pub fn until(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Makes a packet of a first byte and a body.
pub fn packet(first: u8, body: &[u8]) -> Vec<u8> {
    let mut out = vec![first];
    let mut len = body.len();
    loop {
        let byte = (len % 128) as u8;
        len /= 128;
        if len == 0 {
            out.push(byte);
            break;
        }
        out.push(byte | 0x80);
    }
    out.extend_from_slice(body);
    out
}

pub fn text(text: &[u8]) -> Vec<u8> {
    let mut out = (text.len() as u16).to_be_bytes().to_vec();
    out.extend_from_slice(text);
    out
}

/// Makes a CONNECT; `rest` follows the client id (will, user, password) as the flags say.
pub fn connect(level: u8, client_id: &str, flags: u8, keep_alive: u16, rest: &[u8]) -> Vec<u8> {
    connect_with(level, client_id, flags, keep_alive, &[], rest)
}

/// The same with MQTT 5 properties.
pub fn connect_with(
    level: u8,
    client_id: &str,
    flags: u8,
    keep_alive: u16,
    props: &[u8],
    rest: &[u8],
) -> Vec<u8> {
    let mut body = b"\0\x04MQTT".to_vec();
    body.extend_from_slice(&[level, flags]);
    body.extend_from_slice(&keep_alive.to_be_bytes());
    if level == 5 {
        body.push(props.len() as u8);
        body.extend_from_slice(props);
    }
    body.extend_from_slice(&text(client_id.as_bytes()));
    body.extend_from_slice(rest);
    packet(0x10, &body)
}

/// Makes a PUBLISH; packet id 0 is QoS 0.
pub fn publish(level: u8, topic: &str, packet_id: u16, payload: &[u8]) -> Vec<u8> {
    publish_flags(level, topic, packet_id, payload, 0)
}

pub fn publish_flags(level: u8, topic: &str, packet_id: u16, payload: &[u8], flags: u8) -> Vec<u8> {
    let mut body = text(topic.as_bytes());
    if packet_id != 0 {
        body.extend_from_slice(&packet_id.to_be_bytes());
    }
    if level == 5 {
        body.push(0);
    }
    body.extend_from_slice(payload);
    packet(if packet_id == 0 { 0x30 } else { 0x32 } | flags, &body)
}

/// Makes a native reading.
pub fn reading(seq: u64) -> Vec<u8> {
    format!(r#"{{"epoch":1,"seq":{seq},"values":{{"temperature":21.5}}}}"#).into_bytes()
}

pub const TOPIC: &str = "tl/site-1/pump-7/telemetry";

/// A client of raw bytes.
pub struct Raw(pub TcpStream);

impl Raw {
    pub fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).expect("writes");
    }

    /// Reads one packet; `None` at the end of the connection.
    pub fn read(&mut self) -> Option<Vec<u8>> {
        self.0.set_read_timeout(Some(PATIENCE)).expect("sets");
        let mut head = [0; 2];
        match self.0.read_exact(&mut head) {
            Ok(()) => {}
            Err(e) if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {
                panic!("waited in vain for a packet")
            }
            Err(_) => return None,
        }
        assert!(head[1] < 128, "short packets only");
        let mut packet = vec![0; usize::from(head[1])];
        self.0.read_exact(&mut packet).expect("the rest of a packet");
        packet.splice(0..0, head);
        Some(packet)
    }

    /// Reads a CONNACK: session present and code.
    pub fn connack(&mut self, level: u8) -> (u8, u8) {
        let packet = self.read().expect("a CONNACK");
        assert_eq!(packet[0], 0x20, "{packet:?}");
        assert!(level == 5 || packet[1] == 2);
        (packet[2], packet[3])
    }

    pub fn expect(&mut self, expected: &[u8]) {
        let read = self.read();
        assert_eq!(read.as_deref(), Some(expected), "expected {expected:x?}, read {read:x?}");
    }

    pub fn expect_puback(&mut self, packet_id: u16) {
        let [high, low] = packet_id.to_be_bytes();
        self.expect(&[0x40, 2, high, low]);
    }

    pub fn expect_end(&mut self) {
        let read = self.read();
        assert_eq!(read, None, "expected the end, read {read:x?}");
    }

    /// Shows by a round trip that everything sent before was processed and nothing was answered.
    pub fn ping(&mut self) {
        self.send(&[0xc0, 0]);
        self.expect(&[0xd0, 0]);
    }
}
