//! Stages as tables of records and outcomes, driven in memory.

mod bridge_data;
mod driver;
mod load;
mod notify;
mod update_twin;
