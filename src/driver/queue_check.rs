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
    if is_forgotten(&shard.owner_tag(cycle), &seen) && entry.queued_cycle() == Some(cycle) {
        crate::log::warn!(shard = %shard.name, "the server lost a place in the queue of a key, as after FLUSHALL; the acquires of all waiting keys are sent again");
        ask_again(shard, None);
    }
}

/// Whether the store no longer knows the cycle.
fn is_forgotten(ours: &str, seen: &KeyState) -> bool {
    // Shared holders and those of permits are in a list of their own.
    let holds = seen
        .holder
        .iter()
        .chain(&seen.holders)
        .any(|holder| holder.owner == ours);
    // Only the head of a long queue is returned, and only some of many holders.
    let is_whole = seen.queue.len() < INSPECTED_MAX && seen.holders.len() < INSPECTED_MAX;
    !holds && is_whole && !seen.queue.iter().any(|member| member == ours)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mode::LockMode;
    use crate::store::Holder;

    /// Regression: a shared holder that had not learned of its lease yet was reported as lost.
    #[test]
    fn cycle_that_waits_or_holds_in_any_mode_is_not_forgotten() {
        let holder = || Holder {
            owner: "ours".to_owned(),
            is_manager: true,
            mode: LockMode::Shared,
            remaining: None,
        };
        let nothing = KeyState {
            holder: None,
            holders: vec![],
            holder_count: 0,
            permits_in_use: 0,
            queue: vec![],
            queue_length: 0,
            last_token: None,
        };
        assert!(is_forgotten("ours", &nothing));
        let mut seen = nothing.clone();
        seen.queue.push("ours".to_owned());
        assert!(!is_forgotten("ours", &seen) && is_forgotten("another", &seen));
        let mut seen = nothing.clone();
        seen.holder = Some(holder());
        assert!(!is_forgotten("ours", &seen));
        let mut seen = nothing.clone();
        seen.holders.push(holder());
        assert!(!is_forgotten("ours", &seen));
        seen.holders = vec![holder(); INSPECTED_MAX];
        assert!(!is_forgotten("another", &seen), "it may be one of the others");
    }
}
