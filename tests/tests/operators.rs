//! What operators do with Kafka's own tools, and how a stage goes on afterwards.

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
    assert!(done.status.success() && said(&done).contains("in volume adopted-"), "{}", said(&done));
}

#[test]
fn an_offset_that_a_foreign_tool_moved_stops_the_stage_until_it_is_adopted() {
    let mut cluster = Cluster::start(None);
    cluster.wait_for_bridge();
    publish(&cluster, 31, READINGS);
    every_reading_is_there_once(&cluster, READINGS);

    cluster.stop("bridge_data");
    let groups = "org.apache.kafka.tools.consumer.group.ConsumerGroupCommand";
    let input = "device.telemetry.v1";
    let reset = ["--group", "bridge_data", "--topic", input, "--reset-offsets", "--to-earliest", "--execute"];
    tool(&cluster, groups, &reset);
    cluster.add("bridge_data", "0");
    wait_for("the stage's stop", SOON, || {
        cluster.output("bridge_data").contains("TL-KAFKA-012").then_some(())
    });

    cluster.kill("bridge_data");
    adopt(&cluster, &["bridge_data"]);
    cluster.add("bridge_data", "0");
    // What it reads again is recognised; what comes now is taken.
    publish(&cluster, 32, 2 * READINGS);
    every_reading_is_there_once(&cluster, 2 * READINGS);
    let nothing = cluster.command(&["groups", "adopt", "bridge_data"]);
    assert!(said(&nothing).contains("nothing to adopt"), "{}", said(&nothing));

    let described = tool(&cluster, groups, &["--describe", "--all-groups"]);
    for group in ["evaluate_rules", "update_twin", "bridge_data", "load_warehouse", "project_twins"] {
        assert!(described.contains(group), "{group} is missing in:\n{described}");
    }
}

#[test]
fn a_topic_that_was_made_anew_stops_the_loader_until_its_offsets_are_adopted() {
    let mut cluster = Cluster::start(None);
    cluster.wait_for_bridge();
    publish(&cluster, 33, READINGS);
    every_reading_is_there_once(&cluster, READINGS);

    cluster.stop("bridge_data");
    cluster.stop("load_warehouse");
    let topics = "org.apache.kafka.tools.TopicCommand";
    tool(&cluster, topics, &["--delete", "--topic", "data_core.reading.v1"]);
    wait_for("the topic's end", SOON, || {
        let left = tool(&cluster, topics, &["--list"]);
        (!left.lines().any(|line| line == "data_core.reading.v1")).then_some(())
    });
    let applied = cluster.command(&["topics", "apply"]);
    assert!(applied.status.success(), "{}", said(&applied));
    cluster.add("load_warehouse", "0");
    wait_for("the stage's stop", SOON, || {
        cluster.output("load_warehouse").contains("TL-STORE-004").then_some(())
    });

    cluster.kill("load_warehouse");
    let undecided = cluster.command(&["groups", "adopt", "load_warehouse"]);
    assert!(
        undecided.status.code() == Some(2) && said(&undecided).contains("--begin earliest"),
        "{}",
        said(&undecided)
    );
    adopt(&cluster, &["load_warehouse", "--begin", "earliest"]);
    cluster.add("load_warehouse", "0");
    cluster.add("bridge_data", "0");
    publish(&cluster, 34, 2 * READINGS);
    every_reading_is_there_once(&cluster, 2 * READINGS);
}
