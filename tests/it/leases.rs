//! How long a lock is held: as long as its holder lives, and never longer than the holder's own
//! validity.

use std::time::{Duration, Instant};

use shardlock::error::LockErrorKind;
use shardlock::{LockManager, LossReason};
use support::filter::{Filter, Verdict, is_of_several_slots};
use support::quorum::MAX_TTL;
use support::{PATIENCE, RedisServer, eventually};
use support_locks::{
    MARGIN, STORE_TIMEOUT, TestStore, lock, on_each_store, poll_once, soon, until, until_queued, waiting,
};

/// A manager with leases of [`MAX_TTL`], which a busy machine can renew in time.
async fn renewing_manager(store: &TestStore) -> LockManager {
    store.builder().ttl(MAX_TTL).connect().await.expect("connect")
}

on_each_store! {
    on(redis sentinel cluster, own);

    /// A waiter would retry only after ten seconds; the holder renews every two.
    async fn waiter_gets_a_deleted_key_once_the_holders_renewal_detects_it(store: &TestStore) {
        let builder = || store.builder().ttl(Duration::from_secs(20)).store_timeout(Duration::from_secs(5));
        let holder = builder().connect().await.expect("connect");
        let other = builder().connect().await.expect("connect");
        let guard = lock(&holder, "k").await;
        let waiting = waiting(&other, "k");
        until_queued(&holder, "k", 1).await;
        store.servers().delete(&store.lease("k"));
        let deleted = Instant::now();
        let next = soon("the lock", waiting).await.expect("a task");
        assert!(deleted.elapsed() < Duration::from_secs(6), "{:?}", deleted.elapsed());
        assert!(next.token() > guard.token());
        assert_eq!(soon("the loss", guard.lost()).await, LossReason::Taken);
        assert!(guard.release().await.expect_err("the lock was lost").is_lost());
        next.release().await.expect("the lock is held");
    }

    /// The queue is deleted as well, so a renewal can't discover the waiter. The health check of
    /// the shard, every three seconds, does.
    async fn waiter_on_an_emptied_server_retries_after_the_next_probe(store: &TestStore) {
        let builder = || store.builder().ttl(Duration::from_secs(20)).store_timeout(Duration::from_secs(5));
        let holder = builder().connect().await.expect("connect");
        let other = builder().connect().await.expect("connect");
        let guard = lock(&holder, "k").await;
        let waiting = waiting(&other, "k");
        until_queued(&holder, "k", 1).await;
        store.servers().flush();
        let flushed = Instant::now();
        let next = soon("the lock", waiting).await.expect("a task");
        // Without the health check the waiter would retry after ten seconds.
        assert!(flushed.elapsed() < Duration::from_secs(7), "{:?}", flushed.elapsed());
        assert!(next.token() > guard.token());
        assert_eq!(soon("the loss", guard.lost()).await, LossReason::Taken);
        next.release().await.expect("the lock is held");
    }
}

