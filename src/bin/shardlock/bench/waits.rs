//! Histograms of waits, free of coordinated omission.
//!
//! A load that is a closed loop asks for the next lock only when it is done with the last. So a task that waits for ten seconds is one
//! sample, while its luckier neighbours are ten thousand, and a percentile over samples shows the lucky. Three rules make up for it:
//!
//! - a wait counts from the moment when the task wanted the lock, be that before the window;
//! - a wait that is not over at the end counts with what it has lasted;
//! - the *expected interval* of a task is the mean time between two of its locks, over all tasks and the whole window. Had it kept to that,
//!   a task that waited for longer would have wanted the lock again and again meanwhile: these waits, each an interval shorter than the
//!   one before, are added. Where tasks have their turns fairly, waits are no longer than the interval and nothing is added.

use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use hdrhistogram::Histogram;
use parking_lot::Mutex;

/// How exact they are.
const SIGNIFICANT_DIGITS: u8 = 3;

/// The longest wait that they tell from longer ones, in nanoseconds: two hours, longer than any run.
const LONGEST_NS: u64 = 7_200_000_000_000;

/// How many waits one wait can stand for, so that adding them does not take for ever.
const ADDED_MAX: u64 = 1_000_000;

/// A histogram of nanoseconds. Its size is fixed, about 270 KB.
pub(super) fn histogram() -> anyhow::Result<Histogram<u64>> {
    Ok(Histogram::new_with_bounds(1, LONGEST_NS, SIGNIFICANT_DIGITS)?)
}

/// Waits that all tasks of a process record: a histogram for each thread, whose mutex nobody else ever wants while tasks run.
#[derive(Debug)]
pub(super) struct Waits(Vec<Mutex<Histogram<u64>>>);

thread_local! {
    static THREAD: Cell<Option<usize>> = const { Cell::new(None) };
}

static THREADS: AtomicUsize = AtomicUsize::new(0);

/// The number of this thread, in the order in which they asked.
fn thread() -> usize {
    THREAD.get().unwrap_or_else(|| {
        let number = THREADS.fetch_add(1, Ordering::Relaxed);
        THREAD.set(Some(number));
        number
    })
}

impl Waits {
    pub(super) fn new(threads: usize) -> anyhow::Result<Self> {
        let histograms = (0..threads.max(1)).map(|_| histogram().map(Mutex::new));
        Ok(Self(histograms.collect::<anyhow::Result<_>>()?))
    }

    pub(super) fn record(&self, wait: Duration) {
        let wait_ns = u64::try_from(wait.as_nanos()).unwrap_or(u64::MAX);
        self.0[thread() % self.0.len()].lock().saturating_record(wait_ns.max(1));
    }

    /// All of them together: nanoseconds, and how many waits lasted so long.
    pub(super) fn counts(&self) -> anyhow::Result<Vec<(u64, u64)>> {
        let mut sum = histogram()?;
        for histogram in &self.0 {
            sum.add(&*histogram.lock())?;
        }
        let recorded = sum.iter_recorded();
        Ok(recorded
            .map(|step| (step.value_iterated_to(), step.count_at_value()))
            .collect())
    }
}

/// With the waits that tasks would have had while they waited for longer than the interval.
pub(super) fn corrected(waits: &Histogram<u64>, interval: Duration) -> Histogram<u64> {
    let interval_ns = u64::try_from(interval.as_nanos()).unwrap_or(u64::MAX);
    waits.clone_correct(interval_ns.max(waits.max() / ADDED_MAX).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_that_is_much_longer_than_the_interval_counts_as_often_as_it_hid_others() {
        let mut waits = histogram().unwrap();
        // 90 locks of a lucky task, and one that its neighbour waited for all the time.
        waits.record_n(100, 90).unwrap();
        waits.record(10_000).unwrap();
        let corrected = corrected(&waits, Duration::from_nanos(100));
        assert_eq!(waits.value_at_quantile(0.9), 100);
        assert_eq!(corrected.len(), 90 + 100);
        // Three quarters of 190 waits are no longer than the 52nd of the hundred that the long one became.
        let wait = corrected.value_at_quantile(0.75);
        assert!((5_000..5_500).contains(&wait), "{wait}");
        assert_eq!(corrected.max(), waits.max());
    }

    #[test]
    fn waits_that_take_turns_stay_as_they_are() {
        let mut waits = histogram().unwrap();
        waits.record_n(900, 500).unwrap();
        waits.record_n(1_100, 500).unwrap();
        assert_eq!(corrected(&waits, Duration::from_nanos(1_000)), waits);
    }

    #[test]
    fn what_threads_record_is_summed() {
        let waits = Waits::new(2).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| waits.record(Duration::from_nanos(50)));
            }
        });
        assert_eq!(waits.counts().unwrap(), [(50, 3)]);
    }
}
