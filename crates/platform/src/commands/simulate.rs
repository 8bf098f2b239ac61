//! `throughline simulate`: sites, devices, a rate and faults, derived from a seed.

use crate::config::Flags;
use crate::demo::resolve;
use crate::failure::{CliError, Exit};
use crate::output;
use crate::process::Signals;
use crate::simulation::{Plan, Simulation};
use serde_json::json;
use std::time::{Duration, Instant};
use throughline_mqtt::Publisher;
use throughline_runtime::{Clock, WallClock};

/// How long to wait for the last acknowledgements.
const LAST_ACKNOWLEDGEMENTS: Duration = Duration::from_secs(30);

/// Arguments of `simulate`.
#[derive(clap::Args)]
pub struct Args {
    /// Number of sites, named `sim-1`, `sim-2` …
    #[arg(long, default_value_t = 1)]
    sites: usize,
    /// Devices of each site
    #[arg(long, default_value_t = 10)]
    devices: usize,
    /// Messages a second, all devices together
    #[arg(long, default_value_t = 10.0)]
    rate: f64,
    /// End after this many seconds; without it Ctrl-C ends it
    #[arg(long)]
    seconds: Option<u64>,
    /// What everything is derived from
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Share of messages sent twice, 0 to 1
    #[arg(long, default_value_t = 0.0)]
    duplicates: f64,
    /// Share of messages replaced by garbage, 0 to 1
    #[arg(long, default_value_t = 0.0)]
    garbage: f64,
    /// Share of devices that fall silent now and then, 0 to 1
    #[arg(long, default_value_t = 0.0)]
    silence: f64,
    /// Seconds by which the clock of every tenth device is wrong
    #[arg(long, default_value_t = 0, allow_negative_numbers = true)]
    clock_skew: i64,
    /// The last device of each site heats up beyond 90 °C once a minute
    #[arg(long)]
    overheat: bool,
}

/// Sends until the time is over or Ctrl-C, then waits for the acknowledgements.
///
/// # Errors
/// A usage error for values out of range; exit code 1 when something was not acknowledged.
pub fn run(flags: &Flags, args: &Args) -> Result<Exit, CliError> {
    for (name, share) in
        [("duplicates", args.duplicates), ("garbage", args.garbage), ("silence", args.silence)]
    {
        if !(0.0..=1.0).contains(&share) {
            return Err(CliError::usage(format!("`--{name}` is {share}; it is 0 to 1")));
        }
    }
    if args.sites == 0 || args.devices == 0 || !(0.001..=1e6).contains(&args.rate) {
        return Err(CliError::usage(
            "`--sites` and `--devices` are at least 1, `--rate` is 0.001 to 1000000",
        ));
    }
    let config = flags.load()?;
    let target =
        if config.mqtt.external_url.is_empty() { &config.mqtt.listen } else { &config.mqtt.external_url };
    let address = resolve(target)?;
    let signals = Signals::install()?;
    let plan = Plan {
        sites: (1..=args.sites).map(|n| format!("sim-{n}")).collect(),
        devices: args.devices,
        seed: args.seed,
        duplicates: args.duplicates,
        garbage: args.garbage,
        silence: args.silence,
        clock_skew_s: args.clock_skew,
        overheats: args.overheat,
    };
    let mut simulation = Simulation::new(plan, WallClock.now().as_secs());
    let mut publishers = Vec::new();
    for client_id in simulation.client_ids() {
        publishers.push(Publisher::connect(address, &client_id)?);
    }
    let started = Instant::now();
    let ends = args.seconds.map(|s| started + Duration::from_secs(s));
    let mut messages = Vec::new();
    let mut sent = 0u64;
    let mut turns = 0u32;
    while !signals.asked() && ends.is_none_or(|end| Instant::now() < end) {
        simulation.next(WallClock.now(), &mut messages);
        for message in messages.drain(..) {
            publishers[message.device]
                .publish(&message.topic, message.payload)
                .map_err(|e| CliError::failed(e.to_string()))?;
            sent += 1;
        }
        turns += 1;
        let due = started + Duration::from_secs_f64(f64::from(turns) / args.rate);
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    let acknowledged = || publishers.iter().map(Publisher::acknowledged).sum::<u64>();
    let limit = Instant::now() + LAST_ACKNOWLEDGEMENTS;
    while acknowledged() < sent && Instant::now() < limit {
        std::thread::sleep(Duration::from_millis(20));
    }
    let acknowledged = acknowledged();
    if flags.json {
        output::json("simulate", json!({"sent": sent, "acknowledged": acknowledged, "seed": args.seed}));
    } else {
        output::line(&format!("sent {sent}, acknowledged {acknowledged}"));
    }
    if acknowledged >= sent {
        return Ok(Exit::Done);
    }
    Err(CliError::failed(format!("{} messages were not acknowledged", sent - acknowledged)))
}
