//! Measures what a row costs: `SqlStore::write` on PostgreSQL and SQLite beside a plain binary COPY.
//!
//! `cargo run --release -p throughline-store --example copy_cost [millions]` starts a PostgreSQL of its own
//! with fsync on, writes messages of three measurements in transactions of about 10,000 rows, and prints
//! rows per second and CPU seconds (user and system, of this process and of the server) per million
//! messages. The plain COPY sends ready-made bytes into a table without partitions and indexes.

#![expect(clippy::print_stdout, reason = "an example prints its result")]
#![expect(clippy::unwrap_used, reason = "a measurement that cannot be made stops")]

#[path = "../tests/support/mod.rs"]
mod support;

use futures::TryStreamExt;
use sqlx::{Connection, Executor};
use std::collections::HashMap;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use support::TestPostgres;
use throughline_model::books::Books;
use throughline_model::record::TopicPartition;
use throughline_model::rows::{ReadingRow, Rows};
use throughline_model::time::Timestamp;
use throughline_runtime::ports::{Advance, Store};
use throughline_store::{SqlStore, StoreOptions};
use uuid::Uuid;

const TOPIC: &str = "bench.readings.v1";
const MEASUREMENTS: [&str; 3] = ["temperature", "pressure", "running"];
const MESSAGES_PER_WRITE: usize = 3_333;

fn main() {
    let millions: f64 = std::env::args().nth(1).map_or(1.0, |text| text.parse().unwrap());
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a small positive number")]
    let writes = (millions * 1e6 / MESSAGES_PER_WRITE as f64).ceil() as usize;
    let directory = tempfile::tempdir().unwrap();
    let postgres = TestPostgres::start(&["shared_buffers=256MB", "max_wal_size=4GB"]);
    println!("{:<28}{:>12}{:>16}{:>16}", "", "rows/s", "client CPU-s/M", "server CPU-s/M");

    let url = postgres.database("bench");
    through_store("PostgreSQL, SqlStore", &url, writes, postgres.server_pid());
    plain_copy(&url, writes, postgres.server_pid());
    let url = format!("sqlite://{}", directory.path().join("bench.db").display());
    through_store("SQLite, SqlStore", &url, writes, None);
}

fn through_store(name: &str, url: &str, writes: usize, server: Option<u32>) {
    let mut store = open(url);
    let partition = TopicPartition::new(TOPIC, 0);
    let mut next = store.positions("bench", std::slice::from_ref(&partition)).unwrap()[0].next.max(0);
    let rows = rows();
    let mut write = || {
        let to = next + MESSAGES_PER_WRITE as i64;
        let advance = Advance { partition: partition.clone(), from: next, to, books: Books::open("v") };
        store.write("bench", &rows, &[advance]).unwrap();
        next = to;
    };
    write();
    measure(name, writes, server, write);
}

fn plain_copy(url: &str, writes: usize, server: Option<u32>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut connection = runtime.block_on(sqlx::PgConnection::connect(url)).unwrap();
    let bytes = runtime.block_on(async {
        let sql = "CREATE TABLE plain (LIKE reading); CREATE TABLE one_batch (LIKE reading)";
        connection.execute(sqlx::raw_sql(sql)).await.unwrap();
        let sql = "INSERT INTO one_batch SELECT * FROM reading LIMIT 9999";
        connection.execute(sqlx::raw_sql(sql)).await.unwrap();
        let chunks = connection.copy_out_raw("COPY one_batch TO STDOUT (FORMAT binary)").await.unwrap();
        let chunks: Vec<_> = chunks.try_collect().await.unwrap();
        chunks.concat()
    });
    measure("PostgreSQL, plain COPY", writes, server, || {
        runtime.block_on(async {
            let mut copy = connection.copy_in_raw("COPY plain FROM STDIN (FORMAT binary)").await.unwrap();
            for chunk in bytes.chunks(128 * 1024) {
                copy.send(chunk).await.unwrap();
            }
            copy.finish().await.unwrap();
        });
    });
}

fn open(url: &str) -> SqlStore {
    let topic_ids = HashMap::from([(TOPIC.to_owned(), Uuid::from_u128(1))]);
    let options = StoreOptions {
        cluster_id: "bench".into(),
        topic_ids,
        call_timeout: Duration::from_secs(60),
        ..StoreOptions::default()
    };
    SqlStore::open(url, options).unwrap()
}

fn rows() -> Rows {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros();
    let now = i64::try_from(now).unwrap();
    let mut rows = Rows::default();
    for message in 0..MESSAGES_PER_WRITE {
        let message_id =
            Uuid::from_u128(0x0197_0000_0000_8000_8000_0000_0000_0000 + message as u128).to_string();
        for (index, name) in MEASUREMENTS.iter().enumerate() {
            rows.readings.push(ReadingRow {
                site_id: format!("site-{}", message % 10),
                device_id: format!("pump-{}", message % 1_000),
                epoch: Some(1),
                seq: Some(message as i64),
                name: (*name).to_owned(),
                number: (index < 2).then_some(message as f64 * 0.1),
                flag: (index == 2).then_some(message % 2 == 0),
                unit: (index == 0).then(|| "Cel".to_owned()),
                occurred_at: Timestamp(now + message as i64),
                received_at: Timestamp(now + message as i64 + 500),
                message_id: message_id.clone(),
                trace_id: format!("{message:032x}"),
                stream: "telemetry".to_owned(),
                ..ReadingRow::default()
            });
        }
    }
    rows
}

fn measure(name: &str, writes: usize, server: Option<u32>, mut write: impl FnMut()) {
    let cpu = || (cpu_seconds("self"), server.map_or(0.0, server_cpu_seconds));
    let (before, begun) = (cpu(), Instant::now());
    for _ in 0..writes {
        write();
    }
    let (after, took) = (cpu(), begun.elapsed().as_secs_f64());
    let messages = (writes * MESSAGES_PER_WRITE) as f64;
    let rate = messages * MEASUREMENTS.len() as f64 / took;
    let per_million = 1e6 / messages;
    let (client, server) = ((after.0 - before.0) * per_million, (after.1 - before.1) * per_million);
    println!("{name:<28}{rate:>12.0}{client:>16.2}{server:>16.2}");
}

/// Sums the server's processes: the postmaster and its children.
fn server_cpu_seconds(postmaster: u32) -> f64 {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| {
        *pid == postmaster || stat(&pid.to_string()).is_some_and(|f| f[1] == postmaster.to_string())
    })
    .map(|pid| cpu_seconds(&pid.to_string()))
    .sum()
}

/// User and system time of a process; Linux counts in hundredths of a second.
fn cpu_seconds(process: &str) -> f64 {
    stat(process).map_or(0.0, |fields| {
        let ticks = |index: usize| fields[index].parse::<f64>().unwrap();
        (ticks(11) + ticks(12)) / 100.0
    })
}

/// The fields of /proc/…/stat after the command's name: state, parent, …
fn stat(process: &str) -> Option<Vec<String>> {
    let text = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    let (_, rest) = text.rsplit_once(") ")?;
    Some(rest.split(' ').map(str::to_owned).collect())
}
