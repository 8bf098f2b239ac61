//! Faults, kills and members that come and go: nothing is lost, and nothing good is dead-lettered.

use super::world::*;
use crate::common::{Random, drive_until};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use throughline_runtime::ports::Answer;
use throughline_testkit::{Committed, Fault};

/// Says some of everything. What begins with `weak` fails every other time, `refuse` is refused.
fn workload(world: &World, seed: u64, records: u64) {
    let mut random = Random(seed);
    for number in 0..records {
        let text = match random.below(20) {
            0 => "skip".to_owned(),
            1 => format!("bad {number}"),
            2 => format!("refuse {number}"),
            3 | 4 => format!("weak {number}"),
            _ => format!("{number}"),
        };
        world.say(random.below(2) as i32, &text);
    }
    let mut tries: BTreeMap<String, u32> = BTreeMap::new();
    world.receiver.answer_with(move |delivery| {
        let tries = tries.entry(delivery.id.clone()).or_default();
        *tries += 1;
        match delivery.id.split(' ').next() {
            Some("refuse") => Answer::Refused { code: "http_400".to_owned(), message: "no".to_owned() },
            Some("weak") if !tries.is_multiple_of(4) => failed(),
            _ => Answer::Delivered,
        }
    });
}

/// What must hold whatever happened: everything is delivered or dead-lettered, the latter once, and every
/// record read has one outcome.
fn check(world: &World, what: &str) {
    let said: Vec<String> = world.cluster.records(INPUT).iter().map(Committed::value_text).collect();
    let is_poison = |text: &str| text.starts_with("bad") || text.starts_with("refuse");
    let good: BTreeSet<&str> =
        said.iter().map(String::as_str).filter(|text| *text != "skip" && !is_poison(text)).collect();
    let taken = world.receiver.taken();
    assert_eq!(taken.iter().map(String::as_str).collect::<BTreeSet<_>>(), good, "{what}");
    let mut letters: Vec<String> = world.cluster.records(DLT).iter().map(Committed::value_text).collect();
    letters.sort();
    let mut poison: Vec<&String> = said.iter().filter(|text| is_poison(text)).collect();
    poison.sort();
    assert_eq!(letters.iter().collect::<Vec<_>>(), poison, "{what}: each letter once");
    let asides = world.cluster.records(RETRY).len() as u64;
    let skipped = said.iter().filter(|text| *text == "skip").count() as u64;
    let expected = [good.len() as u64 + asides, skipped, 0, 0, 0, poison.len() as u64];
    assert_eq!(world.counts(), expected, "{what}: the books balance");
}

fn drive(world: &World, random: &mut Random, kill_one_in: Option<u64>) {
    let start = || {
        world.cluster.faults().revive();
        world.start("0").0
    };
    drive_until(world.start("0").0, start, |p| p.turn(), || world.is_done(), random, kill_one_in);
}

#[test]
fn a_fault_at_any_point_of_any_kind_loses_nothing_and_dead_letters_no_good_record() {
    for fault in [Fault::Dependency, Fault::Fenced, Fault::Kill] {
        for passes in 0.. {
            let mut world = World::new();
            world.batch_max = 5;
            workload(&world, 3, 60);
            world.cluster.faults().script_any(passes, fault);
            drive(&world, &mut Random(0), None);
            check(&world, &format!("{fault:?} at pass {passes}"));
            if !world.cluster.faults().has_struck() {
                assert!(passes > 20, "the run passes {passes} points only");
                break;
            }
        }
    }
}

#[test]
fn random_faults_and_kills_lose_nothing_and_dead_letter_no_good_record() {
    for seed in 0..60 {
        let mut random = Random(seed);
        let mut world = World::new();
        world.batch_max = 1 + random.below(12) as usize;
        world.receiver.set_latency(Duration::from_millis(random.below(300)));
        workload(&world, seed, 30 + random.below(60));
        for _ in 0..random.below(12) {
            let fault = [Fault::Dependency, Fault::Fenced, Fault::Kill][random.below(3) as usize];
            world.cluster.faults().script_any(random.below(80), fault);
        }
        drive(&world, &mut random, Some(60));
        check(&world, &format!("seed {seed}"));
    }
}

#[test]
fn members_that_come_go_and_are_expelled_lose_nothing() {
    for seed in 0..30 {
        let mut random = Random(seed);
        let mut world = World::new();
        world.batch_max = 3;
        workload(&world, seed, 60);
        let mut members: [Option<(Loop, u64)>; 2] = [Some(world.start("0")), None];
        for _ in 0..40_000 {
            if world.is_done() {
                break;
            }
            let slot = random.below(2) as usize;
            match &mut members[slot] {
                Some((process, member)) => {
                    process.turn().unwrap();
                    match random.below(150) {
                        0 => world.cluster.expel(GROUP, *member),
                        1 => members[slot] = None,
                        2 => members[slot].take().unwrap().0.drain().unwrap(),
                        _ => {}
                    }
                }
                None if random.below(10) == 0 => members[slot] = Some(world.start(&slot.to_string())),
                None => world.clock.advance(Duration::from_millis(5)),
            }
        }
        assert!(world.is_done(), "seed {seed}: records are left");
        check(&world, &format!("seed {seed}"));
    }
}
