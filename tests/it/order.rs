//! Locks are granted in request order.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use support::quorum::MAX_TTL;
use support_locks::{Kind, MARGIN, TestStore, lock, on_each_store, poll_once, soon, until_queued};
use tokio::task::JoinSet;

/// So long that no renewal falls into a test, which would be counted.
const LONG_TTL: Duration = Duration::from_secs(600);

/// Less time than a waiter takes that is not notified: the TTL is ten seconds, or that of a quorum.
fn long_before_an_expiry(store: &TestStore) -> Duration {
    match store.kind() {
        Kind::Redlock | Kind::Mixed => MAX_TTL * 9 / 10,
        _ => Duration::from_secs(5),
    }
}

on_each_store! {
    on(servers);

    async fn eight_processes_are_served_in_the_order_in_which_they_came(store: &TestStore) {
        let locks = store.manager().await;
        let mut waiters = store.lockers(8, MAX_TTL);
        let guard = lock(&locks, "k").await;
        for (place, waiter) in waiters.iter_mut().enumerate() {
            waiter.request();
            until_queued(&locks, "k", place as u64 + 1).await;
        }
        let queue = locks.inspect("k").await.expect("inspect").queue;
        for (waiter, owner_tag) in waiters.iter().zip(&queue) {
            assert!(owner_tag.contains(&format!("-{}-", waiter.pid())), "{queue:?}");
        }
        guard.release().await.expect("release");
        for waiter in &mut waiters {
            waiter.locked();
            // The others still wait: the holder is this waiter.
            let holder = locks.inspect("k").await.expect("inspect").holder.expect("a holder");
            assert!(holder.owner.contains(&format!("-{}-", waiter.pid())), "{holder:?}");
            waiter.release();
        }
        for mut waiter in waiters {
            assert!(waiter.wait().success());
        }
    }
}

on_each_store! {
    async fn five_hundred_tasks_are_served_once_each_and_in_order_within_their_process(store: &TestStore) {
        let watcher = store.manager().await;
        let guard = lock(&watcher, "k").await;
        let served = Arc::new(Mutex::new(Vec::new()));
        let mut tasks = JoinSet::new();
        for process in 0..2_u32 {
            // Without a limit, one turn serves all tasks of a process. A turn of 100 needs more
            // tokens than a grant comes with.
            let locks = store.builder().max_burst(100).connect().await.expect("connect");
            for number in 0..250_u32 {
                let (locks, served) = (locks.clone(), Arc::clone(&served));
                let mut waiting = Box::pin(async move {
                    let guard = lock(&locks, "k").await;
                    served.lock().push((process, number, guard.token()));
                    guard.release().await.expect("release");
                });
                // The first poll enqueues the request.
                assert!(poll_once(&mut waiting).is_none());
                tasks.spawn(waiting);
            }
            until_queued(&watcher, "k", u64::from(process) + 1).await;
        }
        guard.release().await.expect("release");
        while let Some(ended) = soon("all tasks", tasks.join_next()).await {
            ended.expect("a task");
        }
        let served = served.lock().clone();
        assert_eq!(served.len(), 500);
        assert!(served.windows(2).all(|pair| pair[0].2 < pair[1].2), "tokens grow");
        for process in 0..2 {
            let numbers: Vec<_> = served.iter().filter(|seen| seen.0 == process).map(|seen| seen.1).collect();
            assert_eq!(numbers, (0..250).collect::<Vec<_>>());
        }
        // The processes take turns instead of being served one after the other.
        let turns = served.windows(2).filter(|pair| pair[0].0 != pair[1].0).count();
        assert!(turns >= 4, "{turns}");
        store.is_empty(&watcher, "k").await;
    }

    async fn managers_are_served_in_the_order_in_which_they_came(store: &TestStore) {
        let watcher = store.manager().await;
        let guard = lock(&watcher, "k").await;
        let served = Arc::new(Mutex::new(Vec::new()));
        let mut tasks = JoinSet::new();
        for number in 0..16_u64 {
            let (locks, served) = (store.manager().await, Arc::clone(&served));
            tasks.spawn(async move {
                let guard = lock(&locks, "k").await;
                served.lock().push(number);
                guard.release().await.expect("release");
            });
            until_queued(&watcher, "k", number + 1).await;
        }
        guard.release().await.expect("release");
        while let Some(ended) = soon("all tasks", tasks.join_next()).await {
            ended.expect("a task");
        }
        assert_eq!(*served.lock(), (0..16).collect::<Vec<_>>());
    }

    async fn a_failed_try_does_not_delay_the_next_waiter(store: &TestStore) {
        let (holder, trier, waiter) = (store.manager().await, store.manager().await, store.manager().await);
        let guard = lock(&holder, "k").await;
        assert!(trier.try_lock("k").await.expect("try").is_none());
        let waiting = tokio::spawn({
            let waiter = waiter.clone();
            async move { lock(&waiter, "k").await }
        });
        until_queued(&holder, "k", 1).await;
        assert!(trier.try_lock("k").await.expect("try").is_none());
        assert!(waiter.try_lock("k").await.expect("try").is_none());
        let started = Instant::now();
        guard.release().await.expect("release");
        let next = soon("the waiter", waiting).await.expect("a task");
        assert!(started.elapsed() < long_before_an_expiry(store), "{:?}", started.elapsed());
        next.release().await.expect("release");
    }

    async fn an_abandoned_place_does_not_delay_the_next_waiter(store: &TestStore) {
        let (holder, leaver, waiter) = (store.manager().await, store.manager().await, store.manager().await);
        let guard = lock(&holder, "k").await;
        let leaving = tokio::spawn({
            let leaver = leaver.clone();
            async move { lock(&leaver, "k").await }
        });
        until_queued(&holder, "k", 1).await;
        let waiting = tokio::spawn({
            let waiter = waiter.clone();
            async move { lock(&waiter, "k").await }
        });
        until_queued(&holder, "k", 2).await;
        leaving.abort();
        let started = Instant::now();
        guard.release().await.expect("release");
        let next = soon("the waiter", waiting).await.expect("a task");
        assert!(started.elapsed() < long_before_an_expiry(store), "{:?}", started.elapsed());
        next.release().await.expect("release");
        store.is_empty(&holder, "k").await;
    }
}

