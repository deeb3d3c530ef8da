//! Locking several keys at once.
//!
//! # Implementation details
//!
//! The keys are locked one after the other, in the order of their slots and then of their names.
//! Every process has the same order whatever its shards, so no two requests can wait for each other
//! in a circle. Each key is an ordinary [`LockRequest`]; while it waits, the request also watches
//! the locks it holds already.
//!
//! If one of these is lost, the keys from there on are released and requested again. Requesting
//! only the lost key while later ones are held would break the order.

use std::fmt;
use std::future::{Future, IntoFuture};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::future::{join_all, select_all};
use tokio::time::Instant;

use crate::body::while_held;
use crate::context::ManagerShared;
use crate::error::{Failure, InvalidSetting, LockError, LockErrorKind, LossReason};
use crate::fence::FencingToken;
use crate::guard::LockGuard;
use crate::key::LockKey;
use crate::mode::LockMode;
use crate::request::{LockRequest, TryLockRequest};

/// A request for locks on several keys, which are held together or not at all. Created by
/// [`LockManager::lock_all`](crate::LockManager::lock_all). Override settings of the manager as
/// needed, then await it:
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), shardlock::LockError> {
/// # use std::time::Duration;
/// # let locks = shardlock::LockManager::connect("memory://").await?;
/// let (from, to) = ("account:7", "account:3");
/// let guard = locks
///     .lock_all([from, to])
///     .timeout(Duration::from_secs(2))
///     .class("transfers")
///     .await?;
/// println!("{:?} and {:?}", guard.token(from), guard.token(to));
/// # guard.release().await
/// # }
/// ```
///
/// # Order
///
/// The keys are requested one after the other, in one order that is the same in every process and
/// does not depend on the order in which they were given: by slot, then by name. Requests with
/// overlapping sets of keys can therefore not wait for each other in a circle, as long as *every*
/// task that locks several of these keys locks them with `lock_all`. A task that holds a guard of
/// one of the keys and then requests another one on its own can deadlock with such a request. Set a
/// [`timeout`](Self::timeout) if you are not sure.
///
/// The manager's [`min_hold`](crate::config::Config::min_hold) applies to each key once all of them
/// are held.
///
/// # Cost
///
/// A request takes one round trip per key instead of one. While it waits for a later key, it holds
/// the earlier ones, and all other tasks that want them wait as well: a request that waits for
/// one long hold makes the keys before it unavailable for just as long. Keep the sets small, or use
/// one key for all of them. Every key counts as a request of its own in metrics and limits.
///
/// # Losses while waiting
///
/// A request never returns a guard of which a lock is known to be lost. If a lock that it already
/// holds expires or is taken on the server while it waits for a later key, it releases the keys
/// after the lost one and continues from there: nothing has run under the lock yet. After 16 such
/// losses, it fails with [`LockErrorKind::Lost`]. It fails with this error immediately if the
/// reason is [`LossReason::MaxHold`] or [`LossReason::ShardMap`].
///
/// # Errors
///
/// Awaiting the request returns the errors of a [`LockRequest`]. The error names the key that could
/// not be acquired. All keys acquired before are then released in the background. In addition,
/// [`LockErrorKind::Invalid`] is returned if there is no key, or if there are more than
/// [`KEYS_MAX`](Self::KEYS_MAX) different ones.
///
/// # Cancel safety
///
/// This future is cancel safe. Dropping it at any point gives up the place in the queue and
/// releases the keys that it holds already.
#[must_use = "requests do nothing unless awaited"]
#[derive(Debug, Clone)]
pub struct LockAllRequest {
    /// In the order in which they are locked, each once.
    keys: Vec<LockKey>,
    /// Has the settings, and the error if the keys are invalid.
    template: LockRequest,
    /// How many permits of each key to take, if permits are requested.
    weight: u16,
}

/// A request for locks on several keys that returns `None` instead of waiting. See
/// [`LockManager::try_lock_all`](crate::LockManager::try_lock_all).
///
/// Errors and cancel safety are those of [`LockAllRequest`], except that there is no
/// [`Timeout`](crate::error::LockErrorKind::Timeout).
#[must_use = "requests do nothing unless awaited"]
#[derive(Debug, Clone)]
pub struct TryLockAllRequest(LockAllRequest);

/// Whether a request waits for a key that is not free.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Patience {
    Wait,
    Try,
}

/// How many losses of earlier keys a request tolerates while it waits for later ones.
const LOSSES_MAX: u32 = 16;

