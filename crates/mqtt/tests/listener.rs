//! The listener on a real socket, with raw bytes, over an in-memory Kafka.

mod support;

use proptest::prelude::*;
use std::io::Write as _;
use std::time::Duration;
use support::*;
use throughline_model::topics::{DEVICE_SESSION_V1, DEVICE_TELEMETRY_V1, SERVICE_PLATFORM_LOCATOR_V1};
use throughline_mqtt::LoginConfig;
use throughline_mqtt::inbox::Token;
use throughline_runtime::ports::Fate;

const UNMATCHED: &str = "device.unmatched.v1.bridge-dlt";
const TELEMETRY_DLT: &str = "device.telemetry.v1.bridge-dlt";

#[test]
fn a_puback_follows_kafkas_acknowledgement_in_order() {
    for level in [4, 5] {
        let rig = Rig::start();
        rig.memory.hold();
        let mut client = rig.client(level, "site-1/pump-7");
        let packets: Vec<u8> =
            (1..=3).flat_map(|n| publish(level, TOPIC, n, &reading(u64::from(n)))).collect();
        client.send(&packets);
        rig.memory.wait_for(DEVICE_TELEMETRY_V1, 3);
        client.ping();
        rig.memory.answer(3, true, &rig.codec);
        client.ping();
        rig.memory.answer(1, true, &rig.codec);
        client.expect_puback(1);
        rig.memory.answer(2, true, &rig.codec);
        client.expect_puback(2);
        client.expect_puback(3);
    }
}

#[test]
fn a_failed_delivery_closes_the_connection_and_holds_every_later_puback() {
    for level in [4, 5] {
        let rig = Rig::start();
        rig.memory.hold();
        let mut client = rig.client(level, "site-1/pump-7");
        for n in 1..=3 {
            client.send(&publish(level, TOPIC, n, &reading(u64::from(n))));
        }
        rig.memory.wait_for(DEVICE_TELEMETRY_V1, 3);
        rig.memory.answer(3, true, &rig.codec);
        rig.memory.answer(1, true, &rig.codec);
        client.expect_puback(1);
        rig.memory.answer(2, false, &rig.codec);
        if level == 5 {
            client.expect(&[0xe0, 2, 0x89, 0]);
        }
        client.expect_end();
        // The client comes back and sends again; nothing of the old connection is acknowledged to it.
        rig.memory.flow();
        let mut again = rig.client(level, "site-1/pump-7");
        again.send(&publish_flags(level, TOPIC, 2, &reading(2), 8));
        again.expect_puback(2);
        let sent = rig.memory.wait_for(DEVICE_TELEMETRY_V1, 4);
        let ids: Vec<String> = sent.iter().map(|s| rig.message(s).message_id).collect();
        assert_eq!(ids[1], ids[3], "a resent message has the same id");
    }
}

#[test]
fn reading_pauses_at_the_bound_of_open_publishes_and_goes_on_after_it() {
    let rig = Rig::with(|l| l.bounds.open_publishes_max = 4);
    rig.memory.hold();
    let mut client = rig.client(4, "site-1/pump-7");
    let packets: Vec<u8> = (1..=9).flat_map(|n| publish(4, TOPIC, n, &reading(u64::from(n)))).collect();
    client.send(&packets);
    client.send(&[0xc0, 0]);
    rig.memory.wait_for(DEVICE_TELEMETRY_V1, 4);
    let mut other = rig.client(4, "site-1/pump-8");
    other.ping();
    other.ping();
    assert_eq!(rig.memory.of(DEVICE_TELEMETRY_V1).len(), 4, "the fifth is not read");
    rig.memory.flow();
    for n in 1..=9 {
        client.expect_puback(n);
    }
    client.expect(&[0xd0, 0]);
}