on_each_store! {
    async fn a_lock_is_held_for_many_ttls_while_its_holder_lives(store: &TestStore) {
        let (one, other) = (renewing_manager(store).await, renewing_manager(store).await);
        let guard = lock(&one, "k").await;
        let mut waiting = tokio::spawn(async move { lock(&other, "k").await });
        let three_ttls = tokio::time::timeout(3 * MAX_TTL, &mut waiting).await;
        assert!(three_ttls.is_err(), "no other holder may get in");
        assert!(guard.is_valid() && guard.remaining() <= MAX_TTL);
        guard.release().await.expect("the lock was held throughout");
        soon("the waiter", waiting).await.expect("a task").release().await.expect("release");
    }

    async fn no_loss_is_reported_for_a_held_or_released_lock(store: &TestStore) {
        let locks = renewing_manager(store).await;
        let guard = lock(&locks, "k").await;
        // Without renewals, the lease would end before that.
        let told = tokio::time::timeout(MAX_TTL, guard.lost()).await;
        assert!(told.is_err(), "the lock is held");
        guard.release().await.expect("release");

        // A release while a task awaits the loss: the `lost()` future is dropped with the body and
        // never completes.
        let seen = locks.with_lock("k", async |guard| {
            let mut lost = Box::pin(guard.lost());
            poll_once(&mut lost)
        });
        assert_eq!(seen.await.expect("the lock"), None);
    }

    async fn lost_completes_at_once_after_the_loss(store: &TestStore) {
        let locks = store.manager().await;
        let guard = locks.lock("k").max_hold(Duration::from_millis(10)).await.expect("lock");
        soon("the loss", guard.lost()).await;
        for _ in 0..3 {
            assert_eq!(poll_once(&mut Box::pin(guard.lost())), Some(LossReason::MaxHold));
        }
        assert!(!guard.is_valid());
        assert_eq!(guard.remaining(), Duration::ZERO);
        let error = guard.release().await.expect_err("the lock was lost");
        assert!(error.is_lost(), "{error}");
    }

    async fn max_hold_ends_the_renewal(store: &TestStore) {
        let (one, other) = (renewing_manager(store).await, renewing_manager(store).await);
        let cap = MAX_TTL * 5 / 4;
        let started = Instant::now();
        let stuck = one.lock("k").max_hold(cap).await.expect("lock");
        let waiting = tokio::spawn(async move { lock(&other, "k").await });
        assert_eq!(soon("the loss", stuck.lost()).await, LossReason::MaxHold);
        assert!(started.elapsed() >= cap, "{:?}", started.elapsed());
        // The stuck task keeps its guard, yet another holder gets the lock.
        let next = soon("the next", waiting).await.expect("a task");
        assert!(!stuck.is_valid() && next.is_valid());
        assert!(next.token() > stuck.token());
        next.release().await.expect("release");
    }

    async fn max_hold_of_a_guard_does_not_apply_to_the_next(store: &TestStore) {
        let locks = store.short_lived_manager().await;
        for _ in 0..3 {
            let capped = locks.lock("k").max_hold(Duration::from_secs(60)).await.expect("lock");
            let mut next = Box::pin(async { lock(&locks, "k").await });
            assert!(poll_once(&mut next).is_none());
            capped.release().await.expect("release");
            let uncapped = soon("the next", next).await;
            assert!(uncapped.is_valid());
            uncapped.release().await.expect("release");
        }
    }

    /// Regression: a lease that was handed off kept the TTL of its previous owner. After a holder
    /// with a TTL of ten minutes, the key of a killed holder that had requested one second stayed
    /// locked for ten minutes.
    async fn handed_off_lease_has_the_ttl_of_its_new_owner(store: &TestStore) {
        let ttl = Duration::from_secs(2);
        let short = store.builder().ttl(ttl).connect().await.expect("connect");
        let long = store.manager().await;
        let guard = lock(&long, "k").await;
        let waiting = tokio::spawn(async move { lock(&short, "k").await });
        until_queued(&long, "k", 1).await;
        guard.release().await.expect("release");
        let guard = soon("the waiter", waiting).await.expect("a task");
        let holder = long.inspect("k").await.expect("inspect").holder.expect("a holder");
        assert_eq!(holder.owner, guard.owner());
        assert!(holder.remaining.is_none_or(|remaining| remaining <= ttl), "{holder:?}");
        guard.release().await.expect("release");
    }

    async fn dropped_guard_releases_its_lock(store: &TestStore) {
        let (one, other) = (store.manager().await, store.manager().await);
        // The default TTL is 10 seconds, and no waiter waits for it.
        let guard = lock(&one, "k").await;
        let waiting = tokio::spawn(async move { lock(&other, "k").await });
        until_queued(&one, "k", 1).await;
        let started = Instant::now();
        drop(guard);
        let next = soon("the waiter", waiting).await.expect("a task");
        assert!(started.elapsed() < Duration::from_secs(5));
        drop(next);
        store.is_empty(&one, "k").await;
    }

    async fn a_renewal_under_way_never_brings_a_released_lock_back(store: &TestStore) {
        // A fiftieth of 100 ms: a renewal is due every 2 ms, so many are in flight during a
        // release.
        let builder = || store.builder().ttl(store.kind().least_ttl()).renew_fraction(0.02);
        let (one, other) = (builder().connect().await.expect("connect"), builder().connect().await.expect("connect"));
        for round in 0..100_u64 {
            let guard = lock(&one, "k").await;
            let deadline = Instant::now() + Duration::from_micros(round * 37 % 3_000);
            while Instant::now() < deadline {
                tokio::task::yield_now().await;
            }
            // A loaded machine may take longer than the TTL for this, so a loss is allowed here.
            match guard.release().await {
                Ok(()) => {}
                Err(error) => assert!(error.is_lost(), "{error}"),
            }
            // The next holder is the other manager, and no late renewal takes the lock away from
            // it.
            let guard = lock(&other, "k").await;
            let owner = guard.owner();
            let seen = one.inspect("k").await.expect("inspect").holder.map(|holder| holder.owner);
            assert!(seen.as_ref() == Some(&owner) || !guard.is_valid(), "{seen:?} {owner}");
            match guard.release().await {
                Ok(()) => {}
                Err(error) => assert!(error.is_lost(), "{error}"),
            }
        }
        store.is_empty(&one, "k").await;
    }
}

