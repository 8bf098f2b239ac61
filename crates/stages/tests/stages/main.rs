//! Stages as tables of records and outcomes, driven in memory.

mod bridge_data;
mod driver;
mod load;
mod update_twin;
