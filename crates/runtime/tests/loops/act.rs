//! What the loop of act stages does, one behaviour a test, in virtual time.

mod faults;
mod world;

use std::collections::BTreeSet;
use std::time::Duration;
use throughline_model::outcome::Outcome;
use throughline_model::record::TopicPartition;
use throughline_model::time::Timestamp;
use throughline_runtime::ports::Answer;
use throughline_runtime::{Clock, Shutdown, run_act};
use throughline_telemetry::Health;
use throughline_testkit::{Fault, Point};
use world::*;

#[test]
fn records_are_delivered_in_order_and_each_has_one_outcome() {
    let world = World::new();
    for text in ["a1", "skip", "a2", "bad", "a3"] {
        world.say(0, text);
    }
    world.say(1, "b1");
    let (mut running, _) = world.start("0");
    world.settle(&mut running);
    let taken = world.receiver.taken();
    let of = |first: char| taken.iter().filter(|id| id.starts_with(first)).cloned().collect::<Vec<_>>();
    assert_eq!((of('a'), of('b')), (vec!["a1".into(), "a2".into(), "a3".into()], vec!["b1".into()]));
    assert_eq!(world.counts(), [4, 1, 0, 0, 0, 1]);
    assert_eq!(world.letters(), ["garbage bad"]);
}

#[test]
fn a_kill_between_the_effect_and_its_commit_repeats_it_under_the_same_id() {
    for point in [Point::SendOffsets, Point::CommitBefore, Point::CommitAfter] {
        let world = World::new();
        world.say(0, "a1");
        world.cluster.faults().script(point, 0, Fault::Kill);
        let (mut running, _) = world.start("0");
        while running.turn().is_ok() {}
        assert_eq!(world.receiver.taken(), ["a1"], "{point:?}: it was delivered before the kill");
        drop(running);
        world.cluster.faults().revive();
        let (mut running, _) = world.start("0");
        world.settle(&mut running);
        let repeats = if point == Point::CommitAfter { 1 } else { 2 };
        assert_eq!(world.receiver.taken(), vec!["a1"; repeats], "{point:?}");
        assert_eq!(world.counts(), [1, 0, 0, 0, 0, 0], "{point:?}: it counts once");
    }
}

#[test]
fn a_receiver_that_is_down_for_hours_is_waited_for_and_nothing_is_dead_lettered() {
    for answer in [failed(), unavailable()] {
        let world = World::new();
        for number in 0..40 {
            world.say(number % 2, &format!("{number:02}"));
        }
        let scripted = answer.clone();
        world.receiver.answer_with(move |_| scripted.clone());
        let (mut running, _) = world.start("0");
        world.pass(&mut running, Duration::from_secs(2 * 3_600));
        let attempts = world.receiver.got().len();
        assert!((600..900).contains(&attempts), "{attempts} attempts in two hours, every 10 s at last");
        let tried: BTreeSet<String> = world.receiver.got().into_iter().map(|(_, d, _)| d.id).collect();
        assert!(tried.len() <= 2 * PARTITIONS as usize, "no more than two of a partition: {tried:?}");
        assert!(!world.dependency_is_up());
        assert_eq!((world.counts(), world.cluster.records(RETRY).len()), ([0; 6], 0), "{answer:?}");
        world.receiver.answer_with(|_| Answer::Delivered);
        world.pass(&mut running, Duration::from_secs(12));
        assert!(world.dependency_is_up());
        let taken = world.receiver.taken();
        let of = |rest| taken.iter().filter(move |id| id.parse::<u32>().unwrap() % 2 == rest);
        assert_eq!(taken.len(), 40, "each once");
        if matches!(answer, Answer::Unavailable { .. }) {
            assert!(of(0).is_sorted() && of(1).is_sorted(), "in order: {taken:?}");
        }
        assert_eq!((world.counts(), world.letters().len()), ([40, 0, 0, 0, 0, 0], 0));
    }
}

