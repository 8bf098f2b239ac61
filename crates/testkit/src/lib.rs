//! What tests of several crates share: a clock that tests move, a Kafka in memory with transactions, groups
//! and scripted faults, in-memory ports, builders, and the conformance suites that every adapter passes.

mod build;
mod clock;
mod cluster;
pub mod conformance;
mod effector;
mod faults;
mod ports;
pub mod scenario;
mod source;
mod store;
mod stretches;

pub use build::{codec, device_message, measurement, schema_of};
pub use clock::FakeClock;
pub use cluster::{Committed, MemoryCluster};
pub use effector::{MemoryEffector, MemoryReceiver};
pub use faults::{Fault, Faults, KILLED, Point};
pub use ports::{MemoryIngress, MemoryOutlet, MemorySchemas, MemoryTables, MemoryTransactions};
pub use source::MemorySource;
pub use store::{MemoryStore, StoredRows};
pub use stretches::MemoryStretches;
