//! What the store knows of a key: its leases and its queue.

use std::collections::BTreeSet;

use crate::clock::Moment;
use crate::identity::parse_owner_tag;
use crate::mode::LockMode;

/// The state of a key.
#[derive(Debug, Default, Clone)]
pub(super) struct Lock {
    /// An exclusive lease.
    pub(super) lease: Option<LeaseRecord>,
    /// The shared leases and permits. Empty while there is an exclusive lease.
    pub(super) holders: Vec<HolderRecord>,
    pub(super) queue: BTreeSet<Member>,
    /// The end of a marker that was kept by [`Flaw::KeepsMarker`].
    #[cfg(test)]
    pub(super) marked_until: Option<Moment>,
}

impl Lock {
    pub(super) fn is_unused(&self) -> bool {
        self.lease.is_none() && self.holders.is_empty() && self.queue.is_empty()
    }

    pub(super) fn is_held_by(&self, owner: &str) -> bool {
        self.lease.as_ref().is_some_and(|lease| lease.owner == owner)
            || self.holders.iter().any(|holder| holder.owner == owner)
    }

    /// Whether another lease in this mode can be given out now. Each holder of permits states a
    /// limit, and the smallest one counts.
    pub(super) fn admits(&self, mode: LockMode) -> bool {
        if self.lease.is_some() {
            return false;
        }
        #[cfg(test)]
        if self.marked_until.is_some() && mode == LockMode::Exclusive {
            return false;
        }
        match mode {
            LockMode::Exclusive => self.holders.is_empty(),
            LockMode::Shared => true,
            LockMode::Permits { .. } => {
                let modes = || self.holders.iter().map(|holder| holder.mode);
                let used: u32 = modes().map(LockMode::weight).sum();
                let limit = modes().map(LockMode::limit).min().unwrap_or(u32::MAX);
                used + mode.weight() <= limit.min(mode.limit())
            }
        }
    }

    /// Removes what has ended.
    pub(super) fn expire(&mut self, now: Moment) {
        if self.lease.as_ref().is_some_and(|lease| lease.has_ended(now)) {
            self.lease = None;
        }
        self.holders.retain(|holder| holder.ends > now);
    }
}

/// A shared lease, or one of permits.
#[derive(Debug, Clone)]
pub(super) struct HolderRecord {
    pub(super) owner: String,
    pub(super) mode: LockMode,
    pub(super) ends: Moment,
}

/// A cycle in a queue. Ordered by the counter when it joined.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Member {
    pub(super) joined_at: u64,
    pub(super) owner: String,
    /// Whether its manager's inbox was subscribed here when the cycle last sent a request.
    pub(super) is_subscribed: bool,
}

#[derive(Debug, Clone)]
pub(super) struct LeaseRecord {
    pub(super) owner: String,
    pub(super) ends: Option<Moment>,
}

impl LeaseRecord {
    pub(super) fn has_ended(&self, now: Moment) -> bool {
        self.ends.is_some_and(|ends| ends <= now)
    }
}

/// The mode of a cycle; that of another library's lock is exclusive.
pub(super) fn mode_of(owner: &str) -> LockMode {
    parse_owner_tag(owner).map_or(LockMode::Exclusive, |(_, cycle)| cycle.mode())
}
