//! What every store does, on SQLite and on a real PostgreSQL: the same cases, and equal rows read back.

mod support;

use sqlx::{Connection, Row};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;
use support::TestPostgres;
use throughline_model::books::Books;
use throughline_model::outcome::{Outcome, Settled};
use throughline_model::record::TopicPartition;
use throughline_model::rows::{AlertRow, ReadingRow, Rows, SessionRow, TwinRow};
use throughline_model::time::Timestamp;
use throughline_runtime::ports::{Advance, BooksFound, Failure, Position, Store};
use throughline_runtime::{AskIncarnation, Incarnation};
use throughline_store::{SqlStore, StoreOptions, Table};
use throughline_testkit::conformance;
use uuid::Uuid;

const GROUP: &str = "load_warehouse";
const TOPIC: &str = "test.readings.v1";
/// 2026-01-31T10:00:00.123456Z.
const NOON: i64 = 1_769_853_600_123_456;

/// A database of its own for each case.
struct Database {
    url: String,
    /// Expressions that read a time and a flag as the other store's view does.
    time: fn(&str) -> String,
    flag: fn(&str) -> String,
}

impl Database {
    fn options(&self) -> StoreOptions {
        StoreOptions {
            cluster_id: "cluster-1".into(),
            topic_ids: HashMap::from([(TOPIC.to_owned(), Uuid::from_u128(1))]),
            call_timeout: Duration::from_secs(20),
            ..StoreOptions::default()
        }
    }

    fn open(&self) -> SqlStore {
        SqlStore::open(&self.url, self.options()).expect("the store opens")
    }

    /// Reads all rows of a statement as text.
    fn read(&self, sql: &str) -> Vec<Vec<Option<String>>> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let sql = sqlx::AssertSqlSafe(sql.to_owned());
        macro_rules! rows {
            ($connection:ty) => {{
                let mut connection = <$connection>::connect(&self.url).await.expect("connects");
                let rows = sqlx::query(sql).fetch_all(&mut connection).await.expect("the statement runs");
                rows.iter().map(|r| (0..r.len()).map(|i| r.get::<Option<String>, _>(i)).collect()).collect()
            }};
        }
        runtime.block_on(async {
            if self.url.starts_with("sqlite") {
                rows!(sqlx::SqliteConnection)
            } else {
                rows!(sqlx::PgConnection)
            }
        })
    }

    fn execute(&self, sql: &str) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let sql = sqlx::AssertSqlSafe(sql.to_owned());
        runtime.block_on(async {
            if self.url.starts_with("sqlite") {
                let mut connection = sqlx::SqliteConnection::connect(&self.url).await.expect("connects");
                sqlx::raw_sql(sql).execute(&mut connection).await.expect("the statement runs");
            } else {
                let mut connection = sqlx::PgConnection::connect(&self.url).await.expect("connects");
                sqlx::raw_sql(sql).execute(&mut connection).await.expect("the statement runs");
            }
        });
    }

    /// Reads `reading`, every column as text in one form for both stores.
    fn readings(&self) -> Vec<Vec<Option<String>>> {
        let (time, flag) = (self.time, self.flag);
        let text = |column: &str| format!("CAST({column} AS text)");
        let columns = [
            "site_id".into(),
            "device_id".into(),
            text("epoch"),
            text("seq"),
            "name".into(),
            text("number"),
            "text".into(),
            flag("flag"),
            "unit".into(),
            time("occurred_at"),
            time("received_at"),
            text("message_id"),
            "trace_id".into(),
            "stream".into(),
        ];
        self.read(&format!("SELECT {} FROM reading ORDER BY reading.seq, reading.name", columns.join(", ")))
    }
}

