//! Which task locks which key, and the last token seen on each key.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use shardlock::FencingToken;

use crate::load::key_distribution::KeyDistribution;

/// Which keys the tasks of a worker lock.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum KeyChoice {
    /// Each task has its own key; those of this worker start here.
    Own { first: u64 },
    /// Each lock is of a random key.
    Random { keys: u32, skew: Option<f64> },
}

/// The keys of a worker, by their number within the process.
#[derive(Debug)]
pub(super) struct Keys {
    first: u64,
    distribution: Option<KeyDistribution>,
    /// The last token of each key. Only the holder of the key writes it.
    last_tokens: Vec<AtomicU64>,
}

/// Whether a token was larger than the last one on its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TokenOrder {
    Increasing,
    /// The token was not larger than the last one in this process.
    Regressed,
}

impl Keys {
    pub(super) fn new(choice: KeyChoice, tasks: u32) -> anyhow::Result<Self> {
        let (first, distribution, count) = match choice {
            KeyChoice::Own { first } => (first, None, tasks),
            KeyChoice::Random { keys, skew: None } => (0, Some(KeyDistribution::uniform(keys as usize)), keys),
            KeyChoice::Random { keys, skew: Some(skew) } => (0, Some(KeyDistribution::zipf(keys, skew)?), keys),
        };
        Ok(Self {
            first,
            distribution,
            last_tokens: (0..count).map(|_| AtomicU64::new(0)).collect(),
        })
    }

    /// The key that this task locks next.
    pub(super) fn next(&self, task: usize) -> usize {
        self.distribution
            .as_ref()
            .map_or(task, |distribution| distribution.next_rank() - 1)
    }

    /// Replaces `name` by the name of the key.
    pub(super) fn name(&self, key: usize, name: &mut String) {
        name.clear();
        // Writing to a `String` can't fail.
        write!(name, "{}", self.first + key as u64).ok();
    }

    /// Records the token of a key that the caller has just locked.
    pub(super) fn record_token(&self, key: usize, token: FencingToken) -> TokenOrder {
        let last = self.last_tokens[key].swap(token.get(), Ordering::Relaxed);
        if last < token.get() {
            TokenOrder::Increasing
        } else {
            TokenOrder::Regressed
        }
    }

    /// Whether no other task of this process has locked the key since.
    pub(super) fn is_last_token(&self, key: usize, token: FencingToken) -> bool {
        self.last_tokens[key].load(Ordering::Relaxed) == token.get()
    }
}
