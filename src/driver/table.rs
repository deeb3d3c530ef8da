//! The table of the keys in use on a shard.
//!
//! References into the map never leave this file: one that lived across an `await` would block
//! every task that touches the same part of the table.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use dashmap::DashMap;
use foldhash::fast::RandomState;

use super::entry::Entry;
use crate::key::LockKey;

#[derive(Debug, Default)]
pub(super) struct Table {
    entries: DashMap<LockKey, Arc<Entry>, RandomState>,
    /// The number of entries. Counting them would lock every part of the table.
    count: AtomicUsize,
}

impl Table {
    pub(super) fn get(&self, key: &LockKey) -> Option<Arc<Entry>> {
        self.entries.get(key).map(|entry| Arc::clone(&entry))
    }

    /// The entry of the key; inserts a new one if there is none.
    pub(super) fn get_or_insert(&self, key: &LockKey, new: impl FnOnce() -> Arc<Entry>) -> Arc<Entry> {
        if let Some(entry) = self.get(key) {
            return entry;
        }
        Arc::clone(&self.entries.entry(key.clone()).or_insert_with(|| {
            self.count.fetch_add(1, Ordering::SeqCst);
            new()
        }))
    }

    /// Removes exactly this entry. Returns whether it was in the table.
    pub(super) fn remove(&self, entry: &Arc<Entry>) -> bool {
        let removed = self.entries.remove_if(&entry.key, |_, there| Arc::ptr_eq(there, entry));
        if removed.is_some() {
            self.count.fetch_sub(1, Ordering::SeqCst);
        }
        removed.is_some()
    }

    pub(super) fn len(&self) -> usize {
        self.count.load(Ordering::SeqCst)
    }

    /// Clones of all entries, so that no part of the table stays locked while they are used.
    pub(super) fn all(&self) -> Vec<Arc<Entry>> {
        self.entries.iter().map(|entry| Arc::clone(&entry)).collect()
    }
}
