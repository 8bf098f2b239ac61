//! `throughline up`: the whole platform in one process on this machine.

use crate::commands::topics;
use crate::config::{Config, Flags};
use crate::context::{Context, kafka_config};
use crate::demo;
use crate::failure::{CliError, Exit};
use crate::output;
use crate::process::{self, Signals};
use crate::roles::{self, ROLES};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use throughline_local::endpoints::Endpoints;
use throughline_local::kafka::{KafkaOptions, ManagedKafka};
use throughline_local::registry::EmbeddedRegistry;
use throughline_local::{DirLock, LocalError, ports, scratch_dir};
use throughline_model::stage::Kind;

/// Arguments of `up`.
#[derive(clap::Args)]
pub struct Args {
    /// Start without rules and without the simulated site
    #[arg(long)]
    no_demo: bool,
    /// Keep nothing: the data directory is a temporary one
    #[arg(long)]
    ephemeral: bool,
    /// Take free ports instead of the usual ones
    #[arg(long)]
    random_ports: bool,
    /// Port of the MQTT listener
    #[arg(long, value_name = "PORT")]
    mqtt_port: Option<u16>,
    /// Port of the managed Kafka
    #[arg(long, value_name = "PORT")]
    kafka_port: Option<u16>,
    /// Port of the embedded registry
    #[arg(long, value_name = "PORT")]
    registry_port: Option<u16>,
    /// Port of metrics, health and status
    #[arg(long, value_name = "PORT")]
    http_port: Option<u16>,
}

/// The usual ports, which every tool knows.
const PORTS: Ports = Ports { mqtt: 1883, kafka: 9092, registry: 8081, http: 9464 };

/// How long the roles may take to work; seconds on an idle machine.
const READY_WITHIN: Duration = Duration::from_secs(60);

#[derive(Clone, Copy)]
struct Ports {
    mqtt: u16,
    kafka: u16,
    registry: u16,
    http: u16,
}

/// Starts everything, prints the addresses, and ends it at Ctrl-C or SIGTERM.
///
/// # Errors
/// Usage errors for a port in use or a directory in use; exit code 4 when a given service is away.
pub fn run(flags: &Flags, args: &Args) -> Result<Exit, CliError> {
    let mut config = flags.load_for_start()?;
    // One process for one machine: a line a decision of people, not one a start of a component.
    if std::env::var_os("THROUGHLINE_TELEMETRY__LOG").is_none() && flags.config.is_none() {
        config.telemetry.log = "warn,throughline_mqtt=error".into();
    }
    let _telemetry = process::start_telemetry(&config)?;
    let signals = Signals::install()?;
    let (data_dir, _ephemeral) = data_directory(flags, args)?;
    let _lock = DirLock::acquire(&data_dir).map_err(local)?;
    Endpoints::remove(&data_dir).map_err(local)?;
    let ports = choose_ports(args)?;

    let defaults = Config::default();
    let mut kafka = None;
    if config.kafka.bootstrap == defaults.kafka.bootstrap && flags.kafka.is_none() {
        output::progress("starting Kafka …");
        let managed = start_kafka(&data_dir, args, ports)?;
        config.kafka.bootstrap = managed.bootstrap();
        tracing::info!(bootstrap = config.kafka.bootstrap, "Kafka serves");
        kafka = Some(managed);
    }
    let mut registry = None;
    if config.registry.url == defaults.registry.url && flags.registry.is_none() {
        let port = wanted("the registry", ports.registry, "--registry-port")?;
        let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let running = EmbeddedRegistry::start(listen, &kafka_config(&config)).map_err(local)?;
        config.registry.url = running.url();
        registry = Some(running);
    }
    if config.database.url == defaults.database.url && flags.database.is_none() {
        config.database.url = format!("sqlite://{}", absolute(&data_dir)?.join("warehouse.db").display());
    }
    if config.mqtt.external_url.is_empty() {
        config.mqtt.listen = format!("127.0.0.1:{}", wanted("MQTT", ports.mqtt, "--mqtt-port")?);
    } else {
        config.mqtt.listen.clear();
    }
    config.http.listen = format!("127.0.0.1:{}", wanted("HTTP", ports.http, "--http-port")?);

    let context = Context::new(config)?;
    let _http = process::serve_http(&context)?;
    topics::apply_quietly(&context)?;
    context.bind_schemas()?;
    tracing::info!("topics and schemas are in place");
    let mut running = Vec::new();
    for role in ROLES.iter().filter(|role| role.lacks(&context.config).is_none()) {
        running.push(roles::start(&context, role)?);
    }
    wait_until_ready(&context, &signals)?;
    tracing::info!("every role is at work");
    let demo = if args.no_demo { None } else { Some(demo::start(&context)?) };
    let endpoints = endpoints_of(&context.config);
    endpoints.write(&data_dir).map_err(local)?;
    announce(&endpoints, &data_dir, demo.is_some());

    signals.wait(Duration::from_millis(250), || {
        keep_kafka_running(&mut kafka);
        true
    });
    output::progress("draining …");
    Endpoints::remove(&data_dir).map_err(local)?;
    if let Some(demo) = demo {
        demo.stop();
    }
    let drained = process::drain(&context, running);
    drop(registry);
    if let Some(kafka) = kafka {
        kafka.stop().map_err(local)?;
    }
    drained
}

