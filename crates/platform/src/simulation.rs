//! Simulated sites: what their devices say, derived from a seed alone, and the faults they have.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::json;
use throughline_model::time::Timestamp;

/// Which devices there are and what is wrong with them. Shares are 0 to 1.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Names of the sites.
    pub sites: Vec<String>,
    /// Devices of each site.
    pub devices: usize,
    /// What everything is derived from.
    pub seed: u64,
    /// Share of messages that are sent twice.
    pub duplicates: f64,
    /// Share of messages that are replaced by bytes that do not decode.
    pub garbage: f64,
    /// Share of devices that fall silent now and then.
    pub silence: f64,
    /// By how many seconds the clock of every tenth device is wrong.
    pub clock_skew_s: i64,
    /// Whether the last device of each site heats up beyond 90 °C once a minute.
    pub overheats: bool,
}

/// A message to publish.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Index of the device; its messages keep their order.
    pub device: usize,
    /// MQTT topic.
    pub topic: String,
    /// Payload.
    pub payload: Vec<u8>,
}

struct Device {
    name: String,
    site: String,
    seq: i64,
    temperature: f64,
    silent_until: u64,
    is_quiet: bool,
}

/// The devices at work.
pub struct Simulation {
    plan: Plan,
    rng: StdRng,
    epoch: i64,
    devices: Vec<Device>,
    turn: u64,
}

/// Every how many turns of a device it sends a heartbeat too.
const HEARTBEAT_EVERY: u64 = 10;
/// How long a silent device says nothing, in turns.
const SILENCE_TURNS: u64 = 20;

impl Simulation {
    /// Makes the devices; `epoch` is their boot epoch and rises with each start.
    pub fn new(plan: Plan, epoch: i64) -> Self {
        let mut rng = StdRng::seed_from_u64(plan.seed);
        let mut devices = Vec::new();
        for site in &plan.sites {
            for number in 1..=plan.devices {
                devices.push(Device {
                    name: format!("pump-{number}"),
                    site: site.clone(),
                    seq: 0,
                    temperature: rng.random_range(40.0..70.0),
                    silent_until: 0,
                    is_quiet: rng.random_bool(plan.silence),
                });
            }
        }
        Self { plan, rng, epoch, devices, turn: 0 }
    }

    /// Returns the client id of every device, by index.
    pub fn client_ids(&self) -> Vec<String> {
        self.devices.iter().map(|d| format!("{}/{}", d.site, d.name)).collect()
    }

    /// Returns what the next device says at `now`; devices speak in turn.
    pub fn next(&mut self, now: Timestamp, out: &mut Vec<Message>) {
        let count = self.devices.len();
        let index = (self.turn % count as u64) as usize;
        let round = self.turn / count as u64;
        self.turn += 1;
        let last_of_site = (index + 1).is_multiple_of(self.plan.devices);
        let device = &mut self.devices[index];
        if device.is_quiet && device.silent_until <= round && self.rng.random_bool(0.02) {
            device.silent_until = round + SILENCE_TURNS;
        }
        if round < device.silent_until {
            return;
        }
        device.temperature = (device.temperature + self.rng.random_range(-1.0..1.0)).clamp(30.0, 80.0);
        let hot = self.plan.overheats && last_of_site && round % 60 < 10;
        let temperature = if hot { device.temperature + 45.0 } else { device.temperature };
        device.seq += 1;
        let skew = if index % 10 == 9 { self.plan.clock_skew_s * 1_000_000 } else { 0 };
        let body = json!({
            "epoch": self.epoch,
            "seq": device.seq,
            "ts": Timestamp(now.0 + skew).to_string(),
            "values": {
                "temperature": (temperature * 10.0).round() / 10.0,
                "pressure": (self.rng.random_range(2.0..4.0_f64) * 100.0).round() / 100.0,
                "running": true,
                "mode": if hot { "boost" } else { "auto" },
            },
        });
        let base = format!("tl/{}/{}", device.site, device.name);
        let message = Message {
            device: index,
            topic: format!("{base}/telemetry"),
            payload: body.to_string().into_bytes(),
        };
        if self.rng.random_bool(self.plan.garbage) {
            let garbage = format!("\u{fffd}garbage {}", device.seq).into_bytes();
            out.push(Message { payload: garbage, ..message.clone() });
        }
        if self.rng.random_bool(self.plan.duplicates) {
            out.push(message.clone());
        }
        out.push(message);
        if round.is_multiple_of(HEARTBEAT_EVERY) {
            let body = json!({"epoch": self.epoch, "seq": round + 1, "values": {"uptime_s": round}});
            out.push(Message {
                device: index,
                topic: format!("{base}/heartbeat"),
                payload: body.to_string().into_bytes(),
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> Plan {
        Plan {
            sites: vec!["a".into(), "b".into()],
            devices: 3,
            seed: 7,
            duplicates: 0.2,
            garbage: 0.1,
            silence: 0.3,
            clock_skew_s: 0,
            overheats: true,
        }
    }

    fn run(turns: usize) -> Vec<Message> {
        let mut simulation = Simulation::new(plan(), 1);
        let mut out = Vec::new();
        for turn in 0..turns {
            simulation.next(Timestamp(turn as i64 * 1_000), &mut out);
        }
        out
    }

    #[test]
    fn a_seed_always_gives_the_same_messages_with_its_faults() {
        let messages = run(3_000);
        assert_eq!(messages, run(3_000));
        let garbage = messages.iter().filter(|m| m.payload.starts_with("\u{fffd}".as_bytes())).count();
        let repeated = messages.windows(2).filter(|pair| pair[0] == pair[1]).count();
        assert!(garbage > 100 && repeated > 200, "{garbage} {repeated}");
    }
}
