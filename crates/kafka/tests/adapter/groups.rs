//! How partitions change hands and how they are read.

use crate::common::*;
use std::time::{Duration, Instant};
use throughline_kafka::{GroupProtocol, KafkaConfig};
use throughline_model::record::TopicPartition;
use throughline_runtime::ports::{PipelineEvent, Source};

/// Group protocol, number of topics, and whether a rebalance takes everything away from everybody.
const PROTOCOLS: [(GroupProtocol, usize, bool); 4] = [
    (GroupProtocol::Consumer, 1, false),
    (GroupProtocol::Consumer, 2, false),
    (GroupProtocol::Classic, 1, false),
    (GroupProtocol::Classic, 2, true),
];

#[test]
fn a_partition_changes_hands_only_after_it_was_released() {
    for (protocol, topics, eager) in PROTOCOLS {
        let names: Vec<_> = (0..topics).map(|_| topic("hands", 4, &[])).collect();
        let names: Vec<&str> = names.iter().map(|n| &**n).collect();
        let group = unique("hands");
        let with = |instance: &str| KafkaConfig { group_protocol: protocol, ..config(instance) };
        let mut first = join(&with("a"), &group, &names);
        let all = offered(&mut first, 4 * topics);
        start_committed(&mut first, &all);
        let mut second = join(&with("b"), &group, &names);
        // Both poll; the first keeps what it was asked for long enough for the second to take it too early.
        let mut asked: Vec<TopicPartition> = Vec::new();
        let (mut got, mut kept_since) = (Vec::new(), None);
        let deadline = Instant::now() + DEADLINE;
        while kept_since.is_some() || got.len() < 2 * topics {
            assert!(
                Instant::now() < deadline,
                "{protocol:?}/{topics}: no swap, asked {asked:?}, got {got:?}"
            );
            match first.poll(Duration::from_millis(20)) {
                PipelineEvent::Revoking(list) => {
                    asked.extend(list);
                    kept_since.get_or_insert_with(Instant::now);
                }
                PipelineEvent::Lost(lost) => panic!("{protocol:?}: lost {lost:?}"),
                _ => {}
            }
            if let PipelineEvent::Offered(list) = second.poll(Duration::from_millis(20)) {
                assert!(kept_since.is_none(), "{protocol:?}: offered {list:?} before the release");
                got.extend(list);
            }
            if kept_since.is_some_and(|since: Instant| since.elapsed() > Duration::from_millis(1_500)) {
                // In two parts: the first alone must not end the round.
                first.release(&asked[..1]);
                first.release(&asked[1..]);
                kept_since = None;
            }
        }
        let expected = if eager { 4 * topics } else { 2 * topics };
        assert_eq!(asked.len(), expected, "{protocol:?}/{topics}: {asked:?}");
        // Partition p of every topic has one owner.
        for p in &got {
            assert_eq!(got.iter().filter(|q| q.partition == p.partition).count(), topics, "{got:?}");
        }
        // What the second leaves, the first is offered again.
        drop(second);
        let back = offered(&mut first, if eager { 4 * topics } else { 2 * topics });
        assert!(got.iter().all(|p| back.contains(p)), "{back:?}");
        assert!(first.leave(DEADLINE), "leaves in order");
    }
}

#[test]
fn a_static_member_that_comes_back_within_its_session_disturbs_no_other() {
    let name = topic("static", 4, &[]);
    let group = unique("static");
    let with = |instance: &str| KafkaConfig { group_protocol: GroupProtocol::Classic, ..config(instance) };
    let mut stays = join(&with("stays"), &group, &[&*name]);
    let mut goes = join(&with("goes"), &group, &[&*name]);
    let mut has: Vec<TopicPartition> = Vec::new();
    wait_for("two partitions each", || {
        if let PipelineEvent::Revoking(list) = stays.poll(Duration::from_millis(20)) {
            stays.release(&list);
        }
        if let PipelineEvent::Offered(list) = goes.poll(Duration::from_millis(20)) {
            has.extend(list);
        }
        (has.len() == 2).then_some(())
    });
    // A static member says no good-bye, so this is what the group sees of a kill as well.
    drop(goes);
    let mut back = join(&with("goes"), &group, &[&*name]);
    let mut again: Vec<TopicPartition> = Vec::new();
    wait_for("its partitions again", || {
        let event = stays.poll(Duration::from_millis(20));
        let is_asked =
            matches!(event, PipelineEvent::Revoking(_) | PipelineEvent::Offered(_) | PipelineEvent::Lost(_));
        assert!(!is_asked, "the other member is told of it: {event:?}");
        if let PipelineEvent::Offered(list) = back.poll(Duration::from_millis(20)) {
            again.extend(list);
        }
        (again.len() == 2).then_some(())
    });
    has.sort();
    again.sort();
    assert_eq!(again, has);
}

