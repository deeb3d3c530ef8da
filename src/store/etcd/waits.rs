//! The cycles of this manager that stand in a line behind somebody: what has to be watched for them, and which leases to keep alive.
//!
//! # Implementation details
//!
//! A request that finds its cycle in a line adds it here; the request that makes it the owner, or gives it back, takes it out. The
//! background part of the store watches the key of who stands before it (`watch`) and renews its lease (`keeping`): the watchdog does that
//! only for what is held.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::cycles::Lease;
use crate::clock::Moment;
use crate::key::LockKey;
use crate::protocol::Cycle;

/// A cycle that waits.
#[derive(Debug, Clone)]
pub(super) struct Wait {
    pub(super) key: LockKey,
    pub(super) lease: Lease,
    /// The key of who stands before it.
    pub(super) before: Vec<u8>,
    /// The last revision at which that is known to have stood there.
    pub(super) seen_at: i64,
    /// When to renew its lease.
    keep_at: Moment,
}

#[derive(Debug, Default)]
pub(super) struct Waits {
    inner: Mutex<Inner>,
    /// Tells the watch that something changed.
    pub(super) changed: Notify,
    /// Tells the keeper that somebody waits.
    pub(super) added: Notify,
}

#[derive(Debug, Default)]
struct Inner {
    by_cycle: HashMap<Cycle, Wait>,
    /// What the watch was not told of yet. Empty while there is no watch, which begins with all.
    changed: HashSet<Cycle>,
    watched: bool,
}

/// The part of a lease after which it is renewed.
const KEEP_EVERY: u32 = 4;
/// Leases that are due within this time are renewed together.
const KEEP_TOGETHER: Duration = Duration::from_millis(100);

impl Wait {
    pub(super) fn new(key: LockKey, lease: Lease, before: Vec<u8>, seen_at: i64) -> Self {
        Self {
            key,
            lease,
            before,
            seen_at,
            // The request that says so has just renewed it.
            keep_at: Moment::now() + keep_every(lease),
        }
    }
}

fn keep_every(lease: Lease) -> Duration {
    Duration::from_secs(lease.secs) / KEEP_EVERY
}

impl Waits {
    pub(super) fn add(&self, cycle: Cycle, wait: Wait) {
        let mut inner = self.inner.lock();
        inner.by_cycle.insert(cycle, wait);
        inner.tell(cycle);
        drop(inner);
        self.changed.notify_one();
        self.added.notify_one();
    }

    pub(super) fn remove(&self, cycle: Cycle) {
        let mut inner = self.inner.lock();
        if inner.by_cycle.remove(&cycle).is_some() {
            inner.tell(cycle);
            drop(inner);
            self.changed.notify_one();
        }
    }

    /// A watch begins: from now on it is told of every change, and of all that are there first.
    pub(super) fn watch(&self) {
        let mut inner = self.inner.lock();
        inner.watched = true;
        inner.changed = inner.by_cycle.keys().copied().collect();
        drop(inner);
        self.changed.notify_one();
    }

    /// There is no watch any more.
    pub(super) fn unwatch(&self) {
        let mut inner = self.inner.lock();
        inner.watched = false;
        inner.changed.clear();
    }

    /// What changed since the last call: the wait, or nothing where it is over.
    pub(super) fn changes(&self) -> Vec<(Cycle, Option<Wait>)> {
        let mut inner = self.inner.lock();
        let changed = std::mem::take(&mut inner.changed);
        changed
            .into_iter()
            .map(|cycle| (cycle, inner.by_cycle.get(&cycle).cloned()))
            .collect()
    }

    /// The leases that are due to be renewed, which count as renewed from now on, and when the next ones are.
    pub(super) fn due(&self, now: Moment) -> (Vec<(Cycle, LockKey, Lease)>, Option<Moment>) {
        let mut inner = self.inner.lock();
        let mut due = Vec::new();
        let mut next: Option<Moment> = None;
        for (&cycle, wait) in &mut inner.by_cycle {
            if wait.keep_at <= now + KEEP_TOGETHER {
                wait.keep_at = now + keep_every(wait.lease);
                due.push((cycle, wait.key.clone(), wait.lease));
            }
            next = Some(next.map_or(wait.keep_at, |next| next.min(wait.keep_at)));
        }
        (due, next)
    }
}

impl Inner {
    fn tell(&mut self, cycle: Cycle) {
        if self.watched {
            self.changed.insert(cycle);
        }
    }
}
