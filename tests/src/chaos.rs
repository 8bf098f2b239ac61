//! Faults under load, derived from a seed: what is done to which part, when, and what is counted.

use crate::cluster::{Cluster, ROLES};
use std::collections::BTreeMap;
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use throughline_local::child::Fault;
use throughline_local::postgres::ManagedPostgres;

const STAGES: [&str; 5] = ["evaluate_rules", "update_twin", "bridge_data", "load_warehouse", "project_twins"];

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
    /// Every packet from and to a part is dropped; connections stay open and silent.
    DropPackets(Link, Duration),
}

/// Whose packets are dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// Those of the broker.
    Kafka,
    /// Those of PostgreSQL.
    Database,
    /// Those of the bridge's listener.
    Mqtt,
}

/// Drops the packets of a port until it is dropped itself.
struct Wall {
    table: String,
}

impl Wall {
    fn build(port: u16) -> Option<Self> {
        // Named after the port, so that several runs at once leave each other's alone.
        let table = format!("inet throughline_chaos_{port}");
        let rules = format!(
            "add table {table}\ndelete table {table}\nadd table {table}\n\
             add chain {table} drops {{ type filter hook input priority 0; }}\n\
             add rule {table} drops tcp dport {port} drop\nadd rule {table} drops tcp sport {port} drop\n"
        );
        Self::nft(&rules).then_some(Self { table })
    }

    fn nft(rules: &str) -> bool {
        let mut nft = Command::new("nft");
        let nft = nft.args(["-f", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let Ok(mut running) = nft.spawn() else { return false };
        let written = running.stdin.take().is_some_and(|mut to| to.write_all(rules.as_bytes()).is_ok());
        running.wait().is_ok_and(|status| status.success()) && written
    }
}

impl Drop for Wall {
    fn drop(&mut self) {
        let removed = Self::nft(&format!("delete table {}\n", self.table));
        assert!(
            removed || std::thread::panicking(),
            "packets are dropped for good: nft delete table {}",
            self.table
        );
    }
}

/// Says whether this machine lets us drop packets (nftables, as root).
pub fn may_drop_packets() -> bool {
    Wall::build(1).is_some()
}

impl Injection {
    /// Derives the next one. Half of them are kills of roles; brokers get a sixth. Which ones are possible is
    /// for the machine and the store: packets are dropped only where that is permitted.
    pub fn draw(random: &mut Random, has_server: bool, may_drop: bool) -> Self {
        let any = |random: &mut Random| ROLES[(random.draw() % ROLES.len() as u64) as usize];
        let stage = |random: &mut Random| STAGES[(random.draw() % STAGES.len() as u64) as usize];
        match random.draw() % 26 {
            0..12 => Self::KillRole(any(random)),
            12..14 => Self::HangRole(any(random), random.pause(500, 9_000)),
            14..16 => Self::JoinAndLeave(stage(random), random.pause(2_000, 8_000)),
            16..18 => Self::KillKafka(random.pause(0, 4_000)),
            18..21 => Self::HangKafka(random.pause(500, 12_000)),
            21 if has_server => Self::KillDatabase(random.pause(0, 4_000)),
            22 if has_server => Self::HangDatabase(random.pause(500, 12_000)),
            23 if may_drop => Self::DropPackets(Link::Kafka, random.pause(500, 12_000)),
            24 if may_drop => Self::DropPackets(Link::Mqtt, random.pause(500, 12_000)),
            25 if may_drop && has_server => Self::DropPackets(Link::Database, random.pause(500, 12_000)),
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
            Self::DropPackets(link, _) => format!("drop packets of {link:?}").to_lowercase(),
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
            Self::DropPackets(link, pause) => {
                let port = match link {
                    Link::Kafka => cluster.kafka.port(),
                    Link::Database => database.expect("drawn only where there is a server").port(),
                    Link::Mqtt => cluster.mqtt_port().parse().expect("a port is a number"),
                };
                let wall = Wall::build(port).expect("packets can be dropped here");
                std::thread::sleep(pause);
                drop(wall);
            }
        }
    }
}

/// What a run does to the platform.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Plan {
    /// Faults derived from a seed for so many minutes.
    Seed(u64, u64),
    /// PostgreSQL is down for ten minutes.
    DatabaseDown,
    /// Instances of stages come and go for ten minutes.
    RebalanceStorm,
    /// Kafka's packets are dropped for three minutes, which is longer than any time-out of a request.
    KafkaUnreachable,
}

impl Plan {
    /// Reads a seed or the name of a plan.
    pub fn parse(text: &str, minutes: u64) -> Option<Self> {
        match text {
            "database_down" => Some(Self::DatabaseDown),
            "rebalance_storm" => Some(Self::RebalanceStorm),
            "kafka_unreachable" => Some(Self::KafkaUnreachable),
            seed => Some(Self::Seed(seed.parse().ok()?, minutes)),
        }
    }

