//! The counts of one histogram: exact, and cheap enough for the hot path.

use std::sync::atomic::{AtomicU64, Ordering};

use metrics::HistogramFn;

use super::stripes::{Stripe, Stripes};

/// The largest number of buckets of a histogram, with the one beyond the last bound.
const BUCKETS_MAX: usize = 22;

/// The upper bits of a positive value, its exponent and three bits of its fraction, are the index
/// of a range, and a table has the first bucket of each range.
const RANGE_SHIFT: u32 = f64::MANTISSA_DIGITS - 1 - 3;
/// The ranges that begin at 2 to the power of -20 and 20. All bounds lie between them.
const FIRST_RANGE: u64 = 9.536_743_164_062_5e-7_f64.to_bits() >> RANGE_SHIFT;
const LAST_RANGE: u64 = 1_048_576_f64.to_bits() >> RANGE_SHIFT;
const RANGES: usize = (LAST_RANGE - FIRST_RANGE) as usize + 1;

/// The smallest value of a range.
const fn start_of(range: u64) -> f64 {
    f64::from_bits(range << RANGE_SHIFT)
}

/// The counts of some threads.
#[derive(Debug, Default)]
// On cache lines of its own.
#[repr(align(64))]
struct Part {
    counts: [AtomicU64; BUCKETS_MAX],
    /// The bits of the sum of all values.
    sum: AtomicU64,
}

impl Part {
    /// Counts a value. Only the thread that owns the part may call it.
    fn add_as_owner(&self, bucket: usize, value: f64) {
        let count = &self.counts[bucket];
        count.store(count.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        let sum = f64::from_bits(self.sum.load(Ordering::Relaxed)) + value;
        self.sum.store(sum.to_bits(), Ordering::Relaxed);
    }

    /// Counts a value, in a part that many threads share.
    fn add(&self, bucket: usize, value: f64) {
        self.counts[bucket].fetch_add(1, Ordering::Relaxed);
        let add = |sum| Some((f64::from_bits(sum) + value).to_bits());
        // The closure never refuses.
        self.sum.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add).ok();
    }
}

/// The counts of a histogram.
#[derive(Debug)]
pub(super) struct Cells {
    bounds: &'static [f64],
    /// For each range, the number of bounds that are below all of its values.
    below: [u8; RANGES],
    parts: Stripes<Part>,
}

/// The counts at some point in time.
#[derive(Debug, PartialEq)]
pub(super) struct Totals {
    /// The number of values in each bucket that are in no smaller one; the last one has no bound.
    pub(super) counts: Vec<u64>,
    pub(super) sum: f64,
}

impl Cells {
    /// A histogram with these upper bounds, of which there are fewer than [`BUCKETS_MAX`].
    pub(super) fn new(bounds: &'static [f64]) -> Self {
        debug_assert!(bounds.len() < BUCKETS_MAX && bounds.is_sorted());
        debug_assert!(
            bounds
                .iter()
                .all(|bound| (start_of(FIRST_RANGE)..start_of(LAST_RANGE)).contains(bound))
        );
        let below = std::array::from_fn(|index| {
            let start = start_of(FIRST_RANGE + index as u64);
            bounds.partition_point(|&bound| bound < start) as u8
        });
        Self {
            bounds,
            below,
            parts: Stripes::default(),
        }
    }

    /// Counts a value.
    pub(super) fn add(&self, value: f64) {
        let bucket = self.bucket_of(value);
        match self.parts.mine() {
            Stripe::Owned(part) => part.add_as_owner(bucket, value),
            Stripe::Shared(part) => part.add(bucket, value),
        }
    }

    fn bucket_of(&self, value: f64) -> usize {
        let range = (value.to_bits() >> RANGE_SHIFT).clamp(FIRST_RANGE, LAST_RANGE);
        let mut bucket = usize::from(self.below[(range - FIRST_RANGE) as usize]);
        while self.bounds.get(bucket).is_some_and(|&bound| value > bound) {
            bucket += 1;
        }
        bucket
    }

    pub(super) const fn bounds(&self) -> &'static [f64] {
        self.bounds
    }

    pub(super) fn totals(&self) -> Totals {
        let mut totals = Totals {
            counts: vec![0; self.bounds.len() + 1],
            sum: 0.0,
        };
        for part in self.parts.iter() {
            for (total, count) in totals.counts.iter_mut().zip(&part.counts) {
                *total += count.load(Ordering::Relaxed);
            }
            totals.sum += f64::from_bits(part.sum.load(Ordering::Relaxed));
        }
        totals
    }
}

/// For users of the facade.
impl HistogramFn for Cells {
    fn record(&self, value: f64) {
        self.add(value);
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use proptest::prelude::*;

    use super::*;
    use crate::telemetry::table::METRICS;

    fn all_bounds() -> Vec<&'static [f64]> {
        let bounds = METRICS.iter().map(|metric| metric.buckets());
        bounds.filter(|bounds| !bounds.is_empty()).collect()
    }

    #[test]
    fn bound_belongs_to_its_bucket_and_the_next_larger_value_does_not() {
        for bounds in all_bounds() {
            let cells = Cells::new(bounds);
            for (index, &bound) in bounds.iter().enumerate() {
                assert_eq!(cells.bucket_of(bound), index, "{bound}");
                assert_eq!(cells.bucket_of(bound.next_up()), index + 1, "{bound}");
                assert_eq!(cells.bucket_of(bound.next_down()), index, "{bound}");
            }
            for low in [0.0, f64::MIN_POSITIVE, 1e-300] {
                assert_eq!(cells.bucket_of(low), 0, "{low}");
            }
            for high in [1e7, f64::MAX, f64::INFINITY] {
                assert_eq!(cells.bucket_of(high), bounds.len(), "{high}");
            }
        }
    }

    proptest! {
        #[test]
        fn bucket_is_the_first_whose_bound_is_not_exceeded(value in 0.0_f64..200_000.0, shift in 0_u32..40) {
            let value = value / f64::from(2_u32).powi(shift as i32);
            for bounds in all_bounds() {
                let wanted = bounds.partition_point(|&bound| value > bound);
                prop_assert_eq!(Cells::new(bounds).bucket_of(value), wanted);
            }
        }
    }

    #[test]
    fn values_of_all_threads_are_counted_and_added() {
        const THREADS: usize = 80;
        let cells = Cells::new(&[1.0, 2.0]);
        thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| (0..2_000).for_each(|number| cells.add([0.5, 1.5, 4.0, 2.0][number % 4])));
            }
        });
        let quarter = (THREADS * 500) as u64;
        let wanted = Totals {
            counts: vec![quarter, 2 * quarter, quarter],
            sum: quarter as f64 * 8.0,
        };
        assert_eq!(cells.totals(), wanted);
    }

    #[test]
    fn shared_part_counts_like_an_owned_one() {
        let [shared, owned] = [Part::default(), Part::default()];
        for (bucket, value) in [(0, 0.5), (1, 1.25), (1, 2.0)] {
            shared.add(bucket, value);
            owned.add_as_owner(bucket, value);
        }
        assert_eq!(format!("{shared:?}"), format!("{owned:?}"));
    }
}
