//! The errors of the library, and what to do about each.

use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::fence::FencingToken;

/// Why a lock could not be acquired or kept.
///
/// Messages name the key, the shard, the value and the bound, and what to do about it. They never
/// contain a password.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
///
/// use shardlock::{LockError, LockManager};
///
/// /// What a service answers to its caller.
/// fn status(error: &LockError) -> u16 {
///     match error {
///         LockError::Invalid(_) => 400,
///         // Another holder may have run meanwhile: look at the data before trying again.
///         LockError::Lost { .. } => 409,
///         error if error.is_retryable() => 503,
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
/// assert_eq!(status(&error), 503);
/// assert_eq!(status(&locks.lock("").await.unwrap_err()), 400);
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum LockError {
    /// A value is outside its bounds. Nothing was sent. Fix the value.
    #[error(transparent)]
    Invalid(#[from] InvalidSetting),

    /// The timeout of the request has passed. Its place in the queue was given up; a new request
    /// joins at the end.
    #[error(
        "timed out after {waited:.3?} waiting for lock {key:?} on shard {shard} (limit {limit:?}); \
         raise the timeout, or look at who holds it with `shardlock inspect`"
    )]
    Timeout {
        /// The requested key.
        key: String,
        /// The name of its shard.
        shard: String,
        /// How long this request waited, on the local clock.
        waited: Duration,
        /// The timeout of the request.
        limit: Duration,
    },

    /// The limit on local tasks waiting for one key was reached. Shed load, or raise
    /// `max_waiters_per_key`.
    #[error(
        "{waiting} tasks of this process already wait for lock {key:?} (max_waiters_per_key = {limit}); shed load or raise the limit"
    )]
    QueueFull {
        /// The requested key.
        key: String,
        /// The number of waiting tasks.
        waiting: usize,
        /// The limit that was reached.
        limit: usize,
    },

    /// The limit on local tasks waiting, over all keys, was reached. Shed load, or raise
    /// `max_waiters`.
    #[error(
        "{waiting} tasks of this process already wait for locks, so {key:?} was refused (max_waiters = {limit}); shed load or raise the limit"
    )]
    TooManyWaiters {
        /// The requested key.
        key: String,
        /// The number of waiting tasks.
        waiting: usize,
        /// The limit that was reached.
        limit: usize,
    },

    /// The limit on keys that this manager holds or waits for was reached. Release some locks, or
    /// raise `max_keys`.
    #[error(
        "this process already uses {used} keys, so {key:?} was refused (max_keys = {limit}); release some or raise the limit"
    )]
    TooManyKeys {
        /// The requested key.
        key: String,
        /// The number of keys in use.
        used: usize,
        /// The limit that was reached.
        limit: usize,
    },

    /// The shard currently holds more leases than it can renew in time. Further keys are refused,
    /// since otherwise held locks would be lost. Release some locks, use longer TTLs or more
    /// shards, or try again later.
    #[error(
        "shard {shard} holds {leases} leases, more than it can renew in time, so {key:?} was refused; release some, or use longer ttls or more shards"
    )]
    TooManyLeases {
        /// The requested key.
        key: String,
        /// The name of the shard.
        shard: String,
        /// The number of leases that the shard holds.
        leases: usize,
    },

    /// The shard is down, and the limit on keys that wait for its return was reached. Try again
    /// later.
    #[error(
        "shard {shard} is down and {waiting} keys wait for its return (at most {limit} may), so {key:?} was refused; try again later, or check the server"
    )]
    ShardDown {
        /// The requested key.
        key: String,
        /// The name of its shard.
        shard: String,
        /// The number of waiting keys.
        waiting: usize,
        /// The limit that was reached.
        limit: usize,
    },

    /// The shard could not be reached, or did not reply in time. It is unknown whether the command
    /// took effect; if it did, it is undone in the background. Try again later.
    #[error("shard {shard} is unavailable ({step}{}, after {waited:.3?}): {reason}; retry, or check the server", on_key(.key))]
    Unavailable {
        /// The name of the shard.
        shard: String,
        /// The step that failed: `connect`, `acquire`, `release` and so on.
        step: &'static str,
        /// The key, if the step was for one.
        key: Option<String>,
        /// The time until it failed.
        waited: Duration,
        /// The reason, as text.
        reason: Arc<str>,
    },

    /// The server of the shard replied with an error that a retry does not fix, such as a key of
    /// the wrong type, missing permissions, or no memory left. Nothing was deleted.
    #[error("shard {shard} refused ({step}{}): {reason}", on_key(.key))]
    Refused {
        /// The name of the shard.
        shard: String,
        /// The step that failed.
        step: &'static str,
        /// The key, if the step was for one.
        key: Option<String>,
        /// The message of the server, and what to do about it.
        reason: Arc<str>,
    },

    /// The shard was set up by a manager with another shard map. With two maps, the same key could
    /// be locked on two shards at once. Only the slots of each shard are compared, not the names of
    /// the shards.
    #[error(
        "shard {shard} is in use with another shard map: the server has `{theirs}` under the key {map_key:?}, this manager has `{ours}`; give \
         every manager the same shards in the same order, or, if the change is meant, stop all managers and replace the map with \
         `shardlock map set` (`shardlock map show` has the maps of all shards)"
    )]
    ShardMapMismatch {
        /// The name of the shard in this manager.
        shard: String,
        /// The map of this manager.
        ours: String,
        /// The map stored on the shard.
        theirs: String,
        /// The key under which the map is stored.
        map_key: String,
    },

    /// The lock was lost before it was released. Another holder may have run concurrently. Compare
    /// fencing tokens at the resource to reject stale writes.
    #[error("lock {key:?} (token {token}) was lost: {reason}")]
    Lost {
        /// The key that was held.
        key: String,
        /// The fencing token of the lost lock.
        token: FencingToken,
        /// Why the lock was lost.
        reason: LossReason,
    },

    /// A store issued a token that is not larger than one it issued before. The lock was released
    /// immediately.
    #[error(
        "shard {shard} issued token {token} for lock {key:?} after {floor} had been seen; the lock was released; check the server's clock and data"
    )]
    TokenRegression {
        /// The requested key.
        key: String,
        /// The name of its shard.
        shard: String,
        /// The token that was issued.
        token: u64,
        /// The token should have been larger than this number.
        floor: u64,
    },

    /// The manager was shut down. Create a new one.
    #[error("the lock manager was shut down")]
    Closed,
}

fn on_key(key: &Option<String>) -> String {
    key.as_ref().map(|key| format!(" {key:?}")).unwrap_or_default()
}

impl LockError {
    /// Sets the total time that the request has waited.
    pub(crate) fn after(mut self, total: Duration) -> Self {
        if let Self::Unavailable { waited, .. } = &mut self {
            *waited = total;
        }
        self
    }

    /// Returns whether the same request may succeed later without a change by the caller.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        matches!(
            self,
            Self::Timeout { .. }
                | Self::QueueFull { .. }
                | Self::TooManyWaiters { .. }
                | Self::TooManyKeys { .. }
                | Self::TooManyLeases { .. }
                | Self::ShardDown { .. }
                | Self::Unavailable { .. }
        )
    }

    /// Returns whether the timeout of the request has passed.
    #[must_use]
    pub fn is_timeout(&self) -> bool {
        matches!(self, Self::Timeout { .. })
    }

    /// Returns whether a lock that was held has been lost.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        matches!(self, Self::Lost { .. })
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
    /// The shard now has another shard map ([`LockError::ShardMapMismatch`]): managers with that
    /// map lock the key on another shard. All locks on the shard are lost together.
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
