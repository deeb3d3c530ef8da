//! The lock manager, the entry point of the library.

use std::fmt;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;

use crate::clock::Moment;
use crate::config::Builder;
use crate::driver::Job;
use crate::error::{InvalidSetting, LockError, ShutdownError};
use crate::guard::LockGuard;
use crate::key::LockKey;
use crate::lead::Election;
use crate::lock_all::{LockAllRequest, TryLockAllRequest};
use crate::manager_inner::ManagerInner;
use crate::mode::LockMode;
use crate::request::{LockRequest, TryLockRequest};
use crate::router::ShardMap;
use crate::snapshot::{self, HeldLock, HotKey, ShardState};
use crate::store::KeyState;
use crate::time_limit::within;

/// A lock manager whose keys are spread over one or more shards. Cheap to clone: create one per
/// process and share it.
///
/// Locks are fair: the tasks of one process acquire a key in the order in which they asked for it.
/// Processes also take turns in the order in which they asked. While others wait, a turn serves the
/// tasks that waited when it began, for at most `max_slice`. So a task in a process with many
/// others gets the same share of a key as one that is alone in its process. See [`LockRequest`] for
/// what awaiting a lock does, and [`LockGuard`] for what holding one means.
///
/// When *not* to use it: within a single process, `tokio::sync::Mutex` is faster and can't be lost.
/// If the data lives in one SQL database, a row lock or an advisory lock there is simpler and
/// safer.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let locks = shardlock::LockManager::connect("memory://doc-manager").await?;
/// let guard = locks.lock("coupon:123").await?;
/// println!("token {}", guard.token());
/// guard.release().await?;
/// locks.shutdown().await?;
/// # Ok(()) }
/// ```
///
/// # At the end of the program
///
/// Await [`shutdown`](Self::shutdown) as the last thing a program does with its manager. Dropping
/// the last handle does not wait: if the process ends right afterwards, locks that were just
/// dropped and leases that linger may stay held until their TTL expires.
#[derive(Clone)]
pub struct LockManager {
    pub(crate) inner: Arc<ManagerInner>,
}

impl LockManager {
    /// Connects to one shard with the default configuration. Use [`builder`](Self::builder) for
    /// more shards or other settings.
    ///
    /// `redis://[[user]:password@]host[:port][/db]` is a Redis or Valkey primary and `rediss://` is
    /// the same over TLS. `memory://[name]` lives inside this process; without a name it is private
    /// to this manager. [`Endpoint`](crate::config::Endpoint) lists all kinds of
    /// URLs.
    ///
    /// In tests with tokio's paused clock (`#[tokio::test(start_paused = true)]`) use `memory://`.
    /// Leases and the time limits of store requests run on the machine's clock even then; only the
    /// `timeout` of a request follows the paused clock.
    ///
    /// Call this from the runtime whose tasks will take locks: the connections are driven on that
    /// runtime, and hand-offs from other processes arrive there, which saves a switch to another
    /// thread. If that runtime shuts down, or runs nothing while tasks of another runtime wait, a
    /// thread of the manager does both from then on. It takes over after a third of a second if the
    /// runtime has no worker threads and no thread is inside its `block_on`, and after one second
    /// if all its worker threads are blocked.
    ///
    /// # Errors
    ///
    /// - [`LockErrorKind::Invalid`] if the URL is invalid.
    /// - [`LockErrorKind::Unavailable`] if the shard can't be reached within `store_timeout`.
    /// - [`LockErrorKind::Refused`] if the server refuses.
    /// - [`LockErrorKind::ShardMapMismatch`] if the shard is in use with another shard map.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, the connections that it opened are closed. A shard may have stored
    /// the shard map already; nothing else is left behind.
    ///
    /// [`LockErrorKind::Invalid`]: crate::error::LockErrorKind::Invalid
    /// [`LockErrorKind::Unavailable`]: crate::error::LockErrorKind::Unavailable
    /// [`LockErrorKind::Refused`]: crate::error::LockErrorKind::Refused
    /// [`LockErrorKind::ShardMapMismatch`]: crate::error::LockErrorKind::ShardMapMismatch
    pub async fn connect(url: &str) -> Result<Self, LockError> {
        Self::builder().shard(url).connect().await
    }