#[test]
fn an_offered_partition_delivers_nothing_until_it_is_started_where_it_is_told() {
    for (protocol, topics, _) in PROTOCOLS {
        let name = topic("start", 1, &[]);
        let other = topic("start_other", 1, &[]);
        fill(&name, 0, 0, 250);
        let config = KafkaConfig { group_protocol: protocol, ..config("a") };
        let names: Vec<&str> = [&*name, &*other].into_iter().take(topics).collect();
        let mut source = join(&config, &unique("start"), &names);
        offered(&mut source, topics);
        let quiet = Instant::now() + Duration::from_millis(700);
        while Instant::now() < quiet {
            let event = source.poll(Duration::from_millis(50));
            assert!(matches!(event, PipelineEvent::Idle), "{event:?}");
        }
        let partition = TopicPartition::new(&*name, 0);
        for (from, first) in [(120, 120), (10, 10), (-1, 0), (249, 249)] {
            source.start(&[(partition.clone(), from)]).expect("starts");
            let batch = records(&mut source);
            assert_eq!(batch.get(0).offset, first, "{protocol:?}/{topics}: started at {from}");
            assert!(batch.len() <= 100, "a batch is bounded");
        }
        event(&mut source, "the end", |e| {
            matches!(e, PipelineEvent::CaughtUp(p) if p == partition).then_some(())
        });
        // Paused it is silent, resumed it goes on where it was.
        source.pause(std::slice::from_ref(&partition), true);
        fill(&name, 0, 250, 5);
        let quiet = Instant::now() + Duration::from_millis(500);
        while Instant::now() < quiet {
            let event = source.poll(Duration::from_millis(50));
            assert!(!matches!(event, PipelineEvent::Records(_)), "{event:?}");
        }
        source.pause(std::slice::from_ref(&partition), false);
        assert_eq!(records(&mut source).get(0).offset, 250);
    }
}

/// Deletes the records of partitions before an offset, as retention does.
fn delete_before(topic: &str, offsets: &[(i32, i64)]) {
    use rdkafka::admin::{AdminClient, AdminOptions};
    use rdkafka::client::DefaultClientContext;
    let mut client = rdkafka::ClientConfig::new();
    client.set("bootstrap.servers", broker().bootstrap());
    let admin: AdminClient<DefaultClientContext> = client.create().expect("a client");
    let mut upto = rdkafka::TopicPartitionList::new();
    for (partition, offset) in offsets {
        upto.add_partition_offset(topic, *partition, rdkafka::Offset::Offset(*offset)).expect("an offset");
    }
    futures::executor::block_on(admin.delete_records(&upto, &AdminOptions::new())).expect("deleted");
}

