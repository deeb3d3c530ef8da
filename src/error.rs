//! What can go wrong, in one enum, and what to do about each.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::fence::FencingToken;

/// Why a lock could not be had or kept.
///
/// Messages name the key, the shard, the value and the bound, and say what to do. They never contain a password.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum LockError {
    /// A value is outside its bounds. Nothing was sent. Fix the value.
    #[error(transparent)]
    Invalid(#[from] Invalid),

    /// The wait limit of this request passed. The place in the queue has been given up; asking again joins at the end.
    #[error(
        "timed out after {waited:.3?} waiting for lock {key:?} on shard {shard} (limit {limit:?}); \
         raise the timeout, or look at who holds it with `shardlock inspect`"
    )]
    Timeout {
        /// The key that was wanted.
        key: String,
        /// The name of its shard.
        shard: String,
        /// How long this request waited, on the local clock.
        waited: Duration,
        /// The limit that it was given.
        limit: Duration,
    },

    /// So many local tasks wait for this one key that no more are let in. Shed load, or raise `max_waiters_per_key`.
    #[error(
        "{waiting} tasks of this process already wait for lock {key:?} (max_waiters_per_key = {limit}); shed load or raise the limit"
    )]
    QueueFull {
        /// The key that was wanted.
        key: String,
        /// How many wait.
        waiting: usize,
        /// The limit that was reached.
        limit: usize,
    },

    /// So many local tasks wait, over all keys, that no more are let in. Shed load, or raise `max_waiters`.
    #[error(
        "{waiting} tasks of this process already wait for locks, so {key:?} was refused (max_waiters = {limit}); shed load or raise the limit"
    )]
    TooManyWaiters {
        /// The key that was wanted.
        key: String,
        /// How many wait.
        waiting: usize,
        /// The limit that was reached.
        limit: usize,
    },

    /// So many keys are held or waited for by this manager that no further one is let in. Release some, or raise `max_keys`.
    #[error(
        "this process already uses {used} keys, so {key:?} was refused (max_keys = {limit}); release some or raise the limit"
    )]
    TooManyKeys {
        /// The key that was wanted.
        key: String,
        /// How many are in use.
        used: usize,
        /// The limit that was reached.
        limit: usize,
    },

    /// The shard holds more leases than it can renew in time at the moment, so no further key is let in: those that are held would be lost. Release
    /// some, use longer TTLs or more shards, or try again later.
    #[error(
        "shard {shard} holds {leases} leases, more than it renews in time, so {key:?} was refused; release some, or use longer ttls or more shards"
    )]
    TooManyLeases {
        /// The key that was wanted.
        key: String,
        /// The name of the shard.
        shard: String,
        /// How many leases it holds.
        leases: usize,
    },

    /// The shard is down, and so many keys wait for its return that no further one is let in. Try again later.
    #[error(
        "shard {shard} is down and {waiting} keys wait for its return (at most {limit} may), so {key:?} was refused; try again later, or check the server"
    )]
    ShardDown {
        /// The key that was wanted.
        key: String,
        /// The name of its shard.
        shard: String,
        /// How many keys wait.
        waiting: usize,
        /// The limit that was reached.
        limit: usize,
    },

    /// The shard could not be reached, or did not answer in time. Whether a command took effect is unknown; it is undone in
    /// the background. Try again later.
    #[error("shard {shard} is unavailable ({step}{}, after {waited:.3?}): {reason}; retry, or check the server", on_key(.key))]
    Unavailable {
        /// The name of the shard.
        shard: String,
        /// What was being done: `connect`, `acquire`, `release` and so on.
        step: &'static str,
        /// The key it was done for, where it was for one.
        key: Option<String>,
        /// How long it took to fail.
        waited: Duration,
        /// The reason in words.
        reason: Arc<str>,
    },

    /// The shard's server answered with an error that trying again won't mend, such as a key of a wrong type, missing
    /// permissions or no memory left. Nothing was deleted.
    #[error("shard {shard} refused ({step}{}): {reason}", on_key(.key))]
    Refused {
        /// The name of the shard.
        shard: String,
        /// What was being done.
        step: &'static str,
        /// The key it was done for, where it was for one.
        key: Option<String>,
        /// The server's words, and what to do.
        reason: Arc<str>,
    },

    /// The shard was set up by a manager with another shard map. With two maps the same key would be locked in two places. The names of shards
    /// do not count, only which slots each has ([`ShardMap::agree`](crate::ShardMap::agree)).
    #[error(
        "shard {shard} is in use with another shard map: the server has `{theirs}` under the key {map_key:?}, this manager has `{ours}`; give \
         every manager the same shards in the same order, or, if the change is meant, stop all managers and replace the map with \
         `shardlock map set` (`shardlock map show` has the maps of all shards)"
    )]
    ShardMapMismatch {
        /// The name of the shard, as this manager calls it.
        shard: String,
        /// This manager's map.
        ours: String,
        /// The map that the shard has.
        theirs: String,
        /// The key that holds the map.
        map_key: String,
    },

    /// The lock was lost before it was released. Work done under it may overlap with another holder's; the token tells the
    /// resource who is who.
    #[error("lock {key:?} (token {token}) was lost: {reason}")]
    Lost {
        /// The key that was held.
        key: String,
        /// The token under which it was held.
        token: FencingToken,
        /// Why.
        reason: LossReason,
    },

    /// A store issued a token that is not larger than one it issued before. The lock was given up again at once.
    #[error(
        "shard {shard} issued token {token} for lock {key:?} after {floor} had been seen; the lock was given up, check the server's clock and data"
    )]
    TokenRegression {
        /// The key that was wanted.
        key: String,
        /// The name of its shard.
        shard: String,
        /// The token that came.
        token: u64,
        /// The smallest number that it should have been above.
        floor: u64,
    },

    /// The manager was shut down. Make a new one.
    #[error("the lock manager was shut down")]
    Closed,
}