    /// Returns a builder that starts from the default settings.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// Requests a lock and waits for it. A TTL, a time limit and more can be set on the returned
    /// [`LockRequest`] before it is awaited. The key is a `&str`, a `String` or a [`LockKey`]; an
    /// invalid one fails when the request is awaited.
    #[inline]
    #[track_caller]
    pub fn lock(&self, key: impl TryInto<LockKey, Error: Into<InvalidSetting>>) -> LockRequest {
        LockRequest::new(Arc::clone(&self.inner), key.try_into().map_err(Into::into))
    }

    /// Tries to acquire a lock without waiting: the result is `None` if the lock is held or has
    /// waiters.
    ///
    /// A try never joins a queue and never overtakes a waiter. A lease that another process keeps
    /// without a guard ([`Config::linger`](crate::config::Config::linger)) counts as held, and a
    /// try does not make that process release it.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), shardlock::LockError> {
    /// # let locks = shardlock::LockManager::connect("memory://").await?;
    /// match locks.try_lock("nightly-report").await? {
    ///     Some(guard) => {
    ///         // Write the report.
    ///         guard.release().await?;
    ///     }
    ///     None => println!("another process is writing the report"),
    /// }
    /// # Ok(()) }
    /// ```
    #[track_caller]
    pub fn try_lock(&self, key: impl TryInto<LockKey, Error: Into<InvalidSetting>>) -> TryLockRequest {
        TryLockRequest::new(self.lock(key))
    }

    /// Requests permits of a key, of which at most `limit` are in use at a time: one, or as many as
    /// [`weight`](LockRequest::weight) says. Use this to bound how many workers call a partner's
    /// API at once, over all processes.
    ///
    /// The limit is part of each request, from 1 to 1,000, so it can be changed by deploying
    /// another number. While holders with different limits exist, the smallest one counts.
    /// Permits, shared and exclusive locks of one key exclude each other as far as they must: an
    /// exclusive lock excludes everybody, shared locks and permits do not exclude each other.
    ///
    /// A request waits in the order of all requests for the key, so one for many permits is not
    /// passed by those for few. A permit passes between tasks of a process that ask for the same
    /// number without network traffic. The permits of a holder that dies become free after
    /// its TTL.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), shardlock::LockError> {
    /// # let locks = shardlock::LockManager::connect("memory://").await?;
    /// let one = locks.permits("partner-api", 3).await?;
    /// let two = locks.permits("partner-api", 3).weight(2).await?;
    /// assert!(locks.try_permits("partner-api", 3).await?.is_none());
    /// two.release().await?;
    /// assert!(locks.try_permits("partner-api", 3).await?.is_some());
    /// # one.release().await
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// Those of a [`LockRequest`], and
    /// [`LockErrorKind::Unsupported`](crate::error::LockErrorKind::Unsupported) on `redlock://`
    /// shards: a quorum can't bound the number of holders.
    #[track_caller]
    pub fn permits(&self, key: impl TryInto<LockKey, Error: Into<InvalidSetting>>, limit: u16) -> LockRequest {
        self.lock(key).in_mode(LockMode::Permits { weight: 1, limit })
    }

    /// Tries to acquire permits without waiting. See [`permits`](Self::permits) and
    /// [`try_lock`](Self::try_lock).
    #[track_caller]
    pub fn try_permits(&self, key: impl TryInto<LockKey, Error: Into<InvalidSetting>>, limit: u16) -> TryLockRequest {
        TryLockRequest::new(self.permits(key, limit))
    }

