//! What the loop of decide stages does, one behaviour a test, in virtual time.

mod letters;
mod timers;

use crate::common::{
    CHANGELOG, DLT, GROUP, INPUT, Loop, OUTPUT, REPLAY, SECOND, TABLE, World, is_up, paused, recoveries,
    retries,
};
use std::time::Duration;
use throughline_model::books::Books;
use throughline_model::outcome::Outcome;
use throughline_model::record::{Outbox, TopicPartition};
use throughline_model::topics::DEVICE_TELEMETRY_V1;
use throughline_runtime::ports::{PipelineEvent, Transactions};
use throughline_runtime::{Clock, codes};
use throughline_telemetry::{Metric, counter, gauge};
use throughline_testkit::{
    Fault, MemorySource, MemoryTransactions, Point, device_message, measurement, schema_of,
};

fn first() -> TopicPartition {
    TopicPartition::new(INPUT, 0)
}

fn books(world: &World) -> Books {
    Books::from_metadata(&world.cluster.committed(GROUP, &first()).unwrap().1).unwrap()
}

fn turns(running: &mut Loop, count: usize) {
    for _ in 0..count {
        running.turn().unwrap();
    }
}

fn framed(world: &World, id: u32, seq: i64) -> Vec<u8> {
    let message = device_message("site", "a", seq, world.clock.now(), vec![measurement("t", 1.0)]);
    let mut value = Vec::new();
    world.codec.encode(DEVICE_TELEMETRY_V1, &message, &mut value).unwrap();
    value[1..5].copy_from_slice(&id.to_be_bytes());
    value
}

#[test]
fn state_is_restored_before_any_input() {
    let world = World::named("restores", &[INPUT], 1);
    world.say("b", "arm:3600");
    world.say("a", "add:1");
    world.say("a", "add:2");
    let (mut running, _) = world.start("i");
    world.settle(&mut running);
    drop(running);
    world.say("a", "add:3");
    // Kafka does not let the changelog be read at first.
    world.cluster.faults().script(Point::Restore, 0, Fault::Dependency);
    world.cluster.faults().script(Point::Restore, 1, Fault::Dependency);
    let (mut successor, _) = world.start("i");
    world.settle(&mut successor);
    assert_eq!(world.output(), ["a 1 1 @1", "a 2 3 @2", "a 3 6 @3"]);
    assert_eq!(world.cluster.faults().passed(Point::Restore), 4);
    // The gauge is renewed once a second.
    world.pass(&mut successor, Duration::from_secs(2));
    assert_eq!(gauge(Metric::StateKeys, &[("stage", world.stage)]).value(), 2.0);
}

#[test]
fn a_task_begins_when_its_partition_of_every_input_is_owned() {
    let world = World::new(&[INPUT, SECOND], 1);
    world.say("a", "add:1");
    let (mut partial, _) = world.start_with("i", &[INPUT, REPLAY]);
    turns(&mut partial, 50);
    assert_eq!((world.cluster.faults().passed(Point::Start), world.output().len()), (0, 0));
    drop(partial);
    let (mut complete, _) = world.start("i");
    world.settle(&mut complete);
    assert_eq!(world.output(), ["a 1 1 @0"]);
}

#[test]
fn a_revocation_commits_what_is_in_flight() {
    let mut world = World::new(&[INPUT], 2);
    world.config.commit_interval = Some(Duration::from_secs(3_600));
    for number in 0..20 {
        world.say(&format!("k{number}"), "add:1");
    }
    let (mut first_member, _) = world.start("i-0");
    turns(&mut first_member, 10);
    assert_eq!(world.output().len(), 0, "nothing is committed yet");
    let (mut second_member, _) = world.start("i-1");
    turns(&mut first_member, 1);
    assert_eq!(world.output().len(), 20, "giving partitions back commits");
    turns(&mut second_member, 5);
    world.say("k1", "add:1");
    world.say("k2", "add:1");
    world.say("k3", "add:1");
    turns(&mut first_member, 5);
    turns(&mut second_member, 5);
    first_member.drain().unwrap();
    second_member.drain().unwrap();
    assert!(world.is_done());
    let again = world.output().iter().filter(|o| o.contains(" 2 2 ")).count();
    assert_eq!((world.output().len(), again), (23, 3), "the new owner has the state");
}

