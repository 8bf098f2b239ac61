//! The client of an existing broker against a broker that the test plays.

mod support;

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};
use support::*;
use throughline_model::topics::DEVICE_TELEMETRY_V1;
use throughline_mqtt::ExternalConfig;
use throughline_runtime::ports::Fate;

const TELEMETRY_DLT: &str = "device.telemetry.v1.bridge-dlt";

/// A broker whose every word the test says.
struct Broker(TcpListener);

/// One connection of the bridge to it.
struct Connection(TcpStream);

impl Broker {
    fn listen() -> Self {
        Self(TcpListener::bind("127.0.0.1:0").expect("a free port"))
    }

    /// Starts a bridge that reads from it with room for `open` messages.
    fn bridge(&self, open: u16) -> Rig {
        let url = format!("mqtt://{}", self.0.local_addr().expect("bound"));
        Rig::external(ExternalConfig { url, open_publishes_max: open, ..ExternalConfig::default() })
    }

    /// Takes a connection and accepts its CONNECT.
    fn accept(&self) -> Connection {
        self.accept_with().0
    }

    /// The same; returns the CONNECT too.
    fn accept_with(&self) -> (Connection, Vec<u8>) {
        let (socket, _) = self.0.accept().expect("accepts");
        socket.set_read_timeout(Some(PATIENCE)).expect("sets");
        let mut connection = Connection(socket);
        let connect = connection.read();
        assert_eq!(connect[0], 0x10, "CONNECT");
        connection.send(&[0x20, 3, 1, 0, 0]);
        (connection, connect)
    }

    /// Takes a connection and grants its subscriptions.
    fn serve(&self) -> Connection {
        let mut connection = self.accept();
        connection.suback(1);
        connection
    }
}

impl Connection {
    fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).expect("writes");
    }

    /// Reads a packet: its first byte and its body. The end of the connection is an empty packet.
    fn read(&mut self) -> Vec<u8> {
        let mut first = [0];
        match self.0.read_exact(&mut first) {
            Ok(()) => {}
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                panic!("waited in vain for a packet")
            }
            Err(_) => return Vec::new(),
        }
        let (mut len, mut shift, mut byte) = (0, 0, [0x80]);
        while byte[0] & 0x80 != 0 {
            self.0.read_exact(&mut byte).expect("a length");
            len |= usize::from(byte[0] & 0x7f) << shift;
            shift += 7;
        }
        let mut packet = vec![0; len + 1];
        packet[0] = first[0];
        self.0.read_exact(&mut packet[1..]).expect("the rest of a packet");
        packet
    }

    /// Reads a SUBSCRIBE and answers each of its filters with `code`.
    fn suback(&mut self, code: u8) {
        let subscribe = self.read();
        assert_eq!(subscribe[0], 0x82, "SUBSCRIBE");
        let mut filters = &subscribe[4..];
        let mut body = vec![subscribe[1], subscribe[2], 0];
        while let [high, low, rest @ ..] = filters {
            body.push(code);
            filters = &rest[usize::from(u16::from_be_bytes([*high, *low])) + 1..];
        }
        self.send(&packet(0x90, &body));
    }

    fn publish(&mut self, packet_id: u16, payload: &[u8]) {
        self.send(&publish(5, TOPIC, packet_id, payload));
    }

    fn expect_puback(&mut self, packet_id: u16) {
        let [high, low] = packet_id.to_be_bytes();
        assert_eq!(self.read().get(..3), Some(&[0x40, high, low][..]), "PUBACK of {packet_id}");
    }

    fn expect_disconnect(&mut self) {
        assert_eq!(self.read().first(), Some(&0xe0), "DISCONNECT");
    }
}

#[test]
fn a_delivery_that_failed_while_the_window_is_full_is_received_again() {
    let broker = Broker::listen();
    let rig = broker.bridge(2);
    rig.memory.hold();
    let mut first = broker.serve();
    first.publish(1, &reading(1));
    first.publish(2, &reading(2));
    // At QoS 0 the broker knows no window, so these fill what waits before it.
    (0..200).for_each(|_| first.publish(0, &reading(3)));
    rig.memory.wait_for(DEVICE_TELEMETRY_V1, 2);
    rig.memory.answer(1, false, &rig.codec);
    first.expect_disconnect();
    drop(first);
    rig.memory.flow();
    let mut second = broker.serve();
    second.publish(1, &reading(1));
    second.publish(2, &reading(2));
    second.expect_puback(1);
    second.expect_puback(2);
}

#[test]
fn the_broker_is_told_how_many_messages_and_bytes_may_come() {
    let broker = Broker::listen();
    let _rig = broker.bridge(ExternalConfig::default().open_publishes_max);
    let (_connection, connect) = broker.accept_with();
    let tells = |property: &[u8]| connect.windows(property.len()).any(|window| window == property);
    assert!(tells(&[0x21, 0x03, 0xe8]), "Receive Maximum, 1,000: {connect:x?}");
    assert!(tells(&[0x27, 0x00, 0x04, 0x00, 0x00]), "Maximum Packet Size, 256 KiB: {connect:x?}");
}

