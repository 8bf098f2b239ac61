//! Every effect happens once: whatever fails, wherever a process is killed, the committed outputs, states,
//! dead letters and books equal those of a run in which nothing failed.

use crate::common::{CHANGELOG, DLT, GROUP, INPUT, OUTPUT, Random, World, drive_until};
use std::collections::BTreeMap;
use std::time::Duration;
use throughline_runtime::Clock;
use throughline_testkit::Fault;

const PARTITIONS: i32 = 2;

/// What a run came to.
#[derive(Debug, PartialEq)]
struct Result {
    /// By partition, in order.
    outputs: Vec<Vec<String>>,
    states: Vec<BTreeMap<String, String>>,
    /// In order of their key and value; partitions race for the one partition of the topic.
    letters: Vec<(String, String)>,
    counts: [u64; 6],
}

fn workload(world: &World, seed: u64, records: u64) {
    let mut random = Random(seed);
    for number in 0..records {
        let key = format!("site/{}", random.below(7));
        let value = match random.below(10) {
            0 => "skip".to_owned(),
            1 => "old".to_owned(),
            2 => "bad".to_owned(),
            3 | 4 => format!("arm:{}", random.below(6)),
            _ => format!("add:{number}"),
        };
        world.say(&key, &value);
    }
}

fn result(world: &World) -> Result {
    let records = world.cluster.records(OUTPUT);
    let mut letters: Vec<_> = world
        .cluster
        .records(DLT)
        .iter()
        .map(|r| {
            (
                r.key_text(),
                r.header("__connect.errors.offset").map(|o| String::from_utf8_lossy(o).into_owned()).unwrap(),
            )
        })
        .collect();
    letters.sort();
    let text = |(key, value): (String, Vec<u8>)| (key, String::from_utf8(value).unwrap());
    Result {
        outputs: (0..PARTITIONS)
            .map(|p| records.iter().filter(|r| r.partition == p).map(|r| r.value_text()).collect())
            .collect(),
        states: (0..PARTITIONS)
            .map(|p| world.cluster.table(CHANGELOG, p).into_iter().map(text).collect())
            .collect(),
        letters,
        counts: world.counts(),
    }
}

/// Drives processes until everything is processed and every timer of the future has fired. `kill_one_in`
/// turns ends the process between two turns.
fn drive(world: &World, random: &mut Random, kill_one_in: Option<u64>) {
    let end = world.clock.now().plus(Duration::from_secs(60));
    let start = || {
        world.cluster.faults().revive();
        world.start("instance-0").0
    };
    let is_done = || world.is_done() && world.clock.now() > end;
    drive_until(world.start("instance-0").0, start, |p| p.turn(), is_done, random, kill_one_in);
}

fn undisturbed(seed: u64, records: u64) -> Result {
    let world = World::new(&[INPUT], PARTITIONS);
    workload(&world, seed, records);
    drive(&world, &mut Random(0), None);
    result(&world)
}

#[test]
fn a_fault_at_any_point_of_any_kind_changes_no_effect() {
    let expected = undisturbed(1, 60);
    assert!(expected.outputs.iter().flatten().any(|o| o.contains("fired")), "timers are part of it");
    for fault in [Fault::Dependency, Fault::Fenced, Fault::Kill] {
        for passes in 0.. {
            let mut world = World::new(&[INPUT], PARTITIONS);
            world.batch_max = 4;
            world.config.records_max = 12;
            workload(&world, 1, 60);
            world.cluster.faults().script_any(passes, fault);
            drive(&world, &mut Random(0), None);
            assert_eq!(result(&world), expected, "{fault:?} at pass {passes}");
            if !world.cluster.faults().has_struck() {
                assert!(passes > 40, "the run passes {passes} points only");
                break;
            }
        }
    }
}

#[test]
fn random_faults_and_kills_at_batch_borders_change_no_effect() {
    for seed in 0..60 {
        let mut random = Random(seed);
        let records = 40 + random.below(120);
        let expected = undisturbed(seed, records);
        let mut world = World::new(&[INPUT], PARTITIONS);
        world.batch_max = 1 + random.below(12) as usize;
        world.config.records_max = 1 + random.below(40) as usize;
        world.config.bytes_max = 200 + random.below(4_000) as usize;
        workload(&world, seed, records);
        for _ in 0..random.below(12) {
            let fault = [Fault::Dependency, Fault::Fenced, Fault::Kill][random.below(3) as usize];
            world.cluster.faults().script_any(random.below(120), fault);
        }
        drive(&world, &mut random, Some(25));
        assert_eq!(result(&world), expected, "seed {seed}");
    }
}

#[test]
fn results_do_not_depend_on_batch_borders() {
    let expected = undisturbed(7, 150);
    for (batch_max, records_max) in [(1, 1), (1, 1_000), (2, 3), (7, 10), (1_000, 1_000)] {
        let mut world = World::new(&[INPUT], PARTITIONS);
        world.batch_max = batch_max;
        world.config.records_max = records_max;
        workload(&world, 7, 150);
        drive(&world, &mut Random(0), None);
        assert_eq!(result(&world), expected, "batches of {batch_max}, commits of {records_max}");
    }
}

#[test]
fn members_that_come_go_and_are_expelled_change_no_effect() {
    for seed in 0..40 {
        let mut random = Random(seed);
        let expected = undisturbed(seed, 100);
        let mut world = World::new(&[INPUT], PARTITIONS);
        world.batch_max = 3;
        workload(&world, seed, 100);
        let end = world.clock.now().plus(Duration::from_secs(60));
        let mut members = vec![Some(world.start("instance-0"))];
        members.push(None);
        for _ in 0..20_000 {
            if world.is_done() && world.clock.now() > end {
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
                None if random.below(10) == 0 => {
                    members[slot] = Some(world.start(&format!("instance-{slot}")));
                }
                None => world.clock.advance(Duration::from_millis(5)),
            }
        }
        assert!(world.is_done(), "seed {seed}: lag is left");
        assert_eq!(result(&world), expected, "seed {seed}");
    }
}
