//! Roles as processes of their own, killed, hung and doubled under load, on a Kafka that hangs and dies:
//! afterwards everything is exact. The longer relatives of these runs are `make chaos`.

use std::time::{Duration, Instant};
use throughline_local::child::Fault;
use throughline_tests::cluster::{Cluster, ROLES};
use throughline_tests::short_run::ShortRun;
use throughline_tests::{Load, published, root, said};

/// Static members, which a restart under the same name replaces.
const CLASSIC: [(&str, &str); 1] = [("THROUGHLINE_KAFKA__GROUP_PROTOCOL", "classic")];
/// What a process may take to end: its budget of 25 s, and a machine that is busy.
const ENDS_WITHIN: Duration = Duration::from_secs(29);

fn apply_demo_rule(cluster: &Cluster) {
    let rule = root().join("demo/rules/demo-overheat.toml").display().to_string();
    let applied = cluster.command(&["rules", "apply", &rule]);
    assert!(applied.status.success(), "{}", said(&applied));
}

fn compare(cluster: &Cluster, load: &Load) {
    let kafka = cluster.kafka.bootstrap();
    let arguments = ["--threshold", "90", "--only-rule", "--redelivery", "--deadline", "90"];
    if let Err(differences) = load.compare(&kafka, cluster.database(), &arguments) {
        panic!("{differences}");
    }
}

#[test]
fn killed_and_hung_roles_leave_sqlite_exact() {
    ShortRun::run(false, 21).unwrap_or_else(|differences| panic!("{differences}"));
}

#[test]
fn killed_and_hung_roles_leave_postgresql_exact() {
    ShortRun::run(true, 22).unwrap_or_else(|differences| panic!("{differences}"));
}

#[test]
fn two_instances_of_a_role_share_its_partitions_and_keep_its_state_on_both_protocols() {
    let mut cluster = Cluster::start(None);
    apply_demo_rule(&cluster);
    cluster.wait_for_bridge();
    let load = Load::new(23, 20_000, 200);
    let publisher = load.publish(&cluster.mqtt_port(), 1_000, cluster.scratch().join("publish.log"));
    std::thread::sleep(Duration::from_secs(4));
    // Both protocols of groups; the groups that change to the classic one do so while they are empty.
    for (role, settings) in [
        ("evaluate_rules", &CLASSIC[..]),
        ("bridge_data", &[]),
        ("update_twin", &[]),
        ("load_warehouse", &CLASSIC),
    ] {
        cluster.stop(role);
        cluster.add_with(role, "a", settings);
        cluster.add_with(role, "b", settings);
    }
    for role in ["evaluate_rules", "bridge_data", "load_warehouse"] {
        std::thread::sleep(Duration::from_secs(2));
        cluster.kill_and_restart_instance(role, "a");
    }
    published(publisher, Duration::from_secs(120));
    let kafka = cluster.kafka.bootstrap();
    let arguments = ["--threshold", "90", "--only-rule", "--deadline", "90"];
    if let Err(differences) = load.compare(&kafka, cluster.database(), &arguments) {
        panic!("{differences}");
    }
}

#[test]
fn acknowledged_messages_survive_a_hung_and_a_killed_kafka_and_roles_end_within_their_budget() {
    let mut cluster = Cluster::start(None);
    apply_demo_rule(&cluster);
    cluster.wait_for_bridge();
    let load = Load::new(13, 60_000, 600);
    let log = cluster.scratch().join("publish.log");
    let publisher = load.publish(&cluster.mqtt_port(), 1_200, log);
    std::thread::sleep(Duration::from_secs(5));
    cluster.kafka.fault(Fault::Stop);
    let until = Instant::now() + Duration::from_secs(30);
    // Long enough for commits to wait for Kafka; who is asked to end then does so within the budget.
    std::thread::sleep(Duration::from_millis(500));
    for (role, code) in cluster.end_within(&ROLES, ENDS_WITHIN) {
        assert!(matches!(code, Some(0 | 1)), "{role} ended with {code:?}");
    }
    std::thread::sleep(until.saturating_duration_since(Instant::now()));
    cluster.kafka.fault(Fault::Continue);
    ROLES.into_iter().for_each(|role| cluster.add(role, "0"));
    std::thread::sleep(Duration::from_secs(5));
    cluster.kafka.fault(Fault::Kill);
    std::thread::sleep(Duration::from_secs(2));
    cluster.kafka.restart().expect("Kafka starts again on its data");
    // No role may have ended by itself meanwhile: the comparison would miss its work.
    published(publisher, Duration::from_secs(300));
    compare(&cluster, &load);
}
