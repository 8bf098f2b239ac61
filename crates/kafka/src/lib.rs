//! Kafka behind the ports of the runtime. The only user of rdkafka; no type of it leaves this crate.
//!
//! - [`GroupSource`] reads partitions as a member of a group and never loses its place in it.
//! - [`TransactionalProducer`] writes outputs, state and offsets in one transaction.
//! - [`TopicReader`] reads tables (compacted topics) to the end they had when asked.
//! - [`PartitionReader`] reads stretches of partitions, for dead letters that are replayed.
//! - [`AckedProducer`] and [`IngressProducer`] write outside transactions.
//! - [`ask_incarnation`] tells a topic from another that has the same name.
//! - [`RegistryClient`] speaks Confluent's schema registry API.
//! - [`admin`], [`browse`] and [`lag`] serve operators: topics, groups, records, delays.
//! - [`baseline`] is the plain client that benchmarks compare with.

pub mod admin;
pub mod baseline;
mod bounds;
pub mod browse;
mod bystander;
mod config;
mod context;
mod failure;
mod incarnation;
mod ingress;
pub mod lag;
mod message;
mod outlet;
mod reader;
pub mod registry;
mod sent;
mod source;
mod stall;
mod stretch;
mod tail;
mod transactions;

pub use config::{GroupProtocol, KafkaConfig};
pub use incarnation::ask_incarnation;
pub use ingress::{IngressConfig, IngressProducer};
pub use outlet::AckedProducer;
pub use reader::TopicReader;
pub use registry::{RegistryClient, RegistryConfig, RegistryError, SubjectVersion};
pub use source::{BatchBounds, GroupSource, Membership};
pub use stretch::PartitionReader;
pub use transactions::TransactionalProducer;