    /// Runs `body` while holding the lock. See [`LockRequest::with`].
    ///
    /// # Errors
    ///
    /// See [`LockRequest::with`].
    ///
    /// # Examples
    ///
    /// The result of the body is passed through, so a body that fails yields a result in a result:
    ///
    /// ```
    /// use shardlock::{LockGuard, LockManager};
    ///
    /// async fn import(guard: &LockGuard) -> Result<u64, std::io::Error> {
    ///     // Send the token along with each write.
    ///     let _token = guard.token();
    ///     Ok(3)
    /// }
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let locks = LockManager::connect("memory://").await?;
    /// let rows = locks.with_lock("import", import).await??;
    /// assert_eq!(rows, 3);
    /// # Ok(()) }
    /// ```
    #[track_caller]
    pub fn with_lock<T>(
        &self,
        key: impl TryInto<LockKey, Error: Into<InvalidSetting>>,
        body: impl AsyncFnOnce(&LockGuard) -> T,
    ) -> impl Future<Output = Result<T, LockError>> {
        // Not an `async fn`, in which `#[track_caller]` has no effect.
        self.lock(key).with(body)
    }

    /// Requests locks on several keys, which are held together or not at all. A time limit and more
    /// can be set on the returned [`LockAllRequest`] before it is awaited; its documentation
    /// explains the order, the cost, and what happens if one of the keys can't be acquired.
    ///
    /// At least 1 and at most [`LockAllRequest::KEYS_MAX`] different keys; a key that is given
    /// twice counts once. Invalid keys fail when the request is awaited.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), shardlock::LockError> {
    /// # let locks = shardlock::LockManager::connect("memory://").await?;
    /// let guard = locks.lock_all(["seat:12", "seat:13"]).await?;
    /// assert!(locks.try_lock("seat:13").await?.is_none());
    /// println!("tokens {:?} and {:?}", guard.token("seat:12"), guard.token("seat:13"));
    /// guard.release().await?;
    /// # Ok(()) }
    /// ```
    #[track_caller]
    pub fn lock_all<K>(&self, keys: impl IntoIterator<Item = K>) -> LockAllRequest
    where
        K: TryInto<LockKey, Error: Into<InvalidSetting>>,
    {
        LockAllRequest::new(Arc::clone(&self.inner), keys)
    }

    /// Tries to acquire locks on several keys without waiting: the result is `None` if one of them
    /// is held or has waiters. See [`try_lock`](Self::try_lock).
    ///
    /// The keys are tried one after the other, in the order of [`lock_all`](Self::lock_all). If one
    /// is not free, those acquired before are released in the background, and other tries that came
    /// in between have failed.
    #[track_caller]
    pub fn try_lock_all<K>(&self, keys: impl IntoIterator<Item = K>) -> TryLockAllRequest
    where
        K: TryInto<LockKey, Error: Into<InvalidSetting>>,
    {
        TryLockAllRequest::new(self.lock_all(keys))
    }

