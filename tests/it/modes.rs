//! Shared locks and permits: who may hold a key beside whom, in which order, and for how long.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use shardlock::error::LockErrorKind;
use shardlock::{LockMode, LossReason};
use support::worker;
use support_locks::{
    Kind, MARGIN, TestStore, builder_of, lock, on_each_store, poll_once, soon, until, until_queued, waiting,
};
use tokio::task::JoinSet;

/// Takes the key `k` in shared mode, or two of three permits of it, and keeps it.
#[tokio::main]
pub(crate) async fn hold(me: &worker::Current) {
    let ttl = Duration::from_millis(me.var("SHARDLOCK_TEST_TTL").parse().expect("a number"));
    let locks = builder_of(me).ttl(ttl).connect().await.expect("connect");
    let request = match me.var("SHARDLOCK_TEST_MODE").as_str() {
        "shared" => locks.lock("k").shared(),
        _ => locks.permits("k", 3).weight(2),
    };
    let guard = request.await.expect("the lock");
    me.send("holds");
    tokio::task::block_in_place(|| while me.recv().is_some() {});
    drop(guard);
}

on_each_store! {
    on(all);

    async fn shared_holders_hold_together_and_an_exclusive_one_alone(store: &TestStore) {
        let (here, there) = (store.manager().await, store.manager().await);
        let one = here.lock("k").shared().await.expect("a shared lock");
        let two = here.lock("k").shared().await.expect("one beside it");
        let three = there.lock("k").shared().await.expect("one of another manager");
        assert!([&one, &two, &three].iter().all(|guard| guard.is_valid() && guard.mode() == LockMode::Shared));
        assert!(two.token() > one.token() && three.token() > one.token());
        for locks in [&here, &there] {
            assert!(locks.try_lock("k").await.expect("a try").is_none());
        }
        let state = here.inspect("k").await.expect("inspect");
        // The tasks of one manager share a lease.
        assert_eq!((state.holder, state.holder_count, state.holders.len()), (None, 2, 2));
        for guard in [one, two, three] {
            guard.release().await.expect("release");
        }
        let writer = lock(&there, "k").await;
        for locks in [&here, &there] {
            assert!(locks.try_lock("k").shared().await.expect("a try").is_none());
        }
        writer.release().await.expect("release");
        let reader = here.lock("k").shared().await.expect("a shared lock");
        reader.release().await.expect("release");
    }

    async fn an_exclusive_holder_has_a_larger_token_than_all_before_it(store: &TestStore) {
        let (here, there) = (store.manager().await, store.manager().await);
        let mut largest = 0;
        for round in 0..5 {
            let locks = if round % 2 == 0 { &here } else { &there };
            let exclusive = lock(locks, "k").await;
            assert!(exclusive.token().get() > largest);
            largest = exclusive.token().get();
            exclusive.release().await.expect("release");
            let shared = [here.lock("k").shared().await, there.lock("k").shared().await];
            let shared = shared.map(|guard| guard.expect("a shared lock"));
            for guard in &shared {
                assert!(guard.token().get() > largest, "no token of a reader is below one of an earlier writer");
            }
            let last = shared.iter().map(|guard| guard.token().get()).max().expect("two guards");
            // Etcd reports only tokens of holders.
            let seen = here.inspect("k").await.expect("inspect").last_token.expect("a token").get();
            // The sequencer of a quorum need not know the tokens of the one that replaced it for a
            // moment.
            let is_known = matches!(store.kind(), Kind::Redlock | Kind::Mixed) || last <= seen;
            assert!(is_known, "{last} {seen}");
            largest = last.max(seen);
            for guard in shared {
                guard.release().await.expect("release");
            }
        }
    }

    /// A stream of readers never leaves the key free of readers, and the writer waits for one turn.
    async fn a_writer_among_a_stream_of_readers_is_served(store: &TestStore) {
        let writer = store.manager().await;
        let reads = Arc::new(AtomicU64::new(0));
        let mut readers = JoinSet::new();
        for _ in 0..2 {
            let locks = store.manager().await;
            for task in 0..4 {
                let (locks, reads) = (locks.clone(), Arc::clone(&reads));
                readers.spawn(async move {
                    loop {
                        let guard = locks.lock("k").shared().await.expect("a shared lock");
                        tokio::time::sleep(Duration::from_millis(3 + task)).await;
                        // The writer may be served before the reply to the release arrives.
                        reads.fetch_add(1, Ordering::Relaxed);
                        guard.release().await.expect("release");
                    }
                });
            }
        }
        for _ in 0..10 {
            let before = reads.load(Ordering::Relaxed);
            until("both managers read", async || reads.load(Ordering::Relaxed) > before + 20).await;
            let guard = soon("the writer", async { lock(&writer, "k").await }).await;
            let during = reads.load(Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(5)).await;
            assert_eq!(reads.load(Ordering::Relaxed), during, "nobody reads beside a writer");
            guard.release().await.expect("release");
        }
    }

    async fn timed_out_waiter_does_not_block_others(store: &TestStore) {
        let (here, there) = (store.manager().await, store.manager().await);
        let reader = here.lock("k").shared().await.expect("a shared lock");
        let late = there.lock("k").timeout(Duration::from_millis(50)).await.expect_err("it is held");
        assert!(late.is_timeout(), "{late}");
        let beside = soon("a reader", async { there.lock("k").shared().await }).await.expect("a shared lock");
        drop((reader, beside));
        let guard = soon("the writer", async { lock(&there, "k").await }).await;
        guard.release().await.expect("release");
    }

    async fn a_reader_that_holds_for_too_long_does_not_end_the_others(store: &TestStore) {
        let locks = store.manager().await;
        let patient = locks.lock("k").shared().await.expect("a shared lock");
        let limited = locks.lock("k").shared().max_hold(Duration::from_millis(100)).await.expect("a shared lock");
        assert_eq!(soon("the loss", limited.lost()).await, LossReason::MaxHold);
        assert!(patient.is_valid() && !limited.is_valid());
        assert!(limited.release().await.is_err());
        assert!(patient.is_valid());
        assert!(locks.try_lock("k").await.expect("a try").is_none());
        patient.release().await.expect("release");
        let writer = lock(&locks, "k").await;
        writer.release().await.expect("release");
    }

    async fn shutdown_releases_shared_locks(store: &TestStore) {
        let (here, there) = (store.manager().await, store.manager().await);
        let shared = here.lock("k").shared().await.expect("a shared lock");
        here.shutdown().await.expect("shut down");
        assert_eq!(shared.lost().await, LossReason::Closed);
        assert!(there.try_lock("k").await.expect("a try").is_some());
    }
}

