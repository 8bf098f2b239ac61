//! The own MQTT listener: an ingress, not a broker.

mod asides;
mod conn;
pub(crate) mod meters;
mod packets;
mod publish;
mod serve;
mod session;
mod slots;
mod wills;
pub(crate) mod worker;

use crate::auth::Logins;
use crate::config::{BridgeError, ListenerConfig};
use crate::feeds::Router;
use crate::inbox::Inboxes;
use crate::outflow::Outflow;
use crate::poison::Poison;
use crate::sessions::{Owner, Registry};
use mqtt_protocol_core::mqtt;
use parking_lot::Mutex;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use throughline_model::codec::Codec;
use throughline_telemetry::{Gauge, Metric, RoleHealth, counter, gauge};
use tokio::sync::Notify;

type Event = mqtt::connection::event::GenericEvent<u16>;
type Packet = mqtt::packet::Packet;

/// What a worker is told.
pub(crate) enum Command {
    Serve(TcpStream, SocketAddr),
    TakeOver(Owner),
    Drain(Instant),
}

/// Sums over the workers, as of their last sweep.
#[derive(Debug, Default)]
pub(crate) struct Sums {
    open: AtomicUsize,
    bytes: AtomicUsize,
    paused: AtomicUsize,
    held: AtomicUsize,
    blocked: AtomicUsize,
    asides: AtomicUsize,
}

pub(crate) struct Gauges {
    connections: Gauge,
    open: Gauge,
    paused: Gauge,
    buffer_messages: Gauge,
    buffer_bytes: Gauge,
    held_bytes: Gauge,
    oldest: Gauge,
    aside_messages: Gauge,
}

/// What the workers share.
pub(crate) struct Shared {
    config: ListenerConfig,
    instance: String,
    router: Arc<Router>,
    codec: Arc<Codec>,
    outflow: Arc<Outflow>,
    poison: Poison,
    inboxes: Arc<Inboxes>,
    logins: Logins,
    registry: Registry,
    wills: wills::Wills,
    commands: Vec<Mutex<Vec<Command>>>,
    connections: AtomicUsize,
    /// What connections hold of bytes that were read, and of records that the producer did not take.
    held_bytes: AtomicUsize,
    /// What the wills of connected clients take.
    will_bytes: AtomicUsize,
    /// For how many milliseconds the oldest open publish of each worker waits.
    oldest_ms: Box<[AtomicU64]>,
    sums: Sums,
    gauges: Gauges,
    health: RoleHealth,
}

impl Shared {
    fn command(&self, worker: usize, command: Command) {
        if let Some(commands) = self.commands.get(worker) {
            commands.lock().push(command);
            self.inboxes.wake(worker);
        }
    }

    fn take_commands(&self, worker: usize) -> Vec<Command> {
        std::mem::take(&mut *self.commands[worker].lock())
    }

    fn connect_deadline(&self) -> Duration {
        Duration::from_millis(self.config.bounds.connect_deadline_ms)
    }

    fn forget_connection(&self) {
        self.connections.fetch_sub(1, Ordering::Relaxed);
    }

    /// Finds room for the will of a client that connects, until [`Shared::forget_will`].
    fn keep_will(&self, bytes: usize) -> bool {
        let kept = self.will_bytes.fetch_add(bytes, Ordering::Relaxed);
        let fits = bytes == 0 || kept + bytes <= self.config.bounds.wills_bytes_max;
        if !fits {
            self.forget_will(bytes);
        }
        fits
    }

