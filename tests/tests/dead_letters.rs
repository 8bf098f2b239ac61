//! Dead letters as an operator meets them: a wrong feed makes them, a dry run shows that its correction would
//! help, the replay takes effect once although the role that carries it out is killed in the middle, and a
//! second replay changes nothing; all that while traffic flows.

use serde_json::Value;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;
use throughline_tests::cluster::{Cluster, ROLES};
use throughline_tests::{Load, published, root, said, sqlite, succeed, wait_for};

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
         exclude = [\"boot\", \"count\"]\n"
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
    let listed = done(cluster, &["dlq", "list", "--topic", LETTERS, "--code", code]);
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

#[test]
fn letters_of_a_wrong_feed_are_mended_by_one_replay_that_survives_its_kills() {
    let feeds = tempfile::tempdir().expect("a temporary directory can be made");
    write_feed(feeds.path(), "epoch", "seq");
    let directory = feeds.path().display().to_string();
    let mut cluster = Cluster::start_with(None, &[("THROUGHLINE_TOPICS__DIR", &directory)]);
    cluster.wait_for_bridge();
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

    write_feed(feeds.path(), "boot", "count");
    assert!(outcomes(&cluster).iter().all(|now| now == "emitted"), "the correction helps");
    assert_eq!(
        (letters(&cluster, &code, "open"), records_of_meter(&cluster)),
        (REFUSED, 0),
        "nothing was done"
    );
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
    let dropped = done(
        &cluster,
        &["dlq", "drop", "--topic", LETTERS, "--code", garbage, "--reason", "line noise", "--yes"],
    );
    assert_eq!(dropped["requests"][0]["dropped"], count, "{dropped}");
    assert_eq!((letters(&cluster, garbage, "open"), letters(&cluster, garbage, "dropped")), (0, count));

    // The traffic took no harm.
    let query = "SELECT count(*), count(DISTINCT site_id || '/' || device_id || '#' || seq || ' ' || name) FROM reading WHERE site_id != 'depot'";
    let expected = (load.readings * 3) as i64;
    let arrived = || (rows(&cluster, query)[0] >= expected).then_some(());
    wait_for("the rows of the traffic", Duration::from_secs(240), arrived);
    assert_eq!(rows(&cluster, query), [expected, expected]);
}
