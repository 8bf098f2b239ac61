//! One thing that is done to the platform.

use super::rig::Rig;
use super::wall::Wall;
use super::{Random, database};
use crate::cluster::ROLES;
use std::time::Duration;
use throughline_local::child::Fault;

/// The roles of which a second instance may join.
pub const STAGES: [&str; 6] =
    ["evaluate_rules", "update_twin", "bridge_data", "load_warehouse", "project_twins", "notify"];

/// Every role that can be killed.
pub fn roles() -> Vec<&'static str> {
    ROLES.into_iter().chain(["notify"]).collect()
}

/// What is done, and to whom. What lasts is undone after the time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Injection {
    /// SIGKILL, then the same instance starts again: the second one where there are two.
    KillRole(&'static str, &'static str),
    /// SIGSTOP for a time that may outlast the group's session, so that others take over, then SIGCONT.
    HangRole(&'static str, Duration),
    /// A second instance joins the group for a time.
    JoinAndLeave(&'static str, Duration),
    /// SIGKILL of every broker, then a start on its data.
    KillKafka(Duration),
    /// SIGSTOP of every broker.
    HangKafka(Duration),
    /// SIGKILL of one broker of several.
    KillBroker(usize, Duration),
    /// SIGSTOP of one broker of several.
    HangBroker(usize, Duration),
    /// An orderly restart of one broker of several, as an upgrade does it.
    RestartBroker(usize),
    /// A broker's disk is full.
    FillDiskOfKafka(Duration),
    /// SIGKILL of the bridge while every broker hangs, so that it holds publishes that Kafka has not taken.
    KillBridgeBeforeKafka(Duration),
    /// SIGSTOP of a loader that waits for a lock with rows in its hand, long enough that others take over its
    /// partitions; it goes on where it stood.
    HangLoaderWithRows(Duration),
    /// SIGKILL of PostgreSQL, then a start on its data.
    KillDatabase(Duration),
    /// SIGSTOP of PostgreSQL.
    HangDatabase(Duration),
    /// PostgreSQL runs a quarter of the time.
    SlowDatabase(Duration),
    /// Others lock what our transactions need, in a circle.
    DeadlockDatabase(Duration),
    /// Our connections are ended and others hold all there are.
    ExhaustConnections(Duration),
    /// PostgreSQL's disk is full.
    FillDiskOfDatabase(Duration),
    /// The registry does not answer.
    RegistryAway(Duration),
    /// Every packet from and to a part is dropped; connections stay open and silent.
    DropPackets(Link, Duration),
    /// The webhook does not answer: connections are taken and nothing comes back.
    HangReceiver(Duration),
    /// SIGKILL of the webhook, so that connections are refused, then another one goes on with its journal.
    KillReceiver(Duration),
    /// SIGSTOP of an existing MQTT broker.
    HangMosquitto(Duration),
    /// An orderly restart of an existing MQTT broker, which keeps its sessions. (Killed it forgets what it has
    /// acknowledged since it saved them last: that promise is its own.)
    RestartMosquitto,
    /// Another client takes over a publisher's client id.
    TakeOverSession,
    /// SIGKILL of the publishing devices, which go on by their journal.
    KillPublisher,
}

/// Whose packets are dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// Those of the brokers.
    Kafka,
    /// Those of PostgreSQL.
    Database,
    /// Those of the bridge's listener, or of an existing broker: from devices, and to the bridge.
    Mqtt,
    /// Those of the registry, which then hangs instead of refusing connections.
    Registry,
    /// Those of the webhook.
    Webhook,
}

/// What a rig and this machine allow.
#[derive(Clone, Copy, Debug)]
pub struct Means {
    /// Whether the store is a server.
    pub has_server: bool,
    /// How many brokers there are.
    pub brokers: usize,
    /// Whether packets can be dropped.
    pub may_drop: bool,
    /// Whether Kafka and PostgreSQL have disks that can be filled.
    pub small_disks: bool,
    /// Whether devices publish to an existing broker.
    pub has_mosquitto: bool,
    /// Whether every stage has two instances.
    pub is_doubled: bool,
}

