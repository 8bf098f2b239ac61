//! Sequence runs against a naive model that remembers every seq.

use proptest::prelude::*;
use std::collections::{BTreeMap, HashSet};
use throughline_model::envelope::{DeviceMessage, Enveloped, IDENTITY_NONE, IDENTITY_SEQUENCE, flag};
use throughline_model::seq_runs::{
    Admission, EPOCHS_MAX, Order, Position, REASON_DEAD_LETTERED_BEFORE, REASON_REDELIVERED, REASON_STALE_TS,
    RECENT_MAX, RUNS_MAX, Refusal, Streams,
};
use throughline_model::time::Timestamp;

fn message(epoch: i64, seq: i64, ts: Option<i64>) -> DeviceMessage {
    DeviceMessage {
        message_id: format!("{epoch}-{seq}-{ts:?}"),
        identity: IDENTITY_SEQUENCE.into(),
        stream: "telemetry".into(),
        epoch: Some(epoch),
        seq: Some(seq),
        occurred_at: Timestamp(ts.unwrap_or(0)),
        flags: if ts.is_none() { vec![flag::NO_TS.into()] } else { Vec::new() },
        ..DeviceMessage::default()
    }
}

fn admit(streams: &mut Streams, epoch: i64, seq: i64, ts: Option<i64>) -> Admission {
    streams.admit(&message(epoch, seq, ts).envelope())
}

