//! The roles, each a thread. Adding a stage is its file in `crates/stages` and a line in [`ROLES`].

use crate::bridge;
use crate::config::Config;
use crate::context::Context;
use crate::failure::CliError;
use crate::predict::{self, Prediction};
use crate::replay_policies;
use crate::watch;
use crate::webhook::Webhook;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use throughline_kafka::{
    AckedProducer, BatchBounds, GroupSource, PartitionReader, TopicReader, TransactionalProducer,
    ask_incarnation,
};
use throughline_model::catalog::{replay_topic, retry_topic};
use throughline_model::dead_letter;
use throughline_model::record::Batch;
use throughline_model::stage::{Act, Decide, Kind, Load, StageSpec};
use throughline_runtime::ports::{Effector, Failure};
use throughline_runtime::{
    ActPorts, DecidePorts, Incarnation, LoadPorts, LoopConfig, REPLAYS_MAX, ReprocessDeadLetters, WallClock,
    reprocess_spec, run_act, run_decide, run_load,
};
use throughline_stages::bridge_data::BridgeData;
use throughline_stages::evaluate_rules::EvaluateRules;
use throughline_stages::load_warehouse::LoadWarehouse;
use throughline_stages::notify::{self, Notify};
use throughline_stages::project_twins::ProjectTwins;
use throughline_stages::update_twin::UpdateTwin;
use throughline_store::{SqlStore, StoreOptions};
use throughline_telemetry::RoleHealth;

/// A role: what `throughline run NAME` starts.
pub struct Role {
    /// Its name on the command line, which is also the consumer group of a stage.
    pub name: &'static str,
    /// What it reads and keeps, where it is a stage.
    pub spec: Option<fn() -> StageSpec>,
    pub(crate) run: fn(&Context, RoleHealth) -> Result<(), CliError>,
    /// What would become of replays of one of its inputs now, where that can be told without doing it.
    pub predict: Option<Predict>,
}

/// Says what would become of replays of a topic, one prediction a record; nothing is written.
pub type Predict = fn(&Context, &str, &Batch) -> Result<Vec<Prediction>, CliError>;

/// Every role. A stage's line names it, its specification and what runs it.
pub const ROLES: &[Role] = &[
    Role { name: "bridge", spec: None, run: bridge::run, predict: Some(predict::bridge) },
    Role {
        name: "evaluate_rules",
        spec: Some(|| EvaluateRules::new().spec().clone()),
        run: |context, health| decide(context, health, EvaluateRules::new()),
        predict: Some(|context, topic, replays| {
            predict::decide(context, EvaluateRules::new(), topic, replays)
        }),
    },
    Role {
        name: "update_twin",
        spec: Some(|| UpdateTwin::default().spec().clone()),
        run: |context, health| decide(context, health, UpdateTwin::default()),
        predict: Some(|context, topic, replays| {
            predict::decide(context, UpdateTwin::default(), topic, replays)
        }),
    },
    Role {
        name: "bridge_data",
        spec: Some(|| BridgeData::default().spec().clone()),
        run: |context, health| decide(context, health, BridgeData::default()),
        predict: Some(|context, topic, replays| {
            predict::decide(context, BridgeData::default(), topic, replays)
        }),
    },
    Role {
        name: "load_warehouse",
        spec: Some(|| LoadWarehouse::new().spec().clone()),
        run: |context, health| load(context, health, LoadWarehouse::new()),
        predict: Some(|context, topic, replays| predict::load(context, LoadWarehouse::new(), topic, replays)),
    },
    Role {
        name: "project_twins",
        spec: Some(|| ProjectTwins::new().spec().clone()),
        run: |context, health| load(context, health, ProjectTwins::new()),
        predict: Some(|context, topic, replays| predict::load(context, ProjectTwins::new(), topic, replays)),
    },
    Role {
        name: notify::STAGE,
        spec: Some(|| Notify::new(None).spec().clone()),
        run: |context, health| {
            let config = &context.config.notify;
            let webhook = Webhook::start(&config.webhook_url, Duration::from_millis(config.timeout_ms))?;
            let age_max = (config.age_max_ms > 0).then(|| Duration::from_millis(config.age_max_ms));
            act(context, health, Notify::new(age_max), webhook)
        },
        predict: Some(|context, topic, replays| predict::act(context, Notify::new(None), topic, replays)),
    },
    Role { name: dead_letter::STAGE, spec: Some(reprocess_spec), run: reprocess, predict: None },
    Role { name: "watch", spec: None, run: watch::run, predict: None },
];