type Case = (&'static str, fn(&Database));

const CASES: &[Case] = &[
    ("the_suite_of_every_store_holds", the_suite_of_every_store_holds),
    ("a_new_partition_has_no_position_and_is_born_with_its_first_write", a_new_partition_is_born),
    ("rows_and_offset_are_written_together_and_read_back", rows_and_offset_are_written_together),
    ("a_writer_whose_offset_is_elsewhere_is_fenced_and_writes_nothing", a_zombie_is_fenced),
    ("of_two_first_writers_one_is_fenced", of_two_first_writers_one_is_fenced),
    ("concurrent_writers_of_one_partition_write_each_range_once", concurrent_writers_write_once),
    ("one_fenced_partition_takes_the_whole_write_back", one_fenced_partition_takes_all_back),
    ("a_row_that_the_database_refuses_is_a_data_failure_and_leaves_nothing", a_refused_row_leaves_nothing),
    ("a_refused_row_is_found_by_halving", a_refused_row_is_found_by_halving),
    ("a_clear_closes_its_alert_and_nothing_reopens_it", a_clear_closes_its_alert),
    ("twins_are_put_paged_and_removed", twins_are_put_paged_and_removed),
    ("an_older_twin_never_replaces_a_newer_one", an_older_twin_never_replaces_a_newer_one),
    ("the_newest_session_of_a_device_is_found", the_newest_session_is_found),
    ("another_incarnation_stops_until_it_is_adopted", another_incarnation_stops),
    ("a_running_store_notices_another_incarnation", a_running_store_notices_another_incarnation),
    ("books_that_are_not_ours_are_shown_as_foreign", foreign_books_are_shown),
    ("a_missing_table_stops", a_missing_table_stops),
    ("several_stores_open_at_once_and_find_the_tables_made", several_stores_open_at_once),
    ("a_newer_schema_stops", a_newer_schema_stops),
    ("rows_without_an_offset_are_refused", rows_without_an_offset_are_refused),
    ("texts_of_all_kinds_read_back_equal", texts_of_all_kinds_read_back_equal),
];

#[test]
fn sqlite_conforms() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    for (number, (name, case)) in CASES.iter().enumerate() {
        println!("sqlite: {name}");
        case(&sqlite_database(&directory.path().join(format!("{number}.db")).display().to_string()));
    }
}

#[test]
fn postgres_conforms() {
    let postgres = TestPostgres::start(&["fsync=off"]);
    for (number, (name, case)) in CASES.iter().enumerate() {
        println!("postgres: {name}");
        case(&postgres_database(postgres.database(&format!("case_{number}"))));
    }
}

#[test]
fn both_stores_read_back_equal_rows() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let postgres = TestPostgres::start(&["fsync=off"]);
    let sqlite = sqlite_database(&directory.path().join("equal.db").display().to_string());
    let postgres = postgres_database(postgres.database("equal"));
    let mut rows = Rows::default();
    for (seq, time) in (0..).zip([NOON, NOON + 999_999, 0, -1, -86_400_000_000 * 365, 4_102_444_799_999_999])
    {
        for (name, number) in [("a", 0.1), ("b", -1e300), ("c", 5e-324), ("d", 1e15), ("e", 123_456.789)] {
            rows.readings.push(ReadingRow {
                number: Some(number),
                occurred_at: Timestamp(time),
                flag: (seq % 3 != 0).then_some(seq % 2 == 0),
                epoch: (seq % 2 == 0).then_some(i64::MAX),
                ..reading(seq, name)
            });
        }
    }
    for database in [&sqlite, &postgres] {
        let mut store = database.open();
        store.positions(GROUP, &[partition(0)]).expect("positions");
        store.write(GROUP, &rows, &[advance(0, 0, 6)]).expect("written");
    }
    // Numbers print differently (1e+15, 1000000000000000.0), so they are compared as numbers.
    let normal = |rows: Vec<Vec<Option<String>>>| -> Vec<Vec<Option<String>>> {
        rows.into_iter()
            .map(|mut row| {
                row[5] = row[5].take().map(|n| format!("{:?}", n.parse::<f64>().expect("a number")));
                row
            })
            .collect()
    };
    assert_eq!(sqlite.readings().len(), rows.readings.len());
    assert_eq!(normal(sqlite.readings()), normal(postgres.readings()));
}

fn sqlite_database(path: &str) -> Database {
    Database {
        url: format!("sqlite://{path}"),
        time: |column| column.to_owned(),
        flag: |column| format!("CAST({column} AS text)"),
    }
}

fn postgres_database(url: String) -> Database {
    Database {
        url,
        time: |column| format!("to_char({column} AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')"),
        flag: |column| format!("CAST(CAST({column} AS int) AS text)"),
    }
}

