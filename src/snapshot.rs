//! Snapshots of a manager: its hottest keys, the locks it holds, the state of its shards.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use crate::clock::Moment;
use crate::driver::{Entry, Shard};
use crate::fence::FencingToken;
use crate::manager_inner::ManagerInner;
use crate::mode::LockMode;

/// One of the keys with the most contention in this process. See
/// [`LockManager::hot_keys`](crate::LockManager::hot_keys).
///
/// Counts are halved every five minutes, so they reflect about the last quarter of an hour rather
/// than the whole life of the process.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct HotKey {
    /// The key.
    pub key: String,
    /// The name of its shard.
    pub shard: String,
    /// The number of requests that found the key held or waited for: they waited, were handed the
    /// lock, gave up, or were tries that failed. Never too small; too large by at most
    /// `overcount_max`.
    pub contended: u64,
    /// The number of contended requests that got the lock, counted since the key entered the list.
    pub acquired: u64,
    /// The most by which `contended` may be too large: a key that enters the list takes over the
    /// count of the key it replaces.
    pub overcount_max: u64,
    /// The number of tasks of this process that wait for the key now.
    pub waiters: usize,
    /// The guard of this process that has held the key for longest, if any holds it now.
    pub holder: Option<HotKeyHolder>,
    /// The waits of the contended requests that got the lock.
    #[cfg_attr(feature = "serde", serde(rename = "wait_ms"))]
    pub waits: Waits,
}

/// How long requests waited for a [`HotKey`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct Waits {
    /// The median, accurate to within a factor of two.
    #[cfg_attr(feature = "serde", serde(with = "crate::millis"))]
    pub p50: Duration,
    /// The 99th percentile, accurate to within a factor of two.
    #[cfg_attr(feature = "serde", serde(with = "crate::millis"))]
    pub p99: Duration,
    /// The longest wait.
    #[cfg_attr(feature = "serde", serde(with = "crate::millis"))]
    pub max: Duration,
}

/// The guard that holds a [`HotKey`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct HotKeyHolder {
    /// How long it has been held.
    #[cfg_attr(feature = "serde", serde(rename = "held_ms", with = "crate::millis"))]
    pub held: Duration,
    /// Its fencing token.
    pub token: FencingToken,
}

/// An outstanding guard of this process. See [`LockManager::held`](crate::LockManager::held).
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct HeldLock {
    /// The key.
    pub key: String,
    /// The name of its shard.
    pub shard: String,
    /// The owner of the lease as written in the store: `manager:cycle`.
    pub owner: String,
    /// The mode in which the key is held.
    #[cfg_attr(feature = "serde", serde(default, skip_serializing_if = "LockMode::is_usual"))]
    pub mode: LockMode,
    /// The fencing token.
    pub token: FencingToken,
    /// How long it has been held.
    #[cfg_attr(feature = "serde", serde(rename = "age_ms", with = "crate::millis"))]
    pub age: Duration,
    /// How long it is certainly held if no further renewal succeeds; zero after a loss.
    #[cfg_attr(feature = "serde", serde(rename = "remaining_ms", with = "crate::millis"))]
    pub remaining: Duration,
    /// The number of tasks of this process that wait for the key.
    pub waiters: usize,
    /// The place in the program that requested the lock, as `file:line:column`.
    pub caller: Option<String>,
}

/// The state of a shard as seen by this manager. See
/// [`LockManager::shard_states`](crate::LockManager::shard_states).
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct ShardState {
    /// Its name.
    pub name: String,
    /// The scheme of its URL, such as `redis` or `memory`.
    pub kind: String,
    /// Whether the last request was answered and the shard accepts locks. Every shard is probed
    /// every few seconds even without requests: its primary, each primary of a cluster, a majority
    /// of a quorum or of etcd. The probe of a Redis server is a write that changes nothing, so a
    /// server counts as down if it is out of memory, can't persist, lacks replicas, is a replica or
    /// does not let the user write.
    #[cfg_attr(feature = "serde", serde(rename = "up"))]
    pub is_up: bool,
    /// Why the last request failed, if the shard is down. May name a server, but never contains a
    /// password.
    #[cfg_attr(feature = "serde", serde(default, skip_serializing_if = "Option::is_none"))]
    pub reason: Option<String>,
    /// How long the shard has been down, if it is.
    #[cfg_attr(
        feature = "serde",
        serde(
            default,
            rename = "down_for_ms",
            skip_serializing_if = "Option::is_none",
            with = "crate::millis::optional"
        )
    )]
    pub down_for: Option<Duration>,
    /// The number of leases that this process holds on the shard.
    pub leases: usize,
    /// The number of these leases that linger without a guard
    /// ([`Config::linger`](crate::config::Config::linger)), including those whose release after
    /// that is in progress.
    #[cfg_attr(feature = "serde", serde(default))]
    pub lingering: usize,
    /// The number of tasks of this process that wait for locks of the shard.
    pub waiters: usize,
    /// The number of locks acquired on the shard.
    pub acquired: u64,
    /// The number of these locks that were handed over by another task of this process.
    pub local: u64,
    /// The number of these locks that were handed over by another process, after waiting.
    pub remote: u64,
    /// How long all round trips took.
    #[cfg_attr(feature = "serde", serde(rename = "round_trip_ms"))]
    pub round_trips: RoundTrips,
}

