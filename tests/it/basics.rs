//! The basics of a lock: mutual exclusion, release, wait limits, and independence of other keys.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use shardlock::error::LockErrorKind;
use shardlock::{LockManager, LossReason};
use support::{RedisServer, worker};
use support_locks::{
    Kind, MARGIN, STORE_TIMEOUT, TestStore, builder_of, lock, on_each_store, soon, until, until_queued,
};
use tokio::task::JoinSet;

const TASKS: u64 = 8;
const ROUNDS: u64 = 25;

/// Increments a number under the lock with separate reads and writes.
#[tokio::main]
pub(crate) async fn count(me: &worker::Current) {
    let locks = builder_of(me).connect().await.expect("connect");
    let client = redis::Client::open(me.var("SHARDLOCK_TEST_RESOURCE")).expect("a good address");
    let connection = client.get_multiplexed_async_connection().await.expect("connect");
    let mut tasks = JoinSet::new();
    for _ in 0..TASKS {
        let (locks, mut connection) = (locks.clone(), connection.clone());
        tasks.spawn(async move {
            for _ in 0..ROUNDS {
                let guard = lock(&locks, "number").await;
                let number: u64 = redis::cmd("GET")
                    .arg("number")
                    .query_async::<Option<u64>>(&mut connection)
                    .await
                    .expect("GET")
                    .unwrap_or(0);
                let mut set = redis::cmd("SET");
                set.arg("number").arg(number + 1);
                set.exec_async(&mut connection).await.expect("SET");
                guard.release().await.expect("release");
            }
        });
    }
    while let Some(ended) = tasks.join_next().await {
        ended.expect("a task");
    }
}

async fn assert_times_out(locks: &LockManager, limit: Duration) {
    let started = Instant::now();
    let error = locks.lock("k").timeout(limit).await.expect_err("the lock is held");
    let took = started.elapsed();
    assert!(took >= limit && took < limit + 3 * MARGIN, "{limit:?}: {took:?}");
    assert_eq!((error.key(), error.timeout()), (Some("k"), Some(limit)), "{error}");
    let waited = error.waited().expect("a timeout has a duration");
    assert!(waited >= limit && waited <= took, "{waited:?}");
    assert!(error.is_timeout() && error.is_retryable());
}

