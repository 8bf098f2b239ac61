//! What operators see.

use crate::common::*;
use std::ops::ControlFlow;
use std::time::Duration;
use throughline_kafka::TransactionalProducer;
use throughline_kafka::admin::Admin;
use throughline_kafka::browse::{Begin, Stop, browse};
use throughline_kafka::lag::LagProbe;
use throughline_model::books::Books;
use throughline_model::record::{Outbox, TopicPartition};
use throughline_model::time::Timestamp;
use throughline_runtime::ports::{Advance, Failure, Source, Transactions};

#[test]
fn lag_is_counted_in_positions_and_in_the_age_of_the_first_unprocessed_record() {
    let name = topic("lag", 2, &[]);
    let group = unique("lag");
    fill(&name, 0, 0, 10);
    let config = config("one");
    let mut source = join(&config, &group, &[&name]);
    let partitions = offered(&mut source, 2);
    let mut producer = TransactionalProducer::new(&config, &group, source.membership());
    let at = |to| Advance { partition: partitions[0].clone(), from: 0, to, books: Books::open("v") };
    producer.commit(&[at(4)]).expect("commits");
    let mut time = None;
    browse(&config, &name, &[0], Begin::At(4), Stop::AtEnd { within: DEADLINE }, &mut |batch| {
        time = Some(batch.get(0).time);
        ControlFlow::Break(())
    })
    .expect("reads");
    let mut probe = LagProbe::new(&config).expect("a client");
    let row = |probe: &mut LagProbe| {
        let snapshot = probe.snapshot().expect("a snapshot");
        snapshot.groups.into_iter().find(|g| g.group == group)
    };
    let behind =
        wait_for("the time of the record", || row(&mut probe).filter(|r| r.first_unprocessed.is_some()));
    assert_eq!((behind.next, behind.lag, behind.state.as_str()), (4, 6, "Stable"));
    assert_eq!(behind.first_unprocessed, time);
    let now = Timestamp(time.unwrap().0 + 2_500_000);
    assert_eq!(behind.seconds(now), Some(2.5));
    producer.commit(&[at(10)]).expect("commits");
    // The marker that makes a transaction's offsets visible to others follows its commit.
    let done = wait_for("the new offset", || row(&mut probe).filter(|r| r.next == 10));
    assert_eq!((done.lag, done.seconds(now)), (0, Some(0.0)));
    // A control record at the end is a position, as Kafka's own tools count it, but nothing to wait for.
    let mut outbox = Outbox::default();
    outbox.push(&name, Some(0), None, Some(b"transactional"), []);
    producer.send(&outbox).expect("sends");
    producer.commit(&[at(11)]).expect("commits");
    let marker =
        wait_for("the marker to be recognised", || row(&mut probe).filter(|r| r.next == 11 && r.caught_up));
    assert_eq!((marker.lag, marker.seconds(now)), (1, Some(0.0)));
}

#[test]
fn admin_makes_topics_describes_them_and_changes_only_the_keys_it_is_given() {
    let name = topic("admin", 3, &[("retention.ms", "60000"), ("max.message.bytes", "5000")]);
    let admin = Admin::new(&config("admin")).expect("a client");
    admin.set_configs(&name, &[("retention.ms", "90000")]).expect("sets");
    let missing = unique("missing");
    let state = wait_for("the new value", || {
        let mut states = admin.describe(&[&name, &missing]).expect("describes");
        assert_eq!(states.len(), 1, "a missing topic is absent");
        states.pop().filter(|s| s.configs["retention.ms"].value == "90000")
    });
    assert_eq!((state.partitions, state.replication, state.degraded_partitions), (3, 1, 0));
    assert_eq!(state.configs["max.message.bytes"].value, "5000", "the other keys keep their values");
    assert!(state.configs["max.message.bytes"].set_on_topic);
    assert!(!state.configs["segment.bytes"].set_on_topic);
    let refused = admin.set_configs(&name, &[("retention.ms", "soon")]).expect_err("not a number");
    assert!(matches!(refused, Failure::Stop { .. }), "{refused:?}");
    let ids = admin.topic_ids(&[&name, &missing]).expect("ids");
    assert_eq!(ids.len(), 1);
    assert!(ids[&*name].len() >= 22, "{ids:?}");
    assert!(!admin.cluster_id().expect("an id").is_empty());
    fill(&name, 1, 0, 5);
    let partitions: Vec<_> = (0..3).map(|p| TopicPartition::new(&*name, p)).collect();
    let latest = admin.latest(&partitions).expect("ends");
    assert_eq!(partitions.iter().map(|p| latest[p]).collect::<Vec<_>>(), [0, 5, 0]);
    assert_eq!(admin.earliest(&partitions).expect("begins")[&partitions[1]], 0);
    let later = Timestamp(i64::MAX / 2);
    assert_eq!(admin.offsets_at(&partitions, later).expect("positions")[&partitions[1]], -1);
    assert_eq!(admin.offsets_at(&partitions, Timestamp(0)).expect("positions")[&partitions[1]], 0);
    let group = unique("members");
    let mut source = join(&config("one"), &group, &[&name]);
    offered(&mut source, 3);
    let described = wait_for("the member", || {
        source.poll(Duration::from_millis(10));
        let found = admin.describe_groups(&[&group]).expect("describes").pop()?;
        (found.members.first()?.partitions.len() == 3).then_some(found)
    });
    assert_eq!((described.state.as_str(), described.members.len()), ("Stable", 1));
    assert_eq!(described.members[0].client_id, "throughline");
    assert!(admin.groups().expect("lists").iter().any(|g| g.group == group));
}
