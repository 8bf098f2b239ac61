//! The run under faults that is part of `make test`: short, and at moments that it waits for instead of hoping to
//! meet them, so that a build that is broken on purpose (`make sabotage`) fails it every time.

use crate::chaos::{Lock, Proxy, Random, lock, poison, poison_journal};
use crate::cluster::{Cluster, ROLES};
use crate::{Load, Process, published, root, said, sqlite, succeed, wait_for};
use std::time::Duration;
use throughline_local::child::Fault;
use throughline_local::kafka::KafkaOptions;
use throughline_local::postgres::{ManagedPostgres, PostgresOptions};
use throughline_local::scratch_dir;

/// A queue that the publisher's open publishes fill while Kafka hangs.
const QUEUE: f64 = 300.0;
const SMALL_QUEUE: (&str, &str) = ("THROUGHLINE_KAFKA__QUEUE_RECORDS_MAX", "300");
/// So that a hung member's partitions are taken over before what it waits for times out (10 s).
const SHORT_SESSION: [(&str, &str); 4] = [
    ("group.consumer.min.session.timeout.ms", "3000"),
    ("group.consumer.session.timeout.ms", "3000"),
    ("group.consumer.min.heartbeat.interval.ms", "500"),
    ("group.consumer.heartbeat.interval.ms", "500"),
];
/// Distinct readings, enough for a load of about 85 s at [`RATE`]: it flows through every moment.
const READINGS: u64 = 50_000;
/// Publishes a second.
const RATE: u32 = 700;
/// Records that nobody can read, one in a hundred of the readings, and the burst into one partition.
const POISON: u64 = READINGS / 100 + 1_000;
/// SIGKILLs of each role at random moments, after those at chosen ones.
const KILLS: usize = 3;
const SOON: Duration = Duration::from_secs(90);
/// How long a role that works on may go without a turn; who is held up for longer waits for something.
const TURNS_WITHIN_S: f64 = 1.0;
/// Half of what a build that tears a write apart waits between the two halves.
const BETWEEN_THE_HALVES: Duration = Duration::from_millis(250);

/// One run on a store.
pub struct ShortRun {
    cluster: Cluster,
    database: Option<ManagedPostgres>,
    load: Load,
    /// Between the devices and the bridge.
    link: Proxy,
    publisher: Process,
    poisoner: Process,
    _scratch: tempfile::TempDir,
}

impl ShortRun {
    /// Runs to the end and compares.
    ///
    /// # Errors
    /// The differences that the oracle lists.
    ///
    /// # Panics
    /// When a part does not start, a moment does not come, or not everything was acknowledged.
    pub fn run(on_postgresql: bool, seed: u64) -> Result<(), String> {
        let mut run = Self::start(on_postgresql, seed);
        run.full_queue_is_killed();
        run.cluster.add("load_warehouse", "guest");
        // Twice: a store's call that is held up for longer than its time-out lets go of its rows.
        run.hung_loader_comes_back_late();
        run.hung_loader_comes_back_late();
        run.loader_is_killed_at_work();
        run.dependencies_go();
        run.roles_are_killed(seed);
        run.end()
    }

    fn start(on_postgresql: bool, seed: u64) -> Self {
        let scratch = scratch_dir().expect("a temporary directory can be made");
        let database = on_postgresql.then(|| {
            let options = PostgresOptions::new(scratch.path().join("pg"));
            ManagedPostgres::start(options).expect("PostgreSQL starts")
        });
        let url = database.as_ref().map(ManagedPostgres::url);
        let directory = tempfile::tempdir().expect("a temporary directory can be made");
        let mut options = KafkaOptions::new(directory.path().join("kafka"));
        options.settings = SHORT_SESSION.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        let mut cluster = Cluster::start_on(directory, (&options, 1), url.as_deref(), &[SMALL_QUEUE]);
        cluster.add_roles();
        let rule = root().join("demo/rules/demo-overheat.toml").display().to_string();
        let applied = cluster.command(&["rules", "apply", &rule]);
        assert!(applied.status.success(), "{}", said(&applied));
        cluster.wait_for_bridge();
        let mut load = Load::new(seed, READINGS, 400);
        load.mix = true;
        let link = Proxy::start(cluster.mqtt_port().parse().expect("a port is a number"));
        let publisher = load.publish(&link.port().to_string(), RATE, cluster.scratch().join("publish.log"));
        let poisoner = poison(&cluster, &load, POISON, Duration::from_secs(60));
        let run = Self { cluster, database, load, link, publisher, poisoner, _scratch: scratch };
        run.wait_for_new_rows();
        run
    }

    fn rows(&self) -> u64 {
        let query = "SELECT count(*) FROM reading";
        let found = match &self.database {
            Some(server) => succeed("psql", &["-d", &server.url(), "-Atc", query]),
            None => sqlite(self.cluster.database(), query),
        };
        found.trim().parse().expect("a count")
    }

    fn wait_for_new_rows(&self) {
        let before = self.rows();
        wait_for("new rows", SOON, || (self.rows() > before).then_some(()));
    }