on_each_store! {
    on(permits);

    async fn permits_of_all_holders_together_never_exceed_the_limit(store: &TestStore) {
        const LIMIT: u16 = 5;
        let in_use = Arc::new(AtomicU32::new(0));
        let most = Arc::new(AtomicU32::new(0));
        let mut tasks = JoinSet::new();
        for _ in 0..3 {
            let locks = store.manager().await;
            for task in 0..8_u16 {
                let (locks, in_use, most) = (locks.clone(), Arc::clone(&in_use), Arc::clone(&most));
                tasks.spawn(async move {
                    for round in 0..15 {
                        let weight = 1 + (task + round) % 3;
                        let guard = locks.permits("k", LIMIT).weight(weight).await.expect("permits");
                        assert_eq!(guard.mode(), LockMode::Permits { weight, limit: LIMIT });
                        let now = in_use.fetch_add(weight.into(), Ordering::SeqCst) + u32::from(weight);
                        most.fetch_max(now, Ordering::SeqCst);
                        tokio::time::sleep(Duration::from_millis(1)).await;
                        in_use.fetch_sub(weight.into(), Ordering::SeqCst);
                        guard.release().await.expect("release");
                    }
                });
            }
        }
        while let Some(ended) = soon("all tasks", tasks.join_next()).await {
            ended.expect("a task");
        }
        assert_eq!(most.load(Ordering::SeqCst), u32::from(LIMIT), "all permits were in use, and no more");
    }

    async fn request_for_many_permits_is_not_overtaken_by_small_ones(store: &TestStore) {
        let (here, there) = (store.manager().await, store.manager().await);
        let one = here.permits("k", 4).await.expect("a permit");
        let two = here.permits("k", 4).await.expect("a permit");
        let all = tokio::spawn({
            let there = there.clone();
            async move { there.permits("k", 4).weight(4).await.expect("permits") }
        });
        until_queued(&here, "k", 1).await;
        // Two permits are free, but somebody waits.
        for locks in [&here, &there] {
            assert!(locks.try_permits("k", 4).await.expect("a try").is_none());
        }
        // A task of the holders' own manager could have a permit until their turn ends.
        let third = store.manager().await;
        let later = tokio::spawn({
            let third = third.clone();
            async move { third.permits("k", 4).await.expect("a permit") }
        });
        until_queued(&there, "k", 2).await;
        one.release().await.expect("release");
        assert!(!all.is_finished() && !later.is_finished());
        two.release().await.expect("release");
        let all = soon("all four", all).await.expect("a task");
        assert_eq!(here.inspect("k").await.expect("inspect").permits_in_use, 4);
        assert!(!later.is_finished());
        all.release().await.expect("release");
        let later = soon("the later one", later).await.expect("a task");
        later.release().await.expect("release");
    }

    /// While a new limit is rolled out, old and new instances run side by side.
    async fn the_smallest_limit_of_all_holders_counts(store: &TestStore) {
        let (old, new) = (store.manager().await, store.manager().await);
        let held = [old.permits("k", 2).await, old.permits("k", 2).await];
        assert!(new.try_permits("k", 10).await.expect("a try").is_none());
        for guard in held {
            guard.expect("a permit").release().await.expect("release");
        }
        let held = [new.permits("k", 10).await, new.permits("k", 10).await, new.permits("k", 10).await];
        assert!(old.try_permits("k", 2).await.expect("a try").is_none());
        let fourth = new.try_permits("k", 10).await.expect("a try");
        assert!(fourth.is_some());
        drop((held, fourth));
    }

    async fn permits_and_exclusive_locks_exclude_each_other(store: &TestStore) {
        let (here, there) = (store.manager().await, store.manager().await);
        let writer = lock(&there, "k").await;
        for locks in [&here, &there] {
            assert!(locks.try_permits("k", 5).await.expect("a try").is_none());
        }
        writer.release().await.expect("release");
        let permit = here.permits("k", 5).await.expect("a permit");
        for locks in [&here, &there] {
            assert!(locks.try_lock("k").await.expect("a try").is_none());
            let beside = locks.try_lock("k").shared().await.expect("a try");
            beside.expect("a shared lock beside it").release().await.expect("release");
        }
        permit.release().await.expect("release");
    }

    async fn shutdown_releases_permits(store: &TestStore) {
        let (here, there) = (store.manager().await, store.manager().await);
        let permits = here.permits("k", 2).weight(2).await.expect("permits");
        here.shutdown().await.expect("shut down");
        assert_eq!(permits.lost().await, LossReason::Closed);
        assert!(there.try_permits("k", 2).weight(2).await.expect("a try").is_some());
    }
}

