//! A Redis Cluster as a shard: real nodes, slots that move, primaries that die.

// A test is over when its surroundings fail.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

mod support;
mod support_locks;

use std::future::IntoFuture;
use std::time::{Duration, Instant};

use shardlock::{Builder, LockError, LockGuard, LockManager, Slot};
use support::{ClientType, Cluster};
use support_locks::{SHORT_TTL, lock, soon, until, until_queued};

/// Longer than a failover takes.
const PATIENT: Duration = Duration::from_secs(10);

fn builder(cluster: &Cluster) -> Builder {
    LockManager::builder().shard(cluster.url()).store_timeout(PATIENT)
}

async fn connect(cluster: &Cluster) -> LockManager {
    builder(cluster).connect().await.expect("connect")
}

/// The slot of a plain key's lease on the cluster.
fn slot(key: &str) -> u16 {
    Slot::of(format!("lock:{key}").as_bytes()).number()
}

/// A key whose slot the node with this index owns.
fn key_on(cluster: &Cluster, node: usize) -> String {
    let mut names = (0..).map(|number| format!("key-{number}"));
    names.find(|key| cluster.owner(slot(key)) == node).expect("some key")
}

/// The keys that belong to single locks.
fn lock_keys(cluster: &Cluster) -> Vec<String> {
    let mut keys = cluster.keys();
    keys.retain(|key| !key.starts_with("lock:%map") && !key.starts_with("lock:%fence:"));
    keys
}

