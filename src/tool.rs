//! What only the command-line tool and this crate's own tests need: settings by name, the servers
//! behind a URL, the stored form of keys and maps, retries, and output for terminals.
//!
//! This module is hidden because it is not part of the API: it may change in any release.

use std::time::Duration;

use deadpool_redis::redis::RedisError;

pub use crate::backoff::Backoff;
pub use crate::endpoint::ServerUrl;
pub use crate::identity::manager_of;
pub use crate::telemetry::agent_table as agent_metrics;
pub use crate::text::{must_be_escaped, printable};

use crate::config::Config;
use crate::endpoint::Endpoint;
use crate::error::{InvalidSetting, LockError};
use crate::identity::parse_owner_tag;
use crate::key::LockKey;
use crate::manager::LockManager;
use crate::router::ShardMap;
#[cfg(doc)]
use crate::store::Holder;
use crate::store::KeyState;
use crate::store::redis::MARKER;

/// Returns the names of all settings, each with a one-line description.
pub fn fields() -> impl ExactSizeIterator<Item = (&'static str, &'static str)> {
    Config::fields()
}

/// Sets one value by its name, from text: `set(&mut config, "ttl", "10s")`.
///
/// Durations are written like `500ms`, `10s` or `2m`. `timeout`, `max_hold`, `max_burst`,
/// `slow_wait`, `long_hold`, `username`, `password`, `password_file` and the `tls_` files may be
/// `none`. `shards` is a list of `url` or `name=url`, separated by commas or spaces; it replaces
/// the previous shards.
///
/// # Errors
///
/// [`InvalidSetting`] if there is no such setting, or if the value can't be parsed or is outside
/// its bounds. Nothing has been changed in that case.
pub fn set(config: &mut Config, name: &str, value: &str) -> Result<(), InvalidSetting> {
    config.set(name, value)
}

/// Puts the login of the settings (`username`, `password`, `password_file`) into the URLs of shards
/// that have none, for what connects to servers without a manager. A password file is read now.
///
/// # Errors
///
/// [`InvalidSetting`] if the file can't be read or has no password, or if a URL is invalid.
pub fn put_login_into_urls(config: &mut Config) -> Result<(), InvalidSetting> {
    config.put_login_into_urls()
}

/// Like [`Config::apply_env`], with variables from another source. Variables that do not start with
/// `SHARDLOCK_` are ignored.
///
/// # Errors
///
/// The errors of [`Config::apply_env`].
pub fn apply_variables(
    config: &mut Config,
    variables: impl IntoIterator<Item = (String, String)>,
) -> Result<(), InvalidSetting> {
    config.apply_variables(variables)
}

/// Returns what the servers of one shard must have stored under [`map_key`]: a single fingerprint,
/// or for a quorum one per node, in the order of its URL. Empty if there is no such shard. Nothing
/// is sent.
#[must_use]
pub fn fingerprints_at(config: &Config, shard: usize) -> Vec<String> {
    config.fingerprints_at(shard)
}

/// Returns the name of the Redis key under which the fingerprint of the shard map is stored.
#[must_use]
pub fn map_key(config: &Config) -> String {
    config.map_key()
}

/// Returns the key whose lease has this name in Redis, or `None` if the name is not a lease of this
/// namespace.
#[must_use]
pub fn key_of_lease(config: &Config, name: &str) -> Option<LockKey> {
    config.key_of_lease(name)
}

/// Returns the key of a holder or a waiter whose entry has this name in etcd, or `None` if the name
/// is not such an entry of this namespace.
#[cfg(feature = "etcd")]
#[must_use]
pub fn key_of_etcd_entry(config: &Config, name: &[u8]) -> Option<LockKey> {
    crate::store::etcd::key_of_entry(&config.namespace, name)
}

/// Who has a key, from the value of its lease in Redis ([`key_of_lease`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseOwner<'a> {
    /// A cycle of the manager with this name.
    Manager(&'a str),
    /// Cycles that hold the key together: shared holders, or holders of permits.
    Several,
    /// A client of another library.
    Other,
}

