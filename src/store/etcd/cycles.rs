//! What this manager knows of its own cycles: the etcd leases of their keys, and which keys they
//! own.
//!
//! # Implementation details
//!
//! An etcd lease has an id, which its creator may choose, and a lifetime in whole seconds, which
//! can't be changed. The id is derived from the cycle and the lifetime. So a repeated request names
//! the same lease and no lease is granted twice, and a release can name every lease that its cycle
//! ever had, even if the reply to a grant never arrived. A cycle that is requested with a longer
//! TTL gets another lease, to which its key moves.
//!
//! A record lives from the first acquire of a cycle to its release. A record that is never released
//! is removed when its lease has long expired.

use std::collections::HashMap;
use std::time::Duration;

use parking_lot::Mutex;

use crate::clock::Moment;
use crate::protocol::Cycle;
use crate::random;

#[derive(Debug)]
pub(super) struct CycleLeases {
    /// Makes the ids of this manager's leases its own.
    seed: u64,
    records: Mutex<Records>,
}

#[derive(Debug)]
struct Records {
    by_cycle: HashMap<Cycle, Record>,
    /// The number of records at which expired ones are removed.
    prune_at: usize,
}

#[derive(Debug)]
struct Record {
    /// The lifetime of the current lease.
    secs: u64,
    /// Whether etcd has confirmed that the lease exists.
    granted: bool,
    /// The lifetimes of earlier leases that were not revoked yet.
    older: Vec<u64>,
    /// The create revision of the key that made the cycle the owner.
    owns: Option<i64>,
    /// When the lease was last requested or renewed.
    renewed_at: Moment,
    /// The earliest moment from which the cluster counts the current lease's time.
    confirmed_at: Option<Moment>,
}

/// The etcd lease of a cycle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct EtcdLease {
    pub(super) id: i64,
    pub(super) secs: u64,
    /// Whether etcd has confirmed that it exists.
    pub(super) granted: bool,
}

impl EtcdLease {
    /// A lease that etcd has reported and that has no record.
    pub(super) const fn without_record(id: i64) -> Self {
        Self {
            id,
            secs: PRUNE_SLACK.as_secs(),
            granted: true,
        }
    }
}

/// Stands for the lifetime in the id of a lease for the rest of a `min_hold`. No lease lasts that
/// long.
const RETIRED: u64 = u64::MAX;
/// With fewer records, pruning is not worthwhile.
const PRUNE_AT_MIN: usize = 1024;
/// How much longer than its lease a record is kept. Longer than any minimum TTL that etcd applies.
const PRUNE_SLACK: Duration = Duration::from_secs(60);

impl CycleLeases {
    pub(super) fn new() -> Self {
        Self {
            seed: random::number(),
            records: Mutex::new(Records {
                by_cycle: HashMap::new(),
                prune_at: PRUNE_AT_MIN,
            }),
        }
    }

    /// The id of the cycle's lease with this lifetime.
    fn lease_id(&self, cycle: Cycle, secs: u64) -> i64 {
        let number = mix(mix(self.seed ^ cycle.number()) ^ secs);
        // Etcd chooses an id itself if it is asked for zero.
        i64::try_from(number >> 1).unwrap_or(i64::MAX).max(1)
    }

    /// The lease under which the cycle's key stays for the rest of its `min_hold`. It has an id of
    /// its own, so that a repeated release does not extend it.
    pub(super) fn of_retired(&self, cycle: Cycle, rest: Duration) -> EtcdLease {
        EtcdLease {
            id: self.lease_id(cycle, RETIRED),
            secs: whole_secs(rest),
            granted: false,
        }
    }

    /// The lease that the cycle must have, for at least this TTL. Never shorter than before: the
    /// owner relies on earlier replies.
    pub(super) fn open(&self, cycle: Cycle, ttl: Duration, now: Moment) -> EtcdLease {
        let secs = whole_secs(ttl);
        let mut records = self.records.lock();
        records.prune(now);
        let record = records.by_cycle.entry(cycle).or_insert_with(|| Record {
            secs,
            granted: false,
            older: Vec::new(),
            owns: None,
            renewed_at: now,
            confirmed_at: None,
        });
        if secs > record.secs {
            record.older.push(std::mem::replace(&mut record.secs, secs));
            record.granted = false;
            record.confirmed_at = None;
        }
        self.lease_of(cycle, record)
    }

