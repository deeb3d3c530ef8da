//! Locking several keys at once.
//!
//! | file | what it has |
//! |---|---|
//! | `mod` | the requests, and the order of their keys |
//! | `acquire` | locking one key after the other |
//! | `guard` | the locks that are held |

mod acquire;
mod guard;

use std::fmt;
use std::future::{Future, IntoFuture};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use self::acquire::Patience;
use self::guard::worst;
pub use self::guard::{LockAllGuard, LostKey};
use crate::body::while_held;
use crate::error::{InvalidSetting, LockError, LockErrorKind};
use crate::key::LockKey;
use crate::manager_inner::ManagerInner;
use crate::mode::LockMode;
use crate::request::LockRequest;

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
/// reason is [`LossReason::MaxHold`](crate::LossReason::MaxHold) or
/// [`LossReason::ShardMap`](crate::LossReason::ShardMap).
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

impl LockAllRequest {
    /// The largest number of different keys of a request.
    pub const KEYS_MAX: usize = 128;

    #[track_caller]
    pub(crate) fn new<K>(manager: Arc<ManagerInner>, keys: impl IntoIterator<Item = K>) -> Self
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
            return Err(guard.loss_error().await);
        };
        let failures = guard.release_each().await;
        // A release without a reply is retried in the background. The body did run under the locks.
        let failures = failures.into_iter();
        worst(failures.filter(|error| error.kind() != LockErrorKind::Unavailable)).map_or(Ok(result), Err)
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