fn partition(number: i32) -> TopicPartition {
    TopicPartition::new(TOPIC, number)
}

fn advance(number: i32, from: i64, to: i64) -> Advance {
    let mut books = Books::open("v-1");
    books.count(&Settled::emitted());
    Advance { partition: partition(number), from, to, books }
}

fn reading(seq: i64, name: &str) -> ReadingRow {
    ReadingRow {
        site_id: "site-1".into(),
        device_id: "pump-7".into(),
        epoch: Some(1),
        seq: Some(seq),
        name: name.into(),
        number: Some(21.5),
        occurred_at: Timestamp(NOON),
        received_at: Timestamp(NOON + 1),
        message_id: Uuid::from_u128(seq as u128 + 1).to_string(),
        trace_id: "0af7651916cd43dd8448eb211c80319c".into(),
        stream: "telemetry".into(),
        ..ReadingRow::default()
    }
}

fn readings(seqs: std::ops::Range<i64>) -> Rows {
    Rows { readings: seqs.map(|seq| reading(seq, "temperature")).collect(), ..Rows::default() }
}

fn alert(id: &str, raised: i64, cleared: Option<i64>) -> AlertRow {
    AlertRow {
        alert_id: id.into(),
        rule_id: "hot".into(),
        rule_version: 3,
        site_id: "site-1".into(),
        device_id: "pump-7".into(),
        severity: "critical".into(),
        state: if cleared.is_some() { "cleared" } else { "raised" }.into(),
        raised_at: Timestamp(raised),
        cleared_at: cleared.map(Timestamp),
        summary: "pump-7 is hot".into(),
        message_id: Uuid::from_u128(9).to_string(),
        trace_id: "t".into(),
        received_at: Timestamp(raised),
    }
}

fn twin(site: &str, device: &str, version: i64) -> TwinRow {
    TwinRow {
        site_id: site.into(),
        device_id: device.into(),
        reported_version: version,
        desired_version: 0,
        presence: "online".into(),
        last_seen_at: Timestamp(NOON + version),
        document: format!("{{\"b\":  {version}, \"a\":\"ü\"}}"),
        message_id: Uuid::from_u128(5).to_string(),
        trace_id: "t".into(),
    }
}

/// Opens the store and reads the positions, as a loop does when it is given partitions.
fn assigned(database: &Database, partitions: &[i32]) -> SqlStore {
    let mut store = database.open();
    let partitions: Vec<_> = partitions.iter().map(|p| partition(*p)).collect();
    store.positions(GROUP, &partitions).expect("positions");
    store
}

fn next(store: &mut SqlStore, number: i32) -> i64 {
    store.positions(GROUP, &[partition(number)]).expect("positions")[0].next
}

/// The suite that the store in memory passes too, so that what loops were tested with is what they run on.
fn the_suite_of_every_store_holds(database: &Database) {
    let mut store = database.open();
    let mut reader = database.open();
    let mut count = || reader.count(Table::Reading).expect("counted");
    conformance::store(&mut store, GROUP, &[partition(0), partition(1)], &mut count);
    // One that the checks before the write find, and one that only the database refuses.
    let nul = ReadingRow { text: Some("a\0b".into()), ..reading(1, "x") };
    let nul = Rows { readings: vec![nul], ..Rows::default() };
    let state = AlertRow { state: "unheard_of".into(), ..alert("a", NOON, None) };
    let state = Rows { alerts: vec![state], ..Rows::default() };
    for (group, poison) in [("poisoned_text", nul), ("poisoned_state", state)] {
        conformance::store_refuses_data(&mut store, group, &partition(0), &poison, &mut count);
    }
}

fn a_new_partition_is_born(database: &Database) {
    let mut store = database.open();
    let found = store.positions(GROUP, &[partition(0), partition(1)]).expect("positions");
    assert_eq!(found, vec![Position { next: -1, books: BooksFound::New }; 2]);
    store.write(GROUP, &readings(0..3), &[advance(0, 40, 43)]).expect("the first write");
    store.write(GROUP, &readings(3..4), &[advance(0, 43, 44), advance(1, 0, 9)]).expect("a move and a birth");
    store.write(GROUP, &Rows::default(), &[advance(1, 9, 12)]).expect("an offset without rows");
    let found = store.positions(GROUP, &[partition(1), partition(0)]).expect("positions");
    assert_eq!((found[0].next, found[1].next), (12, 44));
    assert_eq!(store.positions("another_group", &[partition(0)]).expect("positions")[0].next, -1);
}

