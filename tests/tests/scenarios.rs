//! Every file of `tests/scenarios` on the cluster in memory and on a real Kafka.

use throughline_tests::scenario_run::{KafkaWorld, MemoryWorld, files, run};

#[test]
fn scenarios_hold_in_memory() {
    report(files().iter().map(|file| run(&mut MemoryWorld::new(), file)));
}

#[test]
fn scenarios_hold_on_kafka() {
    let mut world = KafkaWorld::start();
    report(files().iter().map(|file| run(&mut world, file)));
}

/// Goes through all of them before it fails: what differs in several places has one cause more often than not.
fn report(results: impl Iterator<Item = Result<(), String>>) {
    let failed: Vec<String> = results.filter_map(Result::err).collect();
    assert!(failed.is_empty(), "\n{}", failed.join("\n"));
}
