//! Fresh random inputs; the seed is printed, so a failure can be repeated with `RINGBACK_SEED`.

use std::hash::{BuildHasher, Hasher, RandomState};

/// A small generator (splitmix64).
pub(super) struct Random(u64);

impl Random {
    /// From `RINGBACK_SEED`, else another one each time.
    pub(super) fn fresh(test: &str) -> Self {
        let seed = std::env::var("RINGBACK_SEED").ok().and_then(|text| text.parse().ok());
        let seed = seed.unwrap_or_else(|| RandomState::new().build_hasher().finish());
        eprintln!("{test}: RINGBACK_SEED={seed}");
        Self(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    pub(super) fn below(&mut self, limit: u32) -> u32 {
        (self.next() % u64::from(limit)) as u32
    }

    /// Uniform in -1..1.
    pub(super) fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1_u32 << 23) as f32 - 1.0
    }

    pub(super) fn floats(&mut self, count: usize, scale: f32) -> Vec<f32> {
        (0..count).map(|_| scale * self.unit()).collect()
    }
}
