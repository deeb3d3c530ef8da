//! Several keys are locked together or not at all, in one order.

use std::future::{IntoFuture, pending};
use std::time::{Duration, Instant};

use shardlock::error::LockErrorKind;
use shardlock::{LockAllGuard, LockAllRequest, LockKey, LockManager, LockMode, LossReason};
use support::PATIENCE;
use support_locks::{MARGIN, STORE_TIMEOUT, TestStore, lock, on_each_store, poll_once, soon, until, until_queued};

/// The keys in the order in which `lock_all` locks them.
fn in_order<const N: usize>(mut keys: [&'static str; N]) -> [&'static str; N] {
    keys.sort_by_key(|key| (LockKey::new(key).expect("a valid key").slot(), *key));
    keys
}

/// Whether the key is held by any manager.
async fn is_held(locks: &LockManager, key: &str) -> bool {
    locks.inspect(key).await.expect("inspect").holder.is_some()
}

/// Waits until the keys are free and have no waiters, and nothing is left on the servers.
async fn all_are_empty(store: &TestStore, locks: &LockManager, keys: &[&str]) {
    for key in keys {
        is_free(locks, key).await;
    }
    store.is_clean().await;
}

/// Waits until the key is free and has no waiters.
async fn is_free(locks: &LockManager, key: &str) {
    until("the key is free and has no waiters", async || {
        let seen = locks.inspect(key).await.expect("inspect");
        seen.holder.is_none() && seen.queue_length == 0
    })
    .await;
}

/// A manager that soon learns of losses, with leases that a busy machine can renew in time.
async fn renewing_manager(store: &TestStore) -> LockManager {
    let builder = store.builder().ttl(Duration::from_secs(3));
    builder.connect().await.expect("connect")
}

on_each_store! {
    on(memory redis);

    /// A job with `min_hold` that could not start must not lock out the one that can.
    async fn keys_of_a_request_that_failed_are_free_whatever_their_min_hold(store: &TestStore) {
        let [first, second] = in_order(["a", "b"]);
        let long = Duration::from_secs(600);
        let locks = store.builder().min_hold(long).connect().await.expect("connect");
        let other = store.manager().await;
        let taken = lock(&other, second).await;
        assert!(locks.try_lock_all([first, second]).await.expect("try").is_none());
        is_free(&other, first).await;
        let limited = locks.lock_all([first, second]).timeout(Duration::from_millis(50));
        assert!(limited.await.expect_err("the other key is held").is_timeout());
        is_free(&other, first).await;
        let mut dropped = locks.lock_all([first, second]).into_future();
        until("the first key is held", async || {
            assert!(poll_once(&mut dropped).is_none());
            is_held(&other, first).await
        })
        .await;
        drop(dropped);
        is_free(&other, first).await;
        taken.release().await.expect("release");
        // Once all of them are held, it applies.
        soon("the locks", locks.lock_all([first, second]).into_future())
            .await
            .expect("lock")
            .release()
            .await
            .expect("release");
        assert!(is_held(&other, first).await && is_held(&other, second).await);
    }

    async fn several_keys_are_held_in_a_mode_together(store: &TestStore) {
        let (locks, other) = (store.manager().await, store.manager().await);
        let one = locks.lock_all(["a", "b"]).shared().await.expect("shared locks");
        let two = other.try_lock_all(["b", "c"]).shared().await.expect("try").expect("others share them");
        assert!(other.try_lock_all(["a"]).await.expect("try").is_none());
        for guard in [one, two] {
            guard.release().await.expect("release");
        }
        let most = locks.lock_all(["a", "b"]).permits(3).weight(2).await.expect("permits");
        let mode = LockMode::Permits { weight: 2, limit: 3 };
        assert!(most.guards().iter().all(|guard| guard.mode() == mode));
        // The order of the two does not matter.
        assert!(other.try_lock_all(["a", "b"]).weight(2).permits(3).await.expect("try").is_none());
        let last = other.try_lock_all(["a", "b"]).permits(3).await.expect("try").expect("one is left");
        for guard in [most, last] {
            guard.release().await.expect("release");
        }
    }

    async fn several_keys_are_held_together_each_with_its_own_token(store: &TestStore) {
        let (locks, other) = (store.manager().await, store.manager().await);
        let earlier = lock(&locks, "b").await;
        let token = earlier.token();
        earlier.release().await.expect("release");

        let guard = locks.lock_all(["b", "a", "b", "c", "a"]).await.expect("lock");
        let keys: Vec<_> = guard.guards().iter().map(|guard| guard.key()).collect();
        assert_eq!(keys, in_order(["a", "b", "c"]));
        assert!(guard.token("b").expect("a token") > token);
        assert_eq!(guard.token("d"), None);
        for key in ["a", "b", "c"] {
            let held = guard.guard(key).expect("a guard");
            assert_eq!((held.key(), Some(held.token())), (key, guard.token(key)));
            assert!(other.try_lock(key).await.expect("try").is_none());
        }
        assert!(guard.is_valid());
        let least = guard.guards().iter().map(|guard| guard.remaining()).min().expect("three guards");
        assert!(guard.remaining() <= least && !guard.remaining().is_zero());
        guard.release().await.expect("all were held");
        all_are_empty(store, &other, &["a", "b", "c"]).await;

        // Dropping the guard releases all of them, too.
        drop(locks.lock_all(vec![String::from("a"), String::from("b")]).await.expect("lock"));
        drop(soon("the locks", other.lock_all(["b", "a"]).into_future()).await.expect("lock"));
        all_are_empty(store, &locks, &["a", "b"]).await;
    }

    async fn keys_are_locked_in_one_order_however_they_are_given(store: &TestStore) {
        let (locks, other) = (store.manager().await, store.manager().await);
        let [first, middle, last] = in_order(["a", "b", "c"]);
        let held = lock(&other, middle).await;
        for keys in [[first, middle, last], [last, middle, first]] {
            let mut waiting = locks.lock_all(keys).into_future();
            assert!(poll_once(&mut waiting).is_none());
            let waiting = tokio::spawn(waiting);
            until_queued(&other, middle, 1).await;
            assert!(is_held(&other, first).await && !is_held(&other, last).await, "{keys:?}");
            waiting.abort();
            until("the earlier key is free again", async || !is_held(&other, first).await).await;
            until_queued(&other, middle, 0).await;
        }
        held.release().await.expect("release");
        store.is_empty(&locks, middle).await;
    }

    async fn timeout_applies_to_all_keys_together_and_releases_them(store: &TestStore) {
        let (locks, other) = (store.manager().await, store.manager().await);
        let [first, middle, last] = in_order(["a", "b", "c"]);
        let (early, late) = (lock(&other, middle).await, lock(&other, last).await);
        // Either half is longer than a busy machine is late.
        let limit = 4 * MARGIN;
        let started = Instant::now();
        let waiting = tokio::spawn(locks.lock_all([last, middle, first]).timeout(limit).into_future());
        until_queued(&other, middle, 1).await;
        // Waits for the second key for half of the time, and for the third for the other half.
        tokio::time::sleep((limit / 2).saturating_sub(started.elapsed())).await;
        let released = started.elapsed();
        early.release().await.expect("release");
        let error = soon("the timeout", waiting).await.expect("a task").expect_err("the last key is held");
        let took = started.elapsed();
        // A timeout for each key would end later.
        assert!(took >= limit && took < released + limit, "{took:?}");
        assert_eq!((error.key(), error.timeout()), (Some(last), Some(limit)), "{error}");
        let waited = error.waited().expect("a duration");
        assert!(waited >= limit && waited <= took, "{waited:?}");
        for key in [first, middle] {
            is_free(&other, key).await;
        }
        late.release().await.expect("release");

        // A timeout of zero is a single try of each key.
        let guard = locks.lock_all([last, first]).timeout(Duration::ZERO).await.expect("all are free");
        let error = other.lock_all([last, first]).timeout(Duration::ZERO).await.expect_err("all are held");
        assert!(error.is_timeout(), "{error}");
        guard.release().await.expect("release");
    }

    async fn failure_of_a_later_key_names_the_key_and_releases_all(store: &TestStore) {
        let locks = store.builder().max_keys(2).connect().await.expect("connect");
        let keys = in_order(["a", "b", "c"]);
        let error = locks.lock_all(keys).await.expect_err("the third key is one too many");
        assert_eq!(error.key(), Some(keys[2]), "{error}");
        assert!(error.kind() == LockErrorKind::TooManyKeys, "{error}");
        all_are_empty(store, &locks, &keys).await;
        let guard = locks.lock_all(keys[1..].iter().copied()).await.expect("there is room again");
        guard.release().await.expect("release");
    }

    async fn request_can_be_dropped_after_any_number_of_polls(store: &TestStore) {
        let (locks, others) = (store.manager().await, store.manager().await);
        let keys = in_order(["a", "b", "c"]);
        for held in [None, Some(keys[0]), Some(keys[1]), Some(keys[2])] {
            for polls in 0..16 {
                let guard = match held {
                    Some(key) => Some(lock(&locks, key).await),
                    None => None,
                };
                for waiter in [&locks, &others] {
                    let mut waiting = waiter.lock_all(keys).into_future();
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
                if let Some(guard) = guard {
                    guard.release().await.expect("release");
                }
                let next = soon("the next request", others.lock_all(keys).into_future()).await;
                next.expect("lock").release().await.expect("release");
            }
        }
        all_are_empty(store, &locks, &keys).await;
    }

    async fn try_of_several_keys_gets_all_or_none(store: &TestStore) {
        let (locks, other) = (store.manager().await, store.manager().await);
        let keys = in_order(["a", "b", "c"]);
        for held in keys {
            let guard = lock(&other, held).await;
            assert!(locks.try_lock_all(keys).await.expect("try").is_none());
            guard.release().await.expect("release");
            all_are_empty(store, &locks, &keys).await;
        }
        let guard = locks.try_lock_all(keys).await.expect("try").expect("all are free");
        assert_eq!(guard.guards().len(), 3);
        guard.release().await.expect("release");
    }

    async fn body_runs_under_all_locks_and_its_value_is_returned(store: &TestStore) {
        let (locks, other) = (store.manager().await, store.manager().await);
        let seen = locks.lock_all(["a", "b"]).with(async |guard| {
            let taken = other.try_lock_all(["b"]).await.expect("try").is_some();
            (taken, guard.is_valid())
        });
        assert_eq!(seen.await.expect("lock"), (false, true));
        // Nothing is held any more.
        other.lock_all(["a", "b"]).timeout(PATIENCE).await.expect("lock").release().await.expect("release");

        let stuck = locks.lock_all(["a", "b"]).max_hold(Duration::from_millis(20));
        let error = soon("the loss", stuck.with(async |_| pending::<()>().await)).await;
        assert!(error.expect_err("the lock was lost").is_lost());
    }

    /// Also the time that a key is held while the request waits for a later one counts.
    async fn lock_held_for_too_long_while_a_later_key_is_awaited_fails_the_request(store: &TestStore) {
        let (locks, other) = (store.manager().await, store.manager().await);
        let [first, last] = in_order(["a", "b"]);
        let held = lock(&other, last).await;
        let waiting = locks.lock_all([first, last]).max_hold(Duration::from_millis(50));
        let error = soon("the loss", waiting.into_future()).await.expect_err("the first key was lost");
        assert_eq!((error.key(), error.loss_reason()), (Some(first), Some(LossReason::MaxHold)), "{error}");
        held.release().await.expect("release");
        all_are_empty(store, &other, &[first, last]).await;
    }

    async fn shutdown_ends_requests_that_hold_some_of_their_keys(store: &TestStore) {
        let (locks, other) = (store.manager().await, store.manager().await);
        let [first, last] = in_order(["a", "b"]);
        let held = lock(&other, last).await;
        let waiting = tokio::spawn(locks.lock_all([first, last]).into_future());
        until_queued(&other, last, 1).await;
        locks.shutdown().await.expect("shut down");
        let error = soon("the request", waiting).await.expect("a task").expect_err("the manager was shut down");
        assert!(error.kind() == LockErrorKind::Closed, "{error}");
        held.release().await.expect("release");
        store.is_empty(&other, first).await;
    }
}

on_each_store! {
    on(redis);

    async fn loss_of_one_key_is_the_loss_of_all_and_names_the_key(store: &TestStore) {
        let locks = renewing_manager(store).await;
        let guard = locks.lock_all(["a", "b", "c"]).await.expect("lock");
        let token = guard.token("b").expect("a token");
        store.servers().delete(&store.lease("b"));
        let lost = soon("the loss", guard.lost()).await;
        assert_eq!((lost.key.as_str(), lost.token, lost.reason), ("b", token, LossReason::Taken));
        assert!(lost.to_string().starts_with(&format!("lock \"b\" (token {token}) was lost: ")), "{lost}");
        assert!(!guard.is_valid() && guard.remaining().is_zero());
        // The others are held until the guard is gone.
        assert!(guard.guard("a").expect("a guard").is_valid());
        let error = guard.release().await.expect_err("one was lost");
        assert_eq!((error.key(), error.is_lost()), (Some("b"), true), "{error}");
        all_are_empty(store, &locks, &["a", "b", "c"]).await;
    }

    async fn lock_lost_while_a_later_key_is_awaited_is_acquired_again_in_order(store: &TestStore) {
        let (locks, other) = (renewing_manager(store).await, store.manager().await);
        let [first, middle, last] = in_order(["a", "b", "c"]);
        let held = lock(&other, last).await;
        let waiting = tokio::spawn(locks.lock_all([first, middle, last]).into_future());
        until_queued(&other, last, 1).await;
        let tokens = |key: &'static str| {
            let locks = locks.clone();
            let held = locks.held().into_iter().find(|held| held.key == key);
            held.map(|held| held.token)
        };
        let (of_first, of_middle) = (tokens(first).expect("held"), tokens(middle).expect("held"));
        // Another client takes the middle key and keeps it.
        store.servers().overwrite(&store.lease(middle), "another", Duration::from_secs(600));
        until("the request waits for the middle key again", async || {
            locks.inspect(middle).await.expect("inspect").queue_length == 1
        })
        .await;
        // The last key is not awaited meanwhile, and the first one was kept.
        until_queued(&other, last, 0).await;
        assert_eq!(tokens(first), Some(of_first));
        store.servers().delete(&store.lease(middle));
        held.release().await.expect("release");
        let guard = soon("the locks", waiting).await.expect("a task").expect("lock");
        assert!(guard.is_valid());
        assert_eq!(guard.token(first), Some(of_first));
        assert!(guard.token(middle).expect("a token") > of_middle);
        guard.release().await.expect("all are held");
    }
}

#[tokio::test]
async fn keys_outside_their_bounds_fail_when_the_request_is_awaited() {
    let locks = support_locks::connect("memory://").await;
    let many: Vec<_> = (0..=LockAllRequest::KEYS_MAX)
        .map(|number| number.to_string())
        .collect();
    for (keys, text) in [
        (&[][..], "keys is empty, but must be 1 to 128 different keys"),
        (
            &["a".to_owned(), String::new()],
            "key is empty, but must be 1 to 512 bytes long",
        ),
        (&many, "keys is 129 or more, but must be 1 to 128 different keys"),
    ] {
        for result in [
            locks.lock_all(keys).await.map(drop),
            locks.try_lock_all(keys).await.map(drop),
        ] {
            let error = result.expect_err("the keys are invalid");
            assert!(error.kind() == LockErrorKind::Invalid, "{error}");
            assert_eq!(error.to_string(), text);
        }
    }
    let error = locks
        .lock_all(["a"])
        .ttl(Duration::ZERO)
        .await
        .expect_err("the TTL is too short");
    assert!(error.kind() == LockErrorKind::Invalid, "{error}");
    assert_eq!(
        locks.lock_all(&many[1..]).await.expect("lock").guards().len(),
        LockAllRequest::KEYS_MAX
    );
}

/// The keys of one request may be on any shards.
#[tokio::test]
async fn keys_of_several_shards_are_locked_together() {
    let builder = LockManager::builder()
        .shard("memory://")
        .shard("memory://")
        .shard("memory://")
        .store_timeout(STORE_TIMEOUT);
    let locks = builder.connect().await.expect("connect");
    let keys: Vec<_> = (0..12).map(|number| number.to_string()).collect();
    let guard = locks.lock_all(&keys).await.expect("lock");
    let mut shards: Vec<_> = guard.guards().iter().map(|guard| guard.shard()).collect();
    assert!(shards.is_sorted(), "{shards:?}");
    shards.dedup();
    assert_eq!(shards.len(), 3);
    guard.release().await.expect("release");
}

/// Their futures are `Send`, with bodies that borrow from the task.
#[tokio::test]
async fn bodies_under_several_locks_can_be_spawned() {
    let locks = support_locks::connect("memory://").await;
    let text = String::from("borrowed");
    let borrowing = tokio::spawn(async move {
        let body = async |guard: &LockAllGuard| {
            tokio::task::yield_now().await;
            (text.len(), guard.is_valid())
        };
        let seen = locks.lock_all(["a", "b"]).with(body).await;
        (seen, text)
    });
    let (seen, text) = borrowing.await.expect("a task");
    assert_eq!((seen.expect("lock"), text.as_str()), ((8, true), "borrowed"));
}

/// The clock of tokio decides about the timeout, as for a single key.
#[tokio::test(start_paused = true)]
async fn timeout_of_several_keys_follows_the_paused_clock() {
    let locks = support_locks::connect("memory://").await;
    let [first, last] = in_order(["a", "b"]);
    let (early, _late) = (lock(&locks, first).await, lock(&locks, last).await);
    let limit = Duration::from_secs(1000);
    let releasing = async {
        tokio::time::sleep(limit * 9 / 10).await;
        early.release().await.expect("release");
    };
    let started = tokio::time::Instant::now();
    let (result, ()) = tokio::join!(locks.lock_all([last, first]).timeout(limit).into_future(), releasing);
    assert!(result.expect_err("the last key is held").is_timeout());
    let took = started.elapsed();
    assert!(took >= limit, "{took:?}");
}
