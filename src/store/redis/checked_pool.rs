//! A small pool of connections to one server, for requests that are not on the path of a lock:
//! inspecting a key, erasing a namespace, and the second opinion of a health probe.
//!
//! # Implementation details
//!
//! The pool checks a connection before it lends it, which costs a round trip for each request.
//! Locks therefore use connections that are opened once and kept. Other requests are rare, may be
//! slow, and should neither wait behind the requests of locks nor fail because a kept connection is
//! dead. For them the check is worth its price.
//!
//! Everything of a pool runs on the manager's background thread, which is driven for as long as the
//! manager lives: waiting for a connection, opening and checking it, and its driver. The borrower
//! may be on any other runtime, even on one that ends while the connection is idle in the pool.
//!
//! A device on the path that forgets connections forgets all of them at once. So after one check
//! without an answer, no other connection that has been idle since is checked: a new one is opened.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use deadpool::Runtime;
use deadpool::managed::{
    self, Metrics, Object, Pool, PoolConfig, PoolError, QueueMode, RecycleError, RecycleResult, TimeoutType, Timeouts,
};
use deadpool_redis::redis::aio::MultiplexedConnection;
use deadpool_redis::redis::{Cmd, RedisResult, Value};

use super::connection::Driver;
use crate::clock::Moment;
use crate::runtime::Runtimes;
use crate::store::StoreError;

/// How many connections a pool opens to its server at most.
pub(super) const POOL_MAX: usize = 4;
/// How long a connection may be idle before [`CheckedPool::close_idle`] closes it.
pub(super) const IDLE_MAX: Duration = Duration::from_secs(10);

/// Opens and checks the connections of a pool.
pub(super) trait Opener: Send + Sync + 'static {
    /// Opens a connection, and spawns its driver on the current runtime.
    fn open(&self) -> impl Future<Output = Result<PooledConnection, StoreError>> + Send;

    /// Whether a connection of this origin may still be used, as far as is known without asking.
    fn is_current(&self, origin: &ConnectionOrigin) -> bool;

    /// The command that checks an idle connection.
    fn check(&self) -> Cmd;

    /// Whether the reply to that command shows that the connection is usable.
    fn is_usable(&self, reply: RedisResult<Value>) -> bool;
}

/// Where a connection leads to, and what was known of the primary when it was opened.
#[derive(Debug, Clone)]
pub(super) struct ConnectionOrigin {
    /// `host:port`
    pub(super) place: Arc<str>,
    pub(super) switches: u64,
    pub(super) era: u64,
}

/// A connection of a pool. Closed when it is dropped.
pub(super) struct PooledConnection {
    pub(super) connection: MultiplexedConnection,
    pub(super) origin: ConnectionOrigin,
    /// Different from the generation of every kept connection.
    pub(super) number: u64,
    /// When it was last lent, at the latest.
    proven_at: Moment,
    _driver: Driver,
}

impl PooledConnection {
    pub(super) fn new(connection: MultiplexedConnection, driver: Driver, origin: ConnectionOrigin) -> Self {
        static NUMBERS: AtomicU64 = AtomicU64::new(1 << 63);
        Self {
            connection,
            origin,
            number: NUMBERS.fetch_add(1, Ordering::Relaxed),
            proven_at: Moment::now(),
            _driver: driver,
        }
    }
}

/// A connection that returns to its pool when it is dropped.
pub(super) type Lent<O> = Object<Checking<O>>;

/// The pool's view of an [`Opener`].
pub(super) struct Checking<O> {
    opener: O,
    /// How long a check may take.
    patience: Duration,
    /// When a check last had no answer. Connections that have been idle since are not reused.
    silent_at: AtomicU64,
}

impl<O: Opener> managed::Manager for Checking<O> {
    type Type = PooledConnection;
    type Error = StoreError;

    async fn create(&self) -> Result<PooledConnection, StoreError> {
        // Boxed, because the pool's futures contain this one several times. In debug builds they
        // needed 1.5 MB of a thread's stack.
        Box::pin(self.opener.open()).await
    }

