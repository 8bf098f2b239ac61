//! The in-memory ports pass the suites that the real adapters pass.

use throughline_model::record::TopicPartition;
use throughline_model::rows::{ReadingRow, Rows};
use throughline_testkit::conformance::{self, Surroundings};
use throughline_testkit::{
    FakeClock, MemoryCluster, MemoryOutlet, MemorySource, MemoryStore, MemoryTables, MemoryTransactions,
};

#[test]
fn the_store_in_memory_conforms() {
    let cluster = MemoryCluster::new(FakeClock::default());
    let mut store = MemoryStore::new(cluster.faults());
    store.refuse(|row| row.number.is_some_and(f64::is_infinite));
    let seen = store.clone();
    let mut count = || seen.rows().readings.len() as u64;
    let partitions = [TopicPartition::new("t", 0), TopicPartition::new("t", 1)];
    conformance::store(&mut store, "g", &partitions, &mut count);
    let poison = ReadingRow { number: Some(f64::INFINITY), ..ReadingRow::default() };
    let poison = Rows { readings: vec![poison], ..Rows::default() };
    conformance::store_refuses_data(&mut store, "h", &partitions[0], &poison, &mut count);
}

#[test]
fn the_cluster_in_memory_conforms() {
    let cluster = MemoryCluster::new(FakeClock::default());
    cluster.create_topic("in", 1);
    cluster.create_topic("out", 1);
    let mut source = MemorySource::join(&cluster, "g", &["in"], 4);
    let mut transactions = MemoryTransactions::new(&cluster, "i", "g", &source);
    let mut reader = MemoryTables::new(&cluster);
    let mut append = |key: &str, value: &str| {
        cluster.append_keyed("in", key, value.as_bytes());
    };
    let around =
        Surroundings { group: "g", input: "in", output: "out", append: &mut append, reader: &mut reader };
    conformance::source_and_transactions(&mut source, &mut transactions, around);
    conformance::outlet(&mut MemoryOutlet::new(&cluster), "letters", &mut reader);
}
