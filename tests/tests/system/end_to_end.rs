//! The whole platform as its users meet it: one process, real Kafka, clients that we did not write.

use serde_json::Value;
use std::process::Command;
use std::time::Duration;
use throughline_local::mosquitto::{ManagedMosquitto, MosquittoOptions};
use throughline_local::postgres::{ManagedPostgres, PostgresOptions};
use throughline_local::scratch_dir;
use throughline_tests::{Load, Platform, port_of, published, python, root, said, sqlite, succeed, wait_for};

/// Bounded generously; figures belong to the benchmarks.
const SOON: Duration = Duration::from_secs(20);

fn apply_demo_rule(platform: &Platform) {
    let rule = root().join("demo/rules/demo-overheat.toml");
    platform.done(&["rules", "apply", &rule.display().to_string()]);
}

fn kcat(platform: &Platform, topic: &str, format: &str) -> String {
    let kafka = platform.endpoint("kafka");
    succeed("kcat", &["-b", kafka, "-C", "-t", topic, "-o", "beginning", "-e", "-q", "-f", format])
}

fn mosquitto_pub(platform: &Platform, topic: &str, message: &str) {
    let port = platform.mqtt_port();
    succeed("mosquitto_pub", &["-h", "127.0.0.1", "-p", &port, "-q", "1", "-t", topic, "-m", message]);
}

#[test]
fn one_reading_becomes_a_record_an_alert_a_twin_and_a_row() {
    let platform = Platform::up(&[]);
    apply_demo_rule(&platform);
    mosquitto_pub(
        &platform,
        "tl/site-1/pump-7/telemetry",
        r#"{"epoch":1,"seq":1,"values":{"temperature":91,"running":true,"mode":"auto"}}"#,
    );

    // The acknowledgement means that Kafka has it: kcat finds key and headers at once.
    let record = kcat(&platform, "device.telemetry.v1", "%k %h\n");
    assert!(record.starts_with("site-1/pump-7 ") && record.contains("traceparent=00-"), "{record}");
    let trace =
        record.split("traceparent=00-").nth(1).and_then(|t| t.get(..32)).expect("a trace id").to_owned();

    // A client in another language decodes it with nothing but the registry.
    let script = root().join("tests/python/decode.py").display().to_string();
    let (kafka, registry) = (platform.endpoint("kafka"), platform.endpoint("registry"));
    let decoded = succeed(python(), &[&script, kafka, registry, "device.telemetry.v1"]);
    let decoded: Value = serde_json::from_str(decoded.lines().next().expect("one record")).expect("JSON");
    assert_eq!((decoded["site_id"].as_str(), decoded["epoch"].as_i64()), (Some("site-1"), Some(1)));
    assert_eq!(decoded["measurements"][0]["number"].as_f64(), Some(91.0), "{decoded}");

    let alert = wait_for("the alert", SOON, || {
        let text = succeed(python(), &[&script, kafka, registry, "service_platform.alert.v1"]);
        text.lines().next().map(|line| serde_json::from_str::<Value>(line).expect("JSON"))
    });
    assert_eq!(alert["trace_id"].as_str(), Some(trace.as_str()));
    assert_eq!(alert["state"].as_str(), Some("raised"));

    let twin = wait_for("the twin", SOON, || {
        let output = platform.command(&["devices", "show", "site-1/pump-7", "--json"]);
        output.status.success().then(|| serde_json::from_slice::<Value>(&output.stdout).expect("JSON"))
    });
    assert!(twin.to_string().contains("91"), "{twin}");

    let rows = wait_for("the rows", SOON, || {
        let rows = sqlite(
            platform.endpoint("database"),
            "SELECT name, number FROM reading WHERE device_id = 'pump-7' ORDER BY name",
        );
        (!rows.is_empty()).then_some(rows)
    });
    assert_eq!(rows.lines().count(), 3, "one row a measurement: {rows}");
    let alerts = wait_for("the alert's row", SOON, || {
        let rows = sqlite(platform.endpoint("database"), "SELECT rule_id, state, trace_id FROM alert");
        (!rows.is_empty()).then_some(rows)
    });
    assert!(alerts.contains(&trace), "{alerts}");

    let followed = platform.done(&["trace", &trace]);
    for stage in ["bridge_data", "evaluate_rules", "update_twin", "load_warehouse"] {
        assert!(followed.contains(stage), "{followed}");
    }
    let by_sequence = platform.done(&["trace", "site-1/pump-7#1"]);
    assert!(by_sequence.contains(&trace), "{by_sequence}");
}

#[test]
fn what_does_not_decode_lies_in_the_dead_letters_byte_for_byte() {
    let platform = Platform::up(&[]);
    mosquitto_pub(&platform, "tl/site-1/pump-7/telemetry", "{not json \u{1}");
    let letter = kcat(&platform, "device.telemetry.v1.bridge-dlt", "%s|%h\n");
    assert!(letter.starts_with("{not json \u{1}|"), "{letter}");
    assert!(letter.contains("tl-mqtt-topic=tl/site-1/pump-7/telemetry"), "{letter}");
    mosquitto_pub(&platform, "nobody/feeds/this", "x");
    let letter = kcat(&platform, "device.unmatched.v1.bridge-dlt", "%s");
    assert_eq!(letter, "x");
    let listed = platform.done(&["dlq", "list"]);
    assert!(listed.contains("device.telemetry.v1.bridge-dlt"), "{listed}");
}

