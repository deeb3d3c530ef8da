//! The state that the tasks of a worker share: the phase of the run and the counts.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use shardlock::LockMode;

use super::keys::Keys;
use super::locker::{LockFailure, Source};
use super::mode::ModeChoice;
use super::protocol::ErrorCount;
use super::wait_histogram::WaitHistograms;

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
pub(super) struct TaskContext {
    pub(super) locks: Source,
    pub(super) keys: Keys,
    pub(super) mode: ModeChoice,
    pub(super) waits: WaitHistograms,
    /// The waits for exclusive locks, if there are shared ones.
    pub(super) writer_waits: Option<WaitHistograms>,
    pub(super) hold: Duration,
    phase: AtomicU8,
    /// When the window ended.
    over_at: Mutex<Option<Instant>>,
    token_regressions: AtomicU64,
    overlaps: AtomicU64,
    errors: Mutex<BTreeMap<String, ErrorCount>>,
    /// The counts of each task that has ended.
    finished: Mutex<Vec<Counts>>,
}

/// The counts of a task within the window.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Counts {
    pub(super) locks: u64,
    pub(super) holds: u64,
    pub(super) held: Duration,
}

impl TaskContext {
    pub(super) fn new(
        locks: Source,
        keys: Keys,
        mode: ModeChoice,
        waits: WaitHistograms,
        writer_waits: Option<WaitHistograms>,
        hold: Duration,
    ) -> Self {
        Self {
            locks,
            keys,
            mode,
            waits,
            writer_waits,
            hold,
            phase: AtomicU8::new(Phase::WarmUp as u8),
            over_at: Mutex::default(),
            token_regressions: AtomicU64::default(),
            overlaps: AtomicU64::default(),
            errors: Mutex::default(),
            finished: Mutex::default(),
        }
    }

    pub(super) fn record_wait(&self, mode: LockMode, wait: Duration) {
        self.waits.record(wait);
        if let (Some(waits), LockMode::Exclusive) = (&self.writer_waits, mode) {
            waits.record(wait);
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

    /// When the window ended.
    pub(super) fn over_at(&self) -> Option<Instant> {
        *self.over_at.lock()
    }

    pub(super) fn add_finished(&self, counts: Counts) {
        self.finished.lock().push(counts);
    }

    /// The counts of the tasks that have ended.
    pub(super) fn finished(&self) -> Vec<Counts> {
        self.finished.lock().clone()
    }

    pub(super) fn errors(&self) -> Vec<ErrorCount> {
        self.errors.lock().values().cloned().collect()
    }

    pub(super) fn count_token_regression(&self) {
        self.token_regressions.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn count_overlap(&self) {
        self.overlaps.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn token_regressions(&self) -> u64 {
        self.token_regressions.load(Ordering::Relaxed)
    }

    pub(super) fn overlaps(&self) -> u64 {
        self.overlaps.load(Ordering::Relaxed)
    }

    pub(super) fn is_in(&self, phase: Phase) -> bool {
        self.phase.load(Ordering::Relaxed) == phase as u8
    }

    pub(super) fn record_error(&self, error: LockFailure) {
        match self.errors.lock().entry(error.kind) {
            Entry::Occupied(mut known) => known.get_mut().count += 1,
            Entry::Vacant(new) => {
                let kind = new.key().clone();
                new.insert(ErrorCount {
                    kind,
                    count: 1,
                    first: error.text,
                });
            }
        }
    }
}