    /// The lease of a cycle that was not released yet.
    pub(super) fn lease(&self, cycle: Cycle) -> Option<EtcdLease> {
        let records = self.records.lock();
        let record = records.by_cycle.get(&cycle)?;
        Some(self.lease_of(cycle, record))
    }

    fn lease_of(&self, cycle: Cycle, record: &Record) -> EtcdLease {
        EtcdLease {
            id: self.lease_id(cycle, record.secs),
            secs: record.secs,
            granted: record.granted,
        }
    }

    /// Etcd has that lease, according to a request that was sent at `sent_at`.
    pub(super) fn leased(&self, cycle: Cycle, lease: EtcdLease, sent_at: Moment) {
        self.change(cycle, |record| {
            if record.secs == lease.secs {
                record.granted = true;
            }
            record.renewed_at = record.renewed_at.max(sent_at);
        });
    }

    /// Etcd no longer has that lease.
    pub(super) fn unleased(&self, cycle: Cycle, lease: EtcdLease) {
        self.change(cycle, |record| {
            if record.secs == lease.secs {
                record.granted = false;
                record.confirmed_at = None;
            }
        });
    }

    /// The cluster counts the time of that lease from `at` or later.
    pub(super) fn confirmed(&self, cycle: Cycle, lease: EtcdLease, at: Moment) {
        self.change(cycle, |record| {
            if record.secs == lease.secs {
                record.confirmed_at = record.confirmed_at.max(Some(at));
            }
        });
    }

    /// The earliest moment from which the cluster counts that lease's time.
    pub(super) fn confirmed_at(&self, cycle: Cycle, lease: EtcdLease) -> Option<Moment> {
        let records = self.records.lock();
        let record = records.by_cycle.get(&cycle)?;
        record.confirmed_at.filter(|_| record.secs == lease.secs)
    }

    /// Whether the cycle's key may still be attached to an earlier lease.
    pub(super) fn is_moving(&self, cycle: Cycle) -> bool {
        let records = self.records.lock();
        records
            .by_cycle
            .get(&cycle)
            .is_some_and(|record| !record.older.is_empty())
    }

    /// The cycle is the owner by a key of that create revision. Returns whether it already was.
    pub(super) fn owns(&self, cycle: Cycle, create_revision: i64) -> bool {
        let mut before = None;
        self.change(cycle, |record| before = record.owns.replace(create_revision));
        before == Some(create_revision)
    }

    /// The create revision with which the cycle became the owner.
    pub(super) fn owned(&self, cycle: Cycle) -> Option<i64> {
        self.records.lock().by_cycle.get(&cycle)?.owns
    }

    /// The cycle's key is attached to this lease. Returns the earlier leases, which must be
    /// revoked.
    pub(super) fn moved(&self, cycle: Cycle, lease: EtcdLease) -> Vec<EtcdLease> {
        let mut older = Vec::new();
        self.change(cycle, |record| {
            let is_older = |&mut secs: &mut u64| secs < lease.secs;
            older = record.older.extract_if(.., is_older).collect();
        });
        older.into_iter().map(|secs| self.earlier(cycle, secs)).collect()
    }

    /// The cycle is over. Returns all leases that it may have.
    pub(super) fn close(&self, cycle: Cycle) -> Vec<EtcdLease> {
        let Some(record) = self.records.lock().by_cycle.remove(&cycle) else {
            return Vec::new();
        };
        let all = record.older.iter().copied().chain([record.secs]);
        all.map(|secs| self.earlier(cycle, secs)).collect()
    }

    fn earlier(&self, cycle: Cycle, secs: u64) -> EtcdLease {
        EtcdLease {
            id: self.lease_id(cycle, secs),
            secs,
            granted: true,
        }
    }

    fn change(&self, cycle: Cycle, change: impl FnOnce(&mut Record)) {
        if let Some(record) = self.records.lock().by_cycle.get_mut(&cycle) {
            change(record);
        }
    }
}