#[test]
fn plan_after_apply_finds_nothing_and_a_second_start_finds_its_data() {
    let platform = Platform::up(&[]);
    let planned = platform.command(&["topics", "plan"]);
    assert_eq!(planned.status.code(), Some(0), "{}", said(&planned));
    mosquitto_pub(
        &platform,
        "tl/site-1/pump-7/telemetry",
        r#"{"epoch":1,"seq":1,"values":{"temperature":20}}"#,
    );
    wait_for("the twin", SOON, || {
        platform.command(&["devices", "show", "site-1/pump-7"]).status.success().then_some(())
    });

    // Killed hard, its Kafka must not stay behind, and the next start finds everything again.
    let directory = platform.kill();
    let mut again = Platform::up_in(directory, &[]);
    let shown = again.command(&["devices", "show", "site-1/pump-7"]);
    assert!(shown.status.success(), "{}", said(&shown));
    let data = again.data_dir();
    assert_eq!(again.process().terminate(Duration::from_secs(30)), Some(0));
    // pgrep leaves itself out of account; it finds nothing and says so with exit code 1.
    let left = Command::new("pgrep").arg("-f").arg("--").arg(&data).output().expect("pgrep exists");
    let left = String::from_utf8_lossy(&left.stdout);
    assert!(left.trim().is_empty(), "processes left behind: {left}");
}

#[test]
fn a_load_arrives_once_on_sqlite_through_our_listener() {
    let platform = Platform::up(&[]);
    apply_demo_rule(&platform);
    let load = Load::new(11, 100_000, 1_000);
    let publisher = load.publish(&platform.mqtt_port(), 0, platform.scratch().join("publish.log"));
    published(publisher, Duration::from_secs(300));
    load.check(platform.endpoint("kafka"), platform.endpoint("database"), &["--threshold", "90"]);
    kafkas_own_tools_see_every_group(&platform);
}

fn kafkas_own_tools_see_every_group(platform: &Platform) {
    let libraries = throughline_local::artifacts::kafka(&mut |_| {}).expect("`up` has fetched them");
    let classpath = format!("{}/*", libraries.display());
    let tool = "org.apache.kafka.tools.consumer.group.ConsumerGroupCommand";
    let kafka = platform.endpoint("kafka");
    let args = ["-cp", &classpath, tool, "--bootstrap-server", kafka, "--describe", "--all-groups"];
    let described = succeed("java", &args);
    for group in ["bridge_data", "evaluate_rules", "load_warehouse", "project_twins", "update_twin"] {
        let rows: Vec<&str> = described.lines().filter(|line| line.starts_with(group)).collect();
        assert!(!rows.is_empty(), "{group} is not listed:\n{described}");
    }
}

#[test]
fn a_load_arrives_once_on_postgresql_through_mosquitto() {
    let directory = scratch_dir().expect("a temporary directory can be made");
    let options = PostgresOptions::new(directory.path().join("pg"));
    let database = ManagedPostgres::start(options).expect("PostgreSQL starts");
    let options = MosquittoOptions::new(directory.path().join("mosquitto"));
    let broker = ManagedMosquitto::start(options).expect("Mosquitto starts");
    let broker_url = format!("mqtt://{}", broker.addr());
    let platform = Platform::up(&["--database", &database.url(), "--mqtt", &broker_url]);
    apply_demo_rule(&platform);
    let load = Load::new(12, 100_000, 1_000);
    let publisher = load.publish(&port_of(&broker_url), 4_000, platform.scratch().join("publish.log"));
    published(publisher, Duration::from_secs(300));
    load.check(platform.endpoint("kafka"), &database.url(), &["--threshold", "90", "--redelivery"]);
}

#[test]
fn a_schema_that_breaks_readers_and_a_misspelt_key_are_refused() {
    let platform = Platform::up(&[]);
    let directory = platform.scratch().join("topics");
    std::fs::create_dir(&directory).expect("a directory can be made");
    let source = root().join("topics");
    let copy = |name: &str, change: &dyn Fn(String) -> String| {
        let text = std::fs::read_to_string(source.join(name)).expect("the topic file exists");
        std::fs::write(directory.join(name), change(text)).expect("the scratch directory is writable");
    };
    copy("device.event.v1.toml", &|text| text);
    copy("device.event.v1.avsc", &|text| {
        let mut schema: Value = serde_json::from_str(&text).expect("a schema is JSON");
        let fields = schema["fields"].as_array_mut().expect("a record has fields");
        fields.push(serde_json::json!({"name": "mandatory", "type": "string"}));
        schema.to_string()
    });
    let path = directory.display().to_string();
    let refused = platform.command(&["topics", "apply", "--topics", &path]);
    assert_eq!(refused.status.code(), Some(1), "{}", said(&refused));
    assert!(said(&refused).contains("mandatory"), "the reason names the field: {}", said(&refused));

    copy("device.event.v1.avsc", &|text| text);
    copy("device.event.v1.toml", &|text| text.replace("partitions", "partitons"));
    let refused = platform.command(&["topics", "plan", "--topics", &path]);
    assert_eq!(refused.status.code(), Some(2), "{}", said(&refused));
    let text = said(&refused);
    assert!(text.contains("device.event.v1.toml:") && text.contains("`partitions`"), "{text}");
}
