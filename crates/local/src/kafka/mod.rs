//! A real Apache Kafka of one node, as a child of this process.

mod archive;
mod cluster;
mod probe;

pub use cluster::KafkaCluster;

use crate::artifacts::{self, Notice};
use crate::child::{Fault, Program, Supervised, run_to_end, words};
use crate::error::LocalError;
use crate::ports;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rustix::process::Signal;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// How long a start may take; 3.5 s is usual, a loaded machine with a long log to recover needs more.
const START_LIMIT: Duration = Duration::from_secs(90);

/// How long an orderly stop may take before the broker is killed.
const STOP_LIMIT: Duration = Duration::from_secs(20);

/// How often a start is repeated with other ports, where somebody took the free port in between.
const START_ATTEMPTS: usize = 3;

/// How a managed Kafka is made.
#[derive(Clone, Debug)]
pub struct KafkaOptions {
    /// Its directory; data of an earlier start there is found again.
    pub data_dir: PathBuf,
    /// The port of the listener on 127.0.0.1, or `None` for a free one.
    pub port: Option<u16>,
    /// The JVM's heap in MB; the process takes about 200 MB more.
    pub heap_mb: u32,
    /// How the JVM compiles.
    pub compile: Compile,
    /// Broker settings in place of or beside the ordinary ones.
    pub settings: Vec<(String, String)>,
    /// Its place in a cluster of several nodes.
    seat: Option<Seat>,
}

/// One node's place in a cluster.
#[derive(Clone, Debug)]
struct Seat {
    cluster_id: String,
    node: u32,
    /// Port of the controller of each node, that of node 1 first.
    controllers: Vec<u16>,
}

/// How the broker's JVM compiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compile {
    /// Quickly and not well: most code of a start runs once, and compiling it well costs more than running it.
    Quick,
    /// Well, for measurements and sustained load.
    Full,
}

impl KafkaOptions {
    /// Makes options for a directory: a free port, 512 MB of heap, quick compilation, ordinary settings.
    pub fn new(data_dir: impl Into<PathBuf>) -> Self {
        Self {
            data_dir: data_dir.into(),
            port: None,
            heap_mb: 512,
            compile: Compile::Quick,
            settings: Vec::new(),
            seat: None,
        }
    }
}

/// A running broker. Dropping it kills it; [`ManagedKafka::stop`] ends it in order.
#[derive(Debug)]
pub struct ManagedKafka {
    options: KafkaOptions,
    jars: PathBuf,
    /// Of the JVM's classes; the broker that makes it has none.
    archive: Option<PathBuf>,
    port: u16,
    child: Option<Supervised>,
}

