//! This manager's waiting cycles: which keys to watch for them, and which leases to keep alive.
//!
//! # Implementation details
//!
//! A request that finds its cycle behind another in the queue adds it here. The request that makes
//! it a holder, or releases it, removes it. The store's background work watches what blocks the
//! cycle (`watch`) and renews the cycle's lease (`keep_alive`); the watchdog renews only what is
//! held.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::cycles::EtcdLease;
use super::queue::Blocker;
use crate::clock::Moment;
use crate::key::LockKey;
use crate::protocol::Cycle;

/// A waiting cycle.
#[derive(Debug, Clone)]
pub(super) struct WaitingCycle {
    pub(super) key: LockKey,
    pub(super) lease: EtcdLease,
    /// What it waits for.
    pub(super) blocker: Blocker,
    /// The last revision at which that is known to have existed.
    pub(super) seen_at: i64,
    /// When to renew its lease.
    keep_at: Moment,
}

#[derive(Debug, Default)]
pub(super) struct Waits {
    inner: Mutex<Inner>,
    /// Notifies the watch of a change.
    pub(super) changed: Notify,
    /// Notifies the keeper of a new wait.
    pub(super) added: Notify,
}

#[derive(Debug, Default)]
struct Inner {
    by_cycle: HashMap<Cycle, WaitingCycle>,
    /// The cycles whose change the watch has not received yet. Empty while there is no watch; a new
    /// one starts with all cycles.
    changed: HashSet<Cycle>,
    watched: bool,
}

/// A lease is renewed after this fraction of its lifetime: a quarter.
const KEEP_EVERY: u32 = 4;
/// Leases that are due within this time are renewed together.
const KEEP_TOGETHER: Duration = Duration::from_millis(100);

impl WaitingCycle {
    pub(super) fn new(key: LockKey, lease: EtcdLease, blocker: Blocker, seen_at: i64) -> Self {
        Self {
            key,
            lease,
            blocker,
            seen_at,
            // The request that leads here has just renewed it.
            keep_at: Moment::now() + renew_interval(lease),
        }
    }
}

fn renew_interval(lease: EtcdLease) -> Duration {
    Duration::from_secs(lease.secs) / KEEP_EVERY
}

impl Waits {
    pub(super) fn add(&self, cycle: Cycle, wait: WaitingCycle) {
        let mut inner = self.inner.lock();
        inner.by_cycle.insert(cycle, wait);
        inner.mark_changed(cycle);
        drop(inner);
        self.changed.notify_one();
        self.added.notify_one();
    }

    pub(super) fn remove(&self, cycle: Cycle) {
        let mut inner = self.inner.lock();
        if inner.by_cycle.remove(&cycle).is_some() {
            inner.mark_changed(cycle);
            drop(inner);
            self.changed.notify_one();
        }
    }

    /// A watch begins: it receives all current waits first, and then every change.
    pub(super) fn watch(&self) {
        let mut inner = self.inner.lock();
        inner.watched = true;
        inner.changed = inner.by_cycle.keys().copied().collect();
        drop(inner);
        self.changed.notify_one();
    }

    /// The watch has ended.
    pub(super) fn unwatch(&self) {
        let mut inner = self.inner.lock();
        inner.watched = false;
        inner.changed.clear();
    }

    /// What has changed since the last call: the wait, or `None` if it is over.
    pub(super) fn changes(&self) -> Vec<(Cycle, Option<WaitingCycle>)> {
        let mut inner = self.inner.lock();
        let changed = std::mem::take(&mut inner.changed);
        changed
            .into_iter()
            .map(|cycle| (cycle, inner.by_cycle.get(&cycle).cloned()))
            .collect()
    }

    /// The leases that are due for renewal, and when the next one is. The leases returned count as
    /// renewed from now on.
    pub(super) fn due(&self, now: Moment) -> (Vec<(Cycle, LockKey, EtcdLease)>, Option<Moment>) {
        let mut inner = self.inner.lock();
        let mut due = Vec::new();
        let mut next: Option<Moment> = None;
        for (&cycle, wait) in &mut inner.by_cycle {
            if wait.keep_at <= now + KEEP_TOGETHER {
                wait.keep_at = now + renew_interval(wait.lease);
                due.push((cycle, wait.key.clone(), wait.lease));
            }
            next = Some(next.map_or(wait.keep_at, |next| next.min(wait.keep_at)));
        }
        (due, next)
    }
}

impl Inner {
    fn mark_changed(&mut self, cycle: Cycle) {
        if self.watched {
            self.changed.insert(cycle);
        }
    }
}
