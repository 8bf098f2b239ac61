//! The managed Kafka: real broker, real data, real signals.

#![cfg(feature = "managed")]
#![expect(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a failed unwrap is a failed test; downloads are shown"
)]

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use throughline_local::child::Fault;
use throughline_local::kafka::{KafkaOptions, ManagedKafka};
use throughline_local::{DirLock, LocalError, scratch_dir};

fn start(dir: &Path) -> ManagedKafka {
    ManagedKafka::start(KafkaOptions::new(dir), &mut |line| eprintln!("{line}")).unwrap()
}

fn tool(kafka: &ManagedKafka, class: &str, args: &[&str], input: &str) -> String {
    let mut command = kafka.tool(class).unwrap();
    command.args(["--bootstrap-server", &kafka.bootstrap()]).args(args);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{class} {args:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn process_runs(pid: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status.lines().any(|line| line.starts_with("State:") && !line.contains('Z'))
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "{what} did not come about within 20 s");
        std::thread::sleep(Duration::from_millis(10));
    }
}

const TOPICS: &str = "org.apache.kafka.tools.TopicCommand";

#[test]
fn records_survive_stop_kill_and_hang() {
    let dir = scratch_dir().unwrap();
    let mut kafka = start(dir.path());
    let first_pid = kafka.pid().unwrap();
    tool(&kafka, TOPICS, &["--create", "--topic", "kept", "--partitions", "1"], "");
    tool(&kafka, "org.apache.kafka.tools.ConsoleProducer", &["--topic", "kept"], "one\ntwo\n");

    // A hanging broker: the port is open, nothing answers, until it goes on.
    kafka.fault(Fault::Stop);
    let status = format!("/proc/{first_pid}/status");
    wait_until("the stop", || std::fs::read_to_string(&status).unwrap().contains("State:\tT"));
    kafka.fault(Fault::Continue);

    kafka.fault(Fault::Kill);
    assert!(!process_runs(first_pid));
    assert!(!kafka.is_running());
    kafka.restart().unwrap();
    let second_pid = kafka.pid().unwrap();
    kafka.stop().unwrap();
    assert!(!process_runs(second_pid));

    let kafka = start(dir.path());
    let args = ["--topic", "kept", "--from-beginning", "--max-messages", "2", "--timeout-ms", "20000"];
    let read = tool(&kafka, "org.apache.kafka.tools.consumer.ConsoleConsumer", &args, "");
    assert_eq!(read, "one\ntwo\n");
    let described = tool(&kafka, TOPICS, &["--describe"], "");
    assert!(described.contains("Topic: kept"), "{described}");
}

#[test]
fn a_directory_belongs_to_one_broker() {
    let dir = scratch_dir().unwrap();
    let lock = DirLock::acquire(dir.path()).unwrap();
    let error = ManagedKafka::start(KafkaOptions::new(dir.path()), &mut |_| {}).unwrap_err();
    assert!(matches!(error, LocalError::InUse { .. }), "{error}");
    drop(lock);
}

#[test]
fn a_taken_port_is_named() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let dir = scratch_dir().unwrap();
    let mut options = KafkaOptions::new(dir.path());
    options.port = Some(port);
    let message = ManagedKafka::start(options, &mut |_| {}).unwrap_err().to_string();
    assert!(
        message.starts_with(&format!("port {port} on 127.0.0.1, which Kafka shall use, is taken")),
        "{message}"
    );
}

/// The process that the next test starts and kills; run by itself it has nothing to do.
#[test]
fn start_a_broker_and_hang() {
    let Some(dir) = std::env::var_os("BROKER_TO_LEAVE_BEHIND") else { return };
    let kafka = start(Path::new(&dir));
    std::fs::write(Path::new(&dir).join("started"), kafka.pid().unwrap().to_string()).unwrap();
    std::thread::sleep(Duration::from_secs(600));
}

#[test]
fn a_broker_does_not_outlive_a_starter_that_is_killed_hard() {
    let dir = scratch_dir().unwrap();
    let mut starter = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "start_a_broker_and_hang"])
        .env("BROKER_TO_LEAVE_BEHIND", dir.path())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let started = dir.path().join("started");
    let deadline = Instant::now() + Duration::from_secs(120);
    while !started.exists() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(50));
    }
    starter.kill().unwrap();
    starter.wait().unwrap();
    let pid: u32 = std::fs::read_to_string(&started).expect("the broker has started").parse().unwrap();
    wait_until("the end of the broker", || !process_runs(pid));
    // And the directory is free for the next start.
    drop(start(dir.path()));
}
