//! The managed PostgreSQL and Mosquitto.

#![cfg(feature = "managed")]
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::process::{Command, Output, Stdio};
use throughline_local::child::Fault;
use throughline_local::mosquitto::{ManagedMosquitto, MosquittoOptions};
use throughline_local::postgres::{ManagedPostgres, PostgresOptions};
use throughline_local::scratch_dir;

fn psql(server: &ManagedPostgres, sql: &str) -> Output {
    Command::new("psql")
        .args(["-At", "-c", sql, &server.url()])
        .env("PGCONNECT_TIMEOUT", "2")
        .output()
        .unwrap()
}

fn rows(server: &ManagedPostgres, sql: &str) -> String {
    let output = psql(server, sql);
    assert!(output.status.success(), "{sql}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn rows_survive_kill_and_stop() {
    let dir = scratch_dir().unwrap();
    let data_dir = dir.path().join("postgres");
    let options = PostgresOptions { fsync: false, ..PostgresOptions::new(&data_dir) };
    let mut server = ManagedPostgres::start(options.clone()).unwrap();
    rows(&server, "create table kept (n int); insert into kept values (1), (2)");

    server.fault(Fault::Kill);
    assert!(!psql(&server, "select 1").status.success());
    server.restart().unwrap();
    assert_eq!(rows(&server, "select sum(n) from kept"), "3\n");
    let pid = server.pid().unwrap();
    server.stop().unwrap();
    assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());

    let server = ManagedPostgres::start(options).unwrap();
    assert_eq!(rows(&server, "select sum(n) from kept"), "3\n");
    assert_eq!(rows(&server, "show fsync"), "off\n");
}

#[test]
fn a_stopped_postgres_hangs_and_goes_on() {
    let dir = scratch_dir().unwrap();
    let mut server = ManagedPostgres::start(PostgresOptions::new(dir.path().join("postgres"))).unwrap();
    server.fault(Fault::Stop);
    assert!(!psql(&server, "select 1").status.success(), "it answers while it is stopped");
    server.fault(Fault::Continue);
    assert_eq!(rows(&server, "select 1"), "1\n");
}

#[test]
fn a_persistent_session_survives_a_restart_of_mosquitto() {
    let dir = scratch_dir().unwrap();
    let mut broker = ManagedMosquitto::start(MosquittoOptions::new(dir.path())).unwrap();
    let port = broker.port().to_string();
    let client = |program: &str, args: &[&str]| {
        let mut command = Command::new(program);
        command.args(["-h", "127.0.0.1", "-p", &port, "-q", "1", "-t", "a/b"]).args(args);
        let output = command.stdin(Stdio::null()).output().unwrap();
        assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let session = ["-i", "reader", "-c"];
    client("mosquitto_sub", &[&session[..], &["-E"]].concat());
    client("mosquitto_pub", &["-m", "while you were away"]);
    broker.restart().unwrap();
    let read = client("mosquitto_sub", &[&session[..], &["-C", "1", "-W", "10"]].concat());
    assert_eq!(read, "while you were away\n");
    broker.fault(Fault::Kill);
    broker.restart().unwrap();
    broker.stop().unwrap();
}