fn data_directory(flags: &Flags, args: &Args) -> Result<(PathBuf, Option<tempfile::TempDir>), CliError> {
    if args.ephemeral && flags.data_dir.is_none() {
        let scratch = scratch_dir().map_err(local)?;
        return Ok((scratch.path().to_owned(), Some(scratch)));
    }
    let dir = flags.data_dir();
    std::fs::create_dir_all(&dir)
        .map_err(|e| CliError::usage(format!("cannot make the data directory `{}`: {e}", dir.display())))?;
    Ok((dir, None))
}

fn absolute(dir: &Path) -> Result<PathBuf, CliError> {
    dir.canonicalize().map_err(|e| CliError::failed(format!("cannot resolve `{}`: {e}", dir.display())))
}

fn choose_ports(args: &Args) -> Result<Ports, CliError> {
    let choose = |flag: Option<u16>, usual: u16| match flag {
        Some(port) => Ok(port),
        None if args.random_ports => ports::free().map_err(local),
        None => Ok(usual),
    };
    Ok(Ports {
        mqtt: choose(args.mqtt_port, PORTS.mqtt)?,
        kafka: choose(args.kafka_port, PORTS.kafka)?,
        registry: choose(args.registry_port, PORTS.registry)?,
        http: choose(args.http_port, PORTS.http)?,
    })
}

/// Returns `port` if it is free, else an error that names the flag.
fn wanted(what: &str, port: u16, flag: &str) -> Result<u16, CliError> {
    match std::net::TcpListener::bind(("127.0.0.1", port)) {
        Ok(_) => Ok(port),
        Err(error) => Err(CliError::usage(format!(
            "port {port} for {what} cannot be used ({error}): choose another with `{flag}`, or free ones with `--random-ports`"
        ))),
    }
}

fn start_kafka(data_dir: &Path, args: &Args, ports: Ports) -> Result<ManagedKafka, CliError> {
    let mut options = KafkaOptions::new(absolute(data_dir)?.join("kafka"));
    let free_one = args.random_ports && args.kafka_port.is_none();
    options.port = (!free_one).then_some(ports.kafka);
    let kafka = ManagedKafka::start(options, &mut |text| output::notice(text));
    kafka.map_err(|error| match error {
        LocalError::PortTaken { .. } => CliError::usage(format!(
            "{error}: choose another with `--kafka-port`, or free ones with `--random-ports`"
        )),
        other => local(other),
    })
}

