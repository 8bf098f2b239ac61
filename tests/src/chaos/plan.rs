//! What a run does to the platform.

use super::Random;
use super::injection::{Injection, Link, STAGES, roles};
use super::replays;
use super::rig::Rig;
use crate::{root, wait_for};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

/// The retention that readings have where they must be gone within the run.
const SHORT_RETENTION: &str = "20s";

/// Faults from a seed, or one that lasts.
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
    /// Kafka hangs for six minutes, which is longer than the bridge waits for an acknowledgement.
    KafkaAway,
    /// Stages are stopped for two minutes and come back to a backlog.
    Backlog,
    /// Dead letters are replayed in vain, again and again, while who replays and who refuses them is killed.
    Replays,
    /// Readings are gone by retention when stages get their partitions anew.
    IdlePastRetention,
}

/// What is told of a fault.
#[derive(Clone, Copy, Debug)]
pub enum Told {
    /// It begins.
    Begins(Injection),
    /// It is undone; the platform may need longer.
    Ended {
        /// What was done.
        injection: Injection,
        /// When it began, by this machine's clock.
        began: SystemTime,
        /// When it was undone.
        ended: SystemTime,
    },
}

/// The plans that have a name, with the number that stands for their seed.
const NAMED: [(&str, Plan, u64); 7] = [
    ("database_down", Plan::DatabaseDown, 1_000),
    ("rebalance_storm", Plan::RebalanceStorm, 1_002),
    ("kafka_unreachable", Plan::KafkaUnreachable, 1_004),
    ("kafka_away", Plan::KafkaAway, 1_006),
    ("backlog", Plan::Backlog, 1_008),
    ("idle_past_retention", Plan::IdlePastRetention, 1_010),
    ("replays", Plan::Replays, 1_012),
];

impl Plan {
    /// Reads a seed or the name of a plan.
    pub fn parse(text: &str, minutes: u64) -> Option<Self> {
        let named = NAMED.iter().find(|(name, ..)| *name == text).map(|(_, plan, _)| plan.clone());
        named.or_else(|| Some(Self::Seed(text.parse().ok()?, minutes)))
    }

    /// Returns the names that [`Plan::parse`] knows.
    pub fn names() -> String {
        NAMED.map(|(name, ..)| name).join(" | ")
    }

    fn named(&self) -> Option<(&'static str, u64)> {
        NAMED.iter().find(|(_, plan, _)| plan == self).map(|(name, _, seed)| (*name, *seed))
    }

    /// Returns what the journal calls it.
    pub fn name(&self) -> String {
        match self {
            Self::Seed(seed, _) => seed.to_string(),
            named => named.named().expect("every other plan has a name").0.to_owned(),
        }
    }

    /// Returns the seed of its load and its choices.
    pub fn seed(&self) -> u64 {
        match self {
            Self::Seed(seed, _) => *seed,
            named => named.named().expect("every other plan has a name").1,
        }
    }

    /// Returns how long the load lasts at least.
    pub fn time(&self) -> Duration {
        Duration::from_secs(match self {
            Self::Seed(_, minutes) => 60 * minutes,
            Self::DatabaseDown | Self::RebalanceStorm => 640,
            Self::KafkaUnreachable | Self::Replays => 240,
            Self::KafkaAway => 400,
            Self::Backlog => 180,
            Self::IdlePastRetention => 60,
        })
    }

    /// Says whether it loads PostgreSQL; SQLite otherwise.
    pub fn has_server(&self) -> bool {
        self.seed().is_multiple_of(2)
    }

    /// Returns how many brokers it has: three with every second pair of seeds, so that both stores meet both.
    pub fn brokers(&self) -> u32 {
        let several = matches!(self, Self::Seed(seed, _) if seed / 2 % 2 == 1);
        if several { 3 } else { 1 }
    }

    /// Says whether every stage has two instances all the time; each third seed from 30 on.
    pub fn is_doubled(&self) -> bool {
        matches!(self, Self::Seed(seed, _) if *seed >= 30 && seed.is_multiple_of(3))
    }

    /// Says whether devices publish to a Mosquitto, from which the bridge reads.
    pub fn has_mosquitto(&self) -> bool {
        matches!(self, Self::Seed(seed, _) if *seed >= 40 && seed % 5 == 3)
    }

    /// Says whether stages are members by the protocol of before KIP-848, with static membership.
    pub fn is_classic(&self) -> bool {
        matches!(self, Self::Seed(seed, _) if *seed >= 40 && seed % 5 == 1)
    }

    /// Says whether it needs disks that can be filled.
    pub fn fills_disks(&self) -> bool {
        matches!(self, Self::Seed(..))
    }

    /// Says whether a foreign program writes what nobody can read.
    pub fn has_poison(&self) -> bool {
        // It would keep the topic from becoming empty.
        *self != Self::IdlePastRetention
    }