fn rows_and_offset_are_written_together(database: &Database) {
    let mut store = assigned(database, &[0]);
    let mut rows = readings(0..300);
    rows.readings[7].text = Some("läuft".into());
    rows.readings[7].flag = Some(true);
    rows.readings[7].number = None;
    rows.sessions.push(SessionRow {
        event: "connected".into(),
        message_id: Uuid::from_u128(4).to_string(),
        ..SessionRow::default()
    });
    rows.alerts.push(alert("a-1", NOON, None));
    rows.twins.push(twin("site-1", "pump-7", 1));
    store.write(GROUP, &rows, &[advance(0, 0, 300)]).expect("written");
    let counts = [Table::Reading, Table::Session, Table::Alert, Table::Twin].map(|t| store.count(t).ok());
    assert_eq!(counts, [Some(300), Some(1), Some(1), Some(1)]);
    let position = &store.positions(GROUP, &[partition(0)]).expect("positions")[0];
    let BooksFound::Ours(books) = &position.books else { panic!("{position:?}") };
    assert_eq!((position.next, books.of(Outcome::Emitted)), (300, 1));
    let row = &database.readings()[7];
    let text = |i: usize| row[i].as_deref();
    assert_eq!((text(0), text(3), text(4)), (Some("site-1"), Some("7"), Some("temperature")));
    assert_eq!((text(5), text(6), text(7), text(8)), (None, Some("läuft"), Some("1"), None));
    assert_eq!(text(9), Some("2026-01-31T10:00:00.123456Z"));
    assert_eq!(text(10), Some("2026-01-31T10:00:00.123457Z"));
    assert_eq!(text(11), Some("00000000-0000-0000-0000-000000000008"));
}

fn expect_fenced(result: Result<(), Failure>) {
    assert!(matches!(result, Err(Failure::Fenced(_))), "{result:?}");
}

fn a_zombie_is_fenced(database: &Database) {
    let mut zombie = assigned(database, &[0]);
    zombie.write(GROUP, &readings(0..5), &[advance(0, 0, 5)]).expect("it owns the partition");
    let mut successor = assigned(database, &[0]);
    successor.write(GROUP, &readings(5..8), &[advance(0, 5, 8)]).expect("the successor goes on");
    expect_fenced(zombie.write(GROUP, &readings(5..9), &[advance(0, 5, 9)]));
    // A repeat of what was committed is the case after an unknown commit.
    expect_fenced(successor.write(GROUP, &readings(5..8), &[advance(0, 5, 8)]));
    assert_eq!(successor.count(Table::Reading).ok(), Some(8));
    assert_eq!(next(&mut zombie, 0), 8);
    zombie.write(GROUP, &readings(8..9), &[advance(0, 8, 9)]).expect("it goes on from the stored position");
}

fn of_two_first_writers_one_is_fenced(database: &Database) {
    let (mut one, mut two) = (assigned(database, &[0]), assigned(database, &[0]));
    one.write(GROUP, &readings(0..2), &[advance(0, 0, 2)]).expect("the first");
    expect_fenced(two.write(GROUP, &readings(0..2), &[advance(0, 0, 2)]));
    assert_eq!(one.count(Table::Reading).ok(), Some(2));
}

fn concurrent_writers_write_once(database: &Database) {
    const LAST: i64 = 60;
    assigned(database, &[0]).write(GROUP, &readings(0..1), &[advance(0, 0, 1)]).expect("the first write");
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let mut store = database.open();
                loop {
                    let from = next(&mut store, 0);
                    if from >= LAST {
                        break;
                    }
                    match store.write(GROUP, &readings(from..from + 1), &[advance(0, from, from + 1)]) {
                        Ok(()) | Err(Failure::Fenced(_)) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            });
        }
    });
    let distinct =
        database.read("SELECT CAST(count(*) AS text), CAST(count(DISTINCT seq) AS text) FROM reading");
    assert_eq!(distinct, [[Some(LAST.to_string()), Some(LAST.to_string())]]);
}

