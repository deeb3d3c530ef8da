//! Which task locks which key, and whether the guards of each key follow one another as they must.

use std::fmt::Write;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use shardlock::LockMode;

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
    guards: Vec<KeyGuards>,
}

/// What this process has seen of the guards of a key. Only holders of the key write it.
#[derive(Debug, Default)]
struct KeyGuards {
    /// The last token of an exclusive guard.
    exclusive: AtomicU64,
    /// The largest token of a shared guard.
    shared: AtomicU64,
    /// The permits in use.
    permits: AtomicU32,
}

/// What a task saw of a key's other guards when it got its own.
#[derive(Debug, Clone, Copy)]
pub(super) struct KeyEntry {
    /// The token was not larger than one that it must exceed.
    pub(super) has_regressed: bool,
    /// The tokens of guards that must not follow before this one is released.
    exclusive: u64,
    shared: u64,
    /// More permits were in use than there are.
    exceeds_limit: bool,
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
            guards: (0..count).map(|_| KeyGuards::default()).collect(),
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

    /// Records a guard that the caller has just acquired.
    pub(super) fn enter(&self, key: usize, mode: LockMode, token: u64) -> KeyEntry {
        let guards = &self.guards[key];
        let mut entry = KeyEntry {
            has_regressed: false,
            exclusive: 0,
            shared: 0,
            exceeds_limit: false,
        };
        match mode {
            LockMode::Shared => {
                entry.exclusive = guards.exclusive.load(Ordering::Relaxed);
                entry.has_regressed = token <= entry.exclusive;
                guards.shared.fetch_max(token, Ordering::Relaxed);
            }
            LockMode::Permits { weight, limit } => {
                let in_use = guards.permits.fetch_add(weight.into(), Ordering::Relaxed) + u32::from(weight);
                entry.exceeds_limit = in_use > limit.into();
            }
            _ => {
                let last = guards.exclusive.swap(token, Ordering::Relaxed);
                entry.exclusive = token;
                entry.shared = guards.shared.load(Ordering::Relaxed);
                entry.has_regressed = token <= last.max(entry.shared);
            }
        }
        entry
    }

    /// Records that the caller is about to release its guard. Returns whether no other task of this
    /// process had the key meanwhile that must not have it at the same time.
    pub(super) fn leave(&self, key: usize, mode: LockMode, entry: KeyEntry) -> bool {
        let guards = &self.guards[key];
        let is_last_writer = || guards.exclusive.load(Ordering::Relaxed) == entry.exclusive;
        match mode {
            LockMode::Shared => is_last_writer(),
            LockMode::Permits { weight, .. } => {
                guards.permits.fetch_sub(weight.into(), Ordering::Relaxed);
                !entry.exceeds_limit
            }
            _ => is_last_writer() && guards.shared.load(Ordering::Relaxed) == entry.shared,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: LockMode = LockMode::Permits { weight: 2, limit: 3 };

    fn keys() -> Keys {
        Keys::new(KeyChoice::Own { first: 0 }, 1).unwrap()
    }

    #[test]
    fn guards_that_follow_one_another_are_right() {
        let keys = keys();
        let writer = keys.enter(0, LockMode::Exclusive, 5);
        assert!(!writer.has_regressed && keys.leave(0, LockMode::Exclusive, writer));
        // The order of the tokens of readers means nothing.
        let readers = [9, 8].map(|number| keys.enter(0, LockMode::Shared, number));
        for reader in readers {
            assert!(!reader.has_regressed && keys.leave(0, LockMode::Shared, reader));
        }
        let writer = keys.enter(0, LockMode::Exclusive, 10);
        assert!(!writer.has_regressed && keys.leave(0, LockMode::Exclusive, writer));
        for _ in 0..2 {
            let permits = keys.enter(0, LIMIT, 11);
            assert!(keys.leave(0, LIMIT, permits));
        }
    }

    #[test]
    fn token_below_that_of_an_earlier_writer_or_reader_has_regressed() {
        let keys = keys();
        keys.enter(0, LockMode::Exclusive, 5);
        assert!(keys.enter(0, LockMode::Shared, 5).has_regressed);
        assert!(!keys.enter(0, LockMode::Shared, 8).has_regressed);
        assert!(keys.enter(0, LockMode::Exclusive, 7).has_regressed);
        assert!(keys.enter(0, LockMode::Exclusive, 7).has_regressed);
    }

    #[test]
    fn guards_that_exclude_each_other_are_found() {
        use LockMode::{Exclusive, Shared};
        for (first, second) in [(Exclusive, Exclusive), (Exclusive, Shared), (Shared, Exclusive)] {
            let keys = keys();
            let held = keys.enter(0, first, 1);
            keys.enter(0, second, 2);
            assert!(!keys.leave(0, first, held), "{first} and {second}");
        }
        let keys = keys();
        keys.enter(0, LIMIT, 1);
        let beyond = keys.enter(0, LIMIT, 2);
        assert!(!keys.leave(0, LIMIT, beyond));
    }
}
