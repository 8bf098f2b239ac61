//! Prints how much CPU time one record costs in a stage: decode, decide, encode, without Kafka.
//!
//! `cargo run --release -p throughline-stages --example stage_cost`

#![expect(clippy::print_stdout, reason = "printing is what it is for")]

use std::sync::Arc;
use throughline_model::codec::Codec;
use throughline_model::envelope::flag;
use throughline_model::keyed::{Keyed, KeyedState as _};
use throughline_model::outcome::Outcome;
use throughline_model::record::{Batch, TopicPartition};
use throughline_model::rows::Rows;
use throughline_model::stage::{Decide, Effects, Input, Load};
use throughline_model::time::Timestamp;
use throughline_model::topics::{DATA_CORE_READING_V1, DEVICE_TELEMETRY_V1};
use throughline_stages::bridge_data::BridgeData;
use throughline_stages::load_warehouse::LoadWarehouse;
use throughline_stages::update_twin::UpdateTwin;
use throughline_testkit::{codec, device_message, measurement};

const DEVICES: usize = 1_000;
const SEQS: i64 = 200;
/// Records between two commits: 100 ms at 100,000 a second.
const COMMIT_EVERY: usize = 10_000;

/// Returns the CPU time of this thread in ns: the wall clock would count what else the machine does.
fn cpu_ns() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux states it");
    text.split(' ').next().and_then(|ns| ns.parse().ok()).expect("its first field is the time on a CPU")
}

fn main() {
    let codec = codec();
    for with_ts in [true, false] {
        let telemetry = batch(&codec, DEVICE_TELEMETRY_V1, with_ts);
        let form = if with_ts { "with ts" } else { "without ts" };
        decide(&format!("bridge_data, {form}"), BridgeData::default(), &codec, &telemetry);
        decide(&format!("update_twin, {form}"), UpdateTwin::default(), &codec, &telemetry);
    }
    load(&codec, &batch(&codec, DATA_CORE_READING_V1, true));
}

fn batch(codec: &Codec, topic: &'static str, with_ts: bool) -> Batch {
    let mut batch = Batch::new(TopicPartition::new(topic, 0));
    let mut value = Vec::new();
    for seq in 0..SEQS {
        for device in 0..DEVICES {
            let at = Timestamp(1_800_000_000_000_000 + seq * 1_000_000);
            let values = ["temperature", "pressure", "flow"].map(|name| measurement(name, seq as f64 + 0.5));
            let name = format!("device-{device}");
            let mut message = device_message("site-1", &name, seq, at, values.to_vec());
            if !with_ts {
                message.flags = vec![flag::NO_TS.to_owned()];
            }
            value.clear();
            codec.encode(topic, &message, &mut value).expect("fits its schema");
            let key = format!("site-1/{name}");
            batch.push(batch.len() as i64, at, Some(key.as_bytes()), Some(&value), []);
        }
    }
    batch
}

fn decide<S: Decide>(what: &str, mut stage: S, codec: &Arc<Codec>, batch: &Batch) {
    let mut state: Keyed<S::State> = Keyed::default();
    let mut effects = Effects::new(Arc::clone(codec));
    let mut changelog = Vec::new();
    let (mut changelog_bytes, mut changelog_ns) = (0, 0_u64);
    let started = cpu_ns();
    for (i, record) in batch.iter().enumerate() {
        let input = Input { topic: &batch.source.topic, replayed: false, partition: 0, record, codec };
        let settled = stage.process(&input, &mut state, &mut effects);
        assert_eq!(settled.outcome, Outcome::Emitted, "{settled:?}");
        if i % COMMIT_EVERY == COMMIT_EVERY - 1 {
            let commit = cpu_ns();
            state.drain_dirty(|_, s| s.encode(codec, &mut changelog)).expect("a state fits its form");
            changelog_bytes += changelog.len();
            changelog.clear();
            effects.outbox_mut().clear();
            changelog_ns += cpu_ns() - commit;
        }
    }
    let process_ns = cpu_ns() - started - changelog_ns;
    let records = batch.len() as u64;
    println!(
        "{what:28} {:5} ns a record, changelog {:4} ns and {:4} bytes a record ({} records, {DEVICES} devices, a commit every {COMMIT_EVERY})",
        process_ns / records,
        changelog_ns / records,
        changelog_bytes / batch.len(),
        batch.len()
    );
}

fn load(codec: &Arc<Codec>, batch: &Batch) {
    let mut stage = LoadWarehouse::new();
    let mut rows = Rows::default();
    let started = cpu_ns();
    let mut count = 0;
    for (i, record) in batch.iter().enumerate() {
        let input = Input { topic: &batch.source.topic, replayed: false, partition: 0, record, codec };
        let settled = stage.rows(&input, &mut rows);
        assert_eq!(settled.outcome, Outcome::Emitted, "{settled:?}");
        if i % COMMIT_EVERY == COMMIT_EVERY - 1 {
            count += rows.len();
            rows.clear();
        }
    }
    let ns = (cpu_ns() - started) / batch.len() as u64;
    println!("{:28} {ns:5} ns a record of 3 measurements ({count} rows)", "load_warehouse");
}
