//! Conformance: what every adapter of a port does, checked by the same functions for the in-memory ports
//! and the real ones. Each function panics with the rule that was broken.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};
use throughline_model::books::Books;
use throughline_model::outcome::{Outcome, Settled};
use throughline_model::record::{Outbox, TopicPartition};
use throughline_model::rows::{ReadingRow, Rows};
use throughline_model::time::Timestamp;
use throughline_runtime::ports::{
    Advance, BooksFound, Failure, Outlet, PipelineEvent, Source, Store, TableReader, Transactions,
};

/// How long a real adapter may take for one step.
const PATIENCE: Duration = Duration::from_secs(60);

fn books(read: u64) -> Books {
    let mut books = Books::open("volume-1");
    for _ in 0..read {
        books.count(&Settled::emitted());
    }
    books
}

fn reading(name: &str, number: f64) -> ReadingRow {
    ReadingRow {
        site_id: "site-1".to_owned(),
        device_id: "pump-7".to_owned(),
        epoch: Some(1),
        seq: Some(1),
        name: name.to_owned(),
        number: Some(number),
        occurred_at: Timestamp(1_767_225_600_000_000),
        received_at: Timestamp(1_767_225_600_500_000),
        message_id: "019b76da-a800-8000-8000-000000000000".to_owned(),
        trace_id: "0123456789abcdef0123456789abcdef".to_owned(),
        stream: "telemetry".to_owned(),
        ..ReadingRow::default()
    }
}

/// Checks a store. `group` must be unused, `partitions` are two of a topic that the store accepts, and
/// `count_readings` returns how many rows `reading` has now.
pub fn store(
    store: &mut dyn Store,
    group: &str,
    partitions: &[TopicPartition; 2],
    count_readings: &mut dyn FnMut() -> u64,
) {
    let found = store.positions(group, partitions).expect("positions of a new group");
    assert_eq!(found.len(), 2, "one position for every partition asked for");
    for position in &found {
        assert_eq!((position.next, &position.books), (-1, &BooksFound::New), "a new group has no position");
    }

    let before = count_readings();
    let rows = Rows { readings: vec![reading("a", 1.5), reading("b", -2.0)], ..Rows::default() };
    let advance = |index: usize, from, to, read| Advance {
        partition: partitions[index].clone(),
        from,
        to,
        books: books(read),
    };
    let first = [advance(0, -1, 5, 3), advance(1, -1, 2, 2)];
    store.write(group, &rows, &first).expect("the first write opens the positions");
    assert_eq!(count_readings() - before, 2, "the rows are written");
    check_positions(store, group, partitions, [(5, 3), (2, 2)]);

    let stale = store.write(group, &rows, &[advance(0, -1, 5, 3)]);
    assert!(matches!(stale, Err(Failure::Fenced(_))), "a write from a stale position is fenced: {stale:?}");
    let half = store.write(group, &rows, &[advance(0, 5, 9, 7), advance(1, 7, 8, 3)]);
    assert!(matches!(half, Err(Failure::Fenced(_))), "one stale position fences the whole write: {half:?}");
    assert_eq!(count_readings() - before, 2, "a fenced write leaves no rows");
    check_positions(store, group, partitions, [(5, 3), (2, 2)]);

    store.write(group, &Rows::default(), &[advance(0, 5, 9, 7)]).expect("positions move without rows");
    check_positions(store, group, partitions, [(9, 7), (2, 2)]);

    let other = format!("{group}-other");
    let found = store.positions(&other, partitions).expect("positions of another group");
    assert!(found.iter().all(|p| p.next == -1), "groups do not share positions");
}

fn check_positions(
    store: &mut dyn Store,
    group: &str,
    partitions: &[TopicPartition; 2],
    expected: [(i64, u64); 2],
) {
    let found = store.positions(group, partitions).expect("positions");
    for (position, (next, read)) in found.iter().zip(expected) {
        assert_eq!(position.next, next, "the position is where the last write put it");
        assert_eq!(position.books, BooksFound::Ours(books(read)), "the books come back as they were written");
    }
}