/// Kills the holder. The first of three waiting managers gets the lock within the TTL, and the
/// others keep waiting.
async fn assert_killed_holder_is_succeeded(store: &TestStore, count: impl FnOnce(), counted: impl FnOnce()) {
    // Long enough that the holder survives until it is killed.
    let ttl = Duration::from_secs(2);
    let mut holder = store.lockers(1, ttl).remove(0);
    holder.lock();
    let (watcher, mut waiting) = (store.manager().await, Vec::new());
    for place in 1..=3 {
        let locks = store.builder().ttl(ttl).connect().await.expect("connect");
        waiting.push(tokio::spawn(async move { lock(&locks, "k").await }));
        until_queued(&watcher, "k", place).await;
    }
    count();
    let killed = Instant::now();
    holder.kill();
    let guard = soon("the first waiter", waiting.remove(0)).await.expect("a task");
    let (took, bound) = (killed.elapsed(), store.kind().dead_within(ttl));
    assert!(took < bound + 3 * MARGIN, "{took:?}");
    assert!(waiting.iter().all(|task| !task.is_finished()));
    counted();
    guard.release().await.expect("release");
    for task in waiting {
        soon("the next", task)
            .await
            .expect("a task")
            .release()
            .await
            .expect("release");
    }
    store.is_empty(&watcher, "k").await;
}

on_each_store! {
    on(servers);

    async fn another_process_gets_the_lock_only_after_its_release(store: &TestStore) {
        let mut holder = store.lockers(1, MAX_TTL).remove(0);
        let token = holder.lock();
        let locks = store.manager().await;
        let mut waiting = tokio::spawn(async move { lock(&locks, "k").await });
        let two_ttls = tokio::time::timeout(2 * MAX_TTL, &mut waiting).await;
        assert!(two_ttls.is_err(), "the other process holds the lock");
        holder.release();
        let guard = soon("the release", waiting).await.expect("a task");
        assert!(guard.token().get() > token);
        assert!(holder.wait().success());
    }

    async fn lock_of_a_killed_process_goes_to_one_waiter_within_the_ttl(store: &TestStore) {
        assert_killed_holder_is_succeeded(store, || {}, || {}).await;
    }

    async fn deleted_lease_is_reported_at_the_next_renewal_and_waiters_are_served(store: &TestStore) {
        assert_taken_lease_is_reported(store, || store.servers().delete(&store.lease("k"))).await;
    }
}

on_each_store! {
    on(foreign);

    async fn overwritten_lease_is_reported_at_the_next_renewal_and_waiters_are_served(store: &TestStore) {
        let short = Duration::from_millis(700);
        let overwrite = || store.servers().overwrite(&store.lease("k"), "maintenance", short);
        assert_taken_lease_is_reported(store, overwrite).await;
    }
}

on_each_store! {
    on(servers, own);

    async fn flushed_server_is_reported_at_the_next_renewal_and_waiters_are_served(store: &TestStore) {
        assert_taken_lease_is_reported(store, || store.servers().flush()).await;
    }
}

on_each_store! {
    on(counted, own);

    async fn death_of_a_holder_wakes_only_the_next_waiter(store: &TestStore) {
        let server = store.server();
        // If the holder had renewed since, each waiter may have sent one request at the end of the
        // TTL it knew of. Those behind the next one may have sent another when the lease ended. No
        // waiter was woken.
        let counted = || assert!(server.publishes() <= 5, "{:?}", server.commands());
        assert_killed_holder_is_succeeded(store, || server.reset_stats(), counted).await;
    }
}

