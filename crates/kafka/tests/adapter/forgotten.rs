//! A broker that names no brokers, as the only one of a cluster does when it comes out of a pause: librdkafka
//! then gives up every broker it knows and connects to nothing any more (confluentinc/librdkafka issue 5301).

use crate::common::*;
use parking_lot::Mutex;
use std::collections::{BTreeSet, HashMap};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use throughline_kafka::admin::{Admin, NewTopic};
use throughline_kafka::{AckedProducer, IngressConfig, IngressProducer, KafkaConfig, TopicReader};
use throughline_local::kafka::{KafkaOptions, ManagedKafka};
use throughline_model::record::{Headers, Outbox, Outgoing};
use throughline_runtime::ports::{Fate, Ingress, Outlet, PipelineEvent, Source, TableReader};

/// Three looks of 10 s, their answers, and a rejoin, on a busy machine.
const MADE_ANEW_WITHIN: Duration = Duration::from_secs(180);
const METADATA: i16 = 3;

/// Stands between clients and a broker, and leaves the brokers out of metadata while told so.
struct Forgetful {
    forgets: AtomicBool,
    /// The client ids that were told of no brokers.
    told: Mutex<BTreeSet<String>>,
    open: Mutex<Vec<TcpStream>>,
    ended: AtomicBool,
}

impl Forgetful {
    fn start(listener: TcpListener, broker: u16) -> Arc<Self> {
        let proxy = Arc::new(Self {
            forgets: AtomicBool::new(false),
            told: Mutex::default(),
            open: Mutex::default(),
            ended: AtomicBool::new(false),
        });
        let serving = Arc::clone(&proxy);
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                if serving.ended.load(Ordering::Acquire) {
                    return;
                }
                // Without a broker behind it the connection ends here.
                if let Ok(broker) = TcpStream::connect(("127.0.0.1", broker)) {
                    serving.join(&client, &broker);
                }
            }
        });
        proxy
    }

    fn join(self: &Arc<Self>, client: &TcpStream, broker: &TcpStream) {
        let clone = |stream: &TcpStream| stream.try_clone().expect("a second handle");
        self.open.lock().extend([clone(client), clone(broker)]);
        let asked: Arc<Mutex<HashMap<i32, String>>> = Arc::default();
        let (requests, answers) = (Arc::clone(&asked), asked);
        let (mut from, mut to) = (clone(client), clone(broker));
        std::thread::spawn(move || {
            relay(&mut from, &mut to, |request| {
                let int = |at: usize| i16::from_be_bytes([request[at], request[at + 1]]);
                if int(0) == METADATA {
                    assert!(int(2) >= 9, "the flexible form is what is taken apart here");
                    let correlation = i32::from_be_bytes(request[4..8].try_into().expect("four bytes"));
                    let name = &request[10..10 + usize::try_from(int(8)).unwrap_or_default()];
                    let name = String::from_utf8_lossy(name).into_owned();
                    requests.lock().insert(correlation, name);
                }
                request
            });
        });
        let (mut from, mut to, proxy) = (clone(broker), clone(client), Arc::clone(self));
        std::thread::spawn(move || {
            relay(&mut from, &mut to, |answer| {
                let correlation = i32::from_be_bytes(answer[..4].try_into().expect("four bytes"));
                match answers.lock().remove(&correlation) {
                    Some(name) if proxy.forgets.load(Ordering::Acquire) => {
                        let (answer, has_topics) = without_brokers(&answer);
                        // One without topics too is taken as an answer in part, and asked for again.
                        if has_topics {
                            proxy.told.lock().insert(name);
                        }
                        answer
                    }
                    _ => answer,
                }
            });
        });
    }

    /// Forgets the brokers and cuts every connection, so that readers come back and ask; remembers them once
    /// all of `clients` were told. `ask` makes those ask that do not by themselves.
    fn forget(&self, clients: &[&str], ask: impl FnOnce()) {
        self.forgets.store(true, Ordering::Release);
        ask();
        let mut cut_at: Option<Instant> = None;
        wait_for("every client to be told of no brokers", || {
            // They come back within 2 s; one that asked just before is cut again.
            if cut_at.is_none_or(|at| at.elapsed() > Duration::from_secs(8)) {
                for stream in self.open.lock().drain(..) {
                    let _gone_already = stream.shutdown(Shutdown::Both);
                }
                cut_at = Some(Instant::now());
            }
            let told = self.told.lock();
            clients.iter().all(|client| told.contains(*client)).then_some(())
        });
        self.forgets.store(false, Ordering::Release);
    }
}

/// Passes frames on until either side ends.
fn relay(from: &mut TcpStream, to: &mut TcpStream, change: impl Fn(Vec<u8>) -> Vec<u8>) {
    let mut next = || -> std::io::Result<()> {
        let mut length = [0; 4];
        from.read_exact(&mut length)?;
        let mut frame = vec![0; u32::from_be_bytes(length) as usize];
        from.read_exact(&mut frame)?;
        let frame = change(frame);
        to.write_all(&[&(frame.len() as u32).to_be_bytes()[..], &frame].concat())
    };
    while next().is_ok() {}
    let _gone_already = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}