on_each_store! {
    async fn managers_lose_no_updates_under_the_lock(store: &TestStore) {
        let number = Arc::new(AtomicU64::new(0));
        let mut tasks = JoinSet::new();
        for _ in 0..4 {
            let locks = store.manager().await;
            for _ in 0..TASKS {
                let (locks, number) = (locks.clone(), Arc::clone(&number));
                tasks.spawn(async move {
                    for _ in 0..ROUNDS {
                        let guard = lock(&locks, "number").await;
                        let seen = number.load(Ordering::Relaxed);
                        tokio::task::yield_now().await;
                        number.store(seen + 1, Ordering::Relaxed);
                        guard.release().await.expect("release");
                    }
                });
            }
        }
        while let Some(ended) = tasks.join_next().await {
            ended.expect("a task");
        }
        assert_eq!(number.load(Ordering::Relaxed), 4 * TASKS * ROUNDS);
    }

    async fn holding_a_key_locks_only_that_key(store: &TestStore) {
        let (locks, others) = (store.manager().await, store.manager().await);
        let guard = locks.lock("k").await.expect("lock");
        assert!(guard.is_valid());
        assert_eq!(guard.key(), "k");
        assert!(locks.try_lock("k").await.expect("try").is_none());
        assert!(others.try_lock("k").await.expect("try").is_none());
        let other = others.try_lock("other").await.expect("try").expect("another key is free");
        guard.release().await.expect("release");
        other.release().await.expect("release");

        let again = others.try_lock("k").await.expect("try").expect("the lock was released");
        again.release().await.expect("release");
        let again = locks.lock("k").await.expect("lock");
        again.release().await.expect("release");
        store.is_empty(&locks, "k").await;
        store.is_empty(&locks, "other").await;
    }

    async fn release_of_a_lost_lock_does_not_free_the_next_holders_lock(store: &TestStore) {
        let (one, other) = (store.manager().await, store.manager().await);
        let old = one.lock("k").max_hold(Duration::from_millis(20)).await.expect("lock");
        assert_eq!(soon("the loss", old.lost()).await, LossReason::MaxHold);
        let token = old.token();

        let new = lock(&other, "k").await;
        let error = old.release().await.expect_err("the lock was lost");
        assert_eq!(
            (error.key(), error.token(), error.loss_reason()),
            (Some("k"), Some(token), Some(LossReason::MaxHold)),
            "{error}"
        );
        assert!(error.is_lost() && !error.is_retryable());

        assert!(new.is_valid());
        assert!(one.try_lock("k").await.expect("try").is_none());
        assert_eq!(one.inspect("k").await.expect("inspect").holder.expect("a holder").owner, new.owner());
        new.release().await.expect("release");
        store.is_empty(&one, "k").await;
    }

    async fn a_try_on_a_held_key_leaves_no_trace(store: &TestStore) {
        let (locks, others) = (store.manager().await, store.manager().await);
        let guard = locks.lock("k").await.expect("lock");
        let before = locks.inspect("k").await.expect("inspect");
        if store.kind() == Kind::Redlock {
            // A majority is enough for the lock; the remaining nodes follow.
            let nodes = store.servers().nodes().len();
            until("every node has the lease", async || store.lock_keys().len() == nodes).await;
        }
        let keys = store.lock_keys();
        for _ in 0..20 {
            assert!(locks.try_lock("k").await.expect("try").is_none());
            assert!(others.try_lock("k").await.expect("try").is_none());
            let error = others.lock("k").timeout(Duration::ZERO).await.expect_err("the lock is held");
            assert!(error.is_timeout(), "{error}");
        }
        let after = locks.inspect("k").await.expect("inspect");
        assert_eq!((after.queue_length, after.queue.len(), after.last_token), (0, 0, before.last_token));
        assert_eq!(store.lock_keys(), keys);
        // Nothing blocks the holder's release or the next acquisition.
        guard.release().await.expect("release");
        store.is_empty(&locks, "k").await;
    }

    async fn try_does_not_overtake_waiters(store: &TestStore) {
        let (locks, others) = (store.manager().await, store.manager().await);
        let guard = locks.lock("k").await.expect("lock");
        let waiting = tokio::spawn({
            let others = others.clone();
            async move { lock(&others, "k").await }
        });
        until_queued(&locks, "k", 1).await;
        guard.release().await.expect("release");
        assert!(locks.try_lock("k").await.expect("try").is_none());
        soon("the waiter", waiting).await.expect("a task").release().await.expect("release");
    }

    async fn a_wait_ends_at_its_limit(store: &TestStore) {
        let (locks, others) = (store.manager().await, store.manager().await);
        let _guard = locks.lock("k").await.expect("lock");
        for limit in [Duration::from_millis(1), Duration::from_millis(20), Duration::from_secs(3)] {
            tokio::join!(assert_times_out(&locks, limit), assert_times_out(&others, limit));
        }
        until_queued(&locks, "k", 0).await;
    }

    async fn keys_may_be_any_text(store: &TestStore) {
        let (locks, others) = (store.manager().await, store.manager().await);
        let long = "é".repeat(256);
        let keys = [
            "a", "A", "a:b", "a:b:q", "{}", "{a}", "}", "{", "}{", "{}{a}", "{a}{b}", "x{a}y", "a b", " ", "a\\b",
            "%", "%map", "%25", "%fence:{1}", "%q:{a}", "ключ", "🔒", "a\nb", "a\0b", "*", "?", "[a]", &long,
        ];
        let mut guards = Vec::new();
        for key in keys {
            let free = locks.try_lock(key).await.expect("try");
            guards.push(free.unwrap_or_else(|| panic!("{key:?} differs from the keys before it")));
        }
        for (key, guard) in keys.into_iter().zip(guards) {
            assert_eq!(guard.key(), key);
            let waiting = tokio::spawn({
                let (others, key) = (others.clone(), key.to_owned());
                async move { lock(&others, &key).await }
            });
            until_queued(&locks, key, 1).await;
            guard.release().await.expect("release");
            let guard = soon("the waiter", waiting).await.expect("a task");
            assert_eq!(guard.key(), key);
            guard.release().await.expect("release");
            until_queued(&locks, key, 0).await;
        }
        store.is_empty(&locks, "a").await;
    }

    async fn guard_can_be_released_by_another_task(store: &TestStore) {
        let locks = store.manager().await;
        let guard = locks.lock("k").await.expect("lock");
        tokio::spawn(async move { guard.release().await.expect("release") }).await.expect("a task");
        let guard = locks.try_lock("k").await.expect("try").expect("the key is free");
        // A thread without a runtime.
        std::thread::spawn(move || drop(guard)).join().expect("a thread");
        lock(&locks, "k").await.release().await.expect("release");
        store.is_empty(&locks, "k").await;
    }

    async fn a_body_runs_under_the_lock_or_not_at_all(store: &TestStore) {
        let (locks, others) = (store.manager().await, store.manager().await);
        let seen = locks.with_lock("k", async |guard| {
            assert!(guard.is_valid());
            (others.try_lock("k").await.expect("try").is_none(), guard.token())
        });
        let (was_held, first) = seen.await.expect("the body ran");
        assert!(was_held);
        store.is_empty(&locks, "k").await;

        // The body's own error is passed through unchanged.
        let result = locks.with_lock("k", async |_| Err::<(), _>("my own error")).await;
        assert_eq!(result.expect("the lock was acquired"), Err("my own error"));
        store.is_empty(&locks, "k").await;

        let guard = others.lock("k").await.expect("lock");
        assert!(guard.token() > first);
        let ran = AtomicBool::new(false);
        let request = locks.lock("k").timeout(Duration::from_millis(10));
        let error = request.with(async |_| ran.store(true, Ordering::Relaxed)).await.expect_err("the lock is held");
        assert!(error.is_timeout() && !ran.load(Ordering::Relaxed), "{error}");
        guard.release().await.expect("release");
        store.is_empty(&locks, "k").await;
    }

    async fn panicking_body_releases_the_lock(store: &TestStore) {
        let locks = store.manager().await;
        let body = tokio::spawn({
            let locks = locks.clone();
            async move { locks.with_lock("k", async |_| panic!("on purpose")).await }
        });
        assert!(body.await.expect_err("the body panics").is_panic());
        lock(&locks, "k").await.release().await.expect("release");
        store.is_empty(&locks, "k").await;
    }

    async fn a_body_is_cancelled_when_the_lock_is_lost(store: &TestStore) {
        let locks = store.manager().await;
        let request = locks.lock("k").max_hold(Duration::from_millis(20));
        let result = soon("the loss", request.with(async |_| std::future::pending::<()>().await)).await;
        let error = result.expect_err("the lock was lost");
        assert!(error.loss_reason() == Some(LossReason::MaxHold), "{error}");
        assert!(error.to_string().contains("\"k\""), "{error}");
    }
}

