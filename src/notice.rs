//! What is logged about slow waits and long holds, and how often at most.

use std::collections::HashMap;
use std::panic::Location;
use std::time::Duration;

use parking_lot::Mutex;

use crate::clock::Moment;
use crate::error::LossReason;
use crate::key::LockKey;

/// How often one place in the program is logged at most.
const INTERVAL: Duration = Duration::from_secs(10);
/// How many places are told apart; all further ones count as one.
const PLACES_MAX: usize = 64;

/// What became of a request that waited.
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

/// Logs what takes too long, for a whole manager.
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
    /// With the keys in the lines if it `names_keys`.
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

    /// A request waited for so long, and then had its lock or gave up.
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
            tracing::warn!(%shard, %caller, waited = ?time, outcome, held_back, key = named, "a lock was waited for long");
            tracing::debug!(%key, %shard, %caller, waited = ?time, "the lock that was waited for long");
        }
    }

    /// From which age on a guard is held for long.
    pub(crate) const fn long_hold(&self) -> Option<Duration> {
        self.long_hold
    }

    /// A guard is held for so long, and still is.
    pub(crate) fn held_long(&self, time: Duration, key: &LockKey, shard: &str, caller: &'static Location<'static>) {
        if let Some(held_back) = self.holds.pass(caller, Moment::now()) {
            let named = self.key(key);
            tracing::warn!(%shard, %caller, held = ?time, held_back, key = named, "a lock is held for long, and still is");
            tracing::debug!(%key, %shard, %caller, held = ?time, "the lock that is held for long");
        }
    }

    /// From which time on somebody waits for long.
    pub(crate) const fn slow_wait_bound(&self) -> Option<Duration> {
        self.slow_wait
    }

    /// Of so many keys of a shard for which somebody waits for long and still does, this is the one that is waited for the longest.
    pub(crate) fn waits_long(&self, time: Duration, key: &LockKey, shard: &str, waiting: usize, keys: usize) {
        if let Some(held_back) = self.stuck.pass(Moment::now()) {
            let named = self.key(key);
            tracing::warn!(%shard, waited = ?time, waiting, keys, held_back, key = named, "a lock is waited for long, and still is");
            tracing::debug!(%key, %shard, waited = ?time, "the lock that is waited for long");
        }
    }

    /// A guard was lost.
    pub(crate) fn lost(&self, key: &LockKey, shard: &str, reason: LossReason) {
        let named = self.key(key);
        tracing::warn!(%shard, %reason, key = named, "a lock was lost");
        tracing::debug!(%key, %shard, %reason, "the lock that was lost");
    }

    /// The key, if it may stand in a line that is not for debugging.
    fn key<'a>(&self, key: &'a LockKey) -> Option<&'a str> {
        self.names_keys.then(|| key.as_str())
    }
}

/// Lets one thing through once in an interval.
#[derive(Debug, Default)]
pub(crate) struct Seldom(Mutex<Option<Place>>);

impl Seldom {
    /// How many were held back since the last one that was let through, if this one is let through.
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

/// Lets through what is told about one place once in an interval.
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
    /// How many were held back since the last one that was let through, if this one is let through.
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
            // A place of its own each: the address is what tells them apart only if line and column do.
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
