//! The errors of the library, and what to do about each.

mod failure;
mod reason;

use std::convert::Infallible;
use std::error::Error;
use std::fmt;
use std::time::Duration;

pub(crate) use self::failure::Failure;
pub(crate) use self::reason::Reason;
use crate::fence::FencingToken;
pub use crate::fence::TokenRangeError;

/// Why a lock could not be acquired or kept.
///
/// [`kind`](Self::kind) reports what happened, for code that reacts to it. The other methods return
/// the details that this kind of error has.
///
/// Messages name the key, the shard, the value and the bound, and what to do about it. They never
/// contain a password, nor a time that was measured, so equal failures have equal messages:
/// [`waited`](Self::waited) returns the time. The message of an unavailable shard contains the
/// reason; [`source`](Error::source) is the [`std::io::Error`] behind it, if there is one.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
///
/// use shardlock::error::LockErrorKind;
/// use shardlock::{LockError, LockManager};
///
/// /// What a service answers to its caller.
/// fn status(error: &LockError) -> u16 {
///     match error.kind() {
///         LockErrorKind::Invalid => 400,
///         // Another holder may have run meanwhile: look at the data before trying again.
///         LockErrorKind::Lost => 409,
///         _ if error.is_retryable() => 503,
///         _ => 500,
///     }
/// }
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), LockError> {
/// let locks = LockManager::connect("memory://").await?;
/// let _guard = locks.lock("k").await?;
/// let error = locks.lock("k").timeout(Duration::from_millis(10)).await.unwrap_err();
/// assert!(error.is_timeout());
/// assert_eq!((error.key(), status(&error)), (Some("k"), 503));
/// assert!(error.waited() >= Some(Duration::from_millis(10)));
/// assert_eq!(status(&locks.lock("").await.unwrap_err()), 400);
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct LockError(Box<Failure>);

/// Results are returned by every call, so an error is one word.
const _: () = assert!(size_of::<LockError>() == size_of::<usize>());

/// What kind of [`LockError`] it is. More kinds may be added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LockErrorKind {
    /// A value is outside its bounds ([`LockError::invalid_setting`]). Nothing was sent. Fix the
    /// value.
    Invalid,
    /// The kind of shard cannot hold a key in the requested [mode](crate::LockMode). Nothing was
    /// sent. Use another kind of shard for the key.
    Unsupported,
    /// The timeout of the request has passed. Its place in the queue was given up; a new request
    /// joins at the end.
    Timeout,
    /// The limit on local tasks waiting for one key was reached. Shed load, or raise
    /// `max_waiters_per_key`.
    QueueFull,
    /// The limit on local tasks waiting, over all keys, was reached. Shed load, or raise
    /// `max_waiters`.
    TooManyWaiters,
    /// The limit on keys that this manager holds or waits for was reached. Release some locks, or
    /// raise `max_keys`.
    TooManyKeys,
    /// The shard currently holds more leases than it can renew in time. Further keys are refused,
    /// since otherwise held locks would be lost. Release some locks, use longer TTLs or more
    /// shards, or try again later.
    TooManyLeases,
    /// The shard is down, and the limit on keys that wait for its return was reached. Try again
    /// later.
    ShardDown,
    /// The shard could not be reached, or did not reply in time. It is unknown whether the command
    /// took effect; if it did, it is undone in the background. Try again later.
    Unavailable,
    /// The server of the shard replied with an error that a retry does not fix, such as a key of
    /// the wrong type, missing permissions, or no memory left. Nothing was deleted.
    Refused,
    /// The shard was set up by a manager with another shard map. With two maps, the same key could
    /// be locked on two shards at once. Only the slots of each shard are compared, not the names of
    /// the shards.
    ShardMapMismatch,
    /// The lock was lost before it was released ([`LockError::loss_reason`]). Another holder may
    /// have run concurrently. Compare fencing tokens at the resource to reject stale writes.
    Lost,
    /// A store issued a token that is not larger than one it issued before. The lock was released
    /// immediately.
    TokenRegression,
    /// The manager was shut down. Create a new one.
    Closed,
}

impl LockErrorKind {
    /// Returns an identifier, such as `queue_full`, for logs and statistics. Metrics and
    /// [`LossReason::as_str`] have identifiers of the same form.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Invalid => "invalid",
            Self::Unsupported => "unsupported",
            Self::Timeout => "timeout",
            Self::QueueFull => "queue_full",
            Self::TooManyWaiters => "too_many_waiters",
            Self::TooManyKeys => "too_many_keys",
            Self::TooManyLeases => "too_many_leases",
            Self::ShardDown => "shard_down",
            Self::Unavailable => "unavailable",
            Self::Refused => "refused",
            Self::ShardMapMismatch => "shard_map_mismatch",
            Self::Lost => "lost",
            Self::TokenRegression => "token_regression",
            Self::Closed => "closed",
        }
    }
}

