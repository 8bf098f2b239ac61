//! Configuration: flags over environment over file over what runs here over defaults.
//!
//! The file is TOML. The environment names a key as `THROUGHLINE_SECTION__KEY`. A secret may be given as
//! a file through the key with `_file` at its end. An unknown key is an error that suggests the right one.

use crate::failure::CliError;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use throughline_local::endpoints::Endpoints;
use throughline_model::strict_toml;
use throughline_mqtt::Bounds;
use throughline_telemetry::TelemetryConfig;

/// What every environment variable of ours starts with.
pub const ENVIRONMENT_PREFIX: &str = "THROUGHLINE_";

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
        let environment: Vec<(String, String)> = std::env::vars().collect();
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

fn read_file(path: &Path) -> Result<String, CliError> {
    std::fs::read_to_string(path)
        .map_err(|e| CliError::usage(format!("cannot read `{}`: {e}", path.display())))
}

fn layer(
    running: Option<&Endpoints>,
    file: Option<(&str, &str)>,
    environment: &[(String, String)],
) -> Result<Config, CliError> {
    let mut base = Config::default();
    if let Some(running) = running {
        base.kafka.bootstrap.clone_from(&running.kafka);
        base.registry.url.clone_from(&running.registry);
        base.database.url.clone_from(&running.database);
        base.mqtt.listen.clone_from(&running.mqtt);
        base.http.listen = running.http.trim_start_matches("http://").to_owned();
    }
    let shape = toml::Table::try_from(&base).expect("the defaults are TOML");
    let mut merged = shape.clone();
    if let Some((name, text)) = file {
        // Parsed once for its errors with their lines, once as a table for the keys that it sets.
        strict_toml::parse::<Config>(name, text).map_err(|e| CliError::usage(e.to_string()))?;
        let table: toml::Table = text.parse().expect("it parsed just before");
        overlay(&mut merged, table);
    }
    for (name, value) in environment {
        let Some(path) = name.strip_prefix(ENVIRONMENT_PREFIX) else { continue };
        if matches!(path, "DATA_DIR" | "CONFIG" | "CACHE") {
            continue;
        }
        set_from_environment(&mut merged, &shape, name, path, value)?;
    }
    let text = toml::to_string(&merged).expect("a table is TOML");
    strict_toml::parse::<Config>("environment", &text).map_err(|e| CliError::usage(e.to_string()))
}

fn overlay(base: &mut toml::Table, over: toml::Table) {
    for (key, value) in over {
        match (base.get_mut(&key), value) {
            (Some(toml::Value::Table(below)), toml::Value::Table(above)) => overlay(below, above),
            (_, value) => {
                base.insert(key, value);
            }
        }
    }
}

/// Keys without a default, which the shape does not show; all of them are texts or numbers.
const OPTIONAL_KEYS: [&str; 8] = [
    "database.url_file",
    "mqtt.external_user",
    "mqtt.external_password_file",
    "mqtt.logins_file",
    "telemetry.otlp_endpoint",
    "topics.dir",
    "stages.commit_interval_ms",
    "notify.webhook_url_file",
];

fn set_from_environment(
    merged: &mut toml::Table,
    shape: &toml::Table,
    variable: &str,
    path: &str,
    value: &str,
) -> Result<(), CliError> {
    let key = path.to_lowercase().replace("__", ".");
    let known = shape_keys(shape);
    let (section, name) = key.split_once('.').unwrap_or(("", &key));
    let is_property = section == "kafka" && name.starts_with("properties.");
    if !is_property && !known.contains_key(&key) {
        let nearest = known.keys().min_by_key(|k| strsim::levenshtein(k, &key)).expect("there are keys");
        let nearest = format!("{ENVIRONMENT_PREFIX}{}", nearest.replace('.', "__").to_uppercase());
        return Err(CliError::usage(format!(
            "the environment variable `{variable}` names no setting; did you mean `{nearest}`?"
        )));
    }
    let wrong = |kind: &str| {
        CliError::usage(format!("the environment variable `{variable}` holds `{value}`, not {kind}"))
    };
    let value = match known.get(&key).copied().unwrap_or(Shape::Text) {
        Shape::Integer => toml::Value::Integer(value.parse().map_err(|_| wrong("a whole number"))?),
        Shape::Float => toml::Value::Float(value.parse().map_err(|_| wrong("a number"))?),
        Shape::Boolean => toml::Value::Boolean(value.parse().map_err(|_| wrong("true or false"))?),
        Shape::Text => toml::Value::String(value.to_owned()),
    };
    if is_property {
        // librdkafka's names have dots, which a variable writes as `_`.
        let property = name["properties.".len()..].replace('_', ".");
        return put(merged, &["kafka", "properties", &property], value);
    }
    put(merged, &key.split('.').collect::<Vec<_>>(), value)
}