    /// Waits until this process is the leader for a key, and runs `body` as the leader: at most one
    /// process at a time. If leadership is lost, the body is cancelled, and this process campaigns
    /// again. See [`Election::lead`].
    ///
    /// # Errors
    ///
    /// See [`Election::lead`].
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), shardlock::LockError> {
    /// # let locks = shardlock::LockManager::connect("memory://").await?;
    /// let body = async |term: &shardlock::LockGuard| {
    ///     println!("leading with token {}", term.token());
    ///     // A leader usually works until the process ends. This one returns.
    ///     "done"
    /// };
    /// assert_eq!(locks.lead("scheduler", body).await?, "done");
    /// # Ok(()) }
    /// ```
    #[track_caller]
    pub fn lead<T>(
        &self,
        key: impl TryInto<LockKey, Error: Into<InvalidSetting>>,
        body: impl AsyncFnMut(&LockGuard) -> T,
    ) -> impl Future<Output = Result<T, LockError>> {
        // Not an `async fn`, in which `#[track_caller]` has no effect.
        self.election(key).lead(body)
    }

    /// Returns an [`Election`], to set a TTL or a class before [`lead`](Election::lead) is called.
    /// To see who leads, [`inspect`](Self::inspect) the key.
    #[track_caller]
    pub fn election(&self, key: impl TryInto<LockKey, Error: Into<InvalidSetting>>) -> Election {
        Election::new(Arc::clone(&self.inner), key.try_into().map_err(Into::into))
    }

    /// Returns who holds a key and who waits for it. The lock itself is not changed.
    ///
    /// On Redis this uses a connection of its own, which is checked first and kept for ten seconds.
    /// There are at most four to a server, so the requests of locks are not delayed however many
    /// keys are inspected at a time.
    ///
    /// # Errors
    ///
    /// [`LockErrorKind::Invalid`] for a key outside its bounds, [`LockErrorKind::Unavailable`] or
    /// [`LockErrorKind::Refused`] if the shard does not answer.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future has no effect on any lock.
    ///
    /// [`LockErrorKind::Invalid`]: crate::error::LockErrorKind::Invalid
    /// [`LockErrorKind::Unavailable`]: crate::error::LockErrorKind::Unavailable
    /// [`LockErrorKind::Refused`]: crate::error::LockErrorKind::Refused
    pub async fn inspect(
        &self,
        key: impl TryInto<LockKey, Error: Into<InvalidSetting>>,
    ) -> Result<KeyState, LockError> {
        let key: LockKey = key.try_into().map_err(Into::into)?;
        self.inner.shard(&key).inspect(&key).await
    }

    /// Returns the keys with the most contention in this process, hottest first and at most as many
    /// as the setting `hot_keys`. Locks acquired without contention are not counted.
    ///
    /// This visits every key in use, so call it once a second rather than for every lock.
    #[must_use]
    pub fn hot_keys(&self) -> Vec<HotKey> {
        snapshot::hot_keys(&self.inner)
    }

    /// Returns all outstanding guards of this manager, oldest first. Leases that linger have no
    /// guard and are not included. This visits every key in use.
    #[must_use]
    pub fn held(&self) -> Vec<HeldLock> {
        snapshot::held(&self.inner, usize::MAX).1
    }

    /// Returns the state of each shard, in the order of the configuration.
    #[must_use]
    pub fn shard_states(&self) -> Vec<ShardState> {
        snapshot::shards(&self.inner)
    }

    /// Returns the map of which shard owns which keys.
    #[must_use]
    pub fn shard_map(&self) -> &ShardMap {
        &self.inner.map
    }

    /// Returns the name under which this manager holds leases: `host-pid-random`.
    #[must_use]
    pub fn id(&self) -> &str {
        self.inner.id()
    }

    /// Shuts the manager down and releases everything. Outstanding guards are lost, lingering
    /// leases are released immediately, and waiters and all later requests fail with
    /// [`LockErrorKind::Closed`]. All handles of this manager are shut down together.
    ///
    /// Returns once the servers have confirmed all releases, including those of guards dropped
    /// earlier, or after twice the `store_timeout`. A release that a server refuses is not retried,
    /// and one that gets no answer is retried for the default TTL.
    ///
    /// # Errors
    ///
    /// [`ShutdownError`] with the number of leases whose release was not confirmed. They expire on
    /// their own, and the manager is shut down nevertheless.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, the shutdown continues in the background.
    ///
    /// [`LockErrorKind::Closed`]: crate::error::LockErrorKind::Closed
    pub async fn shutdown(&self) -> Result<(), ShutdownError> {
        let unreleased = |leases| match leases {
            0 => Ok(()),
            leases => Err(ShutdownError::new(leases)),
        };
        let usage = &self.inner.context.usage;
        let (done, closed) = oneshot::channel();
        if self.inner.context.jobs.send(Job::Close { done }).is_ok() {
            let limit = self
                .inner
                .config
                .store_timeout
                .saturating_mul(2)
                .max(Duration::from_millis(100));
            match within(Moment::now(), limit, pin!(closed)).await {
                Ok(Ok(())) => return unreleased(usage.left_to_expire()),
                // The background thread ended after a panic, which was logged.
                Ok(Err(_)) => {}
                Err(_) => crate::log::warn!(
                    ?limit,
                    "not all leases were released in time; the rest expire on their own"
                ),
            }
        }
        unreleased(usage.unreleased() + usage.left_to_expire())
    }
}

impl fmt::Debug for LockManager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}
