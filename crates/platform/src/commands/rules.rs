//! `throughline rules`: rules are data in a compacted topic; changes take effect at run time.

mod rehearsal;

use crate::config::Flags;
use crate::context::Context;
use crate::failure::{CliError, Exit};
use crate::{output, records};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use throughline_kafka::TopicReader;
use throughline_kafka::browse::end_offsets;
use throughline_model::envelope::{Enveloped, IDENTITY_NONE, RuleRecord};
use throughline_model::ids::TraceId;
use throughline_model::record::{Outbox, TopicPartition};
use throughline_model::rules::{RuleDefinition, RuleSet};
use throughline_model::stage::traceparent;
use throughline_model::time::Timestamp;
use throughline_model::topics::SERVICE_PLATFORM_RULE_V1;
use throughline_runtime::ports::TableReader;
use throughline_runtime::{Clock, WallClock};
use uuid::Uuid;

/// How long a rule may take from Kafka into force; a tenth of a second is usual.
const TAKEN_WITHIN: Duration = Duration::from_secs(10);
/// How long the status page may take to answer.
const ASK_WITHIN: Duration = Duration::from_secs(1);

/// Arguments of `rules`.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Check rule files in full and put them in force
    Apply {
        /// TOML files, one rule each
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
    /// List the rules with their versions
    List,
    /// Print a rule as its author wrote it
    Show {
        /// The rule's id
        id: String,
    },
    /// Hold readings in a file against a rule file, without the platform; exit code 3 when a result differs
    Test {
        /// The rule's TOML file
        rule: PathBuf,
        /// Lines of JSON: {"device":"site/device","at":"2026-01-31T10:00:00Z","values":{…},"expect":"raised"}
        readings: PathBuf,
    },
    /// Take a rule out of force; its raised alerts clear
    Disable {
        /// The rule's id
        id: String,
    },
    /// Put a disabled rule in force again
    Enable {
        /// The rule's id
        id: String,
    },
}

/// Runs the subcommand.
///
/// # Errors
/// Exit code 2 for a rule that is wrong, with file, line and position; 4 when Kafka or registry is away.
pub fn run(flags: &Flags, args: &Args) -> Result<Exit, CliError> {
    match &args.command {
        Command::Apply { files } => {
            let context = Context::new(flags.load()?)?;
            let mut sources = Vec::new();
            for file in files {
                sources.push((file.display().to_string(), read(file)?));
            }
            apply(&context, &sources)
        }
        Command::List => list(flags),
        Command::Show { id } => {
            let context = Context::new(flags.load()?)?;
            output::line(find(&in_force(&context)?, id)?.definition.trim_end());
            Ok(Exit::Done)
        }
        Command::Test { rule, readings } => rehearsal::run(
            &rule.display().to_string(),
            &read(rule)?,
            &readings.display().to_string(),
            &read(readings)?,
        ),
        Command::Disable { id } => switch(flags, id, false),
        Command::Enable { id } => switch(flags, id, true),
    }
}

fn read(path: &Path) -> Result<String, CliError> {
    std::fs::read_to_string(path)
        .map_err(|e| CliError::usage(format!("cannot read `{}`: {e}", path.display())))
}

/// Checks rules in full and puts them in force. Nothing is sent unless all of them are right.
///
/// # Errors
/// As `rules apply`.
pub fn apply(context: &Context, sources: &[(String, String)]) -> Result<Exit, CliError> {
    for line in put_in_force(context, sources)? {
        output::progress(&line);
    }
    wait_until_taken(context)?;
    Ok(Exit::Done)
}

