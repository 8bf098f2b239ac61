//! A sink that stands still does not make memory grow: what is poured in waits where docs/bounds.md says, and
//! arrives once the sink goes on.
//!
//! Memory is what the system says of the process (VmHWM, the most it took). The bounds are those of the
//! documentation, with room for copies and what the allocator keeps; without them a process would take several
//! times as much, because more is poured in than that.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;
use throughline_kafka::browse::end_offsets;
use throughline_kafka::{AckedProducer, KafkaConfig, RegistryClient, RegistryConfig};
use throughline_local::child::Fault;
use throughline_local::postgres::{ManagedPostgres, PostgresOptions};
use throughline_local::scratch_dir;
use throughline_model::codec::Codec;
use throughline_model::envelope::Measurement;
use throughline_model::record::Outbox;
use throughline_model::time::Timestamp;
use throughline_model::topics::{DATA_CORE_READING_V1, DEVICE_TELEMETRY_V1};
use throughline_runtime::ports::Outlet;
use throughline_runtime::{Clock, WallClock};
use throughline_testkit::device_message;
use throughline_tests::chaos::Random;
use throughline_tests::cluster::Cluster;
use throughline_tests::{succeed, wait_for};

const MIB: usize = 1 << 20;
/// Of the bridge's producer; its default of 256 MiB would need more than that to show anything.
const QUEUE_MIB: usize = 16;
/// What load_warehouse may hold: 6 partitions of its 36 are full, each with its share of 128 MiB and one fetch
/// beyond; 8 MiB gathered and a batch of 4 MiB beyond, as records and as rows.
const LOAD_MIB: f64 = 6.0 * (128.0 / 36.0 + 1.0) + 2.0 * (8.0 + 4.0);
/// Few with much to say: the system takes some MiB of each connection in the bridge's place.
const CLIENTS: usize = 5;
/// What the bridge may hold: its producer's queue, and of each connection one read of 64 KiB and a message.
const BRIDGE_MIB: f64 = QUEUE_MIB as f64 + CLIENTS as f64 * 0.125;
/// Copies, compressed batches, and what the allocator does not give back.
const FACTOR: f64 = 3.0;
/// Bounded generously: the machine may be busy with other tests.
const SOON: Duration = Duration::from_secs(180);

/// Makes text that does not compress, so that every byte is one on the wire and in each buffer.
fn noise(random: &mut Random, length: usize) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    (0..length).map(|_| char::from(LETTERS[(random.draw() >> 58) as usize])).collect()
}

#[expect(clippy::print_stderr, reason = "the figures say how much room there is")]
fn assert_bounded(cluster: &Cluster, role: &str, before: f64, poured: usize, bound: f64) {
    let (now, peak) = cluster.memory_mib(role);
    let said =
        format!("{role}: {before:.0} MiB, then {now:.0}, {peak:.0} at most; {} MiB came", poured / MIB);
    eprintln!("{said}; bound {bound:.0} MiB");
    assert!(peak - before < FACTOR * bound, "{said}, bound {bound:.0} MiB\n{}", cluster.logs());
    assert!((poured / MIB) as f64 > 1.5 * FACTOR * bound, "{said}: too little to show that it is bounded");
}

