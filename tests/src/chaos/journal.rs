//! The committed journal of long runs, and the page that is made of it.

use super::{Plan, roles};
use crate::root;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;

/// What a run consists of: runs of an earlier harness are kept and do not count as done. 3: `notify` and its
/// webhook, a fifth of the load sent twice, a broken schema, Mosquitto, the classic protocol.
pub const HARNESS: u64 = 3;

fn file() -> PathBuf {
    root().join("docs/reliability.jsonl")
}

/// Returns the runs of builds that are broken on purpose, as `make sabotage` has told them, oldest first.
///
/// # Panics
/// When a line of the journal is no document.
pub fn sabotaged() -> Vec<Value> {
    documents(root().join("docs/sabotage.jsonl"))
}

/// Returns where the page lies.
pub fn page_file() -> PathBuf {
    root().join("docs/reliability.md")
}

/// Returns the runs so far, oldest first.
///
/// # Panics
/// When a line of the journal is no document.
pub fn entries() -> Vec<Value> {
    documents(file())
}

fn documents(file: PathBuf) -> Vec<Value> {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    text.lines()
        .map(|line| serde_json::from_str(line).expect("the journal holds one document a line"))
        .collect()
}

/// Appends a run and makes the page anew.
///
/// # Panics
/// When the files cannot be written.
pub fn append(entry: &Value) {
    let opened = OpenOptions::new().append(true).create(true).open(file());
    let written = opened.and_then(|mut file| writeln!(file, "{entry}").and_then(|()| file.sync_all()));
    written.expect("the journal can be written");
    std::fs::write(page_file(), page(&entries(), &sabotaged())).expect("the page can be written");
}

/// Says whether a run found no difference.
pub fn is_exact(entry: &Value) -> bool {
    entry["differences"].as_array().is_some_and(Vec::is_empty)
}

/// Says whether a plan need not be run again.
pub fn holds(plan: &Plan) -> bool {
    let counts = |entry: &Value| entry["harness"].as_u64() == Some(HARNESS) && is_exact(entry);
    entries().iter().any(|entry| entry["plan"] == plan.name() && counts(entry))
}

/// What is written in front of the tables.
const INTRODUCTION: &str = "\
# What was done to it, and what was lost

Made by `make chaos` from docs/reliability.jsonl: one line a run, processes of their own for every role, a real Kafka \
of one node or three (three copies, two of which must have a record), PostgreSQL or SQLite, faults under load: at \
random moments from a seed, or one that lasts. The load is MQTT at QoS 1 by paho, a fifth of it sent twice, one in a \
hundred no reading at all. A quarter of the devices are odd: clocks an hour behind or 50 minutes ahead, restarts under \
an old epoch or a new one, readings out of order. A foreign program writes records into Kafka that nobody can read: \
one in a hundred, 1,000 at once into one partition, and 1,000 under a schema that it broke. A webhook refuses one \
alert in a hundred twice. The publisher and the webhook keep journals on disk of what was acknowledged. \
Afterwards a program in Python that shares no code with the platform compares them with Kafka, tables, dead letters, \
alerts, twins and outcome counters. Differences must be 0. Crashes are processes that librdkafka ended and that were \
started again (operations.md, known defects).
";

const COLUMNS: &str = "
| run | commit | build | Kafka | store | devices speak to | instances | protocol | readings | publishes acknowledged | faults | crashes | differences |
|---|---|---|---|---|---|---|---|---|---|---|---|---|
";

/// What the counts of faults are summed up as.
fn class_of(fault: &str) -> Option<&'static str> {
    let is_role = |name: &str| roles().contains(&name);
    let about = |part: &str| fault.ends_with(part) || fault.ends_with(&format!("{part} full"));
    [
        ("SIGKILL of a role", fault.strip_prefix("kill ").is_some_and(is_role)),
        ("instances that joined and left", fault.starts_with("join and leave ")),
        ("brokers killed, hung, restarted or without disk", about(" kafka") || about("broker of three")),
        ("done to PostgreSQL", fault.contains("database") && !fault.starts_with("drop packets")),
        ("links whose packets were dropped", fault.starts_with("drop packets ")),
    ]
    .into_iter()
    .find_map(|(class, is_of_it)| is_of_it.then_some(class))
}

/// Returns the page of these runs, and of runs of builds that are broken on purpose.
pub fn page(entries: &[Value], sabotaged: &[Value]) -> String {
    let (now, before): (Vec<&Value>, Vec<&Value>) =
        entries.iter().partition(|entry| entry["harness"].as_u64() == Some(HARNESS));
    let mut page = INTRODUCTION.to_owned();
    page.push_str(&summary(&now));
    page.push_str(COLUMNS);
    now.iter().for_each(|entry| page.push_str(&row(entry)));
    page.push_str(&faults(&now));
    page.push_str(&format!(
        "\nRun it: `make chaos SEEDS=\"40 41 42\" MINUTES=5`, with the names of plans among the seeds: {}. Even \
         seeds load PostgreSQL, odd ones SQLite; 42, 43, 46, 47 and so on have three brokers; multiples of three two \
         instances of every stage and of the bridge; those that end in 3 or 8 a Mosquitto in front, which is hung and restarted, not \
         killed: what it has acknowledged and not saved is its own promise; those that end in 1 or 6 the classic \
         protocol of groups with static members. What the journal holds without differences is not run again. \
         When each fault began and how long it lasted is in the journal too, as `order`; `target/chaos/<run>.jsonl` has the same with times of day and the part it was done to. \
         Packets are dropped by nftables on the loopback device, and disks are filled that are file systems in \
         memory, where that is permitted; what was not is in the journal as `left_out`. A slow PostgreSQL is one \
         that is stopped three quarters of the time.\n",
        Plan::names()
    ));
    page.push_str(&can_fail(sabotaged));
    page.push_str(
        "\n## Runs of earlier versions of this harness\n\nWithout webhook, Mosquitto and broken schema, a tenth sent \
         twice; before run 20 without odd devices, poison and the journal of the publisher.\n",
    );
    page.push_str(COLUMNS);
    before.iter().for_each(|entry| page.push_str(&row(entry)));
    page.push_str(&faults(&before));
    page
}

