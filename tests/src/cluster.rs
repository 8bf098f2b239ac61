//! Every role as a process of its own against shared services, as in production, so that each can be
//! killed alone.

use crate::{Process, binary, said, succeed, wait_for};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use throughline_kafka::{KafkaConfig, RegistryClient, RegistryConfig};
use throughline_local::kafka::{KafkaCluster, KafkaOptions};
use throughline_local::ports;
use throughline_local::registry::EmbeddedRegistry;

/// The signals' numbers on every system that the platform runs on.
const SIGABRT: i32 = 6;
const SIGSEGV: i32 = 11;

/// Every role of the platform that needs nothing but its services.
pub const ROLES: [&str; 8] = [
    "bridge",
    "evaluate_rules",
    "update_twin",
    "bridge_data",
    "load_warehouse",
    "project_twins",
    "reprocess_dead_letters",
    "watch",
];

/// Services and one process a role.
pub struct Cluster {
    roles: Vec<Role>,
    /// Kept alive; its brokers can be stopped and killed.
    pub kafka: KafkaCluster,
    /// Absent while it is away.
    registry: Option<EmbeddedRegistry>,
    registry_url: String,
    registry_listen: SocketAddr,
    database: String,
    mqtt_port: u16,
    settings: Settings,
    directory: tempfile::TempDir,
    crashes: u64,
}

struct Role {
    name: String,
    instance: String,
    starts: u32,
    process: Process,
    http: u16,
    settings: Settings,
}

/// Variables of the environment.
type Settings = Vec<(String, String)>;

fn owned(settings: &[(&str, &str)]) -> Settings {
    settings.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect()
}

impl Cluster {
    /// Starts Kafka and a registry, applies the topics and starts every role on `database`.
    ///
    /// # Panics
    /// When something does not start.
    pub fn start(database: Option<&str>) -> Self {
        Self::start_with(database, &[])
    }

    /// As [`Cluster::start`], every role with further variables of the environment.
    ///
    /// # Panics
    /// As [`Cluster::start`].
    pub fn start_with(database: Option<&str>, settings: &[(&str, &str)]) -> Self {
        let mut cluster = Self::without_roles(database, settings);
        cluster.add_roles();
        cluster
    }

