//! The next deadline of the watchdog.

use tokio::sync::Notify;

use crate::clock::Moment;
use crate::sync::{AtomicU64, Ordering};

/// The time of the next pass of the watchdog. Tasks make it earlier without a lock; only the
/// watchdog makes it later.
#[derive(Debug)]
pub(crate) struct NextDeadline {
    next: AtomicU64,
    changed: Notify,
}

impl Default for NextDeadline {
    fn default() -> Self {
        Self {
            next: AtomicU64::new(u64::MAX),
            changed: Notify::new(),
        }
    }
}

impl NextDeadline {
    /// Something is due at `moment`. Costs a single load if the watchdog wakes up earlier anyway.
    pub(crate) fn wake_at(&self, moment: Moment) {
        if moment.as_nanos() < self.next.load(Ordering::Acquire)
            && moment.as_nanos() < self.next.fetch_min(moment.as_nanos(), Ordering::AcqRel)
        {
            self.changed.notify_one();
        }
    }

    /// Called before a pass over all keys. Deadlines set from now on count for the next pass.
    pub(crate) fn reset(&self) {
        self.next.store(u64::MAX, Ordering::Release);
    }

    /// Waits until something is due.
    pub(crate) async fn due(&self) {
        loop {
            let changed = self.changed.notified();
            let next = Moment::from_nanos(self.next.load(Ordering::Acquire));
            let left = next.since(Moment::now());
            if left.is_zero() {
                return;
            }
            if next.as_nanos() == u64::MAX {
                changed.await;
                continue;
            }
            tokio::select! {
                () = changed => {}
                // The timer's clock may stop while the machine sleeps, so it is not trusted for
                // longer than this.
                () = tokio::time::sleep(left.min(NAP_MAX)) => {}
            }
        }
    }
}

/// The longest sleep between two checks of the clock that keeps running while the machine sleeps.
const NAP_MAX: std::time::Duration = std::time::Duration::from_millis(500);

#[cfg(all(test, shardlock_loom))]
mod models {
    use loom::sync::{Arc, Mutex};
    use loom::thread;

    use super::*;

    const EARLY: Moment = Moment::from_nanos(5);
    const LATE: Moment = Moment::from_nanos(100);

    /// A key with a deadline of its own, which tasks change under its mutex.
    struct Shard {
        next: NextDeadline,
        key: Mutex<Option<Moment>>,
    }

    impl Shard {
        fn set(&self, deadline: Moment) {
            *self.key.lock().unwrap() = Some(deadline);
            self.next.wake_at(deadline);
        }

        /// Like the watchdog, which sees to what is due and sets the next deadline.
        fn pass(&self) {
            self.next.reset();
            let deadline = *self.key.lock().unwrap();
            if let Some(deadline) = deadline {
                self.next.wake_at(deadline);
            }
        }

        fn next(&self) -> u64 {
            self.next.next.load(Ordering::Acquire)
        }
    }

    /// Otherwise a lease would not be renewed.
    #[test]
    fn deadline_that_is_set_during_a_pass_is_not_lost() {
        loom::model(|| {
            let shard = Arc::new(Shard {
                next: NextDeadline::default(),
                key: Mutex::new(None),
            });
            // A pass is due, so a task has no reason to make it earlier.
            shard.next.wake_at(Moment::from_nanos(1));
            let task = {
                let shard = Arc::clone(&shard);
                thread::spawn(move || shard.set(EARLY))
            };
            shard.pass();
            task.join().unwrap();
            assert_eq!(shard.next(), EARLY.as_nanos());
        });
    }

    #[test]
    fn earlier_of_two_deadlines_counts() {
        loom::model(|| {
            let next = Arc::new(NextDeadline::default());
            let other = {
                let next = Arc::clone(&next);
                thread::spawn(move || next.wake_at(EARLY))
            };
            next.wake_at(LATE);
            other.join().unwrap();
            assert_eq!(next.next.load(Ordering::Acquire), EARLY.as_nanos());
        });
    }
}
