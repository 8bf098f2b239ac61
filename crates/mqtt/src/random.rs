//! Random numbers for ids: cheap, one generator a worker, not for secrets.

use std::hash::{BuildHasher, Hasher, RandomState};

/// SplitMix64 (Steele, Lea, Flood 2014), seeded by the operating system.
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// Seeds a generator. The standard library asks the operating system for the keys of `RandomState`;
    /// what is wanted here is exactly such a key, and no dependency for it.
    pub fn from_os() -> Self {
        let mut hasher = RandomState::new().build_hasher();
        hasher.write_u64(u64::from(std::process::id()));
        Self(hasher.finish())
    }

    /// Returns the next number.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}
