//! Dead letters as an operator meets them: a wrong feed makes them, a dry run shows that its correction would
//! help, the replay takes effect once although the role that carries it out is killed in the middle, and a
//! second replay changes nothing; all that while traffic flows. Beside it a foreign program writes under a schema
//! that the registry does not know yet, and what mends that is shown, replayed by hand and by a policy.

use serde_json::Value;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;
use throughline_kafka::{AckedProducer, KafkaConfig};
use throughline_model::catalog::{Catalog, value_subject};
use throughline_model::codec::Codec;
use throughline_model::dead_letter::header;
use throughline_model::envelope::{DeviceMessage, Measurement};
use throughline_model::ids::derived_message_id;
use throughline_model::record::Outbox;
use throughline_model::topics::DEVICE_TELEMETRY_V1;
use throughline_runtime::ports::Outlet;
use throughline_runtime::{Clock, WallClock};
use throughline_tests::cluster::{Cluster, ROLES};
use throughline_tests::{Load, published, root, said, sqlite, succeed, wait_for};
use uuid::Uuid;

/// Bounded generously: the machine may be busy.
const SOON: Duration = Duration::from_secs(90);
const LETTERS: &str = "device.telemetry.v1.bridge-dlt";
const REFUSED: i64 = 300;

/// Writes the catalog's file of telemetry with a feed that reads epoch and seq under these names.
fn write_feed(directory: &Path, epoch: &str, seq: &str) {
    let file = "device.telemetry.v1.toml";
    let text = std::fs::read_to_string(root().join("topics").join(file)).expect("the topic file exists");
    let feed = format!(
        "\n[[feed]]\nname = \"meter\"\nfilter = \"meter/{{site}}/{{device}}\"\ndecoder = \"json\"\n\
         site = \"capture.site\"\nepoch = \"payload.{epoch}\"\nseq = \"payload.{seq}\"\n\
         exclude = [\"boot\", \"count\"]\n\n\
         [[replay]]\nstage = \"update_twin\"\ncode = \"unknown_schema\"\nafter = \"45s\"\n"
    );
    std::fs::write(directory.join(file), text + &feed).expect("the scratch directory is writable");
}

fn publish(cluster: &Cluster, topic: &str, lines: &str) {
    let port = cluster.mqtt_port();
    let mut command = Command::new("mosquitto_pub");
    command.args(["-h", "127.0.0.1", "-p", &port, "-q", "1", "-t", topic, "-l"]).stdin(Stdio::piped());
    let mut child = command.spawn().expect("mosquitto_pub runs");
    child.stdin.take().expect("it is piped").write_all(lines.as_bytes()).expect("it reads");
    assert!(child.wait().expect("it ends").success(), "mosquitto_pub fails");
}

fn done(cluster: &Cluster, args: &[&str]) -> Value {
    let mut with_json = args.to_vec();
    with_json.push("--json");
    let output = cluster.command(&with_json);
    assert!(output.status.success(), "throughline {}: {}\n{}", args.join(" "), said(&output), cluster.logs());
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{args:?}: {e}: {}", said(&output)))
}

/// Returns how many letters of a code have a fate.
fn letters(cluster: &Cluster, code: &str, fate: &str) -> i64 {
    letters_in(cluster, LETTERS, code, fate)
}

fn letters_in(cluster: &Cluster, topic: &str, code: &str, fate: &str) -> i64 {
    let listed = done(cluster, &["dlq", "list", "--topic", topic, "--code", code]);
    let causes = listed["causes"].as_array().expect("a list");
    causes.iter().map(|cause| cause["fates"][fate].as_i64().expect("a count")).sum()
}

fn request(cluster: &Cluster, id: &str) -> Value {
    let listed = done(cluster, &["dlq", "requests"]);
    let found = listed["requests"].as_array().expect("a list").iter().find(|request| request["id"] == id);
    found.unwrap_or_else(|| panic!("request {id} is not listed: {listed}")).clone()
}

fn rows(cluster: &Cluster, query: &str) -> Vec<i64> {
    let text = sqlite(cluster.database(), query);
    text.split_whitespace().map(|n| n.parse().expect("a number")).collect()
}

