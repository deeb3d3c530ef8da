//! Several shards in one manager: a fault of one does not affect the others.

use std::collections::BTreeMap;
use std::future::IntoFuture;
use std::time::{Duration, Instant};

use futures_util::future::try_join_all;
use shardlock::error::LockErrorKind;
use shardlock::{LockKey, LockManager, LossReason};
use support::RedisServer;
use support_locks::{STORE_TIMEOUT, TestStore, lock, on_each_store, soon, until_queued};

/// A few keys of each shard.
fn keys(locks: &LockManager) -> BTreeMap<usize, Vec<String>> {
    let mut keys = BTreeMap::<_, Vec<_>>::new();
    for key in (0..200).map(|number| format!("key-{number}")) {
        let shard = locks.shard_map().index(LockKey::new(&key).expect("a good key").slot());
        let of_shard = keys.entry(shard).or_default();
        if of_shard.len() < 4 {
            of_shard.push(key);
        }
    }
    keys
}

on_each_store! {
    async fn shards_of_any_kinds_serve_one_manager(store: &TestStore) {
        let shards = [RedisServer::start(), RedisServer::start()];
        let builder = || shards.iter().fold(store.builder(), |builder, shard| builder.shard(shard.url()));
        let (locks, others) = (builder().connect().await.expect("connect"), builder().connect().await.expect("connect"));
        let keys = keys(&locks);
        assert!(keys.len() >= 3 && keys.values().all(|keys| keys.len() == 4), "{keys:?}");
        let keys: Vec<_> = keys.into_values().flatten().collect();
        let guards = try_join_all(keys.iter().map(|key| locks.lock(key).into_future())).await.expect("lock");
        let waiting: Vec<_> = keys.iter().map(|key| tokio::spawn(others.lock(key).into_future())).collect();
        for key in &keys {
            until_queued(&locks, key, 1).await;
        }
        for guard in guards {
            guard.release().await.expect("release");
        }
        for task in waiting {
            let guard = soon("the waiter", task).await.expect("a task").expect("lock");
            guard.release().await.expect("release");
        }
        for key in &keys {
            until_queued(&locks, key, 0).await;
        }
        store.is_clean().await;
    }

    async fn leases_are_renewed_in_time_while_another_shard_does_not_answer(store: &TestStore) {
        let silent = RedisServer::start();
        let ttl = Duration::from_secs(3);
        // A reply may take longer than a lease lasts, so renewals that waited for the silent shard
        // would be too late.
        let builder = store.builder().shard(silent.url()).ttl(ttl).store_timeout(3 * ttl);
        let locks = builder.connect().await.expect("connect");
        let mut keys = keys(&locks);
        let (_, theirs) = keys.pop_last().expect("the last shard is the silent one");
        let guards = try_join_all(keys.values().flatten().map(|key| locks.lock(key).into_future())).await.expect("lock");
        let lost = lock(&locks, &theirs[0]).await;
        silent.stop();
        let stopped = Instant::now();
        assert_eq!(soon("the loss", lost.lost()).await, LossReason::Expired);
        assert!(stopped.elapsed() < 2 * ttl, "{:?}", stopped.elapsed());
        let asking = tokio::spawn(locks.lock(&theirs[1]).into_future());
        while stopped.elapsed() < 2 * ttl {
            for guard in &guards {
                assert!(guard.is_valid(), "{} after {:?}", guard.key(), stopped.elapsed());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        // The other shards still lock and release.
        for guard in guards {
            let key = guard.key().to_owned();
            guard.release().await.expect("the lock was held throughout");
            lock(&locks, &key).await.release().await.expect("release");
        }
        let error = soon("an error", asking).await.expect("a task").expect_err("the shard does not answer");
        assert!(error.kind() == LockErrorKind::Unavailable, "{error}");
        silent.cont();
        store.is_clean().await;
    }
}

/// Channels are not per database, so both shards receive messages published for either.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shards_that_are_databases_of_one_server_leave_one_anothers_locks_alone() {
    let server = RedisServer::start();
    let builder = || {
        let databases = ["0", "1"].map(|database| format!("{}/{database}", server.url()));
        databases
            .into_iter()
            .fold(LockManager::builder(), |builder, url| builder.shard(url))
            .store_timeout(STORE_TIMEOUT)
    };
    let (one, other) = (
        builder().connect().await.expect("connect"),
        builder().connect().await.expect("connect"),
    );
    for (_, of_shard) in keys(&one) {
        for key in of_shard {
            let mut guard = lock(&one, &key).await;
            for round in 0..10 {
                let to = if round % 2 == 0 { &other } else { &one };
                let waiting = tokio::spawn(to.lock(&key).into_future());
                until_queued(&one, &key, 1).await;
                guard.release().await.expect("the lock was held throughout");
                guard = soon("the waiter", waiting).await.expect("a task").expect("lock");
                // The other shard handles its copy of the grant immediately.
                let inspected = one.inspect(&key).await.expect("inspect");
                assert_eq!(inspected.holder.expect("a holder").owner, guard.owner());
            }
            guard.release().await.expect("the lock was held throughout");
        }
    }
}