    /// Returns what the journal calls it.
    pub fn name(&self) -> String {
        match self {
            Self::Seed(seed, _) => seed.to_string(),
            Self::DatabaseDown => "database_down".to_owned(),
            Self::RebalanceStorm => "rebalance_storm".to_owned(),
            Self::KafkaUnreachable => "kafka_unreachable".to_owned(),
        }
    }

    /// Returns the seed of its load and its choices.
    pub fn seed(&self) -> u64 {
        match self {
            Self::Seed(seed, _) => *seed,
            Self::DatabaseDown => 1_000,
            Self::RebalanceStorm => 1_002,
            Self::KafkaUnreachable => 1_004,
        }
    }

    /// Returns how long the load lasts at least.
    pub fn time(&self) -> Duration {
        Duration::from_secs(match self {
            Self::Seed(_, minutes) => 60 * minutes,
            Self::DatabaseDown | Self::RebalanceStorm => 640,
            Self::KafkaUnreachable => 240,
        })
    }

    /// Says whether it loads PostgreSQL; SQLite otherwise.
    pub fn has_server(&self) -> bool {
        self.seed().is_multiple_of(2)
    }

    /// Does it all, starting again what crashed, telling each fault to `tell`, and returns how often each was
    /// done.
    ///
    /// # Panics
    /// As [`Injection::carry_out`], and where packets must be dropped and cannot be.
    pub fn carry_out(
        &self,
        cluster: &mut Cluster,
        mut database: Option<&mut ManagedPostgres>,
        mut tell: impl FnMut(&Injection),
    ) -> BTreeMap<String, u64> {
        let mut counts = BTreeMap::new();
        let mut random = Random(self.seed());
        let may_drop = may_drop_packets();
        let mut inject = |injection: Injection, cluster: &mut Cluster| {
            tell(&injection);
            injection.carry_out(cluster, database.as_deref_mut());
            cluster.start_what_crashed();
            *counts.entry(injection.name()).or_default() += 1;
        };
        let end = Instant::now() + self.time();
        match self {
            Self::Seed(..) => {
                while Instant::now() < end {
                    // Some faults meet a platform that still recovers from the one before.
                    std::thread::sleep(random.pause(300, 4_000));
                    inject(Injection::draw(&mut random, self.has_server(), may_drop), cluster);
                }
            }
            Self::DatabaseDown => {
                std::thread::sleep(Duration::from_secs(10));
                inject(Injection::KillDatabase(Duration::from_secs(600)), cluster);
            }
            Self::RebalanceStorm => {
                while Instant::now() < end {
                    std::thread::sleep(random.pause(100, 800));
                    let role = STAGES[(random.draw() % STAGES.len() as u64) as usize];
                    inject(Injection::JoinAndLeave(role, random.pause(300, 2_500)), cluster);
                }
            }
            Self::KafkaUnreachable => {
                std::thread::sleep(Duration::from_secs(10));
                inject(Injection::DropPackets(Link::Kafka, Duration::from_secs(180)), cluster);
            }
        }
        counts
    }
}
