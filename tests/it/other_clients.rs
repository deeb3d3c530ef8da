//! Other users of the same server: clients of other libraries, mistakes, and managers with
//! different settings.

use std::future::IntoFuture;
use std::time::{Duration, Instant};

use redis::Value;
use shardlock::config::{Builder, ShardConfig};
use shardlock::error::LockErrorKind;
use shardlock::{LockError, LockManager, LossReason};
use support::{PATIENCE, RedisServer};
use support_locks::{MARGIN, STORE_TIMEOUT, Servers, TestStore, lock, on_each_store, soon, until, until_queued};

/// How other libraries release a lock: only if the value is theirs.
const RELEASE_IF_OURS: &str =
    "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0";

async fn connect(server: &RedisServer) -> LockManager {
    support_locks::connect(&server.url()).await
}

/// For managers of several shards, each of which is given a quarter of this time to reply to the
/// others' questions about its map.
fn patient() -> Builder {
    LockManager::builder().store_timeout(PATIENCE)
}

/// A foreign client takes the lock with `take` and frees it with `free`. Our waiters in two
/// processes each get the lock within a second, except on a busy machine.
async fn assert_foreign_key_is_waited_for(store: &TestStore, take: &[&str], free: impl FnOnce(&dyn Servers)) {
    let servers = store.servers();
    let (one, other) = (store.manager().await, store.manager().await);
    // Loads the scripts into the server, so that the counts below cover only the waiting.
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
    servers.reset_all_stats();
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
    assert!(
        waiting.iter().all(|task| !task.is_finished()),
        "the stranger holds the lock"
    );
    free(servers);
    let freed = Instant::now();
    for task in waiting {
        let had_at = soon("the waiter", task).await.expect("a task");
        let took = had_at.saturating_duration_since(freed);
        assert!(took < Duration::from_millis(400) + 3 * MARGIN, "{took:?}");
    }
    // The first waiter asks every 400 ms, the second less often, and both lock and release. On a
    // busy machine, that takes a few seconds. Polling would cost far more.
    let calls = servers.script_calls();
    assert!(calls <= 40, "{calls}");
    assert_eq!(store.lock_keys(), [""; 0]);
}

fn text(reply: &Value) -> String {
    redis::from_redis_value_ref(reply).expect("a text")
}

