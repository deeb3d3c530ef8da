//! Counters for the hot path.
//!
//! # Implementation details
//!
//! Counters are kept in stripes. Each of the first 64 threads has a stripe of its own and is the
//! only one to write to it, so counting is a plain load and store, without an atomic addition and
//! without cache lines that move between processors. All further threads share one stripe and add
//! atomically. A reader adds up the stripes. A thread that ends leaves its stripe to the next new
//! thread.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// The number of threads with a stripe of their own: one for each bit of [`TAKEN`].
const STRIPES: usize = u64::BITS as usize;

/// Which stripes are owned by a thread.
static TAKEN: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static PLACE: StripeIndex = StripeIndex::take();
}

/// The number of the stripe that the current thread owns, if any.
struct StripeIndex(Option<usize>);

impl StripeIndex {
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

impl Drop for StripeIndex {
    fn drop(&mut self) {
        if let Some(place) = self.0 {
            TAKEN.fetch_and(!(1 << place), Ordering::Release);
        }
    }
}

/// A value of type `T` for each thread that has a place, and one for all others.
#[derive(Debug)]
pub(super) struct Stripes<T> {
    owned: [OnceLock<Box<T>>; STRIPES],
    shared: T,
}

/// The stripe to write to.
pub(super) enum Stripe<'a, T> {
    /// Only the current thread writes to it.
    Owned(&'a T),
    Shared(&'a T),
}

impl<T: Default> Default for Stripes<T> {
    fn default() -> Self {
        Self {
            owned: [const { OnceLock::new() }; STRIPES],
            shared: T::default(),
        }
    }
}

impl<T: Default> Stripes<T> {
    /// The stripe of the current thread.
    pub(super) fn mine(&self) -> Stripe<'_, T> {
        match StripeIndex::here() {
            Some(place) => Stripe::Owned(self.owned[place].get_or_init(Box::default)),
            None => Stripe::Shared(&self.shared),
        }
    }

    /// All stripes, for a reader.
    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        let owned = self.owned.iter().filter_map(OnceLock::get);
        owned.map(|stripe| &**stripe).chain([&self.shared])
    }
}

/// Some counters.
#[derive(Debug)]
pub(super) struct Counts<const N: usize>(Stripes<Line<N>>);

/// On cache lines of its own.
#[derive(Debug)]
#[repr(align(64))]
struct Line<const N: usize>([AtomicU64; N]);

impl<const N: usize> Default for Line<N> {
    fn default() -> Self {
        Self([const { AtomicU64::new(0) }; N])
    }
}

impl<const N: usize> Default for Counts<N> {
    fn default() -> Self {
        Self(Stripes::default())
    }
}

impl<const N: usize> Counts<N> {
    /// Increments a counter. Returns how often the threads with the same stripe had done so before.
    pub(super) fn add(&self, index: usize) -> u64 {
        match self.0.mine() {
            Stripe::Owned(Line(counts)) => {
                let count = counts[index].load(Ordering::Relaxed);
                counts[index].store(count + 1, Ordering::Relaxed);
                count
            }
            Stripe::Shared(Line(counts)) => counts[index].fetch_add(1, Ordering::Relaxed),
        }
    }

    /// The values of the counters.
    pub(super) fn all(&self) -> [u64; N] {
        let mut totals = [0; N];
        for Line(counts) in self.0.iter() {
            for (total, count) in totals.iter_mut().zip(counts) {
                *total += count.load(Ordering::Relaxed);
            }
        }
        totals
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::sync::{Arc, Barrier};
    use std::thread;

    use super::*;

    /// More threads at once than there are stripes, and then as many again, which inherit the
    /// stripes.
    #[test]
    fn no_count_is_lost_with_more_threads_than_stripes() {
        const THREADS: usize = STRIPES + 16;
        const EACH: usize = 2_000;
        let counts = Counts::<2>::default();
        for _ in 0..2 {
            let all_have_a_place = Barrier::new(THREADS);
            thread::scope(|scope| {
                for _ in 0..THREADS {
                    scope.spawn(|| {
                        StripeIndex::here();
                        all_have_a_place.wait();
                        for number in 0..EACH {
                            counts.add(number % 2);
                        }
                    });
                }
            });
        }
        assert_eq!(counts.all(), [(THREADS * EACH) as u64; 2]);
        let shared = counts.0.shared.0[0].load(Ordering::Relaxed);
        assert!(shared > 0, "the shared stripe was not used");
    }

    /// The destructor of a thread's own variable may count after the thread has lost its place.
    #[test]
    fn count_of_a_thread_that_ends_is_not_lost() {
        struct AtTheEnd(Arc<Counts<1>>);
        impl Drop for AtTheEnd {
            fn drop(&mut self) {
                self.0.add(0);
            }
        }
        thread_local! {
            static LAST: Cell<Option<AtTheEnd>> = const { Cell::new(None) };
        }
        let counts = Arc::new(Counts::<1>::default());
        for has_a_place_first in [true, false] {
            let counts = Arc::clone(&counts);
            let counting = thread::spawn(move || {
                if has_a_place_first {
                    counts.add(0);
                }
                LAST.set(Some(AtTheEnd(Arc::clone(&counts))));
                counts.add(0);
            });
            counting.join().unwrap();
        }
        assert_eq!(counts.all(), [5]);
    }
}
