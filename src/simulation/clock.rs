//! Clocks that do not agree: each manager's clock has its own offset and rate.

use std::time::Duration;

use crate::clock::Moment;

/// The store's time since the start of the run.
pub(super) type Nanos = u64;

pub(super) const fn nanos(duration: Duration) -> Nanos {
    duration.as_nanos() as Nanos
}

/// A local clock. The error of its rate is at most what the validity of a lease allows for.
#[derive(Debug, Clone, Copy)]
pub(super) struct LocalClock {
    pub(super) offset: Nanos,
    /// How much it runs fast (or slow, if negative), in millionths.
    pub(super) drift: i64,
}

/// The largest drift in either direction: slightly below the 1 % that is taken off every TTL.
pub(super) const DRIFT_MAX: i64 = 9_000;
const MILLION: i128 = 1_000_000;

impl LocalClock {
    /// The local time at this time of the store.
    pub(super) fn at(self, now: Nanos) -> Moment {
        let passed = i128::from(now) * (MILLION + i128::from(self.drift)) / MILLION;
        Moment::from_nanos(self.offset + passed as u64)
    }

    /// The first store time at which the clock certainly shows this local time.
    pub(super) fn when(self, shows: Moment) -> Nanos {
        let passed = i128::from(shows.as_nanos().saturating_sub(self.offset));
        (passed * MILLION / (MILLION + i128::from(self.drift)) + 2) as Nanos
    }
}