    fn forget_will(&self, bytes: usize) {
        self.will_bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Says for how long the oldest open publish of a worker waits.
    fn oldest(&self, worker: usize, waited: Duration) {
        let ms = u64::try_from(waited.as_millis()).unwrap_or(u64::MAX);
        self.oldest_ms[worker].store(ms, Ordering::Relaxed);
    }

    /// States the depth of every buffer.
    fn report(&self) {
        let sum = |sum: &AtomicUsize| sum.load(Ordering::Relaxed);
        let (open, bytes, paused) = (sum(&self.sums.open), sum(&self.sums.bytes), sum(&self.sums.paused));
        let (held, asides, connections) =
            (sum(&self.sums.held), sum(&self.sums.asides), sum(&self.connections));
        let blocked = sum(&self.sums.blocked);
        let in_flight = self.outflow.in_flight();
        let held_bytes = sum(&self.held_bytes);
        let oldest_ms = self.oldest_ms.iter().map(|ms| ms.load(Ordering::Relaxed)).max().unwrap_or_default();
        let oldest_s = oldest_ms as f64 / 1e3;
        self.gauges.held_bytes.set(held_bytes as f64);
        self.gauges.oldest.set(oldest_s);
        self.gauges.connections.set(connections as f64);
        self.gauges.open.set(open as f64);
        self.gauges.paused.set(paused as f64);
        self.gauges.buffer_messages.set(in_flight as f64);
        self.gauges.buffer_bytes.set(bytes as f64);
        self.gauges.aside_messages.set(asides as f64);
        self.outflow.report();
        self.health.turned();
        self.health.note(
            "listener",
            serde_json::json!({
                "connections": connections,
                "open_publishes": open,
                "buffer_bytes": bytes,
                "held_bytes": held_bytes,
                "oldest_open_seconds": oldest_s,
                "connections_paused": paused,
                "connections_waiting_for_producer": held,
                "connections_waiting_for_topics": blocked,
                "session_events_waiting": asides,
                "records_in_flight": in_flight,
                "sessions": self.registry.count(),
            }),
        );
        // While Kafka is away clients are held up to the bounds; only a full producer turns that into
        // connections that cannot be served. A topic that takes nothing holds its own publishes alone, and
        // to send all clients elsewhere would not help them.
        if held == 0 {
            self.health.ready(true, "");
        } else {
            self.health.ready(false, "the producer's queue is full: Kafka does not acknowledge");
        }
    }
}

/// What the listener needs from its surroundings.
pub(crate) struct Surroundings {
    pub(crate) instance: String,
    pub(crate) router: Arc<Router>,
    pub(crate) codec: Arc<Codec>,
    pub(crate) outflow: Arc<Outflow>,
    pub(crate) inboxes: Arc<Inboxes>,
    pub(crate) health: RoleHealth,
}

/// A listener that runs.
pub(crate) struct Listener {
    address: SocketAddr,
    shared: Arc<Shared>,
    stopping: Arc<AtomicBool>,
    stop: Arc<Notify>,
    acceptor: Option<JoinHandle<()>>,
    workers: Vec<JoinHandle<()>>,
}

impl Listener {
    /// Listens and starts the workers.
    ///
    /// # Errors
    /// [`BridgeError`] when a login is wrong, the address is in use, or a thread cannot be started.
    pub(crate) fn start(config: &ListenerConfig, around: Surroundings) -> Result<Self, BridgeError> {
        let workers = config.workers.max(1);
        if workers > 64 || around.inboxes.workers() < workers {
            let why = format!("is {workers}; 1 to 64 are possible, and every one needs an inbox");
            return Err(BridgeError::Config { key: "listener.workers".to_owned(), why });
        }
        let listen_error = |error| BridgeError::Listen { address: config.address, error };
        let socket = std::net::TcpListener::bind(config.address).map_err(listen_error)?;
        socket.set_nonblocking(true).map_err(listen_error)?;
        let address = socket.local_addr().map_err(listen_error)?;
        let label = |metric| gauge(metric, &[("listener", meters::LISTENER)]);
        let buffer = |metric, name| gauge(metric, &[("role", "bridge"), ("buffer", name)]);
        let shared = Arc::new(Shared {
            config: config.clone(),
            instance: around.instance,
            router: around.router,
            codec: around.codec,
            outflow: around.outflow,
            poison: Poison::default(),
            inboxes: around.inboxes,
            logins: Logins::load(&config.logins)?,
            registry: Registry::new(config.bounds.sessions_max),
            wills: wills::Wills::default(),
            commands: (0..workers).map(|_| Mutex::default()).collect(),
            connections: AtomicUsize::new(0),
            held_bytes: AtomicUsize::new(0),
            will_bytes: AtomicUsize::new(0),
            oldest_ms: (0..workers).map(|_| AtomicU64::new(0)).collect(),
            sums: Sums::default(),
            gauges: Gauges {
                connections: label(Metric::MqttConnections),
                open: label(Metric::MqttOpenPublishes),
                paused: label(Metric::MqttConnectionsPaused),
                buffer_messages: buffer(Metric::BufferMessages, "records_in_flight"),
                buffer_bytes: buffer(Metric::BufferBytes, "open_publishes"),
                held_bytes: buffer(Metric::BufferBytes, "unread"),
                oldest: buffer(Metric::BufferAgeSeconds, "open_publishes"),
                aside_messages: buffer(Metric::BufferMessages, "session_events"),
            },
            health: around.health,
        });
        let mut listener = Self {
            address,
            shared: Arc::clone(&shared),
            stopping: Arc::default(),
            stop: Arc::default(),
            acceptor: None,
            workers: Vec::new(),
        };
        for index in 0..workers {
            let runtime = runtime()?;
            let shared = Arc::clone(&shared);
            let work = move || worker::run(shared, index, &runtime);
            listener.workers.push(spawn(format!("mqtt-worker-{index}"), work)?);
        }
        let acceptor_runtime = runtime()?;
        let (stop, stopping) = (Arc::clone(&listener.stop), Arc::clone(&listener.stopping));
        let accept = move || {
            acceptor_runtime.block_on(async {
                tokio::select! {
                    () = accept(&shared, socket, &stopping) => {}
                    () = stop.notified() => {}
                }
            });
        };
        listener.acceptor = Some(spawn("mqtt-acceptor".to_owned(), accept)?);
        Ok(listener)
    }

