//! Which keys are wanted how often.

use anyhow::Context;
use rand::Rng;
use rand::distr::Distribution;
use rand::distr::weighted::WeightedIndex;

/// Draws keys by their rank.
#[derive(Debug)]
pub(crate) enum Mix {
    /// All alike.
    Even { keys: usize },
    /// A few of them very often.
    Skewed(WeightedIndex<f64>),
}

impl Mix {
    pub(crate) const fn even(keys: usize) -> Self {
        Self::Even { keys }
    }

    /// The weight of the key of rank n is 1 / n to the power of `exponent`.
    ///
    /// # Errors
    ///
    /// If there are no keys.
    pub(crate) fn zipf(keys: u32, exponent: f64) -> anyhow::Result<Self> {
        let weights = (1..=keys).map(|rank| f64::from(rank).powf(-exponent));
        Ok(Self::Skewed(WeightedIndex::new(weights).context("there are no keys")?))
    }

    /// A rank, from 1 on.
    pub(crate) fn next_rank(&self) -> usize {
        match self {
            Self::Even { keys: 0 | 1 } => 1,
            Self::Even { keys } => rand::rng().random_range(1..=*keys),
            Self::Skewed(weights) => weights.sample(&mut rand::rng()) + 1,
        }
    }
}