impl LockAllRequest {
    /// The largest number of different keys of a request.
    pub const KEYS_MAX: usize = 128;

    #[track_caller]
    pub(crate) fn new<K>(manager: Arc<ManagerShared>, keys: impl IntoIterator<Item = K>) -> Self
    where
        K: TryInto<LockKey, Error: Into<InvalidSetting>>,
    {
        let keys = in_order(keys.into_iter().map(|key| key.try_into().map_err(Into::into)));
        let (keys, first) = match keys {
            Ok(keys) => {
                let first = keys.first().cloned().ok_or_else(|| invalid_count("empty".to_owned()));
                (keys, first)
            }
            Err(invalid) => (Vec::new(), Err(invalid)),
        };
        Self {
            keys,
            template: LockRequest::new(manager, first),
            weight: 1,
        }
    }

    /// Requests all keys in shared mode. See [`LockRequest::shared`].
    pub fn shared(mut self) -> Self {
        self.template = self.template.shared();
        self
    }

    /// Requests one of at most `limit` permits of each key, or several with
    /// [`weight`](Self::weight). See [`LockManager::permits`](crate::LockManager::permits).
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), shardlock::LockError> {
    /// # let locks = shardlock::LockManager::connect("memory://").await?;
    /// let guard = locks.lock_all(["a", "b"]).permits(3).weight(2).await?;
    /// assert!(locks.try_permits("a", 3).weight(2).await?.is_none());
    /// # guard.release().await
    /// # }
    /// ```
    pub fn permits(mut self, limit: u16) -> Self {
        let weight = self.weight;
        self.template = self.template.in_mode(LockMode::Permits { weight, limit });
        self
    }

    /// Sets how many permits of each key the request takes, from 1 to the limit. Only for requests
    /// with [`permits`](Self::permits); others ignore it.
    pub fn weight(mut self, weight: u16) -> Self {
        self.weight = weight;
        self.template = self.template.weight(weight);
        self
    }

    /// Sets how long the leases last without renewal. See [`LockRequest::ttl`].
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.template = self.template.ttl(ttl);
        self
    }

    /// Sets how long to wait for all the locks together: up to 365 days. Zero means a single try of
    /// each, and `None` waits without a limit. See [`LockRequest::timeout`].
    pub fn timeout(mut self, limit: impl Into<Option<Duration>>) -> Self {
        self.template = self.template.timeout(limit);
        self
    }

    /// Sets how long each lease is renewed. See [`LockRequest::max_hold`].
    ///
    /// The time of each key counts from when the key itself was acquired, so it includes the wait
    /// for later keys. If it passes during that wait, the request fails.
    pub fn max_hold(mut self, longest: impl Into<Option<Duration>>) -> Self {
        self.template = self.template.max_hold(longest);
        self
    }

    /// Sets how long the leases stay with this process once their guards are gone. See
    /// [`LockRequest::linger`].
    pub fn linger(mut self, time: Duration) -> Self {
        self.template = self.template.linger(time);
        self
    }

    /// Fails the request as soon as a shard can't be reached. See [`LockRequest::fail_fast`].
    pub fn fail_fast(mut self) -> Self {
        self.template = self.template.fail_fast();
        self
    }

    /// Sets the class under which metrics count the requests. See [`LockRequest::class`].
    pub fn class(mut self, class: &str) -> Self {
        self.template = self.template.class(class);
        self
    }

    /// Runs `body` while holding all the locks, then releases them. If one of them is lost, the
    /// body is cancelled, that is, dropped.
    ///
    /// The value returned by the body is passed through unchanged, including an error of its own.
    ///
    /// # Errors
    ///
    /// - The errors of the request. The body has not run.
    /// - [`LockErrorKind::Lost`] if a lock was lost before it was released.
    /// - [`LockErrorKind::Refused`] if a server refused the release. The body has run.
    ///
    /// A release without a reply is not an error: it is retried in the background.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future drops the body at its current await point and then releases the locks.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), shardlock::LockError> {
    /// # let locks = shardlock::LockManager::connect("memory://").await?;
    /// let count = locks.lock_all(["a", "b"]).with(async |guard| guard.guards().len()).await?;
    /// assert_eq!(count, 2);
    /// # Ok(()) }
    /// ```
    pub async fn with<T>(self, body: impl AsyncFnOnce(&LockAllGuard) -> T) -> Result<T, LockError> {
        let guard = self.await?;
        let Some(result) = while_held(guard.lost(), || guard.is_valid(), body(&guard)).await else {
            let (index, reason) = first_loss(&guard.guards).await;
            return Err(guard.guards[index].lost_error(reason));
        };
        let failures = guard.release_each().await;
        // A release without a reply is retried in the background. The body did run under the locks.
        let failures = failures.into_iter();
        worst(failures.filter(|error| error.kind() != LockErrorKind::Unavailable)).map_or(Ok(result), Err)
    }

    /// Locks one key after the other. `None` if this is a try and one of them is not free.
    async fn acquire(self, patience: Patience) -> Result<Option<LockAllGuard>, LockError> {
        let started = Instant::now();
        let limit = self.template.limit();
        if self.keys.is_empty() {
            // The template has the reason.
            return self.template.await.map(|_| None);
        }
        let mut acquired = Acquired(Vec::with_capacity(self.keys.len()));
        let mut losses = 0;
        loop {
            let next = async {
                let Some(key) = self.keys.get(acquired.0.len()) else {
                    return Ok(None);
                };
                let left = limit.map(|limit| limit.saturating_sub(started.elapsed()));
                let request = self.template.for_key(key.clone()).timeout(left);
                match patience {
                    Patience::Try => TryLockRequest::new(request).await.map(Some),
                    Patience::Wait => request.await.map(|guard| Some(Some(guard))),
                }
            };
            let lost = tokio::select! {
                biased;
                lost = first_loss(&acquired.0) => Some(lost),
                next = next => match next.map_err(|error| error.of_several(started.elapsed(), limit))? {
                    Some(Some(guard)) => {
                        acquired.0.push(guard);
                        None
                    }
                    Some(None) => return Ok(None),
                    // All keys are held. A lock that expired during a pause may not have been
                    // reported as lost yet.
                    None => match acquired.0.iter().position(|guard| !guard.is_valid()) {
                        Some(index) => Some((index, acquired.0[index].lost().await)),
                        None => return Ok(Some(acquired.complete())),
                    },
                },
            };
            if let Some((index, reason)) = lost {
                losses += 1;
                match reason {
                    LossReason::Closed => return Err(Failure::Closed.into()),
                    LossReason::Expired | LossReason::Taken if losses <= LOSSES_MAX => acquired.keep_first(index),
                    _ => return Err(acquired.0[index].lost_error(reason)),
                }
            }
        }
    }
}

