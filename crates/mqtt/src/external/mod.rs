//! The bridge behind an existing broker: shared subscriptions, manual acknowledgement after Kafka's, in
//! order. MQTT 5 is needed, because only it lets the receiver bound what the broker sends ahead.

mod connection;
mod receiver;

use crate::config::{BridgeError, ExternalConfig};
use crate::feeds::Router;
use crate::inbox::Inboxes;
use crate::outflow::Outflow;
use connection::Reports;
use receiver::Receiver;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;
use throughline_model::codec::Codec;
use throughline_telemetry::RoleHealth;
use tokio::sync::mpsc;
use tokio::task::LocalSet;

/// Events that may wait between the client's loop and ours, beyond the open publishes.
const EVENTS_AHEAD: usize = 64;

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
    pub(crate) outflow: Arc<Outflow>,
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
        let options = connection::options(config, &client_id)?;
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
                let filters = connection::filters(&group, &parts.router.subscriptions());
                let (status, statuses) = mpsc::unbounded_channel();
                let (publishes, received) = mpsc::channel(open_max + EVENTS_AHEAD);
                let reports = Reports { status, publishes };
                // Acknowledgements wait in the client's channel, so it holds all that can be open.
                let connecting = connection::run(options, open_max + EVENTS_AHEAD, filters, reports);
                let polling = tokio::task::spawn_local(connecting);
                Receiver::new(parts, client_id, open_max).run(statuses, received, &asked).await;
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