/// Returns what came of the short run with builds that are broken on purpose.
fn can_fail(sabotaged: &[Value]) -> String {
    let mut text = "\n## Whether such checks can fail\n\nThe short run of `make test` (tests/src/short_run.rs) with a \
                    build that is broken on purpose must find a difference, every time, and none with a build of \
                    the same feature that does nothing wrong (`none`). Made by `make sabotage` from \
                    docs/sabotage.jsonl.\n\n\
                    | broken | runs | noticed | passed | failed otherwise | the last difference that was said first |\n\
                    |---|---|---|---|---|---|\n"
        .to_owned();
    let text_of = |entry: &Value, name: &str| entry[name].as_str().unwrap_or_default().to_owned();
    let choices: BTreeSet<String> = sabotaged.iter().map(|entry| text_of(entry, "choice")).collect();
    for choice in choices {
        let runs: Vec<_> = sabotaged.iter().filter(|entry| text_of(entry, "choice") == choice).collect();
        let count = |outcome: &str| runs.iter().filter(|entry| text_of(entry, "outcome") == outcome).count();
        let said = runs.iter().rev().map(|entry| text_of(entry, "said")).find(|said| !said.is_empty());
        text.push_str(&format!(
            "| {choice} | {} | {} | {} | {} | {} |\n",
            runs.len(),
            count("noticed"),
            count("passed"),
            count("failed otherwise"),
            said.unwrap_or_default().replace('|', "/").replace("DIFFERENCE ", ""),
        ));
    }
    text
}

fn summary(entries: &[&Value]) -> String {
    let sum = |field: &str| entries.iter().filter_map(|entry| entry[field].as_u64()).sum::<u64>();
    let differing = entries.iter().filter(|entry| !is_exact(entry)).count();
    let exact: Vec<&Value> = entries.iter().copied().filter(|entry| is_exact(entry)).collect();
    let counts = counts(&exact);
    let mut text = format!(
        "\nIn all {} runs of {} minutes: {} publishes acknowledged, {} crashes, {differing} runs with differences. \
         In the {} runs without differences:\n\n\
         | done | times |\n|---|---|\n",
        entries.len(),
        sum("seconds") / 60,
        sum("acknowledged"),
        sum("crashes"),
        exact.len(),
    );
    let mut classes: BTreeMap<&str, u64> = BTreeMap::new();
    for (name, count) in counts {
        if let Some(class) = class_of(&name) {
            *classes.entry(class).or_default() += count;
        }
    }
    for (class, times) in classes {
        text.push_str(&format!("| {class} | {times} |\n"));
    }
    text
}

fn row(entry: &Value) -> String {
    let text = |name: &str| entry[name].as_str().map_or_else(|| entry[name].to_string(), str::to_owned);
    let or = |name: &str, absent: &str| entry[name].as_str().unwrap_or(absent).to_owned();
    let injected = entry["injected"].as_object().into_iter().flatten();
    let faults: u64 = injected.filter_map(|(_, count)| count.as_u64()).sum();
    let differences = entry["differences"].as_array().map_or(0, Vec::len);
    let note = entry["note"].as_str().map(|note| format!(": {note}")).unwrap_or_default();
    format!(
        "| {} | {} | {} | {} | {} | {} | {} | {} | {} | {} of {} | {faults} | {} | {differences}{note} |\n",
        text("plan"),
        text("commit"),
        text("build"),
        entry["brokers"].as_u64().unwrap_or(1),
        text("store"),
        or("mqtt", "bridge"),
        entry["instances"].as_u64().unwrap_or(1),
        or("protocol", "KIP-848"),
        text("readings"),
        text("acknowledged"),
        text("sent"),
        text("crashes"),
    )
}

fn counts(entries: &[&Value]) -> BTreeMap<String, u64> {
    let mut counts = BTreeMap::new();
    for entry in entries {
        for (name, count) in entry["injected"].as_object().into_iter().flatten() {
            *counts.entry(name.clone()).or_default() += count.as_u64().unwrap_or(0);
        }
    }
    counts
}

fn faults(entries: &[&Value]) -> String {
    let mut text = "\n| fault | times |\n|---|---|\n".to_owned();
    for (name, count) in counts(entries) {
        text.push_str(&format!("| {name} | {count} |\n"));
    }
    text
}
