//! The end of a guard, a runtime, and a manager. Nothing leaks, hangs or panics.

use std::future::IntoFuture;
use std::thread;
use std::time::{Duration, Instant};

use shardlock::LossReason;
use shardlock::error::LockErrorKind;
use support::quorum::MAX_TTL;
use support::{PATIENCE, wait_until, worker};
use support_locks::{
    MARGIN, STORE_TIMEOUT, TestStore, builder_of, hand_off, lock, on_each_store, poll_once, soon, until, until_queued,
};
use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinSet;

fn runtime() -> Runtime {
    Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime")
}

/// Uses many keys, drops its manager, and checks that no tasks and no background threads are left.
pub(crate) fn use_many_keys(me: &worker::Current) {
    let runtime = runtime();
    let keys: usize = me.var("SHARDLOCK_TEST_KEYS").parse().expect("a number");
    // A busy machine takes its time for so many locks.
    let builder = builder_of(me).store_timeout(PATIENCE);
    let locks = runtime.block_on(builder.connect()).expect("connect");
    runtime.block_on(async {
        let mut tasks = JoinSet::new();
        const TASKS: usize = 64;
        for task in 0..TASKS {
            let locks = locks.clone();
            tasks.spawn(async move {
                for key in (task..keys).step_by(TASKS) {
                    lock(&locks, &format!("key:{key}"))
                        .await
                        .release()
                        .await
                        .expect("release");
                }
            });
        }
        while let Some(ended) = tasks.join_next().await {
            ended.expect("a task");
        }
    });
    me.send("used");
    me.recv();
    drop(locks);
    let metrics = runtime.handle().metrics();
    wait_until("no task is left", PATIENCE, || metrics.num_alive_tasks() == 0);
    wait_until("no thread is left", PATIENCE, || threads_of_managers() == 0);
    me.send("gone");
    me.recv();
}

/// Number of background threads of managers in this process.
#[cfg(target_os = "linux")]
fn threads_of_managers() -> usize {
    let threads = std::fs::read_dir("/proc/self/task").expect("a list of threads");
    let names = threads.filter_map(|thread| std::fs::read_to_string(thread.ok()?.path().join("comm")).ok());
    names.filter(|name| name.trim_end() == "shardlock").count()
}

#[cfg(not(target_os = "linux"))]
fn threads_of_managers() -> usize {
    0
}

/// Runs a guard and waiters on a separate runtime, and ends that runtime with `end`.
///
/// Uses its own thread, because the test's thread already runs a runtime.
fn end_a_runtime(store: &TestStore, end: impl FnOnce(Runtime) + Send) {
    thread::scope(|scope| scope.spawn(|| end_a_runtime_from_outside(store, end)).join()).expect("a thread");
}

fn end_a_runtime_from_outside(store: &TestStore, end: impl FnOnce(Runtime)) {
    let survivors = runtime();
    let survivor = survivors.block_on(store.manager());
    let dying = runtime();
    let (holding, is_holding) = std::sync::mpsc::channel();
    let locks = dying.block_on(store.manager());
    dying.spawn({
        let locks = locks.clone();
        async move {
            let _guard = lock(&locks, "k").await;
            holding.send(()).expect("the test is waiting");
            std::future::pending::<()>().await;
        }
    });
    is_holding.recv_timeout(PATIENCE).expect("the lock is held");
    // One waits for a task of its own process, the other for another process.
    dying.spawn({
        let locks = locks.clone();
        async move { lock(&locks, "k").await }
    });
    let theirs = survivors.block_on(lock(&survivor, "other"));
    dying.spawn({
        let locks = locks.clone();
        async move { lock(&locks, "other").await }
    });
    survivors.block_on(until_queued(&survivor, "other", 1));

    let started = Instant::now();
    end(dying);
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    survivors.block_on(async {
        // The TTL is ten seconds, so the lock was released and did not expire.
        lock(&survivor, "k").await.release().await.expect("release");
        assert!(started.elapsed() < Duration::from_secs(8), "{:?}", started.elapsed());
        until_queued(&survivor, "other", 0).await;
        theirs.release().await.expect("release");
        store.is_empty(&survivor, "other").await;
        // The manager does not depend on the runtime that created it.
        lock(&locks, "k").await.release().await.expect("on another runtime");
        // Its inbox was read on the runtime that is gone and has moved elsewhere: the lock is
        // handed over long before the TTL has passed.
        let started = Instant::now();
        hand_off(&survivor, &locks, "other").await;
        assert!(started.elapsed() < Duration::from_secs(8), "{:?}", started.elapsed());
        store.is_empty(&survivor, "k").await;
    });
}

