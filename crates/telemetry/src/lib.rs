//! What a process says about itself: metrics, logs, traces, health.
//!
//! Metrics have one home, the table in [`names`]. A handle ([`Counter`], [`Gauge`], [`Histogram`]) is looked
//! up once, kept, and used from any thread without a lock. The same table of series is read by `/metrics`
//! ([`http`]) and by the OTLP exporter ([`subscriber`]), so the two cannot disagree.
//!
//! Health has one home too: each role gets a [`RoleHealth`] and says when its loop turned, whether it can do
//! its job and what it thinks of its dependencies; [`http`] serves that without asking anybody.

mod health;
pub mod http;
mod metrics;
pub mod names;
mod otlp;
pub mod spans;
pub mod subscriber;
mod text;

pub use health::{Health, RoleHealth, STALL_LIMIT};
pub use metrics::{Counter, Gauge, Histogram, counter, forget, gauge, histogram};
pub use names::Metric;
pub use subscriber::{LogFormat, TelemetryConfig, TelemetryError, TelemetryGuard, init};
pub use text::render;