impl fmt::Display for LockErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl LockError {
    /// The content, for matching.
    pub(crate) fn failure(&self) -> &Failure {
        &self.0
    }

    /// Sets the total time that the request has waited.
    pub(crate) fn after(mut self, total: Duration) -> Self {
        if let Failure::Unavailable { waited, .. } = &mut *self.0 {
            *waited = total;
        }
        self
    }

    /// Sets the total time that a request for several keys has waited, and its timeout.
    pub(crate) fn of_several(mut self, total: Duration, timeout: Option<Duration>) -> Self {
        match &mut *self.0 {
            Failure::Timeout { waited, limit, .. } => {
                *waited = total;
                *limit = timeout.unwrap_or(*limit);
            }
            Failure::Unavailable { waited, .. } => *waited = total,
            _ => {}
        }
        self
    }

    /// Returns what kind of error it is.
    #[must_use]
    pub fn kind(&self) -> LockErrorKind {
        match &*self.0 {
            Failure::Invalid(_) => LockErrorKind::Invalid,
            Failure::Timeout { .. } => LockErrorKind::Timeout,
            Failure::QueueFull { .. } => LockErrorKind::QueueFull,
            Failure::TooManyWaiters { .. } => LockErrorKind::TooManyWaiters,
            Failure::Unsupported { .. } => LockErrorKind::Unsupported,
            Failure::TooManyKeys { .. } => LockErrorKind::TooManyKeys,
            Failure::TooManyLeases { .. } => LockErrorKind::TooManyLeases,
            Failure::ShardDown { .. } => LockErrorKind::ShardDown,
            Failure::Unavailable { .. } => LockErrorKind::Unavailable,
            Failure::Refused { .. } => LockErrorKind::Refused,
            Failure::ShardMapMismatch { .. } => LockErrorKind::ShardMapMismatch,
            Failure::Lost { .. } => LockErrorKind::Lost,
            Failure::TokenRegression { .. } => LockErrorKind::TokenRegression,
            Failure::Closed => LockErrorKind::Closed,
        }
    }

    /// Returns the key of the request or of the lock, if the error concerns one.
    #[must_use]
    pub fn key(&self) -> Option<&str> {
        match &*self.0 {
            Failure::Timeout { key, .. }
            | Failure::QueueFull { key, .. }
            | Failure::TooManyWaiters { key, .. }
            | Failure::Unsupported { key, .. }
            | Failure::TooManyKeys { key, .. }
            | Failure::TooManyLeases { key, .. }
            | Failure::ShardDown { key, .. }
            | Failure::Lost { key, .. }
            | Failure::TokenRegression { key, .. } => Some(key),
            Failure::Unavailable { key, .. } | Failure::Refused { key, .. } => key.as_deref(),
            Failure::Invalid(_) | Failure::ShardMapMismatch { .. } | Failure::Closed => None,
        }
    }

    /// Returns the name of the shard concerned. `None` for [`LockErrorKind::Invalid`] and
    /// [`LockErrorKind::Closed`].
    #[must_use]
    pub fn shard(&self) -> Option<&str> {
        match &*self.0 {
            Failure::Timeout { shard, .. }
            | Failure::QueueFull { shard, .. }
            | Failure::TooManyWaiters { shard, .. }
            | Failure::TooManyKeys { shard, .. }
            | Failure::Unsupported { shard, .. }
            | Failure::TooManyLeases { shard, .. }
            | Failure::ShardDown { shard, .. }
            | Failure::Unavailable { shard, .. }
            | Failure::Refused { shard, .. }
            | Failure::ShardMapMismatch { shard, .. }
            | Failure::Lost { shard, .. }
            | Failure::TokenRegression { shard, .. } => Some(shard),
            Failure::Invalid(_) | Failure::Closed => None,
        }
    }

    /// Returns how long the request waited until it failed, on the local clock. `None` unless the
    /// kind is [`LockErrorKind::Timeout`] or [`LockErrorKind::Unavailable`].
    #[must_use]
    pub fn waited(&self) -> Option<Duration> {
        match &*self.0 {
            Failure::Timeout { waited, .. } | Failure::Unavailable { waited, .. } => Some(*waited),
            _ => None,
        }
    }

