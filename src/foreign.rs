//! Calls into foreign code: the wakers of an executor, a metrics recorder, a log subscriber. A
//! panic there must not stop work that the library does for all tasks of the process, such as
//! renewals.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};

/// One kind of foreign code, and whether it has panicked before.
pub(crate) struct Foreign {
    name: &'static str,
    reported: AtomicBool,
}

/// The wakers of tasks.
pub(crate) static WAKERS: Foreign = Foreign::new("a waker");
/// The metrics recorder.
pub(crate) static RECORDER: Foreign = Foreign::new("the metrics recorder");
/// The log subscriber: see [`log`](crate::log) and [`span`](crate::span).
pub(crate) static SUBSCRIBER: Foreign = Foreign::new("the log subscriber");

impl Foreign {
    const fn new(name: &'static str) -> Self {
        Self {
            name,
            reported: AtomicBool::new(false),
        }
    }

    /// Runs the call and catches a panic. The first panic of each kind is logged.
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
        let log = || tracing::error!("{name} panicked; locks are not affected; its further panics are not logged");
        // A panic of the subscriber has already been printed by the panic hook.
        catch_unwind(log).ok();
    }
}