on_each_store! {
    on(servers);

    async fn a_dead_reader_frees_its_place_within_its_ttl(store: &TestStore) {
        assert_dead_holder_is_freed_in_time(store, "shared").await;
    }

    async fn deleting_the_key_ends_every_shared_holder(store: &TestStore) {
        let locks = store.builder().ttl(Duration::from_secs(3)).connect().await.expect("connect");
        let guards = [locks.lock("k").shared().await, locks.lock("k").shared().await];
        let [one, other] = guards.map(|guard| guard.expect("a shared lock"));
        store.servers().delete(&store.lease("k"));
        let lost = soon("both losses", async { (one.lost().await, other.lost().await) }).await;
        assert_eq!(lost, (LossReason::Taken, LossReason::Taken));
        let writer = lock(&locks, "k").await;
        writer.release().await.expect("release");
    }

}

on_each_store! {
    on(permits_of_servers);

    async fn a_dead_holder_of_permits_frees_them_within_its_ttl(store: &TestStore) {
        assert_dead_holder_is_freed_in_time(store, "permits").await;
    }
}

/// SIGKILL: nobody releases anything.
async fn assert_dead_holder_is_freed_in_time(store: &TestStore, mode: &str) {
    // Long enough that the holder survives until it is killed.
    let ttl = Duration::from_secs(2);
    let locks = store.manager().await;
    let millis = ttl.as_millis().to_string();
    let vars = [("SHARDLOCK_TEST_MODE", mode), ("SHARDLOCK_TEST_TTL", &millis)];
    let mut holder = store.worker("holder", &vars);
    assert_eq!(holder.line(), "holds");
    if mode == "permits" {
        assert!(locks.try_permits("k", 3).weight(3).await.expect("a try").is_none());
    }
    assert!(locks.try_lock("k").await.expect("a try").is_none());
    holder.kill();
    let killed = Instant::now();
    let guard = soon("the dead holder's place", async { lock(&locks, "k").await }).await;
    let took = killed.elapsed();
    assert!(took <= store.kind().dead_within(ttl) + 3 * MARGIN, "{took:?}");
    guard.release().await.expect("release");
}

