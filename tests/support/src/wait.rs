//! Waiting for an observable condition instead of sleeping for a typical duration.

use std::time::{Duration, Instant};

/// Time limit for anything that must happen. It is generous for loaded machines, since only a
/// failure takes that long.
pub const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) const POLL: Duration = Duration::from_millis(2);

/// Blocks the thread until the condition holds. Panics with `what` if it does not hold within the
/// given time.
///
/// On a current-thread runtime no task runs in the meantime: use [`eventually`] if the condition
/// depends on a task.
#[track_caller]
pub fn wait_until(what: &str, within: Duration, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + within;
    while !condition() {
        assert!(
            Instant::now() < deadline,
            "waited {within:?} without success until {what}"
        );
        std::thread::sleep(POLL);
    }
}

/// [`wait_until`] for async tests: other tasks run between two checks.
pub async fn eventually(what: &str, within: Duration, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + within;
    while !condition() {
        assert!(
            Instant::now() < deadline,
            "waited {within:?} without success until {what}"
        );
        tokio::time::sleep(POLL).await;
    }
}
