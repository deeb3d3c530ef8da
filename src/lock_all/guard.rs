//! The guard of locks on several keys.

use std::fmt;
use std::pin::Pin;
use std::time::Duration;

use futures_util::future::{join_all, select_all};

use crate::error::{LockError, LockErrorKind, LossReason};
use crate::fence::FencingToken;
use crate::guard::LockGuard;

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
    pub(super) const fn new(guards: Vec<LockGuard>) -> Self {
        Self { guards }
    }

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
    /// The future does not borrow the guard, so another task can wait for the loss. See
    /// [`LockGuard::lost`].
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If the future is dropped, it can be called again without missing
    /// a loss.
    pub fn lost(&self) -> impl Future<Output = LostKey> + Send + use<> {
        let losses: Vec<_> = self.guards.iter().map(loss_of).collect();
        async move { select_all(losses).await.0 }
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

    /// The error of the lock that was lost first. Does not complete while all of them are held.
    pub(super) async fn loss_error(&self) -> LockError {
        let (index, reason) = first_loss(&self.guards).await;
        self.guards[index].lost_error(reason)
    }

    /// Releases all the locks, and returns what went wrong, in the order of the keys.
    pub(super) async fn release_each(self) -> Vec<LockError> {
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

/// Waits until this lock is lost.
fn loss_of(guard: &LockGuard) -> Pin<Box<dyn Future<Output = LostKey> + Send>> {
    let (key, token, lost) = (guard.key().to_owned(), guard.token(), guard.lost());
    Box::pin(async move {
        let reason = lost.await;
        LostKey { key, token, reason }
    })
}

/// Waits until one of the locks is lost, and returns its index and the reason. Does not complete if
/// there are none.
pub(super) async fn first_loss(guards: &[LockGuard]) -> (usize, LossReason) {
    if guards.is_empty() {
        return std::future::pending().await;
    }
    let losses = guards.iter().map(|guard| Box::pin(guard.lost()));
    let (reason, index, _) = select_all(losses).await;
    (index, reason)
}

/// The error to report among those of several releases: a loss before all others, then a refusal,
/// then the first.
pub(super) fn worst(failures: impl Iterator<Item = LockError>) -> Option<LockError> {
    failures.min_by_key(|error| match error.kind() {
        LockErrorKind::Lost => 0,
        LockErrorKind::Refused => 1,
        _ => 2,
    })
}