#[test]
fn what_retention_deleted_before_it_was_read_is_overtaken_and_reading_goes_on() {
    for (protocol, topics, _) in PROTOCOLS {
        let name = topic("overtaken", 1, &[]);
        let other = topic("overtaken_other", 1, &[]);
        fill(&name, 0, 0, 20);
        delete_before(&name, &[(0, 12)]);
        let config = KafkaConfig { group_protocol: protocol, ..config("a") };
        let names: Vec<&str> = [&*name, &*other].into_iter().take(topics).collect();
        let mut source = join(&config, &unique("overtaken"), &names);
        let partitions = offered(&mut source, topics);
        let starts: Vec<_> = partitions.iter().map(|p| (p.clone(), 0)).collect();
        source.start(&starts).expect("starts");
        let (from, to) = event(&mut source, "the news", |e| match e {
            PipelineEvent::Overtaken { partition, from, to } if *partition.topic == *name => Some((from, to)),
            PipelineEvent::Records(batch) => panic!("records before the news: {batch:?}"),
            _ => None,
        });
        assert_eq!((from, to), (0, 12), "{protocol:?}/{topics}");
        let batch = records(&mut source);
        assert_eq!((batch.get(0).offset, batch.len()), (12, 8), "{protocol:?}/{topics}");
        // It still hears of what comes, and can be sought again.
        fill(&name, 0, 20, 1);
        assert_eq!(records(&mut source).get(0).offset, 20);
        source.start(&[(TopicPartition::new(&*name, 0), 15)]).expect("starts again");
        assert_eq!(records(&mut source).get(0).offset, 15);
    }
}

#[test]
fn a_partition_that_retention_emptied_goes_on_at_its_end() {
    const PARTITIONS: i32 = 64;
    let name = topic("emptied", PARTITIONS, &[]);
    (0..PARTITIONS).for_each(|partition| fill(&name, partition, 0, 3));
    let ends: Vec<_> = (0..PARTITIONS).map(|partition| (partition, 3)).collect();
    delete_before(&name, &ends);
    for protocol in [GroupProtocol::Consumer, GroupProtocol::Classic] {
        // What would be fetched before `start` is a matter of moments: many partitions, several members.
        for _ in 0..2 {
            let config = KafkaConfig { group_protocol: protocol, ..config("a") };
            let mut source = join(&config, &unique("emptied"), &[&*name]);
            let partitions = offered(&mut source, PARTITIONS as usize);
            let starts: Vec<_> = partitions.iter().map(|p| (p.clone(), 3)).collect();
            source.start(&starts).expect("starts");
            let mut at_end = 0;
            event(&mut source, "the end of every partition", |e| match e {
                PipelineEvent::CaughtUp(_) => {
                    at_end += 1;
                    (at_end == PARTITIONS).then_some(())
                }
                PipelineEvent::Idle | PipelineEvent::Available => None,
                other => panic!("{protocol:?}: {other:?}"),
            });
        }
    }
}

#[test]
fn a_partition_that_lost_what_was_read_of_it_stops_the_stage_and_no_other_partition() {
    for protocol in [GroupProtocol::Consumer, GroupProtocol::Classic] {
        let name = topic("past_end", 2, &[]);
        fill(&name, 0, 0, 20);
        fill(&name, 1, 0, 3);
        let config = KafkaConfig { group_protocol: protocol, ..config("a") };
        let mut source = join(&config, &unique("past_end"), &[&*name]);
        offered(&mut source, 2);
        let at = |partition, next| (TopicPartition::new(&*name, partition), next);
        source.start(&[at(0, 100), at(1, 0)]).expect("starts");
        let (mut told, mut read) = (None, 0);
        while told.is_none() || read == 0 {
            event(&mut source, "the news and the other partition", |e| match e {
                PipelineEvent::Stop { code, message } => {
                    told = Some((code, message));
                    Some(())
                }
                PipelineEvent::Records(batch) => {
                    assert_eq!(batch.source.partition, 1, "{protocol:?}");
                    read += batch.len();
                    Some(())
                }
                PipelineEvent::Lost(lost) => panic!("{protocol:?}: {lost:?} was given up"),
                _ => None,
            });
        }
        let (code, message) = told.expect("the loop ends with it");
        assert_eq!((code, read), ("TL-KAFKA-010", 3), "{protocol:?}");
        assert!(message.contains(&format!("{name}/0")) && message.contains("100"), "{message}");
        // What is appended up to the position must not be skipped unseen.
        fill(&name, 0, 20, 90);
        for _ in 0..20 {
            let event = source.poll(Duration::from_millis(50));
            assert!(!matches!(event, PipelineEvent::Records(_)), "{protocol:?}: {event:?}");
        }
    }
}
