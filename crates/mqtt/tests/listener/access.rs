//! Who may connect, and what is refused.

use super::support::*;
use super::{TELEMETRY_DLT, UNMATCHED};
use std::io::Write as _;
use throughline_model::topics::DEVICE_TELEMETRY_V1;
use throughline_mqtt::LoginConfig;

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
    let before = Before::disconnects("connect_deadline");
    let crowd: Vec<Raw> = (0..20).map(|_| join("slow")).collect();
    for mut raw in crowd {
        raw.expect_end();
    }
    before.grew_by(20);
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
fn more_connections_than_the_bound_are_closed_as_they_come() {
    let rig = Rig::with(|l| l.bounds.connections_max = 2);
    let before = Before::connects("connections_max");
    let mut first = rig.client(4, "a");
    let second = rig.client(4, "b");
    rig.raw().expect_end();
    before.grew_by(1);
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
fn subscriptions_of_a_session_are_bounded() {
    for (level, refused) in [(4, 0x80), (5, 0x97)] {
        let rig = Rig::start();
        let before = Before::refused("subscription");
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
        before.grew_by(2);
    }
}