/// Checks that a store tells data that it refuses from everything else, and that it writes nothing of such a
/// write. `poison` are rows that the store must refuse as data.
pub fn store_refuses_data(
    store: &mut dyn Store,
    group: &str,
    partition: &TopicPartition,
    poison: &Rows,
    count_readings: &mut dyn FnMut() -> u64,
) {
    // As a loop does before its first write: a store may let only such a writer open a position.
    let found = store.positions(group, std::slice::from_ref(partition)).expect("positions of a new group");
    assert_eq!(found[0].next, -1, "a new group has no position");
    let before = count_readings();
    let mut rows = poison.clone();
    rows.readings.insert(0, reading("good", 1.0));
    let advance = |to| Advance { partition: partition.clone(), from: -1, to, books: books(1) };
    let refused = store.write(group, &rows, &[advance(2)]);
    let Err(Failure::Data { code, .. }) = &refused else { panic!("poison is the data's fault: {refused:?}") };
    assert!(!code.is_empty(), "a refusal has a code");
    assert_eq!(count_readings(), before, "nothing of a refused write is written");
    let found = store.positions(group, std::slice::from_ref(partition)).expect("positions");
    assert_eq!(found[0].next, -1, "a refused write moves no position");
    let good = Rows { readings: vec![reading("good", 1.0)], ..Rows::default() };
    store.write(group, &good, &[advance(1)]).expect("the good half is taken");
    assert_eq!(count_readings(), before + 1);
}

/// What [`source_and_transactions`] needs besides the two ports.
pub struct Surroundings<'a> {
    /// The group, unused so far.
    pub group: &'a str,
    /// A topic with one partition, empty, the only one that the source reads.
    pub input: &'a str,
    /// A topic for outputs, empty.
    pub output: &'a str,
    /// Appends a record with this key and value to the input, outside any transaction.
    pub append: &'a mut dyn FnMut(&str, &str),
    /// Reads a topic from its beginning to its end, committed data only.
    pub reader: &'a mut dyn TableReader,
}

