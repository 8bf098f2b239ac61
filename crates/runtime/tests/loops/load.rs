//! What the loop of load stages does, one behaviour a test, in virtual time.

mod world;

use crate::common::{Random, drive_until, is_up, paused, retries, stops};
use std::sync::Arc;
use std::time::Duration;
use throughline_model::outcome::{Outcome, Settled};
use throughline_model::record::{Batch, TopicPartition};
use throughline_model::rows::{ReadingRow, Rows};
use throughline_model::stage::{Input, Kind, Load, StageSpec};
use throughline_model::time::Timestamp;
use throughline_runtime::{Clock, LoadLoop, LoadPorts, LoopConfig, Shutdown, codes, run_load};
use throughline_telemetry::Health;
use throughline_testkit::{
    FakeClock, Fault, MemoryCluster, MemoryOutlet, MemorySchemas, MemorySource, MemoryStore, Point,
};
use world::*;

#[test]
fn a_fault_at_any_point_of_any_kind_changes_no_row() {
    let world = World::new();
    world.workload(3, 60);
    drive(&world, &mut Random(0), None);
    let expected = result(&world);
    assert!(
        expected.2.iter().any(|l| l.contains("TASK_PUT")) && expected.2.iter().any(|l| l.contains("TRANSF"))
    );
    for fault in [Fault::Dependency, Fault::Fenced, Fault::Kill] {
        for passes in 0.. {
            let mut world = World::new();
            world.batch_max = 5;
            world.config.records_max = 15;
            world.workload(3, 60);
            world.cluster.faults().script_any(passes, fault);
            drive(&world, &mut Random(0), None);
            assert_eq!(result(&world), expected, "{fault:?} at pass {passes}");
            if !world.cluster.faults().has_struck() {
                assert!(passes > 20, "the run passes {passes} points only");
                break;
            }
        }
    }
}

#[test]
fn random_faults_and_kills_change_no_row() {
    for seed in 0..80 {
        let mut random = Random(seed);
        let records = 40 + random.below(120);
        let calm = World::new();
        calm.workload(seed, records);
        drive(&calm, &mut Random(0), None);
        let mut world = World::new();
        world.batch_max = 1 + random.below(12) as usize;
        world.config.records_max = 1 + random.below(40) as usize;
        world.workload(seed, records);
        for _ in 0..random.below(12) {
            let fault = [Fault::Dependency, Fault::Fenced, Fault::Kill][random.below(3) as usize];
            world.cluster.faults().script_any(random.below(80), fault);
        }
        drive(&world, &mut random, Some(25));
        assert_eq!(result(&world), result(&calm), "seed {seed}");
    }
}

#[test]
fn a_refused_write_is_halved_to_the_record_and_the_rest_is_written() {
    let mut world = World::new();
    world.batch_max = 1_000;
    for number in 0..1_000 {
        let poison = [17, 500, 501].contains(&number);
        world.say(number % 2, &if poison { "5000000".to_owned() } else { number.to_string() });
    }
    world.store.refuse(|row| row.number.is_some_and(|n| n > 1e6));
    let (mut running, _) = world.start();
    world.settle(&mut running);
    assert_eq!(world.names().len(), 500 + 2 * 500 - 2 - 1 - 1, "odd numbers make a row, even ones two");
    let mut letters = world.letters();
    letters.sort();
    let expected =
        ["0@250 TASK_PUT sqlstate_22003", "1@250 TASK_PUT sqlstate_22003", "1@8 TASK_PUT sqlstate_22003"];
    assert_eq!(letters, expected);
    assert_eq!(
        (world.counts()[Outcome::Emitted.index()], world.counts()[Outcome::DeadLettered.index()]),
        (997, 3)
    );
    let writes = world.cluster.faults().passed(Point::StoreBefore);
    assert!(writes < 80, "{writes} writes for three records among a thousand");
}

#[test]
fn a_database_that_is_away_pauses_and_dead_letters_nothing() {
    let world = World::named("waits_for_database");
    for number in 0..100 {
        world.say(0, &number.to_string());
    }
    world.cluster.faults().set_up(Point::StoreBefore, false);
    let (mut running, _) = world.start();
    world.pass(&mut running, Duration::from_secs(120));
    let attempts = world.cluster.faults().passed(Point::StoreBefore);
    assert!((10..40).contains(&attempts), "{attempts} attempts in two minutes, with back-off");
    assert_eq!(retries(world.stage, "database"), attempts as u64);
    // Both partitions of both topics wait, the empty ones too.
    assert_eq!((is_up(world.stage, "database"), paused(world.stage)), (false, 4.0));
    world.cluster.faults().set_up(Point::StoreBefore, true);
    world.pass(&mut running, Duration::from_secs(12));
    assert_eq!((world.names().len(), world.letters().len()), (150, 0));
    assert_eq!((is_up(world.stage, "database"), paused(world.stage)), (true, 0.0));
    world.say(1, "1");
    world.settle(&mut running);
    assert_eq!(world.names().len(), 151, "the partitions are resumed");
}

