//! `min_replicas_acked`: a lease only counts once this many replicas have it.

use std::collections::HashSet;
use std::future::IntoFuture;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use shardlock::config::Builder;
use shardlock::error::LockErrorKind;
use shardlock::{LockManager, LossReason};
use support::proxy::Proxy;
use support::sentinel::{DOWN_AFTER, in_step};
use support::{ClientType, RedisServer};
use support_locks::{hand_off, lock, lock_in_time, lock_keys, soon, until, until_queued, waiting};

use crate::sentinel::start;

/// Long enough that no test waits for its end by mistake.
const LONG_TTL: Duration = Duration::from_secs(60);

/// The wait for replicas takes nearly as long. The server checks for expired waits ten times a
/// second, so this leaves room for that and for a slow machine.
const STORE_TIMEOUT: Duration = Duration::from_secs(3);

fn confirmed(url: &str) -> Builder {
    let builder = LockManager::builder().shard(url).store_timeout(STORE_TIMEOUT);
    builder.min_replicas_acked(1)
}

async fn connect_confirmed(url: &str) -> LockManager {
    confirmed(url).connect().await.expect("connect")
}

/// Requests this key until the error counts the replicas, which it only does if the answer comes
/// before the store timeout. The manager's next waits for replicas are short.
async fn until_unconfirmed(locks: &LockManager, key: &str) {
    until("the error counts the replicas", async || {
        let error = locks.lock(key).fail_fast().await.expect_err("no replica has the lease");
        assert!(
            (error.kind(), error.step()) == (LockErrorKind::Unavailable, Some("acquire")),
            "{error}"
        );
        assert!(error.is_retryable(), "{error}");
        let parts = ["only 0 of 1 replicas confirmed", "min_replicas_acked = 1"];
        parts.iter().all(|part| error.to_string().contains(part))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_too_few_replicas_nothing_is_locked_and_nothing_is_left() {
    let primary = RedisServer::start_with(&["--repl-diskless-sync-delay", "0"]);
    let locks = connect_confirmed(&primary.url()).await;
    let no_replica = async |key: &str| {
        until_unconfirmed(&locks, key).await;
        until("nothing is left", async || lock_keys(&primary).is_empty()).await;
    };
    // Once by the fast path, and once by script, because the key is then known to be contended.
    no_replica("k").await;
    let error = locks.try_lock("k").await.expect_err("no replica has the lease");
    assert!(error.to_string().contains("only 0 of 1"), "{error}");
    until("nothing is left", async || lock_keys(&primary).is_empty()).await;

    let port = primary.port().to_string();
    let replica = RedisServer::start_with(&["--replicaof", "127.0.0.1", &port]);
    until("the replica is in sync", async || in_step(&primary) == 1).await;
    // Waits for replicas are short until the first one that succeeds.
    lock_in_time(&locks, "k").await;
    for key in ["k", "j", "k"] {
        let waited = primary.calls("wait");
        let guard = lock(&locks, key).await;
        assert!(primary.calls("wait") > waited);
        assert_eq!(
            lock_keys(&replica),
            [format!("lock:{key}")],
            "the lease is already on the replica"
        );
        guard.release().await.expect("release");
    }
    // A wait for the replica does not delay the reply to another manager that the key is held.
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
async fn handed_off_lock_is_on_the_replica_before_it_is_granted() {
    let watched = start(1);
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
    // If the replica does not answer, the next waiter gets an error instead of the lock.
    let guard = lock(&one, "k").await;
    let waiting = tokio::spawn(other.lock("k").fail_fast().into_future());
    until_queued(&one, "k", 1).await;
    replica.stop();
    until_unconfirmed(&other, "j").await;
    guard.release().await.expect("a release does not wait for replicas");
    let error = soon("the error", waiting)
        .await
        .expect("a task")
        .expect_err("no replica");
    assert!(error.to_string().contains("only 0 of 1 replicas"), "{error}");
    until("nothing is left", async || lock_keys(primary).is_empty()).await;
    replica.cont();
}

/// A manager whose turn has ended rejoins the queue with its release request. If no other waiter is
/// left, the reply returns the lock to that manager.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_that_comes_back_to_its_own_process_is_confirmed_as_well() {
    let watched = start(1);
    let url = watched.url();
    let one = confirmed(&url).max_burst(1).connect().await.expect("connect");
    let other = connect_confirmed(&url).await;
    let (primary, replica) = (watched.primary(), watched.replicas()[0]);
    for is_up in [true, false] {
        let guard = lock(&one, "k").await;
        let rival = waiting(&other, "k");
        until_queued(&one, "k", 1).await;
        let mine = tokio::spawn(one.lock("k").fail_fast().into_future());
        rival.abort();
        until_queued(&one, "k", 0).await;
        if !is_up {
            replica.stop();
            until_unconfirmed(&one, "j").await;
        }
        guard.release().await.expect("a release does not wait for replicas");
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
    let watched = start(1);
    let locks = confirmed(&watched.url())
        .ttl(LONG_TTL)
        .connect()
        .await
        .expect("connect");
    let old = watched.primary();
    let guard = lock(&locks, "k").await;
    watched.consider_down_after(DOWN_AFTER);
    old.kill();
    let new = watched.switched(old.port());
    let owner: String = new.query(&["GET", "lock:k"]);
    assert!(owner.starts_with(locks.id()), "{owner}");
    let other = support_locks::connect(&watched.url()).await;
    assert!(other.try_lock("k").await.expect("try").is_none());
    assert!(guard.is_valid());
    guard.release().await.expect("the lock is held on the new primary");
    lock(&other, "k").await.release().await.expect("release");
}

/// A promoted replica that does not know of the renewals would let the lease expire and give
/// another manager the lock while the holder still relies on it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_whose_renewals_no_replica_confirms_is_lost_in_time() {
    let watched = start(1);
    let ttl = Duration::from_millis(2_500);
    let locks = confirmed(&watched.url()).ttl(ttl).connect().await.expect("connect");
    let guard = lock(&locks, "k").await;
    // Without a renewal, the lease would end before that.
    let lost = tokio::time::timeout(ttl, guard.lost()).await;
    assert!(lost.is_err() && guard.is_valid(), "renewals are confirmed");
    watched.cut_replication();
    let cut = Instant::now();
    assert_eq!(soon("the loss", guard.lost()).await, LossReason::Expired);
    assert!(cut.elapsed() < 2 * ttl, "{:?}", cut.elapsed());
}

/// Many turns of several managers, without overlapping holders and without duplicate tokens.
struct Turns {
    taken: AtomicBool,
    tokens: Mutex<HashSet<u64>>,
}

impl Turns {
    const OF_EACH: usize = 12;

    async fn take(self: Arc<Self>, locks: LockManager) {
        for _ in 0..Self::OF_EACH {
            let guard = lock(&locks, "k").await;
            assert!(!self.taken.swap(true, Ordering::SeqCst), "two holders");
            assert!(
                self.tokens.lock().insert(guard.token().get()),
                "a token was issued twice"
            );
            tokio::time::sleep(Duration::from_millis(2)).await;
            assert!(guard.is_valid());
            self.taken.store(false, Ordering::SeqCst);
            guard.release().await.expect("release");
        }
    }
}

/// Regression: messages published on a primary also reach subscribers of its replicas, but PUBLISH
/// does not count them. After a switch-over behind one address, a manager whose inbox was still
/// connected to the old primary was granted the lock and skipped at the same time. The next manager
/// also got the lock, with the same token.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn manager_whose_inbox_is_at_a_replica_is_served_exclusively() {
    let primary = RedisServer::start_with(&["--repl-diskless-sync-delay", "0"]);
    let port = primary.port().to_string();
    let replica = RedisServer::start_with(&["--replicaof", "127.0.0.1", &port]);
    until("the replica is in sync", async || in_step(&primary) == 1).await;
    let address = Proxy::start(primary.address());
    let connect = async |url: String| support_locks::connect(&url).await;
    let misled = connect(address.url()).await;
    let others = [connect(primary.url()).await, connect(primary.url()).await];

    address.lead_to(replica.address());
    primary.client_kill(ClientType::PubSub);
    until("its inbox is at the replica", async || replica.channels().len() == 1).await;
    until("the others are subscribed again", async || {
        primary.channels().len() == 2
    })
    .await;

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
    // Waiters receive the grant by push and do not need to ask again.
    for (from, to) in [(&others[0], &misled), (&misled, &others[0])] {
        hand_off(from, to, "k").await;
    }
}

/// After a planned switch-over behind one address, all connections to the old primary move to the
/// new one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_follow_an_address_that_leads_to_another_primary() {
    let old = RedisServer::start_with(&["--repl-diskless-sync-delay", "0"]);
    let port = old.port().to_string();
    let new = RedisServer::start_with(&["--replicaof", "127.0.0.1", &port, "--repl-diskless-sync-delay", "0"]);
    until("the replica is in sync", async || in_step(&old) == 1).await;
    let address = Proxy::start(old.address());
    let managers = [
        support_locks::connect(&address.url()).await,
        support_locks::connect(&address.url()).await,
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