    /// Returns the address that it listens on.
    pub(crate) const fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Stops accepting and reading, lets Kafka answer until `deadline`, says good-bye and ends.
    pub(crate) fn drain(&mut self, deadline: Instant) {
        self.stopping.store(true, Ordering::Relaxed);
        self.stop.notify_one();
        if let Some(acceptor) = self.acceptor.take() {
            joined(acceptor);
        }
        for index in 0..self.workers.len() {
            self.shared.command(index, Command::Drain(deadline));
        }
        self.workers.drain(..).for_each(joined);
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.drain(Instant::now());
    }
}

fn joined(thread: JoinHandle<()>) {
    if thread.join().is_err() {
        tracing::error!("a thread of the MQTT listener panicked");
    }
}

fn runtime() -> Result<tokio::runtime::Runtime, BridgeError> {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_all().max_blocking_threads(worker::VERIFIED_AT_ONCE).build().map_err(BridgeError::Worker)
}

fn spawn(name: String, work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, BridgeError> {
    std::thread::Builder::new().name(name).spawn(work).map_err(BridgeError::Worker)
}

/// Deals sockets to the workers in turn.
async fn accept(shared: &Arc<Shared>, socket: std::net::TcpListener, stopping: &AtomicBool) {
    let listener = match tokio::net::TcpListener::from_std(socket) {
        Ok(listener) => listener,
        Err(e) => {
            tracing::error!(error = %e, "the MQTT listener cannot accept");
            return;
        }
    };
    let refused = |result: &str| {
        counter(Metric::MqttConnectsTotal, &[("listener", meters::LISTENER), ("result", result)]).add(1);
    };
    let mut next = 0;
    while !stopping.load(Ordering::Relaxed) {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(e) => {
                // Out of file descriptors, mostly: those that close make room.
                refused("accept_error");
                tracing::warn!(error = %e, "cannot accept an MQTT connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        if shared.connections.fetch_add(1, Ordering::Relaxed) >= shared.config.bounds.connections_max {
            shared.forget_connection();
            refused("connections_max");
            continue;
        }
        // PUBACKs are small and wanted at once.
        let dealt = stream.set_nodelay(true).and_then(|()| stream.into_std());
        match dealt {
            Ok(stream) => shared.command(next % shared.commands.len(), Command::Serve(stream, peer)),
            Err(_) => {
                shared.forget_connection();
                refused("socket_error");
            }
        }
        next += 1;
    }
}
