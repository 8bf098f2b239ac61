//! The simulated site of `throughline up`: a few devices, one that overheats, one that misbehaves.

use crate::commands::rules;
use crate::context::Context;
use crate::failure::CliError;
use crate::simulation::{Message, Plan, Simulation};
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use throughline_mqtt::Publisher;
use throughline_runtime::{Clock, WallClock};

/// The simulated site's name.
pub const SITE: &str = "demo";
const DEVICES: usize = 5;
/// Each device speaks once a second.
const PAUSE: Duration = Duration::from_millis(1_000 / DEVICES as u64);

/// The rules of the demonstration, which are also examples.
const RULES: [(&str, &str); 3] = [
    ("demo/rules/demo-overheat.toml", include_str!("../../../demo/rules/demo-overheat.toml")),
    ("demo/rules/demo-pump-stalled.toml", include_str!("../../../demo/rules/demo-pump-stalled.toml")),
    ("demo/rules/demo-temperature-jump.toml", include_str!("../../../demo/rules/demo-temperature-jump.toml")),
];

/// The simulated site at work.
pub struct Demo {
    ends: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

/// Applies the rules and starts the devices.
///
/// # Errors
/// When the rules cannot be applied or no thread can be made.
pub fn start(context: &Context) -> Result<Demo, CliError> {
    let sources: Vec<(String, String)> =
        RULES.iter().map(|(n, t)| ((*n).to_owned(), (*t).to_owned())).collect();
    rules::apply_quietly(context, &sources)?;
    let own = &context.config.mqtt.listen;
    let address = if own.is_empty() { &context.config.mqtt.external_url } else { own };
    let address = resolve(address)?;
    let ends = Arc::new(AtomicBool::new(false));
    let stop = Arc::clone(&ends);
    let thread = std::thread::Builder::new().name("demo".into()).spawn(move || {
        if let Err(error) = play(address, &stop) {
            tracing::warn!("the simulated site ended: {error}");
        }
    })?;
    Ok(Demo { ends, thread })
}

/// Resolves `host:port` or `mqtt://host:port`.
///
/// # Errors
/// A usage error that names the address.
pub fn resolve(address: &str) -> Result<SocketAddr, CliError> {
    let plain = address.trim_start_matches("mqtt://");
    let mut resolved = plain.to_socket_addrs().map_err(|e| CliError::usage(format!("`{address}`: {e}")))?;
    resolved.next().ok_or_else(|| CliError::usage(format!("`{address}` has no address")))
}

impl Demo {
    /// Disconnects the devices and waits for that.
    pub fn stop(self) {
        self.ends.store(true, Ordering::Release);
        if self.thread.join().is_err() {
            tracing::warn!("the thread of the simulated site panicked");
        }
    }
}

fn play(address: SocketAddr, stop: &AtomicBool) -> Result<(), CliError> {
    let plan = Plan {
        sites: vec![SITE.to_owned()],
        devices: DEVICES,
        seed: 1,
        duplicates: 0.05,
        garbage: 0.01,
        silence: 0.2,
        clock_skew_s: 0,
        overheats: true,
    };
    // Seconds since 1970 rise from start to start, as a boot counter would.
    let mut simulation = Simulation::new(plan, WallClock.now().as_secs());
    let mut publishers = Vec::new();
    for client_id in simulation.client_ids() {
        publishers.push(Publisher::connect(address, &client_id)?);
    }
    let mut messages: Vec<Message> = Vec::new();
    while !stop.load(Ordering::Acquire) {
        simulation.next(WallClock.now(), &mut messages);
        for message in messages.drain(..) {
            // A platform that is away holds a device back; the simulated one then skips a turn.
            publishers[message.device].try_publish(&message.topic, message.payload);
        }
        std::thread::sleep(PAUSE);
    }
    Ok(())
}
