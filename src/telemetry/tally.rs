//! Counting on the hot path: in our own memory, flushed to the recorder later.
//!
//! # Implementation details
//!
//! A recorder's counter costs two atomic operations, and its histogram reads a clock and appends to
//! a list. At a million local hand-offs per second this would be most of their cost. So what
//! happens at every lock is counted by one relaxed addition, and the background thread flushes new
//! counts to the recorder ten times per second. A recorder gets an even sample of the values of a
//! distribution: all of them up to [`SAMPLES_PER_SECOND`], and one in every 2^n beyond that. A
//! burst after a quiet period is only noticed at the next flush. So whenever [`SAMPLES_AT_ONCE`]
//! values have been recorded before that, the sampling rate is halved. The exact counts of
//! [`Histograms`](super::Histograms) get every value.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::recorder::{Counter, Histogram};

/// Up to this many values per second, a recorder gets all of them.
const SAMPLES_PER_SECOND: u64 = 20_000;

/// A counter that costs one addition.
#[derive(Debug)]
pub(crate) struct DeferredCounter {
    count: AtomicU64,
    flushed: Flushed,
}

/// A counter of the recorder, and how much of a count it has got so far.
#[derive(Debug)]
pub(crate) struct Flushed {
    flushed: AtomicU64,
    counter: Counter,
}

impl Flushed {
    pub(crate) const fn new(counter: Counter) -> Self {
        Self {
            flushed: AtomicU64::new(0),
            counter,
        }
    }

    /// Flushes the new part of the count to the recorder. Two threads may do so concurrently.
    pub(crate) fn flush(&self, count: u64) {
        let flushed = self.flushed.fetch_max(count, Ordering::Relaxed);
        if count > flushed {
            self.counter.increment(count - flushed);
        }
    }
}

impl DeferredCounter {
    pub(crate) const fn new(counter: Counter) -> Self {
        Self {
            count: AtomicU64::new(0),
            flushed: Flushed::new(counter),
        }
    }

    /// Increments the counter. Returns the previous value.
    pub(crate) fn add(&self) -> u64 {
        self.count.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// Flushes the new count to the recorder. Two threads may do so concurrently.
    pub(crate) fn flush(&self) {
        self.flushed.flush(self.count());
    }
}

/// How many values may be recorded between two flushes before the sampling rate is halved: the
/// number at [`SAMPLES_PER_SECOND`], with ten flushes per second.
const SAMPLES_AT_ONCE: u64 = SAMPLES_PER_SECOND / 10;

/// Chooses the values for the recorder. Samples evenly, which preserves the shape of the
/// distribution.
#[derive(Debug, Default)]
pub(crate) struct Thinning {
    /// A value is skipped if its number has one of these bits.
    mask: AtomicU64,
    /// How many values were recorded since the mask was set.
    taken: AtomicU64,
    seen: AtomicU64,
}

impl Thinning {
    /// Whether the value with this number is recorded.
    pub(crate) fn takes(&self, number: u64) -> bool {
        let mask = self.mask.load(Ordering::Relaxed);
        if number & mask != 0 {
            return false;
        }
        if self.taken.fetch_add(1, Ordering::Relaxed) + 1 == SAMPLES_AT_ONCE {
            self.taken.store(0, Ordering::Relaxed);
            self.mask.store(mask << 1 | 1, Ordering::Relaxed);
        }
        true
    }

    /// Adjusts the sampling rate to the number of values since the last call.
    pub(crate) fn adjust(&self, count: u64, elapsed: Duration) {
        let new = count.saturating_sub(self.seen.swap(count, Ordering::Relaxed));
        let room = (SAMPLES_PER_SECOND as f64 * elapsed.as_secs_f64()).max(1.0) as u64;
        let stride = new.div_ceil(room).max(1).next_power_of_two();
        self.mask.store(stride - 1, Ordering::Relaxed);
        self.taken.store(0, Ordering::Relaxed);
    }
}

/// A counter with a distribution.
#[derive(Debug)]
pub(crate) struct Measured {
    tally: DeferredCounter,
    thinning: Thinning,
    histogram: Histogram,
}

impl Measured {
    pub(crate) fn new(counter: Counter, histogram: Histogram) -> Self {
        Self {
            tally: DeferredCounter::new(counter),
            thinning: Thinning::default(),
            histogram,
        }
    }

    pub(crate) fn add(&self, value: f64) {
        let is_in_sample = self.thinning.takes(self.tally.add());
        self.histogram.record_sampled(|| value, is_in_sample);
    }

    pub(crate) fn flush(&self) {
        self.tally.flush();
    }

    pub(crate) fn adjust(&self, elapsed: Duration) {
        self.thinning.adjust(self.tally.count(), elapsed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_samples_are_taken_if_few_and_an_even_part_of_many() {
        let thinning = Thinning::default();
        let taken = |count| (0..count).filter(|&number| thinning.takes(number)).count() as u64;
        assert_eq!(taken(SAMPLES_AT_ONCE), SAMPLES_AT_ONCE);
        thinning.adjust(SAMPLES_PER_SECOND / 10, Duration::from_millis(100));
        assert_eq!(taken(1024), 1024);
        thinning.adjust(
            SAMPLES_PER_SECOND / 10 + 40 * SAMPLES_PER_SECOND / 10,
            Duration::from_millis(100),
        );
        assert_eq!(taken(1024), 1024 / 64);
        thinning.adjust(
            SAMPLES_PER_SECOND / 10 + 40 * SAMPLES_PER_SECOND / 10,
            Duration::from_millis(100),
        );
        assert_eq!(taken(1024), 1024);
    }

    #[test]
    fn fewer_samples_of_a_burst_are_taken_before_the_next_adjustment() {
        let thinning = Thinning::default();
        let taken = (0..100 * SAMPLES_AT_ONCE)
            .filter(|&number| thinning.takes(number))
            .count() as u64;
        // All of the first, half of the next two, a quarter of the next four, ...
        assert!((6 * SAMPLES_AT_ONCE..8 * SAMPLES_AT_ONCE).contains(&taken), "{taken}");
        thinning.adjust(0, Duration::from_millis(100));
        assert!((0..SAMPLES_AT_ONCE).all(|number| thinning.takes(number)));
    }
}