impl Records {
    fn prune(&mut self, now: Moment) {
        if self.by_cycle.len() < self.prune_at {
            return;
        }
        self.by_cycle
            .retain(|_, record| now.since(record.renewed_at) <= Duration::from_secs(record.secs) + PRUNE_SLACK);
        self.prune_at = (self.by_cycle.len() * 2).max(PRUNE_AT_MIN);
    }
}

/// The TTL rounded up to whole seconds, at least one.
fn whole_secs(ttl: Duration) -> u64 {
    (ttl.as_secs() + u64::from(ttl.subsec_nanos() > 0)).max(1)
}

/// The finalizer of SplitMix64. It is a permutation, so different cycles of a manager have
/// different numbers.
const fn mix(number: u64) -> u64 {
    let number = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Moment = Moment::from_nanos(1_000_000_000_000);

    #[test]
    fn a_longer_ttl_needs_another_lease_and_a_shorter_one_does_not() {
        let cycles = CycleLeases::new();
        let first = cycles.open(Cycle::of(2), Duration::from_millis(1_500), NOW);
        assert_eq!((first.secs, first.granted), (2, false));
        cycles.leased(Cycle::of(2), first, NOW);
        let same = cycles.open(Cycle::of(2), Duration::from_millis(100), NOW);
        assert_eq!((same.id, same.granted), (first.id, true));
        let longer = cycles.open(Cycle::of(2), Duration::from_secs(9), NOW);
        assert_eq!((longer.secs, longer.granted), (9, false));
        // The reply to the first grant does not confirm the second.
        cycles.leased(Cycle::of(2), first, NOW);
        assert!(!cycles.lease(Cycle::of(2)).unwrap().granted);
        assert!(cycles.is_moving(Cycle::of(2)));

        let ids = |leases: Vec<EtcdLease>| leases.iter().map(|lease| lease.id).collect::<Vec<_>>();
        assert_eq!(ids(cycles.close(Cycle::of(2))), [first.id, longer.id]);
        assert_eq!(cycles.lease(Cycle::of(2)), None);
        assert!(cycles.close(Cycle::of(2)).is_empty());
    }

    #[test]
    fn ownership_lasts_as_long_as_the_key() {
        let cycles = CycleLeases::new();
        cycles.open(Cycle::of(2), Duration::from_secs(1), NOW);
        assert!(!cycles.owns(Cycle::of(2), 7));
        assert!(cycles.owns(Cycle::of(2), 7));
        assert!(!cycles.owns(Cycle::of(2), 9), "it was made anew");
        assert_eq!(cycles.owned(Cycle::of(2)), Some(9));
    }

    #[test]
    fn confirmation_of_a_lease_ends_with_it() {
        let cycles = CycleLeases::new();
        let lease = cycles.open(Cycle::of(2), Duration::from_secs(1), NOW);
        assert_eq!(cycles.confirmed_at(Cycle::of(2), lease), None);
        let later = NOW + Duration::from_millis(1);
        cycles.confirmed(Cycle::of(2), lease, later);
        cycles.confirmed(Cycle::of(2), lease, NOW);
        assert_eq!(cycles.confirmed_at(Cycle::of(2), lease), Some(later));
        let longer = cycles.open(Cycle::of(2), Duration::from_secs(9), NOW);
        assert_eq!(cycles.confirmed_at(Cycle::of(2), longer), None);
        cycles.confirmed(Cycle::of(2), lease, NOW);
        assert_eq!(cycles.confirmed_at(Cycle::of(2), longer), None);
        cycles.confirmed(Cycle::of(2), longer, NOW);
        cycles.unleased(Cycle::of(2), longer);
        assert_eq!(cycles.confirmed_at(Cycle::of(2), longer), None);
    }

    #[test]
    fn records_of_expired_cycles_are_removed() {
        let cycles = CycleLeases::new();
        for cycle in 0..PRUNE_AT_MIN as u64 {
            cycles.open(Cycle::of(cycle), Duration::from_secs(1), NOW);
        }
        cycles.open(Cycle::of(5_000), Duration::from_secs(1), NOW + Duration::from_secs(62));
        assert_eq!(cycles.lease(Cycle::of(1)), None);
        assert!(cycles.lease(Cycle::of(5_000)).is_some());
    }
}