#[test]
fn what_is_in_flight_when_partitions_are_lost_is_discarded() {
    let mut world = World::new(&[INPUT], 1);
    world.config.commit_interval = Some(Duration::from_secs(3_600));
    world.say("a", "add:1");
    let (mut zombie, member) = world.start("i-0");
    turns(&mut zombie, 10);
    world.cluster.expel(GROUP, member);
    turns(&mut zombie, 1);
    assert_eq!(zombie.drain(), Ok(()));
    assert_eq!((world.output().len(), world.cluster.committed(GROUP, &first())), (0, None));
    let (mut successor, _) = world.start("i-1");
    turns(&mut successor, 10);
    successor.drain().unwrap();
    assert_eq!(world.output(), ["a 1 1 @0"]);
}

#[test]
fn a_member_that_does_not_know_of_its_loss_is_fenced_at_its_commit() {
    let mut world = World::new(&[INPUT], 1);
    world.config.commit_interval = Some(Duration::from_secs(3_600));
    world.say("a", "add:1");
    let (mut zombie, member) = world.start("i-0");
    turns(&mut zombie, 10);
    world.cluster.expel(GROUP, member);
    assert_eq!(zombie.drain(), Ok(()), "a fenced commit is left to the next owner");
    let (mut successor, _) = world.start("i-1");
    // The zombie's open transaction holds the changelog until the broker ends it.
    world.pass(&mut successor, Duration::from_secs(20));
    successor.drain().unwrap();
    assert_eq!((world.output(), world.counts()[0]), (vec!["a 1 1 @0".to_owned()], 1));
}

#[test]
fn an_offset_that_a_foreign_tool_moved_stops_the_stage() {
    for metadata in ["", "moved by hand"] {
        let world = World::new(&[INPUT], 1);
        world.say("a", "add:1");
        world.cluster.commit_foreign(GROUP, &first(), 0, metadata);
        let (mut running, _) = world.start("i");
        let stopped = (0..20).find_map(|_| running.turn().err()).expect("it stops");
        assert_eq!(stopped.code, codes::FOREIGN_OFFSET);
        assert!(stopped.message.contains("throughline groups adopt count_things"), "{stopped}");
        assert!(stopped.message.contains("device.thing.v1/0"), "{stopped}");
        assert!(codes::explain(stopped.code).is_some());
        assert!(world.output().is_empty());
    }
}

#[test]
fn a_registry_that_is_away_holds_back_its_partition_only_and_dead_letters_nothing() {
    let world = World::named("waits_for_registry", &[INPUT, SECOND], 1);
    world.schemas.register(9_001, schema_of(DEVICE_TELEMETRY_V1));
    world.cluster.faults().set_up(Point::Schema, false);
    world.cluster.append(INPUT, 0, Some(b"a"), Some(&framed(&world, 9_001, 1)), []);
    world.cluster.append(INPUT, 0, Some(b"a"), Some(b"add:1"), []);
    world.cluster.append(SECOND, 0, Some(b"b"), Some(b"add:1"), []);
    let (mut running, _) = world.start("i");
    world.pass(&mut running, Duration::from_secs(120));
    assert_eq!(world.output(), ["b 1 1 @0"], "the other input goes on");
    assert_eq!(world.counts()[Outcome::DeadLettered.index()], 0);
    let asked = world.cluster.faults().passed(Point::Schema);
    assert!((10..40).contains(&asked), "asked {asked} times in two minutes, with back-off");
    assert_eq!(retries(world.stage, "registry"), asked as u64);
    assert_eq!((is_up(world.stage, "registry"), paused(world.stage)), (false, 1.0));
    world.cluster.faults().set_up(Point::Schema, true);
    world.pass(&mut running, Duration::from_secs(12));
    assert_eq!((is_up(world.stage, "registry"), paused(world.stage)), (true, 0.0));
    assert_eq!(world.output(), ["b 1 1 @0", "message 1", "a 1 1 @1"], "in order");
    world.cluster.append(INPUT, 0, Some(b"a"), Some(b"add:2"), []);
    world.settle(&mut running);
    assert_eq!(world.output().len(), 4, "the partition is resumed");
}

