//! The bridge with clients and a broker that others wrote.

mod support;

use std::io::Write as _;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use support::*;
use throughline_model::topics::DEVICE_TELEMETRY_V1;
use throughline_mqtt::ExternalConfig;
use throughline_mqtt::generator::{self, Load};

fn seqs(rig: &Rig) -> Vec<i64> {
    let sent = rig.memory.of(DEVICE_TELEMETRY_V1);
    sent.iter().filter_map(|s| rig.message(s).seq).collect()
}

#[test]
fn rumqttc_publishes_in_order_on_both_versions() {
    const COUNT: i64 = 500;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    for version in [4, 5] {
        let rig = Rig::start();
        let address = rig.address();
        let acknowledged = runtime.block_on(async {
            tokio::time::timeout(PATIENCE, async {
                if version == 4 { publish_v4(address, COUNT).await } else { publish_v5(address, COUNT).await }
            })
            .await
            .expect("in time")
        });
        assert_eq!(acknowledged, COUNT);
        assert_eq!(seqs(&rig), (0..COUNT).collect::<Vec<_>>());
    }
}

async fn publish_v4(address: SocketAddr, count: i64) -> i64 {
    use rumqttc::{AsyncClient, Event, MqttOptions, Packet, QoS};
    let options = MqttOptions::new("site-1/pump-7", address.ip().to_string(), address.port());
    let (client, mut events) = AsyncClient::new(options, count as usize + 1);
    for seq in 0..count {
        client.try_publish(TOPIC, QoS::AtLeastOnce, false, reading(seq as u64)).expect("room");
    }
    let mut acknowledged = 0;
    while acknowledged < count {
        if let Event::Incoming(Packet::PubAck(_)) = events.poll().await.expect("connected") {
            acknowledged += 1;
        }
    }
    acknowledged
}

async fn publish_v5(address: SocketAddr, count: i64) -> i64 {
    use rumqttc::v5::mqttbytes::QoS;
    use rumqttc::v5::mqttbytes::v5::Packet;
    use rumqttc::v5::{AsyncClient, Event, MqttOptions};
    let options = MqttOptions::new("site-1/pump-7", address.ip().to_string(), address.port());
    let (client, mut events) = AsyncClient::new(options, count as usize + 1);
    for seq in 0..count {
        client.try_publish(TOPIC, QoS::AtLeastOnce, false, reading(seq as u64)).expect("room");
    }
    let mut acknowledged = 0;
    while acknowledged < count {
        if let Event::Incoming(Packet::PubAck(_)) = events.poll().await.expect("connected") {
            acknowledged += 1;
        }
    }
    acknowledged
}

