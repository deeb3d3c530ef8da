//! Lingering leases, which stay with their process when no task holds or wants them: what they
//! save, and how they affect other processes.

use std::time::{Duration, Instant};

#[cfg(target_os = "linux")]
use futures_util::StreamExt;
use shardlock::config::Builder;
use shardlock::error::LockErrorKind;
use shardlock::{LockError, LockGuard, LockManager};
use support::{PATIENCE, worker};
use support_locks::{
    Locker, TestStore, builder_of, lock, on_each_store, poll_once, soon, until, until_queued, waiting,
};

#[cfg(target_os = "linux")]
use crate::connections::resident_kib;

/// Longer than any test lasts.
const LONG: Duration = Duration::from_secs(3600);

/// A builder for managers that tolerate servers which are starting or share a busy machine.
fn patient(store: &TestStore) -> Builder {
    store.builder().store_timeout(Duration::from_secs(5))
}

async fn connect(builder: Builder) -> LockManager {
    builder.connect().await.expect("connect")
}

/// A manager whose leases linger for longer than the test lasts.
async fn keeper(store: &TestStore) -> LockManager {
    connect(patient(store).linger(LONG)).await
}

/// A manager that renews too rarely to learn of waiters from its renewals, on kinds that allow
/// leases of ten minutes. With those it takes minutes until a renewal is due.
fn seldom_renewed(store: &TestStore) -> Builder {
    let builder = patient(store).renew_fraction(0.5);
    if has_short_leases(store) {
        builder
    } else {
        builder.ttl(Duration::from_secs(600))
    }
}

/// A quorum's leases are at most as long as the time for which a restarted node may not vote.
fn has_short_leases(store: &TestStore) -> bool {
    store.kind().cleans_up_later()
}

/// The number of lingering leases.
fn kept(locks: &LockManager) -> usize {
    locks.shard_states().iter().map(|shard| shard.lingering).sum()
}

/// The holder of the key according to the store.
async fn owner(locks: &LockManager, key: &str) -> Option<String> {
    let seen = locks.inspect(key).await.expect("inspect");
    seen.holder.map(|holder| holder.owner)
}

/// How many keys are kept in each round, and the number of rounds.
#[cfg(target_os = "linux")]
const KEPT: u32 = 10_000;
#[cfg(target_os = "linux")]
const ROUNDS: usize = 6;

/// Uses new keys in rounds, and reports this process's memory whenever all their leases have ended.
#[cfg(target_os = "linux")]
#[tokio::main]
pub(crate) async fn keep_new_keys_in_rounds(me: &worker::Current) {
    let builder = builder_of(me).store_timeout(PATIENCE).linger(Duration::from_secs(1));
    let locks = connect(builder).await;
    for round in 0..ROUNDS {
        let uses = (0..KEPT).map(|number| use_kept(&locks, format!("{round}-{number}")));
        futures_util::stream::iter(uses).buffer_unordered(64).count().await;
        until("nothing lingers", async || kept(&locks) == 0).await;
        me.send(resident_kib("VmRSS:").to_string());
    }
}

#[cfg(target_os = "linux")]
async fn use_kept(locks: &LockManager, key: String) {
    lock(locks, &key).await.release().await.expect("release");
}

/// Locks and releases. Returns the token.
async fn use_once(locks: &LockManager, key: &str) -> u64 {
    let guard = lock(locks, key).await;
    let token = guard.token().get();
    guard.release().await.expect("release");
    token
}

/// Locks and releases until the lease lingers: after a lease that another manager waited for, the
/// next one does not linger.
async fn use_until_kept(locks: &LockManager, key: &str) -> u64 {
    let mut token = 0;
    until("the lease lingers", async || {
        token = use_once(locks, key).await;
        kept(locks) > 0
    })
    .await;
    token
}

/// Makes the worker lock and release.
fn use_by(locker: &mut Locker) -> u64 {
    let token = locker.lock();
    locker.release();
    token
}