#[test]
fn a_schema_that_does_not_exist_is_the_datas_fault() {
    let world = World::new(&[INPUT], 1);
    world.cluster.append(INPUT, 0, Some(b"a"), Some(&framed(&world, 4_242, 1)), []);
    world.cluster.append(INPUT, 0, Some(b"a"), Some(&framed(&world, 4_242, 2)), []);
    world.say("a", "add:1");
    let (mut running, _) = world.start("i");
    world.settle(&mut running);
    let letters = world.cluster.records(DLT);
    assert_eq!(letters.len(), 2);
    let code = letters[0].header("__connect.errors.exception.class.name");
    assert_eq!(code, Some(b"unknown_schema".as_slice()));
    assert_eq!(letters[0].header("__connect.errors.stage"), Some(b"VALUE_CONVERTER".as_slice()));
    let asked = world.cluster.faults().passed(Point::Schema);
    assert!((2..=10).contains(&asked), "asked {asked} times over 5 s, with back-off, then remembered");
}

#[test]
fn positions_without_a_record_and_overtaken_ones_are_in_the_books() {
    let world = World::new(&[INPUT], 1);
    world.say("a", "add:1");
    world.cluster.append_gap(INPUT, 0, 3);
    world.say("a", "add:2");
    let (mut running, _) = world.start("i");
    world.settle(&mut running);
    let counted = books(&world);
    assert_eq!((counted.records_read(), counted.positions_without_record), (2, 3));
    drop(running);
    for _ in 0..4 {
        world.say("a", "add:3");
    }
    world.cluster.delete_before(INPUT, 0, 8);
    let labels = [("group", GROUP), ("topic", INPUT), ("partition", "0")];
    let overtaken = counter(Metric::OvertakenTotal, &labels);
    let before = overtaken.value();
    let (mut running, _) = world.start("i");
    world.settle(&mut running);
    let counted = books(&world);
    assert_eq!((counted.records_read(), counted.overtaken), (3, 3));
    // Other tests of this process count there too.
    assert!(overtaken.value() >= before + 3, "the metric counts them");
    // A marker at the end is read over before retention takes what follows it.
    world.cluster.append_gap(INPUT, 0, 1);
    world.pass(&mut running, Duration::from_secs(1));
    drop(running);
    world.say("a", "add:3");
    world.say("a", "add:3");
    world.cluster.delete_before(INPUT, 0, 11);
    let (mut running, _) = world.start("i");
    world.settle(&mut running);
    let counted = books(&world);
    let (next, _) = world.cluster.committed(GROUP, &first()).unwrap();
    let sum = counted.records_read() + counted.positions_without_record + counted.overtaken;
    assert_eq!(next as u64, sum, "positions advanced = records + positions without one + overtaken");
}

#[test]
fn what_waits_for_a_schema_is_not_lost_when_retention_overtakes_what_follows() {
    let world = World::new(&[INPUT], 1);
    world.schemas.register(9_001, schema_of(DEVICE_TELEMETRY_V1));
    world.cluster.faults().set_up(Point::Schema, false);
    world.say("a", "add:1");
    world.cluster.append(INPUT, 0, Some(b"a"), Some(&framed(&world, 9_001, 7)), []);
    let overtaken = PipelineEvent::Overtaken { partition: first(), from: 2, to: 5 };
    let (mut running, _) = world.start("i");
    world.pass(&mut running, Duration::from_secs(1));
    world.cluster.tell(GROUP, overtaken);
    running.turn().unwrap();
    world.cluster.faults().set_up(Point::Schema, true);
    world.pass(&mut running, Duration::from_secs(12));
    assert_eq!(world.output(), ["a 1 1 @0", "message 7"]);
    assert_eq!((books(&world).records_read(), books(&world).overtaken), (2, 0));
}

#[test]
fn tables_are_read_before_any_input_and_followed() {
    let mut world = World::new(&[INPUT], 1);
    world.tables = vec![TABLE];
    for factor in ["2", "nonsense", "10"] {
        world.cluster.append_keyed(TABLE, "factor", factor.as_bytes());
    }
    world.cluster.faults().script(Point::Follow, 0, Fault::Dependency);
    world.say("a", "add:1");
    let (mut running, _) = world.start("i");
    world.settle(&mut running);
    assert_eq!(world.output(), ["a 1 10 @0"]);
    world.cluster.append_keyed(TABLE, "factor", b"100");
    world.pass(&mut running, Duration::from_millis(250));
    world.say("a", "add:1");
    world.settle(&mut running);
    assert_eq!(world.output(), ["a 1 10 @0", "a 2 110 @1"]);
}

