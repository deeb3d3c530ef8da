//! Log lines about slow waits, long holds and lost locks, at a bounded rate.

use std::collections::HashMap;
use std::panic::Location;
use std::time::Duration;

use parking_lot::Mutex;

use crate::clock::Moment;
use crate::error::LossReason;
use crate::key::LockKey;
use crate::rate_limit::{INTERVAL, RateLimit, Window};

/// How many lost locks have a line each in an interval. A server that fails may lose all locks of a
/// process at once.
const LOSSES_MAX: u64 = 20;
/// How many call sites are distinguished. All others share one window.
const CALL_SITES_MAX: usize = 64;

/// The outcome of a request that waited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WaitOutcome {
    Acquired,
    TimedOut,
    Cancelled,
}

impl WaitOutcome {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Acquired => "acquired",
            Self::TimedOut => "timeout",
            Self::Cancelled => "cancelled",
        }
    }
}

/// Logs slow waits, long holds and lost locks for a whole manager.
#[derive(Debug)]
pub(crate) struct SlowLog {
    slow_wait: Option<Duration>,
    long_hold: Option<Duration>,
    names_keys: bool,
    waits: CallSiteLimits,
    holds: CallSiteLimits,
    still_waiting: RateLimit,
    losses: Mutex<Option<Losses>>,
}

/// The locks lost in one interval.
#[derive(Debug)]
struct Losses {
    since: Moment,
    count: u64,
}

impl SlowLog {
    /// Lines include keys if `names_keys` is set.
    pub(crate) fn new(slow_wait: Option<Duration>, long_hold: Option<Duration>, names_keys: bool) -> Self {
        Self {
            slow_wait,
            long_hold,
            names_keys,
            waits: CallSiteLimits::default(),
            holds: CallSiteLimits::default(),
            still_waiting: RateLimit::default(),
            losses: Mutex::default(),
        }
    }

    /// A request waited for `time`, and then acquired its lock or gave up.
    pub(crate) fn waited(
        &self,
        time: Duration,
        key: &LockKey,
        shard: &str,
        caller: &'static Location<'static>,
        outcome: WaitOutcome,
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
        outcome: WaitOutcome,
    ) {
        if let Some(suppressed) = self.waits.admit(caller, Moment::now()) {
            let (outcome, named) = (outcome.as_str(), self.key(key));
            crate::log::warn!(%shard, %caller, waited = ?time, outcome, suppressed, key = named, "slow wait for a lock");
            crate::log::debug!(%key, %shard, %caller, waited = ?time, "the lock of the slow wait");
        }
    }

    /// The duration from which a guard counts as held for a long time.
    pub(crate) const fn long_hold(&self) -> Option<Duration> {
        self.long_hold
    }

    /// A guard has been held for `time` and is still held.
    pub(crate) fn held_long(&self, time: Duration, key: &LockKey, shard: &str, caller: &'static Location<'static>) {
        if let Some(suppressed) = self.holds.admit(caller, Moment::now()) {
            let named = self.key(key);
            crate::log::warn!(%shard, %caller, held = ?time, suppressed, key = named, "a lock has been held for a long time");
            crate::log::debug!(%key, %shard, %caller, held = ?time, "the lock held for a long time");
        }
    }

    /// The duration from which a wait counts as slow.
    pub(crate) const fn slow_wait_bound(&self) -> Option<Duration> {
        self.slow_wait
    }

    /// `keys` keys of a shard have waiters that have waited for a long time. `key` is the one with
    /// the longest wait.
    pub(crate) fn still_waits(&self, time: Duration, key: &LockKey, shard: &str, waiting: usize, keys: usize) {
        if let Some(suppressed) = self.still_waiting.admit(Moment::now()) {
            let named = self.key(key);
            crate::log::warn!(%shard, waited = ?time, waiting, keys, suppressed, key = named, "slow wait for a lock, still waiting");
            crate::log::debug!(%key, %shard, waited = ?time, "the lock of the slow wait, still waiting");
        }
    }

