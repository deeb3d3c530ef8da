//! A task: requests a lock, holds it, releases it, and repeats.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use shardlock::{LockError, LockGuard, LockManager};

use super::keys::{Keys, Seen};
use super::protocol::Errors;
use super::waits::Waits;

/// The pause after an error, so that a server that is down is not flooded with requests.
const ERROR_PAUSE: Duration = Duration::from_millis(10);

/// Without a hold time, only one hold in this many is timed: reading the clock is not free.
const HOLDS_PER_SAMPLE: u64 = 16;

/// The phase of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Phase {
    WarmUp,
    Measured,
    Over,
}

/// Shared by the tasks of a worker.
#[derive(Debug)]
pub(super) struct Load {
    pub(super) locks: LockManager,
    pub(super) keys: Keys,
    pub(super) waits: Waits,
    hold: Duration,
    phase: AtomicU8,
    /// When the window ended.
    over_at: Mutex<Option<Instant>>,
    token_regressions: AtomicU64,
    overlaps: AtomicU64,
    errors: Mutex<BTreeMap<&'static str, Errors>>,
    /// The counts of each task that has ended.
    ended: Mutex<Vec<Counts>>,
}

/// The counts of a task within the window.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Counts {
    pub(super) locks: u64,
    pub(super) holds: u64,
    pub(super) held: Duration,
}

impl Load {
    pub(super) fn new(locks: LockManager, keys: Keys, waits: Waits, hold: Duration) -> Self {
        Self {
            locks,
            keys,
            waits,
            hold,
            phase: AtomicU8::new(Phase::WarmUp as u8),
            over_at: Mutex::default(),
            token_regressions: AtomicU64::default(),
            overlaps: AtomicU64::default(),
            errors: Mutex::default(),
            ended: Mutex::default(),
        }
    }

    /// Starts the window: tasks count from now on.
    pub(super) fn open(&self) {
        self.phase.store(Phase::Measured as u8, Ordering::Relaxed);
    }

    /// Ends the window: tasks no longer count.
    pub(super) fn close(&self) {
        *self.over_at.lock() = Some(Instant::now());
        self.phase.store(Phase::Over as u8, Ordering::Relaxed);
    }

    /// The counts of the tasks that have ended.
    pub(super) fn ended(&self) -> Vec<Counts> {
        self.ended.lock().clone()
    }

    pub(super) fn errors(&self) -> Vec<Errors> {
        self.errors.lock().values().cloned().collect()
    }

    pub(super) fn token_regressions(&self) -> u64 {
        self.token_regressions.load(Ordering::Relaxed)
    }

    pub(super) fn overlaps(&self) -> u64 {
        self.overlaps.load(Ordering::Relaxed)
    }

    fn is_in(&self, phase: Phase) -> bool {
        self.phase.load(Ordering::Relaxed) == phase as u8
    }

    fn failed(&self, error: &LockError) {
        match self.errors.lock().entry(kind(error)) {
            Entry::Occupied(mut known) => known.get_mut().count += 1,
            Entry::Vacant(new) => {
                new.insert(Errors {
                    kind: kind(error).to_owned(),
                    count: 1,
                    first: error.to_string(),
                });
            }
        }
    }
}

fn kind(error: &LockError) -> &'static str {
    match error {
        LockError::Timeout { .. } => "timeout",
        LockError::QueueFull { .. } => "queue full",
        LockError::TooManyWaiters { .. } => "too many waiters",
        LockError::TooManyKeys { .. } => "too many keys",
        LockError::TooManyLeases { .. } => "too many leases",
        LockError::ShardDown { .. } => "shard down",
        LockError::Unavailable { .. } => "unavailable",
        LockError::Refused { .. } => "refused",
        LockError::Lost { .. } => "lost",
        LockError::TokenRegression { .. } => "token regression",
        _ => "other",
    }
}

/// A running task. Its counts are saved on drop. Waiting tasks are ended by aborting them, so they
/// need not check for the end.
struct Task {
    load: Arc<Load>,
    counts: Counts,
    /// When it requested the lock that it is still waiting for.
    wanted_at: Option<Instant>,
}

/// Runs until the run is over or the task is aborted.
pub(super) async fn work(load: Arc<Load>, number: usize) {
    let mut task = Task {
        load,
        counts: Counts::default(),
        wanted_at: None,
    };
    let (mut key, mut name) = (0, String::new());
    let mut cycles = 0_u64;
    while !task.load.is_in(Phase::Over) {
        let wanted_at = match task.wanted_at {
            // The last attempt failed; retry the same key. The wait continues.
            Some(wanted_at) => wanted_at,
            None => {
                key = task.load.keys.next(number);
                task.load.keys.name(key, &mut name);
                *task.wanted_at.insert(Instant::now())
            }
        };
        let locked = task.load.locks.lock(&name).await;
        if task.load.is_in(Phase::Over) {
            // Acquired too late: it counts as still waiting.
            break;
        }
        let released = match locked {
            Ok(guard) => {
                task.wanted_at = None;
                let had_at = Instant::now();
                if task.load.is_in(Phase::Measured) {
                    task.counts.locks += 1;
                    task.load.waits.record(had_at - wanted_at);
                }
                task.hold_and_release(guard, key, had_at, cycles.is_multiple_of(HOLDS_PER_SAMPLE))
                    .await
            }
            Err(error) => Err(error),
        };
        if let Err(error) = released {
            task.load.failed(&error);
            tokio::time::sleep(ERROR_PAUSE).await;
        }
        cycles += 1;
        // If no lock has to be waited for, nothing else would yield to the other tasks.
        tokio::task::coop::consume_budget().await;
    }
}

impl Task {
    async fn hold_and_release(
        &mut self,
        guard: LockGuard,
        key: usize,
        had_at: Instant,
        is_sample: bool,
    ) -> Result<(), LockError> {
        let token = guard.token();
        if self.load.keys.enter(key, token) == Seen::Regression {
            self.load.token_regressions.fetch_add(1, Ordering::Relaxed);
        }
        if !self.load.hold.is_zero() {
            tokio::time::sleep(self.load.hold).await;
        }
        // A holder that has lost the lock may find another one here; `release` reports the loss.
        if !self.load.keys.is_alone(key, token) && guard.is_valid() {
            self.load.overlaps.fetch_add(1, Ordering::Relaxed);
        }
        let is_timed = is_sample || !self.load.hold.is_zero();
        if is_timed && self.load.is_in(Phase::Measured) {
            self.counts.holds += 1;
            self.counts.held += had_at.elapsed();
        }
        guard.release().await
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        let over_at = *self.load.over_at.lock();
        if let (Some(wanted_at), Some(over_at)) = (self.wanted_at, over_at) {
            self.load.waits.record(over_at.saturating_duration_since(wanted_at));
        }
        self.load.ended.lock().push(self.counts);
    }
}