#[test]
fn defects_of_a_stage_stop_it_before_anything_is_committed() {
    for (value, code) in [("misfit", codes::OUTPUT_INVALID), ("stuck", codes::TIMER_STUCK)] {
        let world = World::new(&[INPUT], 1);
        world.say("a", value);
        world.say("b", "add:1");
        let (mut running, _) = world.start("i");
        let stopped = (0..50).find_map(|_| running.turn().err()).expect("it stops");
        assert_eq!(stopped.code, code);
        assert_eq!((world.output().len(), world.cluster.committed(GROUP, &first())), (0, None));
    }
}

#[test]
fn a_changelog_that_is_not_ours_stops_the_stage() {
    let world = World::new(&[INPUT], 1);
    world.cluster.append(CHANGELOG, 0, Some(b"a"), Some(b"not a state"), []);
    world.say("a", "add:1");
    let (mut running, _) = world.start("i");
    let stopped = (0..50).find_map(|_| running.turn().err()).expect("it stops");
    assert_eq!(stopped.code, codes::STATE_UNREADABLE);
    assert!(stopped.message.contains("at offset 0"), "{stopped}");
}

#[test]
fn commits_that_keep_failing_are_retried_with_bounded_back_off() {
    let world = World::named("cannot_commit", &[INPUT], 1);
    world.say("a", "add:1");
    world.cluster.faults().set_up(Point::CommitBefore, false);
    let (mut running, _) = world.start("i");
    world.pass(&mut running, Duration::from_secs(300));
    let resets = world.cluster.faults().passed(Point::Reset);
    assert!((25..60).contains(&resets), "{resets} resets in five minutes");
    assert_eq!(recoveries(world.stage, "dependency"), resets as u64);
    assert!(retries(world.stage, "kafka") >= 25 && !is_up(world.stage, "kafka"));
    world.cluster.faults().set_up(Point::CommitBefore, true);
    world.pass(&mut running, Duration::from_secs(15));
    assert_eq!(world.output(), ["a 1 1 @0"]);
    assert!(is_up(world.stage, "kafka"));
}

#[test]
fn a_table_is_not_read_on_while_it_waits_for_a_schema() {
    let mut world = World::named("waits_with_its_table", &[INPUT], 1);
    world.tables = vec![TABLE];
    world.schemas.register(9_001, schema_of(DEVICE_TELEMETRY_V1));
    world.cluster.faults().set_up(Point::Schema, false);
    world.cluster.append(TABLE, 0, Some(b"a"), Some(&framed(&world, 9_001, 1)), []);
    world.cluster.append_keyed(TABLE, "factor", b"7");
    world.say("a", "add:1");
    let (mut running, _) = world.start("i");
    world.pass(&mut running, Duration::from_secs(120));
    assert_eq!(world.cluster.faults().passed(Point::Follow), 1, "nothing piles up behind what waits");
    assert!(!is_up(world.stage, "registry") && retries(world.stage, "registry") > 0);
    world.cluster.append_keyed(TABLE, "factor", b"10");
    world.cluster.faults().set_up(Point::Schema, true);
    world.settle(&mut running);
    assert_eq!(world.output(), ["a 1 10 @0"], "all of it is in force before any input");
    assert!(is_up(world.stage, "registry"));
}

#[test]
fn the_drain_commits_what_is_in_flight() {
    let mut world = World::new(&[INPUT], 1);
    world.config.commit_interval = Some(Duration::from_secs(3_600));
    world.say("a", "add:1");
    let (mut running, _) = world.start("i");
    turns(&mut running, 10);
    running.drain().unwrap();
    assert_eq!(world.output(), ["a 1 1 @0"]);
    assert!(world.is_done());
}

