//! Time as data: microseconds since the Unix epoch, UTC.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::time::Duration;

/// Microseconds since 1970-01-01T00:00:00Z.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Timestamp(pub i64);

impl Timestamp {
    /// Makes a timestamp from milliseconds, as Kafka states times.
    pub const fn from_millis(ms: i64) -> Self {
        Self(ms.saturating_mul(1_000))
    }

    /// Returns whole milliseconds, rounded towards the past.
    pub const fn as_millis(self) -> i64 {
        self.0.div_euclid(1_000)
    }

    /// Returns whole seconds, rounded towards the past.
    pub const fn as_secs(self) -> i64 {
        self.0.div_euclid(1_000_000)
    }

    /// Returns this time moved into the future by `duration`, saturating.
    pub fn plus(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)))
    }

    /// Returns this time moved into the past by `duration`, saturating.
    pub fn minus(self, duration: Duration) -> Self {
        Self(self.0.saturating_sub(i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)))
    }
}

/// How far a device's own time may lie from the time of arrival. Outside it the clock is certainly wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimeBounds {
    /// How long before arrival: 30 days unless configured, as long as a spool may hold data.
    pub past: Duration,
    /// How long after arrival: 1 hour unless configured, enough for a clock that is a little fast.
    pub future: Duration,
}

impl Default for TimeBounds {
    fn default() -> Self {
        Self { past: Duration::from_secs(30 * 24 * 3_600), future: Duration::from_secs(3_600) }
    }
}

impl TimeBounds {
    /// Says whether a message that arrived at `received_at` may have occurred at `occurred_at`; both
    /// bounds are included.
    pub fn accept(&self, occurred_at: Timestamp, received_at: Timestamp) -> bool {
        received_at.minus(self.past) <= occurred_at && occurred_at <= received_at.plus(self.future)
    }
}

impl fmt::Display for Timestamp {
    /// Writes RFC 3339 in UTC with microseconds, or the raw number outside the calendar's range.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match jiff::Timestamp::from_microsecond(self.0) {
            Ok(t) => write!(f, "{t:.6}"),
            Err(_) => write!(f, "{}us", self.0),
        }
    }
}
