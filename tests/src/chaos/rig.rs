//! Everything that a run under faults consists of: services, roles, publishers, a foreign writer.

use super::disk::SmallDisk;
use super::injection::{Link, Means, STAGES};
use super::wall::Wall;
use super::{Plan, database};
use crate::cluster::Cluster;
use crate::{Load, Process, python, root, said, wait_for};
use serde_json::Value;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use throughline_local::kafka::KafkaOptions;
use throughline_local::mosquitto::{ManagedMosquitto, MosquittoOptions};
use throughline_local::postgres::{ManagedPostgres, PostgresOptions};
use throughline_local::{ports, scratch_dir};

/// Distinct readings a second: enough that every fault meets work in every role, little enough that two cores
/// keep up while processes start again.
const RATE: u64 = 400;
/// Records that nobody can read, as a part of the readings, and a burst that fills one partition.
const POISON: (u64, u64) = (100, 1_000);

/// Services, roles, publishers and their load. Disks come last: whoever lives there ends first.
pub struct Rig {
    /// Kafka, registry and roles.
    pub cluster: Cluster,
    /// PostgreSQL, unless the store is SQLite.
    pub database: Option<ManagedPostgres>,
    /// What is published.
    pub load: Load,
    publisher: Process,
    publishers: u32,
    rate: u32,
    poisoner: Process,
    pub(super) receiver: Process,
    receiver_port: u16,
    receivers: u32,
    mosquitto: Option<ManagedMosquitto>,
    /// Where devices publish to: each of them to one of these.
    mqtt: Vec<u16>,
    is_doubled: bool,
    kafka_disk: Option<SmallDisk>,
    database_disk: Option<SmallDisk>,
    _scratch: TempDir,
}

impl Rig {
    /// Starts everything for a plan, with the demo rule in force and the load flowing.
    ///
    /// # Panics
    /// When something does not start.
    pub fn start(plan: &Plan) -> Self {
        let scratch = scratch_dir().expect("a temporary directory can be made");
        let directory = tempfile::tempdir().expect("a temporary directory can be made");
        let nodes = plan.brokers();
        let mut options = KafkaOptions::new(directory.path().join("kafka"));
        options.settings = plan.kafka_settings();
        let fills = plan.fills_disks();
        let kafka_dir = if nodes > 1 { options.data_dir.join("1") } else { options.data_dir.clone() };
        let kafka_disk = fills.then(|| SmallDisk::mount(&kafka_dir)).flatten();
        let place = scratch.path().join("pg");
        let database_disk = (fills && plan.has_server()).then(|| SmallDisk::mount(&place)).flatten();
        let database = plan.has_server().then(|| {
            let mut options = PostgresOptions::new(&place);
            options.settings = database::settings();
            ManagedPostgres::start(options).expect("PostgreSQL starts")
        });
        let url = database.as_ref().map(ManagedPostgres::url);
        let mut settings = plan.settings(directory.path());
        let receiver_port = ports::free().expect("a free port");
        let webhook = format!("http://127.0.0.1:{receiver_port}/alerts");
        settings.push(("THROUGHLINE_NOTIFY__WEBHOOK_URL".to_owned(), webhook));
        let mosquitto = plan.has_mosquitto().then(|| {
            let options = MosquittoOptions::new(directory.path().join("mosquitto"));
            ManagedMosquitto::start(options).expect("Mosquitto starts")
        });
        if let Some(broker) = &mosquitto {
            settings.push(("THROUGHLINE_MQTT__LISTEN".to_owned(), String::new()));
            let url = format!("mqtt://{}", broker.addr());
            settings.push(("THROUGHLINE_MQTT__EXTERNAL_URL".to_owned(), url));
        }
        let settings: Vec<_> = settings.iter().map(|(name, value)| (&**name, &**value)).collect();
        let mut cluster = Cluster::start_on(directory, (&options, nodes), url.as_deref(), &settings);
        let receiver = receive(&cluster, receiver_port, 1);
        cluster.add_roles();
        cluster.add("notify", "0");
        if plan.is_doubled() {
            STAGES.iter().for_each(|stage| cluster.add(stage, "1"));
            cluster.add("reprocess_dead_letters", "1");
        }
        let second_bridge = (plan.is_doubled() && mosquitto.is_none()).then(|| {
            let port = ports::free().expect("a free port");
            let listen = format!("127.0.0.1:{port}");
            cluster.add_with("bridge", "1", &[("THROUGHLINE_MQTT__LISTEN", &listen)]);
            port
        });
        let rule = root().join("demo/rules/demo-overheat.toml").display().to_string();
        let applied = cluster.command(&["rules", "apply", &rule]);
        assert!(applied.status.success(), "{}", said(&applied));
        if mosquitto.is_some() {
            cluster.wait_for_subscription();
        } else {
            cluster.wait_for_bridge();
        }

        let mut load = Load::new(plan.seed(), RATE * plan.time().as_secs() * 9 / 10, 400);
        load.deadline = plan.time() * 2 + Duration::from_secs(240);
        load.mix = true;
        load.begin_now();
        // With what is sent twice and what is no reading.
        let rate = (RATE * 121 / 100) as u32;
        let mqtt = match (&mosquitto, second_bridge) {
            (Some(broker), _) => vec![broker.port()],
            (None, second) => {
                let first = cluster.mqtt_port().parse().expect("a port is a number");
                std::iter::once(first).chain(second).collect()
            }
        };
        let publisher = load.publish(&listed(&mqtt), rate, cluster.scratch().join("publish.log"));
        let (part, burst) = POISON;
        let count = if plan.has_poison() { load.readings / part + burst } else { 0 };
        let poisoner = poison(&cluster, &load, count, plan.time());
        Self {
            cluster,
            database,
            load,
            publisher,
            publishers: 1,
            rate,
            poisoner,
            receiver,
            receiver_port,
            receivers: 1,
            mosquitto,
            mqtt,
            is_doubled: plan.is_doubled(),
            kafka_disk,
            database_disk,
            _scratch: scratch,
        }
    }