    /// A guard was lost. After [`LOSSES_MAX`] lines in an interval, further losses are counted.
    pub(crate) fn lost(&self, key: &LockKey, shard: &str, reason: LossReason) {
        let now = Moment::now();
        self.flush(now);
        let count = {
            let mut losses = self.losses.lock();
            let losses = losses.get_or_insert(Losses { since: now, count: 0 });
            losses.count += 1;
            losses.count
        };
        if count <= LOSSES_MAX {
            let named = self.key(key);
            crate::log::warn!(%shard, %reason, key = named, "a lock was lost");
        }
        crate::log::debug!(%key, %shard, %reason, "the lock that was lost");
    }

    /// Logs how many losses of an interval that is over had no line. Called regularly.
    pub(crate) fn flush(&self, now: Moment) {
        let is_over = |losses: &mut Losses| now.since(losses.since) >= INTERVAL;
        let over = self.losses.lock().take_if(is_over);
        over.iter().for_each(Losses::report_rest);
    }

    /// Whether lines above debug level may contain keys.
    pub(crate) const fn names_keys(&self) -> bool {
        self.names_keys
    }

    /// The key, if lines above debug level may contain it.
    fn key<'a>(&self, key: &'a LockKey) -> Option<&'a str> {
        self.names_keys.then(|| key.as_str())
    }
}

impl Losses {
    fn report_rest(&self) {
        if let Some(suppressed) = self.count.checked_sub(LOSSES_MAX).filter(|&rest| rest > 0) {
            crate::log::warn!(
                suppressed,
                "more locks were lost; shardlock_lost_total has the numbers by shard and reason"
            );
        }
    }
}

impl Drop for SlowLog {
    fn drop(&mut self) {
        self.losses.get_mut().iter().for_each(Losses::report_rest);
    }
}

/// Admits one event per call site and interval.
#[derive(Debug, Default)]
struct CallSiteLimits {
    windows: Mutex<HashMap<Option<&'static Location<'static>>, Window>>,
}

impl CallSiteLimits {
    /// If the event may be logged, returns how many were suppressed since the last one that was.
    fn admit(&self, caller: &'static Location<'static>, now: Moment) -> Option<u64> {
        let mut windows = self.windows.lock();
        let has_own_window = windows.contains_key(&Some(caller)) || windows.len() < CALL_SITES_MAX;
        match windows.entry(has_own_window.then_some(caller)) {
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(Window::new(now));
                Some(0)
            }
            std::collections::hash_map::Entry::Occupied(mut entry) => entry.get_mut().admit(now),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_call_site_is_logged_once_in_an_interval() {
        let limits = CallSiteLimits::default();
        let (here, there) = (Location::caller(), other());
        let start = Moment::default() + Duration::from_secs(1);
        assert_eq!(limits.admit(here, start), Some(0));
        assert_eq!(limits.admit(there, start), Some(0));
        for _ in 0..5 {
            assert_eq!(limits.admit(here, start + INTERVAL - Duration::from_nanos(1)), None);
        }
        assert_eq!(limits.admit(here, start + INTERVAL), Some(5));
        assert_eq!(limits.admit(here, start + INTERVAL * 2), Some(0));
    }

    fn other() -> &'static Location<'static> {
        Location::caller()
    }

    #[test]
    fn rate_is_bounded_for_any_number_of_call_sites() {
        let limits = CallSiteLimits::default();
        let now = Moment::default() + Duration::from_secs(1);
        let mut passed = 0;
        for _ in 0..10_000 {
            // All iterations share one call site: locations differ only by line and column.
            passed += u64::from(limits.admit(Location::caller(), now).is_some());
        }
        assert_eq!(passed, 1);
        limits
            .windows
            .lock()
            .extend((0..CALL_SITES_MAX).map(|_| (None, Window::new(now))));
        assert!(limits.windows.lock().len() <= CALL_SITES_MAX + 1);
    }
}
