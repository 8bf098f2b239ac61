//! What becomes of publishes: acknowledgements, pauses, dead letters.

use super::bounds::note;
use super::support::*;
use super::{TELEMETRY_DLT, UNMATCHED};
use std::time::Duration;
use throughline_model::topics::{DEVICE_SESSION_V1, DEVICE_TELEMETRY_V1, SERVICE_PLATFORM_LOCATOR_V1};
use throughline_mqtt::inbox::Token;
use throughline_runtime::ports::Fate;

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
        let before = Before::disconnects("delivery_failed");
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
        before.grew_by(1);
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
    until("the pause", || note(&rig, "connections_paused") == 3.0);
    assert_eq!(rig.memory.of(DEVICE_TELEMETRY_V1).len(), 2, "with three session events it is full");
    until("the role to be not ready", || rig.health.unready().concat().contains("queue is full"));
    rig.memory.flow();
    until("the role to be ready", || rig.health.unready().is_empty());
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
fn health_says_for_how_long_kafka_acknowledged_nothing() {
    let rig = Rig::start();
    until("Kafka to be up", || rig.dependency("kafka")["up"] == true);
    rig.memory.is_silent_for(Duration::from_secs(47));
    until("Kafka to be down", || rig.dependency("kafka")["up"] == false);
    let said = rig.dependency("kafka")["message"].to_string();
    assert!(said.contains("no acknowledgement for 47 s"), "{said}");
    rig.memory.is_silent_for(Duration::ZERO);
    until("Kafka to be up again", || rig.dependency("kafka")["up"] == true);
}

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
