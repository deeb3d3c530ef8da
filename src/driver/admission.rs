//! Admission of tasks and keys: every limit that can refuse a request before it reaches the queue
//! of its key ([`engine::admission`](crate::engine::admission) has the rules).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Entry, Job, ManagerContext, Shard};
use crate::engine::Capacity;
use crate::engine::admission::{KeyAdmission, WAIT_IN_OUTAGE_MAX};
use crate::engine::renewals::STRAIN_MIN;
use crate::error::{Failure, LockError};
use crate::key::LockKey;
use crate::mode::LockMode;

impl Capacity for ManagerContext {
    fn has_room(&self) -> bool {
        self.limits.has_room(self.usage.keys.load(Ordering::Relaxed))
    }
}

impl Shard {
    /// Counts a task as waiting until [`waiter_left`](Self::waiter_left) is called, unless too many
    /// tasks of the manager wait already.
    pub(super) fn admit_waiter(&self, key: &LockKey, mode: LockMode) -> Result<(), LockError> {
        let waiting = self.manager.usage.waiters.fetch_add(1, Ordering::Relaxed);
        if !self.manager.limits.admits_waiter(waiting) {
            self.manager.usage.waiters.fetch_sub(1, Ordering::Relaxed);
            return Err(Failure::TooManyWaiters {
                key: key.to_string(),
                shard: self.name.to_string(),
                waiting,
                limit: self.manager.limits.waiters,
            }
            .into());
        }
        self.metrics.waiter_came(mode);
        Ok(())
    }

    /// A task no longer waits for a lock in such a mode.
    pub(crate) fn waiter_left(&self, mode: LockMode) {
        self.manager.usage.waiters.fetch_sub(1, Ordering::Relaxed);
        self.metrics.waiter_went(mode);
    }

    /// Refuses one more task for a key for which too many tasks wait already.
    pub(super) fn admit_waiter_of_key(&self, key: &LockKey, waiting: usize, try_only: bool) -> Result<(), LockError> {
        if self.manager.limits.admits_waiter_of_key(waiting, try_only) {
            return Ok(());
        }
        Err(Failure::QueueFull {
            key: key.to_string(),
            shard: self.name.to_string(),
            waiting,
            limit: self.manager.limits.waiters_per_key,
        }
        .into())
    }

    /// Refuses a new key if there are too many, or if the shard can't take more.
    pub(super) fn admit_key(&self, entry: &Arc<Entry>) -> Result<(), LockError> {
        let admitted = self
            .check_keys(entry)
            .and_then(|()| self.check_strain(entry))
            .and_then(|()| self.check_outage(entry));
        if admitted.is_err() {
            self.forget_new(entry, true);
        }
        admitted
    }

    /// Refuses a new key if the limit over all shards is reached.
    fn check_keys(&self, entry: &Entry) -> Result<(), LockError> {
        let ManagerContext { limits, usage, .. } = &*self.manager;
        if limits.admit_key(usage.keys.load(Ordering::Relaxed), 0) == KeyAdmission::Admitted {
            return Ok(());
        }
        // Read `evictable` first. A lingering key that leaves the table in between would otherwise
        // be counted as used.
        let evictable = usage.evictable();
        let used = usage.keys.load(Ordering::Relaxed);
        match limits.admit_key(used, evictable) {
            KeyAdmission::Refused => Err(Failure::TooManyKeys {
                key: entry.key.to_string(),
                shard: self.name.to_string(),
                used: used - 1,
                limit: limits.keys,
            }
            .into()),
            KeyAdmission::Admitted | KeyAdmission::Evict => {
                if !usage.is_evicting.swap(true, Ordering::SeqCst) {
                    self.send(Job::Evict);
                }
                Ok(())
            }
        }
    }

    /// Refuses new keys while held leases cannot be renewed in time: it is better to grant no new
    /// lock than to lose held ones.
    fn check_strain(&self, entry: &Entry) -> Result<(), LockError> {
        if !self.is_strained.load(Ordering::Relaxed) {
            return Ok(());
        }
        let leases = self.metrics.leases();
        if leases < STRAIN_MIN {
            // Most leases have been released since, and there may be no renewal that would clear
            // the flag.
            return Ok(());
        }
        Err(Failure::TooManyLeases {
            key: entry.key.to_string(),
            shard: self.name.to_string(),
            leases,
        }
        .into())
    }

    /// Refuses new keys while very many keys wait for a shard that is down. Each one costs memory
    /// here, and a request to the server when it is back.
    fn check_outage(&self, entry: &Entry) -> Result<(), LockError> {
        if !self.is_in_outage() {
            return Ok(());
        }
        let waiting = self.table.len().saturating_sub(self.metrics.leases());
        if waiting <= WAIT_IN_OUTAGE_MAX {
            return Ok(());
        }
        Err(Failure::ShardDown {
            key: entry.key.to_string(),
            shard: self.name.to_string(),
            waiting: waiting - 1,
            limit: WAIT_IN_OUTAGE_MAX,
        }
        .into())
    }

    /// Sets whether the shard holds more leases than it can renew in time.
    pub(super) fn set_strained(&self, is_strained: bool) {
        if self.is_strained.swap(is_strained, Ordering::Relaxed) == is_strained {
            return;
        }
        let (shard, leases) = (&self.name, self.metrics.leases());
        if is_strained {
            crate::log::warn!(%shard, leases, "more leases are held than are renewed in time; new keys are refused until renewals keep up");
        } else {
            crate::log::info!(%shard, leases, "renewals keep up again; new keys are accepted");
        }
    }
}
