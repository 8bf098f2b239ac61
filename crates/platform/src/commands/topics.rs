//! `throughline topics`: the catalog, and the difference between it and the cluster.

use crate::config::{Config, Flags};
use crate::context::{Context, load_catalog};
use crate::failure::{CliError, Exit};
use crate::output;
use crate::roles::stage_specs;
use std::path::PathBuf;
use throughline_kafka::admin::{Admin, NewTopic};
use throughline_model::catalog::{
    Catalog, Change, Desired, Environment, Observed, ObservedSchema, ObservedTopic, Plan, name, plan, strimzi,
};

/// Arguments of `topics`.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
    /// A directory of topic files to lay over those of this build
    #[arg(long, global = true, value_name = "DIR")]
    topics: Option<PathBuf>,
}

#[derive(clap::Subcommand)]
enum Command {
    /// List the topics of the catalog
    List,
    /// Show a topic: its settings, feeds and schema, and the topics derived from it
    Show {
        /// The topic's name
        name: String,
    },
    /// Print what `apply` would change; exit code 3 when something differs
    Plan,
    /// Create topics, set their settings, register schemas; never deletes, shrinks or grows a keyed topic
    Apply,
    /// Print the topics for other tools
    Export {
        #[command(subcommand)]
        form: Form,
    },
}

#[derive(clap::Subcommand)]
enum Form {
    /// KafkaTopic resources of the Strimzi operator
    Strimzi {
        /// Value of the label `strimzi.io/cluster`
        #[arg(long, default_value = "throughline")]
        cluster: String,
    },
}

/// Runs the subcommand.
///
/// # Errors
/// Exit code 2 for a wrong topic file, 4 when Kafka or the registry is away, 1 when `apply` is refused.
pub fn run(flags: &Flags, args: &Args) -> Result<Exit, CliError> {
    let mut config = flags.load()?;
    if let Some(dir) = &args.topics {
        config.topics.dir = Some(dir.clone());
    }
    match &args.command {
        Command::List => list(flags, &load_catalog(config.topics.dir.as_deref())?),
        Command::Show { name } => show(flags, &load_catalog(config.topics.dir.as_deref())?, name),
        Command::Plan => {
            let context = Context::new(config)?;
            let found = compare(&context)?;
            print_plan(flags, &found);
            Ok(if found.is_empty() { Exit::Done } else { Exit::Found })
        }
        Command::Apply => {
            let context = Context::new(config)?;
            let found = compare(&context)?;
            print_plan(flags, &found);
            carry_out(&context, &found)?;
            Ok(Exit::Done)
        }
        Command::Export { form: Form::Strimzi { cluster } } => {
            let catalog = load_catalog(config.topics.dir.as_deref())?;
            let exported = strimzi::export(&desired(&catalog, &config)?, cluster);
            output::line(exported.map_err(|e| CliError::usage(e.to_string()))?.trim_end());
            Ok(Exit::Done)
        }
    }
}

/// Applies the catalog without printing, for `up`.
///
/// # Errors
/// As `topics apply`.
pub fn apply_quietly(context: &Context) -> Result<(), CliError> {
    let found = compare(context)?;
    carry_out(context, &found)
}

fn desired(catalog: &Catalog, config: &Config) -> Result<Desired, CliError> {
    let environment =
        Environment { replication: config.kafka.replication, min_insync: config.kafka.min_insync };
    catalog.desired(&stage_specs(), environment).map_err(|faults| {
        let lines: Vec<String> = faults.iter().map(ToString::to_string).collect();
        CliError::usage(lines.join("\n"))
    })
}

/// Returns the difference between the catalog and the cluster.
///
/// # Errors
/// Exit code 4 when Kafka or the registry is away.
pub fn compare(context: &Context) -> Result<Plan, CliError> {
    let desired = desired(&context.catalog, &context.config)?;
    let observed = observe(context, &desired)?;
    Ok(plan(&desired, &observed))
}

fn observe(context: &Context, desired: &Desired) -> Result<Observed, CliError> {
    let admin = Admin::new(&context.kafka())?;
    let existing = admin.topics()?;
    let relevant: Vec<&str> = existing
        .keys()
        .map(String::as_str)
        .filter(|topic| name::is_ours(topic) || desired.topics.iter().any(|d| d.name == *topic))
        .collect();
    let mut observed = Observed::default();
    for state in admin.describe(&relevant)? {
        let own = state.configs.into_iter().filter(|(_, config)| config.set_on_topic);
        observed.topics.push(ObservedTopic {
            name: state.name,
            partitions: state.partitions,
            replication: i16::try_from(state.replication).unwrap_or(i16::MAX),
            configs: own.map(|(key, config)| (key, config.value)).collect(),
        });
    }
    let registry = context.registry();
    for schema in &desired.schemas {
        let Some(latest) = registry.latest(&schema.subject)? else { continue };
        let refused = registry.check(&schema.subject, &schema.text)?.err().map(|reasons| reasons.join("; "));
        observed.schemas.push(ObservedSchema {
            subject: schema.subject.clone(),
            latest: latest.schema,
            refused,
        });
    }
    Ok(observed)
}

