//! What every role and command shares: configuration, catalog, schemas, health, the wish to end.

use crate::config::Config;
use crate::failure::CliError;
use crate::output;
use crate::roles::stage_specs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use throughline_kafka::{GroupProtocol, KafkaConfig, RegistryClient, RegistryConfig};
use throughline_model::catalog::{Catalog, ReplayPolicy, value_subject};
use throughline_model::codec::Codec;
use throughline_model::strict_toml::FileError;
use throughline_runtime::Shutdown;
use throughline_runtime::ports::Failure;
use throughline_telemetry::Health;

/// How long to wait before a dependency that was away is asked again.
const RETRY: Duration = Duration::from_millis(500);

/// What every role and command shares.
#[derive(Clone)]
pub struct Context {
    /// The configuration.
    pub config: Arc<Config>,
    /// The topics.
    pub catalog: Arc<Catalog>,
    /// What is replayed without a person.
    pub replay_policies: Arc<Vec<ReplayPolicy>>,
    /// The schemas, bound by [`bind_schemas`].
    pub codec: Arc<Codec>,
    /// The process's health.
    pub health: Health,
    /// Asks every role to end.
    pub shutdown: Shutdown,
}

impl Context {
    /// Reads the catalog that the configuration names.
    ///
    /// # Errors
    /// A usage error with file and line.
    pub fn new(config: Config) -> Result<Self, CliError> {
        let catalog = load_catalog(config.topics.dir.as_deref())?;
        let replay_policies = catalog.replay_policies(&stage_specs()).map_err(usage)?;
        Ok(Self {
            config: Arc::new(config),
            catalog: Arc::new(catalog),
            replay_policies: Arc::new(replay_policies),
            codec: Arc::new(Codec::default()),
            health: Health::new(),
            shutdown: Shutdown::new(),
        })
    }

    /// Returns how to reach Kafka.
    pub fn kafka(&self) -> KafkaConfig {
        kafka_config(&self.config)
    }

    /// Returns a client of the registry.
    pub fn registry(&self) -> RegistryClient {
        RegistryClient::new(&RegistryConfig { url: self.config.registry.url.clone(), authorization: None })
    }

    /// Binds every topic of the catalog to the schema that the registry holds for it, so that values can
    /// be written.
    ///
    /// # Errors
    /// Exit code 4 when the registry cannot be asked, 1 when a schema is not registered.
    pub fn bind_schemas(&self) -> Result<(), CliError> {
        let registry = self.registry();
        for topic in self.catalog.topics() {
            let name = topic.spec.name.as_str();
            let id = registry.lookup(&value_subject(name), &topic.schema)?.ok_or_else(|| {
                CliError::failed(format!(
                    "the registry does not hold this build's schema of `{name}`: `throughline topics apply` registers it"
                ))
            })?;
            self.codec.bind(name, id, &topic.schema).map_err(|e| CliError::failed(e.to_string()))?;
        }
        Ok(())
    }

    /// Calls `attempt` until it succeeds, fails for good, or the process shall end (`None`). Each pause is
    /// reported to `say` with the failure.
    ///
    /// # Errors
    /// Every failure but that of a dependency.
    pub fn until_available<T>(
        &self,
        mut say: impl FnMut(&'static str, &str),
        mut attempt: impl FnMut() -> Result<T, Failure>,
    ) -> Result<Option<T>, Failure> {
        while !self.shutdown.is_requested() {
            match attempt() {
                Err(Failure::Dependency { dependency, message }) => {
                    say(dependency, &message);
                    std::thread::sleep(RETRY);
                }
                other => return other.map(Some),
            }
        }
        Ok(None)
    }
}

/// Returns how to reach the Kafka of `config`.
pub fn kafka_config(config: &Config) -> KafkaConfig {
    KafkaConfig {
        bootstrap: config.kafka.bootstrap.clone(),
        client_id: format!("throughline-{}", config.instance),
        instance: config.instance.clone(),
        group_protocol: if config.kafka.group_protocol == "classic" {
            GroupProtocol::Classic
        } else {
            GroupProtocol::Consumer
        },
        properties: config.kafka.properties.clone(),
    }
}

/// Reads the catalog of this build with the files of `dir` laid over it.
///
/// # Errors
/// A usage error that lists every problem with file and line.
pub fn load_catalog(dir: Option<&Path>) -> Result<Catalog, CliError> {
    let (topics, schemas) = match dir {
        Some(dir) => (read_files(dir, "toml")?, read_files(dir, "avsc")?),
        None => (Vec::new(), Vec::new()),
    };
    Catalog::with_extra(&topics, &schemas).map_err(usage)
}

fn usage(faults: Vec<FileError>) -> CliError {
    let lines: Vec<String> = faults.iter().map(ToString::to_string).collect();
    CliError::usage(lines.join("\n"))
}

fn read_files(dir: &Path, extension: &str) -> Result<Vec<(String, String)>, CliError> {
    let cannot =
        |path: &Path, e: std::io::Error| CliError::usage(format!("cannot read `{}`: {e}", path.display()));
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(|e| cannot(dir, e))? {
        let path = entry.map_err(|e| cannot(dir, e))?.path();
        if path.extension().is_none_or(|e| e != extension) {
            continue;
        }
        let text = std::fs::read_to_string(&path).map_err(|e| cannot(&path, e))?;
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        files.push((name, text));
    }
    if files.is_empty() && extension == "toml" {
        output::notice(&format!("`{}` has no topic files", dir.display()));
    }
    Ok(files)
}