fn mosquitto_pub(port: u16, version: &str, message: &[u8]) -> std::process::Output {
    let mut child = Command::new("mosquitto_pub")
        .args(["-h", "127.0.0.1", "-p", &port.to_string(), "-q", "1", "-V", version, "-t", TOPIC, "-s"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("mosquitto_pub is installed (package mosquitto-clients)");
    child.stdin.take().expect("piped").write_all(message).expect("writes");
    child.wait_with_output().expect("ends")
}

#[test]
fn mosquitto_pub_is_served() {
    for version in ["mqttv311", "mqttv5"] {
        let rig = Rig::start();
        let output = mosquitto_pub(rig.address().port(), version, &reading(7));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(seqs(&rig), [7]);
    }
}

#[test]
fn the_generator_counts_every_puback() {
    let rig = Rig::with(|l| l.workers = 2);
    let load =
        Load { address: rig.address(), connections: 4, open: 7, messages_each: 250, ..Load::default() };
    let report = generator::run(&load).expect("runs");
    assert_eq!(
        (report.sent, report.acknowledged, report.failed),
        (1000, 1000, 0),
        "{:?}",
        report.first_failure
    );
    assert_eq!(rig.memory.of(DEVICE_TELEMETRY_V1).len(), 1000);
    assert!(report.rate() > 0.0 && report.latency(0.5) <= report.latency(0.99));
    let slow = Load { rate: Some(400.0), connections: 2, messages_each: 20, ..load };
    let report = generator::run(&slow).expect("runs");
    assert_eq!(report.acknowledged, 40);
    assert!(report.elapsed >= Duration::from_millis(80), "{:?}", report.elapsed);
}

/// A Mosquitto of this test.
struct Broker {
    child: Child,
    port: u16,
}

impl Broker {
    fn start() -> Self {
        let port = {
            let free = TcpListener::bind("127.0.0.1:0").expect("a free port");
            free.local_addr().expect("bound").port()
        };
        let child = Command::new("mosquitto")
            .args(["-p", &port.to_string()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("mosquitto is installed (package mosquitto)");
        let broker = Self { child, port };
        let deadline = Instant::now() + PATIENCE;
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(Instant::now() < deadline, "mosquitto does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
        broker
    }

    fn config(&self) -> ExternalConfig {
        ExternalConfig { url: format!("mqtt://127.0.0.1:{}", self.port), ..ExternalConfig::default() }
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        // Both fail only where it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn is_subscribed(rig: &Rig) -> bool {
    rig.health.status()["roles"]["bridge"]["dependencies"]["mqtt_broker"]["up"] == true
}

#[test]
fn an_external_broker_keeps_what_kafka_has_not_acknowledged() {
    let broker = Broker::start();
    let mut first = Rig::external(broker.config());
    until("the subscription", || is_subscribed(&first));
    assert!(mosquitto_pub(broker.port, "mqttv5", &reading(1)).status.success());
    first.memory.wait_for(DEVICE_TELEMETRY_V1, 1);
    first.memory.hold();
    for seq in 2..=4 {
        assert!(mosquitto_pub(broker.port, "mqttv5", &reading(seq)).status.success());
    }
    first.memory.wait_for(DEVICE_TELEMETRY_V1, 4);
    // Kafka has 3 but not 2, so neither is acknowledged to the broker.
    first.memory.answer(3, true, &first.codec);
    first.bridge.drain(Duration::from_millis(300));
    assert!(mosquitto_pub(broker.port, "mqttv5", &reading(5)).status.success());
    let second = Rig::external(broker.config());
    second.memory.wait_for(DEVICE_TELEMETRY_V1, 4);
    assert_eq!(seqs(&second), [2, 3, 4, 5], "again and in order");
    let id = |rig: &Rig, at: usize| rig.message(&rig.memory.of(DEVICE_TELEMETRY_V1)[at]).message_id;
    assert_eq!(id(&first, 1), id(&second, 0), "a duplicate is recognised by its id");
}

#[test]
fn a_delivery_that_failed_is_sent_again_by_the_external_broker() {
    let broker = Broker::start();
    let rig = Rig::external(broker.config());
    until("the subscription", || is_subscribed(&rig));
    rig.memory.hold();
    assert!(mosquitto_pub(broker.port, "mqttv5", &reading(1)).status.success());
    rig.memory.wait_for(DEVICE_TELEMETRY_V1, 1);
    rig.memory.answer(1, false, &rig.codec);
    rig.memory.wait_for(DEVICE_TELEMETRY_V1, 2);
    rig.memory.flow();
    assert_eq!(seqs(&rig), [1, 1]);
}

#[test]
fn a_broker_that_is_away_is_said_and_found_again() {
    let broker = Broker::start();
    let rig = Rig::external(broker.config());
    until("the subscription", || is_subscribed(&rig));
    drop(broker);
    until("the loss", || !is_subscribed(&rig));
    assert!(rig.health.unready().is_empty(), "clients are the broker's to hold");
}

#[test]
fn clients_of_many_connections_are_served_side_by_side() {
    let rig = Arc::new(Rig::start());
    rig.memory.hold();
    let mut clients: Vec<Raw> = (0..300).map(|n| rig.client(4, &format!("site-1/d{n}"))).collect();
    for (n, client) in clients.iter_mut().enumerate() {
        client.send(&publish(4, &format!("tl/site-1/d{n}/telemetry"), 1, &reading(n as u64)));
    }
    rig.memory.wait_for(DEVICE_TELEMETRY_V1, 300);
    rig.memory.flow();
    for client in &mut clients {
        client.expect_puback(1);
    }
}