async fn is_empty(cluster: &Cluster) {
    until("nothing is left", async || lock_keys(cluster).is_empty()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_of_all_shapes_are_locked_handed_on_and_given_back() {
    let cluster = Cluster::start(3, 0);
    // Each names another node, and learns of the others.
    let one = LockManager::connect(&cluster.url_of(0)).await.expect("connect");
    let other = LockManager::connect(&cluster.url_of(1)).await.expect("connect");
    let long = "x".repeat(512);
    let keys = [
        "plain",
        "a:b",
        "{tag}key",
        "{}",
        "a}b{",
        "100%",
        "with space\\",
        "clé",
        "A",
        "a",
        &long,
    ];
    for key in keys {
        let guard = lock(&one, key).await;
        assert!(other.try_lock(key).await.expect("try").is_none(), "{key}");
        let waiting = tokio::spawn({
            let (other, key) = (other.clone(), key.to_owned());
            async move { lock(&other, &key).await }
        });
        until_queued(&one, key, 1).await;
        let seen = one.inspect(key).await.expect("inspect");
        let holder = seen.holder.expect("held");
        assert!(holder.owner.starts_with(one.id()), "{seen:?}", seen = holder.owner);
        assert!(seen.queue[0].starts_with(other.id()), "{:?}", seen.queue);
        let started = Instant::now();
        let token = guard.token();
        guard.release().await.expect("release");
        let next = soon("the hand-off", waiting).await.expect("a task");
        assert!(next.token() > token, "{key}");
        assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
        next.release().await.expect("release");
    }
    is_empty(&cluster).await;
    one.shutdown().await;
    other.shutdown().await;
    drop((one, other));
    until("no channel is left", async || cluster.shard_channels().is_empty()).await;
}

/// Waits for a key on a task of its own.
fn waiting(locks: &LockManager, key: &str) -> tokio::task::JoinHandle<LockGuard> {
    let (locks, key) = (locks.clone(), key.to_owned());
    tokio::spawn(async move { lock(&locks, &key).await })
}

async fn hand_over(guard: LockGuard, waiting: tokio::task::JoinHandle<LockGuard>) -> LockGuard {
    let token = guard.token();
    guard.release().await.expect("release");
    let next = soon("the hand-off", waiting).await.expect("a task");
    assert!(next.token() > token, "{} after {token}", next.token());
    next
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_costs_two_script_calls_and_a_hand_off_two_and_a_publish() {
    let cluster = Cluster::start(3, 0);
    let (one, other) = (connect(&cluster).await, connect(&cluster).await);
    // Both know the script and the slot's inbox.
    let guard = lock(&one, "k").await;
    let next = waiting(&other, "k");
    until_queued(&one, "k", 1).await;
    let guard = hand_over(guard, next).await;
    let next = waiting(&one, "k");
    until_queued(&one, "k", 1).await;
    hand_over(guard, next).await.release().await.expect("release");

    cluster.reset_stats();
    for _ in 0..10 {
        lock(&one, "free").await.release().await.expect("release");
    }
    let (calls, publishes) = (cluster.script_calls(), cluster.publishes());
    println!("10 locks of a free key: {calls} script calls, {publishes} publishes");
    // The node may see one of the two scripts for the first time.
    assert!((20..=22).contains(&calls) && publishes == 0, "{calls} {publishes}");

    let mut guard = lock(&one, "k").await;
    let mut next = waiting(&other, "k");
    until_queued(&one, "k", 1).await;
    guard = hand_over(guard, next).await;
    next = waiting(&one, "k");
    until_queued(&other, "k", 1).await;
    cluster.reset_stats();
    const ROUNDS: u64 = 20;
    for round in 0..ROUNDS {
        let (holder, rival) = if round % 2 == 0 { (&one, &other) } else { (&other, &one) };
        guard = hand_over(guard, next).await;
        next = waiting(rival, "k");
        until_queued(holder, "k", 1).await;
    }
    let (calls, publishes) = (cluster.script_calls(), cluster.publishes());
    println!("{ROUNDS} hand-offs: {calls} script calls, {publishes} publishes");
    assert_eq!(calls, 2 * ROUNDS);
    assert!(publishes <= ROUNDS + 1, "{publishes}");
    hand_over(guard, next).await.release().await.expect("release");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_waits_while_the_slot_moves_is_served_and_the_lease_lives_on() {
    let cluster = Cluster::start(3, 0);
    let short = || builder(&cluster).ttl(Duration::from_secs(2)).connect();
    let (one, other) = (short().await.expect("connect"), short().await.expect("connect"));
    let key = key_on(&cluster, 0);
    let guard = lock(&one, &key).await;
    let next = waiting(&other, &key);
    until_queued(&one, &key, 1).await;

    // A move in one go: the inbox follows.
    cluster.migrate_slot(slot(&key), 1);
    until("the inbox has moved", async || {
        !cluster.nodes()[1].shard_channels().is_empty()
    })
    .await;
    let guard = hand_over(guard, next).await;

    // A move that takes longer than a lease: it is renewed meanwhile, on both sides.
    cluster.begin_migration(slot(&key), 1, 2);
    assert!(
        tokio::time::timeout(Duration::from_secs(3), guard.lost())
            .await
            .is_err()
    );
    cluster.move_keys(slot(&key), 1, 2);
    assert!(
        tokio::time::timeout(Duration::from_secs(3), guard.lost())
            .await
            .is_err()
    );
    let next = waiting(&one, &key);
    cluster.finish_migration(slot(&key), 1, 2);
    until_queued(&one, &key, 1).await;
    hand_over(guard, next).await.release().await.expect("release");
    is_empty(&cluster).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_subscription_is_back_and_nobody_waits_in_vain() {
    let cluster = Cluster::start(3, 0);
    let (one, other) = (connect(&cluster).await, connect(&cluster).await);
    let key = key_on(&cluster, 1);
    for round in 0..10 {
        let guard = lock(&one, &key).await;
        let next = waiting(&other, &key);
        until_queued(&one, &key, 1).await;
        // In one half of the rounds the grant is published while nobody listens, in the other it comes afterwards.
        assert!(cluster.nodes()[1].client_kill(ClientType::PubSub) >= 1);
        if round % 2 == 0 {
            until("the inbox is back", async || !cluster.shard_channels().is_empty()).await;
        }
        let started = Instant::now();
        hand_over(guard, next).await.release().await.expect("release");
        assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
    }
    is_empty(&cluster).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_primary_costs_nobody_a_lock_that_its_replica_has() {
    let cluster = Cluster::start(3, 3);
    let one = builder(&cluster)
        .min_replicas_acked(1)
        .connect()
        .await
        .expect("connect");
    let other = builder(&cluster)
        .min_replicas_acked(1)
        .connect()
        .await
        .expect("connect");
    let key = key_on(&cluster, 0);
    let elsewhere = key_on(&cluster, 1);
    let guard = lock(&one, &key).await;
    let kept = lock(&one, &elsewhere).await;
    let next = waiting(&other, &key);
    until_queued(&one, &key, 1).await;
    let (dead, _) = cluster.fail_over(slot(&key));
    assert_eq!(dead, 0);
    // As a replica, with nothing but what the new primary gives it: a lease counts again when it has it.
    cluster.nodes()[dead].restart();
    // Still held, by who held it.
    until("its replica answers", async || other.inspect(&key).await.is_ok()).await;
    assert!(guard.is_valid() && kept.is_valid());
    assert!(other.try_lock(&key).await.expect("try").is_none());
    hand_over(guard, next).await.release().await.expect("release");
    kept.release().await.expect("release");
    is_empty(&cluster).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_that_hangs_is_left_when_its_replica_takes_over() {
    let cluster = Cluster::start(3, 3);
    let (one, other) = (connect(&cluster).await, connect(&cluster).await);
    let key = key_on(&cluster, 2);
    let guard = lock(&one, &key).await;
    let next = waiting(&other, &key);
    until_queued(&one, &key, 1).await;
    let hanging = &cluster.nodes()[2];
    hanging.stop();
    // No connection breaks. The release goes to the replica in the end.
    hand_over(guard, next).await.release().await.expect("release");
    hanging.cont();
    cluster.wait_until_in_order();
    let guard = lock(&one, &key).await;
    let next = waiting(&other, &key);
    until_queued(&one, &key, 1).await;
    hand_over(guard, next).await.release().await.expect("release");
}
