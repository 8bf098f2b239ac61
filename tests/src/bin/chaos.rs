//! `make chaos`: long runs under faults, one a seed or plan, with a journal that is committed.
//!
//! One that the journal holds without differences is not run again, so that a run that was cut goes on where it
//! stopped. docs/reliability.md is made of the journal after each.

use serde_json::{Value, json};
use std::fs::File;
use std::io::Write;
use std::process::{Command, ExitCode};
use std::time::{Instant, SystemTime, UNIX_EPOCH};
use throughline_tests::chaos::{Means, Plan, Rig, Told, journal};
use throughline_tests::root;

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
    let mut events = events(plan);
    let mut order = Vec::new();
    let injected = plan.carry_out(&mut rig, |told| match told {
        Told::Begins(injection) => {
            say(&format!("{} {:>6.1} s: {injection:?}", plan.name(), begun.elapsed().as_secs_f64()));
        }
        Told::Ended { injection, began, ended } => {
            let event = json!({
                "fault": injection.name(),
                "part": injection.part(),
                "detail": format!("{injection:?}"),
                "began_us": micros(began),
                "ended_us": micros(ended),
            });
            writeln!(events, "{event}").expect("the file of events can be written");
            let lasted = ended.duration_since(began).unwrap_or_default().as_secs_f64();
            let at = begun.elapsed().as_secs_f64() - lasted;
            order.push(format!("{at:.1}+{lasted:.1} {injection:?}"));
        }
    });
    let report = rig.finish();
    let extra = plan.oracle(&rig);
    let compared = rig.compare(&extra.iter().map(String::as_str).collect::<Vec<_>>());
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
        "harness": journal::HARNESS,
        "commit": commit,
        "build": std::env::var("PLATFORM_BUILD").unwrap_or_else(|_| "dev".to_owned()),
        "store": if means.has_server { "postgresql" } else { "sqlite" },
        "brokers": means.brokers,
        "mqtt": if means.has_mosquitto { "mosquitto" } else { "bridge" },
        "instances": if means.is_doubled { 2 } else { 1 },
        "protocol": if plan.is_classic() { "classic" } else { "KIP-848" },
        "readings": rig.load.readings,
        "sent": report["sent"],
        "acknowledged": report["acknowledged"],
        "injected": injected,
        // Seconds from the beginning, seconds that it lasted, what it was.
        "order": order,
        "left_out": left_out(plan, means),
        "crashes": rig.cluster.crashes(),
        "differences": differences,
        "seconds": begun.elapsed().as_secs(),
    })
}

/// Makes the file of when each fault began and ended, against which a diagnosis can be held.
fn events(plan: &Plan) -> File {
    let directory = root().join("target/chaos");
    std::fs::create_dir_all(&directory).expect("target/ can be written");
    File::create(directory.join(format!("{}.jsonl", plan.name()))).expect("target/ can be written")
}

fn micros(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).expect("the clock stands after 1970").as_micros() as u64
}

/// Returns the faults that this machine does not permit.
fn left_out(plan: &Plan, means: Means) -> Vec<&'static str> {
    let wanted = [(means.may_drop, "packets dropped (nftables)"), (means.small_disks, "full disks (tmpfs)")];
    let missing = wanted.iter().filter(|(permitted, _)| !permitted && plan.fills_disks());
    missing.map(|(_, name)| *name).collect()
}

fn commit() -> String {
    let head = Command::new("git").args(["rev-parse", "--short", "HEAD"]).current_dir(root()).output();
    head.map_or_else(|_| "unknown".to_owned(), |out| String::from_utf8_lossy(&out.stdout).trim().to_owned())
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
        if journal::holds(&plan) {
            say(&format!("{} is in the journal already", plan.name()));
            continue;
        }
        let entry = run(&plan);
        say(&entry.to_string());
        exact &= journal::is_exact(&entry);
        journal::append(&entry);
    }
    if exact { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