/// Locks that wait for the others. If they are given up, nothing has happened under them, so their
/// keys are free at once, whatever their `min_hold`.
struct Acquired(Vec<LockGuard>);

impl Acquired {
    /// Gives up all but the first ones.
    fn keep_first(&mut self, count: usize) {
        for guard in self.0.drain(count..) {
            guard.forgo_min_hold();
        }
    }

    fn complete(mut self) -> LockAllGuard {
        LockAllGuard {
            guards: std::mem::take(&mut self.0),
        }
    }
}

impl Drop for Acquired {
    fn drop(&mut self) {
        self.keep_first(0);
    }
}

/// The valid keys in the order in which they are locked, each once.
fn in_order(keys: impl Iterator<Item = Result<LockKey, InvalidSetting>>) -> Result<Vec<LockKey>, InvalidSetting> {
    let mut ordered = Vec::new();
    for key in keys {
        let key = key?;
        // Shards own contiguous ranges of slots, so this is also the order of the shards, and it is
        // the same for any number of them.
        let place = (key.slot(), key);
        if let Err(index) = ordered.binary_search(&place) {
            if ordered.len() == LockAllRequest::KEYS_MAX {
                return Err(invalid_count(format!("{} or more", ordered.len() + 1)));
            }
            ordered.insert(index, place);
        }
    }
    Ok(ordered.into_iter().map(|(_, key)| key).collect())
}

fn invalid_count(count: String) -> InvalidSetting {
    InvalidSetting::new(
        "keys",
        count,
        format!("1 to {} different keys", LockAllRequest::KEYS_MAX),
    )
}

/// Waits until one of the locks is lost, and returns its index and the reason. Does not complete if
/// there are none.
async fn first_loss(guards: &[LockGuard]) -> (usize, LossReason) {
    if guards.is_empty() {
        return std::future::pending().await;
    }
    let losses = guards.iter().map(|guard| Box::pin(guard.lost()));
    let (reason, index, _) = select_all(losses).await;
    (index, reason)
}

