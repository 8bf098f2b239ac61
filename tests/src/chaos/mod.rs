//! Faults under load, derived from a seed: what is done to which part, when, and what is counted.

mod database;
mod disk;
mod injection;
pub mod journal;
mod plan;
mod proxy;
mod replays;
mod rig;
mod wall;

pub use database::{Lock, lock};
pub use injection::{Injection, Link, Means, roles};
pub use plan::{Plan, Told};
pub use proxy::Proxy;
pub use rig::{Rig, poison, poison_journal};

use std::time::Duration;

/// A small generator whose seed is in the journal (Vigna's splitmix64).
pub struct Random(pub u64);

impl Random {
    /// Returns the next number.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Returns a number from `least` to `most`, both included.
    pub fn between(&mut self, least: u64, most: u64) -> u64 {
        least + self.draw() % (most - least + 1)
    }

    /// Returns one of them.
    pub fn one_of<T: Copy>(&mut self, items: &[T]) -> T {
        items[(self.draw() % items.len() as u64) as usize]
    }

    /// Returns a time from `least_ms` to `most_ms`.
    pub fn pause(&mut self, least_ms: u64, most_ms: u64) -> Duration {
        Duration::from_millis(self.between(least_ms, most_ms))
    }
}
