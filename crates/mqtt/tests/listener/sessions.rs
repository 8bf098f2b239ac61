//! Sessions, wills, deadlines and the end of an instance.

use super::TELEMETRY_DLT;
use super::bounds::note;
use super::support::*;
use std::io::Write as _;
use std::time::Duration;
use throughline_model::topics::{DEVICE_SESSION_V1, DEVICE_TELEMETRY_V1};
use throughline_runtime::ports::Fate;

#[test]
fn a_keep_alive_that_ran_out_closes_but_not_while_reading_is_paused() {
    let rig = Rig::with(|l| l.bounds.open_publishes_max = 1);
    let mut idle = rig.raw();
    idle.send(&connect(5, "site-1/idle", 2, 1, &[]));
    idle.connack(5);
    rig.memory.hold();
    let mut paused = rig.raw();
    paused.send(&connect(5, "site-1/paused", 2, 1, &[]));
    paused.connack(5);
    paused.send(&publish(5, TOPIC, 1, &reading(1)));
    rig.memory.wait_for(DEVICE_TELEMETRY_V1, 1);
    idle.expect(&[0xe0, 2, 0x8d, 0]);
    idle.expect_end();
    // Both keep-alives have run out; the paused connection has not been read and lives.
    rig.memory.flow();
    paused.expect_puback(1);
    paused.ping();
    let events = rig.sessions(3);
    let cause = events.iter().find(|e| e.event == "disconnected").and_then(|e| e.cause.clone());
    assert_eq!(cause.as_deref(), Some("keep_alive"));
}

#[test]
fn a_connection_that_says_nothing_is_closed_at_its_deadline() {
    let rig = Rig::with(|l| l.bounds.connect_deadline_ms = 300);
    let before = Before::disconnects("connect_deadline");
    rig.raw().expect_end();
    let mut half = rig.raw();
    half.send(&[0x10]);
    half.expect_end();
    let mut lives = rig.client(4, "site-1/pump-7");
    let mut second = rig.raw();
    second.expect_end();
    lives.ping();
    before.grew_by(3);
}

#[test]
fn a_will_becomes_a_session_event_and_passes_through_its_feed() {
    let rig = Rig::start();
    let will = [text(TOPIC.as_bytes()), text(&reading(99))].concat();
    let mut leaves = rig.raw();
    leaves.send(&connect(4, "site-1/pump-8", 6, 0, &will));
    leaves.connack(4);
    leaves.send(&[0xe0, 0]);
    leaves.expect_end();
    let mut dies = rig.raw();
    dies.send(&connect(4, "site-1/pump-7", 6, 0, &will));
    dies.connack(4);
    drop(dies);
    let sent = rig.memory.wait_for(DEVICE_TELEMETRY_V1, 1);
    assert_eq!(rig.message(&sent[0]).seq, Some(99));
    let events = rig.sessions(5);
    let of = |device: &str| -> Vec<(String, Option<String>)> {
        events.iter().filter(|e| e.device_id == device).map(|e| (e.event.clone(), e.cause.clone())).collect()
    };
    let event = |name: &str, cause: Option<&str>| (name.to_owned(), cause.map(str::to_owned));
    assert_eq!(of("pump-8"), [event("connected", None), event("disconnected", Some("client"))]);
    assert_eq!(
        of("pump-7"),
        [event("connected", None), event("disconnected", Some("connection_lost")), event("will", None)]
    );
    assert_eq!(rig.memory.of(DEVICE_TELEMETRY_V1).len(), 1, "a proper good-bye voids the will");
}

#[test]
fn a_client_id_is_taken_over_and_its_generation_rises() {
    for level in [4, 5] {
        let rig = Rig::with(|l| l.workers = 2);
        let mut first = rig.client(level, "site-1/pump-7");
        let mut second = rig.client(level, "site-1/pump-7");
        if level == 5 {
            first.expect(&[0xe0, 2, 0x8e, 0]);
        }
        first.expect_end();
        second.ping();
        let events = rig.sessions(3);
        let taken = events.iter().find(|e| e.event == "taken_over").expect("taken over");
        let connected: Vec<i64> =
            events.iter().filter(|e| e.event == "connected").map(|e| e.session_generation).collect();
        assert!(connected.iter().all(|g| *g >= taken.session_generation) && connected[0] != connected[1]);
    }
}

#[test]
fn a_persistent_session_is_present_after_a_reconnect_and_a_clean_one_is_not() {
    let rig = Rig::start();
    let join = |flags: u8| {
        let mut raw = rig.raw();
        raw.send(&connect(4, "site-1/pump-7", flags, 0, &[]));
        let (present, code) = raw.connack(4);
        assert_eq!(code, 0);
        (raw, present)
    };
    let leave = |mut raw: Raw, seen: usize| {
        raw.send(&[0xe0, 0]);
        raw.expect_end();
        rig.sessions(seen);
    };
    let (mut first, present) = join(0);
    assert_eq!(present, 0);
    first.send(&packet(0x82, &[&[0, 9][..], &text(b"tl/site-1/pump-7/command"), &[1]].concat()));
    first.expect(&[0x90, 3, 0, 9, 1]);
    leave(first, 2);
    let (second, present) = join(0);
    assert_eq!(present, 1);
    leave(second, 4);
    let (third, present) = join(2);
    assert_eq!(present, 0, "clean session");
    leave(third, 6);
    // MQTT 5 says by an interval how long the session lives: here not at all.
    let mut v5 = rig.raw();
    v5.send(&connect_with(5, "site-1/pump-9", 0, 0, &[], &[]));
    assert_eq!(v5.connack(5), (0, 0));
}