/// The error to report among those of several releases: a loss before all others, then a refusal,
/// then the first.
fn worst(failures: impl Iterator<Item = LockError>) -> Option<LockError> {
    failures.min_by_key(|error| match error.kind() {
        LockErrorKind::Lost => 0,
        LockErrorKind::Refused => 1,
        _ => 2,
    })
}

/// Held locks on several keys. Dropping the guard releases all of them in the background.
/// [`release`](Self::release) releases them and reports whether they were all still held.
///
/// The loss of one lock is the loss of the whole guard: [`is_valid`](Self::is_valid) is then false,
/// and [`lost`](Self::lost) returns which one it was. The other locks stay held until the guard is
/// released or dropped.
///
/// # Examples
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), shardlock::LockError> {
/// # async fn transfer() {}
/// # let locks = shardlock::LockManager::connect("memory://").await?;
/// let guard = locks.lock_all(["account:3", "account:7"]).await?;
/// tokio::select! {
///     lost = guard.lost() => println!("stopped: {lost}"),
///     () = transfer() => guard.release().await?,
/// }
/// # Ok(()) }
/// ```
#[must_use = "the locks are released as soon as the guard is dropped"]
pub struct LockAllGuard {
    /// At least one, in the order in which they were locked.
    guards: Vec<LockGuard>,
}

impl LockAllGuard {
    /// Returns the guards of the keys, each key once, in the order in which they were locked.
    pub fn guards(&self) -> &[LockGuard] {
        &self.guards
    }

    /// Returns the guard of a key, or `None` if the key is not one of those that were requested.
    #[must_use]
    pub fn guard(&self, key: &str) -> Option<&LockGuard> {
        self.guards.iter().find(|guard| guard.key() == key)
    }

    /// Returns the fencing token of a key, or `None` if the key is not one of those that were
    /// requested. Send it along with every write to what the key protects.
    #[must_use]
    pub fn token(&self, key: &str) -> Option<FencingToken> {
        self.guard(key).map(LockGuard::token)
    }

    /// Returns whether all the locks are certainly still held. See [`LockGuard::is_valid`].
    #[must_use]
    pub fn is_valid(&self) -> bool {
        self.guards.iter().all(LockGuard::is_valid)
    }

    /// Returns how long all the locks are certainly held if no further renewal succeeds; zero after
    /// a loss.
    #[must_use]
    pub fn remaining(&self) -> Duration {
        self.guards.iter().map(LockGuard::remaining).min().unwrap_or_default()
    }

    /// Waits until one of the locks is lost, and returns which one and why. Does not complete while
    /// all of them are held; completes immediately if one is already lost.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If the future is dropped, it can be called again without missing
    /// a loss.
    pub async fn lost(&self) -> LostKey {
        let (index, reason) = first_loss(&self.guards).await;
        let guard = &self.guards[index];
        LostKey {
            key: guard.key().to_owned(),
            token: guard.token(),
            reason,
        }
    }

    /// Releases all the locks, at the same time. Returns once the servers have confirmed the
    /// releases; [`LockGuard::release`] lists when no confirmation is needed.
    ///
    /// # Errors
    ///
    /// The errors of [`LockGuard::release`]. All locks are released even if this fails. Of several
    /// errors, a loss is reported before a refusal, and a refusal before a missing reply; among
    /// equal ones, that of the key that was locked first.
    ///
    /// # Cancel safety
    ///
    /// The locks are released even if the future is dropped before it completes.
    pub async fn release(self) -> Result<(), LockError> {
        worst(self.release_each().await.into_iter()).map_or(Ok(()), Err)
    }

    /// Releases all the locks, and returns what went wrong, in the order of the keys.
    async fn release_each(self) -> Vec<LockError> {
        let released = join_all(self.guards.into_iter().map(LockGuard::release)).await;
        released.into_iter().filter_map(Result::err).collect()
    }
}

impl fmt::Debug for LockAllGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockAllGuard").field("guards", &self.guards).finish()
    }
}

/// Which of several locks was lost, and why. Returned by [`LockAllGuard::lost`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct LostKey {
    /// The key that was held.
    pub key: String,
    /// The fencing token of the lost lock.
    pub token: FencingToken,
    /// Why the lock was lost.
    pub reason: LossReason,
}

impl fmt::Display for LostKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { key, token, reason } = self;
        write!(f, "lock {key:?} (token {token}) was lost: {reason}")
    }
}

/// The future of a [`LockAllRequest`].
#[must_use = "futures do nothing unless polled"]
pub struct LockAllFuture(Pin<Box<dyn Future<Output = Result<Option<LockAllGuard>, LockError>> + Send>>);

