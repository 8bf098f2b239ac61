//! The stages, one verb-named module each: what happens to a message, as pure functions of it and of the
//! state that the runtime keeps. No IO, no clock, no randomness.

pub mod bridge_data;
pub mod checks;
pub mod evaluate_rules;
mod json;
pub mod load_warehouse;
pub mod notify;
pub mod project_twins;
pub mod update_twin;
