//! Policies ask for replays by themselves: once, after quiet, never for what people or replays dealt with.

use crate::reprocess::{LETTERS, World, coded};
use std::sync::Arc;
use std::time::Duration;
use throughline_model::catalog::ReplayPolicy;
use throughline_model::dead_letter::{Action, status};
use throughline_model::envelope::DeadLetterRequest;
use throughline_model::topics::SERVICE_PLATFORM_DEAD_LETTER_REQUEST_V1 as REQUESTS;
use throughline_runtime::{PolicyPorts, ReplayPolicies};
use throughline_testkit::{Fault, MemoryOutlet, MemorySchemas, MemoryStretches, MemoryTables, Point};

const AFTER: Duration = Duration::from_secs(600);

type Policies = ReplayPolicies<MemoryStretches, MemoryTables, MemoryOutlet, MemorySchemas>;

fn policies(world: &World, times: u32) -> Policies {
    policies_over(world, times, MemoryStretches::new(&world.cluster, 4))
}

fn policies_over(world: &World, times: u32, letters: MemoryStretches) -> Policies {
    let policy = ReplayPolicy {
        letters: LETTERS.to_owned(),
        code: "unknown_schema".to_owned(),
        after: AFTER,
        times,
        rate: 1_000,
    };
    let ports = PolicyPorts {
        letters,
        tables: MemoryTables::new(&world.cluster),
        outlet: MemoryOutlet::new(&world.cluster),
        schemas: MemorySchemas::new(&world.cluster),
        codec: Arc::clone(&world.codec),
        clock: Arc::new(world.clock.clone()),
    };
    ReplayPolicies::new(vec![policy], ports)
}

fn fail(world: &World, names: &[&str]) {
    names.iter().for_each(|name| world.letter(name, "unknown_schema", 0));
}

/// Looks until a request comes, and lets it be carried out.
fn replay(world: &World, policies: &mut Policies) -> String {
    world.clock.advance(AFTER);
    let [id] = &policies.look().unwrap()[..] else { panic!("one request") };
    world.settle(&[id]);
    id.clone()
}

fn requests(world: &World) -> Vec<DeadLetterRequest> {
    let records = world.cluster.records(REQUESTS);
    records.iter().map(|record| world.codec.decode(record.value.as_deref()).unwrap()).collect()
}

#[test]
fn a_cause_is_replayed_once_when_no_further_letter_of_it_came_for_a_while() {
    let world = World::new();
    let mut policies = policies(&world, 1);
    assert_eq!(policies.look().unwrap(), [""; 0], "there is nothing to do");
    fail(&world, &["a", "b"]);
    world.letter("poison", "datum_invalid", 0);
    world.clock.advance(AFTER - Duration::from_secs(1));
    assert!(policies.look().unwrap().is_empty(), "it is not quiet for long enough");
    fail(&world, &["c"]);
    world.clock.advance(AFTER - Duration::from_secs(1));
    assert!(policies.look().unwrap().is_empty(), "a further letter: the outage goes on");
    // A letter of another cause does not count.
    world.letter("more poison", "datum_invalid", 0);
    let id = replay(&world, &mut policies);
    assert_eq!(world.replayed(), ["a", "b", "c"]);
    let progress = world.progress(&id).unwrap();
    assert_eq!((progress.status.as_str(), progress.replayed), (status::DONE, 3));
    assert_eq!(progress.requested_by, format!("policy {LETTERS}/unknown_schema"));
    for _ in 0..3 {
        world.clock.advance(AFTER);
        assert!(policies.look().unwrap().is_empty(), "it asks once");
    }
}