impl ManagedKafka {
    /// Starts a broker and returns when it serves its clients. The first start of a directory formats it;
    /// the first on a machine downloads Kafka and says so through `notice`.
    ///
    /// # Errors
    /// [`LocalError::Missing`] without Java or Maven, [`LocalError::PortTaken`], [`LocalError::InUse`] when
    /// another process runs this directory's broker, [`LocalError::Failed`] with the end of the log.
    pub fn start(options: KafkaOptions, notice: Notice<'_>) -> Result<Self, LocalError> {
        artifacts::java()?;
        let jars = artifacts::kafka(notice)?;
        let archive = archive::archive(&jars, notice)?;
        let mut attempt = 1;
        loop {
            let mut kafka = Self::prepare(options.clone(), jars.clone(), Some(archive.clone()))?;
            match kafka.launch(&[]) {
                Ok(()) => return Ok(kafka),
                Err(LocalError::Failed { tail, .. })
                    if tail.contains("Address already in use") && attempt < START_ATTEMPTS =>
                {
                    attempt += 1;
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn prepare(options: KafkaOptions, jars: PathBuf, archive: Option<PathBuf>) -> Result<Self, LocalError> {
        let port = ports::wanted_or_free("Kafka", options.port)?;
        Ok(Self { options, jars, archive, port, child: None })
    }

    /// Returns the bootstrap servers.
    pub fn bootstrap(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Returns the port of the listener.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Returns the broker's process id, or `None` while it does not run.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Supervised::pid)
    }

    /// Returns the broker's log file: warnings and errors.
    pub fn log_file(&self) -> PathBuf {
        self.options.data_dir.join("kafka.log")
    }

    /// Says whether the broker's process is there.
    pub fn is_running(&mut self) -> bool {
        self.child.as_mut().is_some_and(Supervised::is_running)
    }

    /// Does a fault to the broker. After [`Fault::Kill`] go on with [`ManagedKafka::restart`].
    pub fn fault(&mut self, fault: Fault) {
        if let Some(child) = &self.child {
            child.fault(fault);
        }
        if fault == Fault::Kill {
            self.child = None;
        }
    }

    /// Starts the broker again on the same port and data, ending it in order before where it runs.
    ///
    /// # Errors
    /// As [`ManagedKafka::start`].
    pub fn restart(&mut self) -> Result<(), LocalError> {
        if let Some(child) = self.child.take() {
            child.stop(Signal::TERM, STOP_LIMIT)?;
        }
        self.launch(&[])
    }

    /// Ends the broker in order, which takes about a second; after 20 s it is killed.
    ///
    /// # Errors
    /// When the process cannot be waited for.
    pub fn stop(mut self) -> Result<(), LocalError> {
        match self.child.take() {
            Some(child) => child.stop(Signal::TERM, STOP_LIMIT).map(drop),
            None => Ok(()),
        }
    }

    /// Returns a command that runs one of Kafka's own tools, for instance
    /// `org.apache.kafka.tools.TopicCommand`, without its arguments.
    ///
    /// # Errors
    /// [`LocalError::Missing`] when Java has gone.
    pub fn tool(&self, class: &str) -> Result<Command, LocalError> {
        let mut command = Command::new(artifacts::java()?);
        command.args(["-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xmx256m", "-cp"]);
        command.arg(self.jars.join("*")).arg(class);
        Ok(command)
    }

    fn launch(&mut self, flags: &[String]) -> Result<(), LocalError> {
        let dir = self.options.data_dir.clone();
        std::fs::create_dir_all(&dir).map_err(LocalError::io("create", &dir))?;
        let dir = dir.canonicalize().map_err(LocalError::io("find", &dir))?;
        let config = dir.join("server.properties");
        std::fs::write(&config, self.properties(&dir)?).map_err(LocalError::io("write", &config))?;
        let logging = dir.join("log4j2.properties");
        std::fs::write(&logging, include_str!("log4j2.properties"))
            .map_err(LocalError::io("write", &logging))?;
        if !dir.join("data/meta.properties").exists() {
            self.format(&dir, &config)?;
        }

        let mut flags = flags.to_vec();
        flags.extend(self.archive.as_ref().map(|file| format!("-XX:SharedArchiveFile={}", file.display())));
        if self.options.compile == Compile::Quick {
            flags.push("-XX:TieredStopAtLevel=1".to_owned());
        }
        let jvm = [
            artifacts::java()?.display().to_string(),
            format!("-Xmx{}m", self.options.heap_mb),
            // One node on one machine: the small collector saves 100 MB and its pauses are a few ms.
            "-XX:+UseSerialGC".to_owned(),
            "-XX:+ExitOnOutOfMemoryError".to_owned(),
            "-Djava.awt.headless=true".to_owned(),
            format!("-Dthroughline.log={}", dir.join("kafka.log").display()),
            format!("-Dlog4j2.configurationFile={}", logging.display()),
        ];
        let class = ["-cp".to_owned(), self.jars.join("*").display().to_string(), "kafka.Kafka".to_owned()];
        let command = words(jvm.into_iter().chain(flags).chain(class).chain([config.display().to_string()]));
        let program = Program { name: "kafka", dir: &dir, command, env: Vec::new(), user: None };
        let mut child = Supervised::spawn(program)?;
        let port = self.port;
        child.wait_ready(START_LIMIT, || probe::serves(port))?;
        self.child = Some(child);
        Ok(())
    }

    fn format(&self, dir: &Path, config: &Path) -> Result<(), LocalError> {
        let cluster_id = self.options.seat.as_ref().map_or_else(new_cluster_id, |s| s.cluster_id.clone());
        let mut tool = self.tool("kafka.tools.StorageTool")?;
        tool.args(["format", "-t", &cluster_id, "-c"]).arg(config);
        run_to_end("kafka", &dir.join("kafka.log"), &mut tool)
    }

    /// Writes the broker's configuration. One copy of everything unless it belongs to a cluster.
    fn properties(&self, dir: &Path) -> Result<String, LocalError> {
        let port = self.port;
        let (node, controllers) = match &self.options.seat {
            Some(seat) => (seat.node, seat.controllers.clone()),
            None => (1, vec![ports::free()?]),
        };
        let controller_port = controllers[node as usize - 1];
        let voters = controllers.iter().zip(1..).map(|(port, node)| format!("{node}@127.0.0.1:{port}"));
        let mut settings: Vec<(String, String)> = [
            ("process.roles", "broker,controller".to_owned()),
            ("node.id", node.to_string()),
            ("controller.quorum.voters", voters.collect::<Vec<_>>().join(",")),
            ("controller.listener.names", "CONTROLLER".to_owned()),
            ("listeners", format!("PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}")),
            ("advertised.listeners", format!("PLAINTEXT://127.0.0.1:{port}")),
            ("log.dirs", dir.join("data").display().to_string()),
        ]
        .map(|(key, value)| (key.to_owned(), value))
        .into();
        settings.extend(ORDINARY.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())));
        for (key, value) in &self.options.settings {
            settings.retain(|(known, _)| known != key);
            settings.push((key.clone(), value.clone()));
        }
        Ok(settings.into_iter().map(|(key, value)| format!("{key}={value}\n")).collect())
    }
}

fn new_cluster_id() -> String {
    URL_SAFE_NO_PAD.encode(uuid::Uuid::now_v7().as_bytes())
}

/// Settings that every managed broker has unless told otherwise.
const ORDINARY: &[(&str, &str)] = &[
    // Topics are made by the catalog, never by a typing error.
    ("auto.create.topics.enable", "false"),
    ("num.partitions", "1"),
    ("default.replication.factor", "1"),
    // Retention and the time index shall not depend on the clocks of devices.
    ("log.message.timestamp.type", "LogAppendTime"),
    // One copy of the internal topics, with few partitions: each costs files and start-up time.
    ("offsets.topic.replication.factor", "1"),
    ("offsets.topic.num.partitions", "10"),
    ("transaction.state.log.replication.factor", "1"),
    ("transaction.state.log.min.isr", "1"),
    ("transaction.state.log.num.partitions", "10"),
    ("share.coordinator.state.topic.replication.factor", "1"),
    ("share.coordinator.state.topic.min.isr", "1"),
    // A platform that was off for a holiday goes on where it stopped: a year, in minutes.
    ("offsets.retention.minutes", "525600"),
    // Members of KIP-848 groups are known to be gone after 6 s instead of 45 s.
    ("group.initial.rebalance.delay.ms", "0"),
    ("group.consumer.min.session.timeout.ms", "6000"),
    ("group.consumer.session.timeout.ms", "6000"),
    ("group.consumer.min.heartbeat.interval.ms", "1000"),
    ("group.consumer.heartbeat.interval.ms", "1000"),
    // Open transactions of killed processes are looked for every second instead of every ten.
    ("transaction.abort.timed.out.transaction.cleanup.interval.ms", "1000"),
    // The cleaner's default of 128 MB would be a quarter of the heap.
    ("log.cleaner.dedupe.buffer.size", "8388608"),
    ("num.network.threads", "2"),
    ("num.io.threads", "4"),
];