on_each_store! {
    on(counted, own);

    async fn tasks_of_one_manager_share_a_lease_and_pass_permits_on_without_the_network(store: &TestStore) {
        // No renewal is due, which would be counted as well.
        let locks = store.builder().ttl(Duration::from_secs(600)).connect().await.expect("connect");
        let first = locks.lock("k").shared().await.expect("a shared lock");
        let calls = store.servers().script_calls();
        for _ in 0..20 {
            let guard = locks.lock("k").shared().await.expect("one beside it");
            guard.release().await.expect("release");
        }
        assert_eq!(store.servers().script_calls(), calls, "readers join without a script");
        first.release().await.expect("release");

        let held = locks.permits("p", 1).await.expect("a permit");
        let mut waiting = JoinSet::new();
        for _ in 0..20 {
            let mut request = Box::pin({
                let locks = locks.clone();
                async move { locks.permits("p", 1).await.expect("a permit").release().await.expect("release") }
            });
            assert!(poll_once(&mut request).is_none());
            waiting.spawn(request);
        }
        let calls = store.servers().script_calls();
        held.release().await.expect("release");
        while let Some(ended) = soon("all tasks", waiting.join_next()).await {
            ended.expect("a task");
        }
        // One more block of tokens, and the release.
        let calls = store.servers().script_calls() - calls;
        assert!(calls <= 4, "{calls} script calls for 20 permits");
    }
}

/// Asks for numbers of permits that make no sense.
#[tokio::test]
async fn numbers_of_permits_have_bounds() {
    let locks = support_locks::connect("memory://").await;
    for (weight, limit, names) in [(1, 0, "limit"), (1, 1_001, "limit"), (0, 5, "weight"), (6, 5, "weight")] {
        let refused = locks
            .permits("k", limit)
            .weight(weight)
            .await
            .expect_err("it makes no sense");
        assert!(
            refused.kind() == LockErrorKind::Invalid && refused.to_string().contains(names),
            "{refused}"
        );
    }
}

on_each_store! {
    on(counted, own);

    /// Regression: a writer that had died kept all readers waiting for as long as one of them read.
    async fn dead_waiter_keeps_nobody_waiting_beside_shared_holders(store: &TestStore) {
        let (here, there) = (store.manager().await, store.manager().await);
        let reading = here.lock("k").shared().await.expect("a shared lock");
        let mut dead = store.locker();
        dead.request();
        until_queued(&here, "k", 1).await;
        let inboxes = store.server().channels().len();
        dead.kill();
        until("its inbox is gone", async || store.server().channels().len() == inboxes - 1).await;
        let joining = there.lock("k").shared().into_future();
        let joined = soon("a reader beside the other", joining).await.expect("a shared lock");
        // A writer that lives has to wait, and nobody passes it.
        let writing = waiting(&there, "k");
        until_queued(&here, "k", 1).await;
        assert!(here.try_lock("k").shared().await.expect("a try").is_none());
        for guard in [reading, joined] {
            guard.release().await.expect("release");
        }
        let writer = soon("the writer", writing).await.expect("a task");
        writer.release().await.expect("release");
    }
}
