//! Locks in etcd: order, tokens, all kinds of ends, and what they leave behind.

mod access;
mod connections;
mod costs;
mod members;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use shardlock::LockManager;
use shardlock::config::Builder;
use shardlock::error::LockErrorKind;

use support::PATIENCE;
use support::etcd::{Etcd, LEASE_MIN};
use support_locks::{lock, poll_once, soon, until, until_queued};

/// Longer than an election takes.
const STORE_TIMEOUT: Duration = Duration::from_secs(6);

fn builder(etcd: &Etcd) -> Builder {
    LockManager::builder().shard(etcd.url()).store_timeout(STORE_TIMEOUT)
}

async fn manager(etcd: &Etcd) -> LockManager {
    builder(etcd).connect().await.expect("connect")
}

/// Waits until etcd has neither keys of locks nor leases.
async fn until_nothing_is_left(etcd: &Etcd) {
    until("no key of a lock is left", async || etcd.lock_keys().await.is_empty()).await;
    until("no lease is left", async || etcd.leases().await == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lock_excludes_other_managers_and_is_handed_off() {
    let etcd = Etcd::start().await;
    let (ours, theirs) = (manager(&etcd).await, manager(&etcd).await);
    for key in ["k", "a/b", "100%", "ä {x}", "\u{1}"] {
        let guard = lock(&ours, key).await;
        assert!(guard.is_valid());
        assert!(theirs.try_lock(key).await.unwrap().is_none(), "{key}");
        let seen = theirs.inspect(key).await.unwrap();
        let holder = seen.holder.unwrap();
        assert!(holder.is_manager && holder.owner.starts_with(ours.id()), "{holder:?}");
        let remaining = holder.remaining.unwrap();
        assert!(
            remaining <= Duration::from_secs(10) && !remaining.is_zero(),
            "{remaining:?}"
        );
        assert_eq!(seen.last_token, Some(guard.token()));

        let waiting = tokio::spawn({
            let (theirs, key) = (theirs.clone(), key.to_owned());
            async move { lock(&theirs, &key).await }
        });
        until_queued(&ours, key, 1).await;
        let token = guard.token();
        guard.release().await.unwrap();
        let guard = soon("the other has it", waiting).await.unwrap();
        assert!(guard.token() > token);
        guard.release().await.unwrap();
    }
    until_nothing_is_left(&etcd).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn managers_get_the_lock_in_request_order() {
    const MANAGERS: usize = 8;
    let etcd = Etcd::start().await;
    let holder = manager(&etcd).await;
    let guard = lock(&holder, "k").await;
    let order = Arc::new(parking_lot::Mutex::new(Vec::new()));
    let mut tasks = Vec::new();
    for number in 0..MANAGERS {
        let (locks, order) = (manager(&etcd).await, Arc::clone(&order));
        tasks.push(tokio::spawn(async move {
            let guard = lock(&locks, "k").await;
            order.lock().push((number, guard.token()));
            guard.release().await.unwrap();
        }));
        until_queued(&holder, "k", number as u64 + 1).await;
    }
    let first = guard.token();
    guard.release().await.unwrap();
    for task in tasks {
        soon("every manager gets the lock", task).await.unwrap();
    }
    let order = std::mem::take(&mut *order.lock());
    let numbers: Vec<usize> = order.iter().map(|&(number, _)| number).collect();
    assert_eq!(numbers, (0..MANAGERS).collect::<Vec<_>>());
    assert!(order[0].1 > first && order.is_sorted_by(|one, other| one.1 < other.1));
    until_nothing_is_left(&etcd).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_local_waiters_use_one_queue_entry() {
    const TASKS: usize = 1_000;
    let etcd = Etcd::start().await;
    let (ours, theirs) = (manager(&etcd).await, manager(&etcd).await);
    let guard = lock(&theirs, "k").await;
    let served = Arc::new(parking_lot::Mutex::new(Vec::new()));
    let tasks: Vec<_> = (0..TASKS)
        .map(|_| {
            let (locks, served) = (ours.clone(), Arc::clone(&served));
            tokio::spawn(async move {
                let guard = lock(&locks, "k").await;
                served.lock().push(guard.token());
                guard.release().await.unwrap();
            })
        })
        .collect();
    until_queued(&theirs, "k", 1).await;
    let before = etcd.requests();
    guard.release().await.unwrap();
    for task in tasks {
        soon("every task gets the lock", task).await.unwrap();
    }
    let after = etcd.requests();
    let served = std::mem::take(&mut *served.lock());
    assert_eq!(served.len(), TASKS);
    assert!(
        served.is_sorted_by(|one, other| one < other),
        "tokens grow, one for each task"
    );
    let sent = |method: &str| after.get(method).unwrap_or(&0) - before.get(method).unwrap_or(&0);
    assert!(sent("Txn") <= 40, "{} transactions for {TASKS} locks", sent("Txn"));
    until_nothing_is_left(&etcd).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn managers_take_turns_and_tokens_grow_while_they_exclude_each_other() {
    let etcd = Etcd::start().await;
    let last = Arc::new(AtomicU64::new(0));
    let mut tasks = Vec::new();
    for _ in 0..4 {
        let locks = builder(&etcd).max_burst(4).connect().await.unwrap();
        for _ in 0..8 {
            let (locks, last) = (locks.clone(), Arc::clone(&last));
            tasks.push(tokio::spawn(async move {
                for _ in 0..10 {
                    let guard = lock(&locks, "k").await;
                    let token = guard.token().get();
                    // Two concurrent holders would sooner or later store their tokens in the wrong
                    // order.
                    assert!(last.swap(token, Ordering::SeqCst) < token);
                    tokio::task::yield_now().await;
                    assert_eq!(last.load(Ordering::SeqCst), token);
                    guard.release().await.unwrap();
                }
            }));
        }
    }
    for task in tasks {
        soon("every task gets the lock every time", task).await.unwrap();
    }
    until_nothing_is_left(&etcd).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn owner_of_an_even_cycle_is_notified_of_remote_waiters() {
    let etcd = Etcd::start().await;
    // A renewal would report it, too, but the first one is due long after this test's time limit.
    let ours = builder(&etcd)
        .ttl(PATIENCE * 100)
        .max_slice(Duration::from_millis(1))
        .connect()
        .await
        .unwrap();
    let theirs = manager(&etcd).await;
    let mut guard = lock(&ours, "k").await;
    let mut remote = tokio::spawn(async move { lock(&theirs, "k").await });
    until_queued(&ours, "k", 1).await;
    let started = Instant::now();
    let guard = loop {
        // There is always a waiting local task.
        let mut local = tokio::spawn({
            let ours = ours.clone();
            async move { lock(&ours, "k").await }
        });
        guard.release().await.unwrap();
        tokio::select! {
            theirs = &mut remote => {
                let theirs = theirs.unwrap();
                theirs.release().await.unwrap();
                break soon("the local task's turn", local).await.unwrap();
            }
            next = &mut local => guard = next.unwrap(),
        }
        assert!(started.elapsed() < PATIENCE, "the other manager never gets its turn");
    };
    guard.release().await.unwrap();
    until_nothing_is_left(&etcd).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lease_of_a_dead_process_ends_soon_after_its_ttl() {
    let etcd = Etcd::start().await;
    let locks = builder(&etcd).ttl(Duration::from_secs(1)).connect().await.unwrap();
    // The key of a killed process's manager: it exists, and its lease is not renewed.
    let mut dead = etcd.client().await;
    let lease = dead.lease_grant(1, None).await.unwrap();
    let attached = etcd_client::PutOptions::new().with_lease(lease.id());
    let name = "lock:k/dead-1-0000000000000000:3";
    dead.put(name, "1", Some(attached)).await.unwrap();
    let started = Instant::now();
    let guard = lock(&locks, "k").await;
    let waited = started.elapsed();
    assert!(waited < LEASE_MIN * 3, "{waited:?}");
    guard.release().await.unwrap();
    until_nothing_is_left(&etcd).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waits_and_holds_outlast_the_ttl() {
    let etcd = Etcd::start().await;
    let short = || builder(&etcd).ttl(LEASE_MIN * 2).connect();
    let (ours, theirs, third) = (short().await.unwrap(), short().await.unwrap(), short().await.unwrap());
    let guard = lock(&ours, "k").await;
    let wait = |locks: &LockManager| {
        let locks = locks.clone();
        tokio::spawn(async move { lock(&locks, "k").await })
    };
    let second = wait(&theirs);
    until_queued(&ours, "k", 1).await;
    let last = wait(&third);
    until_queued(&ours, "k", 2).await;
    let order = ours.inspect("k").await.unwrap().queue;
    // Longer than any lease here lasts: etcd ends one up to a second and a half late.
    tokio::time::sleep(LEASE_MIN * 3).await;
    assert!(guard.is_valid());
    let seen = ours.inspect("k").await.unwrap();
    assert_eq!(seen.queue, order, "no waiter has lost its place");
    guard.release().await.unwrap();
    soon("the second's turn", second)
        .await
        .unwrap()
        .release()
        .await
        .unwrap();
    soon("the third's turn", last).await.unwrap().release().await.unwrap();
    until_nothing_is_left(&etcd).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn longer_ttl_of_the_next_local_holder_is_applied() {
    let etcd = Etcd::start().await;
    let locks = manager(&etcd).await;
    let guard = locks.lock("k").ttl(Duration::from_secs(3)).await.unwrap();
    let mut waiting = Box::pin(locks.lock("k").ttl(Duration::from_secs(30)).into_future());
    assert!(poll_once(&mut waiting).is_none());
    guard.release().await.unwrap();
    let guard = soon("the local hand-off", waiting).await.unwrap();
    until("the lease is as long as the holder's TTL", async || {
        let holder = locks.inspect("k").await.unwrap().holder.unwrap();
        holder.remaining.unwrap() > Duration::from_secs(20)
    })
    .await;
    assert!(guard.is_valid());
    assert_eq!(etcd.lock_keys().await.len(), 1);
    until("the first lease is revoked", async || etcd.leases().await == 1).await;
    guard.release().await.unwrap();
    until_nothing_is_left(&etcd).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deleting_the_key_of_a_holder_is_a_loss() {
    let etcd = Etcd::start().await;
    let locks = builder(&etcd).ttl(Duration::from_secs(2)).connect().await.unwrap();
    let guard = lock(&locks, "k").await;
    let key = etcd.lock_keys().await.remove(0);
    etcd.client().await.delete(key, None).await.unwrap();
    soon("the loss is reported", guard.lost()).await;
    assert!(!guard.is_valid());
    assert!(guard.release().await.unwrap_err().is_lost());
    let token = lock(&locks, "k").await;
    token.release().await.unwrap();
    until_nothing_is_left(&etcd).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cancelled_waiters_leave_nothing_and_keep_the_order_of_the_others() {
    let etcd = Etcd::start().await;
    let holder = manager(&etcd).await;
    let guard = lock(&holder, "k").await;
    let (first, second) = (manager(&etcd).await, manager(&etcd).await);
    let waiting = tokio::spawn({
        let first = first.clone();
        async move { drop(lock(&first, "k").await) }
    });
    until_queued(&holder, "k", 1).await;
    let behind = tokio::spawn({
        let second = second.clone();
        async move { lock(&second, "k").await }
    });
    until_queued(&holder, "k", 2).await;
    waiting.abort();
    until_queued(&holder, "k", 1).await;
    assert!(!behind.is_finished());
    // Dropped at every stage of a request.
    for micros in (0..4_000).step_by(100) {
        let attempt = first.lock("k");
        drop(tokio::time::timeout(Duration::from_micros(micros), attempt.into_future()).await);
    }
    until_queued(&holder, "k", 1).await;
    guard.release().await.unwrap();
    soon("the remaining waiter", behind)
        .await
        .unwrap()
        .release()
        .await
        .unwrap();
    until_nothing_is_left(&etcd).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_try_and_a_shutdown_leave_nothing() {
    let etcd = Etcd::start().await;
    let (ours, theirs) = (manager(&etcd).await, manager(&etcd).await);
    let guard = lock(&ours, "k").await;
    let before = etcd.requests();
    for _ in 0..20 {
        assert!(theirs.try_lock("k").await.unwrap().is_none());
    }
    assert_eq!(
        etcd.requests().get("LeaseGrant"),
        before.get("LeaseGrant"),
        "a try needs no lease"
    );
    assert_eq!((etcd.lock_keys().await.len(), etcd.leases().await), (1, 1));

    let waiting = tokio::spawn({
        let theirs = theirs.clone();
        async move { theirs.lock("k").await.map(drop) }
    });
    until_queued(&ours, "k", 1).await;
    // Everything is released by the time a shutdown returns.
    soon("the shutdown of the waiting manager", theirs.shutdown())
        .await
        .ok();
    assert_eq!(waiting.await.unwrap().unwrap_err().kind(), LockErrorKind::Closed);
    assert_eq!((etcd.lock_keys().await.len(), etcd.leases().await), (1, 1));
    soon("the shutdown of the holding manager", ours.shutdown()).await.ok();
    assert_eq!((etcd.lock_keys().await.len(), etcd.leases().await), (0, 0));
    drop(guard);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_leases_are_kept_alive() {
    const KEYS: usize = 250;
    // Long enough for so many keep-alives on a busy machine.
    const TTL: Duration = LEASE_MIN.saturating_mul(4);
    let etcd = Etcd::start().await;
    let locks = builder(&etcd).ttl(TTL).connect().await.unwrap();
    let keys: Vec<String> = (0..KEYS).map(|number| format!("k{number}")).collect();
    let taking = keys.iter().map(|key| lock(&locks, key));
    let guards = futures_util::future::join_all(taking).await;
    tokio::time::sleep(TTL * 2).await;
    assert!(guards.iter().all(shardlock::LockGuard::is_valid));
    assert_eq!((etcd.lock_keys().await.len(), etcd.leases().await), (KEYS, KEYS));
    drop(guards);
    until_nothing_is_left(&etcd).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_of_other_clients_are_waited_for_and_shown() {
    let etcd = Etcd::start().await;
    let locks = manager(&etcd).await;
    let mut other = etcd.client().await;
    other.put("lock:k/their-own", "value", None).await.unwrap();
    let seen = locks.inspect("k").await.unwrap();
    let holder = seen.holder.unwrap();
    assert_eq!((holder.owner.as_str(), holder.is_manager), ("their-own", false));
    assert_eq!((holder.remaining, seen.last_token), (None, None));
    assert!(locks.try_lock("k").await.unwrap().is_none());
    let waiting = tokio::spawn({
        let locks = locks.clone();
        async move { lock(&locks, "k").await }
    });
    until_queued(&locks, "k", 1).await;
    other.delete("lock:k/their-own", None).await.unwrap();
    soon("the key is gone", waiting).await.unwrap().release().await.unwrap();
    until_nothing_is_left(&etcd).await;
}

#[test]
fn patience_exceeds_the_longest_expected_wait() {
    assert!(PATIENCE > STORE_TIMEOUT + LEASE_MIN);
}