/// Takes the lock away with `steal`. The holder is notified at its next renewal, and the waiters
/// are served.
async fn assert_taken_lease_is_reported(store: &TestStore, steal: impl FnOnce()) {
    let (one, other) = (renewing_manager(store).await, renewing_manager(store).await);
    let guard = lock(&one, "k").await;
    let waiting = tokio::spawn({
        let other = other.clone();
        async move { lock(&other, "k").await }
    });
    until_queued(&one, "k", 1).await;
    let local = tokio::spawn({
        let one = one.clone();
        async move { lock(&one, "k").await }
    });
    let stolen = Instant::now();
    steal();
    assert_eq!(soon("the loss", guard.lost()).await, LossReason::Taken);
    // A tenth of the TTL and some slack for a loaded machine, but less than the TTL.
    assert!(stolen.elapsed() < MAX_TTL * 9 / 10, "{:?}", stolen.elapsed());
    assert!(!guard.is_valid());
    let error = guard.release().await.expect_err("the lock was taken");
    assert!(error.loss_reason() == Some(LossReason::Taken), "{error}");
    // Both the waiter in another process and the one in this process are served.
    let in_turn = async {
        tokio::join!(async { waiting.await.expect("a task").release().await }, async {
            local.await.expect("a task").release().await
        },)
    };
    let (there, here) = soon("both waiters", in_turn).await;
    assert_eq!((there.is_ok(), here.is_ok()), (true, true), "{there:?} {here:?}");
    store.is_clean().await;
}

on_each_store! {
    on(pausable, own);

    async fn failed_renewal_before_the_lease_expires_is_no_loss(store: &TestStore) {
        // Servers and tasks that are late by a second or two leave time for more renewals.
        let ttl = Duration::from_secs(5);
        let builder = store.builder().ttl(ttl).redlock_max_ttl(ttl).store_timeout(ttl / 10);
        let mut connected = None;
        // A busy machine may take longer than the store timeout.
        until("the manager is connected", async || {
            connected = builder.clone().connect().await.ok();
            connected.is_some()
        })
        .await;
        let locks = connected.expect("just seen");
        let guard = lock(&locks, "k").await;
        for _ in 0..2 {
            // All renewals fail, which are about two, with time left for more.
            store.servers().stop_all();
            let lost = tokio::time::timeout(ttl * 3 / 10, guard.lost()).await;
            assert!(lost.is_err() && guard.is_valid());
            store.servers().resume_all();
            eventually("a renewal succeeds", PATIENCE, || guard.remaining() > ttl * 4 / 5).await;
        }
        // In a quorum, renewals are also sent to nodes considered dead. Other requests wait until
        // the nodes are known to be alive.
        until("requests are answered", async || locks.inspect("k").await.is_ok()).await;
        // The lock was held throughout, although a busy machine may answer too late.
        if let Err(error) = guard.release().await {
            assert!(error.kind() == LockErrorKind::Unavailable, "{error}");
        }
    }

    async fn loss_is_reported_before_another_manager_can_get_the_lease(store: &TestStore) {
        // A longer TTL widens the margin between the report of the loss and the end of the lease:
        // the drift allowance, and the time since the last renewal.
        let ttl = Duration::from_secs(3);
        let one = store.builder().ttl(ttl).connect().await.expect("connect");
        // The stall may begin before the waiter knows that it is queued.
        let patient = store.builder().ttl(ttl).store_timeout(PATIENCE);
        let other = patient.connect().await.expect("connect");
        let guard = lock(&one, "k").await;
        let waiting = tokio::spawn({
            let other = other.clone();
            async move { (lock(&other, "k").await, Instant::now()) }
        });
        until_queued(&other, "k", 1).await;
        let lost = async {
            let reason = guard.lost().await;
            (reason, Instant::now())
        };
        let cut = async {
            // Renewals get no reply for a whole TTL, and the waiter retries as soon as the server
            // is resumed. A busy machine reports the loss a moment after the lease has ended.
            store.servers().stop_all();
            tokio::time::sleep(ttl + 3 * MARGIN / 2).await;
            assert!(!guard.is_valid(), "the local clock is enough");
            store.servers().resume_all();
        };
        let ((reason, lost_at), ()) = soon("the loss", async { tokio::join!(lost, cut) }).await;
        assert_eq!(reason, LossReason::Expired);
        let (next, had_at) = soon("the waiter", waiting).await.expect("a task");
        assert!(
            lost_at < had_at,
            "reported {:?} too late",
            lost_at.saturating_duration_since(had_at)
        );
        assert!(next.token() > guard.token());
        next.release().await.expect("release");
        assert!(guard.release().await.expect_err("the lock was lost").is_lost());
    }
}

