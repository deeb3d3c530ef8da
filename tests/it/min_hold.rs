//! `min_hold`: keys that stay locked after a release.

use std::time::{Duration, Instant};

use shardlock::{LockManager, LossReason};
use support::worker;
use support_locks::{Kind, TestStore, builder_of, connect, lock, on_each_store, until, until_queued, waiting};

/// Longer than the part of a test in which the key must be locked.
const LONG: Duration = Duration::from_secs(600);
/// Short enough to wait for its end.
const SHORT: Duration = Duration::from_millis(1500);

/// The worker's side: acquires a lock with `min_hold` and holds it.
#[tokio::main]
pub(crate) async fn hold(me: &worker::Current) {
    let locks = builder_of(me).min_hold(LONG).connect().await.expect("connect");
    let guard = lock(&locks, "k").await;
    me.send(guard.token().to_string());
    std::future::pending().await
}

async fn is_busy(locks: &LockManager, key: &'static str) -> bool {
    locks.try_lock(key).await.expect("try").is_none()
}

// A quorum's leases are too short for these.
on_each_store! {
    on(memory redis sentinel cluster etcd);

    async fn key_is_not_acquired_before_min_hold_has_passed(store: &TestStore) {
        let (locks, other) = (store.manager().await, store.manager().await);
        let guard = locks.lock("k").min_hold(LONG).await.expect("lock");
        let (own, others) = (waiting(&locks, "k"), waiting(&other, "k"));
        until_queued(&locks, "k", 1).await;
        guard.release().await.expect("release");
        until_queued(&locks, "k", 2).await;
        assert!(is_busy(&locks, "k").await && is_busy(&other, "k").await);
        assert!(!own.is_finished() && !others.is_finished());
        assert!(locks.held().is_empty());
        let holder = locks.inspect("k").await.expect("inspect").holder.expect("it is locked");
        let remaining = holder.remaining.expect("it ends");
        assert!(remaining > LONG / 2 && remaining <= LONG + Duration::from_secs(2), "{remaining:?}");
    }

    async fn shutdown_and_dropped_guards_respect_the_time(store: &TestStore) {
        let other = store.manager().await;
        let locks = store.manager().await;
        let dropped = locks.lock("dropped").min_hold(LONG).await.expect("lock");
        let held = locks.lock("held").min_hold(LONG).await.expect("lock");
        drop(dropped);
        locks.shutdown().await.expect("shutdown");
        assert_eq!(held.lost().await, LossReason::Closed);
        drop(held);
        drop(locks);
        for key in ["dropped", "held"] {
            assert!(is_busy(&other, key).await, "{key}");
        }
    }

    async fn notification_of_a_waiter_does_not_end_min_hold(store: &TestStore) {
        // The cycle of an uncontended lock requests notifications of waiters. It has ended by then.
        let (locks, other) = (store.manager().await, store.manager().await);
        locks.lock("k").min_hold(LONG).await.expect("lock").release().await.expect("release");
        let waits = waiting(&other, "k");
        until_queued(&locks, "k", 1).await;
        // The message has arrived when a later one has.
        let guard = lock(&locks, "another").await;
        let waits_too = waiting(&other, "another");
        until_queued(&locks, "another", 1).await;
        guard.release().await.expect("release");
        waits_too.await.expect("a task").release().await.expect("release");
        assert!(!waits.is_finished() && is_busy(&locks, "k").await);
    }

    async fn lost_lock_leaves_the_key_locked(store: &TestStore) {
        let (locks, other) = (store.manager().await, store.manager().await);
        let request = locks.lock("k").min_hold(LONG).max_hold(Duration::from_millis(50));
        let guard = request.await.expect("lock");
        assert_eq!(guard.lost().await, LossReason::MaxHold);
        drop(guard);
        assert!(is_busy(&locks, "k").await && is_busy(&other, "k").await);
    }

    async fn lingering_lease_is_not_used_for_a_minimum_hold(store: &TestStore) {
        let locks = store.builder().linger(LONG).connect().await.expect("connect");
        let other = store.manager().await;
        lock(&locks, "k").await.release().await.expect("release");
        let request = locks.try_lock("k").min_hold(LONG);
        let guard = request.await.expect("try").expect("it is free");
        let holder = locks.inspect("k").await.expect("inspect").holder.expect("it is locked");
        assert!(holder.remaining.expect("it ends") > LONG / 2);
        guard.release().await.expect("release");
        assert!(is_busy(&locks, "k").await && is_busy(&other, "k").await);
    }
}

on_each_store! {
    async fn waiters_get_the_key_when_the_time_has_passed(store: &TestStore) {
        // The waiters ask while the lease still has its full TTL, which is longer.
        let builder = || match store.kind().cleans_up_later() {
            true => store.builder(),
            false => store.builder().ttl(Duration::from_secs(60)),
        };
        let locks = builder().connect().await.expect("connect");
        let other = builder().connect().await.expect("connect");
        let asked_at = Instant::now();
        let guard = locks.lock("k").min_hold(SHORT).await.expect("lock");
        let granted_at = Instant::now();
        let token = guard.token();
        let mut others = waiting(&other, "k");
        until_queued(&locks, "k", 1).await;
        guard.release().await.expect("release");
        let mut own = waiting(&locks, "k");
        let (guard, next) = tokio::select! {
            biased;
            guard = &mut others => (guard.expect("a task"), own),
            // The order at a quorum may change if a node is slow to answer.
            guard = &mut own, if store.kind() == Kind::Redlock => (guard.expect("a task"), others),
        };
        assert!(asked_at.elapsed() >= SHORT && guard.token() > token);
        // Long before the TTL ends, and before a waiter would ask again by itself.
        assert!(granted_at.elapsed() < Duration::from_secs(9), "{:?}", granted_at.elapsed());
        guard.release().await.expect("release");
        next.await.expect("a task").release().await.expect("release");
    }

    async fn release_after_the_time_frees_the_key_at_once(store: &TestStore) {
        let (locks, other) = (store.manager().await, store.manager().await);
        let time = Duration::from_millis(300);
        let guard = locks.lock("k").min_hold(time).await.expect("lock");
        let since = Instant::now();
        until("the time has passed", async || since.elapsed() > time).await;
        guard.release().await.expect("release");
        let guard = other.try_lock("k").await.expect("try").expect("it is free");
        guard.release().await.expect("release");
        store.is_empty(&locks, "k").await;
    }
}

on_each_store! {
    on(redis sentinel cluster etcd);

    async fn killed_process_leaves_the_key_locked(store: &TestStore) {
        let locks = store.manager().await;
        let mut process = store.worker("min_holder", &[]);
        let token: u64 = process.line().parse().expect("a token");
        process.kill();
        let holder = locks.inspect("k").await.expect("inspect").holder.expect("it is locked");
        assert!(token > 0 && holder.remaining.expect("it ends") > LONG / 2);
        assert!(is_busy(&locks, "k").await);
    }
}

#[tokio::test]
async fn time_outside_its_bounds_is_refused() {
    let locks = connect("memory://").await;
    let day = Duration::from_secs(24 * 3600);
    let error = locks
        .lock("k")
        .min_hold(day + Duration::from_millis(1))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("min_hold"), "{error}");
    let builder = LockManager::builder().shard("redlock://127.0.0.1:1,127.0.0.1:2,127.0.0.1:3");
    let error = builder.min_hold(Duration::from_secs(60)).connect().await.unwrap_err();
    assert!(error.to_string().contains("min_hold (60s)"), "{error}");
}