fn one_fenced_partition_takes_all_back(database: &Database) {
    let mut store = assigned(database, &[0, 1]);
    store.write(GROUP, &readings(0..2), &[advance(0, 0, 2), advance(1, 0, 2)]).expect("both partitions");
    expect_fenced(store.write(GROUP, &readings(2..4), &[advance(0, 2, 4), advance(1, 1, 4)]));
    assert_eq!((next(&mut store, 0), next(&mut store, 1)), (2, 2));
    assert_eq!(store.count(Table::Reading).ok(), Some(2));
}

fn a_refused_row_leaves_nothing(database: &Database) {
    let mut store = assigned(database, &[0]);
    store.write(GROUP, &readings(0..1), &[advance(0, 0, 1)]).expect("the first write");
    let mut nul = readings(1..3);
    nul.readings[1].text = Some("secret\0value".into());
    let mut check = readings(1..3);
    check.alerts.push(AlertRow { state: "secret-state".into(), ..alert("a", NOON, None) });
    let mut cleared = readings(1..3);
    cleared.alerts.push(AlertRow { state: "raised".into(), ..alert("a", NOON, Some(NOON)) });
    let mut json = readings(1..3);
    json.twins.push(TwinRow { document: "{secret".into(), ..twin("s", "d", 1) });
    for rows in [nul, check, cleared, json] {
        match store.write(GROUP, &rows, &[advance(0, 1, 3)]) {
            Err(Failure::Data { code, message }) => {
                assert!(!message.contains("secret") && !code.is_empty(), "{code}: {message}");
            }
            other => panic!("{other:?}"),
        }
        assert_eq!((next(&mut store, 0), store.count(Table::Reading).ok()), (1, Some(1)));
    }
    store.write(GROUP, &readings(1..3), &[advance(0, 1, 3)]).expect("the store goes on after a refusal");
}

fn a_refused_row_is_found_by_halving(database: &Database) {
    // What the load loop does with a batch that is refused: halves it until one record is left.
    fn settle(store: &mut SqlStore, alerts: &[AlertRow], from: i64, refused: &mut Vec<i64>) {
        let to = from + i64::try_from(alerts.len()).expect("few");
        let rows = Rows { alerts: alerts.to_vec(), ..Rows::default() };
        match store.write(GROUP, &rows, &[advance(0, from, to)]) {
            Ok(()) => {}
            Err(Failure::Data { .. }) if alerts.len() == 1 => {
                refused.push(from);
                store.write(GROUP, &Rows::default(), &[advance(0, from, to)]).expect("the offset alone");
            }
            Err(Failure::Data { .. }) => {
                let (left, right) = alerts.split_at(alerts.len() / 2);
                settle(store, left, from, refused);
                settle(store, right, from + i64::try_from(left.len()).expect("few"), refused);
            }
            Err(error) => panic!("{error}"),
        }
    }
    let mut store = assigned(database, &[0]);
    let mut alerts: Vec<_> = (0..20).map(|i| alert(&format!("a-{i}"), NOON, None)).collect();
    alerts[3].state = "unheard_of".into();
    alerts[17].state = String::new();
    let mut refused = Vec::new();
    settle(&mut store, &alerts, 0, &mut refused);
    assert_eq!(refused, [3, 17]);
    assert_eq!((store.count(Table::Alert).ok(), next(&mut store, 0)), (Some(18), 20));
}

fn a_clear_closes_its_alert(database: &Database) {
    let mut store = assigned(database, &[0]);
    let steps = [
        vec![alert("a", NOON, None), alert("b", NOON, None)],
        vec![alert("a", NOON, Some(NOON + 5)), alert("a", NOON, None)],
        vec![alert("a", NOON, None), alert("c", NOON, Some(NOON + 7))],
        vec![alert("a", NOON, Some(NOON + 9)), alert("c", NOON, None)],
    ];
    for (at, alerts) in (0..).zip(steps) {
        let rows = Rows { alerts, ..Rows::default() };
        store.write(GROUP, &rows, &[advance(0, at, at + 1)]).expect("written");
    }
    let cleared = (database.time)("cleared_at");
    let seen = database.read(&format!("SELECT alert_id, state, {cleared} FROM alert ORDER BY alert_id"));
    let some = |text: &str| Some(text.to_owned());
    assert_eq!(
        seen,
        [
            [some("a"), some("cleared"), some("2026-01-31T10:00:00.123461Z")],
            [some("b"), some("raised"), None],
            [some("c"), some("cleared"), some("2026-01-31T10:00:00.123463Z")],
        ]
    );
}