    /// Returns the timeout that has passed. `None` unless the kind is [`LockErrorKind::Timeout`].
    #[must_use]
    pub fn timeout(&self) -> Option<Duration> {
        match &*self.0 {
            Failure::Timeout { limit, .. } => Some(*limit),
            _ => None,
        }
    }

    /// Returns the limit that was reached, in tasks or keys. `None` unless the kind is
    /// [`LockErrorKind::QueueFull`], [`LockErrorKind::TooManyWaiters`],
    /// [`LockErrorKind::TooManyKeys`] or [`LockErrorKind::ShardDown`].
    #[must_use]
    pub fn limit(&self) -> Option<usize> {
        match &*self.0 {
            Failure::QueueFull { limit, .. }
            | Failure::TooManyWaiters { limit, .. }
            | Failure::TooManyKeys { limit, .. }
            | Failure::ShardDown { limit, .. } => Some(*limit),
            _ => None,
        }
    }

    /// Returns how many tasks, keys or leases there were when the request was refused. `None`
    /// unless the kind is [`LockErrorKind::TooManyLeases`] or one that has a
    /// [`limit`](Self::limit).
    #[must_use]
    pub fn in_use(&self) -> Option<usize> {
        match &*self.0 {
            Failure::QueueFull { waiting: count, .. }
            | Failure::TooManyWaiters { waiting: count, .. }
            | Failure::TooManyKeys { used: count, .. }
            | Failure::TooManyLeases { leases: count, .. }
            | Failure::ShardDown { waiting: count, .. } => Some(*count),
            _ => None,
        }
    }

    /// Returns the step that failed: `connect`, `acquire`, `release` and so on. For logs: steps may
    /// be added and renamed. `None` unless the kind is [`LockErrorKind::Unavailable`] or
    /// [`LockErrorKind::Refused`].
    #[must_use]
    pub fn step(&self) -> Option<&'static str> {
        match &*self.0 {
            Failure::Unavailable { step, .. } | Failure::Refused { step, .. } => Some(step),
            _ => None,
        }
    }

    /// Returns why the lock was lost. `None` unless the kind is [`LockErrorKind::Lost`].
    #[must_use]
    pub fn loss_reason(&self) -> Option<LossReason> {
        match &*self.0 {
            Failure::Lost { reason, .. } => Some(*reason),
            _ => None,
        }
    }

    /// Returns the fencing token of the lock that was lost. `None` unless the kind is
    /// [`LockErrorKind::Lost`].
    #[must_use]
    pub fn token(&self) -> Option<FencingToken> {
        match &*self.0 {
            Failure::Lost { token, .. } => Some(*token),
            _ => None,
        }
    }

    /// Returns the value that is outside its bounds. `None` unless the kind is
    /// [`LockErrorKind::Invalid`].
    #[must_use]
    pub fn invalid_setting(&self) -> Option<&InvalidSetting> {
        match &*self.0 {
            Failure::Invalid(invalid) => Some(invalid),
            _ => None,
        }
    }

    /// Returns whether the same request may succeed later without a change by the caller.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        matches!(
            self.kind(),
            LockErrorKind::Timeout
                | LockErrorKind::QueueFull
                | LockErrorKind::TooManyWaiters
                | LockErrorKind::TooManyKeys
                | LockErrorKind::TooManyLeases
                | LockErrorKind::ShardDown
                | LockErrorKind::Unavailable
        )
    }

    /// Returns whether the timeout of the request has passed.
    #[must_use]
    pub fn is_timeout(&self) -> bool {
        self.kind() == LockErrorKind::Timeout
    }

    /// Returns whether a lock that was held has been lost.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.kind() == LockErrorKind::Lost
    }
}

impl From<Failure> for LockError {
    fn from(failure: Failure) -> Self {
        Self(Box::new(failure))
    }
}

impl From<InvalidSetting> for LockError {
    fn from(invalid: InvalidSetting) -> Self {
        Failure::Invalid(invalid).into()
    }
}

/// The kind and the message, which is what a `main` that returns the error prints.
impl fmt::Debug for LockError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockError")
            .field("kind", &self.kind())
            .field("message", &format_args!("{self}"))
            .finish()
    }
}

impl fmt::Display for LockError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl Error for LockError {
    /// The I/O error because of which a shard is unavailable, if there is one.
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match &*self.0 {
            Failure::Unavailable { reason, .. } | Failure::Refused { reason, .. } => reason.io(),
            _ => None,
        }
    }
}

/// Not all leases were released when the manager was shut down
/// ([`LockManager::shutdown`](crate::LockManager::shutdown)). They expire on their own.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{leases} leases were not released in time; they expire on their own, after their ttl")]
pub struct ShutdownError {
    leases: usize,
}

