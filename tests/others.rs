//! Others on the same server: clients of other libraries, mistakes, and managers that see the world differently.

// A test is over when its surroundings fail.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

mod support;
mod support_locks;

use std::time::{Duration, Instant};

use redis::Value;
use shardlock::{LockError, LockManager, ShardConfig};
use support::RedisServer;
use support_locks::{Servers, TestStore, lock, on_each_store, soon, until_queued};

/// How other libraries give a lock back: only if the value is theirs.
const RELEASE_IF_OURS: &str =
    "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0";

async fn connect(server: &RedisServer) -> LockManager {
    LockManager::connect(&server.url()).await.expect("connect")
}

/// A stranger takes the lock by `take` and frees it by `free`; our waiters of two processes get in within a second each.
async fn waits_for_a_stranger(store: &TestStore, take: &[&str], free: impl FnOnce(&dyn Servers)) {
    let servers = store.servers();
    let (one, other) = (store.manager().await, store.manager().await);
    // The scripts are known to the server from here on, so that the counts below are those of the waiting alone.
    let guard = lock(&one, "k").await;
    let waiting = tokio::spawn({
        let other = other.clone();
        async move { lock(&other, "k").await.release().await.expect("release") }
    });
    until_queued(&one, "k", 1).await;
    guard.release().await.expect("release");
    soon("the waiter", waiting).await.expect("a task");

    assert_eq!(servers.command(take), Value::Okay);
    assert!(one.try_lock("k").await.expect("try").is_none());
    let holder = one.inspect("k").await.expect("inspect").holder.expect("a holder");
    assert!(!holder.is_manager, "{holder:?}");
    servers.count_anew();
    let waiting = [one.clone(), other.clone()].map(|locks| {
        tokio::spawn(async move {
            let guard = lock(&locks, "k").await;
            let had_at = Instant::now();
            guard.release().await.expect("release");
            had_at
        })
    });
    until_queued(&one, "k", 2).await;
    let wait = Duration::from_millis(1500);
    tokio::time::sleep(wait).await;
    assert!(waiting.iter().all(|task| !task.is_finished()), "it is theirs");
    free(servers);
    let freed = Instant::now();
    for task in waiting {
        let had_at = soon("the waiter", task).await.expect("a task");
        let took = had_at.saturating_duration_since(freed);
        assert!(took < Duration::from_secs(1), "{took:?}");
    }
    // The first looks every 400 ms, the second less often, and both lock and release: far from polling.
    let calls = servers.script_calls();
    assert!(calls <= 20, "{calls}");
    assert_eq!(store.lock_keys(), [""; 0]);
}

fn text(reply: &Value) -> String {
    redis::from_redis_value_ref(reply).expect("a text")
}

on_each_store! {
    on(foreign, own);

    async fn a_stranger_without_a_ttl_that_deletes_its_key_is_followed_within_a_second(store: &TestStore) {
        waits_for_a_stranger(store, &["SET", "lock:k", "550e8400-e29b", "NX"], |servers| {
            assert_eq!(servers.command(&["EVAL", RELEASE_IF_OURS, "1", "lock:k", "550e8400-e29b"]), Value::Int(1));
        })
        .await;
    }

    async fn a_stranger_with_a_long_ttl_that_deletes_its_key_is_followed_within_a_second(store: &TestStore) {
        waits_for_a_stranger(store, &["SET", "lock:k", "uuid:thread-1", "NX", "PX", "60000"], |servers| {
            servers.command(&["DEL", "lock:k"]);
        })
        .await;
    }

    async fn a_stranger_whose_key_runs_out_is_followed_within_a_second(store: &TestStore) {
        waits_for_a_stranger(store, &["SET", "lock:k", "theirs", "NX", "PX", "60000"], |servers| {
            // Its last moment is made here, so that no time is lost by waiting for it.
            assert_eq!(servers.command(&["PEXPIRE", "lock:k", "50"]), Value::Int(1));
        })
        .await;
    }

    async fn a_stranger_can_neither_take_nor_free_what_we_hold(store: &TestStore) {
        let (servers, locks) = (store.servers(), store.manager().await);
        let guard = lock(&locks, "k").await;
        assert_eq!(
            servers.command(&["SET", "lock:k", "theirs", "NX", "PX", "1000"]),
            Value::Nil
        );
        assert_eq!(servers.command(&["EVAL", RELEASE_IF_OURS, "1", "lock:k", "theirs"]), Value::Int(0));
        assert_eq!(text(&servers.command(&["GET", "lock:k"])), guard.owner());
        guard.release().await.expect("it was held all the time");
        assert_eq!(
            servers.command(&["SET", "lock:k", "theirs", "NX", "PX", "1000"]),
            Value::Okay
        );
        assert!(locks.try_lock("k").await.expect("try").is_none());
    }

    async fn a_key_of_a_wrong_type_is_a_clear_error_and_stays_as_it_is(store: &TestStore) {
        let (servers, locks) = (store.servers(), store.manager().await);
        for (kind, make) in [
            ("list", &["RPUSH", "lock:k", "x"][..]),
            ("hash", &["HSET", "lock:k", "f", "x"][..]),
            ("zset", &["ZADD", "lock:k", "1", "x"][..]),
        ] {
            servers.command(make);
            let error = soon("an error", async { locks.lock("k").await }).await.expect_err(kind);
            assert_is_told(&error);
            let error = soon("an error", async { locks.try_lock("k").await })
                .await
                .expect_err(kind);
            assert_is_told(&error);
            let error = locks.inspect("k").await.expect_err(kind);
            assert!(error.to_string().contains("\"k\""), "{error}");
            assert_eq!(text(&servers.command(&["TYPE", "lock:k"])), kind);
            assert_eq!(store.lock_keys(), ["lock:k"]);
            servers.command(&["DEL", "lock:k"]);
            lock(&locks, "k").await.release().await.expect("release");
        }
    }
}