fn put(table: &mut toml::Table, path: &[&str], value: toml::Value) -> Result<(), CliError> {
    let (last, sections) = path.split_last().expect("a key has at least one part");
    let mut table = table;
    for section in sections {
        let below = table.entry(*section).or_insert_with(|| toml::Value::Table(toml::Table::new()));
        table = below
            .as_table_mut()
            .ok_or_else(|| CliError::usage(format!("`{section}` is a setting, not a section")))?;
    }
    table.insert((*last).to_owned(), value);
    Ok(())
}

#[derive(Clone, Copy)]
enum Shape {
    Text,
    Integer,
    Float,
    Boolean,
}

fn shape_keys(shape: &toml::Table) -> BTreeMap<String, Shape> {
    let mut keys = BTreeMap::new();
    collect_keys("", shape, &mut keys);
    for key in OPTIONAL_KEYS {
        let shape = if key.ends_with("_ms") { Shape::Integer } else { Shape::Text };
        keys.insert(key.to_owned(), shape);
    }
    keys
}

fn collect_keys(prefix: &str, table: &toml::Table, keys: &mut BTreeMap<String, Shape>) {
    for (name, value) in table {
        let key = format!("{prefix}{name}");
        let shape = match value {
            toml::Value::Table(section) => {
                collect_keys(&format!("{key}."), section, keys);
                continue;
            }
            toml::Value::Integer(_) => Shape::Integer,
            toml::Value::Float(_) => Shape::Float,
            toml::Value::Boolean(_) => Shape::Boolean,
            _ => Shape::Text,
        };
        keys.insert(key, shape);
    }
}

