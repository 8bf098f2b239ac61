//! The bridge's producer.

use crate::common::*;
use rdkafka::mocking::MockCluster;
use rdkafka::types::{RDKafkaApiKey, RDKafkaRespErr};
use std::collections::BTreeMap;
use std::io::Write;
use std::ops::ControlFlow;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use throughline_kafka::admin::{Admin, NewTopic};
use throughline_kafka::browse::{Begin, Stop, browse};
use throughline_kafka::{IngressConfig, IngressProducer, KafkaConfig};
use throughline_model::ids::partition_of;
use throughline_model::record::{Headers, Outgoing};
use throughline_runtime::ports::{Fate, Ingress, NotTaken};

const KEYS: usize = 300;

fn key(i: usize) -> String {
    format!("site-{}/gerät-{i}", i % 3)
}

/// Returns the partition that each key was found in.
fn places(topic: &str) -> BTreeMap<String, i32> {
    let mut places = BTreeMap::new();
    let stop = Stop::AtEnd { within: DEADLINE };
    browse(&config("browser"), topic, &[], Begin::Earliest, stop, &mut |batch| {
        for record in batch.iter() {
            places.insert(record.key_str().unwrap_or_default().to_owned(), batch.source.partition);
        }
        ControlFlow::Continue(())
    })
    .expect("reads");
    places
}

#[test]
fn ingress_reports_each_token_once_and_partitions_as_java_does() {
    let (ours, javas) = (topic("ours", 7, &[]), topic("javas", 7, &[("max.message.bytes", "2000")]));
    let reported: Arc<Mutex<BTreeMap<u64, Vec<Fate>>>> = Arc::default();
    let book = Arc::clone(&reported);
    let ingress = IngressProducer::start(&config("bridge"), &IngressConfig::default(), move |token, fate| {
        book.lock().unwrap().entry(token).or_default().push(fate);
    })
    .expect("starts");
    let send = |topic: &str, key: &[u8], value: &[u8], token| {
        let (key, value, headers) = (Some(key), Some(value), Headers::default());
        ingress.send(Outgoing { topic, partition: None, key, value, headers }, token)
    };
    for i in 0..KEYS {
        send(&ours, key(i).as_bytes(), b"v", i as u64).expect("taken");
    }
    // The broker refuses this one, incompressible as it is: it is reported as refused, not silently dropped.
    let noise: Vec<u8> = (0..100_000_u32)
        .flat_map(|i| i.wrapping_mul(2_654_435_761).rotate_left(i % 31).to_le_bytes())
        .collect();
    send(&javas, b"k", &noise, u64::MAX).expect("taken");
    // The client refuses this one, larger than any broker takes by default.
    assert!(matches!(send(&javas, b"k", &vec![0; 3 << 20], 7_777_777), Err(NotTaken::Record(_))));
    wait_for("all reports", || (reported.lock().unwrap().len() == KEYS + 1).then_some(()));
    assert_eq!(ingress.in_flight(), 0);
    let expected: BTreeMap<_, _> = (0..KEYS as u64)
        .map(|t| (t, vec![Fate::Delivered]))
        .chain([(u64::MAX, vec![Fate::Refused])])
        .collect();
    assert_eq!(*reported.lock().unwrap(), expected);
    // The same keys through Kafka's own producer.
    let mut tool = broker().tool("org.apache.kafka.tools.ConsoleProducer").expect("Java");
    tool.args(["--bootstrap-server", &broker().bootstrap(), "--topic", &javas]);
    tool.args(["--reader-property", "parse.key=true", "--reader-property", "key.separator=;"]);
    tool.env("LC_ALL", "C.UTF-8").stdin(Stdio::piped()).stdout(Stdio::null());
    let mut java = tool.spawn().expect("runs");
    let mut stdin = java.stdin.take().expect("piped");
    for i in 0..KEYS {
        writeln!(stdin, "{};v", key(i)).expect("written");
    }
    drop(stdin);
    assert!(java.wait().expect("ends").success());
    let expected: BTreeMap<_, _> = (0..KEYS).map(|i| (key(i), partition_of(key(i).as_bytes(), 7))).collect();
    assert_eq!(places(&ours), expected);
    assert_eq!(places(&javas), expected);
}

