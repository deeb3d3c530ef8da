//! Leases whose `min_hold` has not passed: they must stay in the store although they are released.
//!
//! # Implementation details
//!
//! A release can have many reasons: its guard is dropped, the manager shuts down, an earlier
//! release got no reply, or the store reports that a cycle which is over is wanted. All of them
//! must respect `min_hold`, and some of them know nothing but the cycle. So the end of each
//! `min_hold` is recorded here, by cycle, and every release looks it up.
//!
//! A record lives from the grant of a lock with `min_hold` until the release is confirmed, or until
//! its time has passed. There are thus at most as many records as leases held and releases pending.

use std::collections::HashMap;

use crate::clock::Moment;
use crate::protocol::Cycle;
use crate::sync::{AtomicUsize, Mutex, Ordering};

/// See the module documentation.
#[derive(Debug, Default)]
pub(crate) struct MinHolds {
    /// The number of records, so that a release costs one load if no lock has a `min_hold`.
    count: AtomicUsize,
    records: Mutex<Records>,
}

#[derive(Debug, Default)]
struct Records {
    until: HashMap<Cycle, Moment>,
    /// The number of records at which those that have passed are removed.
    prune_at: usize,
}

/// With fewer records, removing those that have passed is not worthwhile.
const PRUNE_AT_MIN: usize = 64;

impl MinHolds {
    /// The lease of the cycle must stay until then.
    pub(crate) fn record(&self, cycle: Cycle, until: Moment, now: Moment) {
        let mut records = self.records.lock();
        if records.until.len() >= records.prune_at.max(PRUNE_AT_MIN) {
            records.until.retain(|_, until| *until > now);
            records.prune_at = records.until.len() * 2;
        }
        records.until.insert(cycle, until);
        self.count.store(records.until.len(), Ordering::Release);
    }

    /// Until when the lease of the cycle must stay. `None` if it may end now.
    pub(crate) fn until(&self, cycle: Cycle, now: Moment) -> Option<Moment> {
        if self.count.load(Ordering::Acquire) == 0 {
            return None;
        }
        let until = self.records.lock().until.get(&cycle).copied();
        until.filter(|until| *until > now)
    }

    /// The lease is no longer the cycle's, or nothing has happened under it.
    pub(crate) fn forget(&self, cycle: Cycle) {
        if self.count.load(Ordering::Acquire) == 0 {
            return;
        }
        let mut records = self.records.lock();
        records.until.remove(&cycle);
        self.count.store(records.until.len(), Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn at(secs: u64) -> Moment {
        Moment::default() + Duration::from_secs(secs)
    }

    #[test]
    fn record_counts_until_its_time_has_passed_or_it_is_forgotten() {
        let holds = MinHolds::default();
        let (one, other) = (Cycle::of(2), Cycle::of(4));
        assert_eq!(holds.until(one, at(0)), None);
        holds.record(one, at(10), at(0));
        holds.record(other, at(20), at(0));
        assert_eq!(holds.until(one, at(9)), Some(at(10)));
        assert_eq!(holds.until(one, at(10)), None);
        holds.forget(other);
        assert_eq!(holds.until(other, at(9)), None);
        assert_eq!(holds.until(one, at(9)), Some(at(10)));
    }

    #[test]
    fn records_that_count_outlast_those_that_have_passed() {
        let holds = MinHolds::default();
        let count = 3 * PRUNE_AT_MIN as u64;
        for number in 1..=count {
            let until = if number % 2 == 0 { at(1_000) } else { at(5) };
            holds.record(Cycle::of(2 * number), until, at(number.min(4)));
        }
        holds.record(Cycle::of(2), at(1_000), at(10));
        for number in (2..=count).step_by(2) {
            assert_eq!(holds.until(Cycle::of(2 * number), at(10)), Some(at(1_000)), "{number}");
        }
    }

    #[test]
    fn expired_records_do_not_accumulate() {
        let holds = MinHolds::default();
        for number in 1..100_000 {
            let now = at(number);
            holds.record(Cycle::of(2 * number), now + Duration::from_secs(10), now);
        }
        let count = holds.records.lock().until.len();
        assert!(count <= PRUNE_AT_MIN + 1, "{count}");
    }
}

#[cfg(all(test, shardlock_loom))]
mod models {
    use loom::sync::Arc;
    use loom::thread;

    use super::*;

    const NOW: Moment = Moment::from_nanos(0);
    const END: Moment = Moment::from_nanos(1_000);

    /// A release reads the number of records without the mutex. It must not miss its own.
    #[test]
    fn record_is_found_while_others_are_made_and_forgotten() {
        loom::model(|| {
            let holds = Arc::new(MinHolds::default());
            holds.record(Cycle::of(4), END, NOW);
            let other = {
                let holds = Arc::clone(&holds);
                thread::spawn(move || holds.forget(Cycle::of(4)))
            };
            holds.record(Cycle::of(2), END, NOW);
            assert_eq!(holds.until(Cycle::of(2), NOW), Some(END));
            other.join().unwrap();
            assert_eq!(holds.until(Cycle::of(2), NOW), Some(END));
            assert_eq!(holds.until(Cycle::of(4), NOW), None);
        });
    }
}
