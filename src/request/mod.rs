//! A request for a lock, from the call to the guard.

mod acquiring;

use std::future::IntoFuture;
use std::panic::Location;
use std::sync::Arc;
use std::time::Duration;

use self::acquiring::AcquireFuture;
pub use self::acquiring::{LockFuture, TryLockFuture};
use crate::body::while_held;
use crate::config::check_overrides;
use crate::engine::{InOutage, Linger, MinHold, WaiterOptions};
use crate::error::{InvalidSetting, LockError, LockErrorKind};
use crate::guard::LockGuard;
use crate::key::LockKey;
use crate::manager_inner::ManagerInner;
use crate::mode::{LockMode, PERMITS_MAX};

/// A request for a lock. Override settings of the manager as needed, then await it:
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), shardlock::LockError> {
/// # use std::time::Duration;
/// # let locks = shardlock::LockManager::connect("memory://doc-request").await?;
/// let guard = locks
///     .lock("coupon:123")
///     .ttl(Duration::from_secs(5))
///     .timeout(Duration::from_secs(2))
///     .class("coupons")
///     .await?;
/// # guard.release().await
/// # }
/// ```
///
/// # Errors
///
/// Awaiting the request returns
///
/// - [`LockErrorKind::Invalid`] if the key or a duration is outside its bounds,
/// - [`LockErrorKind::Timeout`] if the [`timeout`](Self::timeout) has passed,
/// - [`LockErrorKind::QueueFull`], [`LockErrorKind::TooManyWaiters`],
///   [`LockErrorKind::TooManyKeys`], [`LockErrorKind::TooManyLeases`] or
///   [`LockErrorKind::ShardDown`] if a limit was reached,
/// - [`LockErrorKind::Unavailable`] if the shard could not be reached for as long as the request
///   tolerates (see below),
/// - [`LockErrorKind::Refused`] if the server refuses,
/// - [`LockErrorKind::ShardMapMismatch`] if the shard now has another shard map,
/// - [`LockErrorKind::TokenRegression`] if the shard issued a token that is not larger than earlier
///   ones,
/// - [`LockErrorKind::Closed`] after the manager was shut down.
///
/// # Outages
///
/// A request with a [`timeout`](Self::timeout) survives an outage of its shard (a restart, a
/// failover, a network failure) that ends before the timeout: it is retried with growing random
/// delays. A request without a timeout fails once its commands to the shard have failed for
/// [`store_timeout`](crate::config::Config::store_timeout), no matter how long it has waited
/// before. A try, or a request with [`fail_fast`](Self::fail_fast), fails with the first command
/// that fails. The error is [`LockErrorKind::Unavailable`], and [`LockError::waited`] is the total
/// time that the request has waited. If the server refuses ([`LockErrorKind::Refused`]), the
/// request is not retried.
///
/// While a shard is down, at most 10,000 keys of a manager wait for it. A request for one more
/// fails immediately with [`LockErrorKind::ShardDown`], whatever its timeout. This bounds the
/// memory of a program that keeps asking for new keys.
///
/// # Cancel safety
///
/// This future is cancel safe. Dropping it at any point gives up the place in the queue. A lock
/// that was just being handed over goes to the next waiter, and anything the server may have stored
/// for the request is released in the background.
///
/// If the lock has been handed to a future that is not polled, all waiters behind it are blocked,
/// as with `tokio::sync::Mutex`.
#[must_use = "requests do nothing unless awaited"]
#[derive(Debug, Clone)]
pub struct LockRequest {
    manager: Arc<ManagerInner>,
    key: Result<LockKey, Box<InvalidSetting>>,
    /// Boxed to keep requests small: a request is moved several times, and most set nothing.
    overrides: Option<Box<Overrides>>,
    caller: &'static Location<'static>,
}

/// A request for a lock that returns `None` instead of waiting. See
/// [`LockManager::try_lock`](crate::LockManager::try_lock).
///
/// Errors and cancel safety are those of [`LockRequest`], except that there is no
/// [`Timeout`](crate::error::LockErrorKind::Timeout).
#[must_use = "requests do nothing unless awaited"]
#[derive(Debug, Clone)]
pub struct TryLockRequest(LockRequest);

/// The settings that a request overrides.
#[derive(Debug, Default, Clone)]
struct Overrides {
    ttl: Option<Duration>,
    /// `Some(None)` waits without a limit, whatever the manager's default.
    timeout: Option<Option<Duration>>,
    /// `Some(None)` sets no limit, whatever the manager's default.
    max_hold: Option<Option<Duration>>,
    min_hold: Option<Duration>,
    linger: Option<Duration>,
    fail_fast: bool,
    class: Option<Arc<str>>,
    mode: LockMode,
}

impl LockRequest {
    #[inline]
    #[track_caller]
    pub(crate) fn new(manager: Arc<ManagerInner>, key: Result<LockKey, InvalidSetting>) -> Self {
        Self {
            manager,
            key: key.map_err(Box::new),
            overrides: None,
            caller: Location::caller(),
        }
    }

    /// Whether log lines above debug level may contain the key.
    pub(crate) fn names_keys(&self) -> bool {
        self.manager.context.slow_log.names_keys()
    }

    fn overrides(&mut self) -> &mut Overrides {
        self.overrides.get_or_insert_default()
    }

    /// Requests the key in shared mode: any number of shared holders at a time, and no exclusive
    /// one beside them.
    ///
    /// Nobody can jump the queue: while an exclusive request waits, later shared ones wait behind
    /// it. Tasks of one manager share one lease, and join those that hold the key already without
    /// network traffic; those that come while other processes wait do not join, but wait for the
    /// next turn. Each guard has its own token and its own `max_hold`. The lease lasts for the
    /// longest TTL of its guards.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), shardlock::LockError> {
    /// # let locks = shardlock::LockManager::connect("memory://").await?;
    /// let one = locks.lock("prices").shared().await?;
    /// let other = locks.lock("prices").shared().await?;
    /// assert!(other.token() > one.token());
    /// // No writer while anybody reads.
    /// assert!(locks.try_lock("prices").await?.is_none());
    /// # Ok(()) }
    /// ```
    pub fn shared(mut self) -> Self {
        self.overrides().mode = LockMode::Shared;
        self
    }

    /// Sets how many permits the request takes, from 1 to the limit. Only for requests that were
    /// made by [`LockManager::permits`](crate::LockManager::permits); others ignore it.
    pub fn weight(mut self, weight: u16) -> Self {
        if let LockMode::Permits { weight: taken, .. } = &mut self.overrides().mode {
            *taken = weight;
        }
        self
    }

    pub(crate) fn in_mode(mut self, mode: LockMode) -> Self {
        self.overrides().mode = mode;
        self
    }

    /// Sets how long the lease lasts without renewal: 50 ms to 24 h. If the holder dies, the key
    /// stays locked for up to this long.
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.overrides().ttl = Some(ttl);
        self
    }

    /// Sets how long to wait for the lock: up to 365 days. Zero means a single try, and `None`
    /// waits without a limit even if the manager has a default
    /// ([`Config::timeout`](crate::config::Config::timeout)).
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), shardlock::LockError> {
    /// use std::time::Duration;
    ///
    /// let locks = shardlock::LockManager::builder()
    ///     .shard("memory://")
    ///     .timeout(Duration::from_millis(10))
    ///     .connect()
    ///     .await?;
    /// let guard = locks.lock("k").timeout(None).await?;
    /// assert!(locks.lock("k").await.unwrap_err().is_timeout());
    /// # guard.release().await }
    /// ```
    pub fn timeout(mut self, limit: impl Into<Option<Duration>>) -> Self {
        self.overrides().timeout = Some(limit.into());
        self
    }

    /// Sets how long the lease is renewed: 1 ms to 365 days. A guard that is held for longer is
    /// lost. `None` sets no limit even if the manager has a default
    /// ([`Config::max_hold`](crate::config::Config::max_hold)).
    pub fn max_hold(mut self, longest: impl Into<Option<Duration>>) -> Self {
        self.overrides().max_hold = Some(longest.into());
        self
    }

    /// Sets how long the key stays locked after the lock was acquired, even if it is released
    /// earlier: 0 to 24 h. Nobody gets the key before that, and the lease lasts that long even if
    /// this process dies. This overrides the manager's
    /// [`min_hold`](crate::config::Config::min_hold), which documents the details.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), shardlock::LockError> {
    /// # let locks = shardlock::LockManager::connect("memory://").await?;
    /// use std::time::Duration;
    ///
    /// // A timer starts this on several machines at about the same time.
    /// let minute = Duration::from_secs(60);
    /// if let Some(guard) = locks.try_lock("nightly").min_hold(minute).await? {
    ///     // This takes 50 ms.
    ///     guard.release().await?;
    /// }
    /// assert!(locks.try_lock("nightly").await?.is_none());
    /// # Ok(()) }
    /// ```
    pub fn min_hold(mut self, time: Duration) -> Self {
        self.overrides().min_hold = Some(time);
        self
    }

    /// Sets how long the lease stays with this process once its guard is gone and no task waits for
    /// the key: 0 to 1 h. This overrides the manager's [`linger`](crate::config::Config::linger),
    /// which documents the effects on other processes. If several guards were served under one
    /// lease, the setting of the last one applies.
    pub fn linger(mut self, time: Duration) -> Self {
        self.overrides().linger = Some(time);
        self
    }

    /// Fails the request as soon as the shard can't be reached. Otherwise the request is retried
    /// with growing random delays until its [`timeout`](Self::timeout) has passed or, without a
    /// timeout, until all its commands have failed for
    /// [`store_timeout`](crate::config::Config::store_timeout).
    pub fn fail_fast(mut self) -> Self {
        self.overrides().fail_fast = true;
        self
    }

    /// Sets the class under which metrics count this request. Use few distinct values, and never
    /// the key.
    pub fn class(mut self, class: &str) -> Self {
        self.overrides().class = Some(class.into());
        self
    }

    /// Runs `body` while holding the lock, then releases the lock. If the lock is lost, the body is
    /// cancelled, that is, dropped.
    ///
    /// The value returned by the body is passed through unchanged, including an error of its own.
    ///
    /// # Errors
    ///
    /// - The errors of the request. The body has not run.
    /// - [`LockErrorKind::Lost`] if the lock was lost before it was released.
    /// - [`LockErrorKind::Refused`] if the server refused the release. The body has run.
    ///
    /// A release without a reply is not an error: it is retried in the background.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future drops the body at its current await point and then releases the lock.
    ///
    /// # Examples
    ///
    /// The future is `Send` if that of the body is, so it can be spawned. The body may borrow from
    /// the task:
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// use shardlock::LockManager;
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let locks = LockManager::connect("memory://").await?;
    /// let rows = vec!["one", "two"];
    /// let import = tokio::spawn(async move {
    ///     let request = locks.lock("import").timeout(Duration::from_secs(2));
    ///     let body = async |_guard: &_| {
    ///         for row in &rows {
    ///             println!("{row}");
    ///             tokio::task::yield_now().await;
    ///         }
    ///         rows.len()
    ///     };
    ///     request.with(body).await
    /// });
    /// assert_eq!(import.await??, 2);
    /// # Ok(()) }
    /// ```
    pub async fn with<T>(self, body: impl AsyncFnOnce(&LockGuard) -> T) -> Result<T, LockError> {
        let guard = self.await?;
        let Some(result) = while_held(guard.lost(), || guard.is_valid(), body(&guard)).await else {
            return Err(guard.lost_error(guard.lost().await));
        };
        match guard.release().await {
            // A release without a reply is retried in the background. The body did run under the
            // lock.
            Err(error) if error.kind() != LockErrorKind::Unavailable => Err(error),
            _ => Ok(result),
        }
    }

    /// The same request for another key.
    pub(crate) fn for_key(&self, key: LockKey) -> Self {
        Self {
            key: Ok(key),
            ..self.clone()
        }
    }

    fn mode(&self) -> LockMode {
        self.overrides
            .as_ref()
            .map_or(LockMode::Exclusive, |overrides| overrides.mode)
    }

    /// The longest time to wait.
    pub(crate) fn limit(&self) -> Option<Duration> {
        let own = self.overrides.as_ref().and_then(|overrides| overrides.timeout);
        own.unwrap_or(self.manager.config.timeout)
    }

    /// The effective options: those of the request over those of the manager.
    fn waiter_options(&self, try_only: bool) -> Result<WaiterOptions, InvalidSetting> {
        let config = &self.manager.config;
        let mut options = WaiterOptions {
            mode: LockMode::Exclusive,
            ttl: config.ttl,
            max_hold: config.max_hold,
            linger: self.manager.linger,
            min_hold: self.manager.min_hold,
            try_only,
            in_outage: match self.limit() {
                _ if try_only => InOutage::Fail,
                Some(_) => InOutage::UntilOwnLimit,
                None => InOutage::UntilStoreTimeout,
            },
            contended_hint: false,
            class: 0,
        };
        if let Some(overrides) = &self.overrides {
            let (timeout, max_hold) = (overrides.timeout.flatten(), overrides.max_hold.flatten());
            check_overrides(overrides.ttl, timeout, max_hold, overrides.min_hold, overrides.linger)?;
            options.ttl = overrides.ttl.unwrap_or(options.ttl);
            options.max_hold = overrides.max_hold.unwrap_or(options.max_hold);
            options.linger = overrides.linger.map_or(options.linger, Linger::new);
            options.mode = overrides.mode;
            check_mode(options.mode)?;
            options.min_hold = overrides.min_hold.map_or(options.min_hold, MinHold::new);
            if !options.mode.is_exclusive() {
                check_no_min_hold(overrides.min_hold)?;
                options.min_hold = MinHold::NONE;
            }
            if overrides.fail_fast {
                options.in_outage = InOutage::Fail;
            }
        }
        Ok(options)
    }
}

