//! Configuration: flags over environment over file over what runs here over defaults.
//!
//! The file is TOML. The environment names a key as `THROUGHLINE_SECTION__KEY`. A secret may be given as
//! a file through the key with `_file` at its end. An unknown key is an error that suggests the right one.

mod layers;

use crate::failure::CliError;
use layers::{check, layer, ours};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use throughline_local::endpoints::Endpoints;
use throughline_mqtt::Bounds;
use throughline_telemetry::TelemetryConfig;

/// The whole configuration of one process.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// This process's name among its like: the ordinal name of a StatefulSet's pod. Two live processes
    /// never share one; a successor with the same name ends its predecessor's open transaction.
    pub instance: String,
    /// Apache Kafka.
    pub kafka: Kafka,
    /// The schema registry.
    pub registry: Registry,
    /// The store of warehouse and twins.
    pub database: Database,
    /// The MQTT side of the bridge.
    pub mqtt: Mqtt,
    /// Metrics, health and status.
    pub http: Http,
    /// Logs and OpenTelemetry.
    pub telemetry: TelemetryConfig,
    /// Topic files of the operator.
    pub topics: Topics,
    /// Settings of stages.
    pub stages: Stages,
    /// Whom `notify` tells of alerts.
    pub notify: Notify,
}

/// Apache Kafka.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Kafka {
    /// Addresses, `host:port` separated by commas.
    pub bootstrap: String,
    /// `consumer` (KIP-848) or `classic` for older clusters.
    pub group_protocol: String,
    /// The cluster's name in the label `cluster_name` of metrics.
    pub cluster_name: String,
    /// Copies of each topic that `topics apply` creates.
    pub replication: i16,
    /// Copies that must have a record before it is acknowledged.
    pub min_insync: i16,
    /// How long the bridge's producer gathers a batch, in ms (0 to 100).
    pub linger_ms: u32,
    /// How long a record of the bridge may wait for Kafka before its connection is closed, in ms.
    pub produce_timeout_ms: u32,
    /// Records of the bridge that may wait for Kafka at once; beyond it the bridge stops reading.
    pub queue_records_max: u32,
    /// KiB of the bridge that may wait for Kafka at once; the same holds beyond it.
    pub queue_kib_max: u32,
    /// Further librdkafka properties, for instance `security.protocol`.
    pub properties: BTreeMap<String, String>,
}

/// The schema registry, any that speaks Confluent's API.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Registry {
    /// Base address; for Apicurio it ends in `/apis/ccompat/v7`.
    pub url: String,
}

/// PostgreSQL or SQLite.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Database {
    /// `postgres://user:password@host/database` or `sqlite:///path`.
    pub url: String,
    /// A file that holds the address, for secrets.
    pub url_file: Option<PathBuf>,
}

/// The MQTT side of the bridge.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Mqtt {
    /// Address of the listener; empty turns it off.
    pub listen: String,
    /// An existing broker to subscribe to, `mqtt://host:port`; empty turns it off.
    pub external_url: String,
    /// The group of the shared subscriptions: instances of one group share the messages.
    pub external_group: String,
    /// User name at the existing broker.
    pub external_user: Option<String>,
    /// A file with the password at the existing broker.
    pub external_password_file: Option<PathBuf>,
    /// Worker threads of the listener (1 to 64).
    pub workers: usize,
    /// Whether clients on this machine need no login; others always need one.
    pub anonymous_on_loopback: bool,
    /// A TOML file of `[[login]]` tables; without it only anonymous clients on loopback are admitted.
    pub logins_file: Option<PathBuf>,
    /// What the listener holds at most.
    pub bounds: Bounds,
}

/// Metrics, health and status of every role.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Http {
    /// Address of `/metrics`, `/healthz`, `/readyz` and `/v1/status`.
    pub listen: String,
}

/// Topic files of the operator, laid over those of this build.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Topics {
    /// A directory of `*.toml` and `*.avsc`.
    pub dir: Option<PathBuf>,
}

/// Settings of stages.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Stages {
    /// How long outputs may wait for their commit, in ms (10 to 5,000); each stage has its own default
    /// of 50 or 100.
    pub commit_interval_ms: Option<u64>,
    /// KiB that a stage fetches ahead of its partitions, shared among them: 1 to 8 MiB each.
    pub fetched_kib_max: u32,
}

impl Default for Stages {
    fn default() -> Self {
        Self { commit_interval_ms: None, fetched_kib_max: 131_072 }
    }
}

/// Whom `notify` tells of alerts.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Notify {
    /// The address that alerts are posted to, `http://host:port/path`; empty turns the role off.
    pub webhook_url: String,
    /// A file that holds the address, for secrets.
    pub webhook_url_file: Option<PathBuf>,
    /// How long one delivery may take, in ms (100 to 30,000).
    pub timeout_ms: u64,
    /// An alert that has been in Kafka for longer is not told any more, in ms; 0 is no bound.
    pub age_max_ms: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            instance: "0".into(),
            kafka: Kafka::default(),
            registry: Registry::default(),
            database: Database::default(),
            mqtt: Mqtt::default(),
            http: Http::default(),
            telemetry: TelemetryConfig::default(),
            topics: Topics::default(),
            stages: Stages::default(),
            notify: Notify::default(),
        }
    }
}

