//! A task: requests a lock, holds it, releases it, and repeats.

use std::sync::Arc;
use std::time::{Duration, Instant};

use shardlock::LockMode;

use super::context::{Counts, Phase, TaskContext};
use super::hold_timer::HoldTimer;
use super::locker::Held;

/// The pause after an error, so that a server that is down is not flooded with requests.
const ERROR_PAUSE: Duration = Duration::from_millis(10);

/// Without a hold time, only one hold in this many is timed: reading the clock is not free.
const HOLDS_PER_SAMPLE: u64 = 16;

/// A running task. Its counts are saved on drop. Waiting tasks are ended by aborting them, so they
/// need not check for the end.
struct Task {
    context: Arc<TaskContext>,
    counts: Counts,
    timer: HoldTimer,
    /// When it requested the lock that it is still waiting for.
    requested_at: Option<Instant>,
    /// The mode of that lock, or of the last one.
    mode: LockMode,
}

/// Runs until the run is over or the task is aborted.
pub(super) async fn run_task(context: Arc<TaskContext>, number: usize) {
    let mut task = Task {
        context,
        counts: Counts::default(),
        timer: HoldTimer::default(),
        requested_at: None,
        mode: LockMode::Exclusive,
    };
    let mut locker = task.context.locks.locker();
    let (mut key, mut name) = (0, String::new());
    let mut iterations = 0_u64;
    while !task.context.is_in(Phase::Over) {
        let requested_at = match task.requested_at {
            // The last attempt failed; retry the same key. The wait continues.
            Some(requested_at) => requested_at,
            None => {
                key = task.context.keys.next(number);
                task.context.keys.name(key, &mut name);
                task.mode = task.context.mode.next();
                *task.requested_at.insert(Instant::now())
            }
        };
        let locked = locker.lock(&name, task.mode).await;
        if task.context.is_in(Phase::Over) {
            // Acquired too late: it counts as still waiting.
            break;
        }
        let released = match locked {
            Ok(held) => {
                task.requested_at = None;
                let acquired_at = Instant::now();
                if task.context.is_in(Phase::Measured) {
                    task.counts.locks += 1;
                    task.context.record_wait(task.mode, acquired_at - requested_at);
                }
                let is_sample = iterations.is_multiple_of(HOLDS_PER_SAMPLE);
                let is_overlapped = task.hold(&held, key, acquired_at, is_sample).await;
                let released = locker.release(&name, held).await;
                // A holder that has lost the lock may have found another one.
                if is_overlapped && released.is_ok() {
                    task.context.count_overlap();
                }
                released
            }
            Err(error) => Err(error),
        };
        if let Err(error) = released {
            task.context.record_error(error);
            tokio::time::sleep(ERROR_PAUSE).await;
        }
        iterations += 1;
        // If no lock has to be waited for, nothing else would yield to the other tasks.
        tokio::task::coop::consume_budget().await;
    }
}

impl Task {
    /// Holds the lock. Returns whether another task had the key meanwhile that must not.
    async fn hold(&mut self, held: &Held, key: usize, acquired_at: Instant, is_sample: bool) -> bool {
        let entry = self.context.keys.enter(key, self.mode, held.token());
        if entry.has_regressed {
            self.context.count_token_regression();
        }
        if !self.context.hold.is_zero() {
            self.timer.sleep(self.context.hold).await;
        }
        let is_overlapped = !self.context.keys.leave(key, self.mode, entry) && held.is_valid();
        let is_timed = is_sample || !self.context.hold.is_zero();
        if is_timed && self.context.is_in(Phase::Measured) {
            self.counts.holds += 1;
            self.counts.held += acquired_at.elapsed();
        }
        is_overlapped
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        let over_at = self.context.over_at();
        if let (Some(requested_at), Some(over_at)) = (self.requested_at, over_at) {
            self.context
                .record_wait(self.mode, over_at.saturating_duration_since(requested_at));
        }
        self.context.add_finished(self.counts);
    }
}
