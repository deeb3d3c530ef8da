//! Histograms of waits, corrected for coordinated omission.
//!
//! In a closed loop, a task requests the next lock only after the last one. A task that waits for
//! ten seconds thus adds one sample while its luckier neighbours add ten thousand, and percentiles
//! over samples reflect only the lucky tasks. Three rules correct this:
//!
//! - A wait starts when the task requested the lock, even if that was before the window.
//! - A wait that is not over at the end counts with the time it has lasted.
//! - The *expected interval* of a task is the mean time between two of its locks, over all tasks
//!   and the whole window. During a longer wait, the task would have requested further locks. These
//!   waits, each an interval shorter than the previous one, are added. With fair turns, waits are
//!   no longer than the interval and nothing is added.

use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use hdrhistogram::Histogram;
use parking_lot::Mutex;

/// The precision of the histograms.
const SIGNIFICANT_DIGITS: u8 = 3;

/// The longest wait that is recorded exactly, in nanoseconds: two hours, longer than any run.
const LONGEST_NS: u64 = 7_200_000_000_000;

/// The maximum number of waits added for a single one, which bounds the time that the correction
/// takes.
const ADDED_MAX: u64 = 1_000_000;

/// A histogram of nanoseconds. Its size is fixed, about 270 KB.
pub(super) fn histogram() -> anyhow::Result<Histogram<u64>> {
    Ok(Histogram::new_with_bounds(1, LONGEST_NS, SIGNIFICANT_DIGITS)?)
}

/// The waits recorded by all tasks of a process: one histogram per thread, so that its mutex is
/// uncontended while tasks run.
#[derive(Debug)]
pub(super) struct WaitHistograms(Vec<Mutex<Histogram<u64>>>);

thread_local! {
    static THREAD: Cell<Option<usize>> = const { Cell::new(None) };
}

static THREADS: AtomicUsize = AtomicUsize::new(0);

/// The number of this thread, assigned on first use.
fn thread() -> usize {
    THREAD.get().unwrap_or_else(|| {
        let number = THREADS.fetch_add(1, Ordering::Relaxed);
        THREAD.set(Some(number));
        number
    })
}

impl WaitHistograms {
    pub(super) fn new(threads: usize) -> anyhow::Result<Self> {
        let histograms = (0..threads.max(1)).map(|_| histogram().map(Mutex::new));
        Ok(Self(histograms.collect::<anyhow::Result<_>>()?))
    }

    pub(super) fn record(&self, wait: Duration) {
        let wait_ns = u64::try_from(wait.as_nanos()).unwrap_or(u64::MAX);
        self.0[thread() % self.0.len()].lock().saturating_record(wait_ns.max(1));
    }

    /// The sum of all histograms: nanoseconds, and the number of waits of that length.
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

/// Adds the waits that tasks would have had during waits longer than the interval.
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
        // 90 locks of a lucky task, and one wait of its neighbour that lasted all the time.
        waits.record_n(100, 90).unwrap();
        waits.record(10_000).unwrap();
        let corrected = corrected(&waits, Duration::from_nanos(100));
        assert_eq!(waits.value_at_quantile(0.9), 100);
        assert_eq!(corrected.len(), 90 + 100);
        // Three quarters of the 190 waits are no longer than the 52nd of the hundred that the long
        // one became.
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
    fn waits_of_all_threads_are_summed() {
        let waits = WaitHistograms::new(2).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| waits.record(Duration::from_nanos(50)));
            }
        });
        assert_eq!(waits.counts().unwrap(), [(50, 3)]);
    }
}