/// The runtime on which the manager was connected is single-threaded, and no thread is inside its
/// `block_on`.
fn use_an_idle_runtimes_manager(store: &TestStore) {
    let builder = || store.builder().store_timeout(Duration::from_secs(5));
    let idle = Builder::new_current_thread().enable_all().build().expect("a runtime");
    let locks = idle.block_on(builder().connect()).expect("connect");
    let guard = idle.block_on(lock(&locks, "held"));
    let busy = runtime();
    let other = busy.block_on(builder().connect()).expect("connect");
    busy.block_on(async {
        guard.release().await.expect("the lock was held throughout");
        lock(&locks, "k").await.release().await.expect("release");
        // The TTL is ten seconds, so the inbox is being read.
        let started = Instant::now();
        hand_off(&other, &locks, "k").await;
        hand_off(&locks, &other, "k").await;
        assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
        for key in ["held", "k"] {
            store.is_empty(&other, key).await;
        }
    });
    // The tasks that this runtime did not run meanwhile do no harm when they run.
    idle.block_on(async {
        lock(&locks, "k").await.release().await.expect("release");
        hand_off(&other, &locks, "k").await;
        store.is_empty(&other, "k").await;
    });
    drop(idle);
    busy.block_on(async {
        lock(&locks, "k").await.release().await.expect("release");
        hand_off(&other, &locks, "k").await;
    });
}