fn carry_out(context: &Context, plan: &Plan) -> Result<(), CliError> {
    if !plan.refusals.is_empty() {
        let lines: Vec<String> = plan.refusals.iter().map(|r| format!("{}: {}", r.what, r.why)).collect();
        return Err(CliError::failed(format!("nothing was changed, because of\n  {}", lines.join("\n  "))));
    }
    let admin = Admin::new(&context.kafka())?;
    let registry = context.registry();
    let mut new = Vec::new();
    for change in &plan.changes {
        match change {
            Change::RegisterSchema { schema, first, .. } => {
                registry.register(&schema.subject, &schema.text)?;
                if *first {
                    registry.set_compatibility(&schema.subject, "FULL_TRANSITIVE")?;
                }
            }
            Change::CreateTopic(topic) => new.push(NewTopic {
                name: topic.name.clone(),
                partitions: topic.partitions,
                replication: i32::from(topic.replication),
                configs: topic.configs.clone(),
            }),
            Change::AlterConfig { topic, settings } => {
                let pairs: Vec<(&str, &str)> =
                    settings.iter().map(|s| (s.key.as_str(), s.to.as_str())).collect();
                admin.set_configs(topic, &pairs)?;
            }
        }
    }
    admin.create_topics(&new)?;
    Ok(())
}

fn print_plan(flags: &Flags, plan: &Plan) {
    if !flags.json {
        output::line(plan.to_string().trim_end());
        return;
    }
    let changes: Vec<serde_json::Value> = plan
        .changes
        .iter()
        .map(|change| match change {
            Change::RegisterSchema { schema, first, added } => serde_json::json!({
                "change": "register_schema", "subject": schema.subject, "first": first, "added": added,
            }),
            Change::CreateTopic(topic) => serde_json::json!({
                "change": "create_topic", "topic": topic.name, "partitions": topic.partitions,
                "replication": topic.replication, "configs": topic.configs,
            }),
            Change::AlterConfig { topic, settings } => serde_json::json!({
                "change": "alter_config", "topic": topic,
                "settings": settings.iter()
                    .map(|s| serde_json::json!({"key": s.key, "from": s.from, "to": s.to}))
                    .collect::<Vec<_>>(),
            }),
        })
        .collect();
    let refusals: Vec<serde_json::Value> =
        plan.refusals.iter().map(|r| serde_json::json!({"what": r.what, "why": r.why})).collect();
    output::json(
        "topics.plan",
        serde_json::json!({"changes": changes, "refusals": refusals, "notes": plan.notes, "differs": !plan.is_empty()}),
    );
}

fn list(flags: &Flags, catalog: &Catalog) -> Result<Exit, CliError> {
    if flags.json {
        let topics: Vec<serde_json::Value> = catalog
            .topics()
            .map(|topic| {
                serde_json::json!({
                    "name": topic.spec.name.as_str(), "summary": topic.spec.summary, "owner": topic.spec.owner,
                    "partitions": topic.spec.partitions, "feeds": topic.spec.feeds.len(),
                })
            })
            .collect();
        output::json("topics.list", serde_json::json!({ "topics": topics }));
        return Ok(Exit::Done);
    }
    let rows: Vec<Vec<String>> = catalog
        .topics()
        .map(|topic| {
            let spec = &topic.spec;
            vec![spec.name.to_string(), spec.partitions.to_string(), spec.owner.clone(), spec.summary.clone()]
        })
        .collect();
    output::table(&["TOPIC", "PARTITIONS", "OWNER", "SUMMARY"], &rows);
    Ok(Exit::Done)
}

fn show(flags: &Flags, catalog: &Catalog, wanted: &str) -> Result<Exit, CliError> {
    let topic = catalog.topic(wanted).ok_or_else(|| {
        CliError::usage(name::unknown_topic(wanted, catalog.topics().map(|t| t.spec.name.as_str())))
    })?;
    let derived = catalog.derived(&stage_specs()).map_err(|faults| CliError::usage(format!("{faults:?}")))?;
    let derived: Vec<&str> = derived.iter().filter(|d| d.origin == wanted).map(|d| d.name.as_str()).collect();
    let schema: serde_json::Value = serde_json::from_str(&topic.schema)
        .map_err(|e| CliError::failed(format!("schema of `{wanted}`: {e}")))?;
    let spec = &topic.spec;
    if flags.json {
        let feeds: Vec<serde_json::Value> = spec
            .feeds
            .iter()
            .map(|feed| serde_json::json!({"name": feed.name, "subscription": feed.filter.subscription()}))
            .collect();
        output::json(
            "topics.show",
            serde_json::json!({
                "name": spec.name.as_str(), "summary": spec.summary, "owner": spec.owner,
                "partitions": spec.partitions, "feeds": feeds, "derived": derived, "value_schema": schema,
            }),
        );
        return Ok(Exit::Done);
    }
    output::line(&format!(
        "{}\n  {}\n  owner {}, {} partitions",
        spec.name, spec.summary, spec.owner, spec.partitions
    ));
    for feed in &spec.feeds {
        output::line(&format!("  fed by {} from {}", feed.name, feed.filter.subscription()));
    }
    for topic in derived {
        output::line(&format!("  derived {topic}"));
    }
    let pretty = serde_json::to_string_pretty(&schema).expect("a JSON value serializes");
    output::line(&format!("\n{pretty}"));
    Ok(Exit::Done)
}
