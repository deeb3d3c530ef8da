//! When the watchdog looks next, and how it is told to look earlier.

use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::Notify;

use crate::clock::Moment;

/// The moment of the next look. Tasks move it forward without a lock; the watchdog alone moves it back.
#[derive(Debug)]
pub(crate) struct Watch {
    next: AtomicU64,
    nudged: Notify,
}

impl Default for Watch {
    fn default() -> Self {
        Self {
            next: AtomicU64::new(u64::MAX),
            nudged: Notify::new(),
        }
    }
}

impl Watch {
    /// Something is due at that moment. Costs one load where the watchdog looks earlier anyway.
    pub(crate) fn look_at(&self, moment: Moment) {
        if moment.as_nanos() < self.next.load(Ordering::Acquire)
            && moment.as_nanos() < self.next.fetch_min(moment.as_nanos(), Ordering::AcqRel)
        {
            self.nudged.notify_one();
        }
    }

    /// Before a look at all keys: whatever is told from now on counts for the look after it.
    pub(crate) fn reset(&self) {
        self.next.store(u64::MAX, Ordering::Release);
    }

    /// Waits until something is due.
    pub(crate) async fn due(&self) {
        loop {
            let nudged = self.nudged.notified();
            let next = Moment::from_nanos(self.next.load(Ordering::Acquire));
            let left = next.since(Moment::now());
            if left.is_zero() {
                return;
            }
            if next.as_nanos() == u64::MAX {
                nudged.await;
                continue;
            }
            tokio::select! {
                () = nudged => {}
                // The timer's clock may stand still while the machine sleeps, so it is not trusted for more than this.
                () = tokio::time::sleep(left.min(NAP_MAX)) => {}
            }
        }
    }
}

/// The longest nap between two looks at the clock that runs on during sleep.
const NAP_MAX: std::time::Duration = std::time::Duration::from_millis(500);
