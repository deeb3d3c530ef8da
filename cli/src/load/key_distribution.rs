//! How often each key is used.

use anyhow::Context;
use rand::Rng;
use rand::distr::Distribution;
use rand::distr::weighted::WeightedIndex;

/// Draws keys by rank.
#[derive(Debug)]
pub(crate) enum KeyDistribution {
    /// All keys equally often.
    Uniform { keys: usize },
    /// A few keys very often.
    Zipf(WeightedIndex<f64>),
}

impl KeyDistribution {
    pub(crate) const fn uniform(keys: usize) -> Self {
        Self::Uniform { keys }
    }

    /// Weighs the key of rank n by 1 / n to the power of `exponent`.
    ///
    /// # Errors
    ///
    /// If there are no keys.
    pub(crate) fn zipf(keys: u32, exponent: f64) -> anyhow::Result<Self> {
        let weights = (1..=keys).map(|rank| f64::from(rank).powf(-exponent));
        Ok(Self::Zipf(WeightedIndex::new(weights).context("there are no keys")?))
    }

    /// Draws a rank, starting at 1.
    pub(crate) fn next_rank(&self) -> usize {
        match self {
            Self::Uniform { keys: 0 | 1 } => 1,
            Self::Uniform { keys } => rand::rng().random_range(1..=*keys),
            Self::Zipf(weights) => weights.sample(&mut rand::rng()) + 1,
        }
    }
}