    async fn recycle(&self, pooled: &mut PooledConnection, _: &Metrics) -> RecycleResult<StoreError> {
        if !self.opener.is_current(&pooled.origin) {
            return Err(RecycleError::message("the primary has changed"));
        }
        if pooled.proven_at.as_nanos() <= self.silent_at.load(Ordering::Acquire) {
            return Err(RecycleError::message("another connection has fallen silent"));
        }
        let command = self.opener.check();
        let checking = pooled.connection.send_packed_command(&command);
        let Ok(reply) = tokio::time::timeout(self.patience, checking).await else {
            self.silent_at.fetch_max(Moment::now().as_nanos(), Ordering::AcqRel);
            return Err(RecycleError::message("the check had no answer"));
        };
        if !self.opener.is_usable(reply.and_then(Value::extract_error)) {
            return Err(RecycleError::message("the check failed"));
        }
        pooled.proven_at = Moment::now();
        Ok(())
    }
}

/// See the module documentation.
pub(super) struct CheckedPool<O: Opener> {
    pool: Pool<Checking<O>>,
    runtimes: Arc<Runtimes>,
    timeouts: Timeouts,
}

impl<O: Opener> CheckedPool<O> {
    /// Creates an empty pool. `timeout` is the time limit of a request, for which a borrower waits
    /// a third; opening a connection may take all of it, and checking one an eighth.
    pub(super) fn new(opener: O, runtimes: &Arc<Runtimes>, timeout: Duration) -> Self {
        let timeouts = Timeouts {
            wait: Some(timeout / 3),
            create: Some(timeout),
            // The check has a limit of its own, to learn that it had no answer.
            recycle: None,
        };
        let config = PoolConfig {
            max_size: POOL_MAX,
            timeouts,
            // So that connections that are not needed become idle.
            queue_mode: QueueMode::Lifo,
        };
        let checking = Checking {
            opener,
            patience: timeout / 8,
            silent_at: AtomicU64::new(0),
        };
        let built = Pool::builder(checking).config(config).runtime(Runtime::Tokio1).build();
        let pool = built.unwrap_or_else(|error| unreachable!("its runtime is set: {error}"));
        Self {
            pool,
            runtimes: Arc::clone(runtimes),
            timeouts,
        }
    }

    /// Lends a connection that has just answered.
    ///
    /// # Errors
    ///
    /// All connections are in use, or no connection could be opened.
    ///
    /// # Cancel safety
    ///
    /// If this future is dropped, nothing is lent.
    pub(super) async fn get(&self) -> Result<Lent<O>, StoreError> {
        let pool = self.pool.clone();
        let lent = self.runtimes.run_in_background(async move { pool.get().await }).await;
        match lent {
            Some(lent) => lent.map_err(|error| self.to_store_error(error)),
            None => Err(StoreError::Unavailable(
                "the manager's background thread has ended".into(),
            )),
        }
    }

    fn to_store_error(&self, error: PoolError<StoreError>) -> StoreError {
        let limit = |limit: Option<Duration>| limit.unwrap_or_default();
        let reason = match error {
            PoolError::Backend(error) => return error,
            PoolError::Timeout(TimeoutType::Wait) => format!(
                "all {POOL_MAX} connections for inspecting were in use for {:?}; inspect fewer keys at a time",
                limit(self.timeouts.wait)
            ),
            PoolError::Timeout(_) => format!("no connection within {:?}", limit(self.timeouts.create)),
            other => other.to_string(),
        };
        StoreError::Unavailable(reason.into())
    }

    /// Closes connections that have been idle for [`IDLE_MAX`], or must not be used any more.
    /// Returns whether the pool is empty and unused now.
    pub(super) fn close_idle(&self) -> bool {
        let opener = &self.pool.manager().opener;
        let closed = self
            .pool
            .retain(|pooled, metrics| opener.is_current(&pooled.origin) && metrics.last_used() < IDLE_MAX);
        drop(closed);
        let status = self.pool.status();
        status.size == 0 && status.waiting == 0
    }
}

/// Closes a connection instead of returning it.
pub(super) fn discard<O: Opener>(lent: Lent<O>) {
    drop(Object::take(lent));
}
