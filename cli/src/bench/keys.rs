//! Which task locks which key, and the last token seen on each key.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use shardlock::FencingToken;

use crate::load::mix::Mix;

/// Which keys the tasks of a worker lock.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Wanted {
    /// Each task has its own key; those of this worker start here.
    Own { first: u64 },
    /// Each lock is of a random key.
    Random { keys: u32, skew: Option<f64> },
}

/// The keys of a worker, by their number within the process.
#[derive(Debug)]
pub(super) struct Keys {
    first: u64,
    mix: Option<Mix>,
    /// The last token of each key. Only the holder of the key writes it.
    marks: Vec<AtomicU64>,
}

/// Whether a token was larger than the last one on its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Seen {
    Growth,
    /// The token was not larger than the last one in this process.
    Regression,
}

impl Keys {
    pub(super) fn new(wanted: Wanted, tasks: u32) -> anyhow::Result<Self> {
        let (first, mix, count) = match wanted {
            Wanted::Own { first } => (first, None, tasks),
            Wanted::Random { keys, skew: None } => (0, Some(Mix::even(keys as usize)), keys),
            Wanted::Random { keys, skew: Some(skew) } => (0, Some(Mix::zipf(keys, skew)?), keys),
        };
        Ok(Self {
            first,
            mix,
            marks: (0..count).map(|_| AtomicU64::new(0)).collect(),
        })
    }

    /// The key that this task locks next.
    pub(super) fn next(&self, task: usize) -> usize {
        self.mix.as_ref().map_or(task, |mix| mix.next_rank() - 1)
    }

    /// Replaces `name` by the name of the key.
    pub(super) fn name(&self, key: usize, name: &mut String) {
        name.clear();
        // Writing to a `String` can't fail.
        write!(name, "{}", self.first + key as u64).ok();
    }

    /// Records the token of a key that the caller has just locked.
    pub(super) fn enter(&self, key: usize, token: FencingToken) -> Seen {
        let last = self.marks[key].swap(token.get(), Ordering::Relaxed);
        if last < token.get() {
            Seen::Growth
        } else {
            Seen::Regression
        }
    }

    /// Whether no other task of this process has locked the key since.
    pub(super) fn is_alone(&self, key: usize, token: FencingToken) -> bool {
        self.marks[key].load(Ordering::Relaxed) == token.get()
    }
}
