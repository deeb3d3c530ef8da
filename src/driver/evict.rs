//! Eviction: when new keys would exceed the limit, lingering leases are released.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Entry, ManagerContext, Shard};
use crate::clock::Moment;

/// Releases lingering leases, those that end soonest first, until the number of keys is a
/// sixteenth below the limit.
pub(super) fn evict(manager: &ManagerContext, shards: &[Arc<Shard>]) {
    // Reset first, so that a task that finds too little room from now on requests another eviction.
    manager.usage.is_evicting.store(false, Ordering::SeqCst);
    let mut kept: Vec<(Moment, Arc<Entry>)> = Vec::new();
    for entry in shards.iter().flat_map(|shard| shard.table.all()) {
        kept.extend(entry.lingers_until().map(|until| (until, entry)));
    }
    let leaving = manager.usage.evictable().saturating_sub(kept.len());
    let used = manager.usage.keys.load(Ordering::Relaxed).saturating_sub(leaving);
    let too_many = manager.limits.evictions(used);
    if too_many < kept.len() {
        kept.select_nth_unstable_by_key(too_many, |(until, _)| *until);
        kept.truncate(too_many);
    }
    for (_, entry) in kept {
        entry.apply_in_background(|queue, cx| queue.evict(cx));
    }
}
