//! Random choices that a seed repeats.

use std::time::Duration;

use crate::clock;

/// A small generator (xorshift): choices only have to differ from seed to seed.
#[derive(Clone, Debug)]
pub struct Dice {
    seed: u64,
    state: u64,
}

impl Dice {
    /// The choices of a seed.
    #[must_use]
    pub fn seeded(seed: u64) -> Self {
        // Neighbouring seeds must not begin alike, and the generator cannot leave zero.
        let state = seed
            .wrapping_add(0x9e37_79b9_7f4a_7c15)
            .wrapping_mul(0xbf58_476d_1ce4_e5b9)
            | 1;
        Self { seed, state }
    }

    /// The seed in `HIGHWATER_TEST_SEED`, or one from the clock.
    #[must_use]
    pub fn thrown() -> Self {
        let given = std::env::var("HIGHWATER_TEST_SEED")
            .ok()
            .and_then(|seed| seed.parse().ok());
        Self::seeded(given.unwrap_or_else(|| clock::unix_micros(clock::now()).unsigned_abs()))
    }

    /// What repeats the choices.
    #[must_use]
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// A number below `bound`, which must not be 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state.wrapping_mul(0x2545_f491_4f6c_dd1d) % bound
    }

    /// True once in `of` times.
    pub fn once_in(&mut self, of: u64) -> bool {
        self.below(of) == 0
    }

    /// One of several, which must not be none.
    pub fn one<T: Copy>(&mut self, of: &[T]) -> T {
        of[usize::try_from(self.below(of.len() as u64)).unwrap_or(0)]
    }

    /// A duration in milliseconds, `to` excluded.
    pub fn millis(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_millis(from + self.below(to - from))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_repeats_its_choices_and_another_differs() {
        let choices = |seed| {
            let mut dice = Dice::seeded(seed);
            (0..50).map(|_| dice.below(1000)).collect::<Vec<_>>()
        };
        assert_eq!(choices(7), choices(7));
        assert_ne!(choices(7), choices(8));
        assert!(choices(0).iter().any(|choice| *choice != 0));
    }
}
