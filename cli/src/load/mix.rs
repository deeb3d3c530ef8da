//! How often each key is used.

use anyhow::Context;
use rand::Rng;
use rand::distr::Distribution;
use rand::distr::weighted::WeightedIndex;

/// Draws keys by rank.
#[derive(Debug)]
pub(crate) enum Mix {
    /// All keys equally often.
    Even { keys: usize },
    /// A few keys very often.
    Skewed(WeightedIndex<f64>),
}

impl Mix {
    pub(crate) const fn even(keys: usize) -> Self {
        Self::Even { keys }
    }

    /// Weighs the key of rank n by 1 / n to the power of `exponent`.
    ///
    /// # Errors
    ///
    /// If there are no keys.
    pub(crate) fn zipf(keys: u32, exponent: f64) -> anyhow::Result<Self> {
        let weights = (1..=keys).map(|rank| f64::from(rank).powf(-exponent));
        Ok(Self::Skewed(WeightedIndex::new(weights).context("there are no keys")?))
    }

    /// Draws a rank, starting at 1.
    pub(crate) fn next_rank(&self) -> usize {
        match self {
            Self::Even { keys: 0 | 1 } => 1,
            Self::Even { keys } => rand::rng().random_range(1..=*keys),
            Self::Skewed(weights) => weights.sample(&mut rand::rng()) + 1,
        }
    }
}
