//! A cancelled waiter leaves nothing behind and delays no other waiter.

use std::future::IntoFuture;
use std::time::Duration;

use support::PATIENCE;
use support_locks::{TestStore, lock, on_each_store, poll_once, soon, until_queued};
use tokio::task::JoinSet;

/// Repetitions of each race, so that the two sides meet at different points.
const RACES: u32 = 300;

on_each_store! {
    async fn a_waiter_can_be_dropped_after_any_number_of_polls(store: &TestStore) {
        let (locks, others) = (store.manager().await, store.manager().await);
        for held in [false, true] {
            for polls in 0..12 {
                let guard = if held { Some(lock(&locks, "k").await) } else { None };
                for waiter in [&locks, &others] {
                    let mut waiting = waiter.lock("k").into_future();
                    let mut got = None;
                    for _ in 0..polls {
                        got = poll_once(&mut waiting);
                        if got.is_some() {
                            break;
                        }
                        tokio::task::yield_now().await;
                    }
                    drop(waiting);
                    drop(got);
                }
                // Whatever those polls started, the next caller is served as soon as the holder
                // releases.
                if let Some(guard) = guard {
                    guard.release().await.expect("release");
                }
                lock(&others, "k").await.release().await.expect("release");
            }
        }
        store.is_empty(&locks, "k").await;
    }

    async fn request_that_is_never_polled_has_no_effect(store: &TestStore) {
        let locks = store.manager().await;
        drop(locks.lock("k"));
        drop(locks.lock("k").into_future());
        drop(locks.try_lock("k").into_future());
        let seen = locks.inspect("k").await.expect("inspect");
        assert_eq!((seen.holder, seen.queue_length, seen.last_token), (None, 0, None));
    }

    async fn aborted_waiter_leaves_the_queue(store: &TestStore) {
        let (locks, others, last) = (store.manager().await, store.manager().await, store.manager().await);
        let guard = lock(&locks, "k").await;
        let leaving = tokio::spawn({
            let others = others.clone();
            async move { lock(&others, "k").await }
        });
        until_queued(&locks, "k", 1).await;
        let staying = tokio::spawn({
            let last = last.clone();
            async move { lock(&last, "k").await }
        });
        until_queued(&locks, "k", 2).await;

        leaving.abort();
        assert!(leaving.await.expect_err("the task was aborted").is_cancelled());
        until_queued(&locks, "k", 1).await;
        guard.release().await.expect("release");
        soon("the remaining waiter", staying).await.expect("a task").release().await.expect("release");
        store.is_empty(&locks, "k").await;
    }

    async fn dropped_local_waiter_does_not_delay_the_others(store: &TestStore) {
        let (locks, others) = (store.manager().await, store.manager().await);
        let guard = lock(&others, "k").await;
        let mut waiting: Vec<_> = (0..40)
            .map(|_| {
                let locks = locks.clone();
                tokio::spawn(async move { lock(&locks, "k").await.release().await.expect("release") })
            })
            .collect();
        until_queued(&others, "k", 1).await;
        // The aborted tasks include the first, which sent the request.
        let leaving: Vec<_> = (0..20).map(|index| waiting.remove(index)).collect();
        for task in &leaving {
            task.abort();
        }
        for task in leaving {
            assert!(task.await.expect_err("the task was aborted").is_cancelled());
        }
        guard.release().await.expect("release");
        for task in waiting {
            soon("the remaining waiter", task).await.expect("a task");
        }
        store.is_empty(&locks, "k").await;
    }

    async fn waiter_dropped_while_being_woken_passes_the_lock_on(store: &TestStore) {
        let (locks, others) = (store.manager().await, store.manager().await);
        for race in 0..RACES {
            // Half of the races are within a process, the other half between processes.
            let waiter = if race % 2 == 0 { &locks } else { &others };
            let guard = lock(&locks, "k").await;
            let mut leaving = waiter.lock("k").into_future();
            assert!(poll_once(&mut leaving).is_none());
            let staying = tokio::spawn({
                let waiter = waiter.clone();
                async move { lock(&waiter, "k").await }
            });
            let leaving = tokio::spawn(async move {
                tokio::select! {
                    biased;
                    () = yields(race % 32) => None,
                    guard = leaving => Some(guard.expect("lock")),
                }
            });
            let ended = tokio::spawn(guard.release());
            drop(leaving.await.expect("a task"));
            ended.await.expect("a task").expect("release");
            soon("the remaining waiter", staying).await.expect("a task").release().await.expect("release");
        }
        store.is_empty(&locks, "k").await;
    }

    async fn a_woken_waiter_that_is_dropped_unpolled_passes_the_lock_on(store: &TestStore) {
        let (locks, others) = (store.manager().await, store.manager().await);
        for _ in 0..RACES {
            let guard = lock(&locks, "k").await;
            let mut woken = locks.lock("k").into_future();
            assert!(poll_once(&mut woken).is_none());
            let next = tokio::spawn({
                let others = others.clone();
                async move { lock(&others, "k").await }
            });
            // Within a process this hands the lock to a future that is never polled again.
            guard.release().await.expect("release");
            drop(woken);
            soon("the next", next).await.expect("a task").release().await.expect("release");
        }
        store.is_empty(&locks, "k").await;
    }

    async fn timeouts_that_race_with_hand_offs_leave_the_lock_usable(store: &TestStore) {
        let (locks, others) = (store.manager().await, store.manager().await);
        let mut tasks = JoinSet::new();
        for index in 0..24_u64 {
            let locks = if index % 2 == 0 { locks.clone() } else { others.clone() };
            tasks.spawn(async move {
                let mut had = 0;
                for round in 0..40_u64 {
                    // From microseconds to milliseconds, so that waits end at every stage of a
                    // hand-off.
                    let limit = Duration::from_micros(1 + (index * 97 + round * 131) % 4_000);
                    match locks.lock("k").timeout(limit).await {
                        Ok(guard) => {
                            had += 1;
                            guard.release().await.expect("release");
                        }
                        Err(error) => assert!(error.is_timeout(), "{error}"),
                    }
                }
                had
            });
        }
        while let Some(had) = soon("the tasks", tasks.join_next()).await {
            had.expect("a task");
        }
        lock(&locks, "k").await.release().await.expect("release");
        lock(&others, "k").await.release().await.expect("release");
        store.is_empty(&locks, "k").await;
    }

    async fn request_with_a_zero_timeout_returns_at_once(store: &TestStore) {
        let (locks, others) = (store.manager().await, store.manager().await);
        let guard = lock(&locks, "k").await;
        for waiter in [&locks, &others] {
            let error = waiter.lock("k").timeout(Duration::ZERO).await.expect_err("the lock is held");
            assert!(error.is_timeout(), "{error}");
        }
        assert_eq!(locks.inspect("k").await.expect("inspect").queue_length, 0);
        guard.release().await.expect("release");
        let free = others.lock("k").timeout(Duration::ZERO).await.expect("the key is free");
        free.release().await.expect("release");
        // A request cancelled from outside leaves nothing behind either.
        let _ = tokio::time::timeout(Duration::ZERO, locks.lock("k").into_future()).await;
        store.is_empty(&locks, "k").await;
    }

    async fn dropped_body_releases_the_lock(store: &TestStore) {
        let (locks, others) = (store.manager().await, store.manager().await);
        let (begun, has_begun) = tokio::sync::oneshot::channel();
        let body = tokio::spawn({
            let locks = locks.clone();
            async move {
                let body = async |_: &shardlock::LockGuard| {
                    begun.send(()).expect("the test is waiting");
                    std::future::pending::<()>().await;
                };
                locks.lock("k").timeout(PATIENCE).with(body).await
            }
        });
        has_begun.await.expect("the body starts");
        body.abort();
        assert!(body.await.expect_err("the task was aborted").is_cancelled());
        lock(&others, "k").await.release().await.expect("release");
        store.is_empty(&locks, "k").await;
    }

    async fn dropped_release_still_releases_the_lock(store: &TestStore) {
        let (locks, others) = (store.manager().await, store.manager().await);
        for polls in 0..6 {
            let guard = lock(&locks, "k").await;
            let mut releasing = Box::pin(guard.release());
            for _ in 0..polls {
                if poll_once(&mut releasing).is_some() {
                    break;
                }
                tokio::task::yield_now().await;
            }
            drop(releasing);
            lock(&others, "k").await.release().await.expect("release");
        }
        store.is_empty(&locks, "k").await;
    }

    async fn a_thousand_cancelled_waiters_leave_no_key_on_the_server(store: &TestStore) {
        let (locks, others) = (store.manager().await, store.manager().await);
        let guards: Vec<_> = futures_util::future::join_all((0..10).map(|key| {
            let locks = locks.clone();
            async move { lock(&locks, &format!("k{key}")).await }
        }))
        .await;
        let mut waiting = JoinSet::new();
        for number in 0..1000 {
            let others = others.clone();
            waiting.spawn(async move { lock(&others, &format!("k{}", number % 10)).await });
        }
        for key in 0..10 {
            until_queued(&locks, &format!("k{key}"), 1).await;
        }
        waiting.shutdown().await;
        for guard in guards {
            let key = guard.key().to_owned();
            guard.release().await.expect("release");
            until_queued(&locks, &key, 0).await;
        }
        store.is_clean().await;
    }
}

async fn yields(count: u32) {
    for _ in 0..count {
        tokio::task::yield_now().await;
    }
}