#[test]
fn a_full_producer_queue_pauses_reading_and_loses_nothing() {
    let rig = Rig::start();
    rig.memory.hold();
    let mut clients: Vec<Raw> = (0..3).map(|n| rig.client(4, &format!("site-1/pump-{n}"))).collect();
    rig.memory.wait_for(DEVICE_SESSION_V1, 3);
    rig.memory.capacity(Some(5));
    for (n, client) in clients.iter_mut().enumerate() {
        let topic = format!("tl/site-1/pump-{n}/telemetry");
        let packets: Vec<u8> =
            (1..=6).flat_map(|id| publish(4, &topic, id, &reading(u64::from(id)))).collect();
        client.send(&packets);
    }
    rig.memory.wait_for(DEVICE_TELEMETRY_V1, 2);
    rig.memory.flow();
    for client in &mut clients {
        for id in 1..=6 {
            client.expect_puback(id);
        }
    }
    let sent = rig.memory.of(DEVICE_TELEMETRY_V1);
    assert_eq!(sent.len(), 18);
    for n in 0..3 {
        let key = format!("site-1/pump-{n}").into_bytes();
        let seqs: Vec<Option<i64>> =
            sent.iter().filter(|s| s.key == key).map(|s| rig.message(s).seq).collect();
        assert_eq!(seqs, (1..=6).map(Some).collect::<Vec<_>>(), "in order");
    }
}

#[test]
fn a_list_is_acknowledged_after_all_its_records_and_outside_ids_are_located() {
    let rig = Rig::start();
    rig.memory.hold();
    let mut client = rig.client(4, "site-1/pump-7");
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let payload = format!(
        r#"[{{"epoch":1,"seq":1,"values":{{"t":1}}}}, {{"epoch":1,"seq":2,"trace_id":"{trace}","values":{{"t":2}}}}]"#
    );
    client.send(&publish(4, TOPIC, 1, payload.as_bytes()));
    let located = rig.memory.wait_for(SERVICE_PLATFORM_LOCATOR_V1, 1);
    assert_eq!(located[0].key, trace.as_bytes());
    rig.memory.answer(1, true, &rig.codec);
    rig.memory.answer(2, true, &rig.codec);
    client.ping();
    rig.memory.flow();
    client.expect_puback(1);
    let sent = rig.memory.of(DEVICE_TELEMETRY_V1);
    assert_eq!(rig.message(&sent[1]).trace_id, trace);
    assert!(sent[1].header("traceparent").starts_with(&format!("00-{trace}-")));
}

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
    rig.raw().expect_end();
    let mut half = rig.raw();
    half.send(&[0x10]);
    half.expect_end();
    let mut lives = rig.client(4, "site-1/pump-7");
    let mut second = rig.raw();
    second.expect_end();
    lives.ping();
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
fn what_is_not_supported_is_answered_as_documented() {
    let qos2 = |level| {
        let body = [&text(TOPIC.as_bytes())[..], &[0, 1], if level == 5 { &[0][..] } else { &[] }].concat();
        packet(0x34, &body)
    };
    let large = |level| publish(level, TOPIC, 1, &vec![b'x'; 70_000]);
    let retain = |level| publish_flags(level, TOPIC, 1, &reading(1), 1);
    for (level, bytes, answer) in [
        (4, qos2(4), None),
        (5, qos2(5), Some([0xe0, 2, 0x9b, 0])),
        (4, large(4), None),
        (5, large(5), Some([0xe0, 2, 0x95, 0])),
        (5, retain(5), Some([0xe0, 2, 0x9a, 0])),
        (4, packet(0x32, b"\0\x03a/b\0\0"), None),
        (5, packet(0x30, b"\0\x03a/+\0x"), Some([0xe0, 2, 0x90, 0])),
        (4, vec![0xc1, 0], None),
        (5, packet(0xf0, &[]), Some([0xe0, 2, 0x82, 0])),
    ] {
        let rig = Rig::with(|l| l.bounds.packet_bytes_max = 65_536);
        let mut client = rig.client(level, "site-1/pump-7");
        // The listener may close before it has read all of an oversized packet.
        let _ = client.0.write_all(&bytes);
        if let Some(answer) = answer {
            client.expect(&answer);
        }
        client.expect_end();
        assert!(rig.memory.of(DEVICE_TELEMETRY_V1).is_empty());
    }
    let rig = Rig::start();
    let mut client = rig.client(4, "site-1/pump-7");
    client.send(&retain(4));
    client.expect_puback(1);
}