impl Means {
    /// Says whether a role has two instances where the stages have. One `watch` is enough, and an existing broker
    /// is read by one bridge.
    fn has_two(&self, role: &str) -> bool {
        match role {
            "watch" => false,
            "bridge" => !self.has_mosquitto,
            _ => true,
        }
    }
}

impl Injection {
    /// Derives the next one of those that are possible: about four in ten are kills of roles, a fifth is done
    /// to Kafka.
    pub fn draw(random: &mut Random, means: Means) -> Self {
        let any = random.one_of(&roles());
        let instance = if means.is_doubled && means.has_two(any) { random.one_of(&["0", "1"]) } else { "0" };
        let stage = random.one_of(&STAGES);
        let broker = random.draw() as usize % means.brokers;
        let (server, several) = (means.has_server, means.brokers > 1);
        let choices = [
            (36, true, Self::KillRole(any, instance)),
            (4, true, Self::HangRole(any, random.pause(500, 9_000))),
            (4, true, Self::JoinAndLeave(stage, random.pause(2_000, 8_000))),
            (if several { 1 } else { 9 }, true, Self::KillKafka(random.pause(0, 4_000))),
            (if several { 1 } else { 9 }, true, Self::HangKafka(random.pause(500, 9_000))),
            (7, several, Self::KillBroker(broker, random.pause(0, 6_000))),
            (6, several, Self::HangBroker(broker, random.pause(500, 9_000))),
            (3, several, Self::RestartBroker(broker)),
            (2, means.small_disks, Self::FillDiskOfKafka(random.pause(1_000, 8_000))),
            (2, true, Self::KillBridgeBeforeKafka(random.pause(500, 5_000))),
            (2, true, Self::HangLoaderWithRows(random.pause(7_000, 9_000))),
            (2, server, Self::KillDatabase(random.pause(0, 4_000))),
            (2, server, Self::HangDatabase(random.pause(500, 12_000))),
            (4, server, Self::SlowDatabase(random.pause(1_000, 8_000))),
            (2, server, Self::DeadlockDatabase(random.pause(1_000, 6_000))),
            (2, server, Self::ExhaustConnections(random.pause(1_500, 8_000))),
            (2, server && means.small_disks, Self::FillDiskOfDatabase(random.pause(1_000, 8_000))),
            (2, means.may_drop, Self::DropPackets(Link::Kafka, random.pause(500, 12_000))),
            (2, means.may_drop, Self::DropPackets(Link::Mqtt, random.pause(500, 12_000))),
            (2, means.may_drop && server, Self::DropPackets(Link::Database, random.pause(500, 12_000))),
            (2, means.may_drop, Self::DropPackets(Link::Registry, random.pause(500, 9_000))),
            (2, means.may_drop, Self::DropPackets(Link::Webhook, random.pause(500, 9_000))),
            (3, true, Self::RegistryAway(random.pause(500, 6_000))),
            (2, true, Self::HangReceiver(random.pause(500, 12_000))),
            (2, true, Self::KillReceiver(random.pause(0, 6_000))),
            (4, means.has_mosquitto, Self::HangMosquitto(random.pause(500, 9_000))),
            (4, means.has_mosquitto, Self::RestartMosquitto),
            (3, true, Self::TakeOverSession),
            (2, true, Self::KillPublisher),
        ];
        let possible = choices.iter().filter(|(_, possible, _)| *possible);
        let total: u64 = possible.clone().map(|(weight, ..)| weight).sum();
        let mut at = random.draw() % total;
        for (weight, _, injection) in possible {
            match at.checked_sub(*weight) {
                Some(left) => at = left,
                None => return *injection,
            }
        }
        unreachable!("the number drawn is below the sum of the weights")
    }

