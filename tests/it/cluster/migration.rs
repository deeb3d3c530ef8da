//! Slots that are moved to another node while their keys are locked or waited for.

use std::time::Duration;

use shardlock::error::LockErrorKind;
use support::{Cluster, RedisServer};
use support_locks::{lock, soon, until, until_queued};

use super::{PATIENT, builder, connect, connected, hand_over, is_empty, key_on, names, slot, waiting};

/// The TTL of leases that are renewed while a slot moves.
const TTL: Duration = Duration::from_secs(3);
/// Longer than a lease lasts without a renewal.
const LONGER: Duration = Duration::from_millis(3_500);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waiter_is_served_and_lease_survives_while_the_slot_moves() {
    let cluster = Cluster::start(3, 0);
    let short = || connected(builder(&cluster).ttl(TTL));
    let (one, other) = (short().await, short().await);
    let key = key_on(&cluster, 0);
    let guard = lock(&one, &key).await;
    let next = waiting(&other, &key);
    until_queued(&one, &key, 1).await;

    // The slot migrates at once, and the inbox follows.
    cluster.migrate_slot(slot(&key), 1);
    until("the inbox has moved", async || {
        !cluster.nodes()[1].shard_channels().is_empty()
    })
    .await;
    let guard = hand_over(guard, next).await;

    // The migration takes longer than a lease lasts. The lease is renewed meanwhile, on both sides.
    cluster.begin_migration(slot(&key), 1, 2);
    assert!(tokio::time::timeout(LONGER, guard.lost()).await.is_err());
    cluster.move_keys(slot(&key), 1, 2);
    assert!(tokio::time::timeout(LONGER, guard.lost()).await.is_err());
    let next = waiting(&one, &key);
    cluster.finish_migration(slot(&key), 1, 2);
    until_queued(&one, &key, 1).await;
    hand_over(guard, next).await.release().await.expect("release");
    is_empty(&cluster).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shared_leases_and_permits_survive_while_the_slot_moves() {
    let cluster = Cluster::start(3, 0);
    let short = || connected(builder(&cluster).ttl(TTL));
    let (one, other) = (short().await, short().await);
    let key = key_on(&cluster, 0);
    let reader = one.lock(&*key).shared().timeout(PATIENT).await.expect("lock");
    let permit = other.permits(&*key, 2).timeout(PATIENT).await.expect("lock");

    // The migration takes longer than a lease lasts. The leases are renewed meanwhile, on both
    // sides.
    let none_is_lost = async || {
        let lost = async {
            tokio::select! {
                reason = reader.lost() => reason,
                reason = permit.lost() => reason,
            }
        };
        assert!(tokio::time::timeout(LONGER, lost).await.is_err());
    };
    cluster.begin_migration(slot(&key), 0, 1);
    none_is_lost().await;
    cluster.move_keys(slot(&key), 0, 1);
    none_is_lost().await;
    cluster.finish_migration(slot(&key), 0, 1);

    let next = waiting(&one, &key);
    until_queued(&one, &key, 1).await;
    let state = other.inspect(&*key).await.expect("inspect");
    assert_eq!((state.holder, state.holder_count, state.permits_in_use), (None, 2, 1));
    reader.release().await.expect("release");
    hand_over(permit, next).await.release().await.expect("release");
    is_empty(&cluster).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_for_a_migrating_slot_are_retried_until_it_has_moved() {
    let cluster = Cluster::start(3, 0);
    let (one, other) = (connect(&cluster).await, connect(&cluster).await);
    let key = key_on(&cluster, 0);
    let number = slot(&key);
    lock(&one, &key).await.release().await.expect("release");

    // MOVED, once for each node.
    for node in [1, 2, 0] {
        cluster.migrate_slot(number, node);
        lock(&one, &key).await.release().await.expect("release");
        lock(&other, &key).await.release().await.expect("release");
    }

    // TRYAGAIN: the counter exists and the lease does not, on either side. ASK redirects between
    // the two.
    cluster.begin_migration(number, 0, 1);
    let impatient = connected(builder(&cluster).store_timeout(Duration::from_secs(2))).await;
    // If the last answer is late, the error only says so.
    let until_unavailable = async |key: &str, words: &str| {
        until("the error gives the reason", async || {
            let error = impatient
                .lock(key)
                .await
                .expect_err("the slot moves, or the cluster is down");
            assert!(
                error.kind() == LockErrorKind::Unavailable && error.is_retryable(),
                "{error}"
            );
            assert!(error.to_string().contains(key), "{error}");
            error.to_string().contains(words)
        })
        .await;
    };
    until_unavailable(&key, "TryAgain").await;
    cluster.move_keys(number, 0, 1);
    until_unavailable(&key, "TryAgain").await;
    let calls = cluster.script_calls();
    let waits = waiting(&one, &key);
    let looks = other.inspect(&key).await.expect("a command with one key is answered");
    assert!(looks.holder.is_none());
    cluster.finish_migration(number, 0, 1);
    soon("the slot", waits)
        .await
        .expect("a task")
        .release()
        .await
        .expect("release");
    assert!(
        cluster.script_calls() - calls < 200,
        "{} calls",
        cluster.script_calls() - calls
    );

    // CLUSTERDOWN: one slot has no owner, so no slot is served. Every node must delete the slot,
    // because one that has not still redirects to the last owner. This is repeated until all nodes
    // are down: gossip that the owner sent just before may make another node assign the slot to it
    // again.
    let unowned = key_on(&cluster, 2);
    let down = names()
        .find(|key| slot(key) != slot(&unowned) && cluster.owner(slot(key)) == 2)
        .expect("some key");
    let number = slot(&unowned).to_string();
    cluster.nodes()[2].command(&["CLUSTER", "DELSLOTS", &number]);
    until("all nodes are down", async || {
        let is_down = |node: &RedisServer| {
            let info: String = node.query(&["CLUSTER", "INFO"]);
            info.contains("cluster_state:fail")
        };
        let up: Vec<_> = cluster.nodes().iter().filter(|node| !is_down(node)).collect();
        for node in &up {
            // Returns an error if the slot has no owner already.
            drop(node.try_query::<()>(&["CLUSTER", "DELSLOTS", &number]));
        }
        up.is_empty()
    })
    .await;
    let no_owner = format!("slot {} has no owner", slot(&unowned));
    for (key, words) in [(down, "ClusterDown"), (unowned, no_owner.as_str())] {
        until_unavailable(&key, words).await;
    }
}