on_each_store! {
    async fn lingering_lease_is_reused_with_a_larger_token(store: &TestStore) {
        let locks = keeper(store).await;
        let mut last = use_once(&locks, "k").await;
        let lease = owner(&locks, "k").await.expect("the lease lingers");
        for round in 0..200 {
            let guard = match round % 2 {
                0 => lock(&locks, "k").await,
                _ => locks.try_lock("k").await.expect("try").expect("the lease is ours"),
            };
            assert_eq!(guard.owner(), lease, "round {round}");
            assert!(guard.token().get() > last && guard.is_valid());
            last = guard.token().get();
            // Both ways to release are covered.
            match round % 3 {
                0 => drop(guard),
                _ => guard.release().await.expect("release"),
            }
        }
        assert_eq!(owner(&locks, "k").await.as_ref(), Some(&lease));
        assert_eq!((kept(&locks), locks.held().len()), (1, 0), "there is no guard");
        let guard = lock(&locks, "k").await;
        assert_eq!((kept(&locks), locks.held().len()), (0, 1));
        drop(guard);
    }

    async fn lingering_lease_goes_to_a_waiter_in_another_process_at_once(store: &TestStore) {
        let one = connect(seldom_renewed(store).linger(LONG)).await;
        let other = connect(patient(store)).await;
        let mut last = 0;
        for _ in 0..5 {
            let token = use_until_kept(&one, "k").await;
            assert!(token > last);
            let started = Instant::now();
            last = use_once(&other, "k").await;
            assert!(last > token, "{last} after {token}");
            let limit = if has_short_leases(store) { Duration::from_millis(4_500) } else { PATIENCE };
            assert!(started.elapsed() < limit, "{:?}", started.elapsed());
            until("no lease lingers", async || kept(&one) == 0).await;
        }
    }

    async fn try_in_another_process_finds_a_lingering_lease_held(store: &TestStore) {
        let (one, other) = (keeper(store).await, connect(patient(store)).await);
        use_once(&one, "k").await;
        for _ in 0..3 {
            assert!(other.try_lock("k").await.expect("try").is_none());
        }
        assert_eq!(kept(&one), 1);
        let wait = other.lock("k").timeout(Duration::ZERO).await;
        assert!(wait.as_ref().is_err_and(LockError::is_timeout), "{wait:?}");
        assert_eq!(kept(&one), 1);
    }

    async fn lingering_lease_expires_and_is_deleted(store: &TestStore) {
        let linger = Duration::from_millis(400);
        let locks = connect(patient(store).linger(linger)).await;
        let started = Instant::now();
        use_once(&locks, "k").await;
        until("the lease ends", async || kept(&locks) == 0).await;
        assert!(started.elapsed() >= linger * 7 / 8, "{:?}", started.elapsed());
        store.is_empty(&locks, "k").await;
        assert!(locks.shard_states().iter().all(|shard| shard.leases == 0));
    }

    async fn lingering_lease_is_renewed(store: &TestStore) {
        let ttl = 2 * store.short_ttl();
        let locks = connect(patient(store).ttl(ttl).linger(LONG)).await;
        let other = connect(patient(store)).await;
        use_once(&locks, "k").await;
        let lease = owner(&other, "k").await;
        let deadline = Instant::now() + 2 * store.kind().dead_within(ttl);
        while Instant::now() < deadline {
            // A busy quorum may answer one of so many tries too late.
            match other.try_lock("k").await {
                Ok(taken) => assert!(taken.is_none()),
                Err(error) => assert!(error.is_retryable(), "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let guard = lock(&locks, "k").await;
        assert_eq!(Some(guard.owner()), lease);
        guard.release().await.expect("the lease was ours throughout");
    }

    async fn request_may_set_another_linger_time_than_the_manager(store: &TestStore) {
        let locks = connect(patient(store)).await;
        locks.lock("k").linger(LONG).await.expect("lock").release().await.expect("release");
        assert!(owner(&locks, "k").await.is_some());
        // The setting of the last guard applies.
        use_once(&locks, "k").await;
        store.is_empty(&locks, "k").await;
        locks.try_lock("k").linger(LONG).await.expect("try").expect("free").release().await.expect("release");
        assert!(owner(&locks, "k").await.is_some());

        let keeper = keeper(store).await;
        keeper.lock("other").linger(Duration::ZERO).await.expect("lock").release().await.expect("release");
        assert_eq!(owner(&keeper, "other").await, None);
        let error = keeper.lock("k").linger(LONG + Duration::from_secs(1)).await.expect_err("too long");
        assert!(error.to_string().contains("linger is 3601s, but must be from 0s to 1h"), "{error}");
    }

    async fn shutdown_releases_a_lingering_lease_at_once(store: &TestStore) {
        let (one, other) = (connect(seldom_renewed(store).linger(LONG)).await, connect(patient(store)).await);
        use_once(&one, "k").await;
        one.shutdown().await.ok();
        store.is_empty(&other, "k").await;
        let error = one.lock("k").await.expect_err("the manager was shut down");
        assert!(error.kind() == LockErrorKind::Closed, "{error}");
    }

    async fn dropping_the_last_handle_releases_a_lingering_lease_at_once(store: &TestStore) {
        let (one, other) = (connect(seldom_renewed(store).linger(LONG)).await, connect(patient(store)).await);
        use_once(&one, "idle").await;
        let guard = lock(&one, "held").await;
        drop(one);
        store_has_no(&other, "idle").await;
        assert!(guard.is_valid());
        // A guard that is still held at the shutdown leaves no lingering lease.
        drop(guard);
        store_has_no(&other, "held").await;
        store.is_clean().await;
    }

    async fn tasks_that_give_up_do_not_end_a_lingering_lease(store: &TestStore) {
        // While a renewal is late, a lock has to wait for it.
        let locks = connect(seldom_renewed(store).linger(LONG)).await;
        let guard = lock(&locks, "k").await;
        let lease = guard.owner();
        let gone: Vec<_> = (0..10).map(|_| waiting(&locks, "k")).collect();
        tokio::task::yield_now().await;
        gone.iter().for_each(tokio::task::JoinHandle::abort);
        for gone in gone {
            assert!(gone.await.expect_err("the task was aborted").is_cancelled());
        }
        drop(guard);
        for _ in 0..10 {
            // One request is dropped before it is polled, another right after it has acquired the
            // lock.
            drop(Box::pin(std::future::IntoFuture::into_future(locks.lock("k"))));
            let mut locking = Box::pin(std::future::IntoFuture::into_future(locks.lock("k")));
            let guard: Option<Result<LockGuard, LockError>> = poll_once(&mut locking);
            assert_eq!(guard.expect("at once").expect("lock").owner(), lease);
        }
        assert_eq!((kept(&locks), owner(&locks, "k").await), (1, Some(lease)));
    }

    async fn tasks_and_managers_with_lingering_leases_exclude_one_another(store: &TestStore) {
        let managers = [keeper(store).await, connect(patient(store).linger(Duration::from_millis(5))).await];
        let shared = std::sync::Arc::new(std::sync::Mutex::new((false, 0_u64)));
        let mut tasks = tokio::task::JoinSet::new();
        for task in 0..8 {
            let (locks, shared) = (managers[task % 2].clone(), std::sync::Arc::clone(&shared));
            tasks.spawn(async move {
                for _ in 0..25 {
                    let guard = lock(&locks, "k").await;
                    {
                        let mut shared = shared.lock().unwrap();
                        assert!(!shared.0, "two guards");
                        assert!(guard.token().get() > shared.1, "tokens grow");
                        *shared = (true, guard.token().get());
                    }
                    tokio::task::yield_now().await;
                    shared.lock().unwrap().0 = false;
                    guard.release().await.expect("release");
                }
            });
        }
        while let Some(ended) = soon("the tasks", tasks.join_next()).await {
            ended.expect("a task");
        }
    }
}

async fn store_has_no(locks: &LockManager, key: &str) {
    until("the lock is released", async || owner(locks, key).await.is_none()).await;
}

on_each_store! {
    on(servers);

    async fn lingering_lease_of_a_killed_process_locks_its_key_until_it_expires(store: &TestStore) {
        let ttl = 2 * store.short_ttl();
        let mut lockers = store.lockers_with(1, ttl, &[("SHARDLOCK_TEST_LINGER", "3600000")]);
        let token = use_by(&mut lockers[0]);
        let locks = connect(patient(store)).await;
        let waiter = waiting(&locks, "k");
        // The keeper is notified of the waiter, and releases the lease.
        soon("the lock", waiter).await.expect("a task").release().await.expect("release");
        until("the lease lingers again", async || {
            use_by(&mut lockers[0]);
            owner(&locks, "k").await.is_some()
        })
        .await;
        let killed = Instant::now();
        lockers[0].kill();
        assert!(locks.try_lock("k").await.expect("try").is_none(), "the lease has not expired yet");
        let guard = lock(&locks, "k").await;
        assert!(guard.token().get() > token);
        // The last renewal was at most a tenth of the TTL earlier.
        assert!(killed.elapsed() > ttl / 2, "{:?}", killed.elapsed());
        guard.release().await.expect("release");
    }

    async fn deleted_lingering_lease_is_not_reused_and_is_no_loss(store: &TestStore) {
        let locks = connect(patient(store).ttl(2 * store.short_ttl()).linger(LONG)).await;
        let token = use_once(&locks, "k").await;
        store.servers().delete(&store.lease("k"));
        until("the next renewal finds out", async || kept(&locks) == 0).await;
        let other = connect(patient(store)).await;
        let guard = lock(&other, "k").await;
        assert!(guard.token().get() > token);
        assert!(locks.try_lock("k").await.expect("try").is_none());
        guard.release().await.expect("the lock was held");
    }

    async fn two_processes_with_lingering_leases_take_turns(store: &TestStore) {
        let mut lockers = store.lockers_with(2, Duration::from_secs(3), &[("SHARDLOCK_TEST_LINGER", "3600000")]);
        let mut last = 0;
        for round in 0..20 {
            let token = use_by(&mut lockers[round % 2]);
            assert!(token > last, "{token} after {last}");
            last = token;
        }
        // The same holds if one manager locks several times before the other.
        for round in 0..12 {
            let token = use_by(&mut lockers[round / 4 % 2]);
            assert!(token > last, "{token} after {last}");
            last = token;
        }
    }
}

on_each_store! {
    on(pausable, own);

    async fn lock_under_a_lingering_lease_needs_no_server(store: &TestStore) {
        // While a renewal is late, a lock has to wait for it.
        let locks = connect(seldom_renewed(store).linger(LONG)).await;
        use_once(&locks, "k").await;
        store.servers().stop_all();
        for _ in 0..20 {
            let mut locking = Box::pin(std::future::IntoFuture::into_future(locks.lock("k")));
            let guard = poll_once(&mut locking).expect("at once").expect("lock");
            soon("the release", guard.release()).await.expect("release");
        }
        store.servers().resume_all();
    }
}

on_each_store! {
    on(redis sentinel cluster, own);

    async fn a_thousand_locks_cost_a_few_calls(store: &TestStore) {
        let locks = connect(seldom_renewed(store).linger(LONG)).await;
        use_once(&locks, "k").await;
        store.servers().reset_all_stats();
        for _ in 0..40 {
            use_once(&locks, "k").await;
        }
        assert_eq!(store.servers().script_calls(), 0);
        for _ in 0..1_000 {
            use_once(&locks, "k").await;
        }
        let calls = store.servers().script_calls();
        assert!((1..=3).contains(&calls), "{calls} calls to reserve more tokens");
    }
}

on_each_store! {
    on(redis, own);

    async fn lingering_lease_is_not_reused_after_its_server_lost_it(store: &TestStore) {
        let locks = connect(seldom_renewed(store).linger(LONG)).await;
        let other = connect(patient(store)).await;
        let token = use_once(&locks, "k").await;
        store.server().restart();
        let mut guard = None;
        until("the server is up again", async || {
            guard = other.lock("k").await.ok();
            guard.is_some()
        })
        .await;
        let guard = guard.expect("the lock was acquired");
        assert!(guard.token().get() > token);
        match locks.try_lock("k").await {
            Ok(both) => assert!(both.is_none(), "two holders: {guard:?}, {both:?}"),
            Err(error) => assert!(error.is_retryable(), "{error}"),
        }
        guard.release().await.expect("the lock was held");
    }

    /// Simulates a lost notification to the process whose lease lingers: there is a waiter in the
    /// queue, and the process was not notified.
    async fn renewal_discovers_a_waiter_whose_notification_was_lost(store: &TestStore) {
        let locks = connect(patient(store).ttl(Duration::from_secs(2)).linger(LONG)).await;
        use_once(&locks, "k").await;
        let nobody = "nowhere-1-0123456789abcdef:7";
        store.servers().command(&["ZADD", "{lock:k}:q", "1", nobody]);
        until("the lease is released", async || kept(&locks) == 0).await;
        // The waiter has no subscription, so the lock is not granted to it.
        store.is_empty(&locks, "k").await;
    }

    async fn reuse_of_a_lingering_lease_sends_no_commands(store: &TestStore) {
        let server = store.server();
        let locks = connect(seldom_renewed(store).linger(LONG)).await;
        use_once(&locks, "k").await;
        server.reset_stats();
        for _ in 0..40 {
            use_once(&locks, "k").await;
        }
        let mut commands = server.commands();
        // Each use would send one command at least. A check of the shard or the inbox, of which few
        // fall into this period even on a busy machine, sends each command three times at most.
        commands.retain(|name, &mut calls| name != "info" && !name.starts_with("config") && calls >= 40);
        assert_eq!(commands, std::collections::BTreeMap::new());
    }

    /// A client of another library can't ask for the key. The key stays taken until the linger time
    /// is over.
    async fn client_of_another_library_finds_a_lingering_lease_taken(store: &TestStore) {
        let locks = connect(patient(store).linger(Duration::from_secs(3))).await;
        use_once(&locks, "k").await;
        let take = || store.servers().command(&["SET", "lock:k", "theirs", "NX", "PX", "60000"]);
        assert_eq!(take(), redis::Value::Nil);
        until("the lease ends", async || take() == redis::Value::Okay).await;
        assert!(locks.try_lock("k").await.expect("try").is_none());
    }
}

/// Lingering leases are evicted for new keys; held ones are not.
#[tokio::test]
async fn new_keys_evict_lingering_leases() {
    let locks = connect(
        LockManager::builder()
            .shard("memory://linger-room")
            .max_keys(4)
            .linger(LONG),
    )
    .await;
    for key in 0..100 {
        use_once(&locks, &format!("k{key}")).await;
        // At most four, and one that was just released.
        assert!(kept(&locks) <= 5, "{}", kept(&locks));
    }
    until("there is room", async || kept(&locks) <= 4).await;
    let mut guards = Vec::new();
    for key in 0..4 {
        guards.push(lock(&locks, &format!("held{key}")).await);
    }
    until("no lease lingers", async || kept(&locks) == 0).await;
    let error = locks.lock("one too many").await.expect_err("the limit");
    assert!(
        (error.kind(), error.limit()) == (LockErrorKind::TooManyKeys, Some(4)),
        "{error}"
    );
    drop(guards);
}

/// Each lease that has ended leaves nothing behind. The first rounds show what the allocator keeps
/// for the most leases at a time.
#[cfg(target_os = "linux")]
#[test]
fn memory_does_not_grow_with_rounds_of_lingering_leases() {
    let store = TestStore::shared(support_locks::Kind::Redis);
    let keeper = store.worker("keeper", &[]);
    let kib = [(); ROUNDS].map(|()| {
        let line = keeper.line_within(10 * PATIENCE).expect("the memory after a round");
        line.parse::<u64>().expect("a number")
    });
    println!("KiB after each round of {KEPT} keys: {kib:?}");
    assert!(kib[ROUNDS - 1] < kib[1] * 3 / 2, "{kib:?} KiB");
}

/// The keeper is notified of a waiting process, which gets the key although the keeper's tasks keep
/// locking it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_busy_keeper_does_not_starve_others() {
    let store = TestStore::shared(support_locks::Kind::Redis);
    let one = connect(seldom_renewed(&store).linger(LONG)).await;
    let other = connect(patient(&store)).await;
    let busy = {
        let one = one.clone();
        tokio::spawn(async move {
            loop {
                use_once(&one, "k").await;
                tokio::task::yield_now().await;
            }
        })
    };
    for _ in 0..20 {
        use_once(&other, "k").await;
    }
    busy.abort();
    assert!(busy.await.expect_err("the task runs forever").is_cancelled());
    // A guard that the task held is dropped with it.
    until_queued(&other, "k", 0).await;
}