/// Returns rows and distinct readings of the meter in the warehouse.
fn meter(cluster: &Cluster) -> Vec<i64> {
    let query = "SELECT count(*), count(DISTINCT seq) FROM reading WHERE site_id = 'depot' AND name = 'kwh'";
    rows(cluster, query)
}

fn records_of_meter(cluster: &Cluster) -> usize {
    let kafka = cluster.kafka.bootstrap();
    let args = ["-b", &kafka, "-C", "-t", "device.telemetry.v1", "-o", "beginning", "-e", "-q", "-f", "%k\n"];
    succeed("kcat", &args).lines().filter(|key| *key == "depot/meter-1").count()
}

/// A program that is not ours: it writes readings under a newer schema before anybody registered it.
struct Foreign {
    id: u32,
    schema: String,
}

const FOREIGN: i64 = 20;
const OF_READINGS: &str = "device.telemetry.v1.bridge_data-dlt";
const OF_RULES: &str = "device.telemetry.v1.evaluate_rules-dlt";
const OF_TWINS: &str = "device.telemetry.v1.update_twin-dlt";

impl Foreign {
    /// Writes its readings, `flow` from 0 on, with the id that the registry will give next.
    fn write(cluster: &Cluster) -> Self {
        let registry = cluster.registry_client();
        let is_taken = |id: &u32| registry.schema(*id).expect("the registry answers").is_some();
        let id = (1..).find(|id| !is_taken(id)).expect("an id is free");
        let catalog = Catalog::embedded();
        let schema = &catalog.topic(DEVICE_TELEMETRY_V1).expect("it is in the catalog").schema;
        let codec = Codec::default();
        codec.bind(DEVICE_TELEMETRY_V1, id, schema).expect("the schema reads");
        let mut outbox = Outbox::default();
        for seq in 0..FOREIGN {
            let mut value = Vec::new();
            codec.encode(DEVICE_TELEMETRY_V1, &reading(seq), &mut value).expect("it fits");
            value.push(0); // The new field is null, the first branch of its union.
            outbox.push(&DEVICE_TELEMETRY_V1.into(), None, Some(b"depot/foreign-1"), Some(&value), []);
        }
        let mut producer = AckedProducer::new(&KafkaConfig::new(cluster.kafka.bootstrap()));
        producer.send_all(&outbox).expect("Kafka takes them");
        let mut newer: Value = serde_json::from_str(schema).expect("JSON");
        let field = serde_json::json!({"name": "firmware", "type": ["null", "string"], "default": null});
        newer["fields"].as_array_mut().expect("fields").push(field);
        Self { id, schema: newer.to_string() }
    }

    /// Registers the schema that it writes under.
    fn register(&self, cluster: &Cluster) {
        let subject = value_subject(DEVICE_TELEMETRY_V1);
        let id = cluster.registry_client().register(&subject, &self.schema).expect("the registry takes it");
        assert_eq!(id, self.id);
    }
}

fn reading(seq: i64) -> DeviceMessage {
    let now = WallClock.now();
    DeviceMessage {
        message_id: derived_message_id(Uuid::max(), "foreign", &seq.to_string()).to_string(),
        trace_id: "4bf92f3577b34da6a3ce929d0e0e4736".to_owned(),
        identity: "sequence".to_owned(),
        site_id: "depot".to_owned(),
        device_id: "foreign-1".to_owned(),
        received_by: "foreign".to_owned(),
        stream: "telemetry".to_owned(),
        epoch: Some(1),
        seq: Some(seq),
        occurred_at: now,
        received_at: now,
        measurements: vec![Measurement {
            name: "flow".to_owned(),
            number: Some(seq as f64),
            ..Measurement::default()
        }],
        ..DeviceMessage::default()
    }
}

/// Puts a rule in force whose alert is raised above a flow.
fn apply_rule(cluster: &Cluster, flow: i64) {
    let file = cluster.scratch().join("flow-high.toml");
    let rule = format!(
        "id = \"flow-high\"\nsummary = \"The flow is high.\"\nseverity = \"warning\"\nwhen = \"flow > {flow}\"\n"
    );
    std::fs::write(&file, rule).expect("the scratch directory is writable");
    let applied = cluster.command(&["rules", "apply", &file.display().to_string()]);
    assert!(applied.status.success(), "{}", said(&applied));
}

