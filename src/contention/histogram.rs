//! Histograms of durations, in a few hundred bytes.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Each bucket ends at twice the end of the previous one: the first at a microsecond, the last but
/// one at more than a minute.
const BUCKETS: usize = 28;

fn bucket_of(time: Duration) -> usize {
    let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    ((u64::BITS - micros.leading_zeros()) as usize).min(BUCKETS - 1)
}

/// The duration below which `part` of all values lie, accurate to within a factor of two. Values
/// are assumed to be spread evenly within a bucket.
fn quantile(counts: &[u64; BUCKETS], part: f64) -> Duration {
    let all: u64 = counts.iter().sum();
    let wanted = part * all as f64;
    let mut below = 0.0;
    for (bucket, &count) in counts.iter().enumerate() {
        let count = count as f64;
        if count > 0.0 && below + count >= wanted {
            let end = (1_u64 << bucket) as f64;
            let start = if bucket == 0 { 0.0 } else { end / 2.0 };
            return Duration::from_secs_f64((start + (end - start) * ((wanted - below) / count).max(0.0)) / 1e6);
        }
        below += count;
    }
    Duration::ZERO
}

/// A histogram with a single owner.
#[derive(Debug, Clone, Default)]
pub(crate) struct Histogram {
    counts: [u32; BUCKETS],
    max: Duration,
}

impl Histogram {
    pub(crate) fn add(&mut self, time: Duration) {
        let count = &mut self.counts[bucket_of(time)];
        *count = count.saturating_add(1);
        self.max = self.max.max(time);
    }

    pub(super) fn merge(&mut self, other: &Self) {
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count = count.saturating_add(*more);
        }
        self.max = self.max.max(other.max);
    }

    pub(super) fn halve(&mut self) {
        self.counts.iter_mut().for_each(|count| *count /= 2);
        if self.counts == [0; BUCKETS] {
            self.max = Duration::ZERO;
        }
    }

    /// The duration below which `part` of all values lie. At most the maximum.
    pub(super) fn quantile(&self, part: f64) -> Duration {
        quantile(&self.counts.map(u64::from), part).min(self.max)
    }

    pub(super) const fn max(&self) -> Duration {
        self.max
    }
}

/// A histogram that many threads add to.
#[derive(Debug, Default)]
pub(crate) struct AtomicHistogram([AtomicU64; BUCKETS]);

impl AtomicHistogram {
    pub(crate) fn add(&self, time: Duration) {
        self.0[bucket_of(time)].fetch_add(1, Ordering::Relaxed);
    }

    /// The duration below which `part` of all values lie. Zero if there are none.
    pub(crate) fn quantile(&self, part: f64) -> Duration {
        quantile(
            &std::array::from_fn(|bucket| self.0[bucket].load(Ordering::Relaxed)),
            part,
        )
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn empty_histogram_has_zero_quantiles() {
        assert_eq!(AtomicHistogram::default().quantile(0.99), Duration::ZERO);
        assert_eq!(Histogram::default().quantile(0.99), Duration::ZERO);
    }

    proptest! {
        #[test]
        fn a_quantile_is_within_a_factor_of_two(mut micros in proptest::collection::vec(1_u64..60_000_000, 1..200), part in 0.01_f64..1.0) {
            let mut plain = Histogram::default();
            let atomic = AtomicHistogram::default();
            for &time in &micros {
                plain.add(Duration::from_micros(time));
                atomic.add(Duration::from_micros(time));
            }
            micros.sort_unstable();
            let rank = ((part * micros.len() as f64).ceil() as usize).clamp(1, micros.len());
            let exact = micros[rank - 1] as f64;
            let found = plain.quantile(part).as_secs_f64() * 1e6;
            prop_assert!(found <= exact * 2.0 + 1.0 && found >= exact / 2.0 - 1.0, "{} for {}", found, exact);
            prop_assert!(plain.quantile(part) <= plain.max());
            prop_assert_eq!(plain.max(), Duration::from_micros(micros[micros.len() - 1]));
            let found_atomic = atomic.quantile(part).as_secs_f64() * 1e6;
            prop_assert!(found_atomic <= exact * 2.0 + 1.0 && found_atomic >= exact / 2.0 - 1.0);
        }
    }
}