on_each_store! {
    /// Regression: connections and the inbox were bound to a runtime that ran nothing, so every
    /// lock from another runtime failed after `store_timeout`.
    async fn manager_works_while_the_runtime_that_connected_is_idle(store: &TestStore) {
        thread::scope(|scope| scope.spawn(|| use_an_idle_runtimes_manager(store)).join()).expect("a thread");
    }

    async fn dropped_runtime_releases_its_locks(store: &TestStore) {
        end_a_runtime(store, drop);
    }

    async fn runtime_shut_down_in_the_background_releases_its_locks(store: &TestStore) {
        end_a_runtime(store, Runtime::shutdown_background);
    }

    async fn a_shutdown_ends_guards_waiters_and_later_requests(store: &TestStore) {
        let (locks, others) = (store.manager().await, store.manager().await);
        let guard = lock(&locks, "held").await;
        let kept = lock(&locks, "kept").await;
        let theirs = lock(&others, "theirs").await;
        let local: Vec<_> = (0..10)
            .map(|_| {
                let locks = locks.clone();
                tokio::spawn(locks.lock("held").into_future())
            })
            .collect();
        let remote = tokio::spawn(locks.lock("theirs").into_future());
        let next = tokio::spawn(others.lock("held").into_future());
        until_queued(&others, "theirs", 1).await;
        until_queued(&others, "held", 1).await;
        let mut lost = Box::pin(guard.lost());
        assert_eq!(poll_once(&mut lost), None);

        soon("the shutdown", locks.shutdown()).await.ok();
        assert_eq!(soon("the loss", lost).await, LossReason::Closed);
        assert!(!guard.is_valid() && !kept.is_valid());
        for waiter in local.into_iter().chain([remote]) {
            let error = soon("a waiter", waiter).await.expect("a task").expect_err("the manager is closed");
            assert!(error.kind() == LockErrorKind::Closed, "{error}");
        }
        for _ in 0..3 {
            let error = locks.lock("new").await.expect_err("the manager is closed");
            assert!(error.kind() == LockErrorKind::Closed, "{error}");
            let error = locks.clone().try_lock("new").await.expect_err("the manager is closed");
            assert!(error.kind() == LockErrorKind::Closed && !error.is_retryable(), "{error}");
        }
        // The servers have already been notified, so the next waiters need not wait for the TTL of
        // ten seconds.
        let started = Instant::now();
        let next = soon("the next", next).await.expect("a task").expect("lock");
        lock(&others, "kept").await.release().await.expect("release");
        assert!(started.elapsed() < Duration::from_secs(8), "{:?}", started.elapsed());

        // Guards released late do not affect the next holder.
        let error = guard.release().await.expect_err("the lock was lost");
        assert!(error.loss_reason() == Some(LossReason::Closed), "{error}");
        drop(kept);
        assert!(next.is_valid());
        next.release().await.expect("release");
        theirs.release().await.expect("release");
        soon("a second shutdown", locks.shutdown()).await.ok();
        store.is_empty(&others, "held").await;
        store.is_empty(&others, "theirs").await;
    }

    async fn a_shutdown_under_load_leaves_nothing(store: &TestStore) {
        let watcher = store.manager().await;
        for round in 0..10 {
            let (locks, others) = (store.manager().await, store.manager().await);
            let mut tasks = JoinSet::new();
            for task in 0..16 {
                let locks = if task % 2 == 0 { locks.clone() } else { others.clone() };
                tasks.spawn(async move {
                    loop {
                        match locks.lock(["a", "b"][task / 2 % 2]).await {
                            // The manager may be shut down while the lock is held.
                            Ok(guard) => drop(guard.release().await),
                            Err(error) if error.kind() == LockErrorKind::Closed => return,
                            Err(error) => panic!("{error}"),
                        }
                    }
                });
            }
            for _ in 0..round * 20 {
                tokio::task::yield_now().await;
            }
            let (one, other) = tokio::join!(locks.shutdown(), others.shutdown());
            one.and(other).ok();
            while let Some(ended) = soon("the tasks", tasks.join_next()).await {
                ended.expect("a task");
            }
            store.is_empty(&watcher, "a").await;
            store.is_empty(&watcher, "b").await;
        }
    }

    async fn dropped_shutdown_continues_in_the_background(store: &TestStore) {
        let (locks, others) = (store.manager().await, store.manager().await);
        let guard = lock(&locks, "k").await;
        let mut closing = Box::pin(locks.shutdown());
        poll_once(&mut closing);
        drop(closing);
        assert_eq!(soon("the loss", guard.lost()).await, LossReason::Closed);
        lock(&others, "k").await.release().await.expect("release");
        store.is_empty(&others, "k").await;
    }

    /// Programs that drop their guards and exit after the shutdown rely on this.
    async fn a_shutdown_waits_for_the_releases_of_guards_that_were_dropped_before(store: &TestStore) {
        let (locks, others) = (store.manager().await, store.manager().await);
        let mut guards = vec![];
        for key in ["a", "b", "c"] {
            guards.push(lock(&locks, key).await);
        }
        drop(guards);
        locks.shutdown().await.expect("shutdown");
        for key in ["a", "b", "c"] {
            let guard = others.try_lock(key).await.expect("try");
            guard.expect("the key is free").release().await.expect("release");
        }
    }

    /// Regression: the key was forgotten with the loss, and the shutdown left its lease.
    async fn a_shutdown_releases_the_lease_of_a_lost_guard_that_is_still_out(store: &TestStore) {
        let (locks, others) = (store.manager().await, store.manager().await);
        let guard = locks.lock("k").max_hold(Duration::from_millis(20)).await.expect("lock");
        assert_eq!(soon("the loss", guard.lost()).await, LossReason::MaxHold);
        locks.shutdown().await.expect("shutdown");
        let free = others.try_lock("k").await.expect("try");
        free.expect("the key is free").release().await.expect("release");
        drop(guard);
    }

    /// Regression: the outcome that the future did not collect counted as a lease.
    async fn a_shutdown_does_not_wait_for_a_future_that_is_not_polled(store: &TestStore) {
        let (locks, others) = (store.manager().await, store.manager().await);
        let _guard = lock(&locks, "k").await;
        let mut waiting = Box::pin(locks.lock("k").into_future());
        poll_once(&mut waiting);
        locks.shutdown().await.expect("shutdown");
        let free = others.try_lock("k").await.expect("try");
        free.expect("the key is free").release().await.expect("release");
        let error = waiting.await.expect_err("the manager is closed");
        assert!(error.kind() == LockErrorKind::Closed, "{error}");
    }

    async fn a_guard_outlives_the_handles_of_its_manager(store: &TestStore) {
        let locks = store.builder().ttl(MAX_TTL).connect().await.expect("connect");
        let others = store.manager().await;
        let guard = lock(&locks, "k").await;
        let waiting = locks.lock("other").into_future();
        drop(locks);
        let lost = tokio::time::timeout(MAX_TTL * 3 / 2, guard.lost()).await;
        assert!(lost.is_err() && guard.is_valid(), "the lease is still renewed");
        assert!(others.try_lock("k").await.expect("try").is_none());
        waiting.await.expect("the waiter is still served").release().await.expect("release");
        guard.release().await.expect("the lock was held throughout");
        store.is_empty(&others, "k").await;
    }
}