/// A minimum hold is only defined for exclusive locks. That of the manager does not apply to
/// others.
fn check_no_min_hold(min_hold: Option<Duration>) -> Result<(), InvalidSetting> {
    match min_hold.filter(|time| !time.is_zero()) {
        Some(time) => Err(InvalidSetting::new(
            "min_hold",
            format!("{time:?}"),
            "0s for a shared lock and for permits: only exclusive locks have a minimum hold",
        )),
        None => Ok(()),
    }
}

/// Checks the numbers of a request for permits.
fn check_mode(mode: LockMode) -> Result<(), InvalidSetting> {
    let LockMode::Permits { weight, limit } = mode else {
        return Ok(());
    };
    if !(1..=PERMITS_MAX).contains(&limit) {
        let expected = format!("a number of permits from 1 to {PERMITS_MAX}");
        return Err(InvalidSetting::new("limit", limit.to_string(), &expected));
    }
    if !(1..=limit).contains(&weight) {
        let expected = format!("a number of permits from 1 to the limit of {limit}");
        return Err(InvalidSetting::new("weight", weight.to_string(), &expected));
    }
    Ok(())
}

impl IntoFuture for LockRequest {
    type Output = Result<LockGuard, LockError>;
    type IntoFuture = LockFuture;

    #[inline]
    fn into_future(self) -> LockFuture {
        LockFuture(AcquireFuture::new(self, false))
    }
}