/// How long the round trips to a shard took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct RoundTrips {
    /// The median, accurate to within a factor of two.
    #[cfg_attr(feature = "serde", serde(with = "crate::millis"))]
    pub p50: Duration,
    /// The 99th percentile, accurate to within a factor of two.
    #[cfg_attr(feature = "serde", serde(with = "crate::millis"))]
    pub p99: Duration,
}

pub(crate) fn hot_keys(manager: &ManagerInner) -> Vec<HotKey> {
    let now = Moment::now();
    let shards: HashMap<&str, &Shard> = manager.shards.iter().map(|shard| (&*shard.name, &**shard)).collect();
    for shard in shards.values() {
        shard.entries().iter().for_each(|entry| Entry::flush_contention(entry));
    }
    let hottest = manager.context.hot.hottest().into_iter();
    let snapshots = hottest.map(|hot| {
        let shard = shards.get(&*hot.shard);
        let entries = shard.map_or_else(Vec::new, |shard| shard.entries_of(&hot.key));
        let snapshots: Vec<_> = entries.iter().map(|entry| entry.snapshot(now)).collect();
        let held = snapshots
            .iter()
            .flat_map(|snapshot| &snapshot.held)
            .max_by_key(|held| held.age);
        HotKey {
            key: hot.key.to_string(),
            shard: hot.shard.to_string(),
            contended: hot.contended,
            acquired: hot.acquired,
            overcount_max: hot.overcount_max,
            waiters: snapshots.iter().map(|snapshot| snapshot.waiting).sum(),
            holder: held.map(|held| HotKeyHolder {
                held: held.age,
                token: held.token,
            }),
            waits: Waits {
                p50: hot.wait_p50,
                p99: hot.wait_p99,
                max: hot.wait_max,
            },
        }
    });
    snapshots.collect()
}

/// The oldest `most` guards, oldest first, and the total number of guards.
pub(crate) fn held(manager: &ManagerInner, most: usize) -> (usize, Vec<HeldLock>) {
    let now = Moment::now();
    let mut held = Vec::new();
    for shard in &manager.shards {
        for entry in shard.entries() {
            let snapshot = entry.snapshot(now);
            for lock in snapshot.held {
                held.push((lock, snapshot.waiting, Arc::clone(&entry)));
            }
        }
    }
    let total = held.len();
    held.sort_by_key(|(lock, ..)| std::cmp::Reverse(lock.age));
    held.truncate(most);
    let locks = held.into_iter().map(|(lock, waiters, entry)| HeldLock {
        key: entry.key.to_string(),
        shard: entry.shard.name.to_string(),
        owner: entry.shard.owner_tag(lock.cycle),
        mode: lock.cycle.mode(),
        token: lock.token,
        age: lock.age,
        remaining: lock.remaining,
        waiters,
        caller: lock.caller.map(ToString::to_string),
    });
    (total, locks.collect())
}

pub(crate) fn shards(manager: &ManagerInner) -> Vec<ShardState> {
    let now = Moment::now();
    let snapshots = manager.shards.iter().map(|shard| {
        let metrics = &shard.metrics;
        let down = shard.down();
        let [acquired, local, remote] = metrics.acquisitions();
        let [p50, p99] = metrics.round_trips();
        ShardState {
            name: shard.name.to_string(),
            kind: shard.kind.to_string(),
            is_up: metrics.is_up(),
            down_for: down.as_ref().map(|down| now.since(down.since)),
            reason: down.map(|down| down.reason),
            leases: metrics.leases(),
            lingering: metrics.lingering(),
            waiters: metrics.waiters(),
            acquired,
            local,
            remote,
            round_trips: RoundTrips { p50, p99 },
        }
    });
    snapshots.collect()
}
