//! Failovers while many tasks contend for one lock.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use shardlock::{LockGuard, LockManager};
use support::PATIENCE;
use support::sentinel::in_step;
use support_locks::{hand_off, lock_keys, soon, until};
use tokio::task::JoinSet;

/// State shared by all tasks of a load.
#[derive(Default)]
struct Ledger {
    holders: AtomicU64,
    largest: Mutex<u64>,
    /// The number of locks that each task has acquired since the last reset.
    turns: Vec<AtomicU64>,
    /// Set while leases may be lost, so that two tasks may hold the lock.
    is_lenient: AtomicBool,
    is_over: AtomicBool,
}

impl Ledger {
    async fn turns(&self, least: u64) {
        for turns in &self.turns {
            turns.store(0, Ordering::SeqCst);
        }
        until("every task has had enough turns", async || {
            self.turns.iter().all(|turns| turns.load(Ordering::SeqCst) >= least)
        })
        .await;
    }

    /// One task: locks and releases until the end. Every failure must be retryable.
    async fn work(&self, task: usize, locks: &LockManager) {
        while !self.is_over.load(Ordering::SeqCst) {
            let guard = match locks.lock("k").timeout(PATIENCE).await {
                Ok(guard) => guard,
                Err(error) => {
                    assert!(error.is_retryable() && !error.is_timeout(), "{error}");
                    continue;
                }
            };
            self.hold(&guard).await;
            self.turns[task].fetch_add(1, Ordering::SeqCst);
            if let Err(error) = guard.release().await {
                assert!(error.is_retryable() || error.is_lost(), "{error}");
            }
        }
    }

    async fn hold(&self, guard: &LockGuard) {
        let others = self.holders.fetch_add(1, Ordering::SeqCst);
        let is_lenient = || self.is_lenient.load(Ordering::SeqCst);
        assert!(others == 0 || is_lenient(), "two holders");
        {
            let (token, mut largest) = (guard.token().get(), self.largest.lock());
            assert!(token > *largest || is_lenient(), "{token} after {largest}");
            *largest = token.max(*largest);
        }
        tokio::task::yield_now().await;
        assert!(guard.is_valid() || is_lenient());
        self.holders.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Two orderly failovers, there and back, while nine tasks of three managers contend for one lock.
async fn failovers_under_load(min_replicas_acked: u32) {
    const TASKS: usize = 9;
    let watched = super::start(1);
    let ledger = Arc::new(Ledger {
        turns: (0..TASKS).map(|_| AtomicU64::new(0)).collect(),
        ..Ledger::default()
    });
    let mut managers = Vec::new();
    for _ in 0..3 {
        let builder = LockManager::builder().shard(watched.url()).ttl(Duration::from_secs(3));
        let builder = builder
            .store_timeout(Duration::from_secs(2))
            .min_replicas_acked(min_replicas_acked);
        managers.push(builder.connect().await.expect("connect"));
    }
    let mut tasks = JoinSet::new();
    for task in 0..TASKS {
        let (ledger, locks) = (Arc::clone(&ledger), managers[task % 3].clone());
        tasks.spawn(async move { ledger.work(task, &locks).await });
    }
    ledger.turns(20).await;
    for _ in 0..2 {
        let old = watched.primary();
        ledger.is_lenient.store(min_replicas_acked == 0, Ordering::SeqCst);
        let new = watched.failover();
        until("the inboxes have moved", async || {
            old.channels().iter().all(|channel| !channel.starts_with("lock:in:"))
        })
        .await;
        if min_replicas_acked > 0 {
            // Nothing is confirmed until the old primary has become a replica, which would take
            // eight seconds at the default period.
            watched.publish_every(Duration::from_millis(500));
            until("the new primary has a replica", async || in_step(new) == 1).await;
        }
        // Any holder that got the lock from the old primary at the last moment has released it by
        // then.
        ledger.turns(5).await;
        ledger.is_lenient.store(false, Ordering::SeqCst);
        ledger.turns(20).await;
        watched.publish_every(Duration::from_millis(500));
        watched.has_replicas(1);
    }
    ledger.is_over.store(true, Ordering::SeqCst);
    while let Some(ended) = soon("the tasks", tasks.join_next()).await {
        ended.expect("a task");
    }
    for (locks, next) in [(0, 1), (1, 2), (2, 0)] {
        hand_off(&managers[locks], &managers[next], "after").await;
    }
    let primary = watched.primary();
    until("nothing is left", async || lock_keys(primary).is_empty()).await;
}

/// If every lease must be on the replica before it counts, an orderly failover loses none, although
/// the old primary keeps accepting writes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_confirmed_leases_a_failover_under_load_never_shows_two_holders() {
    failovers_under_load(1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failover_under_load_serves_every_waiter_with_growing_tokens() {
    failovers_under_load(0).await;
}
