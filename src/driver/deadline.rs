//! The next deadline of the watchdog.

use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::Notify;

use crate::clock::Moment;

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