    /// Returns what the journal counts it as.
    pub fn name(&self) -> String {
        match self {
            Self::KillRole(role, _) => format!("kill {role}"),
            Self::HangRole(role, _) => format!("hang {role}"),
            Self::JoinAndLeave(role, _) => format!("join and leave {role}"),
            Self::KillKafka(_) => "kill kafka".to_owned(),
            Self::HangKafka(_) => "hang kafka".to_owned(),
            Self::KillBroker(..) => "kill one broker of three".to_owned(),
            Self::HangBroker(..) => "hang one broker of three".to_owned(),
            Self::RestartBroker(_) => "restart one broker of three".to_owned(),
            Self::FillDiskOfKafka(_) => "disk of kafka full".to_owned(),
            Self::KillBridgeBeforeKafka(_) => "kill bridge while kafka hangs".to_owned(),
            Self::HangLoaderWithRows(_) => "hang load_warehouse with rows in its hand".to_owned(),
            Self::KillDatabase(_) => "kill database".to_owned(),
            Self::HangDatabase(_) => "hang database".to_owned(),
            Self::SlowDatabase(_) => "slow database".to_owned(),
            Self::DeadlockDatabase(_) => "deadlocks in database".to_owned(),
            Self::ExhaustConnections(_) => "database out of connections".to_owned(),
            Self::FillDiskOfDatabase(_) => "disk of database full".to_owned(),
            Self::RegistryAway(_) => "registry away".to_owned(),
            Self::DropPackets(link, _) => format!("drop packets of {link:?}").to_lowercase(),
            Self::HangReceiver(_) => "hang webhook".to_owned(),
            Self::KillReceiver(_) => "kill webhook".to_owned(),
            Self::HangMosquitto(_) => "hang mosquitto".to_owned(),
            Self::RestartMosquitto => "restart mosquitto".to_owned(),
            Self::TakeOverSession => "session taken over".to_owned(),
            Self::KillPublisher => "kill publisher".to_owned(),
        }
    }

    /// Returns which part it is done to, as a diagnosis would have to name it: a role, a service, a link, or the
    /// edge.
    pub fn part(&self) -> String {
        match self {
            Self::KillRole(role, _) | Self::HangRole(role, _) | Self::JoinAndLeave(role, _) => {
                (*role).to_owned()
            }
            Self::KillKafka(_)
            | Self::HangKafka(_)
            | Self::KillBroker(..)
            | Self::HangBroker(..)
            | Self::RestartBroker(_)
            | Self::KillBridgeBeforeKafka(_)
            | Self::FillDiskOfKafka(_) => "kafka".to_owned(),
            Self::HangLoaderWithRows(_) => "load_warehouse".to_owned(),
            Self::KillDatabase(_)
            | Self::HangDatabase(_)
            | Self::SlowDatabase(_)
            | Self::DeadlockDatabase(_)
            | Self::ExhaustConnections(_)
            | Self::FillDiskOfDatabase(_) => "database".to_owned(),
            Self::RegistryAway(_) => "registry".to_owned(),
            Self::DropPackets(link, _) => format!("link to {link:?}").to_lowercase(),
            Self::HangReceiver(_) | Self::KillReceiver(_) => "webhook".to_owned(),
            Self::HangMosquitto(_) | Self::RestartMosquitto => "mqtt_broker".to_owned(),
            Self::TakeOverSession | Self::KillPublisher => "edge".to_owned(),
        }
    }