#[test]
fn one_failing_message_is_set_aside_and_delivered_later_while_others_go_on() {
    let world = World::new();
    let recovers = world.clock.now().plus(Duration::from_secs(12));
    let clock = world.clock.clone();
    world.fail("a2", move || clock.now() < recovers);
    for text in ["a1", "a2", "a3", "a4"] {
        world.say(0, text);
    }
    let (mut running, _) = world.start("0");
    world.pass(&mut running, Duration::from_secs(2));
    assert_eq!(world.receiver.taken(), ["a1", "a3", "a4"], "the others go on");
    let aside = world.cluster.records(RETRY);
    assert_eq!(aside.len(), 1);
    for (name, value) in [
        ("h", "1"),
        ("tl-retry-count", "1"),
        ("__connect.errors.topic", INPUT),
        ("__connect.errors.partition", "0"),
        ("__connect.errors.offset", "1"),
        ("__connect.errors.exception.message", "503"),
    ] {
        assert_eq!(header(&aside[0], name), value, "{name}");
    }
    assert_eq!((aside[0].key_text().as_str(), aside[0].value_text().as_str()), ("k", "a2"));
    assert!(world.dependency_is_up(), "it is the message's fault");
    // It waits 5 s, then 10 s; each time something must pass to show that it is still its own fault.
    for second in 0..20 {
        world.say(1, &format!("b{second}"));
        world.pass(&mut running, Duration::from_secs(1));
    }
    world.settle(&mut running);
    let tries: Vec<Timestamp> =
        world.receiver.got().iter().filter(|(_, d, _)| d.id == "a2").map(|(at, ..)| *at).collect();
    assert!(tries.windows(2).any(|pair| pair[1].0 - pair[0].0 >= 5_000_000), "{tries:?}");
    assert_eq!(world.receiver.taken().iter().filter(|id| *id == "a2").count(), 1);
    let asides = world.cluster.records(RETRY).len() as u64;
    assert_eq!(world.counts(), [24 + asides, 0, 0, 0, 0, 0], "set aside is emitted, and so is delivered");
    assert!(world.letters().is_empty());
}

#[test]
fn what_fails_while_others_pass_is_dead_lettered_in_the_end_with_its_first_origin() {
    let mut world = World::new();
    world.config.asides_max = 3;
    world.fail("poison", || true);
    world.say(0, "poison");
    let (mut running, _) = world.start("0");
    for second in 0..60 {
        world.say(second % 2, &format!("b{second}"));
        world.pass(&mut running, Duration::from_secs(1));
    }
    world.settle(&mut running);
    assert_eq!(world.letters(), ["retries_exhausted poison"]);
    let letter = &world.cluster.records(DLT)[0];
    for (name, value) in [
        ("h", "1"),
        ("__connect.errors.topic", INPUT),
        ("__connect.errors.offset", "0"),
        ("kafka_dlt-original-topic", INPUT),
        ("__connect.errors.connector.name", GROUP),
        ("tl-retry-count", ""),
        ("tl-retry-not-before", ""),
    ] {
        assert_eq!(header(letter, name), value, "{name}");
    }
    assert!(header(letter, "__connect.errors.exception.message").contains("503"));
    assert_eq!(world.cluster.records(RETRY).len(), 3);
    assert_eq!((world.receiver.taken().len(), world.of(Outcome::DeadLettered)), (60, 1));
}

#[test]
fn what_is_refused_is_dead_lettered_at_once_and_its_replay_is_delivered() {
    let world = World::new();
    world.receiver.answer_with(|delivery| match delivery.id.as_str() {
        "a2" => Answer::Refused { code: "http_422".to_owned(), message: "no".to_owned() },
        _ => Answer::Delivered,
    });
    for text in ["a1", "a2", "a3"] {
        world.say(0, text);
    }
    let (mut running, _) = world.start("0");
    world.settle(&mut running);
    assert_eq!(
        (world.receiver.taken(), world.letters()),
        (vec!["a1".into(), "a3".into()], vec!["http_422 a2".to_owned()])
    );
    assert_eq!(header(&world.cluster.records(DLT)[0], "__connect.errors.stage"), "TASK_PUT");
    assert_eq!(world.receiver.got().len(), 3, "it is tried once");
    world.receiver.answer_with(|_| Answer::Delivered);
    world.cluster.append(REPLAY, 0, Some(b"k"), Some(b"a2"), [("tl-replay-count", b"1".as_slice())]);
    world.settle(&mut running);
    assert_eq!(world.receiver.taken(), ["a1", "a3", "a2"]);
}

#[test]
fn a_lone_failure_is_not_blamed_on_the_message_until_another_one_passes() {
    let world = World::new();
    world.fail("lone", || true);
    world.say(0, "lone");
    let (mut running, _) = world.start("0");
    world.pass(&mut running, Duration::from_secs(3_600));
    assert!(!world.dependency_is_up() && world.cluster.records(RETRY).is_empty());
    // The one behind it in the same partition shows that others pass.
    world.say(0, "next");
    world.pass(&mut running, Duration::from_secs(30));
    assert_eq!(world.receiver.taken(), ["next"]);
    assert_eq!(world.cluster.records(RETRY).len(), 1);
}

