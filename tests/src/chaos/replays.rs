//! Replays of dead letters that go on while who carries them out is killed.

use super::Random;
use super::injection::Injection;
use crate::cluster::Cluster;
use crate::{said, wait_for};
use serde_json::Value;
use std::time::Duration;

/// So many requests; a letter would be parked after ten replays.
pub const MOST: u64 = 8;
/// Long enough for a broker to come back.
const SOON: Duration = Duration::from_secs(120);
const LETTERS: &str = "device.telemetry.v1.bridge_data-dlt";

/// Derives what is done between two requests: to who replays, to who refuses, to Kafka below both.
pub fn draw(random: &mut Random) -> Injection {
    let replayer = "reprocess_dead_letters";
    let choices = [
        Injection::KillRole(replayer, "0"),
        Injection::KillRole(replayer, "0"),
        Injection::KillRole("bridge_data", "0"),
        Injection::HangRole(replayer, random.pause(500, 9_000)),
        Injection::JoinAndLeave(replayer, random.pause(2_000, 8_000)),
        Injection::KillKafka(random.pause(0, 2_000)),
        Injection::HangKafka(random.pause(500, 6_000)),
    ];
    random.one_of(&choices)
}

/// Asks for a replay of every letter that is open.
///
/// # Panics
/// When it cannot be asked for in time.
pub fn ask(cluster: &Cluster) {
    let replay =
        ["dlq", "replay", "--topic", LETTERS, "--rate", "200", "--reason", "chaos", "--yes", "--no-wait"];
    let mut answer = String::new();
    // Kafka may be starting again: a request that was not acknowledged is made anew, and its letters belong to
    // whichever came first.
    wait_for("a request to replay", SOON, || {
        let asked = cluster.command(&replay);
        answer = said(&asked);
        asked.status.success().then_some(())
    });
}

/// Waits until every request is done and returns how many letters were replayed.
///
/// # Panics
/// When one is not done in time.
pub fn wait_for_all(cluster: &Cluster) -> u64 {
    wait_for("the end of the replays", SOON * 2, || {
        let listed: Value =
            serde_json::from_slice(&cluster.command(&["dlq", "requests", "--json"]).stdout).ok()?;
        let requests = listed["requests"].as_array()?;
        let is_done = |request: &Value| request["status"] == "done";
        requests.iter().all(is_done).then(|| requests.iter().filter_map(|r| r["replayed"].as_u64()).sum())
    })
}
