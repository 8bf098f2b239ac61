//! The adapter against a real Kafka; all tests share one broker, but for the outage's.

mod common;
mod conformance;
mod forgotten;
mod groups;
mod ingress;
mod operators;
mod outage;
mod tables;
mod transactions;