impl TryLockRequest {
    pub(crate) const fn new(request: LockRequest) -> Self {
        Self(request)
    }

    /// The key, for an error about it; empty if it is invalid.
    #[cfg(feature = "tower")]
    pub(crate) fn key_name(&self) -> String {
        self.0.key.as_ref().map(ToString::to_string).unwrap_or_default()
    }

    /// Requests the key in shared mode. See [`LockRequest::shared`].
    pub fn shared(mut self) -> Self {
        self.0 = self.0.shared();
        self
    }

    /// Sets how many permits the request takes. See [`LockRequest::weight`].
    pub fn weight(mut self, weight: u16) -> Self {
        self.0 = self.0.weight(weight);
        self
    }

    /// See [`LockRequest::ttl`].
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.0.overrides().ttl = Some(ttl);
        self
    }

    /// See [`LockRequest::max_hold`].
    pub fn max_hold(mut self, longest: impl Into<Option<Duration>>) -> Self {
        self.0.overrides().max_hold = Some(longest.into());
        self
    }

    /// See [`LockRequest::min_hold`].
    pub fn min_hold(mut self, time: Duration) -> Self {
        self.0.overrides().min_hold = Some(time);
        self
    }

    /// See [`LockRequest::linger`].
    pub fn linger(mut self, time: Duration) -> Self {
        self.0.overrides().linger = Some(time);
        self
    }

    /// See [`LockRequest::class`].
    pub fn class(mut self, class: &str) -> Self {
        self.0.overrides().class = Some(class.into());
        self
    }
}