    /// Returns settings of its brokers.
    pub fn kafka_settings(&self) -> Vec<(String, String)> {
        let quick = [
            ("log.retention.check.interval.ms", "1000"),
            ("log.initial.task.delay.ms", "1000"),
            ("log.segment.delete.delay.ms", "1000"),
        ];
        let wanted = if *self == Self::IdlePastRetention { &quick[..] } else { &[] };
        wanted.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    /// Returns variables of the roles' environment; files that they name lie in `directory`.
    ///
    /// # Panics
    /// When such a file cannot be written.
    pub fn settings(&self, directory: &Path) -> Vec<(String, String)> {
        let mut settings = Vec::new();
        if self.brokers() > 1 {
            settings.push(("THROUGHLINE_KAFKA__REPLICATION".to_owned(), "3".to_owned()));
            settings.push(("THROUGHLINE_KAFKA__MIN_INSYNC".to_owned(), "2".to_owned()));
        }
        if self.is_classic() {
            settings.push(("THROUGHLINE_KAFKA__GROUP_PROTOCOL".to_owned(), "classic".to_owned()));
        }
        if *self == Self::IdlePastRetention {
            let topics = directory.join("topics");
            write_short_retention(&topics).expect("the scratch directory is writable");
            settings.push(("THROUGHLINE_TOPICS__DIR".to_owned(), topics.display().to_string()));
        }
        settings
    }

    /// Returns what the oracle must know of it, once every request that it made is done.
    ///
    /// # Panics
    /// When one is not done in time.
    pub fn oracle(&self, rig: &Rig) -> Vec<String> {
        match self {
            Self::IdlePastRetention => vec!["--deleted".to_owned()],
            Self::Replays => vec!["--replays".to_owned(), replays::wait_for_all(&rig.cluster).to_string()],
            _ => Vec::new(),
        }
    }

    /// Does it all, starting again what crashed, telling each fault to `tell` before and after, and returns how
    /// often each was done.
    ///
    /// # Panics
    /// As [`Injection::carry_out`], and where packets must be dropped and cannot be.
    pub fn carry_out(&self, rig: &mut Rig, mut tell: impl FnMut(Told)) -> BTreeMap<String, u64> {
        let mut counts = BTreeMap::new();
        let mut random = Random(self.seed());
        let means = rig.means();
        let mut inject = |injection: Injection, rig: &mut Rig| {
            tell(Told::Begins(injection));
            let began = SystemTime::now();
            injection.carry_out(rig);
            tell(Told::Ended { injection, began, ended: SystemTime::now() });
            rig.cluster.start_what_crashed();
            *counts.entry(injection.name()).or_default() += 1;
        };
        let end = Instant::now() + self.time();
        // Whatever lasts begins with the load at work.
        let lead = || std::thread::sleep(Duration::from_secs(10));
        match self {
            Self::Seed(..) => {
                while Instant::now() < end {
                    // Some faults meet a platform that still recovers from the one before.
                    std::thread::sleep(random.pause(200, 1_500));
                    inject(Injection::draw(&mut random, means), rig);
                }
            }
            Self::DatabaseDown => {
                lead();
                inject(Injection::KillDatabase(Duration::from_secs(600)), rig);
            }
            Self::RebalanceStorm => {
                while Instant::now() < end {
                    std::thread::sleep(random.pause(100, 800));
                    inject(Injection::JoinAndLeave(random.one_of(&STAGES), random.pause(300, 2_500)), rig);
                }
            }
            Self::KafkaUnreachable => {
                lead();
                inject(Injection::DropPackets(Link::Kafka, Duration::from_secs(180)), rig);
            }
            Self::KafkaAway => {
                lead();
                inject(Injection::HangKafka(Duration::from_secs(360)), rig);
            }
            Self::Backlog => {
                lead();
                STAGES.iter().for_each(|stage| rig.cluster.stop(stage));
                std::thread::sleep(Duration::from_secs(120));
                STAGES.iter().for_each(|stage| rig.cluster.add(stage, "0"));
                counts.insert("stages stopped for two minutes".to_owned(), 1);
            }
            Self::Replays => {
                lead();
                let mut asked = 0;
                while Instant::now() < end {
                    for _ in 0..random.between(2, 5) {
                        std::thread::sleep(random.pause(200, 3_000));
                        inject(replays::draw(&mut random), rig);
                    }
                    if asked < replays::MOST {
                        replays::ask(&rig.cluster);
                        asked += 1;
                    }
                }
                counts.insert("replays of all letters asked for".to_owned(), asked);
            }
            Self::IdlePastRetention => {
                std::thread::sleep(self.time() / 3);
                rig.stop_publisher();
                let readings = "device.telemetry.v1";
                wait_for("the end of the readings' retention", Duration::from_secs(180), || {
                    rig.cluster.is_emptied(readings).then_some(())
                });
                roles().into_iter().for_each(|role| inject(Injection::KillRole(role, "0"), rig));
                STAGES.iter().for_each(|stage| {
                    inject(Injection::JoinAndLeave(stage, Duration::from_secs(2)), rig);
                });
                rig.start_publisher();
                counts.insert("readings deleted by retention".to_owned(), 1);
            }
        }
        counts
    }
}

/// Writes the catalog's file of readings with a short retention.
fn write_short_retention(directory: &Path) -> std::io::Result<()> {
    let file = "device.telemetry.v1.toml";
    let text = std::fs::read_to_string(root().join("topics").join(file))?;
    let changed = text.replace("retention = \"7d\"", &format!("retention = \"{SHORT_RETENTION}\""));
    assert_ne!(text, changed, "the topic file says its retention");
    std::fs::create_dir_all(directory)?;
    std::fs::write(directory.join(file), changed)
}
