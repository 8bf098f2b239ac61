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
use std::time::{Duration, Instant};
use throughline_local::postgres::{ManagedPostgres, PostgresOptions};
use throughline_local::scratch_dir;
use throughline_tests::chaos::Plan;
use throughline_tests::cluster::Cluster;
use throughline_tests::{Load, published, root, said, wait_for};

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

/// Carries out one plan and returns its entry in the journal.
fn run(plan: &Plan) -> Value {
    let begun = Instant::now();
    let directory = scratch_dir().expect("a temporary directory can be made");
    let mut server = plan.has_server().then(|| {
        ManagedPostgres::start(PostgresOptions::new(directory.path().join("pg"))).expect("PostgreSQL starts")
    });
    let url = server.as_ref().map(ManagedPostgres::url);
    let mut cluster = Cluster::start(url.as_deref());
    let rule = root().join("demo/rules/demo-overheat.toml").display().to_string();
    let applied = cluster.command(&["rules", "apply", &rule]);
    assert!(applied.status.success(), "{}", said(&applied));
    cluster.wait_for_bridge();

    let mut load = Load::new(plan.seed(), RATE * plan.time().as_secs() * 9 / 10, 400);
    load.deadline = plan.time() * 2 + Duration::from_secs(240);
    let log = cluster.scratch().join("publish.log");
    let mut publisher = load.publish(&cluster.mqtt_port(), (RATE * 111 / 100) as u32, log);
    let injected = plan.carry_out(&mut cluster, server.as_mut(), |injection| {
        say(&format!("{} {:>6.1} s: {injection:?}", plan.name(), begun.elapsed().as_secs_f64()));
    });
    wait_for("the publisher's end", load.deadline, || {
        cluster.start_what_crashed();
        publisher.has_ended().then_some(())
    });
    let report = published(publisher, Duration::from_secs(1));
    let kafka = cluster.kafka.bootstrap();
    let compared =
        load.compare(&kafka, cluster.database(), &["--threshold", "90", "--redelivery", "--deadline", "240"]);
    if let Err(differences) = &compared {
        say(&format!("{differences}\nthe roles said:\n{}", cluster.logs()));
        say(&format!("Kafka's data and the logs stay in {}", cluster.keep_scratch().display()));
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
        "commit": commit(),
        "build": std::env::var("PLATFORM_BUILD").unwrap_or_else(|_| "dev".to_owned()),
        "store": if server.is_some() { "postgresql" } else { "sqlite" },
        "readings": load.readings,
        "sent": report["sent"],
        "acknowledged": report["acknowledged"],
        "connects": report["connects"],
        "injected": injected,
        "crashes": cluster.crashes(),
        "differences": differences,
        "seconds": begun.elapsed().as_secs(),
    })
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
         line a run, processes of their own for every role, a real Kafka of one node, \
         PostgreSQL or SQLite, faults under load: at random moments from a seed, or one that lasts. Afterwards \
         a program in Python that shares no code with the platform compares what was sent with Kafka, tables, \
         dead letters, alerts, twins and outcome counters. Differences must be 0. Crashes are processes that \
         SIGSEGV ended (librdkafka's issue 5280, see operations.md) and that were started again.\n\n\
         | run | commit | build | store | readings | publishes acknowledged | faults | crashes | differences |\n\
         |---|---|---|---|---|---|---|---|---|\n",
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
            "| {} | {} | {} | {} | {} | {} of {} | {faults} | {} | {differences}{} |\n",
            text("plan"),
            text("commit"),
            text("build"),
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
    page.push_str(
        "\nRun it: `make chaos SEEDS=\"1 2 3\" MINUTES=5`, or with `database_down` (ten minutes), \
         `rebalance_storm` (ten minutes) or `kafka_unreachable` (three minutes) among the seeds. What the \
         journal holds without differences is not run again. Packets are dropped by nftables on the loopback device, where that \
         is permitted; elsewhere these faults are left out.\n",
    );
    std::fs::write(root().join("docs/reliability.md"), page).expect("the page can be written");
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let plans = arguments.split_first().and_then(|(minutes, plans)| {
        let minutes = minutes.parse().ok()?;
        plans.iter().map(|text| Plan::parse(text, minutes)).collect::<Option<Vec<_>>>()
    });
    let Some(plans) = plans else {
        say("usage: chaos MINUTES (SEED | database_down | rebalance_storm | kafka_unreachable)…");
        return ExitCode::from(2);
    };
    let mut exact = true;
    for plan in plans {
        if entries().iter().any(|entry| entry["plan"] == plan.name() && is_exact(entry)) {
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
