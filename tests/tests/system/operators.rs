//! What operators do with Kafka's own tools, and how a stage goes on afterwards.

use std::path::Path;
use std::time::Duration;
use throughline_tests::cluster::Cluster;
use throughline_tests::{Load, published, said, sqlite, wait_for};

const SOON: Duration = Duration::from_secs(60);
const READINGS: u64 = 3_000;

/// Publishes readings of the same devices from the first sequence number on.
fn publish(cluster: &Cluster, seed: u64, readings: u64) {
    let load = Load::new(seed, readings, 50);
    published(load.publish(&cluster.mqtt_port(), 1_000, cluster.scratch().join("publish.log")), SOON);
}

/// Waits until the warehouse has every reading and asserts that it has none twice.
fn every_reading_is_there_once(cluster: &Cluster, readings: u64) {
    wait_for("the rows", SOON, || {
        let count = sqlite(cluster.database(), "SELECT COUNT(DISTINCT message_id) FROM reading");
        (count.trim().parse::<u64>().expect("a count") >= readings).then_some(())
    });
    let twice = "SELECT site_id, device_id, epoch, seq, name, COUNT(*) FROM reading \
                 GROUP BY site_id, device_id, epoch, seq, name HAVING COUNT(*) > 1 LIMIT 5";
    assert_eq!(sqlite(cluster.database(), twice), "");
}

fn tool(cluster: &Cluster, class: &str, arguments: &[&str]) -> String {
    let mut command = cluster.kafka.tool(class).expect("Java");
    command.args(["--bootstrap-server", &cluster.kafka.bootstrap()]).args(arguments);
    let output = command.output().expect("the tool runs");
    assert!(output.status.success(), "{class} {}: {}", arguments.join(" "), said(&output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Adopts a group's offsets in two steps, as the operations page says.
fn adopt(cluster: &Cluster, arguments: &[&str]) {
    let command: Vec<&str> = [&["groups", "adopt"], arguments].concat();
    let shown = cluster.command(&command);
    assert!(shown.status.success() && said(&shown).contains("nothing was changed"), "{}", said(&shown));
    let done = cluster.command(&[&command[..], &["--yes"]].concat());
    assert!(done.status.success() && said(&done).contains(" goes on at "), "{}", said(&done));
}

/// Waits until a stage says why it stopped, and ends its process.
fn stops_with(cluster: &mut Cluster, stage: &str, code: &str) {
    wait_for(&format!("the stop of {stage} with {code}"), SOON, || {
        cluster.output(stage).contains(code).then_some(())
    });
    cluster.kill(stage);
}

/// Puts the backup of a database in its place, as an operator does.
fn restore(cluster: &Cluster, backup: &Path) {
    let database = cluster.database().trim_start_matches("sqlite://").to_owned();
    for more in ["-wal", "-shm"] {
        // The last connection may have removed them.
        let _ = std::fs::remove_file(format!("{database}{more}"));
    }
    std::fs::copy(backup, database).expect("the backup is there");
}

#[test]
fn an_offset_that_was_moved_and_a_database_that_was_restored_stop_stages_until_they_are_adopted() {
    let mut cluster = Cluster::start(None);
    cluster.wait_for_bridge();
    publish(&cluster, 31, READINGS);
    every_reading_is_there_once(&cluster, READINGS);
    let backup = cluster.scratch().join("backup.db");
    sqlite(cluster.database(), &format!("VACUUM INTO '{}'", backup.display()));

    cluster.stop("bridge_data");
    let groups = "org.apache.kafka.tools.consumer.group.ConsumerGroupCommand";
    let input = "device.telemetry.v1";
    let reset = ["--group", "bridge_data", "--topic", input, "--reset-offsets", "--to-earliest", "--execute"];
    tool(&cluster, groups, &reset);
    cluster.add("bridge_data", "0");
    stops_with(&mut cluster, "bridge_data", "TL-KAFKA-012");
    adopt(&cluster, &["bridge_data"]);
    cluster.add("bridge_data", "0");
    // What it reads again is recognised; what comes now is taken.
    publish(&cluster, 32, 2 * READINGS);
    every_reading_is_there_once(&cluster, 2 * READINGS);
    let nothing = cluster.command(&["groups", "adopt", "bridge_data"]);
    assert!(said(&nothing).contains("nothing to adopt"), "{}", said(&nothing));
    let elsewhere = cluster.command(&["groups", "adopt", "bridge_data", "--topic", "device.event.v1"]);
    assert_eq!(elsewhere.status.code(), Some(2), "{}", said(&elsewhere));
    assert!(said(&elsewhere).contains(input), "it names the topics there are: {}", said(&elsewhere));

    let described = tool(&cluster, groups, &["--describe", "--all-groups"]);
    for group in ["evaluate_rules", "update_twin", "bridge_data", "load_warehouse", "project_twins"] {
        assert!(described.contains(group), "{group} is missing in:\n{described}");
    }

    // The database is restored from the backup of before: what it lost is written again, nothing twice.
    let loaders = ["load_warehouse", "project_twins"];
    loaders.into_iter().for_each(|loader| cluster.stop(loader));
    restore(&cluster, &backup);
    loaders.into_iter().for_each(|loader| cluster.add(loader, "0"));
    loaders.into_iter().for_each(|loader| stops_with(&mut cluster, loader, "TL-STORE-010"));
    loaders.into_iter().for_each(|loader| adopt(&cluster, &[loader]));
    loaders.into_iter().for_each(|loader| cluster.add(loader, "0"));
    every_reading_is_there_once(&cluster, 2 * READINGS);
}

#[test]
fn topics_that_were_made_anew_stop_their_stages_until_the_offsets_are_adopted() {
    let mut cluster = Cluster::start(None);
    cluster.wait_for_bridge();
    publish(&cluster, 33, READINGS);
    every_reading_is_there_once(&cluster, READINGS);

    ["bridge_data", "load_warehouse", "evaluate_rules"].into_iter().for_each(|stage| cluster.stop(stage));
    let topics = "org.apache.kafka.tools.TopicCommand";
    let gone = ["data_core.reading.v1", "device.telemetry.v1.evaluate_rules-changelog"];
    tool(&cluster, topics, &["--delete", "--topic", &gone.join("|")]);
    wait_for("the topics' end", SOON, || {
        let left = tool(&cluster, topics, &["--list"]);
        (!left.lines().any(|line| gone.contains(&line))).then_some(())
    });
    let applied = cluster.command(&["topics", "apply"]);
    assert!(applied.status.success(), "{}", said(&applied));
    cluster.add("load_warehouse", "0");
    cluster.add("evaluate_rules", "0");
    stops_with(&mut cluster, "load_warehouse", "TL-STORE-004");
    // Its offsets are as they were, but the state that belongs to them is gone.
    stops_with(&mut cluster, "evaluate_rules", "TL-KAFKA-011");

    let undecided = cluster.command(&["groups", "adopt", "load_warehouse"]);
    assert!(
        undecided.status.code() == Some(2) && said(&undecided).contains("--begin earliest"),
        "{}",
        said(&undecided)
    );
    adopt(&cluster, &["load_warehouse", "--begin", "earliest"]);
    adopt(&cluster, &["evaluate_rules", "--begin", "here"]);
    ["load_warehouse", "bridge_data", "evaluate_rules"].into_iter().for_each(|stage| cluster.add(stage, "0"));
    publish(&cluster, 34, 2 * READINGS);
    every_reading_is_there_once(&cluster, 2 * READINGS);
    assert!(
        cluster.output("evaluate_rules").contains("a task begins"),
        "{}",
        cluster.output("evaluate_rules")
    );
}
