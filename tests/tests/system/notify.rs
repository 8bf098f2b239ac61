//! `notify` as its users meet it: a webhook that fails some requests, and a process that is killed in the middle.

use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use throughline_kafka::{AckedProducer, KafkaConfig, RegistryClient, RegistryConfig};
use throughline_model::catalog::{Catalog, value_subject};
use throughline_model::codec::Codec;
use throughline_model::envelope::Alert;
use throughline_model::record::Outbox;
use throughline_model::time::Timestamp;
use throughline_model::topics::SERVICE_PLATFORM_ALERT_V1;
use throughline_runtime::ports::Outlet;
use throughline_runtime::{Clock, WallClock};
use throughline_tests::cluster::Cluster;
use throughline_tests::{binary, said, succeed, wait_for};

/// Bounded generously: the machine may be busy.
const SOON: Duration = Duration::from_secs(90);
const ALERTS: u64 = 60;
/// Fails, while the others pass, until it is set aside.
const WEAK: &str = "alert-7";
/// Is refused for good.
const REFUSED: &str = "alert-13";
/// Is received, but not answered before the kill.
const UNANSWERED: &str = "alert-40";

/// What the webhook got, in order: alert, id of the request, `traceparent`, status answered.
#[derive(Default)]
struct Got {
    posts: Vec<(String, String, String, u16)>,
    holds: bool,
    weak_passes: bool,
}

#[derive(Clone)]
struct Hook {
    got: Arc<Mutex<Got>>,
    port: u16,
}

impl Hook {
    fn serve() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("bound").port();
        let hook = Self { got: Arc::new(Mutex::new(Got { holds: true, ..Got::default() })), port };
        let serving = hook.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let hook = serving.clone();
                std::thread::spawn(move || hook.answer(stream));
            }
        });
        hook
    }

    fn got(&self) -> MutexGuard<'_, Got> {
        self.got.lock().expect("no answer panics")
    }

    /// Answers the requests of one connection until the client ends it.
    fn answer(&self, stream: TcpStream) -> Option<()> {
        let mut reader = BufReader::new(stream.try_clone().ok()?);
        loop {
            let mut headers = BTreeMap::new();
            loop {
                let mut line = String::new();
                if reader.read_line(&mut line).ok()? == 0 {
                    return None;
                }
                match line.trim().split_once(':') {
                    Some((name, value)) => {
                        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
                    }
                    None if line.trim().is_empty() => break,
                    None => {}
                }
            }
            let mut body = vec![0; headers.get("content-length")?.parse().ok()?];
            reader.read_exact(&mut body).ok()?;
            let body: Value = serde_json::from_slice(&body).ok()?;
            let alert = body["alert_id"].as_str()?.to_owned();
            let header = |name| headers.get(name).cloned().unwrap_or_default();
            let held = {
                let mut got = self.got();
                let status = match alert.as_str() {
                    WEAK if !got.weak_passes => 503,
                    REFUSED => 422,
                    UNANSWERED if got.holds => 0,
                    _ => 200,
                };
                let (id, trace) = (header("idempotency-key"), header("traceparent"));
                assert_eq!(body["message_id"], Value::String(id.clone()), "{alert}");
                got.posts.push((alert, id, trace, status));
                status
            };
            if held == 0 {
                // The connection ends with the process that is killed.
                let _ended = reader.read(&mut [0]);
                return None;
            }
            write!(&stream, "HTTP/1.1 {held} X\r\nContent-Length: 0\r\n\r\n").ok()?;
        }
    }

    /// Returns the alerts that were answered with 200.
    fn taken(&self) -> BTreeSet<String> {
        let got = self.got();
        got.posts.iter().filter(|(.., status)| *status == 200).map(|(alert, ..)| alert.clone()).collect()
    }
}

/// Appends the alerts, raised by six devices, as `evaluate_rules` does.
fn raise(cluster: &Cluster) {
    let registry = RegistryConfig { url: cluster.registry().to_owned(), authorization: None };
    let catalog = Catalog::embedded();
    let schema = &catalog.topic(SERVICE_PLATFORM_ALERT_V1).expect("a topic of ours").schema;
    let subject = value_subject(SERVICE_PLATFORM_ALERT_V1);
    let id = RegistryClient::new(&registry).lookup(&subject, schema).expect("the registry answers");
    let codec = Codec::default();
    codec.bind(SERVICE_PLATFORM_ALERT_V1, id.expect("registered"), schema).expect("it is ours");
    let now = WallClock.now();
    let mut outbox = Outbox::default();
    for number in 0..ALERTS {
        let alert = Alert {
            message_id: format!("01890000-0000-7000-8000-{number:012}"),
            trace_id: format!("{:032x}", 0xabc0 + number),
            site_id: "site-1".into(),
            device_id: format!("pump-{}", number % 6),
            alert_id: format!("alert-{number}"),
            rule_id: "hot".into(),
            severity: "critical".into(),
            state: "raised".into(),
            raised_at: now,
            occurred_at: now,
            received_at: Timestamp(now.0 + 1),
            summary: "Too hot.".into(),
            ..Alert::default()
        };
        let key = format!("site-1/{}", alert.device_id);
        let topic = SERVICE_PLATFORM_ALERT_V1.into();
        let written = outbox.push_with(&topic, None, Some(key.as_bytes()), [], |out| {
            codec.encode(SERVICE_PLATFORM_ALERT_V1, &alert, out).map(|()| true)
        });
        written.expect("an alert fits its schema");
    }
    let mut producer = AckedProducer::new(&KafkaConfig::new(cluster.kafka.bootstrap()));
    producer.send_all(&outbox).expect("Kafka takes them");
}