#[test]
fn gathered_rows_are_written_at_their_bound() {
    let source = TopicPartition::new(INPUT, 0);
    let mut batch = Batch::new(source);
    (0..10).for_each(|offset| batch.push(offset, Timestamp(0), Some(b"k"), Some(b"1"), []));
    // By batches of 10, each write is at the first that passes 25 rows, or 2.5 batches in bytes.
    for (records_max, bytes_max) in [(25, usize::MAX), (usize::MAX, batch.bytes_held() * 5 / 2)] {
        let mut world = World::new();
        world.config.commit_interval = Some(Duration::from_secs(3_600));
        (world.config.records_max, world.config.bytes_max) = (records_max, bytes_max);
        for _ in 0..100 {
            world.say(0, "1");
        }
        let (mut running, _) = world.start();
        let mut written = Vec::new();
        for _ in 0..40 {
            running.turn().unwrap();
            written.push(world.names().len());
        }
        written.dedup();
        assert_eq!(written, [0, 30, 60, 90], "{records_max} rows, {bytes_max} bytes");
    }
}

#[test]
fn partitions_that_come_while_the_store_takes_no_rows_are_not_read() {
    let world = World::new();
    let (ports, _) = world.ports();
    let health = Health::new();
    let mut running = LoadLoop::new(LoadThings::new(), ports, world.config.clone(), health.role(GROUP));
    let other = MemorySource::join(&world.cluster, GROUP, &[INPUT, &replay(GROUP)], world.batch_max);
    world.say(0, "1");
    world.settle(&mut running);
    // As a full disk does it: positions are told, rows are not taken.
    world.cluster.faults().set_up(Point::StoreBefore, false);
    world.say(0, "3");
    world.pass(&mut running, Duration::from_secs(1));
    for _ in 0..1_000 {
        world.say(1, "1");
    }
    drop(other);
    world.pass(&mut running, Duration::from_secs(120));
    let status = health.status();
    let partitions = status["roles"][GROUP]["notes"]["partitions"].as_array().unwrap().clone();
    let taken = partitions.iter().find(|p| p["partition"] == "device.thing.v1/1").unwrap();
    assert_eq!((&taken["active"], &taken["caught_up"]), (&true.into(), &false.into()), "{taken}");
    world.cluster.faults().set_up(Point::StoreBefore, true);
    world.settle(&mut running);
    assert_eq!((world.names().len(), world.letters().len()), (1_002, 0));
}

#[test]
fn an_unknown_commit_is_told_by_the_compare_and_swap_of_the_retry() {
    let world = World::new();
    world.say(0, "1");
    world.cluster.faults().script(Point::StoreAfter, 0, Fault::Dependency);
    let (mut running, _) = world.start();
    world.pass(&mut running, Duration::from_secs(5));
    assert_eq!(world.names(), ["device.thing.v1/0@0#0"], "written once");
    assert_eq!(world.counts()[0], 1);
}

#[test]
fn a_position_that_another_writer_moved_discards_and_reads_again() {
    let mut world = World::new();
    world.config.commit_interval = Some(Duration::from_secs(5));
    for number in [1, 3, 5, 7] {
        world.say(0, &number.to_string());
    }
    let (mut running, _) = world.start();
    for _ in 0..8 {
        running.turn().unwrap();
    }
    world.store.steal(GROUP, &TopicPartition::new(INPUT, 0), 3);
    world.settle(&mut running);
    assert_eq!(world.names(), ["device.thing.v1/0@3#0"], "only what the other writer left");
}

#[test]
fn stage_dead_letters_are_acknowledged_before_the_offset_moves() {
    let world = World::new();
    world.say(0, "bad");
    world.cluster.faults().set_up(Point::Outlet, false);
    let (mut running, _) = world.start();
    world.pass(&mut running, Duration::from_secs(60));
    assert_eq!((world.position(0), world.letters().len()), (0, 0));
    world.cluster.faults().set_up(Point::Outlet, true);
    world.pass(&mut running, Duration::from_secs(12));
    assert_eq!((world.position(0), world.letters()), (1, vec!["0@0 TRANSFORMATION not_a_number".to_owned()]));
}

#[test]
fn a_revocation_writes_what_is_gathered_and_the_next_owner_goes_on() {
    let mut world = World::new();
    world.config.commit_interval = Some(Duration::from_secs(3_600));
    for number in 0..10 {
        world.say(number % 2, "1");
    }
    let (mut first, _) = world.start();
    for _ in 0..10 {
        first.turn().unwrap();
    }
    assert!(world.names().is_empty());
    let (mut second, _) = world.start();
    first.turn().unwrap();
    assert_eq!(world.names().len(), 10);
    world.say(0, "1");
    world.say(1, "1");
    for _ in 0..10 {
        first.turn().unwrap();
        second.turn().unwrap();
    }
    first.drain().unwrap();
    second.drain().unwrap();
    assert_eq!((world.names().len(), world.counts()[0]), (12, 12));
}

