//! Writers and readers of few keys while nodes hang, die and restart.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use shardlock::{LockGuard, LockMode};
use support::Quorum;
use support_locks::soon;
use tokio::task::JoinSet;

use super::{connect, nothing_is_left};

/// The holders and the tokens of each key.
#[derive(Default)]
struct Ledger {
    inside: Mutex<HashMap<String, Inside>>,
    overlaps: AtomicU64,
    regressions: AtomicU64,
    /// Exclusive and shared locks.
    served: [AtomicU64; 2],
}

/// Who holds a key, and who has held it.
#[derive(Default)]
struct Inside {
    writers: u32,
    readers: u32,
    last_written: u64,
    largest: u64,
    /// The tokens of readers since the last writer.
    read: HashSet<u64>,
}

impl Ledger {
    fn enter(&self, guard: &LockGuard) {
        let (token, is_shared) = (guard.token().get(), guard.mode() == LockMode::Shared);
        let mut inside = self.inside.lock().expect("no panic");
        let key = inside.entry(guard.key().to_owned()).or_default();
        let (is_beside, is_old) = match is_shared {
            true => (key.writers > 0, token <= key.last_written || !key.read.insert(token)),
            false => (key.writers + key.readers > 0, token <= key.largest),
        };
        self.overlaps.fetch_add(u64::from(is_beside), Ordering::Relaxed);
        self.regressions.fetch_add(u64::from(is_old), Ordering::Relaxed);
        key.largest = key.largest.max(token);
        if is_shared {
            key.readers += 1;
        } else {
            key.writers += 1;
            key.last_written = token;
            key.read.clear();
        }
    }

    fn leave(&self, guard: &LockGuard) {
        let is_shared = guard.mode() == LockMode::Shared;
        let mut inside = self.inside.lock().expect("no panic");
        let key = inside.get_mut(guard.key()).expect("the key has a holder");
        *(if is_shared { &mut key.readers } else { &mut key.writers }) -= 1;
        self.served[usize::from(is_shared)].fetch_add(1, Ordering::Relaxed);
    }

    fn served(&self) -> [u64; 2] {
        self.served.each_ref().map(|count| count.load(Ordering::Relaxed))
    }
}

/// Managers contend for few keys, to write and to read, while one node after the other hangs, or is
/// killed and restarts empty.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writers_exclude_others_and_tokens_grow_while_nodes_come_and_go() {
    let quorum = Arc::new(Quorum::start(5));
    let (ledger, over) = (Arc::new(Ledger::default()), Arc::new(AtomicBool::new(false)));
    // Kept until nothing is left: a manager that is dropped no longer cleans up on a node that was
    // away.
    let managers = [connect(&quorum).await, connect(&quorum).await, connect(&quorum).await];
    let mut workers = JoinSet::new();
    for (manager, locks) in managers.iter().enumerate() {
        for task in 0..4 {
            let (locks, ledger, over) = (locks.clone(), Arc::clone(&ledger), Arc::clone(&over));
            workers.spawn(async move {
                let mut turn = manager + task;
                while !over.load(Ordering::Relaxed) {
                    let key = format!("key-{}", turn % 3);
                    turn += 1;
                    let request = match turn % 2 {
                        0 => locks.lock(&key).shared(),
                        _ => locks.lock(&key),
                    };
                    let guard = match request.await {
                        Ok(guard) => guard,
                        Err(error) => {
                            assert!(error.is_retryable(), "{error}");
                            continue;
                        }
                    };
                    ledger.enter(&guard);
                    tokio::task::yield_now().await;
                    let was_valid = guard.is_valid();
                    ledger.leave(&guard);
                    // A majority that is unreachable for a moment is no reason to lose a lock.
                    assert!(was_valid, "a lock of {key} was lost within a millisecond");
                    drop(guard.release().await);
                }
            });
        }
    }
    let until = Instant::now() + Duration::from_secs(8);
    let mut node = 0;
    while Instant::now() < until {
        let served = ledger.served();
        if node % 2 == 0 {
            quorum.nodes()[node % 5].stop();
        } else {
            quorum.nodes()[node % 5].kill();
        }
        support_locks::until("locking continues in both modes", async || {
            ledger
                .served()
                .iter()
                .zip(served)
                .all(|(now, before)| *now > before + 25)
        })
        .await;
        if node % 2 == 0 {
            quorum.nodes()[node % 5].cont();
        } else {
            quorum.nodes()[node % 5].restart();
            let quorum = Arc::clone(&quorum);
            // Only one node at a time may be without a vote, besides the one that hangs next.
            tokio::task::spawn_blocking(move || quorum.wait_for_vote(node % 5))
                .await
                .expect("a thread");
        }
        node += 1;
    }
    over.store(true, Ordering::Relaxed);
    while let Some(ended) = soon("the workers", workers.join_next()).await {
        ended.expect("a worker");
    }
    let count = |number: &AtomicU64| number.load(Ordering::Relaxed);
    let [exclusive, shared] = ledger.served();
    println!("{exclusive} exclusive and {shared} shared locks while {node} nodes failed and recovered");
    assert_eq!((count(&ledger.overlaps), count(&ledger.regressions)), (0, 0));
    nothing_is_left(&quorum, |_| true).await;
}
