//! The content of errors, and their messages.

use std::time::Duration;

use super::{InvalidSetting, LossReason, Reason};
use crate::fence::FencingToken;
use crate::mode::LockMode;

/// The content of a [`LockError`], in which the crate itself matches.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum Failure {
    #[error(transparent)]
    Invalid(#[from] InvalidSetting),

    #[error(
        "timed out waiting for lock {key:?} on shard {shard}; raise the timeout, or look at who holds it with `shardlock inspect`"
    )]
    Timeout {
        key: String,
        shard: String,
        waited: Duration,
        limit: Duration,
    },

    #[error(
        "{waiting} tasks of this process already wait for lock {key:?} (max_waiters_per_key = {limit}); shed load or raise the limit"
    )]
    QueueFull {
        key: String,
        shard: String,
        waiting: usize,
        limit: usize,
    },

    #[error("shard {shard:?} cannot hold {key:?} in mode {mode}: {reason}; use another kind of shard for it")]
    Unsupported {
        key: String,
        shard: String,
        mode: LockMode,
        /// What the shard lacks.
        reason: &'static str,
    },

    #[error(
        "{waiting} tasks of this process already wait for locks, so {key:?} was refused (max_waiters = {limit}); shed load or raise the limit"
    )]
    TooManyWaiters {
        key: String,
        shard: String,
        waiting: usize,
        limit: usize,
    },

    #[error(
        "this process already uses {used} keys, so {key:?} was refused (max_keys = {limit}); release some or raise the limit"
    )]
    TooManyKeys {
        key: String,
        shard: String,
        used: usize,
        limit: usize,
    },

    #[error(
        "shard {shard} holds {leases} leases, more than it can renew in time, so {key:?} was refused; release some, or use longer ttls or more shards"
    )]
    TooManyLeases { key: String, shard: String, leases: usize },

    #[error(
        "shard {shard} is down and {waiting} keys wait for its return (at most {limit} may), so {key:?} was refused; try again later, or check the server"
    )]
    ShardDown {
        key: String,
        shard: String,
        waiting: usize,
        limit: usize,
    },

    #[error("shard {shard} is unavailable ({step}{}): {reason}; retry, or check the server", on_key(.key))]
    Unavailable {
        shard: String,
        /// The step that failed: `connect`, `acquire`, `release` and so on.
        step: &'static str,
        key: Option<String>,
        waited: Duration,
        reason: Reason,
    },

    #[error("shard {shard} refused ({step}{}): {reason}", on_key(.key))]
    Refused {
        shard: String,
        step: &'static str,
        key: Option<String>,
        /// The message of the server, and what to do about it.
        reason: Reason,
    },

    #[error(
        "shard {shard} is in use with another shard map: the server has `{theirs}` under the key {map_key:?}, this manager has `{ours}`; give \
         every manager the same shards in the same order, or, if the change is intended, stop all managers and replace the map with \
         `shardlock map set` (`shardlock map show` has the maps of all shards)"
    )]
    ShardMapMismatch {
        /// The name of the shard in this manager.
        shard: String,
        ours: String,
        theirs: String,
        /// The key under which the map is stored.
        map_key: String,
    },

    #[error("lock {key:?} (token {token}) was lost: {reason}")]
    Lost {
        key: String,
        shard: String,
        token: FencingToken,
        reason: LossReason,
    },

    #[error(
        "shard {shard} issued token {token} for lock {key:?} after {floor} had been seen; the lock was released; check the server's clock and data"
    )]
    TokenRegression {
        key: String,
        shard: String,
        token: u64,
        /// The token should have been larger than this number.
        floor: u64,
    },

    #[error("the lock manager was shut down")]
    Closed,
}

fn on_key(key: &Option<String>) -> String {
    key.as_ref().map(|key| format!(" {key:?}")).unwrap_or_default()
}