on_each_store! {
    on(servers, own);

    async fn manager_leaves_only_counters_and_no_task_thread_or_channel(store: &TestStore) {
        let nodes = store.servers().nodes();
        let before: usize = nodes.iter().map(|node| node.connections()).sum();
        let keys = store.kind().many_keys().to_string();
        let mut user = store.worker("user_of_many_keys", &[("SHARDLOCK_TEST_KEYS", &keys)]);
        assert_eq!(user.line_within(4 * PATIENCE).as_deref(), Some("used"));
        wait_until("all locks are released", PATIENCE, || store.lock_keys().is_empty());
        let channels = || store.servers().inboxes(store.namespace());
        // At most one counter per slot, and the shard map, on each server.
        for node in &nodes {
            assert!(node.dbsize() <= 16_384 + 1, "{}", node.dbsize());
        }
        // In a cluster, a slot has an inbox for a minute after a request was repeated, as on a busy
        // machine.
        let most = nodes.len() + store.kind().many_keys() / 100;
        assert!(channels() <= most, "{} inboxes", channels());
        user.send("end");
        assert_eq!(user.line(), "gone");
        wait_until("no inbox is left", PATIENCE, || channels() == 0);
        wait_until("no connection is left", PATIENCE, || {
            nodes.iter().map(|node| node.connections()).sum::<usize>() <= before
        });
        assert!(user.wait().success());
    }

    async fn shut_down_managers_leave_no_inbox_or_connection(store: &TestStore) {
        let connections = || -> usize { store.servers().nodes().iter().map(|node| node.connections()).sum() };
        let listeners = || store.servers().inboxes(store.namespace());
        let before = connections();
        let (locks, other) = (store.manager().await, store.manager().await);
        // On every kind a waiting manager has an inbox.
        let guard = lock(&other, "k").await;
        let waiting = tokio::spawn(locks.lock("k").into_future());
        until_queued(&other, "k", 1).await;
        guard.release().await.expect("release");
        soon("the waiter", waiting).await.expect("a task").expect("lock").release().await.expect("release");
        for locks in [locks, other] {
            locks.shutdown().await.ok();
        }
        until("no inbox is left", async || listeners() == 0).await;
        until("no connection is left", async || connections() <= before).await;
    }
}

on_each_store! {
    on(pausable, own);

    async fn a_shutdown_without_its_servers_ends_in_time(store: &TestStore) {
        let locks = store.manager().await;
        let guard = lock(&locks, "k").await;
        let waiting = tokio::spawn(locks.lock("k").into_future());
        store.servers().stop_all();
        let started = Instant::now();
        let error = soon("the shutdown", locks.shutdown()).await.expect_err("nothing was released");
        assert!(error.leases() >= 1, "{error}");
        assert!(started.elapsed() < 2 * STORE_TIMEOUT + 3 * MARGIN, "{:?}", started.elapsed());
        assert_eq!(soon("the loss", guard.lost()).await, LossReason::Closed);
        let error = soon("the waiter", waiting).await.expect("a task").expect_err("the manager is closed");
        assert!(error.kind() == LockErrorKind::Closed, "{error}");
        store.servers().resume_all();
        // Requests already sent are executed once the servers are resumed.
        until("the lock is released", async || store.lock_keys().is_empty()).await;
    }
}

on_each_store! {
    on(redis, own);

    /// Regression: the leases whose releases were given up during the shutdown were not counted.
    async fn shutdown_whose_releases_are_refused_is_an_error(store: &TestStore) {
        let (locks, server) = (store.manager().await, store.server());
        let guard = lock(&locks, "k").await;
        server.command(&["ACL", "SETUSER", "default", "-@scripting"]);
        let started = Instant::now();
        let error = soon("the shutdown", locks.shutdown()).await.expect_err("nothing was released");
        assert_eq!(error.leases(), 1);
        assert!(started.elapsed() < STORE_TIMEOUT, "{:?}", started.elapsed());
        assert_eq!(soon("the loss", guard.lost()).await, LossReason::Closed);
        server.command(&["ACL", "SETUSER", "default", "+@scripting"]);
        assert_eq!(store.lock_keys().len(), 1);
    }
}
