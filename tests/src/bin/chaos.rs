//! `make chaos`: long runs under faults, one a seed, with a journal that is committed.
//!
//! A seed that the journal holds already is not run again, so that a run that was cut goes on where it
//! stopped. docs/reliability.md is made of the journal after each.

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};
use throughline_local::postgres::{ManagedPostgres, PostgresOptions};
use throughline_local::scratch_dir;
use throughline_tests::chaos::{Random, inject_until};
use throughline_tests::cluster::Cluster;
use throughline_tests::{Load, published, root, said};

/// Distinct readings a second: enough that every fault meets work in every role, little enough that two cores
/// keep up while processes start again.
const RATE: u64 = 400;

fn journal() -> PathBuf {
    root().join("docs/reliability.jsonl")
}

fn entries() -> Vec<Value> {
    let text = std::fs::read_to_string(journal()).unwrap_or_default();
    text.lines()
        .map(|line| serde_json::from_str(line).expect("the journal holds one document a line"))
        .collect()
}

#[expect(clippy::print_stderr, reason = "a person watches")]
fn say(text: &str) {
    eprintln!("{text}");
}

/// Runs one seed and returns its entry in the journal.
fn run(seed: u64, minutes: u64) -> Value {
    let begun = Instant::now();
    let mut random = Random(seed);
    // Even seeds load PostgreSQL, odd ones SQLite.
    let directory = scratch_dir().expect("a temporary directory can be made");
    let mut server = seed.is_multiple_of(2).then(|| {
        ManagedPostgres::start(PostgresOptions::new(directory.path().join("pg"))).expect("PostgreSQL starts")
    });
    let url = server.as_ref().map(ManagedPostgres::url);
    let mut cluster = Cluster::start(url.as_deref());
    let rule = root().join("demo/rules/demo-overheat.toml").display().to_string();
    let applied = cluster.command(&["rules", "apply", &rule]);
    assert!(applied.status.success(), "{}", said(&applied));
    cluster.wait_for_bridge();

    let time = Duration::from_secs(60 * minutes);
    let mut load = Load::new(seed, RATE * time.as_secs() * 9 / 10, 400);
    load.deadline = time * 2 + Duration::from_secs(240);
    let publisher =
        load.publish(&cluster.mqtt_port(), (RATE * 111 / 100) as u32, cluster.scratch().join("publish.log"));
    let injected =
        inject_until(Instant::now() + time, &mut random, &mut cluster, server.as_mut(), |injection| {
            say(&format!("seed {seed} {:>6.1} s: {injection:?}", begun.elapsed().as_secs_f64()));
        });
    let report = published(publisher, load.deadline);
    let kafka = cluster.kafka.bootstrap();
    let compared =
        load.compare(&kafka, cluster.database(), &["--threshold", "90", "--redelivery", "--deadline", "180"]);
    if let Err(differences) = &compared {
        say(&format!("{differences}\nthe roles said:\n{}", cluster.logs()));
    }
    let differences: Vec<String> = match compared {
        Ok(()) => Vec::new(),
        Err(text) => text.lines().filter(|line| line.starts_with("DIFFERENCE")).map(str::to_owned).collect(),
    };
    json!({
        "seed": seed,
        "commit": commit(),
        "store": if server.is_some() { "postgresql" } else { "sqlite" },
        "minutes": minutes,
        "readings": load.readings,
        "sent": report["sent"],
        "acknowledged": report["acknowledged"],
        "connects": report["connects"],
        "injected": injected,
        "differences": differences,
        "seconds": begun.elapsed().as_secs(),
    })
}

fn commit() -> String {
    let head = Command::new("git").args(["rev-parse", "--short", "HEAD"]).current_dir(root()).output();
    head.map_or_else(|_| "unknown".to_owned(), |out| String::from_utf8_lossy(&out.stdout).trim().to_owned())
}

fn append(entry: &Value) {
    let file = OpenOptions::new().append(true).create(true).open(journal());
    let written = file.and_then(|mut file| writeln!(file, "{entry}").and_then(|()| file.sync_all()));
    written.expect("the journal can be written");
}

/// Makes the page that people read from what the journal holds.
fn report() {
    let entries = entries();
    let mut page = String::from(
        "# What was done to it, and what was lost\n\nMade by `make chaos` from docs/reliability.jsonl: one \
         line a seed, processes of their own for every role, a real Kafka, PostgreSQL (even seeds) or SQLite \
         (odd seeds), faults at random moments under load. Afterwards a program in Python that shares no \
         code with the platform compares what was sent with Kafka, tables, dead letters, alerts, twins and \
         outcome counters. Differences must be 0.\n\n| seed | commit | store | readings | publishes \
         acknowledged | faults | differences |\n|---|---|---|---|---|---|---|\n",
    );
    let mut totals: BTreeMap<String, u64> = BTreeMap::new();
    for entry in &entries {
        let mut faults = 0;
        for (name, count) in entry["injected"].as_object().into_iter().flatten() {
            faults += count.as_u64().unwrap_or(0);
            *totals.entry(name.clone()).or_default() += count.as_u64().unwrap_or(0);
        }
        let text = |name: &str| entry[name].as_str().map_or_else(|| entry[name].to_string(), str::to_owned);
        let differences = entry["differences"].as_array().map_or(0, Vec::len);
        page.push_str(&format!(
            "| {} | {} | {} | {} | {} of {} | {faults} | {differences} |\n",
            text("seed"),
            text("commit"),
            text("store"),
            text("readings"),
            text("acknowledged"),
            text("sent"),
        ));
    }
    page.push_str("\n| fault | times |\n|---|---|\n");
    for (name, count) in totals {
        page.push_str(&format!("| {name} | {count} |\n"));
    }
    page.push_str(
        "\nRun it: `make chaos SEEDS=\"1 2 3\" MINUTES=5`. A seed that the journal holds is not run again.\n",
    );
    std::fs::write(root().join("docs/reliability.md"), page).expect("the page can be written");
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |text: &String| text.parse::<u64>().ok();
    let Some((minutes, seeds)) = arguments.split_first().and_then(|(first, rest)| {
        Some((number(first)?, rest.iter().map(number).collect::<Option<Vec<u64>>>()?))
    }) else {
        say("usage: chaos MINUTES SEED…");
        return ExitCode::from(2);
    };
    let mut exact = true;
    for seed in seeds {
        if entries().iter().any(|entry| entry["seed"] == seed) {
            say(&format!("seed {seed} is in the journal already"));
            continue;
        }
        let entry = run(seed, minutes);
        say(&entry.to_string());
        exact &= entry["differences"].as_array().is_some_and(Vec::is_empty);
        append(&entry);
        report();
    }
    if exact { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