    /// Does it, and undoes what lasts.
    ///
    /// # Panics
    /// When a part does not start again, or it is not possible with this rig.
    pub fn carry_out(self, rig: &mut Rig) {
        match self {
            Self::KillRole(name, instance) => rig.cluster.kill_and_restart_instance(name, instance),
            Self::HangRole(name, pause) => {
                rig.cluster.signal(name, "STOP");
                std::thread::sleep(pause);
                rig.cluster.signal(name, "CONT");
            }
            Self::JoinAndLeave(name, pause) => {
                rig.cluster.add(name, "guest");
                std::thread::sleep(pause);
                rig.cluster.remove(name, "guest");
            }
            Self::RegistryAway(pause) => {
                rig.cluster.set_registry(true);
                std::thread::sleep(pause);
                rig.cluster.set_registry(false);
            }
            Self::DropPackets(link, pause) => {
                let wall = Wall::build(&rig.ports(link)).expect("packets can be dropped here");
                std::thread::sleep(pause);
                drop(wall);
            }
            Self::HangLoaderWithRows(pause) => {
                let lock = database::lock(rig.cluster.database());
                // Many times what it takes to gather rows and to begin to write them.
                std::thread::sleep(Duration::from_millis(1_500));
                rig.cluster.signal("load_warehouse", "STOP");
                drop(lock);
                std::thread::sleep(pause);
                rig.cluster.signal("load_warehouse", "CONT");
            }
            Self::HangReceiver(pause) => {
                rig.receiver.signal("STOP");
                std::thread::sleep(pause);
                rig.receiver.signal("CONT");
            }
            Self::KillReceiver(pause) => {
                rig.receiver.kill();
                std::thread::sleep(pause);
                rig.start_receiver();
            }
            Self::HangMosquitto(pause) => {
                rig.mosquitto().fault(Fault::Stop);
                std::thread::sleep(pause);
                rig.mosquitto().fault(Fault::Continue);
            }
            Self::RestartMosquitto => {
                // Mosquitto 2.0.11 loses of what it acknowledges between SIGTERM and its end: nothing is sent then.
                rig.hush_publisher(true);
                std::thread::sleep(Duration::from_millis(500));
                rig.mosquitto().restart().expect("Mosquitto starts again on its data");
                rig.hush_publisher(false);
            }
            Self::TakeOverSession => rig.take_over_session(),
            Self::KillPublisher => rig.kill_publisher(),
            kafka @ (Self::KillKafka(_)
            | Self::HangKafka(_)
            | Self::KillBroker(..)
            | Self::HangBroker(..)
            | Self::RestartBroker(_)
            | Self::KillBridgeBeforeKafka(_)
            | Self::FillDiskOfKafka(_)) => kafka.do_to_kafka(rig),
            database => database.do_to_database(rig),
        }
    }

    fn do_to_kafka(self, rig: &mut Rig) {
        let kafka = &mut rig.cluster.kafka;
        match self {
            Self::KillKafka(pause) => {
                kafka.fault(Fault::Kill);
                std::thread::sleep(pause);
                kafka.restart().expect("Kafka starts again on its data");
            }
            Self::HangKafka(pause) => {
                kafka.fault(Fault::Stop);
                std::thread::sleep(pause);
                kafka.fault(Fault::Continue);
            }
            Self::KillBridgeBeforeKafka(pause) => {
                kafka.fault(Fault::Stop);
                std::thread::sleep(pause);
                rig.cluster.kill_and_restart_instance("bridge", "0");
                std::thread::sleep(Duration::from_secs(1));
                rig.cluster.kafka.fault(Fault::Continue);
            }
            Self::KillBroker(index, pause) => {
                kafka.node(index).fault(Fault::Kill);
                std::thread::sleep(pause);
                kafka.node(index).restart().expect("a broker starts again on its data");
            }
            Self::HangBroker(index, pause) => {
                kafka.node(index).fault(Fault::Stop);
                std::thread::sleep(pause);
                kafka.node(index).fault(Fault::Continue);
            }
            Self::RestartBroker(index) => {
                kafka.node(index).restart().expect("a broker starts again on its data");
            }
            Self::FillDiskOfKafka(pause) => {
                let disk = rig.disk_of_kafka().expect("drawn only where there is one");
                disk.fill();
                std::thread::sleep(pause);
                disk.free();
                // A broker whose only disk failed has ended.
                rig.revive_kafka();
            }
            _ => unreachable!("the caller picks what is done to Kafka"),
        }
    }

    fn do_to_database(self, rig: &mut Rig) {
        let server = rig.database.as_mut().expect("drawn only where there is a server");
        match self {
            Self::KillDatabase(pause) => {
                server.fault(Fault::Kill);
                std::thread::sleep(pause);
                server.restart().expect("PostgreSQL starts again on its data");
            }
            Self::HangDatabase(pause) => {
                server.fault(Fault::Stop);
                std::thread::sleep(pause);
                server.fault(Fault::Continue);
            }
            Self::SlowDatabase(pause) => database::slow_down(server, pause),
            Self::DeadlockDatabase(pause) => database::deadlock(server, pause),
            Self::ExhaustConnections(pause) => database::exhaust(server, pause),
            Self::FillDiskOfDatabase(pause) => {
                let disk = rig.disk_of_database().expect("drawn only where there is one");
                disk.fill();
                std::thread::sleep(pause);
                disk.free();
                rig.revive_database();
            }
            _ => unreachable!("the caller picks what is done to the database"),
        }
    }
}