impl IntoFuture for TryLockRequest {
    type Output = Result<Option<LockGuard>, LockError>;
    type IntoFuture = TryLockFuture;

    fn into_future(self) -> TryLockFuture {
        TryLockFuture(AcquireFuture::new(self.0, true))
    }
}

#[cfg(test)]
mod tests {
    use std::future::IntoFuture;
    use std::time::Duration;

    use crate::{LockManager, LossReason};

    #[tokio::test(start_paused = true)]
    async fn request_can_wait_without_a_limit_although_the_manager_has_a_default() {
        let limit = Duration::from_secs(1);
        let builder = LockManager::builder().shard("memory://").timeout(limit);
        let locks = builder.connect().await.unwrap();
        let guard = locks.lock("k").await.unwrap();

        assert!(locks.lock("k").await.unwrap_err().is_timeout());
        let mut waiting = locks.lock("k").timeout(None).into_future();
        let early = tokio::time::timeout(limit * 1000, &mut waiting).await;
        assert!(early.is_err(), "{early:?}");

        guard.release().await.unwrap();
        waiting.await.unwrap().release().await.unwrap();
    }

    #[tokio::test]
    async fn request_can_be_held_without_a_limit_although_the_manager_has_a_default() {
        let limit = Duration::from_millis(50);
        let builder = LockManager::builder().shard("memory://").max_hold(limit);
        let locks = builder.connect().await.unwrap();
        let unlimited = locks.lock("unlimited").max_hold(None).await.unwrap();
        let tried = locks.try_lock("tried").max_hold(None).await.unwrap().unwrap();

        let limited = locks.lock("limited").await.unwrap();
        assert_eq!(limited.lost().await, LossReason::MaxHold);
        assert!(unlimited.is_valid() && tried.is_valid());
        unlimited.release().await.unwrap();
        tried.release().await.unwrap();
    }
}
