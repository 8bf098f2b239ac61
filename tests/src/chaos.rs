//! Faults under load, derived from a seed: what is done to which part, when, and what is counted.

use crate::cluster::{Cluster, ROLES};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use throughline_local::child::Fault;
use throughline_local::postgres::ManagedPostgres;

/// A small generator whose seed is in the journal (Vigna's splitmix64).
pub struct Random(pub u64);

impl Random {
    /// Returns the next number.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Returns a number from `least` to `most`, both included.
    pub fn between(&mut self, least: u64, most: u64) -> u64 {
        least + self.draw() % (most - least + 1)
    }

    fn pause(&mut self, least_ms: u64, most_ms: u64) -> Duration {
        Duration::from_millis(self.between(least_ms, most_ms))
    }
}

/// One thing that is done to the platform.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Injection {
    /// SIGKILL, then the same instance starts again.
    KillRole(&'static str),
    /// SIGSTOP for a time that may outlast the group's session, so that others take over, then SIGCONT.
    HangRole(&'static str, Duration),
    /// A second instance joins the group for a time.
    JoinAndLeave(&'static str, Duration),
    /// SIGKILL of the broker, then a start on its data after a time.
    KillKafka(Duration),
    /// SIGSTOP of the broker.
    HangKafka(Duration),
    /// SIGKILL of PostgreSQL, then a start on its data after a time.
    KillDatabase(Duration),
    /// SIGSTOP of PostgreSQL.
    HangDatabase(Duration),
    /// The registry does not answer.
    RegistryAway(Duration),
}

impl Injection {
    /// Derives the next one. Half of them are kills of roles; brokers get a sixth.
    pub fn draw(random: &mut Random, has_server: bool) -> Self {
        let stages: [&'static str; 5] =
            ["evaluate_rules", "update_twin", "bridge_data", "load_warehouse", "project_twins"];
        let any = |random: &mut Random| ROLES[(random.draw() % ROLES.len() as u64) as usize];
        let stage = |random: &mut Random| stages[(random.draw() % stages.len() as u64) as usize];
        match random.draw() % 24 {
            0..12 => Self::KillRole(any(random)),
            12..14 => Self::HangRole(any(random), random.pause(500, 9_000)),
            14..16 => Self::JoinAndLeave(stage(random), random.pause(2_000, 8_000)),
            16..18 => Self::KillKafka(random.pause(0, 4_000)),
            18..21 => Self::HangKafka(random.pause(500, 12_000)),
            21 if has_server => Self::KillDatabase(random.pause(0, 4_000)),
            22 if has_server => Self::HangDatabase(random.pause(500, 12_000)),
            _ => Self::RegistryAway(random.pause(500, 6_000)),
        }
    }

    /// Returns what the journal counts it as.
    pub fn name(&self) -> String {
        match self {
            Self::KillRole(role) => format!("kill {role}"),
            Self::HangRole(role, _) => format!("hang {role}"),
            Self::JoinAndLeave(role, _) => format!("join and leave {role}"),
            Self::KillKafka(_) => "kill kafka".to_owned(),
            Self::HangKafka(_) => "hang kafka".to_owned(),
            Self::KillDatabase(_) => "kill database".to_owned(),
            Self::HangDatabase(_) => "hang database".to_owned(),
            Self::RegistryAway(_) => "registry away".to_owned(),
        }
    }

    /// Does it, and undoes what lasts.
    ///
    /// # Panics
    /// When a part does not start again.
    pub fn carry_out(self, cluster: &mut Cluster, database: Option<&mut ManagedPostgres>) {
        match self {
            Self::KillRole(name) => {
                let role = ROLES.iter().position(|role| *role == name).expect("a role of the list");
                cluster.kill_and_restart(role);
            }
            Self::HangRole(name, pause) => {
                cluster.signal(name, "STOP");
                std::thread::sleep(pause);
                cluster.signal(name, "CONT");
            }
            Self::JoinAndLeave(name, pause) => {
                cluster.add(name, "guest");
                std::thread::sleep(pause);
                cluster.remove(name, "guest");
            }
            Self::KillKafka(pause) => {
                cluster.kafka.fault(Fault::Kill);
                std::thread::sleep(pause);
                cluster.kafka.restart().expect("Kafka starts again on its data");
            }
            Self::HangKafka(pause) => {
                cluster.kafka.fault(Fault::Stop);
                std::thread::sleep(pause);
                cluster.kafka.fault(Fault::Continue);
            }
            Self::KillDatabase(pause) => {
                let database = database.expect("drawn only where there is a server");
                database.fault(Fault::Kill);
                std::thread::sleep(pause);
                database.restart().expect("PostgreSQL starts again on its data");
            }
            Self::HangDatabase(pause) => {
                let database = database.expect("drawn only where there is a server");
                database.fault(Fault::Stop);
                std::thread::sleep(pause);
                database.fault(Fault::Continue);
            }
            Self::RegistryAway(pause) => {
                cluster.set_registry(true);
                std::thread::sleep(pause);
                cluster.set_registry(false);
            }
        }
    }
}

/// Injects faults until `end`, telling each to `tell`, and returns how often each was done.
///
/// # Panics
/// As [`Injection::carry_out`].
pub fn inject_until(
    end: Instant,
    random: &mut Random,
    cluster: &mut Cluster,
    mut database: Option<&mut ManagedPostgres>,
    mut tell: impl FnMut(&Injection),
) -> BTreeMap<String, u64> {
    let mut counts = BTreeMap::new();
    while Instant::now() < end {
        // Some faults meet a platform that still recovers from the one before.
        std::thread::sleep(random.pause(300, 4_000));
        let injection = Injection::draw(random, database.is_some());
        tell(&injection);
        injection.carry_out(cluster, database.as_deref_mut());
        *counts.entry(injection.name()).or_default() += 1;
    }
    counts
}
