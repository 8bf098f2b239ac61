//! Tables are read to the end they had.

use crate::common::*;
use rdkafka::mocking::MockCluster;
use rdkafka::types::{RDKafkaApiKey, RDKafkaRespErr};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use throughline_kafka::browse::end_offsets;
use throughline_kafka::{AckedProducer, GroupSource, KafkaConfig, TopicReader, TransactionalProducer};
use throughline_model::record::{Batch, Outbox};
use throughline_runtime::ports::{Failure, Outlet, PipelineEvent, Source, TableReader, Transactions};

#[test]
fn what_is_acknowledged_is_not_sent_again_where_the_rest_is_not() {
    let mock = MockCluster::new(2).expect("a mock cluster");
    for (name, leader) in [("near", 1), ("far", 2)] {
        mock.create_topic(name, 1, 1).expect("a topic");
        mock.partition_leader(name, 0, Some(leader)).expect("a leader");
    }
    let config = KafkaConfig::new(mock.bootstrap_servers());
    let mut outbox = Outbox::default();
    for name in ["near", "far"] {
        outbox.push(&name.into(), Some(0), Some(b"k"), Some(b"v"), []);
    }
    let mut producer = AckedProducer::new(&config);
    mock.broker_down(2).expect("a broker goes");
    let failed = producer.send_rest(&mut outbox).expect_err("nobody leads the other topic");
    assert!(matches!(failed, Failure::Dependency { .. }), "{failed}");
    assert_eq!(outbox.iter().map(|record| record.topic).collect::<Vec<_>>(), ["far"]);
    mock.broker_up(2).expect("a broker comes");
    producer.send_rest(&mut outbox).expect("everything is acknowledged");
    assert!(outbox.is_empty());
    for name in ["near", "far"] {
        let ends = end_offsets(&config, name).expect("the mock answers");
        assert_eq!(ends.iter().map(|(_, end)| *end).collect::<Vec<_>>(), [1], "{name}");
    }
}

#[test]
fn a_table_is_read_to_the_end_it_had_and_open_transactions_are_awaited() {
    let table = topic("table", 2, &[("cleanup.policy", "compact")]);
    let config = config("one");
    let source = join(&config, &unique("nobody"), &[&table]);
    let push = |value: &str| {
        let mut outbox = Outbox::default();
        outbox.push(&table, Some(0), Some(b"k"), Some(value.as_bytes()), [("h", b"1".as_slice())]);
        outbox
    };
    let text = |batch: &Batch| -> Vec<String> {
        batch.iter().map(|r| String::from_utf8_lossy(r.value.unwrap()).into_owned()).collect()
    };
    let written = |count| end_offsets(&config, &table).ok().filter(|ends| ends[0].1 >= count).map(drop);
    let mut writer = TransactionalProducer::new(&config, &unique("writer"), source.membership());
    writer.send(&push("committed")).expect("sends");
    writer.commit(&[]).expect("commits");
    // An abort leaves nothing but control records at the end.
    writer.send(&push("aborted")).expect("sends");
    wait_for("the record that will be aborted", || written(3));
    writer.reset().expect("ends the open transaction");
    let read = |partition| {
        let mut values = Vec::new();
        let read = TopicReader::new(&config)
            .read_partitions(&(*table).into(), &[partition], &mut |b| values.extend(text(b)));
        read.map(|()| values)
    };
    assert_eq!(read(0).expect("reads"), ["committed"]);
    assert_eq!(read(1).expect("an empty partition"), [""; 0]);
    writer.send(&push("late")).expect("sends");
    wait_for("the open transaction's record", || written(5));
    let done = Mutex::new(false);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            let values = read(0);
            *done.lock().unwrap() = true;
            values
        });
        let until = Instant::now() + Duration::from_secs(1);
        while Instant::now() < until {
            assert!(!*done.lock().unwrap(), "the open transaction was not awaited");
            std::thread::sleep(Duration::from_millis(20));
        }
        writer.commit(&[]).expect("commits");
        assert_eq!(waiting.join().unwrap().expect("reads"), ["committed", "late"]);
    });
    // Following: all of it first, then what has come since.
    let mut reader = TopicReader::new(&config);
    let seen = Mutex::new(Vec::new());
    let mut each = |batch: &Batch| seen.lock().unwrap().extend(text(batch));
    reader.follow(&table, &mut each).expect("follows");
    assert_eq!(*seen.lock().unwrap(), ["committed", "late"]);
    writer.send(&push("later")).expect("sends");
    writer.commit(&[]).expect("commits");
    wait_for("the follow-up", || {
        reader.follow(&table, &mut each).expect("follows");
        (seen.lock().unwrap().last()? == "later").then_some(())
    });
}

#[test]
fn a_restore_in_which_nothing_comes_ends_and_the_next_attempt_reads_everything() {
    let mock = MockCluster::new(1).expect("a mock cluster");
    mock.create_topic("t", 1, 1).expect("a topic");
    let config = KafkaConfig::new(mock.bootstrap_servers());
    let topic: Arc<str> = "t".into();
    let mut outbox = Outbox::default();
    for value in [b"1", b"2", b"3"] {
        outbox.push(&topic, Some(0), Some(b"k"), Some(value), []);
    }
    AckedProducer::new(&config).send_all(&outbox).expect("acknowledged");
    // The broker says where the partition ends and hands over nothing of it.
    let refuses = [RDKafkaRespErr::RD_KAFKA_RESP_ERR_NOT_LEADER_FOR_PARTITION; 10_000];
    mock.request_errors(RDKafkaApiKey::Fetch, &refuses);
    let mut reader = TopicReader::new(&config);
    let mut read =
        |count: &mut usize| reader.read_partitions(&topic, &[0], &mut |batch| *count += batch.len());
    let mut count = 0;
    let failure = read(&mut count).expect_err("nothing comes");
    let Failure::Dependency { message, .. } = &failure else { panic!("{failure:?}") };
    assert!(message.contains("t/0 came to nothing for 15 s"), "{message}");
    assert_eq!(count, 0);
    mock.clear_request_errors(RDKafkaApiKey::Fetch);
    read(&mut count).expect("it is read");
    assert_eq!(count, 3);
}

#[test]
fn an_unknown_topic_is_a_dependency_that_names_the_remedy_and_is_awaited_by_members() {
    let missing = unique("missing");
    let config = config("one");
    let failed = TopicReader::new(&config).follow(&missing, &mut |_| {}).expect_err("no such topic");
    assert!(
        matches!(&failed, Failure::Dependency { message, .. } if message.contains("topics apply")),
        "{failed}"
    );
    let mut source: GroupSource = join(&config, &unique("waits"), &[&missing]);
    let quiet = Instant::now() + Duration::from_millis(500);
    while Instant::now() < quiet {
        assert!(!matches!(source.poll(Duration::from_millis(50)), PipelineEvent::Offered(_)));
    }
}