/// Sends readings of 1 to 100 KB until there are `bytes` of them; returns how many rows they become.
fn pour_readings(cluster: &Cluster, bytes: usize) -> u64 {
    let config = RegistryConfig { url: cluster.registry_url().to_owned(), authorization: None };
    let registry = RegistryClient::new(&config);
    let schema = registry.latest(&format!("{DATA_CORE_READING_V1}-value")).expect("the registry answers");
    let schema = schema.expect("the topic has a schema");
    let codec = Codec::default();
    codec.bind(DATA_CORE_READING_V1, schema.id, &schema.schema).expect("a schema");
    let mut producer = AckedProducer::new(&KafkaConfig::new(cluster.kafka.bootstrap()));
    let mut random = Random(7);
    let (mut outbox, mut poured, mut rows) = (Outbox::default(), 0, 0);
    for seq in 1.. {
        let texts: &[usize] = [&[1_000][..], &[10_000], &[50_000, 50_000]][(seq % 3) as usize];
        let measurements = texts.iter().enumerate().map(|(at, length)| Measurement {
            name: format!("text{at}"),
            text: Some(noise(&mut random, *length)),
            ..Measurement::default()
        });
        let (device, now) = (format!("pump-{}", seq % 50), Timestamp(WallClock.now().0));
        let message = device_message("site-1", &device, seq, now, measurements.collect());
        let key = format!("site-1/{device}");
        let topic = DATA_CORE_READING_V1.into();
        let written = outbox.push_with(&topic, None, Some(key.as_bytes()), None, |value| {
            codec.encode(DATA_CORE_READING_V1, &message, value).map(|()| true)
        });
        written.expect("the message fits its schema");
        rows += texts.len() as u64;
        if outbox.bytes_held() > 8 * MIB || poured + outbox.bytes_held() >= bytes {
            poured += outbox.bytes_held();
            producer.send_all(&outbox).expect("Kafka takes them");
            outbox.clear();
        }
        if poured >= bytes {
            break;
        }
    }
    rows
}

#[test]
fn a_hung_database_and_a_hung_kafka_do_not_make_memory_grow() {
    let directory = scratch_dir().expect("a temporary directory can be made");
    let options = PostgresOptions::new(directory.path().join("pg"));
    let mut database = ManagedPostgres::start(options).expect("PostgreSQL starts");
    let queue = (QUEUE_MIB * 1_024).to_string();
    let settings = [
        ("THROUGHLINE_KAFKA__QUEUE_KIB_MAX", queue.as_str()),
        // So that it is the queue of all that holds the clients, not the bound of each.
        ("THROUGHLINE_MQTT__BOUNDS__OPEN_BYTES_MAX", "100000000"),
    ];
    let mut cluster = Cluster::without_roles(Some(&database.url()), &settings);
    cluster.add("bridge", "0");
    cluster.add("load_warehouse", "0");
    cluster.wait_for_bridge();
    a_hung_database(&mut cluster, &mut database);
    a_hung_kafka(&mut cluster);
}

fn a_hung_database(cluster: &mut Cluster, database: &mut ManagedPostgres) {
    let url = database.url();
    let count = || -> Option<u64> {
        let query = ["-d", &url, "-Atc", "SELECT count(*) FROM reading"];
        succeed("psql", &query).trim().parse().ok()
    };
    let first = pour_readings(cluster, MIB);
    wait_for("the first rows", SOON, || (count() == Some(first)).then_some(()));
    let (before, _) = cluster.memory_mib("load_warehouse");
    database.fault(Fault::Stop);
    let poured = 240 * MIB;
    let rows = pour_readings(cluster, poured);
    wait_for("the role to fill its queues", SOON, || {
        let (now, peak) = cluster.memory_mib("load_warehouse");
        (now > before + LOAD_MIB / 4.0 || peak > before + FACTOR * LOAD_MIB).then_some(())
    });
    assert_bounded(cluster, "load_warehouse", before, poured, LOAD_MIB);
    database.fault(Fault::Continue);
    wait_for("all rows", SOON, || (count() == Some(first + rows)).then_some(()));
    assert_bounded(cluster, "load_warehouse", before, poured, LOAD_MIB);
}

/// Says whether every thread of a process has stopped: on a busy machine that is later than the signal.
fn stands_still(pid: u32) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).expect("the process is there");
    threads.flatten().all(|thread| {
        let stat = std::fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        stat.rsplit_once(") ").is_none_or(|(_, state)| state.starts_with('T'))
    })
}

/// A client that publishes at QoS 1 and counts its acknowledgements.
struct Client {
    stream: TcpStream,
    unsent: Vec<u8>,
    packets: usize,
    acknowledgements: usize,
}

