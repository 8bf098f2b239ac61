//! Time for the loops: a clock, deadlines that survive a clock set back, and bounded back-off.

use std::time::{Duration, SystemTime, UNIX_EPOCH};
use throughline_model::time::Timestamp;

/// Tells the platform's time. The loops never sleep on it: they wait in [`crate::ports::Source::poll`].
pub trait Clock: Send + Sync {
    /// Returns the time now, UTC.
    fn now(&self) -> Timestamp;
}

/// The machine's clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct WallClock;

impl Clock for WallClock {
    fn now(&self) -> Timestamp {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Timestamp(0).plus(since)
    }
}

/// Returns the time from `since` to `now`. A clock that was set back gives [`Duration::MAX`], so that a
/// deadline measured against it has passed instead of never coming.
pub(crate) fn elapsed(since: Timestamp, now: Timestamp) -> Duration {
    u64::try_from(now.0.saturating_sub(since.0)).map_or(Duration::MAX, Duration::from_micros)
}

/// Returns the seconds from `since` to `now`, 0 where the clocks disagree on their order.
pub(crate) fn seconds_between(since: Timestamp, now: Timestamp) -> f64 {
    now.0.saturating_sub(since.0).max(0) as f64 / 1e6
}

/// Bounded exponential back-off without jitter: members of one group are few and fail apart anyway, and
/// tests stay deterministic.
#[derive(Debug)]
pub(crate) struct Backoff {
    least: Duration,
    most: Duration,
    failed: Option<(Timestamp, Duration)>,
}

impl Backoff {
    /// Makes a back-off that waits `least`, then twice as long each time, up to `most`.
    pub(crate) fn new(least: Duration, most: Duration) -> Self {
        Self { least, most, failed: None }
    }

    /// Notes a failure at `now`; the next attempt is due after the doubled delay.
    pub(crate) fn failed(&mut self, now: Timestamp) {
        let delay = self.failed.map_or(self.least, |(_, last)| last.saturating_mul(2).min(self.most));
        self.failed = Some((now, delay));
    }

    /// Notes a success: the next failure begins with the least delay.
    pub(crate) fn succeeded(&mut self) {
        self.failed = None;
    }

    /// Says whether the last attempt failed.
    pub(crate) fn has_failed(&self) -> bool {
        self.failed.is_some()
    }

    /// Returns how long to wait from `now` until the next attempt; zero when it is due.
    pub(crate) fn remaining(&self, now: Timestamp) -> Duration {
        self.failed.map_or(Duration::ZERO, |(at, delay)| delay.saturating_sub(elapsed(at, now)))
    }

    /// Says whether an attempt is due.
    pub(crate) fn is_due(&self, now: Timestamp) -> bool {
        self.remaining(now).is_zero()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_doubles_up_to_its_bound_and_begins_again_after_success() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_millis(350));
        let now = Timestamp(0);
        assert!(backoff.is_due(now));
        for delay_ms in [100, 200, 350, 350] {
            backoff.failed(now);
            assert_eq!(backoff.remaining(now), Duration::from_millis(delay_ms));
        }
        assert!(backoff.is_due(now.plus(Duration::from_millis(350))));
        backoff.succeeded();
        backoff.failed(now);
        assert_eq!(backoff.remaining(now), Duration::from_millis(100));
    }

    #[test]
    fn a_clock_set_back_lets_a_deadline_pass() {
        let mut backoff = Backoff::new(Duration::from_secs(5), Duration::from_secs(5));
        backoff.failed(Timestamp(10_000_000));
        assert!(backoff.is_due(Timestamp(1_000_000)));
    }
}