impl Default for Kafka {
    fn default() -> Self {
        Self {
            bootstrap: "127.0.0.1:9092".into(),
            group_protocol: "consumer".into(),
            cluster_name: "kafka".into(),
            replication: 1,
            min_insync: 1,
            linger_ms: 1,
            produce_timeout_ms: 300_000,
            queue_records_max: 100_000,
            queue_kib_max: 262_144,
            properties: BTreeMap::new(),
        }
    }
}

impl Default for Registry {
    fn default() -> Self {
        Self { url: "http://127.0.0.1:8081".into() }
    }
}

impl Default for Database {
    fn default() -> Self {
        Self { url: "sqlite://throughline.db".into(), url_file: None }
    }
}

impl Default for Mqtt {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:1883".into(),
            external_url: String::new(),
            external_group: "throughline".into(),
            external_user: None,
            external_password_file: None,
            workers: 1,
            anonymous_on_loopback: true,
            logins_file: None,
            bounds: Bounds::default(),
        }
    }
}

impl Default for Notify {
    fn default() -> Self {
        Self { webhook_url: String::new(), webhook_url_file: None, timeout_ms: 5_000, age_max_ms: 86_400_000 }
    }
}

impl Default for Http {
    fn default() -> Self {
        Self { listen: "127.0.0.1:9464".into() }
    }
}

/// What the command line says about where things are; every command takes these flags.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Flags {
    /// Directory of the platform on this machine
    #[arg(long, global = true, value_name = "DIR", env = "THROUGHLINE_DATA_DIR")]
    pub data_dir: Option<PathBuf>,
    /// Configuration file (TOML)
    #[arg(long, global = true, value_name = "FILE", env = "THROUGHLINE_CONFIG")]
    pub config: Option<PathBuf>,
    /// Kafka, host:port[,host:port]
    #[arg(long, global = true, value_name = "ADDR")]
    pub kafka: Option<String>,
    /// Schema registry, http://host:port
    #[arg(long, global = true, value_name = "URL")]
    pub registry: Option<String>,
    /// postgres://… or sqlite://…
    #[arg(long, global = true, value_name = "URL")]
    pub database: Option<String>,
    /// An existing MQTT broker, mqtt://host:port
    #[arg(long, global = true, value_name = "URL")]
    pub mqtt: Option<String>,
    /// Name of this process among its like
    #[arg(long, global = true, value_name = "NAME")]
    pub instance: Option<String>,
    /// Print JSON
    #[arg(long, global = true)]
    pub json: bool,
}

impl Flags {
    /// Returns the data directory: the flag, or `.throughline` in the working directory.
    pub fn data_dir(&self) -> PathBuf {
        self.data_dir.clone().unwrap_or_else(|| PathBuf::from(".throughline"))
    }

    /// Returns the configuration that these flags, the environment, the file and the running platform of
    /// the data directory give.
    ///
    /// # Errors
    /// A usage error that names the file and line, or the variable, and the nearest key.
    pub fn load(&self) -> Result<Config, CliError> {
        let running = Endpoints::read(&self.data_dir()).map_err(|e| CliError::usage(e.to_string()))?;
        self.load_beside(running.as_ref())
    }

    /// Returns the configuration without what a platform that runs already says: for `up` itself.
    ///
    /// # Errors
    /// As [`Flags::load`].
    pub fn load_for_start(&self) -> Result<Config, CliError> {
        self.load_beside(None)
    }

    fn load_beside(&self, running: Option<&Endpoints>) -> Result<Config, CliError> {
        let environment = ours(std::env::vars_os())?;
        let file = match &self.config {
            Some(path) => Some((path.display().to_string(), read_file(path)?)),
            None => None,
        };
        let mut config = layer(running, file.as_ref().map(|(n, t)| (n.as_str(), t.as_str())), &environment)?;
        if let Some(kafka) = &self.kafka {
            config.kafka.bootstrap.clone_from(kafka);
        }
        if let Some(registry) = &self.registry {
            config.registry.url.clone_from(registry);
        }
        if let Some(database) = &self.database {
            config.database.url.clone_from(database);
            config.database.url_file = None;
        }
        if let Some(mqtt) = &self.mqtt {
            config.mqtt.external_url.clone_from(mqtt);
        }
        if let Some(instance) = &self.instance {
            config.instance.clone_from(instance);
        }
        if let Some(path) = &config.database.url_file {
            config.database.url = read_file(path)?.trim().to_owned();
        }
        if let Some(path) = &config.notify.webhook_url_file {
            config.notify.webhook_url = read_file(path)?.trim().to_owned();
        }
        check(&config)?;
        Ok(config)
    }
}

/// Returns the configuration that a file (its name and text) and the environment give.
///
/// # Errors
/// A usage error that names the file and line, or the variable, and repeats no value: it may be a secret.
pub fn read(
    file: Option<(&str, &str)>,
    environment: impl IntoIterator<Item = (OsString, OsString)>,
) -> Result<Config, CliError> {
    let config = layer(None, file, &ours(environment)?)?;
    check(&config)?;
    Ok(config)
}

fn read_file(path: &Path) -> Result<String, CliError> {
    std::fs::read_to_string(path)
        .map_err(|e| CliError::usage(format!("cannot read `{}`: {e}", path.display())))
}