#[test]
fn what_waits_in_the_retry_topic_is_not_tried_before_its_time_and_blocks_nobody() {
    let world = World::new();
    let not_before = world.clock.now().plus(Duration::from_secs(40));
    let text = not_before.as_millis().to_string();
    let headers = [("tl-retry-count", b"1".as_slice()), ("tl-retry-not-before", text.as_bytes())];
    world.cluster.append(RETRY, 0, Some(b"k"), Some(b"later"), headers);
    world.say(0, "a1");
    world.say(1, "b1");
    let (mut running, _) = world.start("0");
    world.pass(&mut running, Duration::from_secs(30));
    assert_eq!(world.receiver.taken().len(), 2);
    world.settle(&mut running);
    let got = world.receiver.got();
    let (at, last, _) = got.last().unwrap();
    assert_eq!(last.id, "later");
    assert!(not_before <= *at && *at < not_before.plus(Duration::from_secs(1)), "{at} for {not_before}");
}

#[test]
fn a_server_that_asks_for_time_gets_it() {
    let world = World::new();
    world.receiver.answer_with(|delivery| match delivery.id.as_str() {
        "busy" => Answer::Failed { message: "429".to_owned(), wait: Some(Duration::from_secs(30)) },
        _ => Answer::Delivered,
    });
    world.say(0, "busy");
    world.say(0, "a1");
    let (mut running, _) = world.start("0");
    world.pass(&mut running, Duration::from_secs(25));
    let tries = |world: &World| world.receiver.got().iter().filter(|(_, d, _)| d.id == "busy").count();
    assert_eq!(tries(&world), 2, "once at first, once after the longest pause in place");
    let aside = &world.cluster.records(RETRY)[0];
    let until: i64 = header(aside, "tl-retry-not-before").parse().unwrap();
    assert!(until - aside.time.as_millis() >= 29_000, "{until} {}", aside.time);
}

#[test]
fn what_expired_while_it_waited_is_not_sent() {
    let world = World::new();
    let clock = world.clock.clone();
    let back = world.clock.now().plus(Duration::from_secs(300));
    world.receiver.answer_with(move |_| if clock.now() < back { unavailable() } else { Answer::Delivered });
    for text in ["a1", "brief a2", "a3"] {
        world.say(0, text);
    }
    let (mut running, _) = world.start("0");
    world.settle(&mut running);
    assert_eq!(world.receiver.taken(), ["a1", "a3"]);
    assert_eq!((world.of(Outcome::Emitted), world.of(Outcome::Expired)), (2, 1));
}

#[test]
fn kafka_away_stops_the_commits_and_repeats_only_what_was_uncommitted() {
    let world = World::new();
    for number in 0..20 {
        world.say(0, &format!("{number:02}"));
    }
    let (mut running, _) = world.start("0");
    world.settle(&mut running);
    world.say(0, "x");
    world.cluster.faults().set_up(Point::SendOffsets, false);
    world.cluster.faults().set_up(Point::Reset, false);
    world.pass(&mut running, Duration::from_secs(120));
    world.cluster.faults().set_up(Point::SendOffsets, true);
    world.cluster.faults().set_up(Point::Reset, true);
    world.settle(&mut running);
    let taken = world.receiver.taken();
    assert_eq!(taken.len(), 22, "x twice: {taken:?}");
    assert_eq!(world.counts(), [21, 0, 0, 0, 0, 0]);
}

#[test]
fn a_loop_that_waits_for_the_other_side_does_not_spin() {
    // What is read and has no room, and what retention left while something is without an answer.
    for overtaken in [false, true] {
        let world = World::new();
        world.receiver.answer_with(|_| failed());
        world.say(0, "first");
        let (mut running, _) = world.start("0");
        world.pass(&mut running, Duration::from_secs(1));
        for number in 0..20 {
            world.say(0, &format!("{number:02}"));
        }
        if overtaken {
            world.cluster.delete_before(INPUT, 0, 8);
        }
        let turns = world.pass(&mut running, Duration::from_secs(60));
        // It polls every 100 ms, and a little is done for each attempt.
        assert!((500..1_500).contains(&turns), "{turns} turns in a minute, overtaken: {overtaken}");
        world.receiver.answer_with(|_| Answer::Delivered);
        world.settle(&mut running);
        assert_eq!(world.receiver.taken().len(), if overtaken { 14 } else { 21 });
    }
}