impl ShutdownError {
    pub(crate) const fn new(leases: usize) -> Self {
        Self { leases }
    }

    /// Returns the number of leases whose release the servers had not confirmed. Some of them may
    /// have been released.
    #[must_use]
    pub const fn leases(&self) -> usize {
        self.leases
    }
}

/// Why a lock was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LossReason {
    /// The lease could not be renewed in time: the server was unreachable, or this process was
    /// paused.
    Expired,
    /// The server reported that the lease is gone or has another owner: it was deleted, flushed, or
    /// taken by an administrator.
    Taken,
    /// The guard was held for longer than `max_hold`.
    MaxHold,
    /// The manager was shut down.
    Closed,
    /// The shard now has another shard map ([`LockErrorKind::ShardMapMismatch`]): managers with
    /// that map lock the key on another shard. All locks on the shard are lost together.
    ShardMap,
}

impl LossReason {
    /// All reasons, in a fixed order. More may be added.
    pub const ALL: &'static [Self] = &Self::EACH;

    /// The same with a known length, which is no part of the API.
    pub(crate) const EACH: [Self; 5] = [Self::Expired, Self::Taken, Self::MaxHold, Self::Closed, Self::ShardMap];

    /// Returns the identifier used in metrics and by scripts.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Expired => "expired",
            Self::Taken => "taken",
            Self::MaxHold => "max_hold",
            Self::Closed => "closed",
            Self::ShardMap => "shard_map",
        }
    }
}

impl fmt::Display for LossReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Expired => "its lease could not be renewed in time",
            Self::Taken => "its lease was deleted or taken on the server",
            Self::MaxHold => "it was held for longer than max_hold",
            Self::Closed => "the lock manager was shut down",
            Self::ShardMap => "its shard now has another shard map; `shardlock map show` prints both",
        })
    }
}

/// A value outside its bounds: the field, the value, and what is allowed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[error("{field} is {value}, but must be {bound}")]
pub struct InvalidSetting {
    /// The name of the field, which is the same in the builder, a file and the environment.
    pub field: String,
    /// The value that was given, without any password.
    pub value: String,
    /// What is allowed.
    pub bound: String,
}

/// For calls that take a key which can't be invalid, such as a [`LockKey`](crate::LockKey).
impl From<Infallible> for InvalidSetting {
    fn from(never: Infallible) -> Self {
        match never {}
    }
}

impl InvalidSetting {
    pub(crate) fn new(field: impl Into<String>, value: impl Into<String>, bound: impl Into<String>) -> Self {
        Self {
            field: field.into(),
            value: value.into(),
            bound: bound.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Arc;

    use super::*;

    fn unavailable(waited: Duration, reason: Reason) -> LockError {
        Failure::Unavailable {
            shard: "main".to_owned(),
            step: "acquire",
            key: Some("k".to_owned()),
            waited,
            reason,
        }
        .into()
    }

    #[test]
    fn io_error_that_a_client_library_wrapped_is_the_source() {
        /// As the Redis client has it.
        #[derive(Debug, thiserror::Error)]
        #[error("failed")]
        struct Wrapped(#[source] Arc<dyn Error + Send + Sync>);

        let refused = || io::Error::from(io::ErrorKind::ConnectionRefused);
        for cause in [&Wrapped(Arc::new(refused())) as &(dyn Error + 'static), &refused()] {
            let reason = Reason::from("no connection").caused_by(cause);
            let error = unavailable(Duration::ZERO, reason.map(|reason| format!("one: {reason}")));
            let source = error.source().and_then(|source| source.downcast_ref::<io::Error>());
            assert_eq!(source.map(io::Error::kind), Some(io::ErrorKind::ConnectionRefused));
            assert!(error.to_string().contains("one: no connection"), "{error}");
        }
        let other = Wrapped(Arc::new(Failure::Closed));
        let error = unavailable(Duration::ZERO, Reason::from("no connection").caused_by(&other));
        assert!(error.source().is_none());
    }

    #[test]
    fn messages_do_not_depend_on_the_time_waited() {
        let after = |waited| unavailable(waited, "no answer".into());
        let (early, late) = (after(Duration::from_millis(3)), after(Duration::from_secs(7)));
        assert_eq!(early.to_string(), late.to_string());
        assert_eq!(late.waited(), Some(Duration::from_secs(7)));
        assert_eq!(
            (late.kind(), late.key(), late.shard(), late.step()),
            (LockErrorKind::Unavailable, Some("k"), Some("main"), Some("acquire"))
        );
    }
}
