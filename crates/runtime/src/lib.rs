//! One visible loop per kind of stage, over ports.
//!
//! The crate knows no Kafka, MQTT or SQL: a loop takes a [`ports::Source`] and writes through
//! [`ports::Transactions`] (decide) or [`ports::Store`] (load).

pub mod ports;
