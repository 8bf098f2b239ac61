//! The language of Throughline: ids, envelope and codec, outcomes, topics, stage contracts and the pure
//! algebra of rules, twins and sequence runs.
//!
//! Everything here is deterministic. The crate knows no runtime, file, clock, socket or source of
//! randomness: times and random bytes are arguments.

pub mod books;
pub mod catalog;
pub mod codec;
pub mod dead_letter;
pub mod envelope;
pub mod ids;
pub mod keyed;
pub mod outcome;
mod prune;
pub mod record;
pub mod rows;
pub mod rules;
pub mod seq_runs;
pub mod stage;
pub mod strict_toml;
pub mod time;
pub mod twin;

/// Handles of the catalog's topics and the text of their files, generated from `topics/`.
pub mod topics {
    include!(concat!(env!("OUT_DIR"), "/topics.rs"));
}
