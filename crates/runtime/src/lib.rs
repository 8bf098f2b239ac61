//! One visible loop per kind of stage, over ports.
//!
//! The crate knows no Kafka, MQTT or SQL: a loop takes a [`ports::Source`] and writes through
//! [`ports::Transactions`] (decide, act), [`ports::Store`] (load) or [`ports::Effector`] (act). Everything that happens to a stage is a
//! [`ports::PipelineEvent`]; one loop on one thread consumes it. Time comes from a [`Clock`] and passes
//! only while the source is polled, so a test drives a loop through hours without sleeping.

mod act;
mod clock;
pub mod codes;
mod config;
mod dead_letter;
mod decide;
mod incarnation;
mod lane;
mod load;
pub mod policy;
pub mod ports;
mod replay_policies;
mod reprocess;
mod sabotage;
mod schemas;
mod signals;
mod tables;
mod timers;

pub use act::{ActLoop, ActPorts, run_act};
pub use clock::{Clock, WallClock};
pub use config::{LoopConfig, REPLAYS_MAX, Shutdown, Stopped};
pub use dead_letter::{Fault, Retry, push_dead_letter, push_retry};
pub use decide::{DecideLoop, DecidePorts, run_decide};
pub use incarnation::{AskIncarnation, Incarnation};
pub use load::{LoadLoop, LoadPorts, run_load};
pub use replay_policies::{PolicyPorts, ReplayPolicies};
pub use reprocess::{ReprocessDeadLetters, push_replay, reprocess_spec};
pub use sabotage::Sabotage;
