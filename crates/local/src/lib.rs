//! The platform on one machine.
//!
//! Kafka, PostgreSQL, Mosquitto and Apicurio as managed children of this process (feature `managed`), an
//! embedded schema registry, the lock and the address list of a data directory. Used by `throughline up` and
//! by tests; the production image does not contain the feature.
//!
//! What is started here is the real thing. A child is supervised by a shell that reads a pipe from this
//! process, so that nothing outlives even a SIGKILL ([`child`] tells how).

#[cfg(feature = "managed")]
pub mod apicurio;
#[cfg(feature = "managed")]
pub mod artifacts;
#[cfg(feature = "managed")]
pub mod child;
pub mod endpoints;
mod error;
#[cfg(feature = "managed")]
pub mod kafka;
pub mod lock;
#[cfg(feature = "managed")]
pub mod mosquitto;
pub mod ports;
#[cfg(feature = "managed")]
pub mod postgres;
pub mod registry;
#[cfg(feature = "managed")]
mod scratch;

pub use endpoints::Endpoints;
pub use error::LocalError;
pub use lock::DirLock;
#[cfg(feature = "managed")]
pub use scratch::scratch_dir;