/// Returns what a dry run says of the letters of an unknown schema: outcome and count.
fn predicted(cluster: &Cluster, topic: &str, more: &[&str]) -> BTreeMap<String, usize> {
    let replay = ["dlq", "replay", "--topic", topic, "--code", "unknown_schema"];
    let planned = done(cluster, &[&replay[..], more].concat());
    let mut outcomes = BTreeMap::new();
    for effect in planned["topics"][0]["effects"].as_array().expect("effects") {
        let now = effect["now"]["outcome"].as_str().expect("an outcome");
        *outcomes.entry(now.to_owned()).or_default() += 1;
    }
    outcomes
}

fn replayed(cluster: &Cluster, topic: &str, more: &[&str]) -> i64 {
    let replay = ["dlq", "replay", "--topic", topic, "--code", "unknown_schema", "--yes"];
    let asked = done(cluster, &[&replay[..], more].concat());
    let requests = asked["requests"].as_array().expect("requests");
    requests.iter().map(|request| request["replayed"].as_i64().expect("a count")).sum()
}

/// A wrong schema and a wrong rule: what a dry run says follows each correction, and a replay takes effect once.
fn a_schema_and_a_rule_are_mended(cluster: &Cluster, foreign: &Foreign) {
    let all = |outcome: &str| BTreeMap::from([(outcome.to_owned(), FOREIGN as usize)]);
    for topic in [OF_READINGS, OF_RULES, OF_TWINS] {
        wait_for(topic, SOON, || {
            (letters_in(cluster, topic, "unknown_schema", "open") == FOREIGN).then_some(())
        });
    }
    assert_eq!(predicted(cluster, OF_READINGS, &[]), all("dead_lettered"), "the schema is still unknown");
    let unreadable = shown(cluster, OF_READINGS, "unknown_schema");
    assert_eq!(unreadable["schema_id"], foreign.id, "{unreadable}");
    let framed = format!("00{:08x}", foreign.id);
    assert!(unreadable["bytes"].as_str().is_some_and(|bytes| bytes.starts_with(&framed)), "{unreadable}");
    foreign.register(cluster);
    let readable = shown(cluster, OF_READINGS, "unknown_schema");
    assert_eq!(readable["value"]["measurements"][0]["name"], "flow", "{readable}");
    assert_eq!(readable["trace_id"], "4bf92f3577b34da6a3ce929d0e0e4736", "{readable}");
    assert_eq!(predicted(cluster, OF_READINGS, &[]), all("emitted"));

    assert_eq!(predicted(cluster, OF_RULES, &[]), all("filtered"), "the rule is still wrong");
    apply_rule(cluster, 10);
    assert_eq!(predicted(cluster, OF_RULES, &[])["emitted"], 1, "one reading raises the alert");

    for topic in [OF_READINGS, OF_RULES] {
        assert_eq!(replayed(cluster, topic, &[]), FOREIGN, "{topic}");
        assert_eq!(replayed(cluster, topic, &[]), 0, "a second replay finds nothing");
    }
    wait_for("the readings", SOON, || (foreign_rows(cluster)[..2] == [FOREIGN, FOREIGN]).then_some(()));
    wait_for("the alert", SOON, || (foreign_rows(cluster)[2..] == [1, 2]).then_some(()));
    // Where a second one is insisted on, nothing comes of it: at the end of the test neither.
    assert_eq!(predicted(cluster, OF_READINGS, &["--again"]), all("duplicate"));
    for topic in [OF_READINGS, OF_RULES] {
        assert_eq!(replayed(cluster, topic, &["--again"]), FOREIGN, "{topic}");
    }
}

/// Returns rows and distinct readings of the foreign device, its alerts, and the version of their rule.
fn foreign_rows(cluster: &Cluster) -> Vec<i64> {
    let query = "SELECT * FROM (SELECT count(*), count(DISTINCT seq) FROM reading WHERE device_id = 'foreign-1'), \
                 (SELECT count(*), coalesce(max(rule_version), 0) FROM alert WHERE device_id = 'foreign-1')";
    rows(cluster, query)
}