/// Returns the value of a header of every record of a topic.
fn headers(cluster: &Cluster, suffix: &str, name: &str) -> Vec<String> {
    let kafka = cluster.kafka.bootstrap();
    let topic = format!("{SERVICE_PLATFORM_ALERT_V1}.notify-{suffix}");
    let args = ["-b", &kafka, "-C", "-t", &topic, "-o", "beginning", "-e", "-q", "-f", "%h\n"];
    let found = succeed("kcat", &args);
    let of =
        |line: &str| line.split(',').find_map(|h| h.strip_prefix(&format!("{name}=")).map(str::to_owned));
    found.lines().filter_map(of).collect()
}

/// Returns how many records were emitted and dead-lettered, by the committed books.
fn outcomes(cluster: &Cluster) -> Option<(u64, u64)> {
    let output = cluster.command(&["groups", "list", "--json"]);
    let listed: Value = serde_json::from_slice(&output.stdout).ok()?;
    let outcomes = &listed["groups"].as_array()?.iter().find(|group| group["group"] == "notify")?["outcomes"];
    Some((outcomes["emitted"].as_u64()?, outcomes["dead_lettered"].as_u64()?))
}

#[test]
fn every_alert_reaches_a_webhook_that_fails_although_notify_is_killed() {
    let hook = Hook::serve();
    let url = format!("http://127.0.0.1:{}/alerts", hook.port);
    let mut cluster = Cluster::without_roles(None, &[("THROUGHLINE_NOTIFY__WEBHOOK_URL", &url)]);
    raise(&cluster);
    cluster.add("notify", "0");
    wait_for("the delivery that is not answered", SOON, || {
        hook.got().posts.iter().any(|(alert, ..)| alert == UNANSWERED).then_some(())
    });
    assert!((hook.taken().len() as u64) < ALERTS - 1, "it is killed in the middle");
    hook.got().holds = false;
    cluster.kill("notify");
    cluster.add("notify", "0");
    wait_for("the weak one in the retry topic", SOON, || {
        (!headers(&cluster, "retry", "tl-retry-count").is_empty()).then_some(())
    });
    assert!(!hook.taken().contains(WEAK));
    hook.got().weak_passes = true;
    wait_for("every alert but the refused one", SOON, || {
        (hook.taken().len() as u64 == ALERTS - 1).then_some(())
    });
    // Delivered and set aside are emitted, so each record set aside counts once more when it is delivered.
    let asides = headers(&cluster, "retry", "tl-retry-count").len() as u64;
    wait_for("books that balance", SOON, || {
        (outcomes(&cluster) == Some((ALERTS - 1 + asides, 1))).then_some(())
    });

    let mut ids: BTreeMap<String, BTreeSet<(String, String)>> = BTreeMap::new();
    for (alert, id, trace, _) in &hook.got().posts {
        ids.entry(alert.clone()).or_default().insert((id.clone(), trace.clone()));
    }
    assert_eq!(ids.len() as u64, ALERTS);
    for (alert, of) in &ids {
        assert_eq!(of.len(), 1, "{alert}: every repeat has its id and trace: {of:?}");
    }
    assert_eq!(ids.values().flatten().collect::<BTreeSet<_>>().len() as u64, ALERTS, "no id is used twice");
    let posts = |wanted: &str| hook.got().posts.iter().filter(|(alert, ..)| alert == wanted).count();
    assert!(posts(UNANSWERED) >= 2, "what the kill left open was repeated");
    assert!(posts(WEAK) >= 3, "twice in place, and from the retry topic");
    let letters = headers(&cluster, "dlt", "__connect.errors.exception.class.name");
    assert_eq!(letters, ["http_422"], "the refused one is the only dead letter");
    cluster.stop("notify");
}

#[test]
fn notify_without_a_webhook_says_what_it_needs() {
    let output = Command::new(binary()).args(["run", "notify", "--data-dir", "/nonexistent"]).output();
    let output = output.expect("the binary runs");
    assert_eq!(output.status.code(), Some(2), "{}", said(&output));
    assert!(said(&output).contains("THROUGHLINE_NOTIFY__WEBHOOK_URL"), "{}", said(&output));
}
