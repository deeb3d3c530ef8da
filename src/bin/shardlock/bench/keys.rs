//! Which task wants which key, and what was last seen on each.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use shardlock::FencingToken;

use crate::load::mix::Mix;

/// Which keys the tasks of a worker want.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Wanted {
    /// Each its own; those of this worker begin here.
    Own { first: u64 },
    /// Any of so many.
    Random { keys: u32, skew: Option<f64> },
}

/// The keys of a worker, by their number in this process.
#[derive(Debug)]
pub(super) struct Keys {
    first: u64,
    mix: Option<Mix>,
    /// The last token of each key. Whoever holds the key alone writes here.
    marks: Vec<AtomicU64>,
}

/// What a look at a key's mark said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Seen {
    Growth,
    /// A token that was not above the last one of this process.
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

    /// The key that this task wants next.
    pub(super) fn next(&self, task: usize) -> usize {
        self.mix.as_ref().map_or(task, |mix| mix.next_rank() - 1)
    }

    /// Writes the name of a key in place of what is there.
    pub(super) fn name(&self, key: usize, name: &mut String) {
        name.clear();
        // It can't fail: a String takes everything.
        write!(name, "{}", self.first + key as u64).ok();
    }

    /// Leaves the token on the key, which the caller has just taken.
    pub(super) fn enter(&self, key: usize, token: FencingToken) -> Seen {
        let last = self.marks[key].swap(token.get(), Ordering::Relaxed);
        if last < token.get() {
            Seen::Growth
        } else {
            Seen::Regression
        }
    }

    /// Whether nobody else of this process has entered since.
    pub(super) fn is_alone(&self, key: usize, token: FencingToken) -> bool {
        self.marks[key].load(Ordering::Relaxed) == token.get()
    }
}
