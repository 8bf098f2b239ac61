//! `throughline groups`: every consumer group with its lag and books; adopting offsets that a foreign tool
//! moved.

use crate::config::Flags;
use crate::context::Context;
use crate::failure::{CliError, Exit};
use crate::output;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use throughline_kafka::admin::{Admin, commit_for_group};
use throughline_kafka::lag::LagProbe;
use throughline_model::books::Books;
use throughline_model::outcome::Outcome;
use throughline_runtime::ports::Advance;
use throughline_runtime::{Clock, WallClock};
use uuid::Uuid;

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
    /// Accept offsets that a foreign tool moved: a new, named volume of the books begins there
    Adopt {
        /// The group; stop its members first
        group: String,
        /// Do it; without it the command only shows what it would do
        #[arg(long)]
        yes: bool,
    },
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
        Command::Adopt { group, yes } => adopt(&context, group, *yes),
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

fn adopt(context: &Context, group: &str, yes: bool) -> Result<Exit, CliError> {
    let kafka = context.kafka();
    let admin = Admin::new(&kafka)?;
    let members: usize = admin.describe_groups(&[group])?.iter().map(|g| g.members.len()).sum();
    let offsets = admin.group_offsets(&[group])?;
    let volume = format!("adopted-{}", Uuid::now_v7());
    let foreign: Vec<Advance> = offsets
        .into_iter()
        .flat_map(|g| g.offsets)
        .filter(|o| Books::from_metadata(&o.metadata).is_err())
        .map(|o| Advance {
            partition: o.partition,
            from: o.next,
            to: o.next,
            books: Books::open(volume.clone()),
        })
        .collect();
    if foreign.is_empty() {
        output::line(&format!("every offset of `{group}` carries its books: nothing to adopt"));
        return Ok(Exit::Done);
    }
    for advance in &foreign {
        output::line(&format!("{} goes on at {} in volume {volume}", advance.partition, advance.to));
    }
    if !yes {
        output::notice("nothing was changed; add --yes to adopt");
        return Ok(Exit::Done);
    }
    if members > 0 {
        return Err(CliError::failed(format!("`{group}` has {members} members: stop them first")));
    }
    commit_for_group(&kafka, group, &foreign)?;
    let after = admin.group_offsets(&[group])?;
    let still =
        after.iter().flat_map(|g| &g.offsets).filter(|o| Books::from_metadata(&o.metadata).is_err()).count();
    if still > 0 {
        return Err(CliError::failed(format!("{still} offsets of `{group}` are still foreign")));
    }
    Ok(Exit::Done)
}