/// Returns who has a key whose lease in Redis has this value.
#[must_use]
pub fn owner_of_lease(value: &str) -> LeaseOwner<'_> {
    match manager_of(value) {
        Some(manager) => LeaseOwner::Manager(manager),
        None if value == MARKER => LeaseOwner::Several,
        None => LeaseOwner::Other,
    }
}

/// Registers the descriptions of the agent's metrics with the installed recorder.
pub fn describe_agent_metrics() {
    crate::telemetry::describe(agent_metrics::AGENT_METRICS);
}

/// The outcome of [`break_lease`].
#[derive(Debug)]
pub enum BreakOutcome {
    /// The lease is no longer the owner's, and was passed on.
    Done {
        /// The key before that.
        before: KeyState,
    },
    /// The owner does not have the lease. Nothing was changed.
    NotHeld {
        /// The key as it is.
        now: KeyState,
    },
}

/// Ends the lease of `owner` on a key and passes the key on to the next waiter, with a new token,
/// as the owner's release would. `owner` is what [`Holder::owner`] shows: one holder of a key that
/// is held together, or the value of another library.
///
/// The owner's process is not notified. It learns of the loss when it next renews the lease, and
/// may use the key until then; the tokens of later holders are larger than all tokens of the lease.
///
/// # Errors
///
/// [`LockErrorKind::Refused`](crate::error::LockErrorKind::Refused) on `redlock://` and `etcd://`
/// shards, which can't do that, and the errors of [`LockManager::inspect`]. After an error of the
/// break itself it is unknown whether the lease was ended: inspect the key.
pub async fn break_lease(locks: &LockManager, key: &LockKey, owner: &str) -> Result<BreakOutcome, LockError> {
    let shard = locks.inner.shard(key);
    let state = shard.inspect(key).await?;
    let is_listed = state
        .holder
        .iter()
        .chain(&state.holders)
        .any(|holder| holder.owner == owner);
    // Only the first holders are listed. One that waits must not be removed from the queue.
    let may_be_unlisted = state.holder_count > state.holders.len() as u64
        && state.queue.len() as u64 == state.queue_length
        && !state.queue.iter().any(|waiting| waiting == owner);
    if !is_listed && !may_be_unlisted {
        return Ok(BreakOutcome::NotHeld { now: state });
    }
    if shard.break_lease(key, owner).await? {
        return Ok(BreakOutcome::Done { before: state });
    }
    let now = shard.inspect(key).await?;
    Ok(BreakOutcome::NotHeld { now })
}

/// Returns the servers in the URL, in its order: Redis servers, sentinels, nodes of a cluster or of
/// a quorum, or members of etcd. Empty for `memory://`.
#[must_use]
pub fn servers(endpoint: &Endpoint) -> Vec<ServerUrl> {
    endpoint.servers()
}

/// Returns the URL of a server at `host:port` that belongs to the shard but need not be in its URL,
/// such as one reported by sentinels or by nodes of a cluster. `None` for `memory://`.
#[must_use]
pub fn server_at(endpoint: &Endpoint, place: &str) -> Option<ServerUrl> {
    endpoint.server_at(place)
}

/// Returns the name by which the sentinels of a `redis+sentinel://` shard know its primary.
#[must_use]
pub fn primary_name(endpoint: &Endpoint) -> Option<&str> {
    endpoint.primary_name()
}

/// Returns whether this owner of a lease is a cycle that was released before its `min_hold` had
/// passed.
#[must_use]
pub fn is_kept_by_min_hold(owner: &str) -> bool {
    parse_owner_tag(owner).is_some_and(|(_, cycle)| cycle.is_retired())
}

/// Returns whether two stored fingerprints map every key to the same shard.
#[must_use]
pub fn maps_agree(one: &str, other: &str) -> bool {
    ShardMap::agree(one, other)
}

/// Explains why a connection to the server failed during setup with this error. Asks the server if
/// the error has too little detail.
pub async fn why_not_connected(server: &ServerUrl, error: &RedisError, timeout: Duration) -> String {
    crate::store::redis::why_not_connected(server, error, timeout).await
}
