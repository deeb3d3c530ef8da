//! The guard that a task holds while it has a lock.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::clock::Moment;
use crate::driver::Entry;
use crate::engine::{Granted, Request};
use crate::error::{Failure, LockError, LossReason};
use crate::fence::FencingToken;
use crate::lease::Lease;
use crate::mode::LockMode;
use crate::span::DebugSpan;
use crate::store::Priority;
use crate::telemetry::ClassMetrics;

/// A held lock. Dropping the guard releases the lock in the background. [`release`](Self::release)
/// releases it and reports whether it was still held.
///
/// The lease behind the guard is renewed for as long as the guard lives, or until `max_hold`. It
/// can still be lost: if the process is paused for longer than the lease lasts, if the server is
/// gone, or if an administrator deletes the key. [`lost`](Self::lost) reports the loss before any
/// other task or process can acquire the lock. After a pause even that can be too late; the
/// resource can then use the [`token`](Self::token) to reject the old holder.
///
/// A guard can be moved to another task or thread and released there.
///
/// # Examples
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), shardlock::LockError> {
/// # let locks = shardlock::LockManager::connect("memory://").await?;
/// let guard = locks.lock("coupon:123").await?;
/// for step in ["read", "decide", "write"] {
///     if !guard.is_valid() {
///         break; // the lock was lost, so another holder may be at work
///     }
///     println!("{step} with token {} ({:?} left)", guard.token(), guard.remaining());
/// }
/// // `Err` if the lock was lost at any point.
/// guard.release().await?;
/// # Ok(()) }
/// ```
///
/// # At the end of the program
///
/// Dropping a guard does not wait: a thread of the manager sends the release afterwards. If the
/// process ends right after the drop, because `main` returns or `std::process::exit` is called, the
/// release is often not sent, and the key stays locked until its TTL has passed. Await
/// [`release`](Self::release), or [`LockManager::shutdown`](crate::LockManager::shutdown), which
/// also waits for the releases of guards that were dropped before.
#[must_use = "the lock is released as soon as the guard is dropped"]
pub struct LockGuard {
    entry: Arc<Entry>,
    lease: Arc<Lease>,
    token: FencingToken,
    /// `None` for the default class.
    class: Option<Arc<ClassMetrics>>,
    since: Moment,
    /// Whether the times of this guard are in the sample that a recorder gets.
    is_in_sample: bool,
    /// Open as long as the guard lives.
    span: DebugSpan,
    /// Whether the lock was already released.
    released: bool,
}

impl LockGuard {
    pub(crate) fn new(
        entry: Arc<Entry>,
        granted: Granted,
        class: Option<Arc<ClassMetrics>>,
        is_in_sample: bool,
    ) -> Self {
        let Granted { at, lease, token, .. } = granted;
        Self {
            entry,
            lease,
            token,
            class,
            since: at,
            is_in_sample,
            span: DebugSpan::default(),
            released: false,
        }
    }

    /// Lets the lock end with the guard, whatever its `min_hold`: nothing has happened under it.
    pub(crate) fn forgo_min_hold(&self) {
        self.entry.shard.manager.min_holds.forget(self.lease.cycle);
    }

    /// Opens the span that lasts as long as the guard, as a child of the current one. Nothing is
    /// formatted unless a subscriber is interested in that level.
    pub(crate) fn open_span(&mut self) {
        self.span = DebugSpan::open(
            || tracing::debug_span!("hold", key = %self.entry.key, shard = %self.entry.shard.name, token = %self.token),
        );
    }

    /// Returns the key.
    #[must_use]
    pub fn key(&self) -> &str {
        self.entry.key.as_str()
    }

    /// Returns the fencing token of this acquisition. It is larger than that of every earlier
    /// acquisition of this key that excludes this one: see [`FencingToken`]. Send it along with
    /// every write that the lock protects.
    #[must_use]
    pub const fn token(&self) -> FencingToken {
        self.token
    }

    /// Returns the mode in which the key is held.
    #[must_use]
    pub fn mode(&self) -> LockMode {
        self.lease.cycle.mode()
    }

    /// Returns the name of the shard that owns the key.
    #[must_use]
    pub fn shard(&self) -> &str {
        &self.entry.shard.name
    }

    /// Returns the owner of the lease as written in the store: `manager:cycle`.
    #[must_use]
    pub fn owner(&self) -> String {
        self.entry.shard.owner_tag(self.lease.cycle)
    }

    /// Returns whether the lock is certainly still held, by the local clock, with an allowance for
    /// drift. The clock is read on each call, so the result is right even in the first instruction
    /// after a pause.
    #[must_use]
    pub fn is_valid(&self) -> bool {
        self.lease.check(Moment::now()).is_none()
    }

    /// Returns how long the lock is certainly held if no further renewal succeeds; zero after a
    /// loss.
    #[must_use]
    pub fn remaining(&self) -> Duration {
        self.lease.check_remaining(Moment::now())
    }

    /// Waits until the lock is lost and returns the reason. Does not complete while the lock is
    /// held; completes immediately if it is already lost.
    ///
    /// The future does not borrow the guard, so another task can wait for the loss. Drop it when
    /// the lock is released: the lease may go on to the next task of this process, and what is
    /// reported then is the loss of that task.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If the future is dropped, it can be called again without missing
    /// a loss.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), shardlock::LockError> {
    /// # use std::time::Duration;
    /// # async fn work() { std::future::pending().await }
    /// # let locks = shardlock::LockManager::connect("memory://").await?;
    /// let guard = locks.lock("k").max_hold(Duration::from_millis(20)).await?;
    /// tokio::select! {
    ///     reason = guard.lost() => println!("stopped, because {reason}"),
    ///     () = work() => guard.release().await?,
    /// }
    /// # Ok(()) }
    /// ```
    pub fn lost(&self) -> impl Future<Output = LossReason> + Send + use<> {
        let lease = Arc::clone(&self.lease);
        async move { lease.lost().await }
    }

    /// Releases the lock: to the next waiting task of this process, to the next waiting process, or
    /// to nobody if there are no waiters. Returns once the server has confirmed the release.
    ///
    /// In these cases it returns without a confirmation, and does not report a loss that only the
    /// next renewal would have detected:
    ///
    /// - The lock goes to another task of this process. It returns immediately.
    /// - The lease stays with this process for a while
    ///   ([`LockRequest::linger`](crate::LockRequest::linger)). It returns immediately.
    /// - The connection turns out to belong to a runtime that runs nothing. The lock is then
    ///   released in the background.
    /// - More tokens were requested a moment ago, for tasks that have left since. The lock is then
    ///   released in the background, once the server has answered.
    ///
    /// # Errors
    ///
    /// [`LockErrorKind::Lost`] if the lock was no longer held. A later holder's lock is not
    /// touched.
    ///
    /// [`LockErrorKind::Unavailable`] if there was no reply in time, or [`LockErrorKind::Refused`]
    /// if the server refused. In both cases this process no longer holds the lock, and the release
    /// is retried in the background.
    ///
    /// # Cancel safety
    ///
    /// The lock is released even if the future is dropped before it completes.
    ///
    /// [`LockErrorKind::Lost`]: crate::error::LockErrorKind::Lost
    /// [`LockErrorKind::Unavailable`]: crate::error::LockErrorKind::Unavailable
    /// [`LockErrorKind::Refused`]: crate::error::LockErrorKind::Refused
    pub async fn release(mut self) -> Result<(), LockError> {
        let (held, request) = self.end_hold();
        if !held {
            self.send_to_background(request);
            return Err(self.lost_error(self.lease.loss().unwrap_or(LossReason::Expired)));
        }
        // A request for another cycle follows from the release, but does not confirm it.
        let is_ours =
            |request: &Request| matches!(request, Request::Release { .. }) && request.cycle() == self.lease.cycle;
        let Some(request) = request.filter(is_ours) else {
            self.send_to_background(request);
            return Ok(());
        };
        // Boxed to keep this future small: it is moved several times, and most releases send
        // nothing.
        let driven = Box::pin(self.entry.execute(request, Priority::Foreground)).await;
        self.send_to_background(driven.next);
        match driven.released {
            Some(Ok(false)) => Err(self.lost_error(LossReason::Taken)),
            Some(Err(error)) => Err(error),
            Some(Ok(true)) | None => Ok(()),
        }
    }

    /// The lease behind the guard.
    #[cfg(feature = "tower")]
    pub(crate) fn lease(&self) -> Arc<Lease> {
        Arc::clone(&self.lease)
    }

    /// The error for a holder that has lost its lock.
    pub(crate) fn lost_error(&self, reason: LossReason) -> LockError {
        Failure::Lost {
            key: self.key().to_owned(),
            shard: self.entry.shard.name.to_string(),
            token: self.token,
            reason,
        }
        .into()
    }

    fn end_hold(&mut self) -> (bool, Option<Request>) {
        self.span = DebugSpan::default();
        self.released = true;
        let now = Moment::now();
        let shard = &self.entry.shard;
        let validity_left = &shard.metrics.validity_left;
        // Most guards are not in a sample, and then there is nothing to look up.
        if self.is_in_sample || validity_left.is_exact() {
            let class = self.class.as_deref();
            let class = class.unwrap_or_else(|| shard.manager.default_class(self.entry.mode));
            class.held(now.since(self.since), self.is_in_sample);
            validity_left.record_sampled(|| self.lease.fraction_left(now), self.is_in_sample);
        }
        self.entry.released(self.lease.cycle, self.token, now)
    }

    fn send_to_background(&self, request: Option<Request>) {
        if let Some(request) = request {
            self.entry.execute_in_background(request);
        }
    }
}

impl Drop for LockGuard {
    fn drop(&mut self) {
        if !self.released {
            let (_, request) = self.end_hold();
            self.send_to_background(request);
        }
    }
}

impl fmt::Debug for LockGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockGuard")
            .field("key", &self.key())
            .field("token", &self.token)
            .field("shard", &self.shard())
            .field("remaining", &self.remaining())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use crate::{LockManager, LossReason};

    /// Regression: the watchdog learned of it at the next renewal, here after a minute.
    #[tokio::test]
    async fn max_hold_of_a_guard_that_joins_ends_in_time() {
        let connecting = LockManager::builder()
            .shard("memory://")
            .ttl(Duration::from_secs(600))
            .connect();
        let locks = connecting.await.unwrap();
        let first = locks.lock("k").shared().await.unwrap();
        let joining = locks.lock("k").shared().max_hold(Duration::from_millis(20));
        let joined = joining.await.unwrap();
        let lost = tokio::time::timeout(Duration::from_secs(20), joined.lost()).await;
        assert_eq!(lost, Ok(LossReason::MaxHold));
        assert!(first.is_valid());
    }

    /// While one guard stays, others come and go for as long as the process lives.
    #[tokio::test]
    async fn ended_guards_leave_nothing_in_an_entry_that_is_still_held() {
        let locks = LockManager::connect("memory://").await.unwrap();
        let guard = locks.lock("k").shared().await.unwrap();
        for _ in 0..100 {
            locks.lock("k").shared().await.unwrap().release().await.unwrap();
            drop(locks.try_lock("k").shared().await.unwrap().unwrap());
        }
        assert_eq!(guard.entry.known_holders(), 1);
    }
}
