//! The role `bridge`: MQTT in, records out; and the replay of what it could not decode.

use crate::config::Config;
use crate::context::Context;
use crate::failure::CliError;
use crate::roles;
use serde::Deserialize;
use std::net::ToSocketAddrs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use throughline_kafka::{IngressConfig, IngressProducer};
use throughline_model::strict_toml;
use throughline_mqtt::{
    Bridge, BridgeConfig, BridgeError, ExternalConfig, Inboxes, ListenerConfig, LoginConfig, ReplayBridge,
    Router,
};
use throughline_runtime::Shutdown;
use throughline_telemetry::RoleHealth;

/// How long open publishes may wait for Kafka when the process ends.
const DRAIN_BUDGET: Duration = Duration::from_secs(10);

// First those of the listener, then what the producer still holds; both are within what the process grants.
const _: () = assert!(2 * DRAIN_BUDGET.as_secs() < crate::process::DRAIN_BUDGET.as_secs());

/// How often the wish to end is looked for while only MQTT is served.
const POLL: Duration = Duration::from_millis(100);

/// Runs the bridge and its replays until the process shall end. Replays that stop earlier do not end it.
///
/// # Errors
/// When the configuration is refused or an address cannot be used; at the end, why the replays had stopped.
pub fn run(context: &Context, health: RoleHealth) -> Result<(), CliError> {
    let config = bridge_config(&context.config)?;
    let router = Arc::new(Router::compile(&context.catalog).map_err(|e| CliError::usage(e.to_string()))?);
    let inboxes = Inboxes::new(config.inboxes());
    let kafka = &context.config.kafka;
    let tuning = IngressConfig {
        linger_ms: kafka.linger_ms,
        produce_timeout_ms: kafka.produce_timeout_ms,
        queue_records_max: kafka.queue_records_max,
        queue_kib_max: kafka.queue_kib_max,
    };
    let deliver = Arc::clone(&inboxes);
    let ingress = IngressProducer::start(&context.kafka(), &tuning, move |token, reported| {
        deliver.deliver(token, reported);
    })?;
    let ingress = Arc::new(ingress);
    let mut running = Bridge::start(
        &config,
        Arc::clone(&router),
        Arc::clone(&context.codec),
        Arc::clone(&ingress) as _,
        inboxes,
        health,
    )
    .map_err(refused)?;
    let replay = ReplayBridge::new(router, Arc::clone(&context.codec), &context.config.instance);
    let replays = context.health.role("replay_bridge");
    let replayed = std::thread::scope(|scope| {
        // Beside the last commit of the replays, which may take as long as all that the process has.
        scope.spawn(|| {
            wait_for_end(&context.shutdown, || {});
            running.drain(DRAIN_BUDGET);
        });
        let replayed = roles::decide(context, replays.clone(), replay);
        if let Err(error) = &replayed {
            serve_on(error, &context.shutdown, &replays);
        }
        replayed
    });
    ingress.drain(DRAIN_BUDGET);
    replayed
}

fn wait_for_end(shutdown: &Shutdown, mut meanwhile: impl FnMut()) {
    while !shutdown.is_requested() {
        meanwhile();
        std::thread::sleep(POLL);
    }
}

/// Says that the replays of dead letters have stopped, and waits for the process's end: devices do not depend
/// on replays.
fn serve_on(error: &CliError, shutdown: &Shutdown, replays: &RoleHealth) {
    if !shutdown.is_requested() {
        tracing::error!(role = replays.name(), "replays have stopped, MQTT is served on: {error}");
    }
    // Not `stopped`, and ready: a process that is neither alive nor ready is restarted and gets no clients,
    // and its devices would be cut off for ever by what has nothing to do with them.
    replays.ready(true, &format!("stopped: {error}"));
    replays.note("stopped", error.to_string().into());
    wait_for_end(shutdown, || replays.turned());
}

fn refused(error: BridgeError) -> CliError {
    match error {
        BridgeError::Config { .. } => CliError::usage(error.to_string()),
        other => CliError::failed(other.to_string()),
    }
}

/// Returns the bridge's own configuration.
fn bridge_config(config: &Config) -> Result<BridgeConfig, CliError> {
    let mqtt = &config.mqtt;
    let listener = match mqtt.listen.as_str() {
        "" => None,
        listen => {
            let mut addresses = listen.to_socket_addrs().map_err(|e| {
                CliError::usage(format!("`mqtt.listen` is `{listen}`, which is no address: {e}"))
            })?;
            let address = addresses
                .next()
                .ok_or_else(|| CliError::usage(format!("`mqtt.listen` `{listen}` has no address")))?;
            Some(ListenerConfig {
                address,
                workers: mqtt.workers,
                anonymous_on_loopback: mqtt.anonymous_on_loopback,
                logins: mqtt.logins_file.as_deref().map(logins).transpose()?.unwrap_or_default(),
                bounds: mqtt.bounds.clone(),
            })
        }
    };
    let external = (!mqtt.external_url.is_empty()).then(|| ExternalConfig {
        url: mqtt.external_url.clone(),
        user: mqtt.external_user.clone(),
        password_file: mqtt.external_password_file.clone(),
        group: mqtt.external_group.clone(),
        ..ExternalConfig::default()
    });
    Ok(BridgeConfig { instance: config.instance.clone(), listener, external })
}

/// The file of logins: `[[login]]` tables.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LoginsFile {
    #[serde(default)]
    login: Vec<LoginConfig>,
}

fn logins(path: &Path) -> Result<Vec<LoginConfig>, CliError> {
    let name = path.display().to_string();
    let text =
        std::fs::read_to_string(path).map_err(|e| CliError::usage(format!("cannot read `{name}`: {e}")))?;
    let file: LoginsFile =
        strict_toml::parse_secret(&name, &text).map_err(|e| CliError::usage(e.to_string()))?;
    Ok(file.login)
}

#[cfg(test)]
mod tests {
    use super::*;
    use throughline_telemetry::Health;

    #[test]
    fn replays_that_stopped_are_said_and_leave_mqtt_up_until_the_end() {
        let health = Health::with_stall_limit(POLL * 20);
        health.role("bridge").ready(true, "");
        let replays = health.role("replay_bridge");
        let shutdown = Shutdown::new();
        let (asked, said) = (shutdown.clone(), replays.clone());
        let served = std::thread::spawn(move || {
            serve_on(&CliError::failed("TL-TEST-001: the topic is gone"), &asked, &said);
        });
        while health.status()["roles"]["replay_bridge"]["notes"]["stopped"].is_null() {
            std::thread::yield_now();
        }
        assert!(!served.is_finished(), "the listener is drained when this returns");
        let why = health.status()["roles"]["replay_bridge"]["why"].to_string();
        assert!(why.contains("stopped: TL-TEST-001"), "{why}");
        assert!(health.unready().is_empty(), "devices are served");
        shutdown.request();
        served.join().expect("ends");
        assert!(health.stuck().is_empty(), "a restart would cut off devices");
    }
}