#[test]
fn members_that_come_go_and_are_expelled_change_no_row() {
    for seed in 0..40 {
        let mut random = Random(seed);
        let calm = World::new();
        calm.workload(seed, 100);
        drive(&calm, &mut Random(0), None);
        let mut world = World::new();
        world.batch_max = 3;
        world.workload(seed, 100);
        let mut members: [Option<(Loop, u64)>; 2] = [Some(world.start()), None];
        for _ in 0..20_000 {
            if world.is_done() {
                break;
            }
            let slot = random.below(2) as usize;
            match &mut members[slot] {
                Some((process, member)) => {
                    process.turn().unwrap();
                    match random.below(60) {
                        0 => world.cluster.expel(GROUP, *member),
                        1 => members[slot] = None,
                        2 => members[slot].take().unwrap().0.drain().unwrap(),
                        _ => {}
                    }
                }
                None if random.below(10) == 0 => members[slot] = Some(world.start()),
                None => world.clock.advance(Duration::from_millis(5)),
            }
        }
        assert!(world.is_done(), "seed {seed}: records are left");
        assert_eq!(result(&world), result(&calm), "seed {seed}");
    }
}

#[test]
fn kafka_gets_a_mirror_of_the_positions() {
    let world = World::new();
    world.say(0, "1");
    let (mut running, _) = world.start();
    world.settle(&mut running);
    running.turn().unwrap();
    let (next, metadata) = world.cluster.committed(GROUP, &TopicPartition::new(INPUT, 0)).unwrap();
    let books = throughline_model::books::Books::from_metadata(&metadata).unwrap();
    assert_eq!((next, books.of(Outcome::Emitted)), (1, 1));
}

#[test]
fn a_loop_runs_on_its_own_thread_and_drains_when_it_is_asked_to_end() {
    let world = World::new();
    world.say(0, "1");
    let shutdown = Shutdown::new();
    let asked = shutdown.clone();
    let (ports, _) = world.ports();
    let config = world.config.clone();
    let thread = std::thread::spawn(move || {
        run_load(LoadThings::new(), ports, config, &asked, Health::new().role(GROUP))
    });
    while !world.is_done() {
        std::thread::yield_now();
    }
    shutdown.request();
    thread.join().unwrap().unwrap();
    assert_eq!(world.names().len(), 1);
}

#[test]
fn a_topic_that_is_replaced_under_a_running_loader_stops_it() {
    let world = World::new();
    world.say(0, "1");
    let (mut running, _) = world.start();
    world.settle(&mut running);
    world.cluster.recreate_topic(INPUT);
    let stopped = stops(|| running.turn());
    assert_eq!(stopped.code, codes::REPLACED);
    assert!(
        stopped.message.contains("throughline groups adopt load_things --topic device.thing.v1"),
        "{stopped}"
    );
}

#[test]
fn a_database_that_fell_back_stops_the_loader_until_kafkas_copy_was_put_back() {
    let mut world = World::new();
    for number in [1, 3, 5] {
        world.say(0, &number.to_string());
        world.say(1, &number.to_string());
    }
    let empty = world.store.clone().backup();
    let (mut running, _) = world.start();
    world.settle(&mut running);
    running.drain().unwrap();
    let (backup, expected) = (world.store.backup(), 8);
    world.say(0, "7");
    world.say(1, "9");
    let (mut running, _) = world.start();
    world.settle(&mut running);
    running.drain().unwrap();
    for (what, store, stands) in [("restored", backup, "stands at 3"), ("new", empty, "has no position")] {
        world.store = store;
        let before = world.names();
        let (mut running, _) = world.start();
        let stopped = (0..50).find_map(|_| running.turn().err()).expect("it stops");
        assert_eq!(stopped.code, codes::STORE_FELL_BACK, "{what}");
        assert!(stopped.message.contains(stands) && stopped.message.contains("up to 4"), "{stopped}");
        assert!(stopped.message.contains("throughline groups adopt load_things"), "{stopped}");
        assert_eq!(world.names(), before, "{what}: nothing was written");
        drop(running);
        // What `groups adopt` does, for a database without a position too.
        for number in 0..PARTITIONS {
            let partition = TopicPartition::new(INPUT, number);
            let next = world.store.position(GROUP, &partition).map_or(0, |(next, _)| next);
            let books = throughline_model::books::Books::open("volume-1").to_metadata();
            world.cluster.commit_foreign(GROUP, &partition, next, &books);
            if next == 0 {
                world.store.steal(GROUP, &partition, 0);
            }
        }
        let (mut running, _) = world.start();
        world.settle(&mut running);
        running.drain().unwrap();
        let names = world.names();
        let once: std::collections::BTreeSet<_> = names.iter().collect();
        assert_eq!((names.len(), once.len()), (expected, expected), "{what}: every row once");
    }
}

#[test]
fn a_copy_that_a_foreign_tool_moved_says_nothing_about_the_database() {
    let world = World::new();
    world.say(0, "1");
    world.cluster.commit_foreign(GROUP, &TopicPartition::new(INPUT, 0), 99, "");
    let (mut running, _) = world.start();
    world.settle(&mut running);
    assert_eq!(world.names().len(), 1);
}
