//! Admission: how many tasks may wait, how many keys may be in use, and how many lingering leases
//! are evicted to make room for new keys.

/// How many keys may wait for a shard that is down.
pub(crate) const WAIT_IN_OUTAGE_MAX: usize = 10_000;
/// The fraction of the limit on keys that an eviction frees at a time (1/16), so that not every new
/// key causes a scan.
const EVICTED_PART: usize = 16;

/// The limits of a manager.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) waiters_per_key: usize,
    pub(crate) waiters: usize,
    pub(crate) keys: usize,
}

/// Whether a new key is admitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum KeyAdmission {
    Admitted,
    /// Admitted, but lingering leases have to be evicted.
    Evict,
    Refused,
}

impl Limits {
    /// Whether one more task of the manager may wait while that number of tasks does.
    pub(crate) const fn admits_waiter(&self, waiting: usize) -> bool {
        waiting < self.waiters
    }

    /// Whether one more task may wait for a key for which that number of tasks waits. A try never
    /// waits in line, so it needs no room. If others wait, it finds the key busy.
    pub(crate) const fn admits_waiter_of_key(&self, waiting: usize, try_only: bool) -> bool {
        waiting < self.waiters_per_key || try_only
    }

    /// Whether a lease may linger while that number of keys is in use.
    pub(crate) const fn has_room(&self, used: usize) -> bool {
        used <= self.keys
    }

    /// Whether a new key is admitted. It is already counted in `used`. Evictable keys do not count:
    /// their leases linger and are evicted. Eviction takes a moment, during which no further leases
    /// start to linger ([`has_room`](Self::has_room)), so there are never more than twice as many
    /// keys as the limit.
    pub(crate) const fn admit_key(&self, used: usize, evictable: usize) -> KeyAdmission {
        if used <= self.keys {
            KeyAdmission::Admitted
        } else if used.saturating_sub(evictable) <= self.keys {
            KeyAdmission::Evict
        } else {
            KeyAdmission::Refused
        }
    }

    /// How many lingering leases to evict while that number of keys is in use.
    pub(crate) const fn evictions(&self, used: usize) -> usize {
        used.saturating_sub(self.keys - self.keys / EVICTED_PART)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits {
        waiters_per_key: 2,
        waiters: 3,
        keys: 32,
    };

    #[test]
    fn waiters_are_limited_in_all_and_for_each_key() {
        assert!(LIMITS.admits_waiter(2) && !LIMITS.admits_waiter(3));
        assert!(LIMITS.admits_waiter_of_key(1, false) && !LIMITS.admits_waiter_of_key(2, false));
        assert!(LIMITS.admits_waiter_of_key(2, true), "a try finds the key busy");
    }

    #[test]
    fn lingering_keys_make_room_for_new_ones_and_no_lease_lingers_meanwhile() {
        assert_eq!(LIMITS.admit_key(32, 0), KeyAdmission::Admitted);
        assert_eq!(LIMITS.admit_key(33, 0), KeyAdmission::Refused);
        assert_eq!(LIMITS.admit_key(33, 1), KeyAdmission::Evict);
        assert_eq!(LIMITS.admit_key(40, 7), KeyAdmission::Refused);
        assert!(LIMITS.has_room(32) && !LIMITS.has_room(33));
    }

    #[test]
    fn eviction_frees_a_part_of_the_limit_at_a_time() {
        assert_eq!([30, 31, 33, 40].map(|used| LIMITS.evictions(used)), [0, 1, 3, 10]);
    }
}