    /// Returns what is possible here.
    pub fn means(&self) -> Means {
        Means {
            has_server: self.database.is_some(),
            brokers: self.cluster.kafka.nodes(),
            may_drop: Wall::is_permitted(),
            small_disks: self.kafka_disk.is_some() && self.database.is_some() == self.database_disk.is_some(),
            has_mosquitto: self.mosquitto.is_some(),
            is_doubled: self.is_doubled,
        }
    }

    pub(super) fn mosquitto(&mut self) -> &mut ManagedMosquitto {
        self.mosquitto.as_mut().expect("drawn only where there is one")
    }

    pub(super) fn start_receiver(&mut self) {
        self.receivers += 1;
        self.receiver = receive(&self.cluster, self.receiver_port, self.receivers);
    }

    pub(super) fn ports(&self, link: Link) -> Vec<u16> {
        match link {
            Link::Kafka => self.cluster.kafka.ports(),
            Link::Database => self.database.iter().map(ManagedPostgres::port).collect(),
            Link::Registry => vec![self.cluster.registry_port()],
            Link::Webhook => vec![self.receiver_port],
            Link::Mqtt => self.mqtt.clone(),
        }
    }

    pub(super) fn disk_of_kafka(&self) -> Option<&SmallDisk> {
        self.kafka_disk.as_ref()
    }

    pub(super) fn disk_of_database(&self) -> Option<&SmallDisk> {
        self.database_disk.as_ref()
    }

    /// Starts the brokers that have ended.
    pub(super) fn revive_kafka(&mut self) {
        for index in 0..self.cluster.kafka.nodes() {
            let node = self.cluster.kafka.node(index);
            if !node.is_running() {
                node.restart().expect("a broker starts again on its data");
            }
        }
    }