#[test]
fn a_clock_that_is_set_back_keeps_no_record_waiting() {
    let hour = Duration::from_secs(3_600);
    let set_back = |world: &World| {
        let back = Timestamp(world.clock.now().0 - hour.as_micros() as i64);
        world.clock.set(back);
    };
    // One that is to be tried again in 10 s.
    let world = World::new();
    world.receiver.answer_with(move |_| Answer::Failed { message: "429".to_owned(), wait: Some(hour) });
    world.say(0, "tried");
    let (mut running, _) = world.start("0");
    world.pass(&mut running, Duration::from_secs(1));
    assert_eq!(world.receiver.got().len(), 1);
    world.receiver.answer_with(|_| Answer::Delivered);
    set_back(&world);
    world.pass(&mut running, Duration::from_secs(1));
    assert_eq!(world.receiver.taken(), ["tried"], "it is due rather than an hour late");

    // One that waits in the retry topic.
    let world = World::new();
    let not_before = world.clock.now().plus(Duration::from_secs(40)).as_millis().to_string();
    let headers = [("tl-retry-count", b"1".as_slice()), ("tl-retry-not-before", not_before.as_bytes())];
    world.cluster.append(RETRY, 0, Some(b"k"), Some(b"aside"), headers);
    let (mut running, _) = world.start("0");
    world.pass(&mut running, Duration::from_secs(1));
    assert!(world.receiver.got().is_empty());
    set_back(&world);
    world.pass(&mut running, Duration::from_secs(1));
    assert_eq!(world.receiver.taken(), ["aside"]);
}

#[test]
fn no_more_deliveries_are_under_way_than_the_bound() {
    let world = World::of_partitions(70);
    world.receiver.set_latency(Duration::from_secs(60));
    for partition in 0..70 {
        world.say(partition, &format!("{partition:02}"));
    }
    let (mut running, _) = world.start("0");
    world.pass(&mut running, Duration::from_secs(30));
    assert_eq!(world.receiver.got().len(), 64, "the others wait");
    assert_eq!(world.health.status()["roles"][GROUP]["notes"]["in_flight"], 64);
    world.settle(&mut running);
    assert_eq!(world.receiver.taken().len(), 70);
}

#[test]
fn retention_that_overtakes_the_stage_is_counted() {
    let world = World::new();
    for number in 0..5 {
        world.say(0, &format!("{number}"));
    }
    let (mut running, _) = world.start("0");
    world.settle(&mut running);
    running.drain().unwrap();
    for number in 5..10 {
        world.say(0, &format!("{number}"));
    }
    world.cluster.delete_before(INPUT, 0, 8);
    let (mut running, _) = world.start("0");
    world.settle(&mut running);
    assert_eq!(world.receiver.taken(), ["0", "1", "2", "3", "4", "8", "9"]);
    let (_, metadata) = world.cluster.committed(GROUP, &TopicPartition::new(INPUT, 0)).unwrap();
    assert_eq!(throughline_model::books::Books::from_metadata(&metadata).unwrap().overtaken, 3);
}

#[test]
fn a_revocation_waits_for_what_is_under_way_and_nothing_is_sent_twice() {
    let world = World::new();
    world.receiver.set_latency(Duration::from_secs(2));
    for number in 0..12 {
        world.say(number % 2, &format!("{number:02}"));
    }
    let (mut first, _) = world.start("0");
    world.pass(&mut first, Duration::from_secs(3));
    let (mut second, _) = world.start("1");
    for _ in 0..20_000 {
        if world.is_done() {
            break;
        }
        first.turn().unwrap();
        second.turn().unwrap();
    }
    assert!(world.is_done());
    assert_eq!((world.receiver.got().len(), world.counts()), (12, [12, 0, 0, 0, 0, 0]));
}

#[test]
fn the_drain_waits_for_what_is_under_way_but_not_for_ever() {
    for (latency, repeats) in [(Duration::from_secs(2), 0), (Duration::from_secs(3_600), 1)] {
        let world = World::new();
        world.receiver.set_latency(latency);
        world.say(0, "a1");
        let (mut running, _) = world.start("0");
        while world.receiver.got().is_empty() {
            running.turn().unwrap();
        }
        let asked = world.clock.now();
        running.drain().unwrap();
        assert!(world.clock.now() < asked.plus(Duration::from_secs(6)));
        let (mut running, _) = world.start("0");
        world.receiver.set_latency(Duration::ZERO);
        world.settle(&mut running);
        assert_eq!(world.receiver.got().len(), 1 + repeats, "{latency:?}");
    }
}

#[test]
fn a_loop_runs_on_its_own_thread_and_drains_when_it_is_asked_to_end() {
    let world = World::new();
    world.say(0, "1");
    let shutdown = Shutdown::new();
    let asked = shutdown.clone();
    let (ports, _) = world.ports("0");
    let config = world.config.clone();
    let thread = std::thread::spawn(move || {
        run_act(SendThings::new(), ports, config, &asked, Health::new().role(GROUP))
    });
    while !world.is_done() {
        std::thread::yield_now();
    }
    shutdown.request();
    thread.join().unwrap().unwrap();
    assert_eq!(world.receiver.taken(), ["1"]);
}
