//! The loops over the in-memory ports: virtual time, scripted faults, no sleeping.
#![expect(clippy::unwrap_used, reason = "a test that unwraps fails with the place")]

mod act;
mod common;
mod decide;
mod exactly_once;
mod incarnation;
mod load;
mod replay_policies;
mod reprocess;
