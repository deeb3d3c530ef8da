//! Locks in etcd: order, tokens, ends of every kind, and what they leave behind.

// A test is over when its surroundings fail.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

mod support;
mod support_locks;
#[cfg(feature = "cli")]
mod tool;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use shardlock::{Builder, LockError, LockManager};

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

/// Waits until etcd has no key of a lock and no lease.
async fn until_nothing_is_left(etcd: &Etcd) {
    until("no key of a lock is left", async || etcd.lock_keys().await.is_empty()).await;
    until("no lease is left", async || etcd.leases().await == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_excludes_others_and_is_handed_on() {
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
async fn managers_get_the_lock_in_the_order_in_which_they_asked() {
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
async fn a_thousand_local_waiters_are_one_key() {
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
        "tokens grow, one for each"
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
                    // Two holders at once would store in the wrong order sooner or later.
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
async fn an_owner_that_did_not_reckon_with_rivals_is_told_of_them() {
    let etcd = Etcd::start().await;
    // A renewal says it, too, but the first of these is due when nobody waits for this test any more.
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
        // There is always a local task that waits.
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
async fn a_lease_outlives_its_ttl_only_as_long_as_etcd_says() {
    let etcd = Etcd::start().await;
    let locks = builder(&etcd).ttl(Duration::from_secs(1)).connect().await.unwrap();
    // A manager of a process that was killed: its key is there, and nobody renews its lease.
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
async fn waiting_and_holding_go_on_beyond_the_ttl() {
    let etcd = Etcd::start().await;
    let short = || builder(&etcd).ttl(Duration::from_secs(1)).connect();
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
    // Three times as long as any lease here lasts.
    tokio::time::sleep(LEASE_MIN * 3).await;
    assert!(guard.is_valid());
    let seen = ours.inspect("k").await.unwrap();
    assert_eq!(seen.queue, order, "nobody has lost a place");
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
async fn a_longer_ttl_under_the_same_lease_is_kept() {
    let etcd = Etcd::start().await;
    let locks = manager(&etcd).await;
    let guard = locks.lock("k").ttl(Duration::from_secs(1)).await.unwrap();
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
async fn a_key_that_was_deleted_is_a_lock_that_is_lost() {
    let etcd = Etcd::start().await;
    let locks = builder(&etcd).ttl(Duration::from_secs(2)).connect().await.unwrap();
    let guard = lock(&locks, "k").await;
    let key = etcd.lock_keys().await.remove(0);
    etcd.client().await.delete(key, None).await.unwrap();
    soon("the loss is told", guard.lost()).await;
    assert!(!guard.is_valid());
    assert!(matches!(guard.release().await, Err(LockError::Lost { .. })));
    let token = lock(&locks, "k").await;
    token.release().await.unwrap();
    until_nothing_is_left(&etcd).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waiters_that_give_up_leave_nothing_and_the_order_of_the_others() {
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
    soon("the one that still waits", behind)
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
        "a look is enough"
    );
    assert_eq!((etcd.lock_keys().await.len(), etcd.leases().await), (1, 1));

    let waiting = tokio::spawn({
        let theirs = theirs.clone();
        async move { theirs.lock("k").await.map(drop) }
    });
    until_queued(&ours, "k", 1).await;
    // Everything was given back when a shutdown has ended, not a moment later.
    soon("the shutdown of the one that waits", theirs.shutdown()).await;
    assert!(matches!(waiting.await.unwrap(), Err(LockError::Closed)));
    assert_eq!((etcd.lock_keys().await.len(), etcd.leases().await), (1, 1));
    soon("the shutdown of the one that holds", ours.shutdown()).await;
    assert_eq!((etcd.lock_keys().await.len(), etcd.leases().await), (0, 0));
    drop(guard);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_is_gone_does_not_matter() {
    let etcd = Etcd::start_members(3).await;
    let (ours, theirs) = (manager(&etcd).await, manager(&etcd).await);
    for number in 0..3 {
        let guard = lock(&ours, "k").await;
        let waiting = tokio::spawn({
            let theirs = theirs.clone();
            async move { lock(&theirs, "k").await }
        });
        until_queued(&ours, "k", 1).await;
        // The leader is among them once.
        etcd.kill(number);
        let token = guard.token();
        until("a leader is there", async || ours.inspect("k").await.is_ok()).await;
        assert!(guard.is_valid());
        guard.release().await.unwrap();
        let guard = soon("the hand-off", waiting).await.unwrap();
        assert!(guard.token() > token);
        // One that connects while a member is down.
        let third = manager(&etcd).await;
        assert!(third.try_lock("k").await.unwrap().is_none());
        guard.release().await.unwrap();
        lock(&third, "k").await.release().await.unwrap();
        etcd.restart(number).await;
    }
    until_nothing_is_left(&etcd).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_holds_a_lock_beside_another_while_members_come_and_go() {
    let etcd = Etcd::start_members(3).await;
    let last = Arc::new(AtomicU64::new(0));
    let over = Arc::new(AtomicBool::new(false));
    let mut tasks = Vec::new();
    for _ in 0..4 {
        let locks = builder(&etcd).max_burst(4).connect().await.unwrap();
        for _ in 0..2 {
            let (locks, last, over) = (locks.clone(), Arc::clone(&last), Arc::clone(&over));
            tasks.push(tokio::spawn(async move {
                let mut count = 0;
                while !over.load(Ordering::SeqCst) {
                    // While a leader is elected there may be no answer in time.
                    let Ok(guard) = locks.lock("k").timeout(PATIENCE).await else {
                        continue;
                    };
                    let token = guard.token().get();
                    let before = last.swap(token, Ordering::SeqCst);
                    tokio::task::yield_now().await;
                    let after = last.load(Ordering::SeqCst);
                    if guard.is_valid() {
                        assert!(before < token, "{before} before {token}");
                        assert_eq!(after, token);
                        count += 1;
                    }
                    guard.release().await.ok();
                }
                count
            }));
        }
    }
    let locks = manager(&etcd).await;
    for number in [0, 1, 2] {
        let before = last.load(Ordering::SeqCst);
        etcd.kill(number);
        until("others take turns meanwhile", async || {
            last.load(Ordering::SeqCst) > before + (1 << 20)
        })
        .await;
        etcd.restart(number).await;
        until("etcd answers", async || locks.inspect("k").await.is_ok()).await;
    }
    over.store(true, Ordering::SeqCst);
    for task in tasks {
        let count: u32 = soon("every task ends", task).await.unwrap();
        assert!(count > 0, "every task had the lock");
    }
    until_nothing_is_left(&etcd).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_leases_are_kept_alive() {
    const KEYS: usize = 250;
    let etcd = Etcd::start().await;
    let locks = builder(&etcd).ttl(LEASE_MIN).connect().await.unwrap();
    let keys: Vec<String> = (0..KEYS).map(|number| format!("k{number}")).collect();
    let taking = keys.iter().map(|key| lock(&locks, key));
    let guards = futures_util::future::join_all(taking).await;
    tokio::time::sleep(LEASE_MIN * 3).await;
    assert!(guards.iter().all(shardlock::LockGuard::is_valid));
    assert_eq!((etcd.lock_keys().await.len(), etcd.leases().await), (KEYS, KEYS));
    drop(guards);
    until_nothing_is_left(&etcd).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_hangs_is_left_while_locks_are_held_and_waited_for() {
    let etcd = Etcd::start_members(3).await;
    let (ours, theirs) = (manager(&etcd).await, manager(&etcd).await);
    let guard = lock(&ours, "k").await;
    let waiting = tokio::spawn({
        let theirs = theirs.clone();
        async move { lock(&theirs, "k").await }
    });
    until_queued(&ours, "k", 1).await;
    let leader = etcd.leader().await;
    etcd.stop(leader);
    // Longer than a lease lasts: it must have been renewed by way of another member.
    tokio::time::sleep(Duration::from_secs(12)).await;
    assert!(guard.is_valid(), "the lease was renewed");
    guard.release().await.unwrap();
    let guard = soon("the hand-off", waiting).await.unwrap();
    guard.release().await.unwrap();
    etcd.cont(leader);
    until_nothing_is_left(&etcd).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_shard_map_is_refused() {
    let etcd = Etcd::start().await;
    let _first = manager(&etcd).await;
    let error = LockManager::builder()
        .shard(etcd.url())
        .shard("memory://other-shard-of-etcd")
        .store_timeout(STORE_TIMEOUT)
        .connect()
        .await
        .unwrap_err();
    assert!(matches!(error, LockError::ShardMapMismatch { .. }), "{error}");
    assert!(error.to_string().contains("lock:%map"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hosts_and_logins_that_are_wrong_are_told_in_words() {
    let error = LockManager::connect("etcd://127.0.0.1:1,127.0.0.1:2")
        .await
        .unwrap_err();
    let message = error.to_string();
    assert!(matches!(error, LockError::Unavailable { .. }), "{message}");
    for part in ["127.0.0.1:1: ", "127.0.0.1:2: ", "refused"] {
        assert!(message.contains(part), "{message}");
    }

    let etcd = Etcd::start().await;
    let login = |user: &str| LockManager::connect(&format!("etcd://{user}@{}", etcd.hosts()).leak()[..]);
    let refusal = async |user: &str| {
        let error = login(user).await.unwrap_err();
        assert!(matches!(error, LockError::Refused { .. }), "{error:?}");
        let message = format!("{error} {error:?}");
        assert!(!message.contains("s3cret"), "{message}");
        message
    };
    let message = refusal("u:s3cret").await;
    assert!(message.contains("leave the user and the password out"), "{message}");

    let mut client = etcd.client().await;
    for user in ["root", "locker", "reader"] {
        client.user_add(user, "s3cret", None).await.unwrap();
    }
    client.role_add("root").await.unwrap();
    client.user_grant_role("root", "root").await.unwrap();
    client.role_add("locks").await.unwrap();
    let all = etcd_client::Permission::read_write("lock:").with_prefix();
    client.role_grant_permission("locks", all).await.unwrap();
    client.user_grant_role("locker", "locks").await.unwrap();
    client.auth_enable().await.unwrap();

    let message = refusal("root:s3cret-wrong").await;
    assert!(message.contains("check the user and the password"), "{message}");
    let message = refusal("reader:s3cret").await;
    assert!(
        message.contains("needs readwrite on all keys that begin with"),
        "{message}"
    );
    let error = LockManager::connect(&etcd.url()).await.unwrap_err();
    assert!(error.to_string().contains("name a user and its password"), "{error}");

    let locks = login("locker:s3cret").await.unwrap();
    let other = login("locker:s3cret").await.unwrap();
    let guard = lock(&locks, "k").await;
    let waiting = tokio::spawn(async move { lock(&other, "k").await });
    until_queued(&locks, "k", 1).await;
    guard.release().await.unwrap();
    soon("the hand-off", waiting).await.unwrap().release().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_etcd_that_was_restored_from_an_old_backup_gives_no_lock() {
    let etcd = Etcd::start().await;
    let locks = manager(&etcd).await;
    etcd.kill(0);
    let backup = etcd.back_up(0);
    etcd.restart(0).await;
    let mut last = None;
    for _ in 0..3 {
        let guard = lock(&locks, "k").await;
        last = Some(guard.token());
        guard.release().await.unwrap();
    }
    etcd.kill(0);
    etcd.restore(0, &backup);
    etcd.restart(0).await;
    let error = locks.lock("k").await.unwrap_err();
    assert!(matches!(error, LockError::TokenRegression { .. }), "{error}");
    // A new manager has seen nothing that speaks against it: that is what the resource's own check of tokens is for.
    let guard = lock(&manager(&etcd).await, "k").await;
    assert!(Some(guard.token()) < last);
    guard.release().await.unwrap();
}

#[cfg(feature = "tls")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn encrypted_connections_need_the_right_files() {
    let etcd = Etcd::start_with_tls().await;
    let files = etcd.tls();
    let with_client = |builder: Builder| builder.tls_cert(&files.cert).tls_key(&files.key);
    let locks = with_client(builder(&etcd).tls_ca(&files.ca)).connect().await.unwrap();
    let other = with_client(builder(&etcd).tls_ca(&files.ca)).connect().await.unwrap();
    let guard = lock(&locks, "k").await;
    let waiting = tokio::spawn(async move { lock(&other, "k").await });
    until_queued(&locks, "k", 1).await;
    guard.release().await.unwrap();
    soon("the hand-off", waiting).await.unwrap().release().await.unwrap();
    until_nothing_is_left(&etcd).await;

    // The system does not know this authority; etcd does not know who shows no certificate.
    let cases = [
        (with_client(builder(&etcd)), "set tls_ca to"),
        (builder(&etcd).tls_ca(&files.ca), "set tls_cert and tls_key"),
    ];
    for (refused, advice) in cases {
        let error = refused.connect().await.unwrap_err();
        let message = error.to_string();
        assert!(matches!(error, LockError::Unavailable { .. }), "{message}");
        assert!(message.contains(advice), "{message}");
    }
    let missing = files.ca.with_file_name("missing.pem");
    let error = builder(&etcd).tls_ca(&missing).connect().await.unwrap_err();
    let message = error.to_string();
    assert!(
        message.contains("tls_ca is ") && message.contains("missing.pem"),
        "{message}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_of_others_are_waited_for_and_shown() {
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
    soon("it is gone", waiting).await.unwrap().release().await.unwrap();
    until_nothing_is_left(&etcd).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waits_survive_a_compaction() {
    let etcd = Etcd::start().await;
    let (ours, theirs) = (manager(&etcd).await, manager(&etcd).await);
    let guard = lock(&ours, "k").await;
    let waiting = tokio::spawn({
        let theirs = theirs.clone();
        async move { lock(&theirs, "k").await }
    });
    until_queued(&ours, "k", 1).await;
    let mut client = etcd.client().await;
    let revision = client
        .put("other", "", None)
        .await
        .unwrap()
        .header()
        .unwrap()
        .revision();
    client.compact(revision, None).await.unwrap();
    // Its connections break, and whoever waits begins at a revision that is gone.
    etcd.restart(0).await;
    client = etcd.client().await;
    until("both managers are there again", async || {
        ours.inspect("k").await.is_ok() && theirs.inspect("k").await.is_ok()
    })
    .await;
    assert!(guard.is_valid());
    client.put("other", "", None).await.unwrap();
    guard.release().await.unwrap();
    soon("the hand-off", waiting).await.unwrap().release().await.unwrap();
    until_nothing_is_left(&etcd).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_costs_few_requests() {
    const LOCKS: u64 = 50;
    let etcd = Etcd::start().await;
    let locks = manager(&etcd).await;
    lock(&locks, "warm").await.release().await.unwrap();
    until_nothing_is_left(&etcd).await;
    let before = etcd.requests();
    let mut taken = Vec::new();
    let mut given_back = Vec::new();
    for _ in 0..LOCKS {
        let started = Instant::now();
        let guard = lock(&locks, "k").await;
        taken.push(started.elapsed());
        let started = Instant::now();
        guard.release().await.unwrap();
        given_back.push(started.elapsed());
    }
    until("all leases are revoked", async || etcd.leases().await == 0).await;
    let after = etcd.requests();
    let sent = |method: &str| after.get(method).unwrap_or(&0) - before.get(method).unwrap_or(&0);
    assert_eq!(
        (sent("LeaseGrant"), sent("Txn"), sent("LeaseRevoke")),
        (LOCKS, 2 * LOCKS, LOCKS)
    );
    println!(
        "p50 of a lock {:?}, of a release {:?}",
        p50(&mut taken),
        p50(&mut given_back)
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hand_off_costs_the_same_however_many_wait() {
    let etcd = Etcd::start().await;
    let holder = manager(&etcd).await;
    for waiters in [2, 8] {
        let guard = lock(&holder, "k").await;
        let mut tasks = Vec::new();
        let released = Arc::new(parking_lot::Mutex::new(Instant::now()));
        for number in 0..waiters {
            let (locks, released) = (manager(&etcd).await, Arc::clone(&released));
            tasks.push(tokio::spawn(async move {
                let guard = lock(&locks, "k").await;
                let waited = released.lock().elapsed();
                *released.lock() = Instant::now();
                guard.release().await.unwrap();
                waited
            }));
            until_queued(&holder, "k", number + 1).await;
        }
        let before = etcd.requests();
        *released.lock() = Instant::now();
        guard.release().await.unwrap();
        let mut waited = Vec::new();
        for task in tasks {
            waited.push(soon("the hand-off", task).await.unwrap());
        }
        let after = etcd.requests();
        let sent = after.get("Txn").unwrap() - before.get("Txn").unwrap();
        // A release and an acquire for each, and the first release.
        assert_eq!(sent, 2 * waiters + 1);
        println!("p50 of a hand-off with {waiters} waiting {:?}", p50(&mut waited));
        until_nothing_is_left(&etcd).await;
    }
}

fn p50(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

#[cfg(feature = "cli")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_tool_runs_commands_under_a_lock_and_shows_it() {
    let etcd = Etcd::start().await;
    let locks = manager(&etcd).await;
    let tool = |args: &[&str]| {
        let mut command = tool::bare(args);
        command.env("SHARDLOCK_SHARDS", etcd.url());
        command
    };
    let guard = lock(&locks, "k").await;
    let mut waiting = tool::Run::start(tool(&["exec", "k", "sh", "-c", "echo $LOCK_TOKEN"]));
    until_queued(&locks, "k", 1).await;
    let shown = tool::run(tool(&["inspect", "k", "--json"]));
    let shown: serde_json::Value = serde_json::from_str(&shown.stdout).unwrap_or_else(|_| panic!("{shown:?}"));
    assert_eq!(shown["holder"]["is_manager"], true);
    assert!(shown["holder"]["owner"].as_str().unwrap().starts_with(locks.id()));
    assert_eq!(shown["last_token"], guard.token().get());
    assert_eq!(shown["queue"].as_array().unwrap().len(), 1);
    let token = guard.token().get();
    guard.release().await.unwrap();
    let ended = waiting.end();
    assert_eq!(ended.code, 0, "{ended:?}");
    let theirs: u64 = ended.stdout.trim().parse().unwrap_or_else(|_| panic!("{ended:?}"));
    assert!(theirs > token);
    // The tool ends when it has given everything back.
    assert_eq!((etcd.lock_keys().await.len(), etcd.leases().await), (0, 0));
}

#[cfg(feature = "cli")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_key_of_a_process_that_was_killed_is_free_when_its_lease_ends() {
    let etcd = Etcd::start().await;
    let locks = manager(&etcd).await;
    let mut command = tool::bare(&["exec", "--ttl", "2s", "k", "cat"]);
    command
        .env("SHARDLOCK_SHARDS", etcd.url())
        .stdin(std::process::Stdio::piped());
    let mut holder = tool::Run::start(command);
    let _its_input = holder.take_stdin();
    until("the tool has the lock", async || {
        locks.inspect("k").await.unwrap().holder.is_some()
    })
    .await;
    holder.kill();
    let started = Instant::now();
    let guard = lock(&locks, "k").await;
    let waited = started.elapsed();
    // Etcd looks for leases that ran out twice a second, and the machine may be busy.
    assert!(waited < LEASE_MIN + Duration::from_secs(3), "{waited:?}");
    guard.release().await.unwrap();
    until_nothing_is_left(&etcd).await;
}

#[test]
fn patience_is_longer_than_what_is_waited_for_here() {
    assert!(PATIENCE > STORE_TIMEOUT + LEASE_MIN);
}
