//! Rate-limited log lines about slow waits, long holds and lost locks.

use std::collections::HashMap;
use std::panic::Location;
use std::time::Duration;

use parking_lot::Mutex;

use crate::clock::Moment;
use crate::error::LossReason;
use crate::key::LockKey;

/// The shortest interval between two lines about the same call site.
const INTERVAL: Duration = Duration::from_secs(10);
/// How many call sites are distinguished. All others share one slot.
const PLACES_MAX: usize = 64;

/// The outcome of a request that waited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Waited {
    Acquired,
    TimedOut,
    Cancelled,
}

impl Waited {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Acquired => "acquired",
            Self::TimedOut => "timeout",
            Self::Cancelled => "cancelled",
        }
    }
}

/// Logs slow waits and long holds for a whole manager.
#[derive(Debug)]
pub(crate) struct Notices {
    slow_wait: Option<Duration>,
    long_hold: Option<Duration>,
    names_keys: bool,
    waits: Throttle,
    holds: Throttle,
    stuck: Seldom,
}

impl Notices {
    /// Lines include keys if `names_keys` is set.
    pub(crate) fn new(slow_wait: Option<Duration>, long_hold: Option<Duration>, names_keys: bool) -> Self {
        Self {
            slow_wait,
            long_hold,
            names_keys,
            waits: Throttle::default(),
            holds: Throttle::default(),
            stuck: Seldom::default(),
        }
    }

    /// A request waited for `time`, and then acquired its lock or gave up.
    pub(crate) fn waited(
        &self,
        time: Duration,
        key: &LockKey,
        shard: &str,
        caller: &'static Location<'static>,
        outcome: Waited,
    ) {
        if self.slow_wait.is_some_and(|bound| time >= bound) {
            self.slow_wait(time, key, shard, caller, outcome);
        }
    }

    #[cold]
    fn slow_wait(
        &self,
        time: Duration,
        key: &LockKey,
        shard: &str,
        caller: &'static Location<'static>,
        outcome: Waited,
    ) {
        if let Some(held_back) = self.waits.pass(caller, Moment::now()) {
            let (outcome, named) = (outcome.as_str(), self.key(key));
            tracing::warn!(%shard, %caller, waited = ?time, outcome, held_back, key = named, "slow wait for a lock");
            tracing::debug!(%key, %shard, %caller, waited = ?time, "the lock of the slow wait");
        }
    }

    /// The duration from which a guard counts as held for a long time.
    pub(crate) const fn long_hold(&self) -> Option<Duration> {
        self.long_hold
    }

    /// A guard has been held for `time` and is still held.
    pub(crate) fn held_long(&self, time: Duration, key: &LockKey, shard: &str, caller: &'static Location<'static>) {
        if let Some(held_back) = self.holds.pass(caller, Moment::now()) {
            let named = self.key(key);
            tracing::warn!(%shard, %caller, held = ?time, held_back, key = named, "a lock has been held for a long time");
            tracing::debug!(%key, %shard, %caller, held = ?time, "the lock held for a long time");
        }
    }

    /// The duration from which a wait counts as slow.
    pub(crate) const fn slow_wait_bound(&self) -> Option<Duration> {
        self.slow_wait
    }

    /// Waiters of `keys` keys of a shard have been waiting for a long time. This is the key whose
    /// waiter has waited longest.
    pub(crate) fn waits_long(&self, time: Duration, key: &LockKey, shard: &str, waiting: usize, keys: usize) {
        if let Some(held_back) = self.stuck.pass(Moment::now()) {
            let named = self.key(key);
            tracing::warn!(%shard, waited = ?time, waiting, keys, held_back, key = named, "slow wait for a lock, still waiting");
            tracing::debug!(%key, %shard, waited = ?time, "the lock of the slow wait, still waiting");
        }
    }

    /// A guard was lost.
    pub(crate) fn lost(&self, key: &LockKey, shard: &str, reason: LossReason) {
        let named = self.key(key);
        tracing::warn!(%shard, %reason, key = named, "a lock was lost");
        tracing::debug!(%key, %shard, %reason, "the lock that was lost");
    }

    /// The key, if lines above debug level may contain it.
    fn key<'a>(&self, key: &'a LockKey) -> Option<&'a str> {
        self.names_keys.then(|| key.as_str())
    }
}

/// Passes one event per interval.
#[derive(Debug, Default)]
pub(crate) struct Seldom(Mutex<Option<Place>>);

impl Seldom {
    /// If the event passes, returns how many were suppressed since the last one that passed.
    pub(crate) fn pass(&self, now: Moment) -> Option<u64> {
        let mut place = self.0.lock();
        match &mut *place {
            Some(place) => place.pass(now),
            None => {
                *place = Some(Place::new(now));
                Some(0)
            }
        }
    }
}

/// Passes one event per call site and interval.
#[derive(Debug, Default)]
struct Throttle {
    places: Mutex<HashMap<Option<&'static Location<'static>>, Place>>,
}

#[derive(Debug)]
struct Place {
    told_at: Moment,
    held_back: u64,
}

impl Place {
    const fn new(now: Moment) -> Self {
        Self {
            told_at: now,
            held_back: 0,
        }
    }

    fn pass(&mut self, now: Moment) -> Option<u64> {
        if now.since(self.told_at) < INTERVAL {
            self.held_back += 1;
            return None;
        }
        self.told_at = now;
        Some(std::mem::take(&mut self.held_back))
    }
}

impl Throttle {
    /// If the event passes, returns how many were suppressed since the last one that passed.
    fn pass(&self, caller: &'static Location<'static>, now: Moment) -> Option<u64> {
        let mut places = self.places.lock();
        let is_told_apart = places.contains_key(&Some(caller)) || places.len() < PLACES_MAX;
        match places.entry(is_told_apart.then_some(caller)) {
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(Place::new(now));
                Some(0)
            }
            std::collections::hash_map::Entry::Occupied(mut entry) => entry.get_mut().pass(now),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_place_is_let_through_once_in_an_interval() {
        let throttle = Throttle::default();
        let (here, there) = (Location::caller(), other());
        let start = Moment::default() + Duration::from_secs(1);
        assert_eq!(throttle.pass(here, start), Some(0));
        assert_eq!(throttle.pass(there, start), Some(0));
        for _ in 0..5 {
            assert_eq!(throttle.pass(here, start + INTERVAL - Duration::from_nanos(1)), None);
        }
        assert_eq!(throttle.pass(here, start + INTERVAL), Some(5));
        assert_eq!(throttle.pass(here, start + INTERVAL * 2), Some(0));
    }

    fn other() -> &'static Location<'static> {
        Location::caller()
    }

    #[test]
    fn the_rate_is_bounded_however_many_places_there_are() {
        let throttle = Throttle::default();
        let now = Moment::default() + Duration::from_secs(1);
        let mut passed = 0;
        for _ in 0..10_000 {
            // All iterations share one call site: locations differ only by line and column.
            passed += u64::from(throttle.pass(Location::caller(), now).is_some());
        }
        assert_eq!(passed, 1);
        throttle.places.lock().extend((0..PLACES_MAX).map(|_| {
            (
                None,
                Place {
                    told_at: now,
                    held_back: 0,
                },
            )
        }));
        assert!(throttle.places.lock().len() <= PLACES_MAX + 1);
    }
}