on_each_store! {
    on(servers);

    async fn processes_lose_no_updates_under_the_lock(store: &TestStore) {
        let resource = RedisServer::start();
        let url = resource.url();
        let mut workers: Vec<_> = (0..4).map(|_| store.worker("counter", &[("SHARDLOCK_TEST_RESOURCE", &url)])).collect();
        for worker in &mut workers {
            assert!(worker.wait().success());
        }
        assert_eq!(resource.query::<u64>(&["GET", "number"]), 4 * TASKS * ROUNDS);
    }

    async fn old_guard_of_a_deleted_lease_does_not_free_the_new_holders_lock(store: &TestStore) {
        let (one, other) = (store.manager().await, store.manager().await);
        let old = one.lock("k").await.expect("lock");
        store.servers().delete(&store.lease("k"));
        let new = other.try_lock("k").await.expect("try").expect("the lease was deleted");
        assert!(new.token() > old.token());
        let error = old.release().await.expect_err("another holder has the lock");
        assert!(error.is_lost(), "{error}");
        assert_eq!(one.inspect("k").await.expect("inspect").holder.expect("a holder").owner, new.owner());
        new.release().await.expect("release");
        store.is_empty(&one, "k").await;
    }
}

on_each_store! {
    on(servers, own);

    async fn namespace_prefixes_every_name_and_isolates_managers(store: &TestStore) {
        let builder = |namespace: &str| store.builder().namespace(namespace);
        let one = builder("one/").connect().await.expect("connect");
        let rival = builder("one/").connect().await.expect("connect");
        let stranger = builder("two/").connect().await.expect("connect");
        for key in ["k", "{tag}k", "b}r%"] {
            let guard = one.lock(key).await.expect("lock");
            let waiting = tokio::spawn({
                let (rival, key) = (rival.clone(), key.to_owned());
                async move { lock(&rival, &key).await }
            });
            until_queued(&one, key, 1).await;
            let theirs = stranger.try_lock(key).await.expect("try");
            let theirs = theirs.expect("another namespace has its own lock");
            for name in store.servers().names() {
                let bare = name.trim_start_matches('{');
                assert!(bare.starts_with("one/") || bare.starts_with("two/"), "{name}");
            }
            theirs.release().await.expect("release");
            guard.release().await.expect("release");
            soon("the waiter", waiting)
                .await
                .expect("a task")
                .release()
                .await
                .expect("release");
        }
        let left = || {
            let mut left = store.servers().names();
            left.retain(|name| !name.contains("/%") && !name.contains("/in:"));
            left
        };
        if store.kind().cleans_up_later() {
            until("nothing is left", async || left().is_empty()).await;
        }
        assert_eq!(left(), [""; 0]);
    }
}

