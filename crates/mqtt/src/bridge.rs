//! The bridge as a whole: checks that it can write, then starts what is configured.

use crate::config::{BridgeConfig, BridgeError};
use crate::external::{External, Parts};
use crate::feeds::Router;
use crate::inbox::Inboxes;
use crate::listener::{Listener, Surroundings};
use crate::outflow::Outflow;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use throughline_model::codec::Codec;
use throughline_model::topics::{DEVICE_SESSION_V1, SERVICE_PLATFORM_LOCATOR_V1};
use throughline_runtime::ports::Ingress;
use throughline_telemetry::RoleHealth;

/// Starts bridges.
pub struct Bridge;

impl Bridge {
    /// Starts the listener, the client of an external broker, or both. `producer` was made with a delivery
    /// callback that calls `inboxes.deliver`, and `inboxes` with `BridgeConfig::inboxes` workers.
    ///
    /// # Errors
    /// [`BridgeError`] says which key is wrong, which topic has no schema, or why the address cannot be
    /// listened on.
    pub fn start(
        config: &BridgeConfig,
        router: Arc<Router>,
        codec: Arc<Codec>,
        producer: Arc<dyn Ingress>,
        inboxes: Arc<Inboxes>,
        health: RoleHealth,
    ) -> Result<RunningBridge, BridgeError> {
        check(config, &router, &codec, &inboxes)?;
        health.ready(false, "starting");
        let outflow = Outflow::new(producer, health.clone());
        let listener = config.listener.as_ref().map(|listener| {
            let around = Surroundings {
                instance: config.instance.clone(),
                router: Arc::clone(&router),
                codec: Arc::clone(&codec),
                outflow: Arc::clone(&outflow),
                inboxes: Arc::clone(&inboxes),
                health: health.clone(),
            };
            Listener::start(listener, around)
        });
        let listener = listener.transpose()?;
        let external = config.external.as_ref().map(|external| {
            let parts = Parts {
                instance: config.instance.clone(),
                router,
                codec,
                outflow,
                inboxes,
                // The listener's workers come first.
                worker: config.inboxes() - 1,
                alone: listener.is_none(),
                health,
            };
            External::start(external, parts)
        });
        Ok(RunningBridge { external: external.transpose()?, listener })
    }
}

fn check(
    config: &BridgeConfig,
    router: &Router,
    codec: &Codec,
    inboxes: &Inboxes,
) -> Result<(), BridgeError> {
    let refuse = |key: &str, why: &str| BridgeError::Config { key: key.to_owned(), why: why.to_owned() };
    if config.instance.is_empty() {
        return Err(refuse("instance", "is empty: it names this process in every record"));
    }
    if config.listener.is_none() && config.external.is_none() {
        return Err(refuse("listener", "and `external` are both absent: the bridge would do nothing"));
    }
    if inboxes.workers() < config.inboxes() {
        return Err(refuse("listener.workers", "is more than there are inboxes"));
    }
    let fed = router.feeds().iter().map(|feed| &*feed.topic);
    let unbound = fed
        .chain([DEVICE_SESSION_V1, SERVICE_PLATFORM_LOCATOR_V1])
        .find(|topic| codec.id_of(topic).is_none());
    match unbound {
        Some(topic) => Err(BridgeError::Unbound(topic.to_owned())),
        None => Ok(()),
    }
}

/// A bridge that runs. Dropping it drains it without waiting.
pub struct RunningBridge {
    listener: Option<Listener>,
    external: Option<External>,
}

impl RunningBridge {
    /// Returns the address of the own listener.
    pub fn local_addr(&self) -> Option<SocketAddr> {
        self.listener.as_ref().map(Listener::local_addr)
    }

    /// Stops accepting and reading, waits at most `budget` for Kafka's acknowledgements, sends the PUBACKs,
    /// says good-bye (MQTT 5: DISCONNECT 0x8B) and ends. The producer must live until this returns.
    pub fn drain(&mut self, budget: Duration) {
        let deadline = Instant::now() + budget;
        if let Some(mut external) = self.external.take() {
            external.drain(deadline);
        }
        if let Some(mut listener) = self.listener.take() {
            listener.drain(deadline);
        }
    }
}

impl Drop for RunningBridge {
    fn drop(&mut self) {
        self.drain(Duration::ZERO);
    }
}
