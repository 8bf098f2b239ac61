//! `throughline groups`: every consumer group with its lag and books; adopting offsets that a foreign tool
//! moved.

use crate::commands::adopt::{self, Adoption};
use crate::config::Flags;
use crate::context::Context;
use crate::failure::{CliError, Exit};
use crate::output;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use throughline_kafka::admin::Admin;
use throughline_kafka::lag::LagProbe;
use throughline_model::books::Books;
use throughline_model::outcome::Outcome;
use throughline_runtime::{Clock, WallClock};

/// Arguments of `groups`.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// List groups with state, lag in records and seconds, and outcomes
    List,
    /// Show a group's partitions
    Show {
        /// The group
        group: String,
    },
    /// Decide where a group goes on whose offsets a foreign tool moved, or whose topic was replaced
    Adopt(Adoption),
}

/// Runs the subcommand.
///
/// # Errors
/// Exit code 4 when Kafka is away, 1 when a group still has members.
pub fn run(flags: &Flags, args: &Args) -> Result<Exit, CliError> {
    let context = Context::new(flags.load()?)?;
    match &args.command {
        Command::List => list(flags, &context),
        Command::Show { group } => show(flags, &context, group),
        Command::Adopt(adoption) => adopt::run(&context, adoption),
    }
}

#[derive(Default)]
struct Summary {
    state: String,
    lag: i64,
    seconds: f64,
    counts: [u64; 6],
}

fn list(flags: &Flags, context: &Context) -> Result<Exit, CliError> {
    let kafka = context.kafka();
    let snapshot = LagProbe::new(&kafka)?.snapshot()?;
    let now = WallClock.now();
    let mut groups: BTreeMap<&str, Summary> = BTreeMap::new();
    for lag in &snapshot.groups {
        let summary = groups.entry(&lag.group).or_default();
        summary.state.clone_from(&lag.state);
        summary.lag += lag.lag;
        summary.seconds = summary.seconds.max(lag.seconds(now).unwrap_or(0.0));
    }
    let names: Vec<&str> = groups.keys().copied().collect();
    for group in Admin::new(&kafka)?.group_offsets(&names)? {
        let Some(summary) = groups.get_mut(group.group.as_str()) else { continue };
        for books in group.offsets.iter().filter_map(|o| Books::from_metadata(&o.metadata).ok()) {
            for (sum, count) in summary.counts.iter_mut().zip(books.counts) {
                *sum += count;
            }
        }
    }
    if flags.json {
        let groups: Vec<Value> = groups
            .iter()
            .map(|(group, s)| {
                let outcomes: BTreeMap<&str, u64> =
                    Outcome::ALL.iter().map(|o| (o.label(), s.counts[o.index()])).collect();
                json!({"group": group, "state": s.state, "lag": s.lag, "lag_seconds": s.seconds, "outcomes": outcomes})
            })
            .collect();
        output::json("groups.list", json!({ "groups": groups }));
        return Ok(Exit::Done);
    }
    let rows: Vec<Vec<String>> = groups
        .iter()
        .map(|(group, s)| {
            let mut row =
                vec![(*group).to_owned(), s.state.clone(), s.lag.to_string(), format!("{:.1}", s.seconds)];
            row.extend(s.counts.iter().map(u64::to_string));
            row
        })
        .collect();
    let mut header = vec!["GROUP", "STATE", "LAG", "SECONDS"];
    header.extend(Outcome::ALL.iter().map(|o| o.label()));
    output::table(&header, &rows);
    Ok(Exit::Done)
}

fn show(flags: &Flags, context: &Context, group: &str) -> Result<Exit, CliError> {
    let kafka = context.kafka();
    let snapshot = LagProbe::new(&kafka)?.snapshot()?;
    let now = WallClock.now();
    let rows: Vec<_> = snapshot.groups.iter().filter(|lag| lag.group == group).collect();
    if rows.is_empty() {
        return Err(CliError::failed(format!("group `{group}` has committed nothing")));
    }
    if flags.json {
        let partitions: Vec<Value> = rows
            .iter()
            .map(|lag| {
                json!({"topic": lag.partition.topic.as_ref(), "partition": lag.partition.partition, "next": lag.next,
                       "lag": lag.lag, "lag_seconds": lag.seconds(now)})
            })
            .collect();
        output::json("groups.show", json!({"group": group, "partitions": partitions}));
        return Ok(Exit::Done);
    }
    let rows: Vec<Vec<String>> = rows
        .iter()
        .map(|lag| {
            let seconds = lag.seconds(now).map_or_else(|| "?".to_owned(), |s| format!("{s:.1}"));
            vec![lag.partition.to_string(), lag.next.to_string(), lag.lag.to_string(), seconds]
        })
        .collect();
    output::table(&["PARTITION", "NEXT", "LAG", "SECONDS"], &rows);
    Ok(Exit::Done)
}
