//! Where a benchmark runs: a Kafka, a registry and a PostgreSQL of its own in a temporary directory.

use super::cpu::Processes;
use super::{Part, readings};
use crate::commands::topics;
use crate::config::{Config, Flags};
use crate::context::{Context, kafka_config};
use crate::failure::{CliError, Exit};
use crate::output;
use crate::process::Signals;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;
use tempfile::TempDir;
use throughline_kafka::admin::{Admin, NewTopic};
use throughline_local::child::{Program, Supervised};
use throughline_local::kafka::{Compile, KafkaOptions, ManagedKafka};
use throughline_local::postgres::{ManagedPostgres, PostgresOptions};
use throughline_local::registry::EmbeddedRegistry;
use throughline_local::{LocalError, ports, scratch_dir};
use throughline_model::topics::{DATA_CORE_READING_V1, DEVICE_TELEMETRY_V1};

/// What the plain clients write to.
pub const PLAIN_TOPIC: &str = "throughline_bench";

/// What every part needs.
pub struct Place {
    /// Configuration, catalog, bound schemas.
    pub context: Context,
    /// Asks about topics and groups.
    pub admin: Admin,
    /// What the person who waits wishes.
    pub signals: Signals,
    flags: Flags,
    /// Dropped in this order: those who use a service before it, the directory last.
    registry: Option<EmbeddedRegistry>,
    postgres: Option<ManagedPostgres>,
    kafka: Option<ManagedKafka>,
    scratch: TempDir,
}

impl Place {
    /// Starts what the command line does not give, and applies the topics.
    ///
    /// # Errors
    /// A usage error when a given cluster holds readings already, or a component is missing here.
    pub fn start(flags: &Flags, signals: Signals, part: Part) -> Result<Self, CliError> {
        let mut config = flags.load_for_start()?;
        let scratch = scratch_dir().map_err(local)?;
        let mut kafka = None;
        if flags.kafka.is_none() {
            output::progress("starting Kafka …");
            let mut options = KafkaOptions::new(scratch.path().join("kafka"));
            options.compile = Compile::Full;
            let managed = ManagedKafka::start(options, &mut |text| output::notice(text)).map_err(local)?;
            config.kafka.bootstrap = managed.bootstrap();
            kafka = Some(managed);
        }
        let mut registry = None;
        if flags.registry.is_none() {
            let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
            let running = EmbeddedRegistry::start(listen, &kafka_config(&config)).map_err(local)?;
            config.registry.url = running.url();
            registry = Some(running);
        }
        let mut postgres = None;
        if flags.database.is_none() && matches!(part, Part::LoadWarehouse | Part::All) {
            output::progress("starting PostgreSQL …");
            let mut options = PostgresOptions::new(scratch.path().join("postgres"));
            options.settings = [("shared_buffers", "256MB"), ("max_wal_size", "4GB")]
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .into();
            let managed = ManagedPostgres::start(options).map_err(local)?;
            config.database.url = managed.url();
            postgres = Some(managed);
        }
        config.mqtt.external_url.clear();
        let context = Context::new(config)?;
        topics::apply_quietly(&context)?;
        context.bind_schemas()?;
        let admin = Admin::new(&context.kafka())?;
        let plain = NewTopic {
            name: PLAIN_TOPIC.to_owned(),
            partitions: 6,
            replication: i32::from(context.config.kafka.replication),
            configs: std::collections::BTreeMap::new(),
        };
        admin.create_topics(&[plain])?;
        let place =
            Self { context, admin, signals, flags: flags.clone(), registry, postgres, kafka, scratch };
        for topic in [DEVICE_TELEMETRY_V1, DATA_CORE_READING_V1] {
            if readings::end(&place, topic)? > 0 {
                return Err(CliError::usage(format!(
                    "`{topic}` of the given Kafka holds records: a benchmark writes into the platform's topics, give it a cluster of its own, or none"
                )));
            }
        }
        Ok(place)
    }

    /// Returns whose CPU time counts.
    pub fn processes(&self, role: Option<&Supervised>) -> Processes {
        Processes {
            role: role.map(Supervised::pid),
            broker: self.kafka.as_ref().and_then(ManagedKafka::pid),
            database: self.postgres.as_ref().and_then(ManagedPostgres::pid),
        }
    }

    /// Starts `throughline run ROLE` in a process of its own. It is killed when the value is dropped, and
    /// when this process ends in whatever way.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_role(&self, role: &'static str, mqtt: &str, http: &str) -> Result<Supervised, CliError> {
        let dir = self.scratch.path().join(role);
        std::fs::create_dir_all(&dir)?;
        let config: &Config = &self.context.config;
        let program = std::env::current_exe()?;
        let mut command = vec![program.into_os_string()];
        command.extend(["--kafka", &config.kafka.bootstrap].map(Into::into));
        command.extend(["--registry", &config.registry.url].map(Into::into));
        command.extend(["--database", &config.database.url].map(Into::into));
        command.extend(["--instance", "bench"].map(Into::into));
        // A platform that runs in the working directory is none of the role's business.
        command.extend(["--data-dir".into(), dir.clone().into_os_string()]);
        if let Some(file) = &self.flags.config {
            command.extend(["--config".into(), std::path::absolute(file)?.into_os_string()]);
        }
        command.extend(["run", role].map(Into::into));
        let env = vec![
            ("THROUGHLINE_MQTT__LISTEN", mqtt.into()),
            ("THROUGHLINE_HTTP__LISTEN", http.into()),
            ("THROUGHLINE_TELEMETRY__LOG", "warn".into()),
        ];
        Supervised::spawn(Program { name: role, dir: &dir, command, env, user: None }).map_err(local)
    }

    /// Calls `done` until it returns `true`; between two calls the role must be alive.
    ///
    /// # Errors
    /// What `done` returned; the end of the role's log when it ended or took longer than `limit`.
    pub fn wait(
        &self,
        role: &mut Supervised,
        limit: Duration,
        mut done: impl FnMut() -> Result<bool, CliError>,
    ) -> Result<(), CliError> {
        let mut failure = None;
        role.wait_ready(limit, || {
            if self.signals.asked() {
                failure = Some(CliError { exit: Exit::Interrupted, ..CliError::failed("interrupted") });
                return true;
            }
            done().unwrap_or_else(|error| {
                failure = Some(error);
                true
            })
        })
        .map_err(local)?;
        failure.map_or(Ok(()), Err)
    }

    /// Says in which free addresses a role may listen: for MQTT and for its HTTP pages.
    ///
    /// # Errors
    /// When the system has no port left.
    pub fn addresses() -> Result<(String, String), CliError> {
        let free = || ports::free().map(|port| format!("127.0.0.1:{port}")).map_err(local);
        Ok((free()?, free()?))
    }

    /// Ends the services in order.
    ///
    /// # Errors
    /// When one of them cannot be waited for.
    pub fn stop(self) -> Result<(), CliError> {
        drop(self.registry);
        if let Some(postgres) = self.postgres {
            postgres.stop().map_err(local)?;
        }
        if let Some(kafka) = self.kafka {
            kafka.stop().map_err(local)?;
        }
        Ok(())
    }
}

fn local(error: LocalError) -> CliError {
    match error {
        LocalError::PortTaken { .. } | LocalError::Missing { .. } => CliError::usage(error.to_string()),
        other => CliError::failed(other.to_string()),
    }
}