fn twins_are_put_paged_and_removed(database: &Database) {
    let mut store = assigned(database, &[0]);
    let devices = [("s1", "a"), ("s1", "b"), ("s1", "Z"), ("s2", "a"), ("S", "ü")];
    let twins = devices.iter().map(|(site, device)| twin(site, device, 1)).collect();
    store.write(GROUP, &Rows { twins, ..Rows::default() }, &[advance(0, 0, 5)]).expect("put");
    let twins = vec![twin("s1", "a", 2), TwinRow::removal("s1", "b"), twin("s1", "a", 3)];
    store.write(GROUP, &Rows { twins, ..Rows::default() }, &[advance(0, 5, 8)]).expect("changed");
    assert_eq!(store.twin("s1", "a").expect("read"), Some(twin("s1", "a", 3)));
    assert_eq!(store.twin("s1", "b").expect("read"), None);
    let mut pages = Vec::new();
    let mut after: Option<(String, String)> = None;
    loop {
        let cursor = after.as_ref().map(|(site, device)| (site.as_str(), device.as_str()));
        let page = store.twins(None, cursor, 3).expect("a page");
        let Some(last) = page.last() else { break };
        after = Some((last.site_id.clone(), last.device_id.clone()));
        pages.push(page.iter().map(|t| format!("{}/{}", t.site_id, t.device_id)).collect::<Vec<_>>());
    }
    assert_eq!(pages, [vec!["S/ü", "s1/Z", "s1/a"], vec!["s2/a"]]);
    assert_eq!(store.twins(Some("s2"), None, 10).expect("one site").len(), 1);
}

fn an_older_twin_never_replaces_a_newer_one(database: &Database) {
    let mut store = assigned(database, &[0]);
    let begun_again = TwinRow { last_seen_at: Timestamp(NOON + 1_000), ..twin("s", "d", 1) };
    let mut desired = begun_again.clone();
    desired.desired_version = 1;
    let offline = TwinRow { presence: "offline".into(), ..desired.clone() };
    let after = TwinRow { last_seen_at: Timestamp(NOON), ..twin("s", "d", 0) };
    // (what it shows, the rows of one write, the version, desired version and presence after it)
    let steps = [
        ("a twin", vec![twin("s", "d", 3)], (3, 0, "online")),
        ("the replay of an older one", vec![twin("s", "d", 2)], (3, 0, "online")),
        ("both in one write", vec![twin("s", "d", 5), twin("s", "d", 4)], (5, 0, "online")),
        ("a topic that was begun again", vec![begun_again.clone()], (1, 0, "online")),
        ("a request while the device is silent", vec![desired], (1, 1, "online")),
        ("the twin before the request", vec![begun_again], (1, 1, "online")),
        ("presence alone", vec![offline], (1, 1, "offline")),
        ("a removal", vec![TwinRow::removal("s", "d"), after], (0, 0, "online")),
    ];
    for (at, (what, twins, expected)) in (0..).zip(steps) {
        store.write(GROUP, &Rows { twins, ..Rows::default() }, &[advance(0, at, at + 1)]).expect("written");
        let row = store.twin("s", "d").expect("read").expect("there");
        assert_eq!((row.reported_version, row.desired_version, row.presence.as_str()), expected, "{what}");
    }
}

fn the_newest_session_is_found(database: &Database) {
    let mut store = assigned(database, &[0]);
    let session = |generation: i64| SessionRow {
        site_id: "s".into(),
        device_id: "d".into(),
        client_id: "c".into(),
        event: "connected".into(),
        cause: (generation == 2).then(|| "keep_alive".into()),
        protocol: "mqtt5".into(),
        session_generation: generation,
        occurred_at: Timestamp(NOON),
        received_at: Timestamp(NOON + generation),
        message_id: Uuid::from_u128(3).to_string(),
        trace_id: "t".into(),
    };
    let sessions = vec![session(1), session(2), session(0)];
    store.write(GROUP, &Rows { sessions, ..Rows::default() }, &[advance(0, 0, 3)]).expect("written");
    assert_eq!(store.last_session("s", "d").expect("read"), Some(session(2)));
    assert_eq!(store.last_session("s", "e").expect("read"), None);
}

