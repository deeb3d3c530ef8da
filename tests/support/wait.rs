//! Waiting for a condition that can be observed, in place of sleeping for as long as it usually takes.

use std::time::{Duration, Instant};

/// How long to wait for what must happen: long enough for a loaded machine, since only a failure takes that long.
pub const PATIENCE: Duration = Duration::from_secs(20);

pub(super) const POLL: Duration = Duration::from_millis(2);

/// Blocks the thread until the condition holds, and panics with `what` when it does not within the time given.
///
/// Inside a runtime of one thread nothing else runs meanwhile: use [`eventually`] if the condition needs a task.
#[track_caller]
pub fn wait_until(what: &str, within: Duration, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + within;
    while !condition() {
        assert!(Instant::now() < deadline, "waited {within:?} in vain until {what}");
        std::thread::sleep(POLL);
    }
}

/// [`wait_until`] for async tests: other tasks run between two looks at the condition.
pub async fn eventually(what: &str, within: Duration, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + within;
    while !condition() {
        assert!(Instant::now() < deadline, "waited {within:?} in vain until {what}");
        tokio::time::sleep(POLL).await;
    }
}