fn through_json(streams: &Streams) -> Streams {
    let text = serde_json::to_string(streams).expect("serializes");
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

fn new(epoch: i64, generation: i64, seq: i64, order: Order) -> Admission {
    Admission::New { position: Position { epoch, generation, seq }, order }
}

#[test]
fn admissions_follow_the_rules_step_by_step() {
    use Order::{Late, Newest};
    let stale = Admission::Duplicate { reason: REASON_STALE_TS };
    let redelivered = Admission::Duplicate { reason: REASON_REDELIVERED };
    let reused = |generation, seq, order| Admission::EpochReused {
        position: Position { epoch: 1, generation, seq },
        order,
    };
    // (what it shows, epoch, seq, ts, expected)
    let steps = [
        ("the first message", 1, 1, Some(10), new(1, 0, 1, Newest)),
        ("the next", 1, 2, Some(20), new(1, 0, 2, Newest)),
        ("a gap below", 1, 5, Some(50), new(1, 0, 5, Newest)),
        ("the newest again", 1, 5, Some(50), redelivered),
        ("an earlier one again", 1, 2, Some(20), stale),
        ("a late one fills its gap", 1, 3, Some(30), new(1, 0, 3, Late)),
        ("a restart whose clock went back", 1, 1, Some(5), stale),
        ("a restart under the old epoch", 1, 1, Some(60), reused(1, 1, Newest)),
        ("a redelivery from before the restart", 1, 3, Some(30), stale),
        ("a late one from before the restart", 1, 4, Some(40), new(1, 0, 4, Late)),
        ("the new generation goes on", 1, 2, Some(70), new(1, 1, 2, Newest)),
        ("and recognises its own redelivery", 1, 1, Some(60), stale),
        ("another restart", 1, 1, Some(80), reused(2, 1, Newest)),
        ("a newer epoch", 2, 1, Some(90), new(2, 0, 1, Newest)),
        ("an older epoch is late", 1, 2, Some(85), new(1, 2, 2, Late)),
    ];
    let mut streams = Streams::default();
    for (what, epoch, seq, ts, expected) in steps {
        assert_eq!(admit(&mut streams, epoch, seq, ts), expected, "{what}");
        streams = through_json(&streams);
    }
    assert_eq!(streams.newest("telemetry"), Some(Position { epoch: 2, generation: 0, seq: 1 }));
    assert_eq!(streams.newest("event"), None);
}

#[test]
fn without_a_time_the_id_tells_a_redelivery_from_a_restart() {
    let mut streams = Streams::default();
    for seq in 0..10 {
        assert_eq!(admit(&mut streams, 1, seq, None), new(1, 0, seq, Order::Newest));
    }
    assert_eq!(admit(&mut streams, 1, 4, None), Admission::Duplicate { reason: REASON_REDELIVERED });
    let mut after_restart = message(1, 4, None);
    after_restart.message_id = "other bytes".into();
    let admission = streams.admit(&after_restart.envelope());
    let position = Position { epoch: 1, generation: 1, seq: 4 };
    assert_eq!(admission, Admission::EpochReused { position, order: Order::Newest });
    assert_eq!(admit(&mut streams, 1, 9, None), Admission::Duplicate { reason: REASON_REDELIVERED });
}

#[test]
fn ids_are_remembered_for_exactly_the_stated_number_of_messages() {
    let mut streams = Streams::default();
    for seq in 0..=RECENT_MAX as i64 {
        admit(&mut streams, 1, seq, None);
    }
    assert_eq!(admit(&mut streams, 1, 1, None), Admission::Duplicate { reason: REASON_REDELIVERED });
    assert!(matches!(admit(&mut streams, 1, 0, None), Admission::EpochReused { .. }));
}

#[test]
fn a_message_without_sequence_identity_leaves_no_trace() {
    let mut streams = Streams::default();
    let mut message = message(1, 1, Some(1));
    message.identity = IDENTITY_NONE.into();
    for _ in 0..2 {
        assert_eq!(streams.admit(&message.envelope()), Admission::Unsequenced);
        assert_eq!(streams.refuse(&message.envelope()), Refusal::DeadLetter);
    }
    assert_eq!(streams, Streams::default());
}

#[test]
fn a_dead_lettered_seq_stays_open_until_its_first_success() {
    let mut streams = Streams::default();
    admit(&mut streams, 1, 1, Some(10));
    let poison = message(1, 2, Some(20));
    assert_eq!(streams.refuse(&poison.envelope()), Refusal::DeadLetter);
    assert_eq!(
        streams.refuse(&poison.envelope()),
        Refusal::Duplicate { reason: REASON_DEAD_LETTERED_BEFORE }
    );
    assert_eq!(admit(&mut streams, 1, 3, Some(30)), new(1, 0, 3, Order::Newest));
    let mut streams = through_json(&streams);
    let epoch = &streams.get("telemetry").expect("known").epochs()[0];
    assert_eq!(epoch.current().received().runs().len(), 1, "it counts as received");
    assert_eq!(epoch.current().received().open().len(), 1);
    assert_eq!(admit(&mut streams, 1, 2, Some(20)), new(1, 0, 2, Order::Late), "the replay");
    assert_eq!(admit(&mut streams, 1, 2, Some(20)), Admission::Duplicate { reason: REASON_STALE_TS });
    assert_eq!(streams.refuse(&poison.envelope()), Refusal::Duplicate { reason: REASON_STALE_TS });
}

#[test]
fn a_poison_newest_message_does_not_make_the_next_one_late() {
    let mut streams = Streams::default();
    streams.refuse(&message(1, 9, Some(90)).envelope());
    assert_eq!(admit(&mut streams, 1, 8, Some(80)), new(1, 0, 8, Order::Newest));
}

#[test]
fn epochs_beyond_the_newest_four_are_below_the_floor() {
    let mut streams = Streams::default();
    for epoch in 1..=5 {
        admit(&mut streams, epoch, 7, Some(epoch * 10));
    }
    let below = |epoch| Admission::BelowFloor { position: Position { epoch, generation: 0, seq: 7 } };
    assert_eq!(admit(&mut streams, 1, 7, Some(10)), below(1));
    assert_eq!(admit(&mut streams, 0, 7, Some(1)), below(0));
    assert_eq!(admit(&mut streams, 2, 7, Some(20)), Admission::Duplicate { reason: REASON_REDELIVERED });
    assert_eq!(streams.get("telemetry").expect("known").epochs().len(), EPOCHS_MAX);
}

#[test]
fn streams_of_one_device_count_apart() {
    let mut streams = Streams::default();
    let mut event = message(1, 1, Some(10));
    event.stream = "event".into();
    assert_eq!(admit(&mut streams, 1, 1, Some(10)), new(1, 0, 1, Order::Newest));
    assert_eq!(streams.admit(&event.envelope()), new(1, 0, 1, Order::Newest));
    assert_eq!(streams.iter().map(|s| s.name()).collect::<Vec<_>>(), ["telemetry", "event"]);
}

#[test]
fn another_message_under_a_dead_lettered_seq_is_dead_lettered_by_itself() {
    let mut streams = Streams::default();
    admit(&mut streams, 1, 1, Some(10));
    let known = Refusal::Duplicate { reason: REASON_DEAD_LETTERED_BEFORE };
    let other_bytes = DeviceMessage { message_id: "other bytes".into(), ..message(1, 2, Some(20)) };
    let restarted = message(1, 2, Some(30));
    let untimed = message(1, 2, None);
    for (what, message) in [
        ("the first", message(1, 2, Some(20))),
        ("other bytes at the same time", other_bytes),
        ("after a restart", restarted),
        ("without a time", untimed),
    ] {
        assert_eq!(streams.refuse(&message.envelope()), Refusal::DeadLetter, "{what}");
        streams = through_json(&streams);
        assert_eq!(streams.refuse(&message.envelope()), known, "{what}, again");
    }
}

#[test]
fn a_restart_below_what_was_seen_is_told_from_what_is_late_by_its_time() {
    use Order::{Late, Newest};
    let stale = Admission::Duplicate { reason: REASON_STALE_TS };
    let reused = |generation, seq| Admission::EpochReused {
        position: Position { epoch: 1, generation, seq },
        order: Newest,
    };
    // (what it shows, seq, ts, expected)
    let steps = [
        ("first heard in the middle of its life", 1_000_000, Some(100), new(1, 0, 1_000_000, Newest)),
        ("goes on", 1_000_001, Some(110), new(1, 0, 1_000_001, Newest)),
        ("a redelivery out of order", 999_999, Some(90), new(1, 0, 999_999, Late)),
        ("a spool", 500, Some(50), new(1, 0, 500, Late)),
        ("equal times are no restart", 400, Some(110), new(1, 0, 400, Late)),
        ("without a time it cannot be told", 399, None, new(1, 0, 399, Late)),
        ("a restart below everything seen", 1, Some(200), reused(1, 1)),
        ("goes on", 2, Some(210), new(1, 1, 2, Newest)),
        ("a redelivery from before", 1_000_001, Some(110), stale),
        ("a late one from before", 600, Some(60), new(1, 0, 600, Late)),
        ("a spool from before, above all seen", 1_000_005, Some(150), new(1, 0, 1_000_005, Late)),
        ("an earlier one of it", 1_000_003, Some(130), new(1, 0, 1_000_003, Late)),
        ("and again", 1_000_005, Some(150), stale),
        ("the new life is still the newest", 9, Some(280), new(1, 1, 9, Newest)),
        ("out of order within it", 8, Some(270), new(1, 1, 8, Late)),
        ("a restart into a gap", 5, Some(300), reused(2, 5)),
    ];
    let mut streams = Streams::default();
    for (what, seq, ts, expected) in steps {
        assert_eq!(admit(&mut streams, 1, seq, ts), expected, "{what}");
        streams = through_json(&streams);
    }
}

#[test]
fn a_restart_below_the_floor_is_one_and_what_is_late_there_is_not() {
    let mut streams = Streams::default();
    for seq in 1..=200 {
        admit(&mut streams, 1, seq * 2, Some(seq * 10));
    }
    let floor = streams.get("telemetry").expect("known").epochs()[0].current().received().floor();
    assert!(floor.is_some_and(|floor| floor > 5), "{floor:?}");
    let late = admit(&mut streams, 1, 5, Some(25));
    assert!(matches!(late, Admission::BelowFloor { .. }), "{late:?}");
    let restarted = admit(&mut streams, 1, 5, Some(5_000));
    assert!(restarted.is_newest() && matches!(restarted, Admission::EpochReused { .. }), "{restarted:?}");
}

#[test]
fn the_replay_of_a_dead_letter_is_no_restart_and_a_restart_onto_its_seq_is() {
    let mut streams = Streams::default();
    admit(&mut streams, 1, 1, Some(10));
    for seq in 2..=4 {
        streams.refuse(&message(1, seq, Some(seq * 10)).envelope());
    }
    let mut streams = through_json(&streams);
    for seq in [2, 4] {
        assert_eq!(admit(&mut streams, 1, seq, Some(seq * 10)), new(1, 0, seq, Order::Newest), "replay");
    }
    let position = Position { epoch: 1, generation: 1, seq: 3 };
    let restarted = admit(&mut streams, 1, 3, Some(50));
    assert_eq!(restarted, Admission::EpochReused { position, order: Order::Newest });
    assert_eq!(
        admit(&mut streams, 1, 3, Some(30)),
        new(1, 0, 3, Order::Late),
        "the replay is of the life before"
    );
}

fn check_bounds(streams: &Streams) {
    for stream in streams.iter() {
        assert!(stream.epochs().len() <= EPOCHS_MAX);
        for epoch in stream.epochs() {
            for generation in [Some(epoch.current()), epoch.previous()].into_iter().flatten() {
                let received = generation.received();
                assert!(received.runs().len() <= RUNS_MAX && received.open().len() <= RUNS_MAX);
                let apart = |pair: &[throughline_model::seq_runs::Run]| pair[0].1 + 1 < pair[1].0;
                assert!(received.runs().windows(2).all(apart), "{:?}", received.runs());
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Any order, any repetition, no restart: times follow from (epoch, seq). Few seqs fill runs, many
    /// break the bounds.
    #[test]
    fn each_message_is_accepted_once_above_the_floor_and_never_taken_for_seen(
        arrivals in prop::collection::vec((0i64..6, prop_oneof![0i64..40, 0i64..2_000], 0u8..20), 1..600),
        with_ts in any::<bool>(),
    ) {
        let mut streams = Streams::default();
        let mut accepted: HashSet<(i64, i64)> = HashSet::new();
        for (epoch, seq, dice) in arrivals {
            let ts = with_ts.then_some(1_000_000 * epoch + seq);
            let fresh = !accepted.contains(&(epoch, seq));
            if dice == 0 {
                let refusal = streams.refuse(&message(epoch, seq, ts).envelope());
                if !fresh {
                    // Accepted before: it may have sunk below the floor since, and is then refused again.
                    let known = streams.get("telemetry").expect("known").epochs().iter()
                        .find(|e| e.number() == epoch);
                    let floor = known.map_or(i64::MAX, |e| e.current().received().floor().unwrap_or(-1));
                    let recognised = matches!(refusal, Refusal::Duplicate { .. });
                    prop_assert!(seq <= floor || recognised);
                }
                continue;
            }
            if dice == 1 {
                streams = through_json(&streams);
            }
            match admit(&mut streams, epoch, seq, ts) {
                Admission::New { position, .. } => {
                    prop_assert!(fresh, "{epoch}/{seq} accepted as new twice");
                    prop_assert_eq!(position, Position { epoch, generation: 0, seq });
                    accepted.insert((epoch, seq));
                }
                Admission::BelowFloor { .. } => { accepted.insert((epoch, seq)); }
                Admission::Duplicate { .. } => prop_assert!(!fresh, "{epoch}/{seq} was a gap and became seen"),
                other => prop_assert!(false, "{epoch}/{seq}: {other:?}"),
            }
            check_bounds(&streams);
        }
        prop_assert_eq!(through_json(&streams), streams);
    }

    /// A device that restarts under the same epoch, each time from any seq, with a clock that goes on: each
    /// message is the newest when it is sent, whatever was seen before, and takes effect once.
    #[test]
    fn a_device_that_starts_again_anywhere_is_current_at_once(
        lives in prop::collection::vec(
            (0i64..300, prop::collection::vec((any::<prop::sample::Index>(), 0u8..4), 1..40)), 1..8,
        ),
    ) {
        let mut streams = Streams::default();
        let mut clock = 0;
        let mut sent: Vec<(usize, DeviceMessage)> = Vec::new();
        for (life, (start, steps)) in lives.iter().enumerate() {
            for (seq, (pick, dice)) in (*start..).zip(steps) {
                clock += 10;
                let message = message(1, seq, Some(clock));
                let admission = streams.admit(&message.envelope());
                prop_assert!(admission.is_newest(), "{life}/{seq}: {admission:?}");
                sent.push((life, message));
                let recent: Vec<&DeviceMessage> =
                    sent.iter().filter(|(of, _)| of + 1 >= life).map(|(_, m)| m).collect();
                if *dice == 0 {
                    let again = streams.admit(&recent[pick.index(recent.len())].envelope());
                    prop_assert!(matches!(again, Admission::Duplicate { .. }), "{again:?}");
                    streams = through_json(&streams);
                }
            }
        }
        check_bounds(&streams);
    }

    /// A device that restarts under the same epoch, each time from seq 0, with a clock that goes on. What
    /// it sent in this life or the one before may be delivered again at any time.
    #[test]
    fn restarts_under_an_old_epoch_lose_nothing_and_redeliveries_take_no_effect(
        lives in prop::collection::vec(prop::collection::vec((any::<prop::sample::Index>(), 0u8..4), 1..60), 1..6),
        with_ts in any::<bool>(),
    ) {
        let mut streams = Streams::default();
        let mut clock = 0;
        let mut sent: Vec<(usize, DeviceMessage)> = Vec::new();
        let mut effects: BTreeMap<String, u32> = BTreeMap::new();
        for (life, steps) in lives.iter().enumerate() {
            for (seq, (pick, dice)) in steps.iter().enumerate() {
                clock += 10;
                let mut message = message(1, seq as i64, with_ts.then_some(clock));
                message.message_id = format!("{life}-{seq}");
                let admission = streams.admit(&message.envelope());
                prop_assert!(admission.is_newest(), "{life}/{seq}: {admission:?}");
                let reused = matches!(admission, Admission::EpochReused { .. });
                prop_assert_eq!(reused, life > 0 && seq == 0);
                *effects.entry(message.message_id.clone()).or_default() += 1;
                sent.push((life, message));
                let recent: Vec<&DeviceMessage> =
                    sent.iter().filter(|(of, _)| of + 1 >= life).map(|(_, m)| m).collect();
                let again = recent[pick.index(recent.len())];
                if *dice == 0 {
                    let admission = streams.admit(&again.envelope());
                    let recognised = matches!(admission, Admission::Duplicate { .. });
                    prop_assert!(recognised, "{admission:?}");
                    streams = through_json(&streams);
                }
            }
        }
        prop_assert!(effects.values().all(|n| *n == 1));
        check_bounds(&streams);
    }
}

#[test]
fn the_largest_generation_of_a_changelog_overflows_nothing() {
    let text = format!(
        r#"[{{"stream":"telemetry","epochs":[{{"epoch":1,"gen":{max},"runs":[[5,5]],"newest_ts":1}}]}}]"#,
        max = i64::MAX
    );
    let mut streams: Streams = serde_json::from_str(&text).expect("a state");
    let admission = admit(&mut streams, 1, 5, Some(2));
    assert!(matches!(admission, Admission::EpochReused { position, .. } if position.generation == i64::MAX));
}
