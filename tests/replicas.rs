//! `min_replicas_acked`: a lease counts once so many replicas have it.

// A test is over when its surroundings fail.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

mod support;
mod support_locks;

use std::collections::HashSet;
use std::future::IntoFuture;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use shardlock::{Builder, LockError, LockManager, LossReason};
use support::proxy::Proxy;
use support::sentinel::{Watched, in_step};
use support::{ClientType, RedisServer};
use support_locks::{hand_off, lock, lock_in_time, lock_keys, soon, until, until_queued, waiting};

/// Long enough that no test waits for its end by mistake.
const LONG_TTL: Duration = Duration::from_secs(60);

/// Replicas are waited for nearly as long, and the server looks at what is over ten times a second: there is room for that, and for a machine
/// that is slow.
const STORE_TIMEOUT: Duration = Duration::from_secs(2);

fn confirmed(url: &str) -> Builder {
    let builder = LockManager::builder().shard(url).store_timeout(STORE_TIMEOUT);
    builder.min_replicas_acked(1)
}

async fn connect_confirmed(url: &str) -> LockManager {
    confirmed(url).connect().await.expect("connect")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_too_few_replicas_nothing_is_locked_and_nothing_is_left() {
    let primary = RedisServer::start_with(&["--repl-diskless-sync-delay", "0"]);
    let locks = connect_confirmed(&primary.url()).await;
    let no_replica = async |key: &str| {
        let started = Instant::now();
        let error = locks.lock(key).fail_fast().await.expect_err("no replica has it");
        assert!(
            matches!(error, LockError::Unavailable { step: "acquire", .. }),
            "{error}"
        );
        assert!(error.is_retryable(), "{error}");
        for part in ["only 0 of 1 replicas confirmed", "min_replicas_acked = 1"] {
            assert!(error.to_string().contains(part), "{error}");
        }
        assert!(started.elapsed() < STORE_TIMEOUT, "{:?}", started.elapsed());
        until("nothing is left", async || lock_keys(&primary).is_empty()).await;
    };
    // By the free path, and by script, since the key is known to be wanted by others then.
    no_replica("k").await;
    let error = locks.try_lock("k").await.expect_err("no replica has it");
    assert!(error.to_string().contains("only 0 of 1"), "{error}");
    until("nothing is left", async || lock_keys(&primary).is_empty()).await;

    let port = primary.port().to_string();
    let replica = RedisServer::start_with(&["--replicaof", "127.0.0.1", &port]);
    until("the replica is in step", async || in_step(&primary) == 1).await;
    // Waits are short until the first that is not in vain.
    lock_in_time(&locks, "k").await;
    for key in ["k", "j", "k"] {
        let waited = primary.calls("wait");
        let guard = lock(&locks, key).await;
        assert!(primary.calls("wait") > waited);
        assert_eq!(
            lock_keys(&replica),
            [format!("lock:{key}")],
            "it is on the replica already"
        );
        guard.release().await.expect("release");
    }
    // A wait for the replica does not keep others from the answer that a key is held.
    let other = connect_confirmed(&primary.url()).await;
    let guard = lock(&locks, "k").await;
    assert!(other.try_lock("k").await.expect("try").is_none());
    guard.release().await.expect("release");

    replica.stop();
    no_replica("k").await;
    no_replica("j").await;
    replica.cont();
    until("the replica answers again", async || locks.lock("k").await.is_ok()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_that_was_handed_over_is_on_the_replica_before_it_is_entered() {
    let watched = Watched::start(1);
    let url = watched.url();
    let (one, other) = (connect_confirmed(&url).await, connect_confirmed(&url).await);
    let (primary, replica) = (watched.primary(), watched.replicas()[0]);
    for _ in 0..10 {
        let guard = lock(&one, "k").await;
        let waiting = waiting(&other, "k");
        until_queued(&one, "k", 1).await;
        guard.release().await.expect("release");
        let guard = soon("the hand-off", waiting).await.expect("a task");
        let owner: String = replica.query(&["GET", "lock:k"]);
        assert!(owner.starts_with(other.id()), "{owner}");
        guard.release().await.expect("release");
    }
    // Where the replica does not answer, whoever is next gets an error, not the lock.
    let guard = lock(&one, "k").await;
    let waiting = tokio::spawn(other.lock("k").into_future());
    until_queued(&one, "k", 1).await;
    replica.stop();
    guard.release().await.expect("a release waits for nobody");
    let error = soon("the error", waiting)
        .await
        .expect("a task")
        .expect_err("no replica");
    assert!(error.to_string().contains("only 0 of 1 replicas"), "{error}");
    until("nothing is left", async || lock_keys(primary).is_empty()).await;
    replica.cont();
}

/// Who has to give way joins the queue again in the request that releases; where nobody is left to give way to, its reply says that
/// it has the lock again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_that_comes_back_to_its_own_process_is_confirmed_as_well() {
    let watched = Watched::start(1);
    let url = watched.url();
    let one = confirmed(&url).max_burst(1).connect().await.expect("connect");
    let other = connect_confirmed(&url).await;
    let (primary, replica) = (watched.primary(), watched.replicas()[0]);
    for is_up in [true, false] {
        let guard = lock(&one, "k").await;
        let rival = waiting(&other, "k");
        until_queued(&one, "k", 1).await;
        let mine = tokio::spawn(one.lock("k").into_future());
        rival.abort();
        until_queued(&one, "k", 0).await;
        if !is_up {
            replica.stop();
        }
        guard.release().await.expect("a release waits for nobody");
        let outcome = soon("the outcome", mine).await.expect("a task");
        if is_up {
            let guard = outcome.expect("the replica confirms");
            assert!(replica.query::<String>(&["GET", "lock:k"]).starts_with(one.id()));
            guard.release().await.expect("release");
        } else {
            let error = outcome.expect_err("no replica");
            assert!(error.to_string().contains("only 0 of 1 replicas"), "{error}");
        }
    }
    until("nothing is left", async || lock_keys(primary).is_empty()).await;
    replica.cont();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_confirmed_lock_outlives_its_primary() {
    let watched = Watched::start(1);
    let builder = LockManager::builder().shard(watched.url()).min_replicas_acked(1);
    let locks = builder.ttl(LONG_TTL).connect().await.expect("connect");
    let old = watched.primary();
    let guard = lock(&locks, "k").await;
    old.kill();
    let new = watched.switched(old.port());
    let owner: String = new.query(&["GET", "lock:k"]);
    assert!(owner.starts_with(locks.id()), "{owner}");
    let other = LockManager::connect(&watched.url()).await.expect("connect");
    assert!(other.try_lock("k").await.expect("try").is_none());
    assert!(guard.is_valid());
    guard.release().await.expect("it is held on the new primary");
    lock(&other, "k").await.release().await.expect("release");
}

/// What a promoted replica does not know of would have run out there: somebody else would get the lock beside the holder.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_whose_renewals_no_replica_confirms_is_lost_in_time() {
    let watched = Watched::start(1);
    let ttl = Duration::from_secs(1);
    let builder = LockManager::builder().shard(watched.url()).min_replicas_acked(1);
    let locks = builder.ttl(ttl).connect().await.expect("connect");
    let guard = lock(&locks, "k").await;
    let lost = tokio::time::timeout(2 * ttl, guard.lost()).await;
    assert!(lost.is_err() && guard.is_valid(), "renewals are confirmed");
    watched.cut_replication();
    let cut = Instant::now();
    assert_eq!(soon("the loss", guard.lost()).await, LossReason::Expired);
    assert!(cut.elapsed() < ttl + Duration::from_millis(500), "{:?}", cut.elapsed());
}

/// Many turns of several managers, in which nobody may be beside another and no token may come twice.
struct Turns {
    taken: AtomicBool,
    tokens: Mutex<HashSet<u64>>,
}

impl Turns {
    const OF_EACH: usize = 12;

    async fn take(self: Arc<Self>, locks: LockManager) {
        for _ in 0..Self::OF_EACH {
            let guard = lock(&locks, "k").await;
            assert!(!self.taken.swap(true, Ordering::SeqCst), "two hold it");
            assert!(self.tokens.lock().insert(guard.token().get()), "a token came twice");
            tokio::time::sleep(Duration::from_millis(2)).await;
            assert!(guard.is_valid());
            self.taken.store(false, Ordering::SeqCst);
            guard.release().await.expect("release");
        }
    }
}

/// What is published on a primary reaches subscribers at its replicas as well, but PUBLISH does not count them. After a switch-over behind
/// one address, a manager whose inbox was still connected to the old primary was granted the lock and passed over at the same time,
/// and the next one had it too, with the same token.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn manager_whose_inbox_is_at_a_replica_is_served_and_never_beside_another() {
    let primary = RedisServer::start_with(&["--repl-diskless-sync-delay", "0"]);
    let port = primary.port().to_string();
    let replica = RedisServer::start_with(&["--replicaof", "127.0.0.1", &port]);
    until("the replica is in step", async || in_step(&primary) == 1).await;
    let address = Proxy::start(primary.address());
    let connect = async |url: String| LockManager::connect(&url).await.expect("connect");
    let misled = connect(address.url()).await;
    let others = [connect(primary.url()).await, connect(primary.url()).await];

    address.lead_to(replica.address());
    primary.client_kill(ClientType::PubSub);
    until("its inbox is elsewhere", async || replica.channels().len() == 1).await;
    until("the others listen again", async || primary.channels().len() == 2).await;

    let turns = Arc::new(Turns {
        taken: AtomicBool::new(false),
        tokens: Mutex::default(),
    });
    let tasks =
        [&misled, &misled, &others[0], &others[1]].map(|locks| tokio::spawn(Arc::clone(&turns).take(locks.clone())));
    for task in tasks {
        soon("all turns", task).await.expect("a task");
    }

    address.lead_to(primary.address());
    until("its inbox is at the primary again", async || {
        primary.channels().len() == 3
    })
    .await;
    until("and not at the replica", async || replica.channels().is_empty()).await;
    // A hand-off that takes less than it takes to ask again: there is no need to ask.
    for (from, to) in [(&others[0], &misled), (&misled, &others[0])] {
        hand_off(from, to, "k").await;
    }
}

/// After a planned switch-over behind one address, all that was connected to the old primary moves to the new one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_follow_an_address_that_leads_to_another_primary() {
    let old = RedisServer::start_with(&["--repl-diskless-sync-delay", "0"]);
    let port = old.port().to_string();
    let new = RedisServer::start_with(&["--replicaof", "127.0.0.1", &port, "--repl-diskless-sync-delay", "0"]);
    until("the replica is in step", async || in_step(&old) == 1).await;
    let address = Proxy::start(old.address());
    let managers = [
        LockManager::connect(&address.url()).await.expect("connect"),
        LockManager::connect(&address.url()).await.expect("connect"),
    ];
    hand_off(&managers[0], &managers[1], "k").await;

    new.command(&["REPLICAOF", "NO", "ONE"]);
    address.lead_to(new.address());
    let port = new.port().to_string();
    old.command(&["REPLICAOF", "127.0.0.1", &port]);
    until("the old primary is a replica", async || in_step(&new) == 1).await;

    let turns = Arc::new(Turns {
        taken: AtomicBool::new(false),
        tokens: Mutex::default(),
    });
    let tasks =
        [&managers[0], &managers[1], &managers[0]].map(|locks| tokio::spawn(Arc::clone(&turns).take(locks.clone())));
    for task in tasks {
        soon("all turns", task).await.expect("a task");
    }
    until("the inboxes are at the new primary", async || new.channels().len() == 2).await;
    until("and not at the old one", async || old.channels().is_empty()).await;
    hand_off(&managers[0], &managers[1], "k").await;
}