fn keep_kafka_running(kafka: &mut Option<ManagedKafka>) {
    let Some(kafka) = kafka else { return };
    if kafka.is_running() {
        return;
    }
    tracing::error!(log = %kafka.log_file().display(), "the managed Kafka ended; it is started again");
    if let Err(error) = kafka.restart() {
        tracing::error!("the managed Kafka does not start: {error}");
        std::thread::sleep(Duration::from_secs(2));
    }
}

/// Waits until every role can do its job and every stage works on all its partitions, so that the first
/// message meets all of them. Where another process shares the groups, its partitions never come here: that
/// is said, not waited for longer.
fn wait_until_ready(context: &Context, signals: &Signals) -> Result<(), CliError> {
    let limit = Instant::now() + READY_WITHIN;
    loop {
        let unready = context.health.unready();
        let idle = if unready.is_empty() { stages_not_at_work(context) } else { Vec::new() };
        if (unready.is_empty() && idle.is_empty()) || signals.asked() {
            return Ok(());
        }
        if Instant::now() > limit {
            if unready.is_empty() {
                output::notice(&format!(
                    "not all partitions are here, others may work on them: {}",
                    idle.join("; ")
                ));
                return Ok(());
            }
            return Err(CliError::failed(format!(
                "not ready after {READY_WITHIN:?}: {}",
                unready.join("; ")
            )));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Returns the stages that do not work on every partition of their inputs and replays yet.
fn stages_not_at_work(context: &Context) -> Vec<String> {
    let status = context.health.status();
    let mut idle = Vec::new();
    let at_work = ROLES.iter().filter(|role| role.lacks(&context.config).is_none());
    for spec in at_work.filter_map(|role| role.spec).map(|spec| spec()) {
        let inputs = spec.inputs.iter().filter_map(|input| context.catalog.topic(input));
        // Each input has a replay topic, and of an act stage a retry topic, with as many partitions.
        let topics = if spec.kind == Kind::Act { 3 } else { 2 };
        let expected: usize = inputs.map(|topic| topics * topic.spec.partitions as usize).sum();
        let partitions = status["roles"][spec.group]["notes"]["partitions"].as_array();
        let active = partitions.map_or(0, |list| list.iter().filter(|p| p["active"] == true).count());
        if active < expected {
            idle.push(format!("{} {active} of {expected}", spec.group));
        }
    }
    idle
}

fn endpoints_of(config: &Config) -> Endpoints {
    let own = &config.mqtt.listen;
    Endpoints {
        mqtt: if own.is_empty() { config.mqtt.external_url.clone() } else { own.clone() },
        kafka: config.kafka.bootstrap.clone(),
        registry: config.registry.url.clone(),
        http: format!("http://{}", config.http.listen),
        metrics: format!("http://{}/metrics", config.http.listen),
        database: config.database.url.clone(),
        pid: std::process::id(),
    }
}

fn announce(endpoints: &Endpoints, data_dir: &Path, demo: bool) {
    let rows = [
        ("MQTT", endpoints.mqtt.as_str()),
        ("Kafka", &endpoints.kafka),
        ("schema registry", &endpoints.registry),
        ("status", &format!("{}/v1/status", endpoints.http)),
        ("metrics", &endpoints.metrics),
        ("database", &endpoints.database),
        ("data", &data_dir.display().to_string()),
    ];
    output::line("Throughline is ready. Ctrl-C ends it.\n");
    for (name, address) in rows {
        output::line(&format!("  {name:<16} {address}"));
    }
    if demo {
        output::line(&format!("\n  A simulated site sends as `{}`: throughline devices list", demo::SITE));
    }
}

fn local(error: LocalError) -> CliError {
    match error {
        LocalError::PortTaken { .. } | LocalError::InUse { .. } | LocalError::Missing { .. } => {
            CliError::usage(error.to_string())
        }
        other => CliError::failed(other.to_string()),
    }
}