fn check(config: &Config) -> Result<(), CliError> {
    let refuse = |what: String| Err(CliError::usage(what));
    if !matches!(config.kafka.group_protocol.as_str(), "consumer" | "classic") {
        return refuse(format!(
            "`kafka.group_protocol` is `{}`; it is `consumer` (KIP-848) or `classic`",
            config.kafka.group_protocol
        ));
    }
    let database = &config.database.url;
    if !["postgres://", "postgresql://", "sqlite:"].iter().any(|scheme| database.starts_with(scheme)) {
        return refuse("`database.url` starts with neither `postgres://` nor `sqlite:`".into());
    }
    if !(1..=64).contains(&config.mqtt.workers) {
        return refuse(format!("`mqtt.workers` is {}; it is 1 to 64", config.mqtt.workers));
    }
    let Notify { webhook_url, timeout_ms, .. } = &config.notify;
    // The address may hold a secret: it is not repeated.
    if !webhook_url.is_empty() && !webhook_url.starts_with("http://") {
        return refuse(
            "`notify.webhook_url` does not start with `http://`; this build speaks no TLS, so a receiver behind \
             `https://` needs a relay beside `notify`"
                .into(),
        );
    }
    if !(100..=30_000).contains(timeout_ms) {
        return refuse(format!("`notify.timeout_ms` is {timeout_ms}; it is 100 to 30000"));
    }
    // A transaction may be open since the commit before; Kafka ends it after 10 s, and the stage would begin
    // again and again.
    if let Some(ms) = config.stages.commit_interval_ms.filter(|ms| !(10..=5_000).contains(ms)) {
        return refuse(format!("`stages.commit_interval_ms` is {ms}; it is 10 to 5,000"));
    }
    let name_ok = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if config.instance.is_empty() || !config.instance.chars().all(name_ok) {
        return refuse(format!(
            "`instance` is `{}`; it has letters, digits, `-`, `_` and `.`",
            config.instance
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn env(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn the_environment_wins_over_the_file_and_the_file_over_defaults() {
        let file = "[kafka]\nbootstrap = \"from-file:1\"\nlinger_ms = 7\n";
        let environment = env(&[("THROUGHLINE_KAFKA__BOOTSTRAP", "from-env:2"), ("HOME", "/")]);
        let config = layer(None, Some(("t.toml", file)), &environment).expect("valid");
        assert_eq!((config.kafka.bootstrap.as_str(), config.kafka.linger_ms), ("from-env:2", 7));
        assert_eq!(config.kafka.group_protocol, "consumer");
    }

    #[test]
    fn a_misspelt_key_is_refused_with_the_right_one() {
        let error = layer(None, Some(("t.toml", "[kafka]\nbootstrp = \"x\"\n")), &[]).expect_err("misspelt");
        let text = error.to_string();
        assert!(text.contains("t.toml:2") && text.contains("bootstrap"), "{text}");
        let error = layer(None, None, &env(&[("THROUGHLINE_KAFKA__BOOTSTRP", "x")])).expect_err("misspelt");
        assert!(error.to_string().contains("THROUGHLINE_KAFKA__BOOTSTRAP"), "{error}");
    }

    #[test]
    fn numbers_and_client_properties_come_from_the_environment() {
        let environment = env(&[
            ("THROUGHLINE_MQTT__WORKERS", "3"),
            ("THROUGHLINE_STAGES__COMMIT_INTERVAL_MS", "20"),
            ("THROUGHLINE_KAFKA__PROPERTIES__SECURITY_PROTOCOL", "SSL"),
        ]);
        let config = layer(None, None, &environment).expect("valid");
        assert_eq!((config.mqtt.workers, config.stages.commit_interval_ms), (3, Some(20)));
        assert_eq!(config.kafka.properties.get("security.protocol").map(String::as_str), Some("SSL"));
        let error = layer(None, None, &env(&[("THROUGHLINE_MQTT__WORKERS", "many")])).expect_err("no number");
        assert!(error.to_string().contains("whole number"), "{error}");
    }

    #[test]
    fn a_webhook_that_cannot_be_used_is_refused_without_repeating_its_address() {
        for (key, value, wrong) in [
            ("WEBHOOK_URL", "https://hooks/s3cret", Some("`http://`")),
            ("WEBHOOK_URL", "http://hooks/s3cret", None),
            ("TIMEOUT_MS", "99", Some("100 to 30000")),
            ("TIMEOUT_MS", "100", None),
        ] {
            let environment = env(&[(&format!("THROUGHLINE_NOTIFY__{key}"), value)]);
            let config = layer(None, None, &environment).expect("it has the right form");
            let found = check(&config).err().map(|e| e.to_string());
            assert_eq!(found.is_some(), wrong.is_some(), "{key}={value}: {found:?}");
            let said = found.unwrap_or_default();
            assert!(said.contains(wrong.unwrap_or_default()) && !said.contains("s3cret"), "{said}");
        }
    }

    #[test]
    fn a_commit_interval_that_a_transaction_does_not_outlast_is_refused() {
        for (ms, is_taken) in [(9, false), (10, true), (5_000, true), (5_001, false)] {
            let stages = Stages { commit_interval_ms: Some(ms), ..Stages::default() };
            let checked = check(&Config { stages, ..Config::default() });
            assert_eq!(checked.is_ok(), is_taken, "{ms}");
        }
    }

    proptest! {
        #[test]
        fn configuration_of_any_form_is_read_or_refused(
            file in prop_oneof![
                any::<String>(),
                "(\\[(kafka|mqtt|stages|registry)\\]\n)?[a-z_]{1,12} ?= ?(\"[a-z]{0,4}\"|-?[0-9]{1,20}|\\[+|\\{+|true)\n",
            ],
            key in "THROUGHLINE_(KAFKA|MQTT|STAGES|__)?[A-Z_]{0,24}",
            value in "\\PC{0,24}",
        ) {
            let refused = layer(None, Some(("t.toml", &file)), &env(&[(&key, &value)])).err();
            prop_assert!(refused.is_none_or(|e| e.to_string().len() <= 4 * file.len() + 4_096));
        }
    }
}
