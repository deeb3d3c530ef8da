//! What a manager says of itself: its hottest keys, what it holds, how its shards are.

use std::collections::HashMap;
use std::time::Duration;

use crate::clock::Moment;
use crate::fence::FencingToken;
use crate::manager::Inner;
use crate::shard::{Entry, Shard};

/// One of the keys with the most contention in this process. See [`LockManager::hot_keys`](crate::LockManager::hot_keys).
///
/// The counts fade: what was counted more than some minutes ago weighs half, then a quarter, and so on, so that they tell of the last quarter of
/// an hour rather than of the process's whole life.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct HotKey {
    /// The key.
    pub key: String,
    /// The name of its shard.
    pub shard: String,
    /// How many requests found it held or wanted: they waited, were handed the lock, gave up, or were tries that failed. It is never too small, and by
    /// at most `error` too large.
    pub contended: u64,
    /// How many of them got the lock, since the key is among the hottest.
    pub acquired: u64,
    /// By how much `contended` may be too large: a key that is new among the hottest takes over the count of the one it replaces.
    pub error: u64,
    /// How many tasks of this process wait for it now.
    pub waiters: usize,
    /// The guard of this process that is out now, if one is.
    pub holder: Option<HotKeyHolder>,
    /// How long the half of those who got it waited at most.
    pub wait_p50: Duration,
    /// How long 99 of 100 of those who got it waited at most. Quantiles are right within a factor of two.
    pub wait_p99: Duration,
    /// The longest wait.
    pub wait_max: Duration,
}

/// The guard that holds a [`HotKey`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct HotKeyHolder {
    /// For how long.
    pub held: Duration,
    /// Its fencing token.
    pub token: FencingToken,
}

/// A guard of this process that is out. See [`LockManager::held`](crate::LockManager::held).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct HeldLock {
    /// The key.
    pub key: String,
    /// The name of its shard.
    pub shard: String,
    /// Who holds the lease, as it stands in the store: `manager:cycle`.
    pub owner: String,
    /// The fencing token.
    pub token: FencingToken,
    /// For how long it is held.
    pub age: Duration,
    /// How long it is certainly held if no further renewal succeeds; zero after a loss.
    pub remaining: Duration,
    /// How many tasks of this process wait for it.
    pub waiters: usize,
    /// The place in the program that asked for it, as `file:line:column`.
    pub caller: Option<String>,
}

/// A shard, as this manager sees it. See [`LockManager::shards`](crate::LockManager::shards).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ShardState {
    /// Its name.
    pub name: String,
    /// The scheme of its URL, such as `redis` or `memory`.
    pub kind: String,
    /// Whether the last request was answered, and the shard takes locks. Every shard is asked every few seconds even if nobody locks: its primary,
    /// each primary of a cluster, a majority of a quorum or of etcd. A Redis server is asked by a write that changes nothing, so one that is out
    /// of memory, can't persist, lacks replicas or is a replica is down.
    pub is_up: bool,
    /// How many leases this process holds there.
    pub leases: usize,
    /// How many of them it keeps without a guard ([`Config::linger`](crate::Config::linger)), or is just giving back after that.
    pub lingering: usize,
    /// How many tasks of this process wait there.
    pub waiters: usize,
    /// How many locks were had there.
    pub acquired: u64,
    /// How many of them from another task of this process.
    pub local: u64,
    /// How many of them from another process, after waiting.
    pub remote: u64,
    /// The median of all round trips, within a factor of two.
    pub round_trip_p50: Duration,
    /// The 99th percentile of all round trips, within a factor of two.
    pub round_trip_p99: Duration,
}

pub(crate) fn hot_keys(manager: &Inner) -> Vec<HotKey> {
    let now = Moment::now();
    let shards: HashMap<&str, &Shard> = manager.shards.iter().map(|shard| (&*shard.name, &**shard)).collect();
    for shard in shards.values() {
        shard.entries().iter().for_each(|entry| Entry::tell_heat(entry));
    }
    let hottest = manager.hot.hottest().into_iter();
    let as_seen = hottest.map(|hot| {
        let entry = shards.get(&*hot.shard).and_then(|shard| shard.entry(&hot.key));
        let seen = entry.map(|entry| entry.look(now));
        let held = seen.as_ref().and_then(|seen| seen.held.as_ref());
        HotKey {
            key: hot.key.to_string(),
            shard: hot.shard.to_string(),
            contended: hot.contended,
            acquired: hot.acquired,
            error: hot.error,
            waiters: seen.as_ref().map_or(0, |seen| seen.waiting),
            holder: held.map(|held| HotKeyHolder {
                held: held.age,
                token: held.token,
            }),
            wait_p50: hot.wait_p50,
            wait_p99: hot.wait_p99,
            wait_max: hot.wait_max,
        }
    });
    as_seen.collect()
}

/// The oldest first, at most so many, and how many there are in all.
pub(crate) fn held(manager: &Inner, most: usize) -> (usize, Vec<HeldLock>) {
    let now = Moment::now();
    let mut held = Vec::new();
    for shard in &manager.shards {
        for entry in shard.entries() {
            let seen = entry.look(now);
            if let Some(lock) = seen.held {
                held.push((lock, seen.waiting, entry));
            }
        }
    }
    let total = held.len();
    held.sort_by_key(|(lock, ..)| std::cmp::Reverse(lock.age));
    held.truncate(most);
    let in_words = held.into_iter().map(|(lock, waiters, entry)| HeldLock {
        key: entry.key.to_string(),
        shard: entry.shard.name.to_string(),
        owner: entry.shard.sign(lock.cycle),
        token: lock.token,
        age: lock.age,
        remaining: lock.remaining,
        waiters,
        caller: lock.caller.map(ToString::to_string),
    });
    (total, in_words.collect())
}

pub(crate) fn shards(manager: &Inner) -> Vec<ShardState> {
    let as_seen = manager.shards.iter().map(|shard| {
        let metrics = &shard.metrics;
        let [acquired, local, remote] = metrics.acquisitions();
        let [round_trip_p50, round_trip_p99] = metrics.round_trips();
        ShardState {
            name: shard.name.to_string(),
            kind: shard.kind.to_string(),
            is_up: metrics.is_up(),
            leases: metrics.leases(),
            lingering: metrics.lingering(),
            waiters: metrics.waiters(),
            acquired,
            local,
            remote,
            round_trip_p50,
            round_trip_p99,
        }
    });
    as_seen.collect()
}