/// The letters of `update_twin` were replayed without anybody asking.
fn a_policy_replays_once(cluster: &Cluster) {
    let by = format!("policy {OF_TWINS}/unknown_schema");
    let of_policy = || {
        let listed = done(cluster, &["dlq", "requests"]);
        let requests = listed["requests"].as_array().expect("a list").clone();
        requests.into_iter().filter(|request| request["requested_by"] == by.as_str()).collect::<Vec<_>>()
    };
    let asked = wait_for("the policy's replay", SOON, || {
        Some(of_policy()).filter(|asked| asked.first().is_some_and(|request| request["status"] == "done"))
    });
    assert_eq!((asked.len(), &asked[0]["replayed"]), (1, &FOREIGN.into()), "{asked:?}");
    let query = "SELECT count(*) FROM twin WHERE device_id = 'foreign-1' AND document LIKE '%flow%'";
    wait_for("the twin", SOON, || (rows(cluster, query) == [1]).then_some(()));
}

/// Shows one letter of a cause.
fn shown(cluster: &Cluster, topic: &str, code: &str) -> Value {
    done(cluster, &["dlq", "show", "--topic", topic, "--code", code, "--limit", "1"])
}

/// What the bridge refused is shown as the device sent it, with cause and headers.
fn a_letter_of_the_bridge_is_shown(cluster: &Cluster, code: &str) {
    let letter = shown(cluster, LETTERS, code);
    let said = ["topic", "stage", "code", "fate"].map(|name| letter[name].as_str().unwrap_or_default());
    assert_eq!(said, [LETTERS, "bridge", code, "open"], "{letter}");
    assert!(letter["text"].as_str().is_some_and(|text| text.contains("\"kwh\":")), "{letter}");
    assert!(letter["message"].as_str().is_some_and(|why| !why.is_empty()), "{letter}");
    let headers = letter["headers"].as_array().expect("headers");
    assert!(headers.iter().any(|h| h["name"] == header::CODE && h["value"] == code), "{letter}");
}

/// A replay that turns out wrong is ended where it is; what it left is open.
fn a_replay_is_cancelled(cluster: &Cluster, code: &str, count: i64) {
    let replay = ["dlq", "replay", "--topic", LETTERS, "--code", code, "--rate", "1", "--yes", "--no-wait"];
    let asked = done(cluster, &replay);
    let id = asked["ids"][0].as_str().expect("an id").to_owned();
    wait_for("the first replay", SOON, || {
        request(cluster, &id)["replayed"].as_i64().filter(|replayed| *replayed >= 1)
    });
    let ended = done(cluster, &["dlq", "cancel", &id]);
    assert_eq!(ended["status"], "cancelled", "{ended}");
    let left = ended["left"].as_i64().expect("a count");
    assert!(0 < left && ended["replayed"].as_i64().expect("a count") < count, "{ended}");
    // What was replayed in vain is a new letter.
    wait_for("open letters", SOON, || (letters(cluster, code, "open") == count).then_some(()));
    let again = cluster.command(&["dlq", "cancel", &id]);
    assert!(!again.status.success(), "nothing is left to cancel: {}", said(&again));
}

/// A letter that was replayed ten times goes to the parking topic, is listed there, and can be dropped there.
fn what_exhausted_its_replays_is_parked_listed_and_dropped(cluster: &Cluster) {
    let code = "values_too_large";
    let headers = [(header::CODE, code.as_bytes()), (header::REPLAY_COUNT, b"10".as_slice())];
    let mut outbox = Outbox::default();
    outbox.push(&LETTERS.into(), None, Some(b"depot/meter-1"), Some(b"worn out"), headers);
    let mut producer = AckedProducer::new(&KafkaConfig::new(cluster.kafka.bootstrap()));
    producer.send_all(&outbox).expect("Kafka takes it");
    let listed = |selector: &[&str]| -> Value {
        let parking = done(cluster, &[&["dlq", "parking"], selector].concat());
        assert_eq!(
            (&parking["schema"], &parking["letters_left_out"]),
            (&"throughline.dlq.parking.v1".into(), &0.into())
        );
        parking["causes"].clone()
    };
    assert_eq!(listed(&[]), serde_json::json!([]), "it is not parked yet");
    let asked = done(cluster, &["dlq", "replay", "--topic", LETTERS, "--code", code, "--yes"]);
    assert_eq!((&asked["requests"][0]["parked"], &asked["requests"][0]["replayed"]), (&1.into(), &0.into()));

    let parked = "device.telemetry.v1.bridge-parking";
    let causes = listed(&["--code", code]);
    let [cause] = &causes.as_array().expect("a list")[..] else { panic!("one cause: {causes}") };
    let shown = ["topic", "stage", "code", "count", "example"].map(|name| &cause[name]);
    assert_eq!(serde_json::json!(shown), serde_json::json!([parked, "bridge", code, 1, "0/0"]), "{cause}");
    assert_eq!(cause["fates"], serde_json::json!({"open": 1, "replayed": 0, "dropped": 0}));
    assert_eq!(listed(&["--code", "payload_empty"]), serde_json::json!([]), "the selector counts");
    let elsewhere = cluster.command(&["dlq", "parking", "--topic", LETTERS]);
    assert_eq!(elsewhere.status.code(), Some(2), "{}", said(&elsewhere));

    let reason = ["--reason", "it never helped", "--yes"];
    done(cluster, &[&["dlq", "drop", "--topic", parked, "--code", code], &reason[..]].concat());
    assert_eq!(listed(&[])[0]["fates"], serde_json::json!({"open": 0, "replayed": 0, "dropped": 1}));
}

