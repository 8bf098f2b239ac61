//! Roles as processes of their own, killed at random under load: afterwards everything is exact.

use std::time::{Duration, Instant};
use throughline_local::child::Fault;
use throughline_local::kafka::{KafkaOptions, ManagedKafka};
use throughline_local::postgres::{ManagedPostgres, PostgresOptions};
use throughline_local::scratch_dir;
use throughline_tests::cluster::{Cluster, ROLES};
use throughline_tests::{Load, Platform, published, root, said};

/// A small generator whose seed the failing test prints (Vigna's splitmix64).
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn apply_demo_rule(cluster: &Cluster) {
    let rule = root().join("demo/rules/demo-overheat.toml").display().to_string();
    let applied = cluster.command(&["rules", "apply", &rule]);
    assert!(applied.status.success(), "{}", said(&applied));
}

fn kill_each_role_five_times(database: Option<&str>, seed: u64) {
    let mut cluster = Cluster::start(database);
    apply_demo_rule(&cluster);
    cluster.wait_for_bridge();
    let load = Load::new(seed, 40_000, 400);
    let publisher = load.publish(&cluster.mqtt_port(), 800, cluster.scratch().join("publish.log"));
    let mut victims: Vec<usize> = (0..ROLES.len()).flat_map(|role| [role; 5]).collect();
    let mut state = seed;
    while !victims.is_empty() {
        let pick = (next(&mut state) % victims.len() as u64) as usize;
        // A pause of 0.2 to 1.8 s, so that some kills hit a role that is still starting.
        std::thread::sleep(Duration::from_millis(200 + next(&mut state) % 1_600));
        cluster.kill_and_restart(victims.swap_remove(pick));
    }
    published(publisher, Duration::from_secs(240));
    let kafka = cluster.kafka.bootstrap();
    let arguments = ["--threshold", "90", "--redelivery", "--deadline", "90"];
    if let Err(differences) = load.compare(&kafka, cluster.database(), &arguments) {
        panic!("{differences}\nthe roles said:\n{}", cluster.logs());
    }
}

#[test]
fn killed_roles_leave_sqlite_exact() {
    kill_each_role_five_times(None, 21);
}

#[test]
fn killed_roles_leave_postgresql_exact() {
    let directory = scratch_dir().expect("a temporary directory can be made");
    let options = PostgresOptions::new(directory.path().join("pg"));
    let database = ManagedPostgres::start(options).expect("PostgreSQL starts");
    kill_each_role_five_times(Some(&database.url()), 22);
}

#[test]
fn two_instances_of_a_role_share_its_partitions_and_keep_its_state() {
    let mut cluster = Cluster::start(None);
    apply_demo_rule(&cluster);
    cluster.wait_for_bridge();
    let load = Load::new(23, 20_000, 200);
    let publisher = load.publish(&cluster.mqtt_port(), 1_000, cluster.scratch().join("publish.log"));
    std::thread::sleep(Duration::from_secs(4));
    for role in ["evaluate_rules", "bridge_data", "update_twin", "load_warehouse"] {
        cluster.stop(role);
        cluster.add(role, "a");
        cluster.add(role, "b");
    }
    published(publisher, Duration::from_secs(120));
    let kafka = cluster.kafka.bootstrap();
    let arguments = ["--threshold", "90", "--deadline", "90"];
    if let Err(differences) = load.compare(&kafka, cluster.database(), &arguments) {
        panic!("{differences}\nthe roles said:\n{}", cluster.logs());
    }
}

#[test]
fn acknowledged_messages_survive_a_hung_and_a_killed_kafka() {
    let kafka_dir = tempfile::tempdir().expect("a temporary directory can be made");
    let options = KafkaOptions::new(kafka_dir.path().join("kafka"));
    let mut kafka = ManagedKafka::start(options, &mut |_| {}).expect("Kafka starts");
    let address = kafka.bootstrap();
    let platform = Platform::up(&["--kafka", &address]);
    platform.done(&["rules", "apply", &root().join("demo/rules/demo-overheat.toml").display().to_string()]);
    let load = Load::new(13, 60_000, 600);
    let publisher = load.publish(&platform.mqtt_port(), 1_200, platform.scratch().join("publish.log"));
    std::thread::sleep(Duration::from_secs(5));
    kafka.fault(Fault::Stop);
    std::thread::sleep(Duration::from_secs(30));
    kafka.fault(Fault::Continue);
    std::thread::sleep(Duration::from_secs(5));
    kafka.fault(Fault::Kill);
    std::thread::sleep(Duration::from_secs(2));
    kafka.restart().expect("Kafka starts again on its data");
    let started = Instant::now();
    published(publisher, Duration::from_secs(300));
    load.check(&address, platform.endpoint("database"), &["--threshold", "90", "--redelivery"]);
    assert!(started.elapsed() < Duration::from_secs(600));
}
