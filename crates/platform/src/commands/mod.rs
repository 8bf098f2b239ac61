//! One module a command; each has `Args` and `run`.

pub mod adopt;
pub mod bench;
pub mod devices;
pub mod dlq;
pub mod doctor;
pub mod explain;
pub mod groups;
pub mod policy;
pub mod rules;
pub mod run;
pub mod simulate;
pub mod tap;
pub mod topics;
pub mod trace;
pub mod twin;
pub mod up;