impl Client {
    fn connect(port: &str, device: &str) -> Self {
        let mut stream = TcpStream::connect(format!("127.0.0.1:{port}")).expect("connects");
        let id = format!("site-1/{device}");
        let mut connect =
            vec![0x10, 12 + id.len() as u8, 0, 4, b'M', b'Q', b'T', b'T', 4, 2, 0, 0, 0, id.len() as u8];
        connect.extend_from_slice(id.as_bytes());
        stream.write_all(&connect).expect("writes");
        let mut connack = [0; 4];
        stream.read_exact(&mut connack).expect("a CONNACK");
        assert_eq!(connack, [0x20, 2, 0, 0]);
        stream.set_nonblocking(true).expect("sets");
        Self { stream, unsent: Vec::new(), packets: 0, acknowledgements: 0 }
    }

    fn publish(&mut self, device: &str, text: &str) {
        self.packets += 1;
        let topic = format!("tl/site-1/{device}/telemetry");
        let payload = format!(r#"{{"epoch":1,"seq":{},"values":{{"text":"{text}"}}}}"#, self.packets);
        let length = 4 + topic.len() + payload.len();
        assert!((1 << 14..1 << 21).contains(&length), "three bytes of length");
        let digits = [length & 127 | 128, length >> 7 & 127 | 128, length >> 14];
        self.unsent.push(0x32);
        self.unsent.extend(digits.map(|digit| digit as u8));
        self.unsent.extend_from_slice(&(topic.len() as u16).to_be_bytes());
        self.unsent.extend_from_slice(topic.as_bytes());
        self.unsent.extend_from_slice(&(self.packets as u16).to_be_bytes());
        self.unsent.extend_from_slice(payload.as_bytes());
    }

    /// Sends what the bridge takes and reads what it says. Says whether anything moved.
    fn turn(&mut self) -> bool {
        let sent = self.stream.write(&self.unsent).unwrap_or(0);
        self.unsent.drain(..sent);
        let mut answers = [0; 4_096];
        let read = self.stream.read(&mut answers).unwrap_or(0);
        assert_eq!(read % 4, 0, "PUBACKs are written whole");
        self.acknowledgements += read / 4;
        sent + read > 0
    }
}

fn a_hung_kafka(cluster: &mut Cluster) {
    const EACH: usize = 1_000;
    let port = cluster.mqtt_port();
    let mut random = Random(11);
    let (before, _) = cluster.memory_mib("bridge");
    let mut clients: Vec<Client> =
        (0..CLIENTS).map(|n| Client::connect(&port, &format!("pump-{n}"))).collect();
    let text = noise(&mut random, 30_000);
    for (n, client) in clients.iter_mut().enumerate() {
        (0..EACH).for_each(|_| client.publish(&format!("pump-{n}"), &text));
    }
    let poured: usize = clients.iter().map(|client| client.unsent.len()).sum();
    cluster.kafka.fault(Fault::Stop);
    let broker = cluster.kafka.node(0).pid().expect("the broker runs");
    wait_for("Kafka to stand still", SOON, || stands_still(broker).then_some(()));
    // Until the bridge has stopped reading: nothing moves for a while although all have more to say.
    let mut still = 0;
    wait_for("the bridge to stop reading", SOON, || {
        let moved = clients.iter_mut().fold(false, |moved, client| client.turn() | moved);
        still = if moved { 0 } else { still + 1 };
        (still > 100).then_some(())
    });
    assert!(
        clients.iter().all(|client| client.acknowledgements == 0),
        "nothing is acknowledged without Kafka"
    );
    assert!(clients.iter().all(|client| !client.unsent.is_empty()), "every client is held");
    assert_bounded(cluster, "bridge", before, poured, BRIDGE_MIB);
    cluster.kafka.fault(Fault::Continue);
    wait_for("every acknowledgement", SOON, || {
        for client in &mut clients {
            client.turn();
        }
        clients.iter().all(|client| client.acknowledgements == EACH).then_some(())
    });
    let ends = end_offsets(&KafkaConfig::new(cluster.kafka.bootstrap()), DEVICE_TELEMETRY_V1);
    let records: i64 = ends.expect("Kafka answers").iter().map(|(_, end)| end).sum();
    assert_eq!(records as usize, CLIENTS * EACH);
    assert_bounded(cluster, "bridge", before, poured, BRIDGE_MIB);
}