    fn assert_load(&mut self) {
        assert!(!self.publisher.has_ended(), "the load ended too early:\n{}", self.publisher.output());
    }

    /// Kafka hangs until the bridge's queue is full; then the bridge is killed with all that it holds.
    fn full_queue_is_killed(&mut self) {
        self.cluster.kafka.fault(Fault::Stop);
        wait_for("a full queue", SOON, || {
            let buffer = ("buffer", "records_in_flight");
            (self.cluster.metric("bridge", "buffer_messages", buffer)? >= QUEUE).then_some(())
        });
        // Here a build that drops what does not fit acknowledges it.
        std::thread::sleep(Duration::from_secs(1));
        self.cluster.kill_and_restart_instance("bridge", "0");
        self.cluster.kafka.fault(Fault::Continue);
        self.wait_for_new_rows();
        self.assert_load();
    }

    /// Holds the store until the first loader waits for it with rows in its hand.
    fn hold_up_loader(&self) -> Lock {
        // Who hung says at first what it had: then both say that they have it.
        wait_for("partitions of both loaders", SOON, || {
            let [first, second] = ["0", "guest"].map(|instance| self.active_partitions(instance));
            let are_shared = !first.is_empty() && !second.is_empty();
            (are_shared && first.iter().all(|partition| !second.contains(partition))).then_some(())
        });
        let lock = lock(self.cluster.database());
        wait_for("a loader that waits for the store", SOON, || {
            let status = self.cluster.status_of("load_warehouse", "0")?;
            let idle = status["roles"]["load_warehouse"]["last_turn_seconds"].as_f64()?;
            (idle > TURNS_WITHIN_S).then_some(())
        });
        lock
    }

    fn active_partitions(&self, instance: &str) -> Vec<String> {
        let status = self.cluster.status_of("load_warehouse", instance).unwrap_or_default();
        let partitions = status["roles"]["load_warehouse"]["notes"]["partitions"].as_array();
        let active = partitions.into_iter().flatten().filter(|p| p["active"] == true);
        active.map(|p| p["partition"].to_string()).collect()
    }

    /// A loader hangs with rows in its hand until another has its partitions, and goes on where it stood.
    fn hung_loader_comes_back_late(&mut self) {
        let lock = self.hold_up_loader();
        let had = self.active_partitions("0");
        self.cluster.signal("load_warehouse", "STOP");
        drop(lock);
        wait_for("the other loader to take over", SOON, || {
            let has = self.active_partitions("guest");
            had.iter().all(|partition| has.contains(partition)).then_some(())
        });
        // Whoever of the two writes first, the other one has the same rows in its hand.
        self.cluster.signal("load_warehouse", "CONT");
        self.assert_load();
    }

    /// Both loaders are killed just after the store takes rows again that they held.
    fn loader_is_killed_at_work(&mut self) {
        drop(self.hold_up_loader());
        std::thread::sleep(BETWEEN_THE_HALVES);
        self.cluster.kill_and_restart_instance("load_warehouse", "0");
        self.cluster.kill_and_restart_instance("load_warehouse", "guest");
        self.assert_load();
    }

    /// PostgreSQL is killed, the registry goes away, packets of devices are dropped.
    fn dependencies_go(&mut self) {
        if let Some(server) = &mut self.database {
            server.fault(Fault::Kill);
            std::thread::sleep(Duration::from_secs(2));
            server.restart().expect("PostgreSQL starts again on its data");
        }
        self.cluster.set_registry(true);
        // Who starts meanwhile needs it.
        self.cluster.kill_and_restart_instance("evaluate_rules", "0");
        self.cluster.kill_and_restart_instance("bridge_data", "0");
        std::thread::sleep(Duration::from_secs(2));
        self.cluster.set_registry(false);
        self.link.hold(true);
        std::thread::sleep(Duration::from_secs(3));
        self.link.hold(false);
    }

    fn roles_are_killed(&mut self, seed: u64) {
        let mut victims: Vec<usize> = (0..ROLES.len()).flat_map(|role| [role; KILLS]).collect();
        let mut random = Random(seed);
        while !victims.is_empty() {
            let pick = random.between(0, victims.len() as u64 - 1) as usize;
            // Some kills hit a role that is still starting.
            std::thread::sleep(Duration::from_millis(random.between(200, 1_500)));
            self.cluster.kill_and_restart(victims.swap_remove(pick));
        }
    }

    fn end(self) -> Result<(), String> {
        let Self { mut cluster, load, publisher, mut poisoner, database, link, _scratch } = self;
        published(publisher, Duration::from_secs(240));
        drop(link);
        wait_for("the end of the poison", SOON, || poisoner.has_ended().then_some(()));
        let status = poisoner.status().expect("it has ended");
        assert!(status.success(), "poison.py: {}", poisoner.output());
        let (kafka, store) = (cluster.kafka.bootstrap(), cluster.database().to_owned());
        let poison = poison_journal(&cluster);
        let arguments =
            ["--threshold", "90", "--only-rule", "--redelivery", "--deadline", "90", "--poison", &poison];
        let compared = load.compare_while(&kafka, &store, &arguments, || cluster.start_what_crashed());
        drop(database);
        compared
    }
}
