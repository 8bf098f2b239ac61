//! What a loop is told, how it is asked to end, and how it ends when a person must act.

use crate::policy::{RETRY_LEAST, RETRY_MOST};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// A dead letter that was replayed this often is parked instead of being replayed once more: something is
/// wrong that replays do not mend.
pub const REPLAYS_MAX: u32 = 10;

/// Bounds and intervals of a loop.
#[derive(Clone, Debug)]
pub struct LoopConfig {
    /// How long something may wait for the commit; `None` takes the stage's own
    /// [`commit_interval`](throughline_model::stage::StageSpec::commit_interval).
    pub commit_interval: Option<Duration>,
    /// A commit comes early when this many records were processed (load: rows made) since the last.
    pub records_max: usize,
    /// A commit comes early when this many bytes were read since the last; also how much output a decide
    /// stage holds before it hands it to the open transaction.
    pub bytes_max: usize,
    /// The longest wait for an event, which bounds how late a table change or a timer is seen.
    pub poll_wait: Duration,
    /// First delay after a failure; doubled up to [`LoopConfig::retry_most`].
    pub retry_least: Duration,
    /// Longest delay after a failure.
    pub retry_most: Duration,
    /// How far the tick of idle partitions stays behind the clock, so that a record which the broker has
    /// stamped but the consumer has not fetched yet comes before the timers that are later than it.
    pub tick_grace: Duration,
    /// A dead letter that was replayed this often goes to the parking topic instead.
    pub replays_max: u32,
    /// Act stages: how long a message waits in the retry topic the first time; doubled each time, up to
    /// [`LoopConfig::aside_most`].
    pub aside_least: Duration,
    /// Act stages: the longest wait in the retry topic. Those behind it in the same partition wait along.
    pub aside_most: Duration,
    /// Act stages: what was set aside this often and fails again is dead-lettered.
    pub asides_max: u32,
}

impl Default for LoopConfig {
    fn default() -> Self {
        Self {
            commit_interval: None,
            records_max: 10_000,
            bytes_max: 8 << 20,
            poll_wait: Duration::from_millis(100),
            retry_least: RETRY_LEAST,
            retry_most: RETRY_MOST,
            tick_grace: Duration::from_millis(250),
            replays_max: REPLAYS_MAX,
            aside_least: Duration::from_secs(5),
            aside_most: Duration::from_secs(60),
            asides_max: 12,
        }
    }
}

/// Asks loops to commit what is in flight, give their partitions back and return.
#[derive(Clone, Debug, Default)]
pub struct Shutdown(Arc<AtomicBool>);

impl Shutdown {
    /// Makes a flag that nobody has raised.
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks every loop that shares the flag to end.
    pub fn request(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Says whether the end was asked for.
    pub fn is_requested(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// A stage stopped because a person must act.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("stage `{stage}` stopped ({code}): {message}")]
pub struct Stopped {
    /// The stage.
    pub stage: &'static str,
    /// The code that `throughline explain` describes.
    pub code: &'static str,
    /// What, where, why, and the command that helps.
    pub message: String,
}