on_each_store! {
    on(foreign, own);

    async fn foreign_key_without_a_ttl_is_acquired_within_a_second_of_its_deletion(store: &TestStore) {
        assert_foreign_key_is_waited_for(store, &["SET", "lock:k", "550e8400-e29b", "NX"], |servers| {
            assert_eq!(servers.command(&["EVAL", RELEASE_IF_OURS, "1", "lock:k", "550e8400-e29b"]), Value::Int(1));
        })
        .await;
    }

    async fn foreign_key_with_a_long_ttl_is_acquired_within_a_second_of_its_deletion(store: &TestStore) {
        assert_foreign_key_is_waited_for(store, &["SET", "lock:k", "uuid:thread-1", "NX", "PX", "60000"], |servers| {
            servers.command(&["DEL", "lock:k"]);
        })
        .await;
    }

    async fn foreign_key_is_acquired_within_a_second_of_its_expiry(store: &TestStore) {
        assert_foreign_key_is_waited_for(store, &["SET", "lock:k", "theirs", "NX", "PX", "60000"], |servers| {
            // Shortens the TTL, so that the test need not wait for the expiry.
            assert_eq!(servers.command(&["PEXPIRE", "lock:k", "50"]), Value::Int(1));
        })
        .await;
    }

    async fn foreign_client_can_neither_take_nor_free_a_held_lock(store: &TestStore) {
        let (servers, locks) = (store.servers(), store.manager().await);
        let guard = lock(&locks, "k").await;
        assert_eq!(
            servers.command(&["SET", "lock:k", "theirs", "NX", "PX", "60000"]),
            Value::Nil
        );
        assert_eq!(servers.command(&["EVAL", RELEASE_IF_OURS, "1", "lock:k", "theirs"]), Value::Int(0));
        assert_eq!(text(&servers.command(&["GET", "lock:k"])), guard.owner());
        guard.release().await.expect("the lock was held throughout");
        assert_eq!(
            servers.command(&["SET", "lock:k", "theirs", "NX", "PX", "60000"]),
            Value::Okay
        );
        assert!(locks.try_lock("k").await.expect("try").is_none());
    }

    async fn key_of_a_wrong_type_is_a_clear_error_and_is_left_unchanged(store: &TestStore) {
        let (servers, locks) = (store.servers(), store.manager().await);
        for (kind, make) in [
            ("list", &["RPUSH", "lock:k", "x"][..]),
            ("hash", &["HSET", "lock:k", "f", "x"][..]),
            ("zset", &["ZADD", "lock:k", "1", "x"][..]),
        ] {
            servers.command(make);
            let error = soon("an error", async { locks.lock("k").await }).await.expect_err(kind);
            assert_wrong_type_is_explained(&error);
            let error = soon("an error", async { locks.try_lock("k").await })
                .await
                .expect_err(kind);
            assert_wrong_type_is_explained(&error);
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
    on(fast_path, own);

    async fn queue_of_a_wrong_type_is_a_clear_error_and_is_left_unchanged(store: &TestStore) {
        let servers = store.servers();
        let (one, other) = (store.manager().await, store.manager().await);
        // From the second time on the manager uses the fast path, which does not check the queue.
        lock(&one, "k").await.release().await.expect("release");
        servers.command(&["SET", "{lock:k}:q", "x"]);
        let guard = lock(&one, "k").await;
        let error = soon("an error", async { other.lock("k").await })
            .await
            .expect_err("it can't enqueue");
        assert_wrong_type_is_explained(&error);
        let error = guard.release().await.expect_err("it can't read the queue");
        assert_wrong_type_is_explained(&error);
        assert_eq!(text(&servers.command(&["GET", "{lock:k}:q"])), "x");
    }
}

fn assert_wrong_type_is_explained(error: &LockError) {
    assert!(error.kind() == LockErrorKind::Refused, "{error}");
    let text = error.to_string();
    assert!(
        text.contains("\"k\"") && text.contains("WRONGTYPE") && text.contains("another name"),
        "{text}"
    );
    assert!(!error.is_retryable());
}

/// The first lock of a manager stores its shard map.
async fn lock_once(locks: &LockManager) {
    lock(locks, "once").await.release().await.expect("release");
}

fn map_key(server: &RedisServer) -> String {
    server.query(&["GET", "lock:%map"])
}

#[tokio::test]
async fn a_server_with_another_version_is_refused() {
    let server = RedisServer::start();
    lock_once(&connect(&server).await).await;
    let ours = map_key(&server);
    assert!(ours.starts_with("v2 "), "{ours}");
    let theirs = ours.replacen("v2 ", "v3 ", 1);
    server.command(&["SET", "lock:%map", &theirs]);
    let error = patient()
        .shard(server.url())
        .connect()
        .await
        .expect_err("another version");
    assert_differs(&error, &ours, &theirs);
    assert_eq!(map_key(&server), theirs);
    // Another namespace on the same server is unaffected.
    let builder = patient().shard(server.url()).namespace("new:");
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
        patient().shards(shards)
    };
    let both = shards(&[("a", &first), ("b", &second)]);
    let locks = both.clone().connect().await.expect("connect");
    lock_once(&locks).await;
    let maps = [map_key(&first), map_key(&second)];
    assert!(maps[0].contains("a:0-8191,b:8192-16383"), "{maps:?}");
    assert_ne!(maps[0], maps[1]);

    let error = shards(&[("a", &first)]).connect().await.expect_err("one is missing");
    assert_differs(&error, "v2 a:0-16383 here=a", &maps[0]);
    let error = shards(&[("b", &second), ("a", &first)])
        .connect()
        .await
        .expect_err("another order");
    assert_differs(&error, "v2 b:0-8191,a:8192-16383", "v2 a:0-8191,b:8192-16383");
    let error = shards(&[("a", &second), ("b", &first)])
        .connect()
        .await
        .expect_err("swapped addresses");
    assert_differs(&error, "here=", "v2 a:0-8191,b:8192-16383");
    assert_eq!([map_key(&first), map_key(&second)], maps, "nothing was overwritten");
    let same = both.connect().await.expect("the same map");
    let guard = lock(&locks, "k").await;
    assert!(same.try_lock("k").await.expect("try").is_none());
    guard.release().await.expect("release");
}

#[tokio::test]
async fn memory_with_another_shard_map_is_refused() {
    let first = support_locks::connect("memory://others-map").await;
    lock_once(&first).await;
    let builder = patient().shard("memory://others-map").shard("memory://others-map-2");
    let error = builder.connect().await.expect_err("another map");
    assert_differs(&error, "v2 shard-0:0-8191,shard-1:8192-16383", "v2 shard-0:0-16383");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shards_with_other_names_and_the_same_slots_are_accepted() {
    let (first, second) = (RedisServer::start(), RedisServer::start());
    let named = |one: &str, other: &str| patient().named_shard(one, first.url()).named_shard(other, second.url());
    let locks = named("a", "b").connect().await.expect("connect");
    lock_once(&locks).await;
    let maps = [map_key(&first), map_key(&second)];
    for (one, other) in [("x", "y"), ("b", "a"), ("a", "b")] {
        let renamed = named(one, other).connect().await.expect("the same slots");
        let guard = lock(&locks, "k").await;
        assert!(renamed.try_lock("k").await.expect("try").is_none());
        guard.release().await.expect("release");
        lock_once(&renamed).await;
    }
    assert_eq!([map_key(&first), map_key(&second)], maps, "nothing was overwritten");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refused_start_stores_no_map_on_a_shard_without_one() {
    let (used, fresh) = (RedisServer::start(), RedisServer::start());
    lock_once(&connect(&used).await).await;
    for _ in 0..20 {
        let both = patient().shard(fresh.url()).shard(used.url());
        let error = both.connect().await.expect_err("the other one has another map");
        assert!(error.kind() == LockErrorKind::ShardMapMismatch, "{error}");
        assert!(error.to_string().contains("shardlock map set"), "{error}");
        assert_eq!(fresh.keys(), [""; 0]);
    }
}

/// Both managers read two servers without a map, and then store different maps in different orders.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_maps_stored_concurrently_at_most_one_wins() {
    let (first, second) = (RedisServer::start(), RedisServer::start());
    let shards = [[&first, &second], [&second, &first]];
    for round in 0..20 {
        let builders = shards.map(|shards| {
            let builder = patient().namespace(format!("race-{round}:"));
            shards
                .iter()
                .fold(builder, |builder, server| builder.shard(server.url()))
        });
        let [one, other] = builders.clone().map(Builder::connect);
        let (one, other) = (one.await.expect("no map yet"), other.await.expect("no map yet"));
        let (one, other) = tokio::join!(one.try_lock("k"), other.try_lock("k"));
        let winners = [&one, &other].into_iter().filter(|locked| locked.is_ok()).count();
        assert!(winners <= 1, "{one:?} {other:?}");
        for error in [one.err(), other.err()].into_iter().flatten() {
            assert!(error.kind() == LockErrorKind::ShardMapMismatch, "{error}");
        }
        if winners == 0 {
            // Neither map is stored, so either manager may store its own once the reservations have
            // expired.
            until("a start without a concurrent one", async || {
                let Ok(locks) = builders[0].clone().connect().await else {
                    return false;
                };
                locks.try_lock("k").await.is_ok()
            })
            .await;
        }
    }
}

on_each_store! {
    async fn manager_that_only_inspects_stores_no_map(store: &TestStore) {
        let locks = store.manager().await;
        assert_eq!(locks.inspect("k").await.expect("inspect").holder, None);
        locks.shutdown().await.ok();
        assert!(store.servers().maps(store.namespace()).is_empty());
    }
}

on_each_store! { on(servers);
    async fn another_map_ends_all_locks_of_the_shard_at_once(store: &TestStore) {
        let (locks, servers) = (store.manager().await, store.servers());
        let (one, other) = (lock(&locks, "one").await, lock(&locks, "other").await);
        let idle = store.manager().await;
        lock_once(&idle).await;
        let waiting = tokio::spawn(locks.lock("one").into_future());
        until("a waiter", async || locks.shard_states()[0].waiters == 1).await;
        servers.set_map(store.namespace(), Some("v2 a:0-8191,b:8192-16383 here=b"));
        for guard in [one, other] {
            let reason = soon("the loss", guard.lost()).await;
            assert_eq!(reason, LossReason::ShardMap);
            assert!(!guard.is_valid());
            let error = guard.release().await.expect_err("the lock was lost");
            assert!(error.loss_reason() == Some(LossReason::ShardMap), "{error}");
        }
        let error = soon("the waiter", waiting).await.expect("a task").expect_err("another map");
        assert_differs(&error, "0-16383", "v2 a:0-8191,b:8192-16383 here=b");
        for locks in [&locks, &idle] {
            until("the manager sees the other map", async || locks.try_lock("two").await.is_err()).await;
            let error = locks.lock("three").await.expect_err("another map");
            assert_differs(&error, "0-16383", "v2 a:0-8191,b:8192-16383 here=b");
        }
        // A manager recovers once the map does.
        servers.set_map(store.namespace(), None);
        lock_once(&store.manager().await).await;
        lock_once(&locks).await;
    }

    async fn map_deleted_while_locks_are_held_is_stored_again(store: &TestStore) {
        let (locks, servers) = (store.manager().await, store.servers());
        let guard = lock(&locks, "k").await;
        let mut maps = servers.maps(store.namespace());
        assert!(!maps.is_empty());
        maps.sort();
        servers.set_map(store.namespace(), None);
        until("the map is stored again", async || {
            let mut now = servers.maps(store.namespace());
            now.sort();
            now == maps
        })
        .await;
        guard.release().await.expect("the lock was held throughout");
    }
}

#[track_caller]
fn assert_differs(error: &LockError, ours: &str, theirs: &str) {
    assert!(error.kind() == LockErrorKind::ShardMapMismatch, "{error}");
    let text = error.to_string();
    assert!(text.contains(ours) && text.contains(theirs), "{text}");
    assert!(!error.is_retryable());
}

/// Regression: any client that could publish on a server could make a manager believe that it had
/// the lock. A grant identified its cycle by a small number, and the manager trusted the TTL in the
/// message.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn grant_forged_by_another_client_is_ignored() {
    const FORGED: u64 = 1 << 60;
    let server = RedisServer::start();
    let (holder, waiter) = (connect(&server).await, connect(&server).await);
    let guard = lock(&holder, "k").await;
    let waiting = tokio::spawn(async move { lock(&waiter, "k").await });
    until_queued(&holder, "k", 1).await;
    let seen_by_all = server.channels();
    assert_eq!(seen_by_all.len(), 2);
    for inbox in &seen_by_all {
        for number in 0..20 {
            for grant in [
                format!("g {number} {FORGED} 64 3600000 0 k"),
                format!("g {number}-10000-00000000 {FORGED} 64 0 k"),
                format!("g {number}-3600000-00000000 {FORGED} 64 0 k"),
            ] {
                assert_eq!(server.query::<u64>(&["PUBLISH", inbox, &grant]), 1);
            }
        }
    }
    // Messages stay in order, so the real grant arrives after the forged ones.
    guard.release().await.expect("release");
    let guard = soon("the waiter", waiting).await.expect("a task");
    // The forged grants carry the 64 tokens up to `FORGED`.
    assert!(guard.token().get() < FORGED - 64, "{:?}", guard.token());
    let holder = holder.inspect("k").await.expect("inspect").holder.expect("a holder");
    assert_eq!(holder.owner, guard.owner());
    guard.release().await.expect("release");
}

/// The lease is a marker while the key is shared. To a client of another library it looks like the
/// lease of somebody else.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn foreign_client_can_neither_take_nor_free_a_shared_lock_except_by_deletion() {
    let server = RedisServer::start();
    let builder = LockManager::builder().shard(server.url()).ttl(Duration::from_secs(3));
    let builder = builder.store_timeout(STORE_TIMEOUT);
    let (one, other) = (builder.clone().connect().await, builder.connect().await);
    let (one, other) = (one.expect("connect"), other.expect("connect"));
    let reader = one.lock("k").shared().timeout(support::PATIENCE).await.expect("lock");
    let permit = other.permits("k", 3).timeout(support::PATIENCE).await.expect("lock");
    let take = ["SET", "lock:k", "theirs", "NX", "PX", "60000"];
    assert_eq!(server.query::<Value>(&take), Value::Nil);
    let free = ["EVAL", RELEASE_IF_OURS, "1", "lock:k", "theirs"];
    assert_eq!(server.query::<Value>(&free), Value::Int(0));
    assert!(one.try_lock("k").await.expect("try").is_none());

    // Nobody takes the key, but both have lost it.
    server.command(&["DEL", "lock:k"]);
    for guard in [&reader, &permit] {
        soon("the loss", guard.lost()).await;
    }
    drop((reader, permit));
    // With the stranger's lease, a reader waits.
    assert_eq!(server.query::<Value>(&take), Value::Okay);
    assert!(other.try_lock("k").shared().await.expect("try").is_none());
    server.command(&["DEL", "lock:k"]);
    let guard = other.lock("k").shared().timeout(support::PATIENCE).await.expect("lock");
    let state = one.inspect("k").await.expect("inspect");
    assert_eq!((state.holder, state.holder_count), (None, 1));
    guard.release().await.expect("release");
    one.shutdown().await.ok();
    other.shutdown().await.ok();
    until("nothing is left", async || {
        let left: Vec<String> = server.query(&["KEYS", "*k*"]);
        left.iter().all(|key| key.starts_with("lock:%"))
    })
    .await;
}
