//! Making room: where new keys would pass the limit, leases that are kept idle are given back.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Entry, Shard};
use crate::clock::Moment;

/// So much of the limit is made free at a time, so that not every new key costs a look at all.
const PART: usize = 16;

/// Gives back what is kept idle, what would end soonest first, until the keys are a part below the limit.
pub(super) fn make(shards: &[Arc<Shard>]) {
    let Some(first) = shards.first() else { return };
    // First, so that who finds too little room from now on asks again.
    first.load.makes_room.store(false, Ordering::SeqCst);
    let mut kept: Vec<(Moment, Arc<Entry>)> = Vec::new();
    for entry in shards.iter().flat_map(|shard| shard.table.all()) {
        kept.extend(entry.lingers_until().map(|until| (until, entry)));
    }
    let limit = first.limits.keys;
    let leaving = first.load.spare().saturating_sub(kept.len());
    let used = first.load.keys.load(Ordering::Relaxed).saturating_sub(leaving);
    let too_many = used.saturating_sub(limit - limit / PART);
    if too_many < kept.len() {
        kept.select_nth_unstable_by_key(too_many, |(until, _)| *until);
        kept.truncate(too_many);
    }
    for (_, entry) in kept {
        entry.in_background(|queue, cx| queue.let_go(cx));
    }
}
