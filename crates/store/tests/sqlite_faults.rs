//! SQLite alone: a file that is locked, a directory that is missing, URLs.

use sqlx::Connection;
use std::collections::HashMap;
use std::time::Duration;
use throughline_model::books::Books;
use throughline_model::record::TopicPartition;
use throughline_model::rows::{ReadingRow, Rows};
use throughline_runtime::ports::{Advance, Failure, Store};
use throughline_store::{SqlStore, StoreOptions, Table};
use uuid::Uuid;

const TOPIC: &str = "test.readings.v1";

fn options() -> StoreOptions {
    StoreOptions {
        cluster_id: "c".into(),
        topic_ids: HashMap::from([(TOPIC.to_owned(), Uuid::from_u128(1))]),
        call_timeout: Duration::from_millis(900),
        ..StoreOptions::default()
    }
}

fn write(store: &mut SqlStore, from: i64) -> Result<(), Failure> {
    let partition = TopicPartition::new(TOPIC, 0);
    let row = ReadingRow { message_id: Uuid::nil().to_string(), ..ReadingRow::default() };
    let rows = Rows { readings: vec![row], ..Rows::default() };
    store.write("g", &rows, &[Advance { partition, from, to: from + 1, books: Books::open("v") }])
}

#[test]
fn a_locked_file_is_a_dependency_and_the_retry_goes_through() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let url = format!("sqlite://{}", directory.path().join("locked.db").display());
    let mut store = SqlStore::open(&url, options()).expect("opens");
    store.positions("g", &[TopicPartition::new(TOPIC, 0)]).expect("positions");
    write(&mut store, 0).expect("written");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let mut holder = runtime.block_on(sqlx::SqliteConnection::connect(&url)).expect("opens");
    runtime.block_on(sqlx::raw_sql("BEGIN IMMEDIATE").execute(&mut holder)).expect("locked");
    let failure = write(&mut store, 1);
    assert!(matches!(failure, Err(Failure::Dependency { dependency: "database", .. })), "{failure:?}");
    assert_eq!(store.count(Table::Reading).ok(), Some(1), "readers are not held up by a writer");
    runtime.block_on(sqlx::raw_sql("ROLLBACK").execute(&mut holder)).expect("unlocked");
    write(&mut store, 1).expect("the retry");
}

#[test]
fn what_cannot_be_opened_says_whose_fault_it_is() {
    let missing = "sqlite:///nonexistent-directory/of/this/test.db";
    let failure = SqlStore::open(missing, options()).err().map(|e| e.to_string()).unwrap_or_default();
    assert!(failure.contains("nonexistent-directory") && failure.contains("code 14"), "{failure}");
    let urls = [
        "mysql://user:secret@host/db",
        "postgres://user:secret@host:port/db",
        "postgres://user:secret@host/db?sslmode=require",
        "",
    ];
    for url in urls {
        match SqlStore::open(url, options()) {
            Err(Failure::Stop { code, message }) => {
                assert_eq!(code, "TL-STORE-001", "{url}");
                assert!(!message.contains("secret"), "{message}");
            }
            Err(error) => panic!("{url}: {error}"),
            Ok(_) => panic!("{url} was opened"),
        }
    }
}

#[test]
fn a_file_is_found_again_with_its_rows_and_offset() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let url = format!("sqlite://{}", directory.path().join("again.db").display());
    for round in 0..3 {
        let mut store = SqlStore::open(&url, options()).expect("opens");
        let found = store.positions("g", &[TopicPartition::new(TOPIC, 0)]).expect("positions");
        assert_eq!(found[0].next, if round == 0 { -1 } else { round });
        write(&mut store, round).expect("written");
    }
}
