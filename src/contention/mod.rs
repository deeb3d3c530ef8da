//! Which keys are contended, and how long their waiters wait.
//!
//! # Implementation details
//!
//! Only acquisitions that meet contention cost anything. Contention is recorded in the key's own
//! entry ([`KeyContention`]), under a mutex that is held there anyway, so no further lock is
//! needed. The entry flushes its record to the manager's sketch ([`HotKeys`]) when it leaves the
//! table, when it has recorded enough, and when the hot keys are requested. Memory is bounded: the
//! sketch has a fixed number of counters.

mod histogram;
mod sketch;

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

pub(crate) use histogram::{AtomicHistogram, Histogram};

use crate::clock::Moment;
use crate::key::LockKey;
use sketch::Sketch;

/// The contention recorded for one key.
#[derive(Debug, Clone, Default)]
pub(crate) struct KeyContention {
    contended: u64,
    acquired: u64,
    waits: Histogram,
}

/// How many contended requests an entry records before it flushes them.
const FLUSH_AT: u64 = 4096;
/// The interval after which earlier counts are halved.
const HALF_LIFE: Duration = Duration::from_secs(300);

impl KeyContention {
    /// A request acquired the lock after waiting this long.
    pub(crate) fn record_acquired(&mut self, time: Duration) {
        self.contended += 1;
        self.acquired += 1;
        self.waits.add(time);
    }

    /// A request found the key held or wanted and failed to acquire the lock.
    pub(crate) const fn record_failure(&mut self) {
        self.contended += 1;
    }

    /// Whether the record should be flushed.
    pub(crate) const fn should_flush(&self) -> bool {
        self.contended >= FLUSH_AT
    }
}

/// The hottest keys of a manager.
#[derive(Debug)]
pub(crate) struct HotKeys {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    sketch: Sketch<(Arc<str>, LockKey), Known>,
    halved_at: Moment,
}

/// What has been recorded for a key since it entered the sketch.
#[derive(Debug, Default)]
struct Known {
    acquired: u64,
    waits: Histogram,
}

/// One of the hottest keys.
#[derive(Debug, Clone)]
pub(crate) struct HotKeyCounts {
    pub(crate) shard: Arc<str>,
    pub(crate) key: LockKey,
    pub(crate) contended: u64,
    pub(crate) overcount_max: u64,
    pub(crate) acquired: u64,
    pub(crate) wait_p50: Duration,
    pub(crate) wait_p99: Duration,
    pub(crate) wait_max: Duration,
}

impl HotKeys {
    /// Keeps at most `most` keys.
    pub(crate) fn new(most: usize) -> Self {
        Self {
            state: Mutex::new(State {
                sketch: Sketch::new(most),
                halved_at: Moment::now(),
            }),
        }
    }

    /// Adds the record of an entry.
    pub(crate) fn add(&self, shard: &Arc<str>, key: &LockKey, contention: &KeyContention) {
        let mut state = self.state.lock();
        let known = state
            .sketch
            .add(&(Arc::clone(shard), key.clone()), contention.contended);
        known.acquired = known.acquired.saturating_add(contention.acquired);
        known.waits.merge(&contention.waits);
    }

    /// Halves all counts once per half-life.
    pub(crate) fn decay(&self, now: Moment) {
        let mut state = self.state.lock();
        if now.since(state.halved_at) >= HALF_LIFE {
            state.halved_at = now;
            state.sketch.halve(|known| {
                known.acquired /= 2;
                known.waits.halve();
            });
        }
    }

    /// All kept keys, the hottest first.
    pub(crate) fn hottest(&self) -> Vec<HotKeyCounts> {
        let state = self.state.lock();
        let mut hot: Vec<HotKeyCounts> = state
            .sketch
            .kept()
            .map(|kept| HotKeyCounts {
                shard: Arc::clone(&kept.key.0),
                key: kept.key.1.clone(),
                contended: kept.count,
                overcount_max: kept.overcount_max,
                acquired: kept.value.acquired,
                wait_p50: kept.value.waits.quantile(0.5),
                wait_p99: kept.value.waits.quantile(0.99),
                wait_max: kept.value.waits.max(),
            })
            .collect();
        drop(state);
        hot.sort_by(|one, other| {
            other
                .contended
                .cmp(&one.contended)
                .then_with(|| one.key.cmp(&other.key))
        });
        hot
    }
}
