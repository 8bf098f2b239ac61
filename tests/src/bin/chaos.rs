//! `make chaos`: long runs under faults, one a seed or plan, with a journal that is committed.
//!
//! One that the journal holds without differences is not run again, so that a run that was cut goes on where it
//! stopped. docs/reliability.md is made of the journal after each.

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Instant;
use throughline_tests::chaos::{Means, Plan, Rig};
use throughline_tests::root;

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

/// Carries out one plan and returns its entry in the journal.
fn run(plan: &Plan) -> Value {
    let begun = Instant::now();
    // That of the beginning: the build is what was there then.
    let commit = commit();
    let mut rig = Rig::start(plan);
    let means = rig.means();
    let injected = plan.carry_out(&mut rig, |injection| {
        say(&format!("{} {:>6.1} s: {injection:?}", plan.name(), begun.elapsed().as_secs_f64()));
    });
    let report = rig.finish();
    let compared = rig.compare(plan.oracle());
    if let Err(differences) = &compared {
        say(&format!("{differences}\nthe roles said:\n{}", rig.cluster.logs()));
        say(&format!("Kafka's data and the logs stay in {}", rig.cluster.keep_scratch().display()));
    }
    let differences: Vec<String> = match compared {
        Ok(()) => Vec::new(),
        Err(text) => {
            let found: Vec<_> =
                text.lines().filter(|line| line.starts_with("DIFFERENCE")).map(str::to_owned).collect();
            if found.is_empty() { vec![text] } else { found }
        }
    };
    json!({
        "plan": plan.name(),
        "commit": commit,
        "build": std::env::var("PLATFORM_BUILD").unwrap_or_else(|_| "dev".to_owned()),
        "store": if means.has_server { "postgresql" } else { "sqlite" },
        "brokers": means.brokers,
        "readings": rig.load.readings,
        "sent": report["sent"],
        "acknowledged": report["acknowledged"],
        "injected": injected,
        "left_out": left_out(plan, means),
        "crashes": rig.cluster.crashes(),
        "differences": differences,
        "seconds": begun.elapsed().as_secs(),
    })
}

/// Returns the faults that this machine does not permit.
fn left_out(plan: &Plan, means: Means) -> Vec<&'static str> {
    let wanted = [(means.may_drop, "packets dropped (nftables)"), (means.small_disks, "full disks (tmpfs)")];
    let missing = wanted.iter().filter(|(permitted, _)| !permitted && plan.fills_disks());
    missing.map(|(_, name)| *name).collect()
}

fn is_exact(entry: &Value) -> bool {
    entry["differences"].as_array().is_some_and(Vec::is_empty)
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
         line a run, processes of their own for every role, a real Kafka of one node or three (three copies, \
         two of which must have a record), PostgreSQL or SQLite, faults under load: at random moments from a \
         seed, or one that lasts. The load is MQTT at QoS 1 by paho, a tenth of it sent twice, one in a \
         hundred no reading at all; from run 20 on a quarter of the devices are odd (clocks an hour behind or \
         50 minutes ahead, restarts under an old epoch or a new one, readings out of order) and a foreign \
         program writes records into Kafka that nobody can read: one in a hundred, and 1,000 at once into one \
         partition. The publisher keeps a journal on disk of what was acknowledged to it. Afterwards a program \
         in Python that shares no code with the platform compares that journal with Kafka, tables, dead \
         letters, alerts, twins and outcome counters. Differences must be 0. Crashes are processes that \
         librdkafka ended and that were started again (operations.md, known defects).\n\n\
         | run | commit | build | brokers | store | readings | publishes acknowledged | faults | crashes | differences |\n\
         |---|---|---|---|---|---|---|---|---|---|\n",
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
            "| {} | {} | {} | {} | {} | {} | {} of {} | {faults} | {} | {differences}{} |\n",
            text("plan"),
            text("commit"),
            text("build"),
            entry["brokers"].as_u64().unwrap_or(1),
            text("store"),
            text("readings"),
            text("acknowledged"),
            text("sent"),
            text("crashes"),
            entry["note"].as_str().map(|note| format!(": {note}")).unwrap_or_default(),
        ));
    }
    page.push_str("\n| fault | times |\n|---|---|\n");
    for (name, count) in totals {
        page.push_str(&format!("| {name} | {count} |\n"));
    }
    page.push_str(&format!(
        "\nRun it: `make chaos SEEDS=\"20 21 22\" MINUTES=5`, with the names of plans among the seeds: {}. Even \
         seeds load PostgreSQL, odd ones SQLite; 22, 23, 26, 27 and so on have three brokers. What the journal \
         holds without differences is not run again. Packets are dropped by nftables on the loopback device, \
         and disks are filled that are file systems in memory, where that is permitted; what was not is in the \
         journal as `left_out`. A slow PostgreSQL is one that is stopped three quarters of the time.\n",
        Plan::names()
    ));
    std::fs::write(root().join("docs/reliability.md"), page).expect("the page can be written");
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let plans = arguments.split_first().and_then(|(minutes, plans)| {
        let minutes = minutes.parse().ok()?;
        plans.iter().map(|text| Plan::parse(text, minutes)).collect::<Option<Vec<_>>>()
    });
    let Some(plans) = plans else {
        say(&format!("usage: chaos MINUTES (SEED | {})…", Plan::names()));
        return ExitCode::from(2);
    };
    let mut exact = true;
    for plan in plans {
        // What ran before there was a journal of the publisher, when there was one broker only, is run again.
        let counts = |entry: &Value| entry["brokers"].is_u64() && is_exact(entry);
        if entries().iter().any(|entry| entry["plan"] == plan.name() && counts(entry)) {
            say(&format!("{} is in the journal already", plan.name()));
            continue;
        }
        let entry = run(&plan);
        say(&entry.to_string());
        exact &= is_exact(&entry);
        append(&entry);
        report();
    }
    if exact { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