#[test]
fn a_transaction_takes_so_many_records_and_one_batch_beyond_at_most() {
    let mut world = World::new(&[INPUT], 1);
    world.config.commit_interval = Some(Duration::from_secs(3_600));
    world.config.records_max = 25;
    world.batch_max = 10;
    for _ in 0..100 {
        world.say("a", "add:1");
    }
    let (mut running, _) = world.start("i");
    let mut committed = Vec::new();
    for _ in 0..40 {
        running.turn().unwrap();
        committed.push(world.output().len());
    }
    committed.dedup();
    assert_eq!(committed, [0, 30, 60, 90], "each commit at the first batch that passes 25");
}

#[test]
fn large_outputs_go_to_the_open_transaction_before_the_commit() {
    let mut world = World::new(&[INPUT], 1);
    world.config.commit_interval = Some(Duration::from_secs(3_600));
    world.config.bytes_max = 100;
    world.batch_max = 1_000;
    for _ in 0..100 {
        world.say("a", "add:1");
    }
    let (mut running, _) = world.start("i");
    turns(&mut running, 10);
    assert_eq!(world.output().len(), 100, "the byte bound also brings the commit");
    assert!(world.cluster.faults().passed(Point::Produce) > 5, "several sends, one commit");
    assert_eq!(world.cluster.faults().passed(Point::CommitBefore), 1);
}

#[test]
fn a_partition_that_cannot_be_restored_does_not_hold_up_the_others() {
    let world = World::named("cannot_restore_one", &[INPUT], 4);
    for key in ["a", "b", "c", "d", "e", "f", "g", "h"] {
        world.say(key, "add:1");
    }
    // A writer that nobody ends holds the second partition's changelog.
    let source = MemorySource::join(&world.cluster, "hung", &[OUTPUT], 1);
    let mut hung = MemoryTransactions::new(&world.cluster, "hung", "hung", &source);
    let mut outbox = Outbox::default();
    outbox.push(&CHANGELOG.into(), Some(1), Some(b"x"), Some(b"{}"), []);
    hung.reset().unwrap();
    hung.send(&outbox).unwrap();

    assert!(world.cluster.records(INPUT).iter().any(|r| r.partition == 1), "the keys reach it");
    let (mut running, _) = world.start("a");
    // Less than the time-out after which the cluster itself would end the transaction.
    world.pass(&mut running, Duration::from_secs(8));
    let at = |partition| TopicPartition::new(INPUT, partition);
    let done = |partition| {
        let end = world.cluster.records(INPUT).iter().filter(|r| r.partition == partition).count() as i64;
        world.cluster.committed(world.stage, &at(partition)).map_or(0, |(next, _)| next) == end
    };
    assert_eq!([0, 1, 2, 3].map(done), [true, false, true, true]);
    assert!(!is_up(world.stage, "kafka") && retries(world.stage, "kafka") > 0);

    hung.reset().unwrap();
    world.settle(&mut running);
    assert!(is_up(world.stage, "kafka"));
}

#[test]
fn a_transaction_that_was_open_too_long_is_begun_again_and_takes_effect_once() {
    let mut world = World::named("commits_too_late", &[INPUT], 1);
    world.config.bytes_max = 500;
    for key in 0..100 {
        world.cluster.append_keyed(INPUT, &format!("k{key:02}"), b"arm:10");
    }
    let (mut running, _) = world.start("i");
    world.settle(&mut running);
    drop(running);
    // What the timers write passes the bound and goes to the transaction, which nothing commits.
    world.config.commit_interval = Some(Duration::from_secs(3_600));
    world.config.records_max = 3;
    world.clock.advance(Duration::from_secs(60));
    let (mut running, _) = world.start("i");
    world.pass(&mut running, Duration::from_secs(12));
    assert!(world.cluster.faults().passed(Point::Produce) > 5, "they have fired");
    assert_eq!((world.output().len(), recoveries(world.stage, "fenced")), (0, 0));
    // The cluster has ended it after 10 s, which shows when these bring the commit.
    for _ in 0..3 {
        world.say("a", "add:1");
    }
    world.settle(&mut running);
    let fired = world.output().iter().filter(|text| text.contains("fired")).count();
    assert_eq!((fired, world.output().len()), (100, 103), "each once");
    assert_eq!(recoveries(world.stage, "fenced"), 1);
}