/// Takes the brokers out of a metadata response, version 9 or later: correlation id, tags, throttle time, then
/// the brokers as id, host, port, rack and tags, then the cluster's id, the controller and the topics. Every
/// length here is below 128, one byte. Says whether there are topics.
fn without_brokers(answer: &[u8]) -> (Vec<u8>, bool) {
    const BROKERS: usize = 4 + 1 + 4;
    let mut rest = BROKERS + 1;
    for _ in 1..answer[BROKERS] {
        rest += 4;
        rest += usize::from(answer[rest]); // the length is stated as one more
        rest += 4;
        rest += usize::from(answer[rest].max(1));
        assert_eq!(answer[rest], 0, "no tags");
        rest += 1;
    }
    let topics = rest + usize::from(answer[rest].max(1)) + 4;
    ([&answer[..BROKERS], &[1], &answer[rest..]].concat(), answer[topics] > 1)
}

#[test]
fn clients_that_were_told_of_no_brokers_go_on_by_themselves() {
    let dir = throughline_local::scratch_dir().expect("a scratch directory");
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("bound");
    let mut options = KafkaOptions::new(dir.path().join("kafka"));
    options.settings.push(("advertised.listeners".to_owned(), format!("PLAINTEXT://{address}")));
    let kafka = ManagedKafka::start(options, &mut |_| {}).expect("a broker");
    let port = kafka.bootstrap().rsplit(':').next().and_then(|port| port.parse().ok()).expect("a port");
    let proxy = Forgetful::start(listener, port);
    let config = |name: &str| KafkaConfig {
        client_id: name.to_owned(),
        instance: name.to_owned(),
        ..KafkaConfig::new(address.to_string())
    };
    let new = |name: &str| NewTopic {
        name: name.to_owned(),
        partitions: 1,
        replication: 1,
        configs: Default::default(),
    };
    Admin::new(&config("admin"))
        .and_then(|admin| admin.create_topics(&[new("e_input"), new("e_other"), new("e_third")]))
        .expect("made");

    let acked: Arc<Mutex<BTreeSet<u64>>> = Arc::default();
    let book = Arc::clone(&acked);
    let ingress = IngressProducer::start(&config("bridge"), &IngressConfig::default(), move |token, fate| {
        if fate == Fate::Delivered {
            book.lock().insert(token);
        }
    })
    .expect("starts");
    let send_to = |topic: &str, token: u64| {
        let value = token.to_string();
        let (key, value, headers) = (Some(b"k".as_slice()), Some(value.as_bytes()), Headers::default());
        ingress.send(Outgoing { topic, partition: None, key, value, headers }, token)
    };
    let send = |token: u64| send_to("e_input", token);
    let mut source = join(&config("member"), "e_forgotten", &["e_input"]);
    let mut idle = join(&config("idle"), "e_idle", &["e_other"]);
    let mut tables = TopicReader::new(&config("table"));
    let partitions = offered(&mut source, 1);
    start_committed(&mut source, &partitions);
    let others = offered(&mut idle, 1);
    start_committed(&mut idle, &others);
    send(1).expect("taken");
    assert_eq!(records(&mut source).len(), 1);
    let mut rows = 0;
    wait_for("the table's first row", || {
        tables.follow("e_input", &mut |batch| rows += batch.len()).expect("reads");
        (rows == 1).then_some(())
    });

    // A producer asks about a topic that it has not met.
    proxy.forget(&["bridge", "member", "idle", "table"], || send_to("e_third", 1_000).expect("taken"));

    let mut outbox = Outbox::default();
    outbox.push(&"e_other".into(), Some(0), None, Some(b"2"), []);
    AckedProducer::new(&config("direct")).send_all(&outbox).expect("acknowledged");
    // A record that was lost with its producer is sent again by the device, so by its next connection.
    let (mut token, mut sent_at) = (2, Instant::now());
    send(token).expect("taken");
    let (mut read, mut seen, mut other) = (false, false, false);
    let deadline = Instant::now() + MADE_ANEW_WITHIN;
    while acked.lock().range(2..1_000).next().is_none() || !read || !seen || !other {
        if sent_at.elapsed() > Duration::from_secs(5) && ingress.in_flight() == 0 {
            (token, sent_at) = (token + 1, Instant::now());
            drop(send(token));
        }
        match source.poll(Duration::from_millis(20)) {
            PipelineEvent::Offered(again) => {
                start_committed(&mut source, &again);
            }
            PipelineEvent::Revoking(gone) => source.release(&gone),
            PipelineEvent::Records(batch) => read |= batch.iter().any(|r| r.value != Some(b"1")),
            _ => {}
        }
        match idle.poll(Duration::from_millis(20)) {
            PipelineEvent::Offered(again) => {
                start_committed(&mut idle, &again);
            }
            PipelineEvent::Revoking(gone) => idle.release(&gone),
            PipelineEvent::Records(_) => other = true,
            _ => {}
        }
        // An error makes the reader begin anew with its next call.
        let _may_fail = tables.follow("e_input", &mut |batch| {
            seen |= batch.iter().any(|r| r.value != Some(b"1"));
        });
        let found = (acked.lock().clone(), read, seen, other);
        assert!(
            Instant::now() < deadline,
            "acknowledged, read, seen in the table, the other read: {found:?}"
        );
    }
    proxy.ended.store(true, Ordering::Release);
    // The listener's thread ends with the next connection.
    drop(TcpStream::connect(address));
}
