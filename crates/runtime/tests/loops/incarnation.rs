//! What decide stages do where their topics, their cluster, their state or their offsets were replaced.

use crate::common::{CHANGELOG, GROUP, INPUT, Loop, World, stops};
use std::time::Duration;
use throughline_model::books::Books;
use throughline_model::record::TopicPartition;
use throughline_runtime::{Stopped, codes};

fn first() -> TopicPartition {
    TopicPartition::new(INPUT, 0)
}

/// A world in which a stage has processed three records and ended in order.
fn worked() -> World {
    let world = World::new(&[INPUT], 1);
    for _ in 0..3 {
        world.say("a", "add:1");
    }
    let (mut running, _) = world.start("i");
    world.settle(&mut running);
    running.drain().unwrap();
    world
}

fn stop_of(running: &mut Loop) -> Stopped {
    stops(|| running.turn())
}

#[test]
fn what_was_replaced_while_the_stage_was_down_stops_it_before_any_input() {
    type Replace = fn(&World);
    let cases: [(&str, Replace, &str, &str); 4] = [
        (
            "the input, grown past the position",
            |world| {
                world.cluster.recreate_topic(INPUT);
                for _ in 0..5 {
                    world.say("a", "add:1");
                }
            },
            codes::REPLACED,
            "throughline groups adopt count_things --topic device.thing.v1 --begin earliest",
        ),
        (
            "the changelog",
            |world| {
                world.cluster.recreate_topic(CHANGELOG);
                world.say("a", "add:1");
            },
            codes::REPLACED,
            "the state of the records before the offset 3",
        ),
        ("the cluster", |world| world.cluster.become_another("other"), codes::REPLACED, "this is `other`"),
        (
            "the offsets, forgotten by the broker",
            |world| world.cluster.forget_offsets(GROUP),
            codes::STATE_WITHOUT_POSITION,
            "the state of 1 keys",
        ),
    ];
    for (what, replace, code, says) in cases {
        let world = worked();
        let before = (world.output(), world.cluster.committed(GROUP, &first()));
        replace(&world);
        let (mut running, _) = world.start("i");
        let stopped = stop_of(&mut running);
        assert_eq!(stopped.code, code, "{what}");
        assert!(stopped.message.contains(says), "{what}: {stopped}");
        assert!(stopped.message.contains("throughline groups adopt count_things"), "{what}: {stopped}");
        assert!(codes::explain(code).is_some());
        assert_eq!(world.output(), before.0, "{what}");
        if code == codes::REPLACED {
            assert_eq!(world.cluster.committed(GROUP, &first()), before.1, "{what}");
        }
    }
}

#[test]
fn a_topic_that_is_replaced_under_a_running_stage_stops_it_for_good() {
    for topic in [INPUT, CHANGELOG] {
        let world = worked();
        let (mut running, _) = world.start("i");
        world.pass(&mut running, Duration::from_secs(5));
        world.cluster.recreate_topic(topic);
        // The member hears nothing of it and goes on in the new topic where it stood in the old one.
        for _ in 0..5 {
            world.say("b", "add:1");
        }
        let stopped = stop_of(&mut running);
        assert_eq!(stopped.code, codes::REPLACED, "{stopped}");
        assert!(stopped.message.contains(&format!("topic `{topic}` was made anew")), "{stopped}");
        drop(running);
        // Whatever it had committed still counts in what is gone.
        let (mut again, _) = world.start("i");
        assert_eq!(stop_of(&mut again).code, codes::REPLACED);
    }
}

#[test]
fn books_that_do_not_say_where_they_count_are_taken_and_say_it_from_the_next_commit_on() {
    let world = worked();
    let (next, metadata) = world.cluster.committed(GROUP, &first()).unwrap();
    let mut old = Books::from_metadata(&metadata).unwrap();
    let origin = old.origin.take().expect("this version says it");
    world.cluster.commit_foreign(GROUP, &first(), next, &old.to_metadata());
    let (mut running, _) = world.start("i");
    world.say("a", "add:1");
    world.settle(&mut running);
    let (_, metadata) = world.cluster.committed(GROUP, &first()).unwrap();
    let books = Books::from_metadata(&metadata).unwrap();
    assert_eq!((books.records_read(), books.origin), (4, Some(origin)));
}

#[test]
fn a_stage_goes_on_where_an_operator_adopted_its_offset() {
    let world = worked();
    world.cluster.recreate_topic(INPUT);
    world.say("a", "add:10");
    let mut books = Books::open("adopted-1");
    let ids = world.cluster.ask_incarnation().ask().unwrap();
    books.origin = Some(ids.origin(INPUT, Some(CHANGELOG)).unwrap());
    world.cluster.commit_foreign(GROUP, &first(), 0, &books.to_metadata());
    let (mut running, _) = world.start("i");
    world.settle(&mut running);
    assert_eq!(world.output().last().map(String::as_str), Some("a 4 13 @0"), "with the state of before");
}
