//! The counts of one histogram: exact, and cheap enough for the hot path.
//!
//! # Implementation details
//!
//! The counts are kept in stripes. Each of the first 64 threads has a stripe of its own and is the
//! only one to write to it, so counting a value is a plain load and store of its bucket and of the
//! sum, without an atomic addition and without cache lines that move between processors. All
//! further threads share one stripe and add atomically. A reader adds up the stripes. A thread that
//! ends leaves its stripe to the next new thread.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use metrics::HistogramFn;

/// The largest number of buckets of a histogram, with the one beyond the last bound.
const BUCKETS_MAX: usize = 22;

/// The number of threads with a stripe of their own: one for each bit of [`TAKEN`].
const STRIPES: usize = u64::BITS as usize;

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

/// Which stripes are owned by a thread.
static TAKEN: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static PLACE: Place = Place::take();
}

/// The number of the stripe that the current thread owns, if any.
struct Place(Option<usize>);

impl Place {
    fn take() -> Self {
        // Acquire: the previous owner's last writes come before the first one of this thread.
        let taken = TAKEN.fetch_update(Ordering::Acquire, Ordering::Relaxed, |taken| {
            (taken != u64::MAX).then(|| taken | (taken + 1))
        });
        Self(taken.ok().map(|taken| taken.trailing_ones() as usize))
    }

    /// The place of this thread. `None` also while the thread ends.
    fn here() -> Option<usize> {
        PLACE.try_with(|place| place.0).ok().flatten()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(place) = self.0 {
            TAKEN.fetch_and(!(1 << place), Ordering::Release);
        }
    }
}

/// The counts of some threads.
#[derive(Debug, Default)]
// On cache lines of its own.
#[repr(align(64))]
struct Stripe {
    counts: [AtomicU64; BUCKETS_MAX],
    /// The bits of the sum of all values.
    sum: AtomicU64,
}

impl Stripe {
    /// Counts a value. Only the owner of the stripe may call it.
    fn add_as_owner(&self, bucket: usize, value: f64) {
        let count = &self.counts[bucket];
        count.store(count.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        let sum = f64::from_bits(self.sum.load(Ordering::Relaxed)) + value;
        self.sum.store(sum.to_bits(), Ordering::Relaxed);
    }

    /// Counts a value, in a stripe that many threads share.
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
    owned: [OnceLock<Box<Stripe>>; STRIPES],
    shared: Stripe,
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
            owned: [const { OnceLock::new() }; STRIPES],
            shared: Stripe::default(),
        }
    }

    /// Counts a value.
    pub(super) fn add(&self, value: f64) {
        let bucket = self.bucket_of(value);
        match Place::here() {
            Some(place) => self.owned[place].get_or_init(Box::default).add_as_owner(bucket, value),
            None => self.shared.add(bucket, value),
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
        let owned = self
            .owned
            .iter()
            .filter_map(|stripe| stripe.get().map(|stripe| &**stripe));
        for stripe in owned.chain([&self.shared]) {
            for (total, count) in totals.counts.iter_mut().zip(&stripe.counts) {
                *total += count.load(Ordering::Relaxed);
            }
            totals.sum += f64::from_bits(stripe.sum.load(Ordering::Relaxed));
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
    use std::cell::Cell;
    use std::sync::{Arc, Barrier};
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

    /// More threads at once than there are stripes, and then as many again, which inherit the
    /// stripes.
    #[test]
    fn no_value_is_lost_with_more_threads_than_stripes() {
        const THREADS: usize = STRIPES + 16;
        const VALUES: usize = 2_000;
        let cells = Arc::new(Cells::new(&[1.0, 2.0]));
        for _ in 0..2 {
            let all_have_a_place = Barrier::new(THREADS);
            thread::scope(|scope| {
                for _ in 0..THREADS {
                    scope.spawn(|| {
                        Place::here();
                        all_have_a_place.wait();
                        (0..VALUES).for_each(|number| cells.add([0.5, 1.5, 4.0, 2.0][number % 4]));
                    });
                }
            });
        }
        let quarter = (2 * THREADS * VALUES / 4) as u64;
        let wanted = Totals {
            counts: vec![quarter, 2 * quarter, quarter],
            sum: quarter as f64 * 8.0,
        };
        assert_eq!(cells.totals(), wanted);
        let shared: u64 = cells
            .shared
            .counts
            .iter()
            .map(|count| count.load(Ordering::Relaxed))
            .sum();
        assert!(shared > 0, "the shared stripe was not used");
    }

    /// A value that is counted by the destructor of a thread's own variable, when the place of the
    /// thread may be gone already.
    #[test]
    fn value_that_is_counted_while_a_thread_ends_is_not_lost() {
        struct AtTheEnd(Arc<Cells>);
        impl Drop for AtTheEnd {
            fn drop(&mut self) {
                self.0.add(1.0);
            }
        }
        thread_local! {
            static LAST: Cell<Option<AtTheEnd>> = const { Cell::new(None) };
        }
        let cells = Arc::new(Cells::new(&[1.0]));
        for uses_its_place_first in [true, false] {
            let cells = Arc::clone(&cells);
            let counting = thread::spawn(move || {
                if uses_its_place_first {
                    cells.add(1.0);
                }
                LAST.set(Some(AtTheEnd(Arc::clone(&cells))));
                cells.add(1.0);
            });
            counting.join().unwrap();
        }
        assert_eq!(cells.totals().counts, [5, 0]);
    }
}