#[test]
fn what_fails_again_is_left_to_people_and_keeps_the_cause_alive() {
    let world = World::new();
    let mut policies = policies(&world, 2);
    fail(&world, &["a"]);
    replay(&world, &mut policies);
    world.letter("a", "unknown_schema", 1);
    replay(&world, &mut policies);
    world.letter("a", "unknown_schema", 2);
    world.clock.advance(AFTER);
    assert!(policies.look().unwrap().is_empty(), "it was replayed twice, as the policy says");
    world.letter("a", "unknown_schema", 2);
    fail(&world, &["b"]);
    world.clock.advance(AFTER - Duration::from_secs(1));
    world.letter("a", "unknown_schema", 2);
    world.clock.advance(Duration::from_secs(2));
    assert!(policies.look().unwrap().is_empty(), "letters of the cause still come");
    let id = replay(&world, &mut policies);
    assert_eq!(world.replayed(), ["a", "a", "b"]);
    let progress = world.progress(&id).unwrap();
    assert_eq!((progress.replayed, progress.skipped), (1, 0), "exhausted letters are not selected");
}

#[test]
fn two_members_and_one_after_a_restart_replay_once_together() {
    let world = World::new();
    let (mut one, mut two) = (policies(&world, 1), policies(&world, 1));
    fail(&world, &["a", "b"]);
    world.clock.advance(AFTER);
    let id = one.look().unwrap();
    assert_eq!(two.look().unwrap(), id, "both ask under one id");
    // It was killed after it wrote and before anybody took the request up.
    assert_eq!(policies(&world, 1).look().unwrap(), id);
    assert_eq!(requests(&world).len(), 3);
    world.settle(&[&id[0]]);
    assert_eq!(world.replayed(), ["a", "b"]);
    world.clock.advance(AFTER);
    assert!(policies(&world, 1).look().unwrap().is_empty(), "a later start finds the request");
    fail(&world, &["c"]);
    world.clock.advance(AFTER);
    let next = two.look().unwrap();
    assert_eq!(one.look().unwrap(), next);
    assert_ne!(next, id);
    world.settle(&[&next[0]]);
    assert_eq!(world.replayed(), ["a", "b", "c"]);
}

#[test]
fn what_an_operator_dealt_with_is_not_touched() {
    let world = World::new();
    let mut policies = policies(&world, 1);
    fail(&world, &["dropped", "dropped too"]);
    world.ask(&coded("drop", Action::Drop, "unknown_schema"));
    world.settle(&["drop"]);
    world.clock.advance(AFTER);
    assert!(policies.look().unwrap().is_empty(), "nothing is open");
    assert_eq!(requests(&world).len(), 1);
    fail(&world, &["open"]);
    // An operator is faster: the request of the policy comes second.
    world.ask(&coded("replay", Action::Replay, "unknown_schema"));
    let id = replay(&world, &mut policies);
    world.settle(&["replay"]);
    assert_eq!(world.replayed(), ["open"]);
    assert_eq!(world.progress(&id).unwrap().skipped, 1);
    // What a cancelled request of the policy left is for people.
    fail(&world, &["late"]);
    world.clock.advance(AFTER);
    let cancelled = policies.look().unwrap();
    world.ask(&DeadLetterRequest { topic: LETTERS.to_owned(), ..coded(&cancelled[0], Action::Cancel, "x") });
    world.settle(&[&cancelled[0]]);
    world.clock.advance(AFTER);
    assert!(policies.look().unwrap().is_empty());
}

/// Looks until a request comes, at most `most` times.
fn looks(policies: &mut Policies, most: usize) -> Vec<String> {
    (0..most).map(|_| policies.look().unwrap()).find(|ids| !ids.is_empty()).unwrap_or_default()
}