/// Checks a source and its transactions together: order, start, pause, commit with offsets and books, abort
/// and redelivery.
pub fn source_and_transactions(
    source: &mut dyn Source,
    transactions: &mut dyn Transactions,
    around: Surroundings<'_>,
) {
    let Surroundings { group, input, output, append, reader } = around;
    let partition = TopicPartition::new(input, 0);
    for number in 0..10 {
        append("k", &number.to_string());
    }
    transactions.reset().expect("a producer can be made");

    let offered = until(source, |event| match event {
        PipelineEvent::Offered(partitions) => Some(partitions),
        PipelineEvent::Records(_) => panic!("nothing is delivered before the start"),
        _ => None,
    });
    assert!(offered.contains(&partition), "the partition is offered: {offered:?}");
    let position = source.committed(std::slice::from_ref(&partition)).expect("committed").remove(0);
    assert_eq!((position.next, &position.books), (-1, &BooksFound::New), "a new group has no position");
    source.start(&[(partition.clone(), -1)]).expect("started");
    assert_eq!(values(source, 10), numbers(0..10), "every record in order");
    until(source, |event| matches!(event, PipelineEvent::CaughtUp(_)).then_some(()));

    // A commit makes outputs, offsets and books visible together.
    let topic = output.into();
    let mut outbox = Outbox::default();
    outbox.push(&topic, Some(0), Some(b"k"), Some(b"one"), [("h", b"1".as_slice())]);
    transactions.send(&outbox).expect("sent");
    let advance = |from, to, read| Advance { partition: partition.clone(), from, to, books: books(read) };
    transactions.commit(&[advance(-1, 4, 4)]).expect("committed");
    assert_eq!(outputs(reader, output), ["one"]);
    let position = source.committed(std::slice::from_ref(&partition)).expect("committed").remove(0);
    assert_eq!(
        (position.next, position.books),
        (4, BooksFound::Ours(books(4))),
        "books travel with the offset"
    );

    // What is not committed is never seen, and the input is delivered again.
    outbox.clear();
    outbox.push(&topic, Some(0), Some(b"k"), Some(b"never"), []);
    transactions.send(&outbox).expect("sent");
    transactions.reset().expect("the open transaction is ended");
    assert_eq!(outputs(reader, output), ["one"], "an aborted output is not seen");
    let position = source.committed(std::slice::from_ref(&partition)).expect("committed").remove(0);
    assert_eq!(position.next, 4);
    source.start(&[(partition.clone(), 4)]).expect("started again");
    assert_eq!(values(source, 6), numbers(4..10), "delivered again from the committed position");

    // A commit without records moves the offsets alone.
    transactions.commit(&[advance(4, 10, 10)]).expect("committed");
    let position = source.committed(std::slice::from_ref(&partition)).expect("committed").remove(0);
    assert_eq!((position.next, position.books), (10, BooksFound::Ours(books(10))));

    // A paused partition delivers nothing and loses nothing.
    source.pause(std::slice::from_ref(&partition), true);
    append("k", "10");
    for _ in 0..20 {
        let event = source.poll(Duration::from_millis(50));
        assert!(!matches!(event, PipelineEvent::Records(_)), "a paused partition delivers nothing");
    }
    source.pause(std::slice::from_ref(&partition), false);
    assert_eq!(values(source, 1), numbers(10..11));
    assert_eq!(books(10).of(Outcome::Emitted), 10, "group `{group}` ends with balanced books");
    source.release(std::slice::from_ref(&partition));
}

/// Checks that an outlet returns after the records are readable.
pub fn outlet(outlet: &mut dyn Outlet, topic: &str, reader: &mut dyn TableReader) {
    let mut outbox = Outbox::default();
    let name = topic.into();
    for number in 0..5 {
        let value = number.to_string();
        outbox.push(&name, Some(0), Some(b"k"), Some(value.as_bytes()), []);
    }
    outlet.send_all(&outbox).expect("sent");
    assert_eq!(outputs(reader, topic), numbers(0..5));
}

fn numbers(range: std::ops::Range<u32>) -> Vec<String> {
    range.map(|n| n.to_string()).collect()
}

/// Polls until `pick` finds what it looks for.
fn until<T>(source: &mut dyn Source, mut pick: impl FnMut(PipelineEvent) -> Option<T>) -> T {
    let began = Instant::now();
    let mut seen = BTreeSet::new();
    loop {
        let event = source.poll(Duration::from_millis(50));
        seen.insert(format!("{event:?}").chars().take(60).collect::<String>());
        if let Some(found) = pick(event) {
            return found;
        }
        assert!(began.elapsed() < PATIENCE, "the event did not come within a minute; there were {seen:?}");
    }
}

fn values(source: &mut dyn Source, count: usize) -> Vec<String> {
    let mut values = Vec::new();
    while values.len() < count {
        let batch = until(source, |event| match event {
            PipelineEvent::Records(batch) => Some(batch),
            _ => None,
        });
        let text = |v: Option<&[u8]>| String::from_utf8_lossy(v.unwrap_or_default()).into_owned();
        values.extend(batch.iter().map(|record| text(record.value)));
    }
    values
}

fn outputs(reader: &mut dyn TableReader, topic: &str) -> Vec<String> {
    let mut values = Vec::new();
    reader
        .read_partitions(&topic.into(), &[0], &mut |batch| {
            let text = |v: Option<&[u8]>| String::from_utf8_lossy(v.unwrap_or_default()).into_owned();
            values.extend(batch.iter().map(|record| text(record.value)));
        })
        .expect("the topic can be read");
    values
}