#[test]
fn what_does_not_decode_or_matches_no_feed_is_dead_lettered_and_then_acknowledged() {
    for level in [4, 5] {
        let rig = Rig::start();
        rig.memory.hold();
        let mut client = rig.client(level, "site-1:pump-7");
        client.send(&publish(level, TOPIC, 1, b"\xff{not json"));
        client.send(&publish(level, "somewhere/else", 2, b"\0\x01\x02"));
        client.send(&publish(level, TOPIC, 3, br#"[{"values":{"t":1}},{"values":7}]"#));
        let garbage = rig.memory.wait_for(TELEMETRY_DLT, 2);
        let unmatched = rig.memory.wait_for(UNMATCHED, 1);
        client.ping();
        rig.memory.flow();
        for id in 1..=3 {
            client.expect_puback(id);
        }
        assert_eq!(garbage[0].value, b"\xff{not json");
        assert_eq!(garbage[1].value, br#"[{"values":{"t":1}},{"values":7}]"#);
        assert_eq!(
            (unmatched[0].value.as_slice(), unmatched[0].key.as_slice()),
            (&b"\0\x01\x02"[..], &b"site-1:pump-7"[..])
        );
        for (name, value) in [
            ("tl-mqtt-topic", TOPIC),
            ("tl-mqtt-client-id", "site-1:pump-7"),
            ("__connect.errors.connector.name", "bridge"),
            ("__connect.errors.exception.class.name", "payload_not_utf8"),
            ("tl-mqtt-properties", "[]"),
        ] {
            assert_eq!(garbage[0].header(name), value, "{name}");
        }
        assert_eq!(garbage[1].header("__connect.errors.exception.class.name"), "values_not_object");
        assert_eq!(unmatched[0].header("__connect.errors.exception.class.name"), "topic_unmatched");
        assert!(rig.memory.of(DEVICE_TELEMETRY_V1).is_empty(), "no element of a bad list is accepted");
    }
}

#[test]
fn a_record_that_kafka_does_not_take_is_dead_lettered_or_closes_the_connection() {
    let rig = Rig::start();
    rig.memory.bytes_max(200);
    let mut client = rig.client(5, "s/d");
    let values: Vec<String> = (0..9).map(|n| format!("\"long-name-{n}\":1")).collect();
    let payload = format!(r#"{{"values":{{{}}}}}"#, values.join(","));
    assert!(payload.len() < 200);
    client.send(&publish(5, "tl/s/d/telemetry", 1, payload.as_bytes()));
    client.expect_puback(1);
    assert_eq!(rig.memory.of(TELEMETRY_DLT)[0].value, payload.as_bytes());
    client.send(&publish(5, "tl/s/d/telemetry", 2, &[b' '; 300]));
    client.expect(&[0xe0, 2, 0x95, 0]);
    client.expect_end();
}

/// A topic that is missing, or that we may not write to, is the platform's fault: nothing is dead-lettered.
#[test]
fn a_topic_that_takes_nothing_holds_its_own_publishes_and_no_others() {
    let rig = Rig::start();
    let mut first = rig.client(4, "site-1/pump-7");
    let mut second = rig.client(4, "site-1/pump-8");
    rig.memory.wait_for(DEVICE_SESSION_V1, 2);
    // Both find the producer full, the first one first.
    rig.memory.capacity(Some(0));
    let status = || rig.health.status()["roles"]["bridge"]["notes"]["listener"].clone();
    first.send(&publish(4, TOPIC, 1, &reading(1)));
    until("one to wait", || status()["connections_waiting_for_producer"] == 1);
    second.send(&publish(4, "somewhere/else", 1, b"x"));
    until("both to wait", || status()["connections_waiting_for_producer"] == 2);
    rig.memory.close_topics(&[DEVICE_TELEMETRY_V1]);
    rig.memory.capacity(None);
    second.expect_puback(1);
    until("the topic to be said", || rig.dependency("kafka")["up"] == false);
    let said = rig.dependency("kafka")["message"].to_string();
    assert!(said.contains(DEVICE_TELEMETRY_V1) && said.contains("does not exist"), "{said}");
    until("the count", || status()["connections_waiting_for_topics"] == 1);
    assert!(rig.health.unready().is_empty(), "others are served");
    // A publish that meets the missing topic at once waits as well.
    let mut third = rig.client(4, "site-1/pump-9");
    third.send(&publish(4, TOPIC, 1, &reading(3)));
    until("the third to wait", || status()["connections_waiting_for_topics"] == 2);
    second.send(&publish(4, "somewhere/else", 2, b"y"));
    second.expect_puback(2);
    rig.memory.close_topics(&[]);
    first.expect_puback(1);
    third.expect_puback(1);
    assert_eq!(rig.dependency("kafka")["up"], true);
    assert!(rig.memory.of(TELEMETRY_DLT).is_empty(), "a fault of the platform is never dead-lettered");
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
fn a_record_that_kafka_refuses_after_it_was_taken_is_dead_lettered_when_it_comes_again() {
    for level in [4, 5] {
        let rig = Rig::start();
        rig.memory.hold();
        let mut client = rig.client(level, "site-1/pump-7");
        client.send(&publish(level, TOPIC, 1, &reading(1)));
        client.send(&publish(level, TOPIC, 2, &reading(2)));
        rig.memory.wait_for(DEVICE_TELEMETRY_V1, 2);
        rig.memory.answer_with(1, Fate::Refused, &rig.codec);
        if level == 5 {
            client.expect(&[0xe0, 2, 0x89, 0]);
        }
        client.expect_end();
        // Also an answer that comes when the connection is gone says what is to become of its publish.
        drop(client);
        rig.sessions(2);
        rig.memory.answer_with(2, Fate::Refused, &rig.codec);
        rig.memory.flow();
        let mut again = rig.client(level, "site-1/pump-7");
        again.send(&publish_flags(level, TOPIC, 1, &reading(1), 8));
        again.send(&publish_flags(level, TOPIC, 2, &reading(2), 8));
        again.expect_puback(1);
        again.expect_puback(2);
        let letters = rig.memory.of(TELEMETRY_DLT);
        assert_eq!(letters.iter().map(|s| s.value.clone()).collect::<Vec<_>>(), [reading(1), reading(2)]);
        assert_eq!(letters[0].header("__connect.errors.exception.class.name"), "record_refused");
        assert_eq!(rig.memory.of(DEVICE_TELEMETRY_V1).len(), 2, "it is not sent to be refused again");
        // Once, and to this client only: what is sent later takes its ordinary path.
        again.send(&publish(level, TOPIC, 3, &reading(1)));
        again.expect_puback(3);
        assert_eq!(rig.memory.of(DEVICE_TELEMETRY_V1).len(), 3);
    }
}

#[test]
fn a_list_of_which_one_record_cannot_be_sent_is_dead_lettered_when_it_comes_again() {
    let rig = Rig::start();
    rig.memory.hold();
    rig.memory.bytes_max(400);
    let mut client = rig.client(5, "site-1/pump-7");
    let values: Vec<String> = (0..9).map(|n| format!("\"a-rather-long-name-{n}\":1")).collect();
    let list = format!(
        r#"[{{"epoch":1,"seq":1,"values":{{"t":1}}}},{{"epoch":1,"seq":2,"values":{{{}}}}}]"#,
        values.join(",")
    );
    assert!(list.len() < 400);
    client.send(&publish(5, TOPIC, 1, list.as_bytes()));
    client.expect(&[0xe0, 2, 0x95, 0]);
    client.expect_end();
    let first = rig.memory.wait_for(DEVICE_TELEMETRY_V1, 1);
    assert_eq!(first.len(), 1);
    // The fate of the first record is open, so the slot of its connection is too.
    let mut again = rig.client(5, "site-1/pump-7");
    again.send(&publish(5, TOPIC, 1, list.as_bytes()));
    let letters = rig.memory.wait_for(TELEMETRY_DLT, 1);
    assert_eq!(letters[0].value, list.as_bytes());
    assert_ne!(Token::unpack(first[0].token).slot, Token::unpack(letters[0].token).slot);
    rig.memory.flow();
    again.expect_puback(1);
    assert_eq!(rig.memory.of(DEVICE_TELEMETRY_V1).len(), 1);
}

#[test]
fn a_locator_that_cannot_be_sent_is_dropped_and_its_message_is_not() {
    let rig = Rig::start();
    rig.memory.break_topic(SERVICE_PLATFORM_LOCATOR_V1);
    let mut client = rig.client(4, "site-1/pump-7");
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let payload = format!(r#"{{"epoch":1,"seq":1,"trace_id":"{trace}","values":{{"t":1}}}}"#);
    client.send(&publish(4, TOPIC, 1, payload.as_bytes()));
    client.expect_puback(1);
    assert_eq!(rig.memory.of(DEVICE_TELEMETRY_V1).len(), 1);
    assert!(rig.memory.of(TELEMETRY_DLT).is_empty());
}

fn login(user: &str, sites: &[&str], devices: &[&str]) -> LoginConfig {
    LoginConfig {
        user: user.to_owned(),
        // PBKDF2-HMAC-SHA-512 of "secret" with the salt "salt", 2 rounds, as mosquitto_passwd writes it.
        password_hash: Some(SECRET.to_owned()),
        password_file: None,
        sites: sites.iter().map(|s| (*s).to_owned()).collect(),
        devices: devices.iter().map(|s| (*s).to_owned()).collect(),
    }
}

const SECRET: &str =
    "$7$2$c2FsdA==$TMtUDPp0AWqnd/+crp8/sIDe9TBoinSTYqyuhz7Bo1Kcet/jGTzzeUi20gii7sazW+y1gtJnCAQeYr4zl9ww2A==";

fn credentials(user: &str, password: &str) -> Vec<u8> {
    [text(user.as_bytes()), text(password.as_bytes())].concat()
}

#[test]
fn only_who_may_connect_does() {
    let rig = Rig::with(|l| {
        l.anonymous_on_loopback = false;
        l.logins = vec![login("u", &["site-1"], &[])];
    });
    for (level, flags, rest, code) in [
        (4, 0x02, vec![], 5),
        (5, 0x02, vec![], 0x87),
        (4, 0xc2, credentials("u", "wrong"), 4),
        (5, 0xc2, credentials("u", "wrong"), 0x86),
        (4, 0xc2, credentials("nobody", "secret"), 4),
        (4, 0x82, text(b"u"), 4),
    ] {
        let mut raw = rig.raw();
        raw.send(&connect(level, "c", flags, 0, &rest));
        assert_eq!(raw.connack(level), (0, code), "{level} {rest:?}");
        raw.expect_end();
    }
    // What comes before CONNACK is held until the password is checked.
    let mut raw = rig.raw();
    let early =
        [connect(4, "c", 0xc2, 0, &credentials("u", "secret")), publish(4, TOPIC, 1, &reading(1))].concat();
    raw.send(&early);
    assert_eq!(raw.connack(4), (0, 0));
    raw.expect_puback(1);
    let mut v5 = rig.raw();
    v5.send(&connect_with(5, "c2", 2, 0, b"\x15\0\x01m", &[]));
    assert_eq!(v5.connack(5), (0, 0x8c), "extended authentication");
}

#[test]
fn a_connection_whose_password_is_still_checked_is_closed_at_its_deadline() {
    let rig = Rig::with(|l| {
        l.anonymous_on_loopback = false;
        l.bounds.connect_deadline_ms = 300;
        // So many rounds take longer than the deadline.
        let slow = SECRET.replace("$7$2$", "$7$1000000$");
        l.logins = vec![
            LoginConfig { password_hash: Some(slow), ..login("slow", &["s"], &[]) },
            login("u", &["s"], &[]),
        ];
    });
    let join = |user: &str| {
        let mut raw = rig.raw();
        raw.send(&connect(4, "c", 0xc2, 0, &credentials(user, "secret")));
        raw
    };
    let crowd: Vec<Raw> = (0..20).map(|_| join("slow")).collect();
    for mut raw in crowd {
        raw.expect_end();
    }
    // Those whose turn had not come cost nothing, so another user is soon admitted.
    until("the other user to be admitted", || join("u").read().is_some_and(|connack| connack[3] == 0));
}

#[test]
fn a_login_binds_its_clients_to_their_devices() {
    let rig = Rig::with(|l| {
        l.anonymous_on_loopback = false;
        l.logins = vec![login("site", &["site-1"], &[]), login("device", &["site-1"], &["site-1/pump-7"])];
    });
    let join = |user: &str, level: u8| {
        let mut raw = rig.raw();
        raw.send(&connect(level, &format!("c-{user}-{level}"), 0xc2, 0, &credentials(user, "secret")));
        assert_eq!(raw.connack(level), (0, 0));
        raw
    };
    let mut site = join("site", 5);
    site.send(&publish(5, "tl/site-1/anything/telemetry", 1, &reading(1)));
    site.send(&publish(5, "tl/site-2/pump-7/telemetry", 2, &reading(1)));
    site.send(&publish(5, "tl/site-2/pump-7/telemetry", 3, b"garbage"));
    site.send(&publish(5, "tl/site-1/pump-7/command", 4, &reading(1)));
    site.send(&publish(5, "$SYS/x", 5, &reading(1)));
    site.send(&publish(5, TOPIC, 6, &reading(1)));
    site.expect_puback(1);
    for id in 2..=5 {
        site.expect(&[0x40, 3, 0, id, 0x87]);
    }
    site.expect_puback(6);
    let mut device = join("device", 4);
    device.send(&publish(4, TOPIC, 1, &reading(2)));
    device.expect_puback(1);
    device.send(&publish(4, "tl/site-1/pump-8/telemetry", 2, &reading(2)));
    device.expect_end();
    assert_eq!(rig.memory.of(DEVICE_TELEMETRY_V1).len(), 3);
    assert!(rig.memory.of(UNMATCHED).is_empty() && rig.memory.of(TELEMETRY_DLT).is_empty(), "not stored");
    // A will is checked when the client connects.
    let mut raw = rig.raw();
    let will = [text(b"tl/site-2/x/telemetry"), text(b"{}"), credentials("site", "secret")].concat();
    raw.send(&connect(4, "w", 0xc6, 0, &will));
    assert_eq!(raw.connack(4), (0, 5));
}

#[test]
fn subscriptions_are_granted_for_own_topics_only() {
    let rig = Rig::start();
    let filters = |list: &[&str]| -> Vec<u8> {
        list.iter().flat_map(|f| [text(f.as_bytes()), vec![1]].concat()).collect()
    };
    let list = ["tl/s/d/command", "tl/s/+/command", "tl/s/d/telemetry"];
    let mut v4 = rig.client(4, "s/d");
    v4.send(&packet(0x82, &[vec![0, 7], filters(&list)].concat()));
    v4.expect(&[0x90, 5, 0, 7, 1, 0x80, 0x80]);
    let mut v5 = rig.client(5, "s/e");
    v5.send(&packet(0x82, &[vec![0, 7, 0], filters(&list)].concat()));
    v5.expect(&[0x90, 6, 0, 7, 0, 1, 0xa2, 0x87]);
    v5.send(&packet(0xa2, &[vec![0, 8, 0], text(b"tl/s/d/command"), text(b"x")].concat()));
    v5.expect(&[0xb0, 5, 0, 8, 0, 0, 0x11]);
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
fn an_empty_client_id_is_assigned_one_on_mqtt_5_and_versions_are_checked() {
    let rig = Rig::start();
    let mut v5 = rig.raw();
    v5.send(&connect(5, "", 2, 0, &[]));
    let connack = v5.read().expect("a CONNACK");
    assert!(connack.windows(3).any(|w| w == b"tl-"), "{connack:?}");
    let mut v4 = rig.raw();
    v4.send(&connect(4, "", 0, 0, &[]));
    assert_eq!(v4.connack(4), (0, 2));
    let mut old = rig.raw();
    old.send(&packet(0x10, b"\0\x06MQIsdp\x03\x02\0\0\0\x01c"));
    assert_eq!(old.connack(4), (0, 1));
    old.expect_end();
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
fn a_topic_alias_stands_for_its_topic() {
    let rig = Rig::start();
    let mut client = rig.client(5, "site-1/pump-7");
    let alias = |topic: &str, id: u8, number: u8| {
        let body = [text(topic.as_bytes()), vec![0, id, 3, 0x23, 0, number], reading(u64::from(id))].concat();
        packet(0x32, &body)
    };
    client.send(&alias(TOPIC, 1, 5));
    client.send(&alias("", 2, 5));
    client.expect_puback(1);
    client.expect_puback(2);
    let sent = rig.memory.of(DEVICE_TELEMETRY_V1);
    assert_eq!(rig.message(&sent[1]).seq, Some(2));
    client.send(&alias("", 3, 6));
    client.expect(&[0xe0, 1, 0x94]);
    client.expect_end();
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
fn what_a_client_sends_again_after_a_reconnect_is_counted() {
    use throughline_telemetry::{Metric, counter};
    let rig = Rig::start();
    rig.memory.hold();
    let join = || {
        let mut raw = rig.raw();
        raw.send(&connect(4, "site-1/resends", 0, 0, &[]));
        assert_eq!(raw.connack(4).1, 0);
        raw
    };
    let mut first = join();
    first.send(&publish(4, TOPIC, 7, &reading(7)));
    rig.memory.wait_for(DEVICE_TELEMETRY_V1, 1);
    drop(first);
    rig.sessions(2);
    let resent = counter(Metric::MqttResentTotal, &[("listener", "mqtt")]);
    let before = resent.value();
    let mut second = join();
    second.send(&publish_flags(4, TOPIC, 7, &reading(7), 8));
    rig.memory.wait_for(DEVICE_TELEMETRY_V1, 2);
    second.ping();
    rig.memory.flow();
    second.expect_puback(7);
    assert_eq!(resent.value() - before, 1);
    second.ping();
}

#[test]
fn more_connections_than_the_bound_are_closed_as_they_come() {
    let rig = Rig::with(|l| l.bounds.connections_max = 2);
    let mut first = rig.client(4, "a");
    let second = rig.client(4, "b");
    rig.raw().expect_end();
    drop(second);
    let deadline = std::time::Instant::now() + PATIENCE;
    loop {
        let mut raw = rig.raw();
        let _ = raw.0.write_all(&connect(4, "c", 2, 0, &[]));
        if raw.read().is_some() {
            break;
        }
        assert!(std::time::Instant::now() < deadline, "room was not made");
    }
    first.ping();
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

#[test]
fn subscriptions_of_a_session_are_bounded() {
    for (level, refused) in [(4, 0x80), (5, 0x97)] {
        let rig = Rig::start();
        let mut client = rig.client(level, "s/gateway");
        let subscribe = |names: std::ops::Range<usize>| {
            let mut body = vec![0, 7];
            body.extend((level == 5).then_some(0));
            body.extend(
                names.flat_map(|n| [text(format!("tl/s/d{n}/command").as_bytes()), vec![1]].concat()),
            );
            packet(0x82, &body)
        };
        client.send(&subscribe(0..65));
        let suback = client.read().expect("a SUBACK");
        assert_eq!(suback[suback.len() - 65..], [&[1; 64][..], &[refused]].concat(), "{level}");
        client.send(&subscribe(63..65));
        let suback = client.read().expect("a SUBACK");
        assert_eq!(suback[suback.len() - 2..], [1, refused], "one that is there already is granted again");
    }
}

/// What a conversation led to: the answers, and what was stored.
fn conversation(bytes: &[u8], cuts: &[usize]) -> (Vec<Option<Vec<u8>>>, usize) {
    let rig = Rig::start();
    // PUBACKs would race with the end of the conversation; what is stored tells as much.
    rig.memory.hold();
    let mut raw = rig.raw();
    raw.0.set_nodelay(true).expect("sets");
    let mut from = 0;
    for cut in cuts.iter().copied().chain([bytes.len()]) {
        if raw.0.write_all(&bytes[from..cut]).is_err() {
            break;
        }
        from = cut;
    }
    let _ = raw.0.shutdown(std::net::Shutdown::Write);
    let mut answers = Vec::new();
    loop {
        let answer = raw.read();
        let end = answer.is_none();
        answers.push(answer);
        if end {
            rig.memory.flow();
            return (answers, rig.memory.of(DEVICE_TELEMETRY_V1).len());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn the_result_does_not_depend_on_how_bytes_are_split_over_reads(
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12), damage in any::<Option<(prop::sample::Index, u8)>>()
    ) {
        let mut bytes = [
            connect(4, "site-1/pump-7", 2, 0, &[]), publish(4, TOPIC, 1, &reading(1)),
            publish(4, TOPIC, 0, &reading(2)), vec![0xc0, 0], publish(4, "x", 2, b"y"),
        ].concat();
        if let Some((at, byte)) = damage {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        let mut cuts: Vec<usize> = cuts.iter().map(|c| c.index(bytes.len())).collect();
        cuts.sort_unstable();
        let whole = conversation(&bytes, &[]);
        let split = conversation(&bytes, &cuts);
        prop_assert_eq!(whole.1, split.1);
        prop_assert_eq!(whole.0, split.0);
    }
}
