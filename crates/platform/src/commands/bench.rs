//! `throughline bench`: what bridge, stages and stores cost, beside plain clients in the same run.
//!
//! Each role runs as `throughline run ROLE` in a process of its own, with every guarantee on, so that its
//! CPU time is its own. `docs/benchmarks.md` says how to read the figures.

mod bridge;
mod cpu;
mod place;
mod readings;
mod stages;

use crate::config::Flags;
use crate::failure::{CliError, Exit};
use crate::output;
use crate::process::Signals;
use cpu::Spent;
use place::Place;
use serde::Serialize;
use std::time::Duration;

/// Arguments of `bench`.
#[derive(clap::Args)]
pub struct Args {
    /// What to measure
    #[arg(value_enum, default_value_t = Part::All)]
    part: Part,
    /// Messages of each part
    #[arg(long, default_value_t = 1_000_000, value_name = "N",
          value_parser = clap::value_parser!(u64).range(10_000..=100_000_000))]
    messages: u64,
    /// MQTT connections of the generator
    #[arg(long, default_value_t = 50, value_name = "N",
          value_parser = clap::value_parser!(u64).range(1..=10_000))]
    connections: u64,
    /// Publishes that each connection keeps open
    #[arg(long, default_value_t = 50, value_name = "N",
          value_parser = clap::value_parser!(u64).range(1..=65_535))]
    open: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
enum Part {
    Bridge,
    EvaluateRules,
    BridgeData,
    LoadWarehouse,
    All,
}

/// How long `messages` may take: at a hundredth of what is expected, and time to start.
fn limit(messages: u64) -> Duration {
    Duration::from_secs(60 + messages / 2_000)
}

/// One line of the result.
#[derive(Serialize)]
struct Line {
    /// The role, or the plain client beside it.
    what: &'static str,
    messages: u64,
    per_second: f64,
    /// CPU seconds (user and system) per million messages, by process. What was not measured is absent.
    cpu_seconds_per_million: Spent,
    note: String,
    mark: Option<Mark>,
}

/// What a role shall reach at least.
#[derive(Clone, Serialize)]
struct Mark {
    wanted: String,
    met: bool,
}

impl Mark {
    /// The CPU time of the role itself is at most so many seconds per million messages.
    fn role_cpu(spent: &Spent, most: f64) -> Option<Self> {
        let met = spent.role? <= most;
        Some(Self { wanted: format!("role <= {most} CPU-s/M"), met })
    }
}

impl Line {
    fn new(what: &'static str, messages: u64, took: Duration, spent: Spent) -> Self {
        Self {
            what,
            messages,
            per_second: messages as f64 / took.as_secs_f64().max(1e-6),
            cpu_seconds_per_million: spent.per_million(messages),
            note: String::new(),
            mark: None,
        }
    }

    fn note(mut self, note: String) -> Self {
        self.note = note;
        self
    }

    /// Sets the mark on the role's CPU time.
    fn marked(mut self, most: f64) -> Self {
        self.mark = Mark::role_cpu(&self.cpu_seconds_per_million, most);
        self
    }
}

/// Measures and prints a table, or JSON.
///
/// # Errors
/// Usage errors, exit code 4 when a given service is away. A missed mark is no error but exit code 3.
pub fn run(flags: &Flags, args: &Args) -> Result<Exit, CliError> {
    let signals = Signals::install()?;
    if cfg!(debug_assertions) {
        output::notice("this is a debug build, whose figures say little: build with `--release`");
    }
    let mut place = Place::start(flags, signals, args.part)?;
    let mut lines = Vec::new();
    let wanted = |part: Part| args.part == part || args.part == Part::All;
    // The bridge comes last: its records would stand before those that the stages are measured with, and
    // `bridge_data` after the store whose input it writes.
    if wanted(Part::EvaluateRules) {
        lines.extend(stages::evaluate_rules(&mut place, args.messages)?);
    }
    if wanted(Part::LoadWarehouse) {
        lines.extend(stages::load_warehouse(&mut place, args.messages)?);
    }
    if wanted(Part::BridgeData) {
        lines.extend(stages::bridge_data(&mut place, args.messages)?);
    }
    if wanted(Part::Bridge) {
        lines.extend(bridge::measure(&mut place, args)?);
    }
    place.stop()?;
    print(flags, &lines);
    let missed = lines.iter().any(|line| line.mark.as_ref().is_some_and(|mark| !mark.met));
    Ok(if missed { Exit::Found } else { Exit::Done })
}

fn print(flags: &Flags, lines: &[Line]) {
    if flags.json {
        output::json("bench", serde_json::json!({ "lines": lines }));
        return;
    }
    let figure = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.2}"));
    let rows: Vec<Vec<String>> = lines
        .iter()
        .map(|line| {
            let cpu = &line.cpu_seconds_per_million;
            let mark = line
                .mark
                .as_ref()
                .map(|mark| format!("{}: {}", mark.wanted, if mark.met { "met" } else { "MISSED" }));
            vec![
                line.what.to_owned(),
                line.messages.to_string(),
                format!("{:.0}", line.per_second),
                figure(cpu.role),
                figure(cpu.broker),
                figure(cpu.bench),
                figure(cpu.database),
                mark.unwrap_or_default(),
                line.note.clone(),
            ]
        })
        .collect();
    output::line("CPU is user and system time in seconds per million messages.\n");
    output::table(
        &["WHAT", "MESSAGES", "MSG/S", "ROLE", "BROKER", "BENCH", "DATABASE", "MARK", "NOTE"],
        &rows,
    );
}
