//! The listener on a real socket, with raw bytes, over an in-memory Kafka.

#[path = "../support/mod.rs"]
mod support;

mod access;
mod bounds;
mod delivery;
mod packets;
mod sessions;

const UNMATCHED: &str = "device.unmatched.v1.bridge-dlt";
const TELEMETRY_DLT: &str = "device.telemetry.v1.bridge-dlt";