fn on_key(key: &Option<String>) -> String {
    key.as_ref().map(|key| format!(" {key:?}")).unwrap_or_default()
}

impl LockError {
    /// The same with the time that the request waited in all.
    pub(crate) fn after(mut self, total: Duration) -> Self {
        if let Self::Unavailable { waited, .. } = &mut self {
            *waited = total;
        }
        self
    }

    /// Whether the same request may succeed later with nothing changed by the caller.
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

    /// Whether the wait limit of the request passed.
    #[must_use]
    pub fn is_timeout(&self) -> bool {
        matches!(self, Self::Timeout { .. })
    }

    /// Whether a lock that was held is not held any more.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        matches!(self, Self::Lost { .. })
    }
}

/// Why a lock was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LossReason {
    /// The lease could not be renewed in time: the server was unreachable, or this process was paused.
    Expired,
    /// The server says that the lease is gone or somebody else's: it was deleted, flushed, or taken by an administrator.
    Taken,
    /// The guard was held for longer than `max_hold`.
    MaxHold,
    /// The manager was shut down.
    Closed,
    /// The shard has another shard map by now ([`LockError::ShardMapMismatch`]): managers with that map lock the key elsewhere. All locks on
    /// the shard are lost together.
    ShardMap,
}

impl LossReason {
    /// All reasons, in a fixed order.
    pub const ALL: [Self; 5] = [Self::Expired, Self::Taken, Self::MaxHold, Self::Closed, Self::ShardMap];

    /// The word for it that metrics and scripts see.
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
            Self::ShardMap => "its shard has another shard map by now; `shardlock map show` has both",
        })
    }
}

/// A value that is outside its bounds: which one, what it was, and what it may be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} is {value}, but must be {bound}")]
pub struct Invalid {
    /// The name of the field, the same in the builder, a file and the environment.
    pub field: String,
    /// The value that was given, with any password left out.
    pub value: String,
    /// What is allowed.
    pub bound: String,
}

impl Invalid {
    pub(crate) fn new(field: impl Into<String>, value: impl Into<String>, bound: impl Into<String>) -> Self {
        Self {
            field: field.into(),
            value: value.into(),
            bound: bound.into(),
        }
    }
}