impl Role {
    /// Returns what the configuration lacks for this role, if anything: `up` then leaves it out, and `run`
    /// refuses it.
    pub fn lacks(&self, config: &Config) -> Option<&'static str> {
        let lacks_webhook = self.name == notify::STAGE && config.notify.webhook_url.is_empty();
        lacks_webhook.then_some(
            "it needs the address that alerts are posted to: `notify.webhook_url` in the file, \
             THROUGHLINE_NOTIFY__WEBHOOK_URL, or either with `_file` for a file that holds it",
        )
    }
}

/// Returns what every stage reads and keeps: the catalog derives their topics from it.
pub fn stage_specs() -> Vec<StageSpec> {
    ROLES.iter().filter_map(|role| role.spec).map(|spec| spec()).collect()
}

/// A role at work.
pub struct RunningRole {
    name: &'static str,
    thread: JoinHandle<Result<(), CliError>>,
    panicked: Arc<AtomicBool>,
}

impl RunningRole {
    /// Waits for the role's end and says whether it drained. Its error was logged when it came.
    pub fn join(self) -> bool {
        self.thread.join().is_ok_and(|result| result.is_ok())
    }

    /// Says whether the role ended by a defect of ours, after which a restart may help.
    pub fn has_panicked(&self) -> bool {
        self.panicked.load(Ordering::Acquire)
    }

    /// Returns the role's name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Says whether the thread has ended.
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }
}

/// Starts a role on a thread of its own. A role that stops by itself says so in log and health and leaves
/// the others alone: its status stays readable, and a restart would only meet the same cause.
///
/// # Errors
/// When the thread cannot be made.
pub fn start(context: &Context, role: &'static Role) -> Result<RunningRole, CliError> {
    let context = context.clone();
    let health = context.health.role(role.name);
    let panicked = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&panicked);
    let builder = std::thread::Builder::new().name(role.name.to_owned());
    let thread = builder.spawn(move || {
        // Nothing of what a panicking role held is used again; its health is.
        let run = AssertUnwindSafe(|| (role.run)(&context, health.clone()));
        let result = catch_unwind(run).unwrap_or_else(|panic| {
            flag.store(true, Ordering::Release);
            Err(panic_error(&*panic))
        });
        if let Err(error) = &result {
            tracing::error!(role = role.name, "{error}");
            health.stopped(&error.to_string());
        }
        result
    })?;
    Ok(RunningRole { name: role.name, thread, panicked })
}

fn panic_error(panic: &(dyn std::any::Any + Send)) -> CliError {
    let text = panic.downcast_ref::<&str>().copied().map(str::to_owned);
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
    CliError::failed(format!("it panicked, which is a defect of Throughline; please report it: {text}"))
}

/// Returns the topics that a stage's group subscribes to: its inputs, unless it reads only replays, their
/// replay topics and, of an act stage, their retry topics.
pub fn subscription(spec: &StageSpec, reads_only_replays: bool) -> Vec<String> {
    let inputs = spec.inputs.iter().filter(|_| !reads_only_replays).map(|input| (*input).to_owned());
    let replays = spec.inputs.iter().map(|input| replay_topic(input, spec.group));
    let retries = spec.inputs.iter().filter(|_| spec.kind == Kind::Act);
    inputs.chain(replays).chain(retries.map(|input| retry_topic(input, spec.group))).collect()
}

/// Returns how much a stage's member takes at once and fetches ahead. It subscribes to `topics` topics: inputs, and
/// what is derived from them with as many partitions.
fn batch_bounds(context: &Context, spec: &StageSpec, topics: usize) -> BatchBounds {
    let partitions = |input: &&str| context.catalog.topic(input).map_or(1, |found| found.spec.partitions);
    let partitions: i32 = spec.inputs.iter().map(partitions).sum();
    let partitions = usize::try_from(partitions).unwrap_or(1) * topics.div_ceil(spec.inputs.len().max(1));
    BatchBounds::default().fetching(context.config.stages.fetched_kib_max, partitions)
}

fn loop_config(context: &Context) -> LoopConfig {
    let commit_interval = context.config.stages.commit_interval_ms.map(Duration::from_millis);
    LoopConfig { commit_interval, ..LoopConfig::default() }
}

/// Runs a decide stage on Kafka until the process shall end.
pub fn decide<D: Decide>(context: &Context, health: RoleHealth, stage: D) -> Result<(), CliError> {
    decide_with(context, health, stage, loop_config(context))
}