/// Waits until the `evaluate_rules` that this command can see has taken every rule, so that a reading
/// published afterwards meets them. Members elsewhere take a rule within moments, which is said.
fn wait_until_taken(context: &Context) -> Result<(), CliError> {
    let ends = end_offsets(&context.kafka(), SERVICE_PLATFORM_RULE_V1)?;
    let agent = ureq::Agent::config_builder().timeout_global(Some(ASK_WITHIN)).build().new_agent();
    let url = format!("http://{}/v1/status", context.config.http.listen);
    let limit = Instant::now() + TAKEN_WITHIN;
    loop {
        let status =
            agent.get(&url).call().ok().and_then(|mut answer| answer.body_mut().read_json::<Value>().ok());
        let role = status.as_ref().and_then(|s| s["roles"].get("evaluate_rules"));
        let Some(role) = role else {
            output::notice("in Kafka; no evaluate_rules answers here, its members take it within moments");
            return Ok(());
        };
        let taken = |p: &TopicPartition| role["notes"]["tables"][p.to_string()].as_i64().unwrap_or(0);
        if ends.iter().all(|(partition, end)| taken(partition) >= *end) {
            return Ok(());
        }
        if Instant::now() > limit {
            return Err(CliError::failed(format!(
                "the rules are in Kafka, but evaluate_rules has not taken them within {TAKEN_WITHIN:?}: `throughline doctor`"
            )));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// As [`apply`], without printing.
///
/// # Errors
/// As `rules apply`.
pub fn apply_quietly(context: &Context, sources: &[(String, String)]) -> Result<(), CliError> {
    put_in_force(context, sources).map(|_| ())
}

fn put_in_force(context: &Context, sources: &[(String, String)]) -> Result<Vec<String>, CliError> {
    let mut lines = Vec::new();
    let known = in_force(context)?;
    let mut changed: Vec<RuleRecord> = Vec::new();
    for (file, text) in sources {
        let definition = check(file, text)?;
        let before = known.get(&definition.id);
        if before.is_some_and(|b| b.definition == *text && b.enabled == definition.enabled) {
            lines.push(format!(
                "{}: unchanged, version {}",
                definition.id,
                before.map_or(0, |b| b.rule_version)
            ));
            continue;
        }
        let version = before.map_or(1, |b| b.rule_version + 1);
        lines.push(format!("{}: version {version}", definition.id));
        changed.push(record(&definition.id, version, definition.enabled, text));
    }
    publish(context, &changed)?;
    Ok(lines)
}

fn check(file: &str, text: &str) -> Result<RuleDefinition, CliError> {
    let refuse = |e: throughline_model::strict_toml::FileError| CliError::usage(e.to_string());
    let definition = RuleDefinition::parse(file, text).map_err(refuse)?;
    RuleSet::default().put(file, text, 1).map_err(refuse)?;
    Ok(definition)
}

fn record(id: &str, version: i64, enabled: bool, definition: &str) -> RuleRecord {
    let now = WallClock.now();
    RuleRecord {
        message_id: Uuid::now_v7().to_string(),
        trace_id: TraceId::mint(now, id.as_bytes(), rand::random()).to_string(),
        identity: IDENTITY_NONE.to_owned(),
        received_by: "throughline rules".to_owned(),
        stream: "rule".to_owned(),
        occurred_at: now,
        received_at: now,
        rule_id: id.to_owned(),
        rule_version: version,
        enabled,
        definition: definition.to_owned(),
        ..RuleRecord::default()
    }
}

fn publish(context: &Context, rules: &[RuleRecord]) -> Result<(), CliError> {
    context.bind_schemas()?;
    let topic: Arc<str> = SERVICE_PLATFORM_RULE_V1.into();
    let mut outbox = Outbox::default();
    for rule in rules {
        let trace = traceparent(&rule.envelope());
        let headers = trace.as_deref().map(|t| ("traceparent", t.as_bytes()));
        outbox
            .push_with(&topic, None, Some(rule.rule_id.as_bytes()), headers, |out| {
                context.codec.encode(SERVICE_PLATFORM_RULE_V1, rule, out).map(|()| true)
            })
            .map_err(|e| CliError::failed(e.to_string()))?;
    }
    records::send(context, &outbox)
}

/// Returns the newest record of every rule.
fn in_force(context: &Context) -> Result<BTreeMap<String, RuleRecord>, CliError> {
    context.bind_schemas()?;
    let mut rules = BTreeMap::new();
    let mut unreadable = Vec::new();
    TopicReader::new(&context.kafka()).follow(SERVICE_PLATFORM_RULE_V1, &mut |batch| {
        for item in batch.iter() {
            let key = item.key_str().unwrap_or_default().to_owned();
            match item.value.map(|_| context.codec.decode::<RuleRecord>(item.value)) {
                None => drop(rules.remove(&key)),
                Some(Ok(rule)) => drop(rules.insert(key, rule)),
                Some(Err(e)) => unreadable.push(format!(
                    "{SERVICE_PLATFORM_RULE_V1}/{}/{}: {e}",
                    batch.source.partition, item.offset
                )),
            }
        }
    })?;
    for line in unreadable {
        output::notice(&format!("left out of account: {line}"));
    }
    Ok(rules)
}

fn find<'a>(rules: &'a BTreeMap<String, RuleRecord>, id: &str) -> Result<&'a RuleRecord, CliError> {
    rules.get(id).ok_or_else(|| {
        let known: Vec<&str> = rules.keys().map(String::as_str).collect();
        CliError::usage(format!("there is no rule `{id}`; the rules are: {}", known.join(", ")))
    })
}

fn list(flags: &Flags) -> Result<Exit, CliError> {
    let context = Context::new(flags.load()?)?;
    let rules = in_force(&context)?;
    let parsed = rules.values().map(|rule| (rule, RuleDefinition::parse(&rule.rule_id, &rule.definition)));
    if flags.json {
        let rules: Vec<Value> = parsed
            .map(|(rule, definition)| {
                json!({
                    "id": rule.rule_id, "version": rule.rule_version, "enabled": rule.enabled,
                    "changed_at": rule.occurred_at.to_string(),
                    "when": definition.as_ref().ok().map(|d| d.when.clone()),
                    "problem": definition.err().map(|e| e.to_string()),
                })
            })
            .collect();
        output::json("rules.list", json!({ "rules": rules }));
        return Ok(Exit::Done);
    }
    let rows: Vec<Vec<String>> = parsed
        .map(|(rule, definition)| {
            let condition = definition.map_or_else(|e| format!("problem: {e}"), |d| d.when);
            let state = if rule.enabled { "in force" } else { "disabled" };
            vec![rule.rule_id.clone(), rule.rule_version.to_string(), state.to_owned(), condition]
        })
        .collect();
    output::table(&["RULE", "VERSION", "STATE", "WHEN"], &rows);
    Ok(Exit::Done)
}

fn switch(flags: &Flags, id: &str, enabled: bool) -> Result<Exit, CliError> {
    let context = Context::new(flags.load()?)?;
    let rules = in_force(&context)?;
    let rule = find(&rules, id)?;
    if rule.enabled == enabled {
        output::progress(&format!("{id}: unchanged"));
        return Ok(Exit::Done);
    }
    publish(&context, &[record(id, rule.rule_version + 1, enabled, &rule.definition)])?;
    wait_until_taken(&context)?;
    Ok(Exit::Done)
}

/// Returns a time that is never 0, for records that a rehearsal makes.
fn rehearsal_start() -> Timestamp {
    Timestamp(1_000_000_000_000_000)
}
