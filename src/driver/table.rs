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
use crate::mode::LockMode;

#[derive(Debug, Default)]
pub(super) struct Table {
    /// One map for each kind of mode: within a process, too, a key's modes contend in the store.
    entries: [DashMap<LockKey, Arc<Entry>, RandomState>; LockMode::KINDS],
    /// The number of entries. Counting them would lock every part of the table.
    count: AtomicUsize,
}

impl Table {
    pub(super) fn get(&self, key: &LockKey, mode: LockMode) -> Option<Arc<Entry>> {
        self.of(mode).get(key).map(|entry| Arc::clone(&entry))
    }

    /// The entries of the key, of any mode.
    pub(super) fn get_all(&self, key: &LockKey) -> Vec<Arc<Entry>> {
        let found = self.entries.iter().filter_map(|entries| entries.get(key));
        found.map(|entry| Arc::clone(&entry)).collect()
    }

    fn of(&self, mode: LockMode) -> &DashMap<LockKey, Arc<Entry>, RandomState> {
        let [exclusive, shared, permits] = &self.entries;
        match mode {
            LockMode::Exclusive => exclusive,
            LockMode::Shared => shared,
            LockMode::Permits { .. } => permits,
        }
    }

    /// The entry of the key; inserts a new one if there is none.
    pub(super) fn get_or_insert(&self, key: &LockKey, mode: LockMode, new: impl FnOnce() -> Arc<Entry>) -> Arc<Entry> {
        if let Some(entry) = self.get(key, mode) {
            return entry;
        }
        Arc::clone(&self.of(mode).entry(key.clone()).or_insert_with(|| {
            self.count.fetch_add(1, Ordering::SeqCst);
            new()
        }))
    }

    /// Removes exactly this entry. Returns whether it was in the table.
    pub(super) fn remove(&self, entry: &Arc<Entry>) -> bool {
        let removed = self
            .of(entry.mode)
            .remove_if(&entry.key, |_, there| Arc::ptr_eq(there, entry));
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
        let entries = self.entries.iter().flat_map(DashMap::iter);
        entries.map(|entry| Arc::clone(&entry)).collect()
    }
}