#[test]
fn session_events_wait_for_their_topic_and_hold_up_nothing_else() {
    let rig = Rig::start();
    rig.memory.close_topics(&[DEVICE_SESSION_V1]);
    drop(rig.client(4, "site-1/pump-8"));
    let mut client = rig.client(4, "site-1/pump-7");
    client.send(&publish(4, TOPIC, 1, &reading(1)));
    client.expect_puback(1);
    rig.memory.close_topics(&[]);
    let events: Vec<String> = rig.sessions(3).into_iter().map(|e| e.event).collect();
    assert_eq!(events, ["connected", "disconnected", "connected"], "in order");
}

#[test]
fn session_events_outlast_an_outage_that_is_longer_than_every_time_out() {
    let rig = Rig::start();
    rig.memory.hold();
    let will = [text(TOPIC.as_bytes()), text(&reading(99))].concat();
    let mut dies = rig.raw();
    dies.send(&connect(4, "site-1/pump-7", 6, 0, &will));
    assert_eq!(dies.connack(4).1, 0);
    drop(dies);
    // `connected`, `disconnected` and `will`, sent again after each time-out of the producer.
    for attempt in 1..=6 {
        rig.memory.wait_for(DEVICE_SESSION_V1, 3 * attempt);
        rig.memory.wait_for(DEVICE_TELEMETRY_V1, attempt);
        rig.memory.answer_all(DEVICE_SESSION_V1, Fate::Failed);
        rig.memory.answer_all(DEVICE_TELEMETRY_V1, Fate::Failed);
    }
    rig.memory.flow();
    let events: Vec<String> = rig.sessions(21).into_iter().skip(18).map(|event| event.event).collect();
    assert_eq!(events, ["connected", "disconnected", "will"]);
    let sent = rig.memory.wait_for(DEVICE_TELEMETRY_V1, 7);
    assert_eq!(rig.message(&sent[6]).seq, Some(99), "what the will said");
    until("nothing to wait", || note(&rig, "session_events_waiting") == 0.0);
}

#[test]
fn a_drained_listener_acknowledges_what_kafka_has_and_says_good_bye() {
    let mut rig = Rig::start();
    rig.memory.hold();
    let mut client = rig.client(5, "site-1/pump-7");
    client.send(&publish(5, TOPIC, 1, &reading(1)));
    rig.memory.wait_for(DEVICE_TELEMETRY_V1, 1);
    let address = rig.address();
    let memory = std::sync::Arc::clone(&rig.memory);
    let drained = std::thread::spawn(move || {
        rig.bridge.drain(Duration::from_secs(20));
        rig
    });
    // Nothing listens any more before anything is answered.
    let refused = || std::net::TcpStream::connect(address).is_err();
    let deadline = std::time::Instant::now() + PATIENCE;
    while !refused() {
        assert!(std::time::Instant::now() < deadline, "the listener still accepts");
        std::thread::yield_now();
    }
    memory.flow();
    client.expect_puback(1);
    client.expect(&[0xe0, 2, 0x8b, 0]);
    client.expect_end();
    let rig = drained.join().expect("drains");
    let causes: Vec<Option<String>> = rig.sessions(2).into_iter().map(|e| e.cause).collect();
    assert_eq!(causes, [None, Some("shutdown".to_owned())]);
}

#[test]
fn a_drain_that_kafka_does_not_answer_ends_at_its_deadline_and_acknowledges_nothing() {
    let mut rig = Rig::start();
    rig.memory.hold();
    let mut client = rig.client(5, "site-1/pump-7");
    client.send(&publish(5, TOPIC, 1, &reading(1)));
    rig.memory.wait_for(DEVICE_TELEMETRY_V1, 1);
    let drained = std::thread::spawn(move || {
        rig.bridge.drain(Duration::from_millis(300));
        rig
    });
    client.expect(&[0xe0, 2, 0x8b, 0]);
    client.expect_end();
    drop(client);
    drained.join().expect("drains");
}

#[test]
fn sessions_of_unknown_devices_are_named_after_what_they_publish() {
    let rig = Rig::start();
    let mut client = rig.client(4, "DVES_1234");
    client.send(&publish(4, TOPIC, 1, &reading(1)));
    client.expect_puback(1);
    let events = rig.sessions(1);
    assert_eq!((events[0].site_id.as_str(), events[0].device_id.as_str()), ("site-1", "pump-7"));
    let silent = rig.client(4, "a b");
    drop(silent);
    let events = rig.sessions(3);
    assert_eq!((events[1].site_id.as_str(), events[1].device_id.as_str()), ("unknown", "a_b"));
}

