//! Foreign code that the library calls: wakers of an executor, a recorder of metrics, a subscriber of logs. A panic in it must
//! not end what the library does for all tasks of the process, such as renewals.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};

/// One kind of foreign code, and whether it has panicked before.
pub(crate) struct Foreign {
    name: &'static str,
    reported: AtomicBool,
}

/// The wakers of tasks.
pub(crate) static WAKERS: Foreign = Foreign::new("a waker");
/// The recorder of metrics.
pub(crate) static RECORDER: Foreign = Foreign::new("the metrics recorder");
/// The subscriber of logs, where it must not be in the way of something more important than the log.
pub(crate) static SUBSCRIBER: Foreign = Foreign::new("the subscriber of logs");

impl Foreign {
    const fn new(name: &'static str) -> Self {
        Self {
            name,
            reported: AtomicBool::new(false),
        }
    }

    /// Calls it. A panic ends here; the first of each kind is logged.
    pub(crate) fn call(&self, call: impl FnOnce()) {
        if catch_unwind(AssertUnwindSafe(call)).is_err() {
            self.report();
        }
    }

    #[cold]
    fn report(&self) {
        if self.reported.swap(true, Ordering::Relaxed) {
            return;
        }
        let name = self.name;
        let log = || tracing::error!("{name} panicked; locks are not affected, and its further panics are not logged");
        // A subscriber that panics has written its own message through the panic hook.
        catch_unwind(log).ok();
    }
}