#[test]
fn a_broker_that_is_slow_only_delays_it_and_what_was_looked_at_is_not_read_again() {
    let world = World::new();
    let mut policies = policies_over(&world, 1, MemoryStretches::slow(&world.cluster, 4));
    fail(&world, &["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"]);
    world.ask(&coded("drop", Action::Drop, "unknown_schema"));
    world.settle(&["drop"]);
    fail(&world, &["open"]);
    world.clock.advance(AFTER);
    let read_before = world.cluster.faults().passed(Point::Stretch);
    let ids = looks(&mut policies, 20);
    // Three stretches of at most 4 letters are seen and then checked, each comes with the second call, and each
    // look asks for the bounds.
    let passes = world.cluster.faults().passed(Point::Stretch) - read_before;
    assert_eq!((ids.len(), passes), (1, 6 * 2 + 7), "each stretch is read once");
    world.settle(&[&ids[0]]);
    assert_eq!(world.replayed(), ["open"]);

    // A drop that is undone while its letters are looked at leaves them open, those looked at already too.
    fail(&world, &["k", "l", "m", "n", "o", "p"]);
    world.ask(&coded("undone", Action::Drop, "unknown_schema"));
    world.settle(&["undone"]);
    world.clock.advance(AFTER);
    assert!(looks(&mut policies, 4).is_empty(), "it stands at the second of two stretches");
    world.ask(&DeadLetterRequest {
        topic: LETTERS.to_owned(),
        ..coded("undone", Action::Cancel, "unknown_schema")
    });
    world.settle_cancelled("undone");
    let ids = looks(&mut policies, 20);
    world.settle(&[&ids[0]]);
    assert_eq!(world.replayed(), ["open", "k", "l", "m", "n", "o", "p"]);
}

/// Looks once; returns how often that asked for bounds or a stretch, and how many requests came.
fn look_and_count(world: &World, policies: &mut Policies) -> (usize, usize) {
    let before = world.cluster.faults().passed(Point::Stretch);
    let ids = policies.look().unwrap();
    (world.cluster.faults().passed(Point::Stretch) - before, ids.len())
}

#[test]
fn a_look_takes_so_many_letters_and_the_next_one_goes_on() {
    const MORE_THAN_A_LOOK: usize = 20_001;
    let world = World::new();
    let mut policies = policies_over(&world, 1, MemoryStretches::new(&world.cluster, 1_000));
    fail(&world, &vec!["x"; MORE_THAN_A_LOOK]);
    world.clock.advance(AFTER);
    assert_eq!(look_and_count(&world, &mut policies), (1 + 20, 0), "it did not see them all yet");
    assert_eq!(
        look_and_count(&world, &mut policies),
        (1 + 1 + 1, 1),
        "one more is seen, and the first one is open"
    );

    // Where somebody dealt with them, they are looked at again, and that is bounded too.
    let other = World::new();
    let mut policies = policies_over(&other, 1, MemoryStretches::new(&other.cluster, 1_000));
    fail(&other, &vec!["x"; MORE_THAN_A_LOOK]);
    other.ask(&coded("drop", Action::Drop, "unknown_schema"));
    other.settle(&["drop"]);
    fail(&other, &["open"]);
    other.clock.advance(AFTER);
    assert_eq!(look_and_count(&other, &mut policies), (1 + 20, 0));
    assert_eq!(
        look_and_count(&other, &mut policies),
        (1 + 1 + 20, 0),
        "two are seen, 19,998 checked and a stretch filled up"
    );
    assert_eq!(look_and_count(&other, &mut policies), (1 + 1, 1), "the rest is checked");
}

#[test]
fn a_dependency_that_fails_only_delays_it() {
    for passes in 0.. {
        let world = World::new();
        let mut policies = policies(&world, 1);
        fail(&world, &["a", "b", "c", "d", "e", "f"]);
        world.clock.advance(AFTER);
        world.cluster.faults().script_any(passes, Fault::Dependency);
        let looked = policies.look();
        if !world.cluster.faults().has_struck() {
            assert!(passes > 4, "a look passes {passes} points only");
            break;
        }
        assert!(looked.is_err(), "the fault at pass {passes} shows");
        let ids = policies.look().unwrap();
        world.settle(&[&ids[0]]);
        assert_eq!(world.replayed(), ["a", "b", "c", "d", "e", "f"]);
        assert_eq!(requests(&world).len(), 1);
    }
}