fn another_incarnation_stops(database: &Database) {
    let mut store = assigned(database, &[0]);
    store.write(GROUP, &readings(0..9), &[advance(0, 0, 9)]).expect("written");
    let changes: [fn(&mut StoreOptions); 2] = [
        |options| options.cluster_id = "cluster-2".into(),
        |options| _ = options.topic_ids.insert(TOPIC.into(), Uuid::from_u128(2)),
    ];
    for change in changes {
        let mut options = database.options();
        change(&mut options);
        let mut other = SqlStore::open(&database.url, options).expect("the store opens");
        match other.positions(GROUP, &[partition(0)]) {
            Err(Failure::Stop { code, message }) => {
                assert_eq!(code, "TL-STORE-004");
                assert!(message.contains("throughline groups adopt load_warehouse"), "{message}");
            }
            result => panic!("{result:?}"),
        }
        expect_fenced(other.write(GROUP, &readings(9..10), &[advance(0, 9, 10)]));
        other.adopt(GROUP, &partition(0), 2, "v-2").expect("adopted");
        let position = &other.positions(GROUP, &[partition(0)]).expect("positions")[0];
        assert_eq!(position, &Position { next: 2, books: BooksFound::Ours(Books::open("v-2")) });
        expect_fenced(store.write(GROUP, &readings(9..10), &[advance(0, 9, 10)]));
        store.adopt(GROUP, &partition(0), 9, "v-3").expect("adopted back");
    }
    match store.positions(GROUP, &[TopicPartition::new("unknown.v1", 0)]) {
        Err(Failure::Stop { code, .. }) => assert_eq!(code, "TL-STORE-003"),
        result => panic!("{result:?}"),
    }
}

fn a_running_store_notices_another_incarnation(database: &Database) {
    let of = |cluster: &str, topic: u128| Incarnation {
        cluster_id: cluster.into(),
        topic_ids: HashMap::from([(TOPIC.to_owned(), Uuid::from_u128(topic))]),
    };
    let present = Arc::new(Mutex::new(Some(of("cluster-1", 1))));
    let asked = Arc::clone(&present);
    let ask = AskIncarnation::new(move || {
        let away = || Failure::Dependency { dependency: "kafka", message: "away".into() };
        asked.lock().expect("nobody panics").clone().ok_or_else(away)
    });
    let options = StoreOptions { ask: Some(ask), ..database.options() };
    let mut store = SqlStore::open(&database.url, options).expect("the store opens");
    store.positions(GROUP, &[partition(0)]).expect("positions");
    store.write(GROUP, &readings(0..9), &[advance(0, 0, 9)]).expect("written");
    let gone = Incarnation { topic_ids: HashMap::new(), ..of("cluster-1", 1) };
    for (what, now, expected) in [
        ("the topic was made again", Some(of("cluster-1", 2)), Some("TL-STORE-004")),
        ("another cluster", Some(of("cluster-2", 1)), Some("TL-STORE-004")),
        ("the topic is gone, for now", Some(gone), None),
        ("Kafka is away", None, None),
    ] {
        *present.lock().expect("nobody panics") = now;
        match store.positions(GROUP, &[partition(0)]) {
            Err(Failure::Stop { code, .. }) => assert_eq!(Some(code), expected, "{what}"),
            Err(Failure::Dependency { dependency: "kafka", .. }) => assert_eq!(expected, None, "{what}"),
            result => panic!("{what}: {result:?}"),
        }
    }
    *present.lock().expect("nobody panics") = Some(of("cluster-1", 1));
    assert_eq!(next(&mut store, 0), 9);
    store.write(GROUP, &readings(9..10), &[advance(0, 9, 10)]).expect("it goes on");
}

fn foreign_books_are_shown(database: &Database) {
    let mut store = assigned(database, &[0]);
    store.write(GROUP, &readings(0..1), &[advance(0, 0, 1)]).expect("written");
    database.execute("UPDATE stage_offset SET books = 'by hand', next = 7");
    let position = &store.positions(GROUP, &[partition(0)]).expect("positions")[0];
    assert_eq!(position, &Position { next: 7, books: BooksFound::Foreign("by hand".into()) });
}