/// Locking does not require a TCP address.
#[cfg(unix)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn locks_work_through_a_unix_socket() {
    let server = RedisServer::start_with(&["--unixsocket", "s", "--requirepass", "s3cret"]);
    let url = format!("unix://{}?pass=s3cret&db=1", server.dir().join("s").display());
    let (one, other) = (support_locks::connect(&url).await, support_locks::connect(&url).await);
    let guard = lock(&one, "k").await;
    let waiting = tokio::spawn(async move { lock(&other, "k").await });
    until_queued(&one, "k", 1).await;
    guard.release().await.expect("release");
    soon("the hand-off", waiting)
        .await
        .expect("a task")
        .release()
        .await
        .expect("release");

    let builder = LockManager::builder().shard("unix:///no/such/socket");
    let error = builder.store_timeout(STORE_TIMEOUT).connect().await;
    let error = error.expect_err("nothing listens there");
    assert!(error.kind() == LockErrorKind::Unavailable, "{error}");
    assert!(error.to_string().contains("/no/such/socket"), "{error}");
}

/// Regression: parallel tests in one process that all used `memory://` shared its keys.
#[tokio::test(start_paused = true)]
async fn unnamed_memory_is_private_to_its_manager() {
    let connect = async |url: &str| support_locks::connect(url).await;
    let (one, other) = (connect("memory://").await, connect("memory://").await);
    let (first, second) = (lock(&one, "k").await, lock(&other, "k").await);
    assert!(first.is_valid() && second.is_valid());
    let (one, other) = (connect("memory://by-name").await, connect("memory://by-name").await);
    let first = lock(&one, "k").await;
    assert!(other.try_lock("k").await.expect("a try").is_none());
    first.release().await.expect("release");
    lock(&other, "k").await.release().await.expect("release");
}

/// Regression: with tokio's clock paused, which advances to the next timer whenever the runtime is
/// idle, connecting timed out at once.
async fn works_with_a_paused_clock(url: &str) {
    let locks = support_locks::connect(url).await;
    lock(&locks, "free").await.release().await.expect("release");
    let guard = lock(&locks, "k").await;
    let next = tokio::spawn({
        let locks = locks.clone();
        async move { locks.lock("k").timeout(Duration::from_secs(60)).await }
    });
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert!(guard.is_valid() && !next.is_finished());
    guard.release().await.expect("release");
    let next = next.await.expect("a task").expect("the lock");
    let started = tokio::time::Instant::now();
    let late = locks
        .lock("k")
        .timeout(Duration::from_secs(2))
        .await
        .expect_err("the lock is held");
    assert!(
        late.is_timeout() && started.elapsed() >= Duration::from_secs(2),
        "{late}"
    );
    drop(next);
    locks.shutdown().await.ok();
}

#[tokio::test(start_paused = true)]
async fn memory_works_with_a_paused_clock() {
    works_with_a_paused_clock("memory://").await;
}

#[tokio::test(start_paused = true)]
async fn redis_works_with_a_paused_clock() {
    works_with_a_paused_clock(&support::RedisServer::start().url()).await;
}