    /// As [`Cluster::start_with`], without any role: [`Cluster::add`] starts those that matter.
    ///
    /// # Panics
    /// As [`Cluster::start`].
    pub fn without_roles(database: Option<&str>, settings: &[(&str, &str)]) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory can be made");
        let options = KafkaOptions::new(directory.path().join("kafka"));
        Self::start_on(directory, (&options, 1), database, settings)
    }

    /// As [`Cluster::without_roles`], on so many brokers with these options, everything in `directory`.
    ///
    /// # Panics
    /// As [`Cluster::start`].
    pub fn start_on(
        directory: tempfile::TempDir,
        (options, nodes): (&KafkaOptions, u32),
        database: Option<&str>,
        settings: &[(&str, &str)],
    ) -> Self {
        let kafka = KafkaCluster::start(options, nodes, &mut |_| {}).expect("Kafka starts");
        let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, ports::free().expect("a free port")));
        let registry = EmbeddedRegistry::start(listen, &KafkaConfig::new(kafka.bootstrap()));
        let registry = registry.expect("the registry starts");
        let database = database.map_or_else(
            || format!("sqlite://{}", directory.path().join("warehouse.db").display()),
            str::to_owned,
        );
        let mqtt_port = ports::free().expect("a free port");
        let cluster = Self {
            roles: Vec::new(),
            kafka,
            registry_url: registry.url(),
            registry: Some(registry),
            registry_listen: listen,
            database,
            mqtt_port,
            settings: owned(settings),
            directory,
            crashes: 0,
        };
        let applied = cluster.command(&["topics", "apply"]);
        assert!(applied.status.success(), "topics apply: {}", said(&applied));
        cluster
    }

    /// Starts one instance of every role.
    pub fn add_roles(&mut self) {
        for name in ROLES {
            self.add(name, "0");
        }
    }

    /// Starts a further instance of a role.
    pub fn add(&mut self, name: &str, instance: &str) {
        self.add_with(name, instance, &[]);
    }

    /// As [`Cluster::add`], with further variables of the environment, also when it is started again.
    pub fn add_with(&mut self, name: &str, instance: &str, settings: &[(&str, &str)]) {
        let settings = owned(settings);
        let (process, http) = self.spawn(name, instance, 1, &settings);
        let (name, instance) = (name.to_owned(), instance.to_owned());
        self.roles.push(Role { name, instance, starts: 1, process, http, settings });
    }

    fn configure(&self, command: &mut Command) {
        command
            .env("THROUGHLINE_KAFKA__BOOTSTRAP", self.kafka.bootstrap())
            .env("THROUGHLINE_REGISTRY__URL", &self.registry_url)
            .env("THROUGHLINE_DATABASE__URL", &self.database)
            .env("THROUGHLINE_MQTT__LISTEN", format!("127.0.0.1:{}", self.mqtt_port))
            .env("THROUGHLINE_DATA_DIR", self.directory.path().join("none"))
            .envs(self.settings.iter().map(|(name, value)| (name, value)));
    }

    fn spawn(&self, name: &str, instance: &str, start: u32, settings: &Settings) -> (Process, u16) {
        let port = ports::free().expect("a free port");
        let mut command = Command::new(binary());
        self.configure(&mut command);
        command.envs(settings.iter().map(|(name, value)| (name, value)));
        command.args(["run", name, "--instance", instance]);
        command.env("THROUGHLINE_HTTP__LISTEN", format!("127.0.0.1:{port}"));
        (Process::start(&command, self.log(name, instance, start)), port)
    }

    fn log(&self, name: &str, instance: &str, start: u32) -> PathBuf {
        self.directory.path().join(format!("{name}-{instance}-{start}.log"))
    }

    /// Kills a process of `role` with SIGKILL and starts it again under the same name.
    ///
    /// # Panics
    /// When there is no such role.
    pub fn kill_and_restart(&mut self, role: usize) {
        let index = role % self.roles.len();
        self.roles[index].process.kill();
        self.start_again(index);
    }

    /// Kills one instance of a role with SIGKILL and starts it again.
    ///
    /// # Panics
    /// When it does not run.
    pub fn kill_and_restart_instance(&mut self, name: &str, instance: &str) {
        let index = self.roles.iter().position(|r| r.name == name && r.instance == instance);
        self.kill_and_restart(index.expect("the instance runs"));
    }

    /// Starts every process again that the Kafka client library ended, as Kubernetes does, and says so: by
    /// SIGSEGV, which only C code can meet, by one of its assertions, or by a call that does not come back.
    ///
    /// # Panics
    /// When a process ended by itself in any other way.
    #[expect(clippy::print_stderr, reason = "a test that met it should not hide it")]
    pub fn start_what_crashed(&mut self) {
        for index in 0..self.roles.len() {
            let role = &mut self.roles[index];
            let Some(status) = role.process.status() else { continue };
            let (name, output) = (&role.name, role.process.output());
            let is_said =
                output.contains("rdkafka_") || output.contains("the process ends, to be started again");
            let is_theirs = status.signal() == Some(SIGSEGV) || (status.signal() == Some(SIGABRT) && is_said);
            assert!(is_theirs, "{name} ended: {status}\n{output}");
            let said = output
                .lines()
                .rev()
                .find(|line| line.contains("rdkafka_") || line.contains("the process ends"));
            eprintln!("{name} ended in librdkafka ({status}) and is started again: {}", said.unwrap_or("-"));
            self.crashes += 1;
            self.start_again(index);
        }
    }

    /// Returns how many processes [`Cluster::start_what_crashed`] had to start.
    pub fn crashes(&self) -> u64 {
        self.crashes
    }

    fn start_again(&mut self, index: usize) {
        let role = &mut self.roles[index];
        role.starts += 1;
        let (name, instance, starts) = (role.name.clone(), role.instance.clone(), role.starts);
        let settings = role.settings.clone();
        let (process, http) = self.spawn(&name, &instance, starts, &settings);
        let role = &mut self.roles[index];
        (role.process, role.http) = (process, http);
    }

    /// Sends a signal to the first process of a role.
    ///
    /// # Panics
    /// When there is no such role or its process is gone.
    pub fn signal(&self, name: &str, signal: &str) {
        let role = self.roles.iter().find(|role| role.name == name).expect("the role runs");
        role.process.signal(signal);
    }

    /// Ends a role's first process with SIGKILL.
    ///
    /// # Panics
    /// When there is no such role.
    pub fn kill(&mut self, name: &str) {
        let index = self.roles.iter().position(|role| role.name == name);
        self.roles.remove(index.expect("the role runs")).process.kill();
    }

    /// Returns the memory of a role's first process in MiB: what it takes now, and the most it took.
    ///
    /// # Panics
    /// When there is no such role or the system does not tell.
    pub fn memory_mib(&self, name: &str) -> (f64, f64) {
        let role = self.roles.iter().find(|role| role.name == name).expect("the role runs");
        let status = std::fs::read_to_string(format!("/proc/{}/status", role.process.pid()));
        let status = status.expect("the system tells what a process takes");
        let mib = |field: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(field)).expect("it is told");
            line.trim().trim_end_matches(" kB").parse::<f64>().expect("a number of KiB") / 1024.0
        };
        (mib("VmRSS:"), mib("VmHWM:"))
    }

    /// Returns where the registry answers.
    pub fn registry_url(&self) -> &str {
        &self.registry_url
    }

    /// Returns what the first process of a role has said.
    ///
    /// # Panics
    /// When there is no such role.
    pub fn output(&self, name: &str) -> String {
        self.roles.iter().find(|role| role.name == name).expect("the role runs").process.output()
    }

    /// Ends one instance of a role with SIGTERM and asserts that it drains.
    ///
    /// # Panics
    /// As [`Cluster::stop`].
    pub fn remove(&mut self, name: &str, instance: &str) {
        let index = self.roles.iter().position(|r| r.name == name && r.instance == instance);
        let mut role = self.roles.remove(index.expect("the instance runs"));
        let code = role.process.terminate(Duration::from_secs(30));
        assert_eq!(code, Some(0), "{name} {instance}: {}", role.process.output());
    }

    /// Asks every process of some roles to end, all at once, and returns for each name how it ended.
    ///
    /// # Panics
    /// When one does not end within `limit`.
    pub fn end_within(&mut self, names: &[&str], limit: Duration) -> Vec<(String, Option<i32>)> {
        let (mut gone, kept): (Vec<Role>, Vec<Role>) =
            std::mem::take(&mut self.roles).into_iter().partition(|r| names.contains(&&*r.name));
        self.roles = kept;
        gone.iter().for_each(|role| role.process.signal("TERM"));
        let end = Instant::now() + limit;
        let ended = gone.iter_mut().map(|role| {
            let left = end.saturating_duration_since(Instant::now());
            let status = wait_for(&format!("the end of {}", role.name), left, || role.process.status());
            (role.name.clone(), status.code())
        });
        ended.collect()
    }

    /// Takes the registry away, or brings it back at the same address.
    ///
    /// # Panics
    /// When it does not start again.
    pub fn set_registry(&mut self, away: bool) {
        self.registry = None;
        if !away {
            let started =
                EmbeddedRegistry::start(self.registry_listen, &KafkaConfig::new(self.kafka.bootstrap()));
            self.registry = Some(started.expect("the registry starts again"));
        }
    }

    /// Ends every process of a role with SIGTERM and asserts that it drains.
    ///
    /// # Panics
    /// When it does not end in time or not with exit code 0.
    pub fn stop(&mut self, name: &str) {
        let (mut gone, kept): (Vec<Role>, Vec<Role>) =
            std::mem::take(&mut self.roles).into_iter().partition(|r| r.name == name);
        self.roles = kept;
        for role in &mut gone {
            let code = role.process.terminate(Duration::from_secs(30));
            assert_eq!(code, Some(0), "{name}: {}", role.process.output());
        }
    }

    /// Runs a `throughline` command against the cluster.
    ///
    /// # Panics
    /// When the binary cannot be run.
    pub fn command(&self, args: &[&str]) -> std::process::Output {
        let mut command = Command::new(binary());
        self.configure(&mut command);
        command.args(args).stdin(Stdio::null()).output().expect("the binary runs")
    }

    /// Says whether a topic has no record that a reader could get.
    pub fn is_emptied(&self, topic: &str) -> bool {
        let kafka = self.kafka.bootstrap();
        let args = ["-b", &kafka, "-C", "-t", topic, "-o", "beginning", "-e", "-q", "-c", "1", "-f", "%o\n"];
        succeed("kcat", &args).is_empty()
    }

    /// Waits until the bridge takes connections.
    ///
    /// # Panics
    /// When it does not within a minute.
    pub fn wait_for_bridge(&self) {
        wait_for("the bridge", Duration::from_secs(60), || {
            std::net::TcpStream::connect(("127.0.0.1", self.mqtt_port)).ok()
        });
    }

    /// Waits until the bridge is subscribed at an existing broker, which drops what nobody is subscribed to.
    ///
    /// # Panics
    /// When it is not within a minute.
    pub fn wait_for_subscription(&self) {
        let role = self.roles.iter().find(|role| role.name == "bridge").expect("the role runs");
        wait_for("the bridge's subscription", Duration::from_secs(60), || {
            let status: serde_json::Value = serde_json::from_str(&get(role.http, "/v1/status").ok()?).ok()?;
            (status["roles"]["bridge"]["dependencies"]["mqtt_broker"]["up"] == true).then_some(())
        });
    }

    /// Returns the registry's port.
    pub fn registry_port(&self) -> u16 {
        self.registry_listen.port()
    }

    /// Returns the port of the bridge.
    pub fn mqtt_port(&self) -> String {
        self.mqtt_port.to_string()
    }

    /// Returns the registry's address.
    pub fn registry(&self) -> &str {
        &self.registry_url
    }

    /// Returns the database's address.
    pub fn database(&self) -> &str {
        &self.database
    }

    /// Returns a directory for files of the test.
    pub fn scratch(&self) -> &std::path::Path {
        self.directory.path()
    }

    /// Returns the metrics of the first process of a role.
    ///
    /// # Panics
    /// When there is no such role or it does not answer.
    pub fn metrics(&self, name: &str) -> String {
        let role = self.roles.iter().find(|role| role.name == name).expect("the role runs");
        get(role.http, "/metrics").expect("it serves its metrics")
    }

    /// Returns the value of the first series of a metric with a label; `None` where there is none.
    ///
    /// # Panics
    /// As [`Cluster::metrics`].
    pub fn metric(&self, role: &str, name: &str, (label, value): (&str, &str)) -> Option<f64> {
        let text = self.metrics(role);
        let label = format!("{label}=\"{value}\"");
        let mut series = text.lines().filter(|line| line.starts_with(name) && line.contains(&label));
        series.next()?.split_whitespace().last()?.parse().ok()
    }

    /// Returns `/v1/status` of an instance of a role; `None` where it does not answer, as while it starts.
    ///
    /// # Panics
    /// When it does not run.
    pub fn status_of(&self, name: &str, instance: &str) -> Option<serde_json::Value> {
        let role = self.roles.iter().find(|r| r.name == name && r.instance == instance);
        serde_json::from_str(&get(role.expect("the instance runs").http, "/v1/status").ok()?).ok()
    }

    /// Returns a client of the registry.
    pub fn registry_client(&self) -> RegistryClient {
        RegistryClient::new(&RegistryConfig { url: self.registry_url.clone(), authorization: None })
    }

    /// Leaves the directory of Kafka's data and of the logs for a person, and returns it.
    pub fn keep_scratch(&mut self) -> PathBuf {
        self.directory.disable_cleanup(true);
        self.directory.path().to_owned()
    }

    /// Returns the last lines of every role's log and its status, for messages of failed assertions.
    pub fn logs(&self) -> String {
        let mut text = String::new();
        for role in &self.roles {
            let output = role.process.output();
            let lines: Vec<&str> = output.lines().rev().take(8).collect();
            text.push_str(&format!("== {} {} (start {})\n", role.name, role.instance, role.starts));
            for line in lines.iter().rev() {
                text.push_str(line);
                text.push('\n');
            }
            text.push_str(&status(role.http).unwrap_or_else(|e| format!("no status: {e}")));
            text.push('\n');
        }
        text
    }
}

/// A test that fails says what the roles were doing, and leaves their logs and Kafka's data behind.
impl Drop for Cluster {
    #[expect(clippy::print_stderr, reason = "a failing test is read by a person")]
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the roles said:\n{}", self.logs());
            eprintln!("Kafka's data and the logs stay in {}", self.keep_scratch().display());
        }
    }
}

/// Asks a role for `/v1/status`, without its partitions.
fn status(port: u16) -> std::io::Result<String> {
    Ok(get(port, "/v1/status")?.chars().take(6_000).collect())
}

fn get(port: u16, path: &str) -> std::io::Result<String> {
    use std::io::{Read, Write};
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let body = answer.split_once("\r\n\r\n").map_or(answer.as_str(), |(_, body)| body);
    Ok(body.to_owned())
}
