//! What all shards of a manager share.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::mpsc;

use super::Job;
use crate::contention::HotKeys;
use crate::engine::Rules;
use crate::engine::admission::Limits;
use crate::engine::min_holds::MinHolds;
use crate::identity::ManagerId;
use crate::mode::LockMode;
use crate::protocol::Cycles;
use crate::runtime::Runtimes;
use crate::slow_log::SlowLog;
use crate::telemetry::{ClassMetrics, ManagerMetrics, ShardMetrics};

/// See the module documentation.
pub(crate) struct ManagerContext {
    pub(crate) id: ManagerId,
    pub(crate) rules: Rules,
    pub(crate) cycles: Cycles,
    pub(crate) min_holds: MinHolds,
    pub(crate) limits: Limits,
    /// The time limit of a request.
    pub(crate) timeout: Duration,
    /// How long after its connection was given up a request may still be executed.
    pub(crate) late_max: Duration,
    /// The default TTL. Also how long a shutdown retries releases at an unreachable store.
    pub(crate) default_ttl: Duration,
    pub(crate) usage: Arc<Usage>,
    pub(crate) metrics: Arc<ManagerMetrics>,
    pub(crate) hot: HotKeys,
    pub(crate) slow_log: SlowLog,
    pub(crate) runtimes: Arc<Runtimes>,
    /// Work for the background thread.
    pub(crate) jobs: mpsc::UnboundedSender<Job>,
}

impl fmt::Debug for ManagerContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ManagerContext")
            .field("id", &self.id)
            .field("usage", &self.usage)
            .finish_non_exhaustive()
    }
}

impl ManagerContext {
    /// The metrics of requests without a class.
    pub(crate) fn default_class(&self, mode: LockMode) -> &ClassMetrics {
        self.metrics.classes.default_class(mode)
    }
}

/// The current load of a manager, and whether it accepts more.
#[derive(Debug)]
pub(crate) struct Usage {
    pub(super) waiters: AtomicUsize,
    /// The number of store requests that have gone without a reply for a while.
    pub(super) slow: AtomicUsize,
    /// The number of entries in the tables of all shards.
    pub(super) keys: AtomicUsize,
    /// The number of cycles that are over and not yet released.
    pub(super) pending_releases: AtomicUsize,
    /// The number of leases that were left to expire since the shutdown began.
    pub(super) left_to_expire: AtomicUsize,
    /// Whether it was logged that there are too many pending releases.
    pub(super) limit_reported: AtomicBool,
    /// The metrics of each shard.
    shards: Box<[Arc<ShardMetrics>]>,
    /// Whether the background thread was asked to evict lingering leases.
    pub(super) is_evicting: AtomicBool,
    pub(crate) closed: AtomicBool,
    /// Whether the background thread is waiting for the last key to be released.
    pub(super) ending: AtomicBool,
}

impl Usage {
    /// The number of leases that were not released yet, once no task holds or wants one.
    pub(crate) fn unreleased(&self) -> usize {
        self.keys.load(Ordering::Acquire) + self.pending_releases.load(Ordering::Acquire)
    }

    /// The number of leases that a shutdown did not release and will not release.
    pub(crate) fn left_to_expire(&self) -> usize {
        self.left_to_expire.load(Ordering::Acquire)
    }

    /// The release of a lease is given up.
    pub(super) fn leave_to_expire(&self) {
        if self.ending.load(Ordering::SeqCst) {
            self.left_to_expire.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// No load yet, for shards with these metrics.
    pub(crate) fn new(shards: Box<[Arc<ShardMetrics>]>) -> Self {
        Self {
            waiters: AtomicUsize::new(0),
            slow: AtomicUsize::new(0),
            keys: AtomicUsize::new(0),
            pending_releases: AtomicUsize::new(0),
            left_to_expire: AtomicUsize::new(0),
            limit_reported: AtomicBool::new(false),
            shards,
            is_evicting: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            ending: AtomicBool::new(false),
        }
    }

    /// Whether any task waits for a lock or for a slow request.
    pub(crate) fn waits(&self) -> bool {
        self.waiters.load(Ordering::Relaxed) > 0 || self.slow.load(Ordering::Relaxed) > 0
    }

    /// Whether no release is pending.
    pub(super) fn has_no_pending_releases(&self) -> bool {
        self.pending_releases.load(Ordering::Acquire) == 0
    }

    /// The number of keys with only a lingering lease, or one that has just stopped lingering.
    pub(super) fn evictable(&self) -> usize {
        self.shards.iter().map(|shard| shard.lingering()).sum()
    }
}