on_each_store! {
    on(counted, own);

    async fn dead_waiter_at_the_head_of_the_queue_is_skipped(store: &TestStore) {
        let server = store.server();
        // Nothing here waits for an expiry.
        let connect = || store.builder().ttl(LONG_TTL).connect();
        let (holder, next) = (connect().await.expect("connect"), connect().await.expect("connect"));
        // Loads the script into the server. Otherwise the first call would count twice.
        let first = lock(&holder, "k").await;
        let second = tokio::spawn({
            let next = next.clone();
            async move { lock(&next, "k").await }
        });
        until_queued(&holder, "k", 1).await;
        first.release().await.expect("release");
        soon("the hand-off", second)
            .await
            .expect("a task")
            .release()
            .await
            .expect("release");
        let mut dead = store.locker();
        let guard = lock(&holder, "k").await;
        dead.request();
        until_queued(&holder, "k", 1).await;
        let waiting = tokio::spawn(async move { lock(&next, "k").await });
        until_queued(&holder, "k", 2).await;
        let inboxes = server.channels().len();
        dead.kill();
        support_locks::until("its inbox is gone", async || server.channels().len() == inboxes - 1).await;

        server.reset_stats();
        let started = Instant::now();
        guard.release().await.expect("release");
        let guard = soon("the next", waiting).await.expect("a task");
        assert!(started.elapsed() < long_before_an_expiry(store), "{:?}", started.elapsed());
        // A single release finds that the first waiter has no subscription, and publishes nothing
        // to it. A busy machine may not yet have notified the holder of its waiters. Then it first
        // calls the script of a release without any, the only one that checks for a queue.
        let for_nobody = server.calls("exists");
        assert!(for_nobody <= 1, "{:?}", server.commands());
        assert_eq!(
            (server.script_calls() - for_nobody, server.publishes()),
            (1, 1),
            "{:?}",
            server.commands()
        );
        guard.release().await.expect("release");
        store.is_empty(&holder, "k").await;
    }

    async fn grant_to_a_dead_waiter_passes_to_the_next_within_its_ttl_without_polling(store: &TestStore) {
        let server = store.server();
        let ttl = Duration::from_secs(2);
        let holder = store.builder().ttl(ttl).connect().await.expect("connect");
        let next = store.builder().ttl(LONG_TTL).connect().await.expect("connect");
        let mut dead = store.lockers(1, ttl).remove(0);
        let guard = lock(&holder, "k").await;
        dead.request();
        until_queued(&holder, "k", 1).await;
        let waiting = tokio::spawn(async move { lock(&next, "k").await });
        until_queued(&holder, "k", 2).await;

        // A stopped process stays subscribed and receives the grant without ever reading it.
        dead.stop();
        let started = Instant::now();
        guard.release().await.expect("release");
        server.reset_stats();
        let guard = soon("the next", waiting).await.expect("a task");
        let took = started.elapsed();
        assert!(took < ttl + 3 * MARGIN, "{took:?}");
        // At most a few requests at the end of the TTL.
        assert!(server.script_calls() <= 5, "{:?}", server.commands());
        dead.kill();
        guard.release().await.expect("release");
        store.is_clean().await;
    }
}
