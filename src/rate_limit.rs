//! Limits how often a line is logged.

use std::time::Duration;

use parking_lot::Mutex;

use crate::clock::Moment;

/// The shortest interval between two lines about the same thing.
pub(crate) const INTERVAL: Duration = Duration::from_secs(10);

/// Admits one event per interval.
#[derive(Debug, Default)]
pub(crate) struct RateLimit(Mutex<Option<Window>>);

impl RateLimit {
    /// If the event may be logged, returns how many were suppressed since the last one that was.
    pub(crate) fn admit(&self, now: Moment) -> Option<u64> {
        let mut window = self.0.lock();
        match &mut *window {
            Some(window) => window.admit(now),
            None => {
                *window = Some(Window::new(now));
                Some(0)
            }
        }
    }
}

/// When the last event was admitted, and how many were not since.
#[derive(Debug)]
pub(crate) struct Window {
    logged_at: Moment,
    suppressed: u64,
}

impl Window {
    pub(crate) const fn new(now: Moment) -> Self {
        Self {
            logged_at: now,
            suppressed: 0,
        }
    }

    /// See [`RateLimit::admit`].
    pub(crate) fn admit(&mut self, now: Moment) -> Option<u64> {
        if now.since(self.logged_at) < INTERVAL {
            self.suppressed += 1;
            return None;
        }
        self.logged_at = now;
        Some(std::mem::take(&mut self.suppressed))
    }
}
