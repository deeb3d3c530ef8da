//! What all handles of a manager share.

use std::fmt;
use std::sync::Arc;
#[cfg(feature = "admin")]
use std::time::Duration;

#[cfg(feature = "admin")]
use crate::clock::Moment;
use crate::config::Config;
use crate::driver::{Job, ManagerContext, Shard};
use crate::engine::{Linger, MinHold};
use crate::error::LockError;
use crate::key::LockKey;
use crate::router::ShardMap;

/// See the module documentation.
pub(crate) struct ManagerInner {
    pub(crate) config: Config,
    /// For requests that do not set their own.
    pub(crate) linger: Linger,
    pub(crate) min_hold: MinHold,
    /// What the shards share, too.
    pub(crate) context: Arc<ManagerContext>,
    pub(crate) shards: Vec<Arc<Shard>>,
    pub(crate) map: ShardMap,
    #[cfg(feature = "admin")]
    pub(crate) connected_at: Moment,
}

impl ManagerInner {
    /// Passes on to the recorder what was counted since the last call.
    #[cfg(feature = "admin")]
    pub(crate) fn flush_metrics(&self) {
        crate::driver::reporter::flush(&self.context.metrics, &self.shards);
    }

    /// Whether the manager was shut down.
    #[cfg(feature = "admin")]
    pub(crate) fn is_closed(&self) -> bool {
        self.context.usage.closed.load(std::sync::atomic::Ordering::Relaxed)
    }

    pub(crate) fn id(&self) -> &str {
        self.context.id.as_str()
    }

    /// How long the manager has been connected.
    #[cfg(feature = "admin")]
    pub(crate) fn uptime(&self) -> Duration {
        Moment::now().since(self.connected_at)
    }

    /// Erases the namespace. See [`namespace::erase`](crate::namespace::erase).
    pub(crate) async fn erase_namespace(&self) -> Result<u64, LockError> {
        let (mut count, mut failed) = (0, None);
        for shard in &self.shards {
            match shard.erase().await {
                Ok(erased) => count += erased,
                // Continue with the other shards.
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        failed.map_or(Ok(count), Err)
    }

    pub(crate) fn shard(&self, key: &LockKey) -> &Arc<Shard> {
        match &self.shards[..] {
            [only] => only,
            shards => &shards[self.map.index(key.slot())],
        }
    }
}

impl Drop for ManagerInner {
    fn drop(&mut self) {
        // If the background thread has already ended, there is nothing left to stop.
        self.context.jobs.send(Job::LastHandleDropped).ok();
    }
}

impl fmt::Debug for ManagerInner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockManager")
            .field("id", &self.context.id)
            .field("shards", &self.map)
            .finish_non_exhaustive()
    }
}
