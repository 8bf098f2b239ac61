//! What happens at the bounds of the listener, as docs/bounds.md says it.

use super::support::*;
use std::io::{Read as _, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use throughline_model::topics::{DEVICE_SESSION_V1, DEVICE_TELEMETRY_V1};
use throughline_telemetry::{Metric, counter};

/// Bytes that the listener reads at once.
const ONE_READ: u64 = 64 << 10;

/// Returns a number of what the listener says of itself.
pub fn note(rig: &Rig, name: &str) -> f64 {
    rig.health.status()["roles"]["bridge"]["notes"]["listener"][name].as_f64().unwrap_or_default()
}

/// Publishes `1..=count` of a device, each of about `bytes` bytes.
fn publishes(device: &str, count: u16, bytes: usize) -> Vec<u8> {
    let topic = format!("tl/site-1/{device}/telemetry");
    let pad = "x".repeat(bytes);
    let payload = |seq| format!(r#"{{"epoch":1,"seq":{seq},"values":{{"pad":"{pad}"}}}}"#).into_bytes();
    (1..=count).flat_map(|id| publish(5, &topic, id, &payload(id))).collect()
}

#[test]
fn reading_pauses_at_the_bound_of_open_bytes_and_goes_on_after_it() {
    let rig = Rig::with(|l| l.bounds.open_bytes_max = 2_500);
    rig.memory.hold();
    let mut client = rig.client(5, "site-1/pump-7");
    client.send(&publishes("pump-7", 9, 1_000));
    rig.memory.wait_for(DEVICE_TELEMETRY_V1, 3);
    until("the pause", || note(&rig, "connections_paused") == 1.0);
    assert_eq!(rig.memory.of(DEVICE_TELEMETRY_V1).len(), 3, "the third passes the bound, the fourth waits");
    until("an age", || note(&rig, "oldest_open_seconds") > 0.2);
    rig.memory.flow();
    (1..=9).for_each(|id| client.expect_puback(id));
    until("no age", || note(&rig, "oldest_open_seconds") == 0.0);
}

#[test]
fn a_client_that_takes_no_bytes_is_not_read() {
    let rig = Rig::with(|l| l.bounds.out_bytes_max = 1_000);
    let mut client = rig.client(5, "site-1/pump-7");
    let mut sender = Raw(client.0.try_clone().expect("clones"));
    let is_enough = Arc::new(AtomicBool::new(false));
    let asked = Arc::clone(&is_enough);
    let sends = std::thread::spawn(move || {
        let pings = [0xc0, 0].repeat(32 << 10);
        let mut count = 0;
        while !asked.load(Ordering::Relaxed) {
            sender.send(&pings);
            count += 32 << 10;
        }
        sender.send(&[0xe0, 0]);
        count
    });
    until("the pause", || note(&rig, "connections_paused") == 1.0);
    is_enough.store(true, Ordering::Relaxed);
    assert!(note(&rig, "buffer_bytes") < 2.0 * ONE_READ as f64, "what waits for the client is bounded");
    let mut answers = Vec::new();
    client.0.read_to_end(&mut answers).expect("it ends with the good-bye");
    assert_eq!(answers.len(), 2 * sends.join().expect("ends"), "every answer comes once the client reads");
    assert!(answers.chunks(2).all(|answer| answer == [0xd0, 0]));
}

#[test]
fn what_all_connections_hold_is_bounded_and_nothing_of_it_is_lost() {
    let rig = Rig::with(|l| {
        l.bounds.open_publishes_max = 1;
        l.bounds.held_bytes_max = 100_000;
    });
    rig.memory.hold();
    let devices = ["pump-1", "pump-2", "pump-3", "pump-4"];
    let mut clients: Vec<Raw> = devices.iter().map(|d| rig.client(5, &format!("site-1/{d}"))).collect();
    rig.memory.wait_for(DEVICE_SESSION_V1, 4);
    for (client, device) in clients.iter_mut().zip(devices).take(3) {
        client.send(&publishes(device, 60, 1_000));
    }
    until("the bound", || note(&rig, "held_bytes") >= 100_000.0);
    // The fourth is nowhere near a bound of its own, and is not read all the same.
    clients[3].send(&publishes("pump-4", 1, 10));
    until("the pause of all", || note(&rig, "connections_paused") == 4.0);
    assert!(note(&rig, "held_bytes") < (100_000 + ONE_READ) as f64, "at most one read more");
    assert!(rig.memory.of(DEVICE_TELEMETRY_V1).iter().all(|sent| sent.key != b"site-1/pump-4"));
    rig.memory.flow();
    clients[3].expect_puback(1);
    for client in &mut clients[..3] {
        (1..=60).for_each(|id| client.expect_puback(id));
    }
    assert_eq!(rig.memory.of(DEVICE_TELEMETRY_V1).len(), 181);
    until("room", || note(&rig, "held_bytes") == 0.0);
}

#[test]
fn part_of_a_packet_does_not_take_the_room_of_all() {
    let rig = Rig::with(|l| l.bounds.held_bytes_max = 10_000);
    let before = Before::disconnects("held_bytes");
    let mut slow = with_will(&rig, "site-1/slow");
    slow.send(&packet(0x30, &[0; 100_000])[..20_000]);
    slow.expect(&[0xe0, 2, 0x97, 0]);
    slow.expect_end();
    before.grew_by(1);
    let mut other = rig.client(4, "site-1/pump-7");
    other.send(&publish(4, TOPIC, 1, &reading(1)));
    other.expect_puback(1);
    // What is said of a connection is said before it ends. Its client did nothing wrong, so no will.
    let events = events(&rig, 3);
    assert_eq!(events[..2], ["slow connected ", "slow disconnected held_bytes"]);
    assert_eq!(events[2..], ["pump-7 connected "]);
    assert_eq!(rig.memory.of(DEVICE_TELEMETRY_V1).len(), 1);
}

/// Connects with a will that says reading 99 of its device.
fn with_will(rig: &Rig, id: &str) -> Raw {
    let topic = format!("tl/{id}/telemetry");
    let mut raw = rig.raw();
    raw.send(&connect(5, id, 6, 0, &[vec![0], text(topic.as_bytes()), text(&reading(99))].concat()));
    assert_eq!(raw.connack(5), (0, 0));
    raw
}

/// Waits for so many session events and returns device, event and cause of all.
fn events(rig: &Rig, count: usize) -> Vec<String> {
    let said = rig.sessions(count);
    said.iter().map(|s| format!("{} {} {}", s.device_id, s.event, s.cause.as_deref().unwrap_or(""))).collect()
}

#[test]
fn who_takes_no_bytes_is_closed_where_all_wait_for_its_room() {
    let rig = Rig::with(|l| {
        l.bounds.out_bytes_max = 1_000;
        // Half a ping has room, two whole ones have none.
        l.bounds.held_bytes_max = 4;
    });
    let before = Before::disconnects("out_bytes");
    let mut other = rig.client(4, "site-1/pump-7");
    let clogs = with_will(&rig, "site-1/clogs");
    let mut sender = clogs.0.try_clone().expect("clones");
    let pings = [0xc0_u8, 0].repeat(32 << 10);
    let sends = std::thread::spawn(move || while sender.write_all(&pings).is_ok() {});
    let sent = rig.memory.wait_for(DEVICE_TELEMETRY_V1, 1);
    assert_eq!(rig.message(&sent[0]).seq, Some(99), "the will: this client does not do its part");
    let events = events(&rig, 4);
    assert_eq!(events[2..], ["clogs disconnected out_bytes", "clogs will "]);
    other.send(&publish(4, TOPIC, 1, &reading(1)));
    other.expect_puback(1);
    sends.join().expect("its connection ends");
    before.grew_by(1);
}

#[test]
fn a_packet_above_the_bound_closes_its_connection() {
    for level in [4, 5] {
        let rig = Rig::with(|l| l.bounds.packet_bytes_max = 1_000);
        let before = Before::refused("packet_too_large");
        let mut client = rig.client(level, "site-1/pump-7");
        client.send(&publish(level, TOPIC, 1, &[b'x'; 1_000]));
        if level == 5 {
            client.expect(&[0xe0, 2, 0x95, 0]);
        }
        client.expect_end();
        before.grew_by(1);
        assert!(rig.memory.of(DEVICE_TELEMETRY_V1).is_empty());
    }
}

#[test]
fn mqtt_5_is_told_the_bounds_of_publishes_and_packets() {
    let rig = Rig::with(|l| {
        l.bounds.open_publishes_max = 300;
        l.bounds.packet_bytes_max = 70_000;
    });
    let mut raw = rig.raw();
    raw.send(&connect(5, "site-1/pump-7", 2, 0, &[]));
    let connack = raw.read().expect("a CONNACK");
    let tells = |property: &[u8]| connack.windows(property.len()).any(|window| window == property);
    assert!(tells(&[0x21, 0x01, 0x2c]), "Receive Maximum: {connack:x?}");
    assert!(tells(&[0x27, 0x00, 0x01, 0x11, 0x70]), "Maximum Packet Size: {connack:x?}");
}

#[test]
fn a_client_id_that_is_too_long_is_refused() {
    let rig = Rig::start();
    let before = Before::connects("client_id_too_long");
    for (level, code) in [(4, 2), (5, 0x85)] {
        let mut raw = rig.raw();
        raw.send(&connect(level, &"x".repeat(1_025), 2, 0, &[]));
        assert_eq!(raw.connack(level), (0, code));
        raw.expect_end();
        rig.client(level, &"x".repeat(1_024)).ping();
    }
    before.grew_by(2);
}

#[test]
fn wills_of_all_connections_are_bounded_in_bytes() {
    let rig = Rig::with(|l| l.bounds.wills_bytes_max = 1_000);
    let connects = |level: u8, id: &str| {
        let properties: &[u8] = if level == 5 { &[0] } else { &[] };
        let will = [properties, &text(TOPIC.as_bytes()), &text(&[b'w'; 700])].concat();
        let mut raw = rig.raw();
        raw.send(&connect(level, id, 6, 0, &will));
        let (_, code) = raw.connack(level);
        (raw, code)
    };
    let before = Before::connects("wills_bytes_max");
    let (first, code) = connects(5, "site-1/first");
    assert_eq!(code, 0);
    assert_eq!((connects(4, "site-1/second").1, connects(5, "site-1/second").1), (3, 0x97));
    before.grew_by(2);
    rig.client(4, "site-1/without").ping();
    drop(first);
    until("room", || connects(4, "site-1/second").1 == 0);
}

#[test]
fn session_events_beyond_their_bound_are_lost_and_counted() {
    let lost = || counter(Metric::MqttSessionEventsLostTotal, &[]).value();
    // Of three events one has room: as one of a number, or by its bytes, of which each takes 200 to 300.
    for (asides_max, asides_bytes_max) in [(1, 1 << 20), (10_000, 400)] {
        let rig =
            Rig::with(|l| (l.bounds.asides_max, l.bounds.asides_bytes_max) = (asides_max, asides_bytes_max));
        let before = lost();
        rig.memory.hold();
        let mut clients: Vec<Raw> = (0..3).map(|n| rig.client(4, &format!("site-1/pump-{n}"))).collect();
        clients.iter_mut().for_each(Raw::ping);
        assert_eq!(rig.memory.of(DEVICE_SESSION_V1).len(), 1, "{asides_bytes_max}");
        assert!(lost() >= before + 2, "{} and {before}", lost());
    }
}

#[test]
fn a_longer_life_of_a_session_than_the_bound_is_told() {
    let rig = Rig::with(|l| l.bounds.session_expiry_max_s = 60);
    for (asked, is_told) in [(86_400u32, true), (60, false)] {
        let mut raw = rig.raw();
        let property = [&[0x11][..], &asked.to_be_bytes()].concat();
        raw.send(&connect_with(5, "site-1/pump-7", 0, 0, &property, &[]));
        let connack = raw.read().expect("a CONNACK");
        let told = connack.windows(5).any(|window| window == [0x11, 0, 0, 0, 60]);
        assert_eq!(told, is_told, "{asked}: {connack:?}");
    }
}
