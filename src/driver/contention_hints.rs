//! Keys that other managers recently contended for, to avoid futile fast-path attempts.

use std::hash::BuildHasher;
use std::sync::atomic::{AtomicU64, Ordering};

use foldhash::fast::RandomState;

use crate::key::LockKey;

/// A small table of hashes with one key per place: a newer key replaces an older one. It is only a
/// hint; a wrong entry costs one extra request.
#[derive(Debug)]
pub(super) struct ContentionHints {
    hasher: RandomState,
    places: Box<[AtomicU64]>,
}

/// The maximum number of keys remembered, at 8 bytes each.
const PLACES: usize = 4096;

impl Default for ContentionHints {
    fn default() -> Self {
        Self {
            hasher: RandomState::default(),
            places: (0..PLACES).map(|_| AtomicU64::new(0)).collect(),
        }
    }
}

impl ContentionHints {
    fn place(&self, key: &LockKey) -> (&AtomicU64, u64) {
        let hash = self.hasher.hash_one(key).max(1);
        (&self.places[hash as usize % PLACES], hash)
    }

    pub(super) fn is_contended(&self, key: &LockKey) -> bool {
        let (place, hash) = self.place(key);
        place.load(Ordering::Relaxed) == hash
    }

    pub(super) fn note(&self, key: &LockKey, seen: bool) {
        let (place, hash) = self.place(key);
        if seen {
            place.store(hash, Ordering::Relaxed);
        } else if place.load(Ordering::Relaxed) == hash {
            // If this races, a key is forgotten or remembered once too often, which costs one
            // request.
            place.store(0, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hint_is_remembered_until_it_is_cleared() {
        let hints = ContentionHints::default();
        let key = LockKey::new("k").unwrap();
        assert!(!hints.is_contended(&key));
        hints.note(&key, true);
        assert!(hints.is_contended(&key));
        hints.note(&LockKey::new("other").unwrap(), false);
        hints.note(&key, false);
        assert!(!hints.is_contended(&key));
    }
}