on_each_store! {
    on(free_path, own);

    async fn a_queue_of_a_wrong_type_is_a_clear_error_and_stays_as_it_is(store: &TestStore) {
        let servers = store.servers();
        let (one, other) = (store.manager().await, store.manager().await);
        // From the second time on the free path is enough, which does not look at the queue.
        lock(&one, "k").await.release().await.expect("release");
        servers.command(&["SET", "{lock:k}:q", "x"]);
        let guard = lock(&one, "k").await;
        let error = soon("an error", async { other.lock("k").await })
            .await
            .expect_err("it can't join");
        assert_is_told(&error);
        let error = guard.release().await.expect_err("it can't look who is next");
        assert_is_told(&error);
        assert_eq!(text(&servers.command(&["GET", "{lock:k}:q"])), "x");
    }
}

fn assert_is_told(error: &LockError) {
    assert!(matches!(error, LockError::Refused { .. }), "{error}");
    let text = error.to_string();
    assert!(
        text.contains("\"k\"") && text.contains("WRONGTYPE") && text.contains("another name"),
        "{text}"
    );
    assert!(!error.is_retryable());
}

fn map_key(server: &RedisServer) -> String {
    server.query(&["GET", "lock:%map"])
}

#[tokio::test]
async fn a_server_with_another_version_is_refused() {
    let server = RedisServer::start();
    connect(&server).await;
    let ours = map_key(&server);
    assert!(ours.starts_with("v1 "), "{ours}");
    let theirs = ours.replacen("v1 ", "v2 ", 1);
    server.command(&["SET", "lock:%map", &theirs]);
    let error = LockManager::connect(&server.url()).await.expect_err("another version");
    assert_differs(&error, &ours, &theirs);
    assert_eq!(map_key(&server), theirs);
    // Elsewhere on the same server it is another matter.
    let builder = LockManager::builder().shard(server.url()).namespace("new:");
    builder.connect().await.expect("connect");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn managers_with_different_shards_are_refused_with_both_maps_in_the_message() {
    let (first, second) = (RedisServer::start(), RedisServer::start());
    let shards = |servers: &[(&str, &RedisServer)]| {
        let shards: Vec<_> = servers
            .iter()
            .map(|(name, server)| ShardConfig::new(*name, server.url()))
            .collect();
        LockManager::builder().shards(shards)
    };
    let both = shards(&[("a", &first), ("b", &second)]);
    let locks = both.clone().connect().await.expect("connect");
    let maps = [map_key(&first), map_key(&second)];
    assert!(maps[0].contains("a:0-8191,b:8192-16383"), "{maps:?}");
    assert_ne!(maps[0], maps[1]);

    let error = shards(&[("a", &first)]).connect().await.expect_err("one is missing");
    assert_differs(&error, "v1 a:0-16383 here=a", &maps[0]);
    let error = shards(&[("b", &second), ("a", &first)])
        .connect()
        .await
        .expect_err("another order");
    assert_differs(&error, "v1 b:0-8191,a:8192-16383", "v1 a:0-8191,b:8192-16383");
    let error = shards(&[("a", &second), ("b", &first)])
        .connect()
        .await
        .expect_err("swapped addresses");
    assert_differs(&error, "here=", "v1 a:0-8191,b:8192-16383");
    let error = shards(&[("x", &first), ("b", &second)])
        .connect()
        .await
        .expect_err("another name");
    assert_differs(&error, "v1 x:0-8191", "v1 a:0-8191");

    assert_eq!([map_key(&first), map_key(&second)], maps, "nothing was overwritten");
    let same = both.connect().await.expect("the same map");
    let guard = lock(&locks, "k").await;
    assert!(same.try_lock("k").await.expect("try").is_none());
    guard.release().await.expect("release");
}

#[tokio::test]
async fn a_memory_with_other_shards_is_refused_too() {
    let _first = LockManager::connect("memory://others-map").await.expect("connect");
    let builder = LockManager::builder().named_shard("other", "memory://others-map");
    let error = builder.connect().await.expect_err("another name");
    assert_differs(&error, "v1 other:0-16383", "v1 shard-0:0-16383");
}

#[track_caller]
fn assert_differs(error: &LockError, ours: &str, theirs: &str) {
    assert!(matches!(error, LockError::ShardMapMismatch { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains(ours) && text.contains(theirs), "{text}");
    assert!(!error.is_retryable());
}