fn reprocess(context: &Context, health: RoleHealth) -> Result<(), CliError> {
    let letters = PartitionReader::new(&context.kafka());
    let stage = ReprocessDeadLetters::new(letters, Arc::new(WallClock), REPLAYS_MAX);
    // Its timers are work that is due now, not times that its input could still say something about.
    let config = LoopConfig {
        tick_grace: Duration::ZERO,
        poll_wait: Duration::from_millis(50),
        ..loop_config(context)
    };
    replay_policies::beside(context, &health.clone(), || decide_with(context, health, stage, config))
}

fn decide_with<D: Decide>(
    context: &Context,
    health: RoleHealth,
    stage: D,
    config: LoopConfig,
) -> Result<(), CliError> {
    let spec = stage.spec().clone();
    let kafka = context.kafka();
    let topics = subscription(&spec, stage.reads_only_replays());
    let topics: Vec<&str> = topics.iter().map(String::as_str).collect();
    let bounds = batch_bounds(context, &spec, topics.len());
    let source = GroupSource::join(&kafka, spec.group, &topics, bounds)?;
    let transactions = TransactionalProducer::new(&kafka, spec.group, source.membership());
    let ports = DecidePorts {
        source,
        transactions,
        tables: TopicReader::new(&kafka),
        schemas: context.registry(),
        incarnation: ask_incarnation(&kafka, &topics, spec.changelog.as_deref()),
        codec: Arc::clone(&context.codec),
        clock: Arc::new(WallClock),
    };
    run_decide(stage, ports, config, &context.shutdown, health)
        .map_err(|stopped| CliError::failed(stopped.to_string()))
}

fn load<L: Load>(context: &Context, health: RoleHealth, stage: L) -> Result<(), CliError> {
    let spec = stage.spec().clone();
    let kafka = context.kafka();
    let topics = subscription(&spec, false);
    let topics: Vec<&str> = topics.iter().map(String::as_str).collect();
    let say = |dependency, message: &str| {
        // Waiting is not being stuck.
        health.turned();
        health.dependency(dependency, false, message);
    };
    let Some(options) = context.until_available(say, || store_options(context, &topics))? else {
        return Ok(());
    };
    let open = || SqlStore::open(&context.config.database.url, options.clone());
    let Some(store) = context.until_available(say, open)? else { return Ok(()) };
    let bounds = batch_bounds(context, &spec, topics.len());
    let source = GroupSource::join(&kafka, spec.group, &topics, bounds)?;
    let outlet = AckedProducer::for_member(&kafka, source.membership());
    let ports = LoadPorts {
        source,
        store,
        outlet,
        schemas: context.registry(),
        incarnation: ask_incarnation(&kafka, &topics, spec.changelog.as_deref()),
        codec: Arc::clone(&context.codec),
        clock: Arc::new(WallClock),
    };
    run_load(stage, ports, loop_config(context), &context.shutdown, health)
        .map_err(|stopped| CliError::failed(stopped.to_string()))
}

fn act<A: Act>(
    context: &Context,
    health: RoleHealth,
    stage: A,
    effector: impl Effector,
) -> Result<(), CliError> {
    let spec = stage.spec().clone();
    let kafka = context.kafka();
    let topics = subscription(&spec, false);
    let topics: Vec<&str> = topics.iter().map(String::as_str).collect();
    let bounds = batch_bounds(context, &spec, topics.len());
    let source = GroupSource::join(&kafka, spec.group, &topics, bounds)?;
    let transactions = TransactionalProducer::new(&kafka, spec.group, source.membership());
    let ports = ActPorts {
        effector,
        source,
        transactions,
        schemas: context.registry(),
        incarnation: ask_incarnation(&kafka, &topics, None),
        codec: Arc::clone(&context.codec),
        clock: Arc::new(WallClock),
    };
    run_act(stage, ports, loop_config(context), &context.shutdown, health)
        .map_err(|stopped| CliError::failed(stopped.to_string()))
}

/// Returns which cluster and topics the offsets in the store count in, and how to ask again.
///
/// # Errors
/// [`Failure::Dependency`] while Kafka cannot be asked.
pub fn store_options(context: &Context, topics: &[&str]) -> Result<StoreOptions, Failure> {
    let ask = ask_incarnation(&context.kafka(), topics, None);
    let Incarnation { cluster_id, topic_ids } = ask.ask()?;
    Ok(StoreOptions { cluster_id, topic_ids, ask: Some(ask), ..StoreOptions::default() })
}