/// The outage lasts longer than the default TTL; this lease lasts an hour.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failed_release_of_a_long_lease_is_retried_when_the_server_returns() {
    let server = RedisServer::start_with(&["--appendonly", "yes", "--appendfsync", "always"]);
    let ttl = Duration::from_millis(200);
    let builder = LockManager::builder().shard(server.url()).ttl(ttl);
    let locks = builder.store_timeout(STORE_TIMEOUT).connect().await.expect("connect");
    let guard = locks.lock("k").ttl(Duration::from_secs(3600)).await.expect("lock");
    server.kill();
    drop(guard);
    // Releases fail during this time.
    tokio::time::sleep(3 * ttl).await;
    server.restart();
    let other = support_locks::connect(&server.url()).await;
    lock(&other, "k").await.release().await.expect("release");
}

/// Locks `count` keys and holds them for longer than they would last without renewals.
async fn are_held(locks: &LockManager, count: usize) {
    let mut guards = Vec::new();
    for number in 0..count {
        guards.push(lock(locks, &format!("k{number}")).await);
    }
    let lost = futures_util::future::select_all(guards.iter().map(|guard| Box::pin(guard.lost())));
    let lost = tokio::time::timeout(MANY_TTL, lost).await;
    assert_eq!(lost.map(|(reason, number, _)| (reason, number)).ok(), None);
    for guard in guards {
        guard.release().await.expect("the lock was held throughout");
    }
}

/// Long enough for the renewals that discover which requests a proxy accepts. A renewal without an
/// answer for a third of it replaces its connection, which would have to discover this again.
const MANY_TTL: Duration = Duration::from_secs(6);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn locks_stay_held_behind_a_proxy_that_refuses_scripts_of_several_slots() {
    let server = RedisServer::start();
    let proxy = Filter::start(server.address(), |command| match is_of_several_slots(command) {
        true => Verdict::Refuse("CROSSSLOT Keys in request don't hash to the same slot"),
        false => Verdict::Pass,
    });
    let builder = LockManager::builder().shard(proxy.url()).ttl(MANY_TTL);
    let locks = builder.store_timeout(STORE_TIMEOUT).connect().await.expect("connect");
    are_held(&locks, 20).await;
    // The connection remembers this: later calls have keys of one slot.
    assert_eq!(proxy.stopped(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn locks_stay_held_behind_a_proxy_that_hangs_up_on_scripts_of_several_slots() {
    let server = RedisServer::start();
    let proxy = Filter::start(server.address(), |command| match is_of_several_slots(command) {
        true => Verdict::HangUp,
        false => Verdict::Pass,
    });
    let builder = LockManager::builder().shard(proxy.url()).ttl(MANY_TTL);
    let locks = builder.store_timeout(STORE_TIMEOUT).connect().await.expect("connect");
    are_held(&locks, 20).await;
    assert!(proxy.stopped() <= 4, "{}", proxy.stopped());
}

on_each_store! {
    on(redis_nodes, own);

    async fn key_without_permission_loses_no_other_lock(store: &TestStore) {
        let locks = renewing_manager(store).await;
        // All keys share a hash tag, so a cluster renews them in one call.
        let mut kept = Vec::new();
        for number in 0..10 {
            kept.push(lock(&locks, &format!("{{t}}a{number}")).await);
        }
        let forbidden = lock(&locks, "{t}b").await;
        for node in store.servers().nodes() {
            node.command(&["ACL", "SETUSER", "default", "resetkeys", "~lock:%*", "~lock:{t}a*", "~lock:%q:{t}a*"]);
        }
        assert_eq!(soon("the loss", forbidden.lost()).await, LossReason::Expired);
        let lost = futures_util::future::select_all(kept.iter().map(|guard| Box::pin(guard.lost())));
        assert!(tokio::time::timeout(MAX_TTL, lost).await.is_err(), "another lock was lost");
        for guard in kept {
            guard.release().await.expect("the lock was held throughout");
        }
    }

    async fn undeletable_key_does_not_keep_others_from_being_erased(store: &TestStore) {
        let locks = store.manager().await;
        let mut guards = Vec::new();
        for key in ["a", "b", "c", "d", "e"] {
            guards.push(lock(&locks, key).await);
        }
        for node in store.servers().nodes() {
            node.command(&["ACL", "SETUSER", "default", "resetkeys", "%R~*", "%W~lock:%*", "%W~lock:a", "%W~lock:c", "%W~lock:d", "%W~lock:e"]);
        }
        let error = shardlock::namespace::erase(&locks).await.expect_err("one key may not be removed");
        assert!((error.kind(), error.step()) == (LockErrorKind::Refused, Some("erase")), "{error}");
        let left = store.servers().nodes().into_iter().flat_map(RedisServer::keys);
        assert!(left.clone().all(|key| key == "lock:b"), "{:?}", left.collect::<Vec<_>>());
    }
}