#[test]
fn at_qos_0_no_more_is_taken_from_the_broker_than_may_be_open() {
    let broker = Broker::listen();
    let rig = broker.bridge(2);
    rig.memory.hold();
    let mut connection = broker.serve();
    // Receive Maximum does not bind the broker at QoS 0, so the bridge itself must stop taking.
    (0..200).for_each(|_| connection.publish(0, &reading(1)));
    rig.memory.wait_for(DEVICE_TELEMETRY_V1, 2);
    let status = || rig.health.status()["roles"]["bridge"]["notes"]["external"].clone();
    until("two to be open", || status()["open_publishes"] == 2);
    assert_eq!(rig.memory.of(DEVICE_TELEMETRY_V1).len(), 2, "the third waits");
    rig.memory.flow();
    rig.memory.wait_for(DEVICE_TELEMETRY_V1, 200);
}

#[test]
fn a_missing_topic_holds_messages_and_none_is_acknowledged_or_dead_lettered() {
    let broker = Broker::listen();
    let rig = broker.bridge(10);
    rig.memory.close_topics(&[DEVICE_TELEMETRY_V1]);
    let mut connection = broker.serve();
    connection.publish(1, &reading(1));
    until("the topic to be said", || rig.dependency("kafka")["up"] == false);
    rig.memory.close_topics(&[]);
    connection.expect_puback(1);
    assert_eq!(rig.memory.of(DEVICE_TELEMETRY_V1).len(), 1, "it was not lost");
    assert!(rig.memory.of(TELEMETRY_DLT).is_empty());
    assert_eq!(rig.dependency("kafka")["up"], true);
}

#[test]
fn a_record_that_kafka_does_not_take_is_dead_lettered_and_then_acknowledged() {
    let broker = Broker::listen();
    let rig = broker.bridge(10);
    rig.memory.bytes_max(200);
    let mut connection = broker.serve();
    let values: Vec<String> = (0..9).map(|n| format!("\"long-name-{n}\":1")).collect();
    let payload = format!(r#"{{"values":{{{}}}}}"#, values.join(","));
    connection.publish(1, payload.as_bytes());
    connection.expect_puback(1);
    assert_eq!(rig.memory.of(TELEMETRY_DLT)[0].value, payload.as_bytes());
    // Where the dead letter does not fit either, the broker keeps the message.
    connection.publish(2, &[b' '; 300]);
    connection.expect_disconnect();
}

#[test]
fn a_record_that_kafka_refuses_after_it_was_taken_is_dead_lettered_when_it_comes_again() {
    let broker = Broker::listen();
    let rig = broker.bridge(10);
    rig.memory.hold();
    let mut first = broker.serve();
    first.publish(1, &reading(1));
    rig.memory.wait_for(DEVICE_TELEMETRY_V1, 1);
    rig.memory.answer_all(DEVICE_TELEMETRY_V1, Fate::Refused);
    first.expect_disconnect();
    drop(first);
    rig.memory.flow();
    let mut second = broker.serve();
    second.publish(1, &reading(1));
    second.expect_puback(1);
    assert_eq!(rig.memory.of(TELEMETRY_DLT)[0].value, reading(1));
    assert_eq!(rig.memory.of(DEVICE_TELEMETRY_V1).len(), 1);
}

#[test]
fn a_refused_subscription_ends_the_connection_and_frees_the_window() {
    let broker = Broker::listen();
    let rig = broker.bridge(2);
    rig.memory.hold();
    let mut first = broker.accept();
    // The broker resends what an earlier connection left open, and then refuses.
    first.publish(1, &reading(1));
    first.publish(2, &reading(2));
    rig.memory.wait_for(DEVICE_TELEMETRY_V1, 2);
    first.suback(0x87);
    assert!(first.read().is_empty(), "the bridge ends the connection");
    rig.memory.flow();
    let mut second = broker.serve();
    for id in 1..=4 {
        second.publish(id, &reading(u64::from(id)));
        second.expect_puback(id);
    }
    until("the broker to be usable", || rig.dependency("mqtt_broker")["up"] == true);
}

#[test]
fn nothing_of_an_old_connection_is_acknowledged_to_a_new_one() {
    let broker = Broker::listen();
    let rig = broker.bridge(10);
    let mut first = broker.serve();
    until("the subscription", || rig.dependency("mqtt_broker")["up"] == true);
    // The client reads all of it at once: messages, and what ends the connection.
    let garbage = packet(0xf0, &[0; 4]);
    first.send(&[publish(5, TOPIC, 1, &reading(1)), publish(5, TOPIC, 2, &reading(2)), garbage].concat());
    assert!(first.read().is_empty(), "the bridge ends the connection");
    let mut second = broker.serve();
    second.publish(9, &reading(9));
    second.expect_puback(9);
}

#[test]
fn a_broker_that_ends_every_connection_is_not_hammered() {
    let broker = Broker::listen();
    let _rig = broker.bridge(10);
    drop(broker.serve());
    let began = Instant::now();
    for _ in 0..3 {
        drop(broker.serve());
    }
    assert!(began.elapsed() >= Duration::from_millis(200 + 400 + 800 - 100), "{:?}", began.elapsed());
}
