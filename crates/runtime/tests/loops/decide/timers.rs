//! Timers: when they fire, and before what.

use super::*;

#[test]
fn timers_fire_in_order_of_due_time_and_key_before_the_first_later_record() {
    let world = World::new(&[INPUT], 1);
    let began = world.clock.now();
    for (key, value) in [("b", "arm:5"), ("a", "arm:5"), ("c", "arm:2")] {
        world.cluster.append_keyed(INPUT, key, value.as_bytes());
    }
    // Due at the same instant as the record: the record comes first.
    world.clock.set(began.plus(Duration::from_secs(5)));
    world.cluster.append_keyed(INPUT, "x", b"add:1");
    world.clock.set(began.plus(Duration::from_secs(5)).plus(Duration::from_micros(1)));
    world.cluster.append_keyed(INPUT, "x", b"add:2");
    let (mut running, _) = world.start("i");
    world.settle(&mut running);
    let at = |s| began.plus(Duration::from_secs(s)).0;
    let expected = [
        format!("c fired 0 at {}", at(2)),
        "x 1 1 @3".to_owned(),
        format!("a fired 0 at {}", at(5)),
        format!("b fired 0 at {}", at(5)),
        "x 2 3 @4".to_owned(),
    ];
    assert_eq!(world.output(), expected);
}

#[test]
fn timers_of_idle_partitions_fire_by_the_clock() {
    let world = World::new(&[INPUT], 1);
    world.say("a", "arm:10");
    let (mut running, _) = world.start("i");
    world.settle(&mut running);
    world.pass(&mut running, Duration::from_secs(9));
    assert!(world.output().is_empty());
    world.pass(&mut running, Duration::from_secs(2));
    assert_eq!(world.output().len(), 1);
    // The firing is in the changelog: a successor does not fire again.
    drop(running);
    let (mut successor, _) = world.start("i");
    world.pass(&mut successor, Duration::from_secs(30));
    assert_eq!(world.output().len(), 1);
}

#[test]
fn no_timer_fires_by_the_clock_while_kafka_is_away() {
    let world = World::new(&[INPUT], 1);
    world.say("a", "arm:10");
    let (mut running, _) = world.start("i");
    world.settle(&mut running);
    world.pass(&mut running, Duration::from_secs(1));
    world.cluster.set_away(true);
    world.pass(&mut running, Duration::from_secs(60));
    assert_eq!(world.output(), Vec::<String>::new());
    // What arrived meanwhile comes before the timers that are later than it.
    world.cluster.set_away(false);
    world.pass(&mut running, Duration::from_secs(30));
    assert_eq!(world.output().len(), 1, "it fires once Kafka is back, without a record");
}

#[test]
fn no_timer_fires_by_the_clock_before_every_partition_of_the_task_is_read_to_its_end() {
    let world = World::new(&[INPUT, SECOND], 1);
    world.say("a", "arm:1");
    let (mut running, _) = world.start("i");
    world.settle(&mut running);
    // The registry is away: a batch of the second input is held back, so it is not read to its end.
    world.cluster.faults().set_up(Point::Schema, false);
    world.cluster.append(SECOND, 0, Some(b"a"), Some(&[0, 0, 0, 9, 9, 1]), []);
    turns(&mut running, 3);
    world.pass(&mut running, Duration::from_secs(20));
    assert!(world.output().is_empty());
    world.cluster.faults().set_up(Point::Schema, true);
    world.pass(&mut running, Duration::from_secs(20));
    assert_eq!(world.output().len(), 1);
}

#[test]
fn no_record_fires_a_timer_that_another_input_of_the_task_may_still_put_off() {
    let world = World::new(&[INPUT, SECOND], 1);
    world.say("a", "arm:10");
    world.say("b", "arm:10");
    let (mut running, _) = world.start("i");
    world.settle(&mut running);
    // The registry is away, and a batch of the first input waits for it; long before the timers are due somebody
    // puts one of them off behind it.
    world.cluster.faults().set_up(Point::Schema, false);
    world.cluster.append(INPUT, 0, Some(b"c"), Some(&[0, 0, 0, 9, 9, 1]), []);
    world.say("a", "arm:1000");
    turns(&mut running, 5);
    world.clock.advance(Duration::from_secs(60));
    world.cluster.append_keyed(SECOND, "x", b"add:1");
    turns(&mut running, 20);
    assert_eq!(world.output(), Vec::<String>::new(), "the second input is later than the timers");
    world.cluster.faults().set_up(Point::Schema, true);
    world.settle(&mut running);
    let fired = ["b fired 0 at ", "x 1 1 @0"];
    let output = world.output();
    assert!(output.len() == 2 && output.iter().zip(fired).all(|(o, f)| o.starts_with(f)), "{output:?}");
}

#[test]
fn timers_that_are_due_together_fill_no_more_than_the_bound() {
    let mut world = World::new(&[INPUT], 1);
    world.config.bytes_max = 500;
    for key in 0..100 {
        world.cluster.append_keyed(INPUT, &format!("k{key:02}"), b"arm:10");
    }
    let (mut running, _) = world.start("i");
    world.settle(&mut running);
    drop(running);
    world.clock.advance(Duration::from_secs(60));
    let (mut running, _) = world.start("i");
    world.pass(&mut running, Duration::from_secs(5));
    assert!(world.output().len() >= 100, "all have fired");
    let largest = world.cluster.sent_bytes_max();
    assert!((500..1_000).contains(&largest), "{largest} bytes at once: one record may pass the bound");
}