/// The warning that comes before retention takes what a group has not read.
fn headroom_is_shown(cluster: &Cluster) {
    let metrics = cluster.metrics("watch");
    let is_ours = |line: &&str| {
        line.starts_with("retention_headroom_seconds{")
            && line.contains("group=\"bridge_data\"")
            && line.contains("topic=\"device.telemetry.v1\"")
    };
    let line =
        metrics.lines().find(is_ours).unwrap_or_else(|| panic!("no headroom of bridge_data:\n{metrics}"));
    let seconds: f64 = line.rsplit(' ').next().and_then(|n| n.parse().ok()).expect("a number");
    assert!((600_000.0..=604_800.0).contains(&seconds), "7 days but for the lag: {line}");
}

#[test]
fn letters_of_a_wrong_feed_are_mended_by_one_replay_that_survives_its_kills() {
    let feeds = tempfile::tempdir().expect("a temporary directory can be made");
    write_feed(feeds.path(), "epoch", "seq");
    let directory = feeds.path().display().to_string();
    let mut cluster = Cluster::start_with(None, &[("THROUGHLINE_TOPICS__DIR", &directory)]);
    cluster.wait_for_bridge();
    apply_rule(&cluster, 500);
    let foreign = Foreign::write(&cluster);
    let load = Load::new(41, 12_000, 200);
    let traffic = load.publish(&cluster.mqtt_port(), 200, cluster.scratch().join("publish.log"));

    // The meter says `boot` and `count`; the feed looks for something else.
    let lines: String = (0..REFUSED).map(|n| format!("{{\"boot\":1,\"count\":{n},\"kwh\":{n}}}\n")).collect();
    publish(&cluster, "meter/depot/meter-1", &lines);
    let shown = done(&cluster, &["dlq", "list", "--topic", LETTERS]);
    let cause = shown["causes"].as_array().expect("a list").iter().find(|c| c["fates"]["open"] == REFUSED);
    let code = cause.unwrap_or_else(|| panic!("{shown}"))["code"].as_str().expect("a code").to_owned();
    let replay = ["dlq", "replay", "--topic", LETTERS, "--code", &code];
    let outcomes = |cluster: &Cluster| -> Vec<String> {
        let planned = done(cluster, &replay);
        assert_eq!(planned["topics"][0]["replayed"], REFUSED, "{planned}");
        let effects = planned["topics"][0]["effects"].as_array().expect("effects").clone();
        assert_eq!(effects.len(), 20, "{planned}");
        effects.iter().map(|e| e["now"]["outcome"].as_str().expect("an outcome").to_owned()).collect()
    };
    assert!(outcomes(&cluster).iter().all(|now| now == "dead_lettered"), "the feed is still wrong");

    a_letter_of_the_bridge_is_shown(&cluster, &code);

    write_feed(feeds.path(), "boot", "count");
    assert!(outcomes(&cluster).iter().all(|now| now == "emitted"), "the correction helps");
    assert_eq!(
        (letters(&cluster, &code, "open"), records_of_meter(&cluster)),
        (REFUSED, 0),
        "nothing was done"
    );
    a_schema_and_a_rule_are_mended(&cluster, &foreign);

    let bridge = ROLES.iter().position(|role| *role == "bridge").expect("a role");
    cluster.kill_and_restart(bridge);
    cluster.wait_for_bridge();

    // Slow enough to be killed in the middle, twice.
    let asked = done(&cluster, &[&replay[..], &["--rate", "40", "--yes", "--no-wait"]].concat());
    let id = asked["ids"][0].as_str().expect("an id").to_owned();
    let reprocess = ROLES.iter().position(|role| *role == "reprocess_dead_letters").expect("a role");
    for at_least in [20, 120] {
        let so_far = wait_for("a part of the replays", SOON, || {
            request(&cluster, &id)["replayed"].as_i64().filter(|replayed| *replayed >= at_least)
        });
        assert!(so_far < REFUSED, "it was not in the middle: {so_far}");
        cluster.kill_and_restart(reprocess);
    }
    let ended = wait_for("the end of the replay", SOON, || {
        let request = request(&cluster, &id);
        (request["status"] == "done").then_some(request)
    });
    assert_eq!((&ended["replayed"], &ended["left"]), (&REFUSED.into(), &0.into()), "{ended}");
    wait_for("the rows of the meter", SOON, || (meter(&cluster) == [REFUSED, REFUSED]).then_some(()));
    assert_eq!(records_of_meter(&cluster) as i64, REFUSED, "each letter was replayed once");
    assert_eq!(letters(&cluster, &code, "replayed"), REFUSED);

    // A second replay finds nothing; where it is insisted on, nothing comes of it.
    let again = done(&cluster, &[&replay[..], &["--yes"]].concat());
    assert_eq!(again["ids"].as_array().map(Vec::len), Some(0), "{again}");
    let again = done(&cluster, &[&replay[..], &["--again", "--yes"]].concat());
    assert_eq!(again["requests"][0]["replayed"], REFUSED, "{again}");
    wait_for("the second replays", SOON, || (records_of_meter(&cluster) as i64 == 2 * REFUSED).then_some(()));
    // What comes after them in the same partition shows that they were passed.
    publish(&cluster, "meter/depot/meter-1", &format!("{{\"boot\":1,\"count\":{REFUSED},\"kwh\":1}}\n"));
    let one_more = REFUSED + 1;
    wait_for("the last reading", SOON, || (meter(&cluster)[1] == one_more).then_some(()));
    assert_eq!(meter(&cluster), [one_more, one_more], "no row twice");

    // What cannot be mended is dropped, and is open no more.
    published(traffic, Duration::from_secs(240));
    let listed = done(&cluster, &["dlq", "list", "--topic", LETTERS]);
    let open: Vec<&Value> =
        listed["causes"].as_array().expect("a list").iter().filter(|c| c["fates"]["open"] != 0).collect();
    let garbage = open.first().expect("the traffic has garbage")["code"].as_str().expect("a code");
    let count = letters(&cluster, garbage, "open");
    a_replay_is_cancelled(&cluster, garbage, count);
    let dropped = done(
        &cluster,
        &["dlq", "drop", "--topic", LETTERS, "--code", garbage, "--reason", "line noise", "--yes"],
    );
    assert_eq!(dropped["requests"][0]["dropped"], count, "{dropped}");
    assert_eq!((letters(&cluster, garbage, "open"), letters(&cluster, garbage, "dropped")), (0, count));

    what_exhausted_its_replays_is_parked_listed_and_dropped(&cluster);

    // The traffic took no harm.
    let query = "SELECT count(*), count(DISTINCT site_id || '/' || device_id || '#' || seq || ' ' || name) FROM reading WHERE site_id != 'depot'";
    let expected = (load.readings * 3) as i64;
    let arrived = || (rows(&cluster, query)[0] >= expected).then_some(());
    wait_for("the rows of the traffic", Duration::from_secs(240), arrived);
    assert_eq!(rows(&cluster, query), [expected, expected]);
    a_policy_replays_once(&cluster);
    assert_eq!(foreign_rows(&cluster), [FOREIGN, FOREIGN, 1, 2], "no replay had a second effect");
    headroom_is_shown(&cluster);
}
