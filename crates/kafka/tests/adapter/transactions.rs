//! Outputs and offsets in one transaction.

use crate::common::*;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use throughline_kafka::admin::Admin;
use throughline_kafka::{AckedProducer, TransactionalProducer};
use throughline_model::books::Books;
use throughline_model::outcome::Outcome;
use throughline_model::record::{Batch, Outbox};
use throughline_runtime::ports::{Advance, BooksFound, Failure, Outlet, Position, Source, Transactions};

/// Copies a batch to `output` within the transaction.
fn copy(producer: &mut TransactionalProducer, output: &Arc<str>, batch: &Batch) -> Result<(), Failure> {
    let mut outbox = Outbox::default();
    for record in batch.iter() {
        let p = Some(batch.source.partition);
        outbox.push(output, p, record.key, record.value, record.headers.iter());
    }
    producer.send(&outbox)
}

fn advance(batch: &Batch, books: &Books) -> Advance {
    let (from, to) = (batch.get(0).offset, batch.get(batch.len() - 1).offset + 1);
    Advance { partition: batch.source.clone(), from, to, books: books.clone() }
}

#[test]
fn a_copy_loop_that_is_killed_and_fenced_copies_each_record_once() {
    const RECORDS: usize = 3_000;
    let (input, output) = (topic("in", 2, &[]), topic("out", 2, &[]));
    let group = unique("copy");
    fill(&input, 0, 0, RECORDS / 2);
    fill(&input, 1, RECORDS / 2, RECORDS / 2);
    let mut copied = 0;
    // Each life ends in the middle of a transaction; the third is fenced by a twin instead.
    for life in 0.. {
        let config = config("one");
        let mut source = join(&config, &group, &[&input]);
        let mut producer = TransactionalProducer::new(&config, &group, source.membership());
        wait_for("the producer is ready", || producer.reset().ok());
        let partitions = offered(&mut source, 2);
        start_committed(&mut source, &partitions);
        let mut books = Books::open("v");
        for turn in 0..8 {
            if copied == RECORDS {
                break;
            }
            let batch = records(&mut source);
            copy(&mut producer, &output, &batch).expect("sends");
            books.add(Outcome::Emitted, "", batch.len() as u64);
            if life == 2 && turn == 3 {
                let mut twin = TransactionalProducer::new(&config, &group, source.membership());
                twin.reset().expect("a successor");
                let fenced = producer.commit(&[advance(&batch, &books)]).expect_err("fenced");
                assert!(matches!(fenced, Failure::Fenced(_)), "{fenced:?}");
                break;
            }
            if turn == 7 {
                break;
            }
            producer.commit(&[advance(&batch, &books)]).expect("commits");
            copied += batch.len();
        }
        if copied == RECORDS {
            assert!(life > 3, "killed {life} times only");
            break;
        }
    }
    let mut seen: Vec<usize> = values(&output).into_iter().map(|(_, _, v)| v.parse().unwrap()).collect();
    seen.sort_unstable();
    assert_eq!(seen, (0..RECORDS).collect::<Vec<_>>());
}

#[test]
fn a_full_queue_of_the_producer_is_waited_for_and_nothing_is_lost() {
    let output = topic("out_full", 1, &[]);
    let mut config = config("full");
    config.properties.insert("queue.buffering.max.messages".to_owned(), "10".to_owned());
    let mut source = join(&config, &unique("full"), &[&topic("in_full", 1, &[])]);
    offered(&mut source, 1);
    let mut producer = TransactionalProducer::new(&config, &unique("full"), source.membership());
    wait_for("the producer is ready", || producer.reset().ok());
    let mut outbox = Outbox::default();
    for i in 0..1_000 {
        outbox.push(&output, Some(0), Some(b"k"), Some(i.to_string().as_bytes()), []);
    }
    producer.send(&outbox).expect("takes all of it");
    producer.commit(&[]).expect("commits");
    let seen: Vec<usize> = values(&output).into_iter().map(|(_, _, v)| v.parse().unwrap()).collect();
    assert_eq!(seen, (0..1_000).collect::<Vec<_>>());
}

#[test]
fn books_travel_with_the_offset_and_a_foreign_offset_is_told_apart() {
    let (input, output) = (topic("books", 3, &[]), topic("books_out", 1, &[]));
    let group = unique("books");
    for p in 0..3 {
        fill(&input, p, 0, 10);
    }
    let config = config("one");
    let mut source = join(&config, &group, &[&input]);
    let partitions = offered(&mut source, 3);
    let mut producer = TransactionalProducer::new(&config, &group, source.membership());
    let mut books = Books::open("v-1");
    books.add(Outcome::Emitted, "", 7);
    books.add(Outcome::Ignored, "superseded", 2);
    let transactional = Advance { partition: partitions[0].clone(), from: 0, to: 9, books: books.clone() };
    let mut outbox = Outbox::default();
    outbox.push(&output, None, None, Some(b"x"), []);
    producer.send(&outbox).expect("sends");
    producer.commit(std::slice::from_ref(&transactional)).expect("commits");
    // A load stage mirrors as the member itself.
    let mirrored = Advance { partition: partitions[1].clone(), from: 0, to: 4, books: books.clone() };
    AckedProducer::for_member(&config, source.membership()).mirror(&group, std::slice::from_ref(&mirrored));
    let ours = |next| Position { next, books: BooksFound::Ours(books.clone()) };
    let new = Position { next: -1, books: BooksFound::New };
    let found = wait_for("the mirrored offset", || {
        source.poll(Duration::from_millis(10));
        let found = source.committed(&partitions).expect("can be asked");
        (found[1] != new).then_some(found)
    });
    assert_eq!(found, [ours(9), ours(4), new]);
    // Lag tools see both, metadata included.
    let admin = Admin::new(&config).expect("a client");
    let expected = HashMap::from([(0, (9, books.to_metadata())), (1, (4, books.to_metadata()))]);
    wait_for("the offsets as others see them", || {
        let seen = admin.group_offsets(&[&group]).expect("can be asked").remove(0).offsets;
        let seen: HashMap<_, _> =
            seen.into_iter().map(|o| (o.partition.partition, (o.next, o.metadata))).collect();
        (seen == expected).then_some(())
    });
    // An operator resets an offset with Kafka's own tool while the stage is stopped.
    assert!(source.leave(DEADLINE));
    wait_for("the reset", || {
        let class = "org.apache.kafka.tools.consumer.group.ConsumerGroupCommand";
        let mut tool = broker().tool(class).expect("Java");
        tool.args(["--bootstrap-server", &broker().bootstrap(), "--group", &group]);
        tool.args(["--topic", &format!("{input}:2"), "--reset-offsets", "--to-offset", "5", "--execute"]);
        tool.output().expect("runs").status.success().then_some(())
    });
    let mut source = join(&config, &group, &[&input]);
    let partitions = offered(&mut source, 3);
    let found = wait_for("committed offsets", || source.committed(&partitions).ok());
    assert_eq!(found[2], Position { next: 5, books: BooksFound::Foreign(String::new()) });
}
