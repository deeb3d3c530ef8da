//! Checks whether our entries in the store's queues still exist.
//!
//! # Implementation details
//!
//! A command that empties a server, such as FLUSHALL, deletes leases and queues together. The
//! holder's renewal then finds no queue to serve, and no waiter is notified. So every few seconds
//! one waiting key is inspected. If the store no longer knows its cycle, all waiting keys of the
//! shard send their acquire again.

use std::sync::Arc;

use super::Shard;
use super::subscriber::ask_again;
use crate::protocol::Cycle;
use crate::random;
use crate::store::{INSPECTED_MAX, KeyState};

/// Inspects one waiting key, chosen at random.
pub(super) async fn check(shard: &Arc<Shard>) {
    let entries = shard.table.all();
    let begin = random::number_in(0..entries.len() as u64) as usize;
    let (after, before) = entries.split_at(begin.min(entries.len()));
    let mut queued = before
        .iter()
        .chain(after)
        .filter_map(|entry| Some((entry, entry.queued_cycle()?)));
    let Some((entry, cycle)) = queued.next() else { return };
    // If the shard is unreachable, nothing is known to be lost.
    let Ok(seen) = shard.inspect_again(&entry.key).await else {
        return;
    };
    // A grant in flight when the store was asked has made the cycle the holder there.
    if is_forgotten(shard, cycle, &seen) && entry.queued_cycle() == Some(cycle) {
        crate::log::warn!(shard = %shard.name, "the server lost a place in the queue of a key, as after FLUSHALL; the acquires of all waiting keys are sent again");
        ask_again(shard, None);
    }
}

/// Whether the store no longer knows the cycle.
fn is_forgotten(shard: &Shard, cycle: Cycle, seen: &KeyState) -> bool {
    let ours = shard.owner_tag(cycle);
    let holds = seen.holder.as_ref().is_some_and(|holder| holder.owner == ours);
    // Only the head of a long queue is returned.
    !holds && seen.queue.len() < INSPECTED_MAX && !seen.queue.contains(&ours)
}