/// The future of a [`TryLockAllRequest`].
#[must_use = "futures do nothing unless polled"]
pub struct TryLockAllFuture(Pin<Box<dyn Future<Output = Result<Option<LockAllGuard>, LockError>> + Send>>);

impl Future for LockAllFuture {
    type Output = Result<LockAllGuard, LockError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.as_mut().poll(cx).map(|result| match result? {
            Some(guard) => Ok(guard),
            None => unreachable!("a request that waits ended like a try"),
        })
    }
}

impl Future for TryLockAllFuture {
    type Output = Result<Option<LockAllGuard>, LockError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.as_mut().poll(cx)
    }
}

impl fmt::Debug for LockAllFuture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockAllFuture").finish_non_exhaustive()
    }
}

impl fmt::Debug for TryLockAllFuture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TryLockAllFuture").finish_non_exhaustive()
    }
}

impl IntoFuture for LockAllRequest {
    type Output = Result<LockAllGuard, LockError>;
    type IntoFuture = LockAllFuture;

    fn into_future(self) -> LockAllFuture {
        LockAllFuture(Box::pin(self.acquire(Patience::Wait)))
    }
}

impl TryLockAllRequest {
    pub(crate) const fn new(request: LockAllRequest) -> Self {
        Self(request)
    }

    /// See [`LockAllRequest::shared`].
    pub fn shared(mut self) -> Self {
        self.0 = self.0.shared();
        self
    }

    /// See [`LockAllRequest::permits`].
    pub fn permits(mut self, limit: u16) -> Self {
        self.0 = self.0.permits(limit);
        self
    }

    /// See [`LockAllRequest::weight`].
    pub fn weight(mut self, weight: u16) -> Self {
        self.0 = self.0.weight(weight);
        self
    }

    /// See [`LockRequest::ttl`].
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.0 = self.0.ttl(ttl);
        self
    }

    /// See [`LockAllRequest::max_hold`].
    pub fn max_hold(mut self, longest: impl Into<Option<Duration>>) -> Self {
        self.0 = self.0.max_hold(longest);
        self
    }

    /// See [`LockRequest::linger`].
    pub fn linger(mut self, time: Duration) -> Self {
        self.0 = self.0.linger(time);
        self
    }

    /// See [`LockRequest::class`].
    pub fn class(mut self, class: &str) -> Self {
        self.0 = self.0.class(class);
        self
    }
}

impl IntoFuture for TryLockAllRequest {
    type Output = Result<Option<LockAllGuard>, LockError>;
    type IntoFuture = TryLockAllFuture;

    fn into_future(self) -> TryLockAllFuture {
        TryLockAllFuture(Box::pin(self.0.acquire(Patience::Try)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ordered(keys: &[String]) -> Result<Vec<LockKey>, InvalidSetting> {
        in_order(keys.iter().map(LockKey::try_from))
    }

    proptest! {
        /// Two processes that were given the same keys in different orders lock them in the same
        /// one, and none of them twice.
        #[test]
        fn order_does_not_depend_on_how_the_keys_are_given(keys in prop::collection::vec("[a-d]{1,2}", 1..12)) {
            let forwards = ordered(&keys).unwrap();
            let backwards: Vec<_> = keys.iter().rev().chain(&keys).cloned().collect();
            prop_assert_eq!(&forwards, &ordered(&backwards).unwrap());
            for pair in forwards.windows(2) {
                prop_assert!((pair[0].slot(), &pair[0]) < (pair[1].slot(), &pair[1]));
            }
        }
    }

    #[test]
    fn keys_of_one_slot_are_ordered_by_name() {
        let keys = ["{t}c", "{t}a", "{t}b"].map(String::from);
        let ordered = ordered(&keys).unwrap();
        assert_eq!(
            ordered.iter().map(LockKey::as_str).collect::<Vec<_>>(),
            ["{t}a", "{t}b", "{t}c"]
        );
    }

    #[test]
    fn number_of_different_keys_is_bounded() {
        let keys = |count: usize| (0..count).map(|number| number.to_string()).collect::<Vec<_>>();
        let most = keys(LockAllRequest::KEYS_MAX);
        let twice = [most.clone(), most].concat();
        assert_eq!(ordered(&twice).unwrap().len(), LockAllRequest::KEYS_MAX);
        let error = ordered(&keys(LockAllRequest::KEYS_MAX + 1)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "keys is 129 or more, but must be 1 to 128 different keys"
        );
    }
}
