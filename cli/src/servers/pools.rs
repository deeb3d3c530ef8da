//! Pools of connections to servers that are queried directly.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use deadpool_redis::redis::{AsyncConnectionConfig, IntoConnectionInfo};
use deadpool_redis::{Manager, Pool, PoolConfig, QueueMode, Runtime, Timeouts};
use parking_lot::Mutex;

/// The pools of all servers that were queried, by URL. Clones share the pools.
#[derive(Clone, Default)]
pub(crate) struct ServerPools(Arc<Mutex<BTreeMap<String, Pool>>>);

// The URLs may contain passwords.
impl fmt::Debug for ServerPools {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerPools")
            .field("servers", &self.0.lock().len())
            .finish()
    }
}

impl ServerPools {
    /// The pool of the server with this URL, which is created if there is none yet.
    pub(super) fn get_or_create<E>(&self, url: &str, create: impl FnOnce() -> Result<Pool, E>) -> Result<Pool, E> {
        let mut pools = self.0.lock();
        if let Some(pool) = pools.get(url) {
            return Ok(pool.clone());
        }
        let pool = create()?;
        pools.insert(url.to_owned(), pool.clone());
        Ok(pool)
    }
}

/// A pool of at most `size` connections. `limit` is the time limit for connecting, for a reply, and
/// for waiting until a connection is returned to the pool. Sends nothing yet.
///
/// Before a connection is lent again, the pool sends a `PING`. If there is no answer, it opens
/// another one.
pub(crate) fn pool(server: impl IntoConnectionInfo, size: usize, limit: Duration) -> anyhow::Result<Pool> {
    let connections = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(limit))
        .set_response_timeout(Some(limit));
    let manager = Manager::new_with_config(server, connections)?;
    let config = PoolConfig {
        max_size: size,
        timeouts: Timeouts {
            wait: Some(limit),
            // The time limit for connecting explains more.
            create: None,
            recycle: Some(limit / 4),
        },
        queue_mode: QueueMode::Lifo,
    };
    let builder = Pool::builder(manager).config(config).runtime(Runtime::Tokio1);
    builder.build().context("failed to create a pool")
}