#[test]
fn a_delayed_will_is_void_when_its_client_comes_back_in_time() {
    let rig = Rig::start();
    // Will Delay Interval 1 s; Session Expiry Interval 60 s.
    let will = |seq: u64| [vec![5, 0x18, 0, 0, 0, 1], text(TOPIC.as_bytes()), text(&reading(seq))].concat();
    let join = |id: &str, seq: u64| {
        let mut raw = rig.raw();
        raw.send(&connect_with(5, id, 4, 0, &[0x11, 0, 0, 0, 60], &will(seq)));
        assert_eq!(raw.connack(5).1, 0);
        raw
    };
    drop(join("site-1/back", 1));
    rig.sessions(2);
    let mut back = join("site-1/back", 2);
    drop(join("site-1/gone", 3));
    let sent = rig.memory.wait_for(DEVICE_TELEMETRY_V1, 1);
    assert_eq!(rig.message(&sent[0]).seq, Some(3), "the older will was voided");
    back.ping();
}

#[test]
fn a_client_that_left_again_does_not_get_the_will_it_had_before() {
    let rig = Rig::with(|l| l.workers = 2);
    // Will Delay Interval as given; Session Expiry Interval 60 s.
    let will = |delay: u8, seq: u64| {
        [vec![5, 0x18, 0, 0, 0, delay], text(TOPIC.as_bytes()), text(&reading(seq))].concat()
    };
    let join = |id: &str, flags: u8, rest: &[u8]| {
        let mut raw = rig.raw();
        raw.send(&connect_with(5, id, flags, 0, &[0x11, 0, 0, 0, 60], rest));
        assert_eq!(raw.connack(5).1, 0);
        raw
    };
    drop(join("site-1/back", 4, &will(1, 1)));
    rig.sessions(2);
    let mut back = join("site-1/back", 0, &[]);
    back.send(&[0xe0, 0]);
    back.expect_end();
    drop(join("site-1/gone", 4, &will(2, 2)));
    let sent = rig.memory.wait_for(DEVICE_TELEMETRY_V1, 1);
    assert_eq!(rig.message(&sent[0]).seq, Some(2), "the older will was voided when its client came back");
}

#[test]
fn wills_that_wait_for_their_delay_are_published_when_the_instance_is_drained() {
    let mut rig = Rig::start();
    let will = [vec![5, 0x18, 0, 0, 0, 60], text(TOPIC.as_bytes()), text(&reading(1))].concat();
    let mut lost = rig.raw();
    lost.send(&connect_with(5, "site-1/lost", 4, 0, &[0x11, 0, 0, 0, 60], &will));
    assert_eq!(lost.connack(5).1, 0);
    drop(lost);
    rig.sessions(2);
    rig.bridge.drain(PATIENCE);
    assert_eq!(rig.memory.of(DEVICE_TELEMETRY_V1).len(), 1, "its session ends with the instance");
}

#[test]
fn wills_that_wait_are_bounded_in_bytes() {
    let rig = Rig::with(|l| l.bounds.asides_bytes_max = 8_000);
    let leave = |id: &str, letter: u8| {
        let will = [vec![5, 0x18, 0, 0, 0, 60], text(TOPIC.as_bytes()), text(&[letter; 4_500])].concat();
        let mut raw = rig.raw();
        raw.send(&connect_with(5, id, 4, 0, &[0x11, 0, 0, 0, 60], &will));
        assert_eq!(raw.connack(5).1, 0);
    };
    leave("site-1/first", b'a');
    rig.sessions(2);
    leave("site-1/second", b'b');
    let letters = rig.memory.wait_for(TELEMETRY_DLT, 1);
    assert_eq!(letters[0].value, [b'b'; 4_500], "there is no room for it to wait");
}

#[test]
fn a_drained_listener_waits_for_connections_that_take_their_last_bytes() {
    let mut rig = Rig::with(|l| l.bounds.open_publishes_max = 1);
    rig.memory.hold();
    let mut client = rig.client(5, "site-1/pump-7");
    client.send(&publish(5, TOPIC, 1, &reading(1)));
    rig.memory.wait_for(DEVICE_TELEMETRY_V1, 1);
    // More than the system holds for a connection that is not read.
    let mut sender = Raw(client.0.try_clone().expect("clones"));
    let sends = std::thread::spawn(move || {
        let packets: Vec<u8> = (0..100).flat_map(|_| publish(5, TOPIC, 2, &[b'x'; 100_000])).collect();
        sender.0.write_all(&packets)
    });
    let memory = std::sync::Arc::clone(&rig.memory);
    let drained = std::thread::spawn(move || {
        rig.bridge.drain(PATIENCE);
        rig
    });
    memory.flow();
    client.expect_puback(1);
    client.expect(&[0xe0, 2, 0x8b, 0]);
    client.expect_end();
    sends.join().expect("ends").expect("the connection is not reset");
    drop(client);
    drained.join().expect("drains");
}