fn a_missing_table_stops(database: &Database) {
    let mut store = assigned(database, &[0]);
    database.execute("DROP TABLE stage_offset");
    match store.write(GROUP, &readings(0..1), &[advance(0, 0, 1)]) {
        Err(Failure::Stop { code, message }) => assert_eq!(code, "TL-STORE-005", "{message}"),
        result => panic!("{result:?}"),
    }
}

fn several_stores_open_at_once(database: &Database) {
    thread::scope(|scope| {
        for number in 0..4 {
            scope.spawn(move || {
                let mut store = assigned(database, &[number]);
                store.write(GROUP, &readings(0..1), &[advance(number, 0, 1)]).expect("written");
            });
        }
    });
    assert_eq!(database.open().count(Table::Reading).ok(), Some(4));
    assert_eq!(database.read("SELECT name FROM schema_migration"), [[Some("warehouse".to_owned())]]);
}

fn a_newer_schema_stops(database: &Database) {
    drop(database.open());
    database.execute("INSERT INTO schema_migration (version, name) VALUES (99, 'from the future')");
    match SqlStore::open(&database.url, database.options()) {
        Err(Failure::Stop { code, .. }) => assert_eq!(code, "TL-STORE-002"),
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("a store with a newer schema was opened"),
    }
}

fn rows_without_an_offset_are_refused(database: &Database) {
    let mut store = database.open();
    store.write(GROUP, &Rows::default(), &[]).expect("nothing to do");
    assert!(matches!(store.write(GROUP, &readings(0..1), &[]), Err(Failure::Stop { .. })));
}

fn texts_of_all_kinds_read_back_equal(database: &Database) {
    use proptest::prelude::*;
    use proptest::test_runner::{Config, TestRunner};
    // The runner takes a closure that changes nothing of its own.
    let store = RefCell::new(assigned(database, &[0]));
    let position = Cell::new(0);
    let text = || "[^\u{0}]{0,40}";
    let numbers = prop::num::f64::ANY.prop_filter("refused before", |n| !n.is_nan());
    let row =
        (text(), text(), prop::option::of(any::<i64>()), prop::option::of(numbers), prop::option::of(text()));
    let runs = prop::collection::vec(row, 1..20);
    let mut runner = TestRunner::new(Config { cases: 24, failure_persistence: None, ..Config::default() });
    let outcome = runner.run(&runs, |run| {
        let at = position.get();
        let before = usize::try_from(at).expect("few");
        let mut rows = Rows::default();
        for (index, (site, name, epoch, number, text)) in (at..).zip(&run) {
            rows.readings.push(ReadingRow {
                site_id: site.clone(),
                epoch: *epoch,
                number: *number,
                text: text.clone(),
                ..reading(index, name)
            });
        }
        let to = at + i64::try_from(run.len()).expect("few");
        store.borrow_mut().write(GROUP, &rows, &[advance(0, at, to)]).expect("written");
        position.set(to);
        let read = database.readings();
        for (row, (site, name, epoch, number, text)) in read[before..].iter().zip(&run) {
            prop_assert_eq!(row[0].as_ref(), Some(site));
            prop_assert_eq!(row[4].as_ref(), Some(name));
            prop_assert_eq!(row[2].clone(), epoch.map(|e| e.to_string()));
            prop_assert_eq!(row[6].as_ref(), text.as_ref());
            let read = row[5].as_deref().map(parse_number);
            // SQLite prints 15 digits, so the sums are compared within that.
            match (read, number) {
                (Some(a), Some(b)) => prop_assert!(a == *b || ((a - b) / b).abs() < 1e-14, "{} {}", a, b),
                (a, b) => prop_assert_eq!(a, *b),
            }
        }
        Ok(())
    });
    outcome.expect("rows read back as they were written");
}

fn parse_number(text: &str) -> f64 {
    match text {
        "Infinity" | "Inf" => f64::INFINITY,
        "-Infinity" | "-Inf" => f64::NEG_INFINITY,
        number => number.parse().expect("a number"),
    }
}