    /// Starts PostgreSQL again where it does not answer: without space it ends, or waits to be ended.
    pub(super) fn revive_database(&mut self) {
        let Some(server) = &mut self.database else { return };
        let url = server.url();
        let answers = || {
            let mut psql = Command::new("psql");
            psql.args(["--no-psqlrc", "--quiet", "--command", "SELECT 1", &url])
                .env("PGCONNECT_TIMEOUT", "2");
            psql.output().is_ok_and(|output| output.status.success())
        };
        let end = Instant::now() + Duration::from_secs(5);
        while !answers() {
            if Instant::now() > end {
                return server.restart().expect("PostgreSQL starts again on its data");
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// Connects as one of the publishers and goes again: the listener must close the session that it takes
    /// over, and the publisher takes it back.
    pub(super) fn take_over_session(&self) {
        let id = format!("publisher-{}-0", self.load.seed);
        // MQTT 3.1.1, section 3.1: the session is kept (no clean session), keep-alive 30 s.
        let mut packet = vec![0x10, 12 + id.len() as u8];
        packet.extend([0, 4, b'M', b'Q', b'T', b'T', 4, 0, 0, 30, 0, id.len() as u8]);
        packet.extend(id.as_bytes());
        // The first lane of the publisher, which goes to the first port.
        let answered = TcpStream::connect(("127.0.0.1", self.mqtt[0])).and_then(|mut stream| {
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            stream.write_all(&packet)?;
            stream.read_exact(&mut [0; 4])
        });
        // The bridge may be starting again just now: then nothing was taken over.
        drop(answered);
    }

    /// Lets the publishing devices pause, or go on, where they have not ended.
    pub(super) fn hush_publisher(&mut self, pauses: bool) {
        if !self.publisher.has_ended() {
            self.publisher.signal(if pauses { "STOP" } else { "CONT" });
        }
    }

    /// Kills the publishing process and starts another that goes on by the journal.
    pub(super) fn kill_publisher(&mut self) {
        self.stop_publisher();
        self.start_publisher();
    }

    /// Kills the publishing process, which says nothing to anybody.
    pub fn stop_publisher(&mut self) {
        self.publisher.kill();
    }

    /// Starts a publishing process that goes on by the journal.
    pub fn start_publisher(&mut self) {
        self.publishers += 1;
        let log = self.cluster.scratch().join(format!("publish-{}.log", self.publishers));
        self.publisher = self.load.publish(&listed(&self.mqtt), self.rate, log);
    }

    /// Waits for the end of all that is written, starting again what crashes meanwhile, and returns the
    /// publisher's report.
    ///
    /// # Panics
    /// When a writer does not end in time, or not all of its records were acknowledged.
    pub fn finish(&mut self) -> Value {
        let limit = self.load.deadline;
        wait_for("the publisher's end", limit, || {
            self.cluster.start_what_crashed();
            self.publisher.has_ended().then_some(())
        });
        wait_for("the end of the poison", limit, || self.poisoner.has_ended().then_some(()));
        let status = self.poisoner.status().expect("it has ended");
        assert!(status.success(), "poison.py: {}", self.poisoner.output());
        let text = self.publisher.output();
        let report = text.lines().last().and_then(|line| serde_json::from_str::<Value>(line).ok());
        let report = report.unwrap_or_else(|| panic!("no report of the publisher:\n{text}"));
        assert!(report["sent"] == report["acknowledged"], "not all acknowledged:\n{text}");
        report
    }

    /// Compares Kafka and store with what the journals say, starting again what crashes meanwhile: what is on its
    /// way is waited for.
    ///
    /// # Errors
    /// The differences that the oracle lists.
    pub fn compare(&mut self, extra: &[&str]) -> Result<(), String> {
        let kafka = self.cluster.kafka.bootstrap();
        let poison = poison_journal(&self.cluster);
        let webhook = receiver_journal(&self.cluster);
        let arguments = ["--threshold", "90", "--only-rule", "--redelivery", "--deadline", "240"];
        let arguments = [&arguments[..], &["--poison", &poison, "--webhook", &webhook]].concat();
        let database = self.cluster.database().to_owned();
        let arguments = [&arguments[..], extra].concat();
        self.load.compare_while(&kafka, &database, &arguments, || self.cluster.start_what_crashed())
    }
}

fn listed(ports: &[u16]) -> String {
    ports.iter().map(u16::to_string).collect::<Vec<_>>().join(",")
}

fn receiver_journal(cluster: &Cluster) -> String {
    cluster.scratch().join("receiver.journal").display().to_string()
}

/// Starts a webhook that goes on with the journal of the one before.
fn receive(cluster: &Cluster, port: u16, number: u32) -> Process {
    let mut command = Command::new(python());
    command.arg(root().join("tests/python/receive.py"));
    command.args(["--port", &port.to_string(), "--journal", &receiver_journal(cluster)]);
    Process::start(&command, cluster.scratch().join(format!("receive-{number}.log")))
}

/// Returns where [`poison`] keeps its journal.
pub fn poison_journal(cluster: &Cluster) -> String {
    cluster.scratch().join("poison.journal").display().to_string()
}

/// Starts a foreign program that writes so many records into Kafka that nobody can read, over about `time`.
pub fn poison(cluster: &Cluster, load: &Load, count: u64, time: Duration) -> Process {
    let rate = (load.readings / POISON.0) as f64 / time.as_secs_f64();
    let mut command = Command::new(python());
    command.arg(root().join("tests/python/poison.py"));
    command.args(["--kafka", &cluster.kafka.bootstrap(), "--registry", cluster.registry()]);
    command.args(["--seed", &load.seed.to_string(), "--count", &count.to_string()]);
    command.args(["--rate", &format!("{rate:.2}"), "--deadline", &load.deadline.as_secs().to_string()]);
    command.args(["--journal", &poison_journal(cluster)]);
    Process::start(&command, cluster.scratch().join("poison.log"))
}
