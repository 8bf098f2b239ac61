//! The bridge: MQTT in, records out through a port.
//!
//! A message takes one path wherever it comes from, the own [`listener`](bridge), an existing broker or a
//! [`replay`]: [`feeds`] find its topic and read its payload, [`transform`] makes records of it, and the
//! port takes them. Acknowledgements come back through [`inbox`] by token, so that nothing is awaited a
//! message. docs/bridge.md says what clients see.

pub mod auth;
pub mod bridge;
pub mod config;
pub mod dead_letter;
mod external;
pub mod feeds;
pub mod gate;
pub mod generator;
pub mod inbox;
pub mod json;
mod listener;
mod message;
mod outflow;
mod poison;
pub mod publisher;
mod random;
pub mod replay;
mod ring;
pub mod sessions;
pub mod transform;
pub mod values;

pub use bridge::{Bridge, RunningBridge};
pub use config::{Bounds, BridgeConfig, BridgeError, ExternalConfig, ListenerConfig, LoginConfig};
pub use feeds::Router;
pub use inbox::Inboxes;
pub use publisher::Publisher;
pub use replay::ReplayBridge;