#[test]
fn a_missing_topic_is_refused_until_it_is_there_and_others_are_served() {
    let (there, missing) = (topic("there", 1, &[]), unique("missing"));
    let mut own = config("bridge-waits");
    // How long librdkafka hopes for a new topic; it keeps what it took meanwhile.
    own.properties.insert("topic.metadata.propagation.max.ms".to_owned(), "100".to_owned());
    let reported: Arc<Mutex<BTreeMap<u64, Fate>>> = Arc::default();
    let book = Arc::clone(&reported);
    let ingress = IngressProducer::start(&own, &IngressConfig::default(), move |token, fate| {
        book.lock().unwrap().insert(token, fate);
    })
    .expect("starts");
    let offer = |topic: &str, token: u64| {
        let (key, value, headers) = (Some(b"k".as_slice()), Some(b"v".as_slice()), Headers::default());
        ingress.send(Outgoing { topic, partition: None, key, value, headers }, token)
    };
    let refused = |token| matches!(offer(&missing, token), Err(NotTaken::Topic(_)));
    let mut tokens = 0..;
    let mut next = || tokens.next().expect("endless");
    wait_for("the topic to be refused", || refused(next()).then_some(()));
    wait_for("what was taken to fail", || (ingress.in_flight() == 0).then_some(()));
    assert!(reported.lock().unwrap().values().all(|fate| *fate == Fate::Failed));
    // librdkafka itself forgets it within a second and would take records to fail.
    for _ in 0..60 {
        assert!(refused(next()), "it stays refused");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    offer(&there, u64::MAX).expect("another topic is served");
    let new = NewTopic { name: missing.clone(), partitions: 1, replication: 1, configs: BTreeMap::default() };
    Admin::new(&own).expect("a client").create_topics(&[new]).expect("made");
    let token = wait_for("the topic to be taken", || {
        let token = next();
        offer(&missing, token).is_ok().then_some(token)
    });
    wait_for("the acknowledgement", || {
        (reported.lock().unwrap().get(&token) == Some(&Fate::Delivered)).then_some(())
    });
}

#[test]
fn a_record_that_waits_for_longer_than_the_time_out_is_reported_as_failed() {
    let mock = MockCluster::new(1).expect("a mock cluster");
    mock.create_topic("t", 1, 1).expect("a topic");
    let config = KafkaConfig::new(mock.bootstrap_servers());
    let tuning = IngressConfig { produce_timeout_ms: 1_000, ..IngressConfig::default() };
    let fates: Arc<Mutex<BTreeMap<u64, Fate>>> = Arc::default();
    let book = Arc::clone(&fates);
    let ingress = IngressProducer::start(&config, &tuning, move |token, fate| {
        assert!(book.lock().expect("no report panics").insert(token, fate).is_none(), "one report a token");
    })
    .expect("starts");
    let send = |token: u64| {
        let (key, value, headers) = (Some(&b"k"[..]), Some(&b"v"[..]), Headers::default());
        ingress.send(Outgoing { topic: "t", partition: None, key, value, headers }, token).expect("taken");
        wait_for("its report", || fates.lock().expect("no report panics").get(&token).copied())
    };
    assert_eq!(send(1), Fate::Delivered);
    mock.broker_down(1).expect("a broker");
    assert_eq!(send(2), Fate::Failed);
    mock.broker_up(1).expect("a broker");
    // It is tried again by whoever sent it; the producer goes on.
    (3..).map(send).take(30).find(|fate| *fate == Fate::Delivered).expect("the broker is back");
}

/// Sends two batches to a broker that refuses the first one for a moment, as a leader that is not ready does,
/// and does not look at sequences, as one that knows nothing of the producer yet. Returns the fates, and the
/// values that the broker holds, in their order.
fn two_batches_of_which_the_first_is_refused(
    properties: &[(&str, &str)],
) -> (BTreeMap<u64, Fate>, Vec<String>) {
    let mock = MockCluster::new(1).expect("a mock cluster");
    mock.create_topic("t", 1, 1).expect("a topic");
    // Both are on their way before the first answer.
    mock.broker_round_trip_time(1, Duration::from_millis(300)).expect("a broker");
    mock.request_errors(
        RDKafkaApiKey::Produce,
        &[RDKafkaRespErr::RD_KAFKA_RESP_ERR_NOT_LEADER_FOR_PARTITION],
    );
    let mut config = KafkaConfig::new(mock.bootstrap_servers());
    config.properties = properties.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect();
    config.properties.insert("batch.num.messages".into(), "1".into());
    let fates: Arc<Mutex<BTreeMap<u64, Fate>>> = Arc::default();
    let book = Arc::clone(&fates);
    let ingress = IngressProducer::start(&config, &IngressConfig::default(), move |token, fate| {
        assert!(book.lock().expect("no report panics").insert(token, fate).is_none(), "one report a token");
    })
    .expect("starts");
    for token in 1..=2 {
        let value = token.to_string();
        let (key, headers) = (Some(&b"k"[..]), Headers::default());
        let record = Outgoing { topic: "t", partition: None, key, value: Some(value.as_bytes()), headers };
        ingress.send(record, token).expect("taken");
    }
    wait_for("both reports", || (fates.lock().expect("no report panics").len() == 2).then_some(()));
    let mut held = Vec::new();
    let stop = Stop::AtEnd { within: DEADLINE };
    browse(&config, "t", &[], Begin::Earliest, stop, &mut |batch| {
        held.extend(batch.iter().map(|r| String::from_utf8_lossy(r.value.unwrap_or_default()).into_owned()));
        ControlFlow::Continue(())
    })
    .expect("reads");
    let fates = fates.lock().expect("no report panics").clone();
    (fates, held)
}

#[test]
fn records_keep_their_order_where_a_leader_is_not_ready() {
    let (fates, held) = two_batches_of_which_the_first_is_refused(&[]);
    assert_eq!(held, ["1", "2"]);
    assert_eq!(fates, BTreeMap::from([(1, Fate::Delivered), (2, Fate::Delivered)]));
}

#[test]
fn a_report_of_success_that_proves_nothing_is_no_acknowledgement() {
    // What librdkafka does unless told otherwise: the second batch is acknowledged, and the first with it.
    let (fates, held) =
        two_batches_of_which_the_first_is_refused(&[("max.in.flight.requests.per.connection", "5")]);
    assert_eq!(held, ["2"], "the broker holds the second alone");
    assert_eq!(fates, BTreeMap::from([(1, Fate::Failed), (2, Fate::Delivered)]));
}
