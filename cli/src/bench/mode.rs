//! The modes in which the tasks of a worker lock.

use rand::Rng;
use serde::{Deserialize, Serialize};
use shardlock::{LockManager, LockMode, LockRequest};

/// How each lock is requested.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum ModeChoice {
    Exclusive,
    /// This part of the locks is shared, and the others are exclusive.
    Mixed {
        shared: f64,
    },
    /// One of this many permits.
    Permits {
        limit: u16,
    },
}

impl ModeChoice {
    /// Whether there are readers and writers, whose waits are counted apart.
    pub(super) const fn is_mixed(self) -> bool {
        matches!(self, Self::Mixed { .. })
    }

    /// The mode of the next lock.
    pub(super) fn next(self) -> LockMode {
        match self {
            Self::Exclusive => LockMode::Exclusive,
            Self::Mixed { shared } if rand::rng().random_bool(shared) => LockMode::Shared,
            Self::Mixed { .. } => LockMode::Exclusive,
            Self::Permits { limit } => LockMode::Permits { weight: 1, limit },
        }
    }
}

/// A request for a key in this mode.
pub(super) fn request(locks: &LockManager, key: &str, mode: LockMode) -> LockRequest {
    match mode {
        LockMode::Shared => locks.lock(key).shared(),
        LockMode::Permits { weight, limit } => locks.permits(key, limit).weight(weight),
        // The enum is not exhaustive outside of its crate.
        _ => locks.lock(key),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn part_of_the_locks_is_shared() {
        let shared = |part| {
            let choice = ModeChoice::Mixed { shared: part };
            (0..10_000).filter(|_| choice.next() == LockMode::Shared).count()
        };
        assert_eq!((shared(0.0), shared(1.0)), (0, 10_000));
        assert!((9_300..9_700).contains(&shared(0.95)), "{}", shared(0.95));
    }
}
