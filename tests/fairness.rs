//! How a lock is shared between processes that have many tasks each.

// What fails here ends the run.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use shardlock::LockManager;

mod support;

use support::RedisServer;

/// Runs two managers with several tasks each on one key, and returns who held it, in order.
async fn holders_in_order(server: &RedisServer, max_burst: u32, rounds: usize) -> Vec<usize> {
    let order = Arc::new(Mutex::new(Vec::new()));
    let left = Arc::new(AtomicUsize::new(rounds));
    // A slice that never ends before the burst.
    let builder = || {
        LockManager::builder()
            .shard(server.url())
            .max_burst(max_burst)
            .max_slice(Duration::from_secs(10))
    };
    let managers = [builder().connect().await.unwrap(), builder().connect().await.unwrap()];
    let guard = managers[0].lock("k").await.unwrap();
    let mut tasks = Vec::new();
    for (process, locks) in managers.iter().enumerate() {
        for _ in 0..4 {
            let (locks, order, left) = (locks.clone(), Arc::clone(&order), Arc::clone(&left));
            tasks.push(tokio::spawn(async move {
                while left
                    .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1))
                    .is_ok()
                {
                    let guard = locks.lock("k").await.unwrap();
                    order.lock().push(process);
                    guard.release().await.unwrap();
                }
            }));
        }
    }
    support::eventually("the other process waits", support::PATIENCE, || {
        server.query::<u64>(&["ZCARD", "{lock:k}:q"]) == 1
    })
    .await;
    guard.release().await.unwrap();
    for task in tasks {
        task.await.unwrap();
    }
    Arc::into_inner(order).unwrap().into_inner()
}

/// The lengths of the runs in which one process had the lock, without those at the beginning, before the processes know of one
/// another, and at the end, when one of them has nothing left to do.
fn runs(order: &[usize]) -> Vec<usize> {
    let runs: Vec<usize> = order.chunk_by(|one, next| one == next).map(<[usize]>::len).collect();
    runs[2.min(runs.len())..runs.len().saturating_sub(2).max(2.min(runs.len()))].to_vec()
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_burst_of_one_processes_alternate_strictly() {
    let server = RedisServer::start();
    let order = holders_in_order(&server, 1, 200).await;
    let runs = runs(&order);
    assert!(runs.len() > 100, "{order:?}");
    assert!(runs.iter().all(|&length| length == 1), "{runs:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_process_has_the_lock_longer_than_its_burst_while_another_waits() {
    let server = RedisServer::start();
    let order = holders_in_order(&server, 5, 500).await;
    let runs = runs(&order);
    assert!(runs.len() > 50, "{order:?}");
    assert!(runs.iter().all(|&length| length <= 5), "{runs:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slice_ends_the_turn_even_if_the_burst_does_not() {
    let server = RedisServer::start();
    let connect = || {
        LockManager::builder()
            .shard(server.url())
            .max_burst(1_000_000)
            .max_slice(Duration::ZERO)
            .connect()
    };
    let (ours, theirs) = (connect().await.unwrap(), connect().await.unwrap());
    let guard = ours.lock("k").await.unwrap();
    let theirs = tokio::spawn(theirs.lock("k").into_future());
    support::eventually("the other process waits", support::PATIENCE, || {
        server.query::<u64>(&["ZCARD", "{lock:k}:q"]) == 1
    })
    .await;
    let second = tokio::spawn(ours.lock("k").into_future());
    let first_token = guard.token();
    guard.release().await.unwrap();
    let theirs = theirs.await.unwrap().unwrap();
    assert!(!second.is_finished());
    let their_token = theirs.token();
    theirs.release().await.unwrap();
    let second = second.await.unwrap().unwrap();
    assert!(first_token < their_token && their_token < second.token());
}
