//! PostgreSQL alone: partitions, a server that dies, locks that are held.

mod support;

use sqlx::Connection;
use std::collections::HashMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use support::TestPostgres;
use throughline_model::books::Books;
use throughline_model::record::TopicPartition;
use throughline_model::rows::{ReadingRow, Rows};
use throughline_model::time::Timestamp;
use throughline_runtime::ports::{Advance, Failure, Store};
use throughline_store::{SqlStore, StoreOptions, Table};
use uuid::Uuid;

const GROUP: &str = "load_warehouse";
const TOPIC: &str = "test.readings.v1";
const DAY_US: i64 = 86_400_000_000;

fn open(url: &str, call_timeout: Duration) -> Result<SqlStore, Failure> {
    let topic_ids = HashMap::from([(TOPIC.to_owned(), Uuid::from_u128(1))]);
    SqlStore::open(
        url,
        StoreOptions { cluster_id: "c".into(), topic_ids, call_timeout, ..StoreOptions::default() },
    )
}

fn partition() -> TopicPartition {
    TopicPartition::new(TOPIC, 0)
}

fn advance(from: i64, to: i64) -> [Advance; 1] {
    [Advance { partition: partition(), from, to, books: Books::open("v") }]
}

fn received(times: impl IntoIterator<Item = i64>) -> Rows {
    let readings = times.into_iter().map(|time| ReadingRow {
        received_at: Timestamp(time),
        message_id: Uuid::nil().to_string(),
        ..ReadingRow::default()
    });
    Rows { readings: readings.collect(), ..Rows::default() }
}

fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    i64::try_from(since.as_micros()).expect("in range")
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(work)
}

fn scalar(url: &str, sql: &'static str) -> i64 {
    block_on(async {
        let mut connection = sqlx::PgConnection::connect(url).await.expect("connects");
        sqlx::query_scalar(sql).fetch_one(&mut connection).await.expect("the statement runs")
    })
}

fn expect_dependency(result: Result<(), Failure>) {
    assert!(matches!(result, Err(Failure::Dependency { dependency: "database", .. })), "{result:?}");
}

#[test]
fn rows_lie_in_the_partition_of_their_day_and_strange_days_in_the_default() {
    let postgres = TestPostgres::start(&["fsync=off"]);
    let url = postgres.database("partitions");
    let mut store = open(&url, Duration::from_secs(20)).expect("opens");
    store.positions(GROUP, &[partition()]).expect("positions");
    let rows = received([
        now(),
        now() - 10 * DAY_US,
        now() - 10 * DAY_US,
        now() - 2_000 * DAY_US,
        now() + 30 * DAY_US,
    ]);
    store.write(GROUP, &rows, &advance(0, 5)).expect("written");
    let in_default = "SELECT count(*) FROM reading_default";
    let parts = "SELECT count(*) FROM pg_inherits WHERE inhparent = 'reading'::regclass";
    let used = "SELECT count(DISTINCT tableoid) FROM reading";
    // Today and three days ahead, the day ten days ago, the default.
    assert_eq!((scalar(&url, in_default), scalar(&url, parts), scalar(&url, used)), (2, 6, 3));
    let indexed =
        "SELECT count(*) FROM pg_indexes WHERE tablename LIKE 'reading_%' AND indexdef LIKE '%brin%'";
    assert_eq!(scalar(&url, indexed), 6);

    // A day that the default partition already has rows of stays there, and the write goes through.
    block_on(async {
        let mut connection = sqlx::PgConnection::connect(&url).await.expect("connects");
        let sql = "INSERT INTO reading (site_id, device_id, name, occurred_at, received_at, message_id, trace_id, \
                   stream) VALUES ('', '', '', now(), now() - interval '20 days', gen_random_uuid(), '', '')";
        sqlx::raw_sql(sql).execute(&mut connection).await.expect("inserted by hand");
    });
    store.write(GROUP, &received([now() - 20 * DAY_US]), &advance(5, 6)).expect("written");
    assert_eq!((scalar(&url, in_default), store.count(Table::Reading).ok()), (4, Some(7)));
}

#[test]
fn a_server_that_dies_is_a_dependency_and_the_offset_tells_what_was_committed() {
    let mut postgres = TestPostgres::start(&[]);
    let url = postgres.database("faults");
    let mut store = open(&url, Duration::from_secs(3)).expect("opens");
    store.positions(GROUP, &[partition()]).expect("positions");
    store.write(GROUP, &received([now(); 10]), &advance(0, 10)).expect("written");
    postgres.kill();
    expect_dependency(store.write(GROUP, &received([now(); 10]), &advance(10, 20)));
    expect_dependency(store.positions(GROUP, &[partition()]).map(drop));
    assert!(matches!(open(&url, Duration::from_secs(3)), Err(Failure::Dependency { .. })));
    postgres.restart(&[]);
    assert_eq!(store.positions(GROUP, &[partition()]).expect("positions")[0].next, 10);
    store.write(GROUP, &received([now(); 10]), &advance(10, 20)).expect("the retry");

    // Killed again and again while batches are written: rows always agree with the offset.
    for round in 0..3 {
        let url = url.clone();
        let writer = std::thread::spawn(move || {
            let mut store = open(&url, Duration::from_secs(3)).expect("opens");
            let mut next = store.positions(GROUP, &[partition()]).expect("positions")[0].next;
            while store.write(GROUP, &received(vec![now(); 2_000]), &advance(next, next + 2_000)).is_ok() {
                next += 2_000;
            }
        });
        let target = store.positions(GROUP, &[partition()]).expect("positions")[0].next + 2_000 * (2 + round);
        while store.positions(GROUP, &[partition()]).expect("positions")[0].next < target {
            std::thread::yield_now();
        }
        postgres.kill();
        writer.join().expect("the writer ends with a failure");
        postgres.restart(&[]);
        let mut after = open(postgres.url("faults").as_str(), Duration::from_secs(3)).expect("opens");
        let next = after.positions(GROUP, &[partition()]).expect("positions")[0].next;
        assert_eq!(after.count(Table::Reading).ok(), u64::try_from(next).ok());
        store = after;
    }
}

#[test]
fn a_lock_that_is_held_is_a_dependency_within_the_bound() {
    let postgres = TestPostgres::start(&["fsync=off"]);
    let url = postgres.database("locks");
    let mut store = open(&url, Duration::from_secs(3)).expect("opens");
    store.positions(GROUP, &[partition()]).expect("positions");
    store.write(GROUP, &received([now()]), &advance(0, 1)).expect("written");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let mut holder = runtime.block_on(sqlx::PgConnection::connect(&url)).expect("connects");
    let hold = "BEGIN; SELECT 1 FROM stage_offset FOR UPDATE";
    runtime.block_on(sqlx::raw_sql(hold).execute(&mut holder)).expect("held");
    let before = std::time::Instant::now();
    expect_dependency(store.write(GROUP, &received([now()]), &advance(1, 2)));
    assert!(before.elapsed() < Duration::from_secs(3), "{:?}", before.elapsed());
    runtime.block_on(sqlx::raw_sql("ROLLBACK").execute(&mut holder)).expect("released");
    store.write(GROUP, &received([now()]), &advance(1, 2)).expect("the retry");
    assert_eq!(store.count(Table::Reading).ok(), Some(2));
}

#[test]
fn a_database_that_is_not_there_stops() {
    let postgres = TestPostgres::start(&["fsync=off"]);
    match open(&postgres.url("nowhere"), Duration::from_secs(3)) {
        Err(Failure::Stop { code, message }) => assert!(code == "TL-STORE-005" && message.contains("3D000")),
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("opened a database that does not exist"),
    }
}
