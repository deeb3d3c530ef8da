//! The cost of locks in etcd, as counted by etcd.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_costs_few_requests() {
    const LOCKS: u64 = 50;
    let etcd = Etcd::start().await;
    // Renewals are transactions as well and would be counted. With this TTL none is due.
    let locks = builder(&etcd).ttl(PATIENCE * 100).connect().await.unwrap();
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
async fn cost_of_a_hand_off_is_independent_of_the_number_of_waiters() {
    let etcd = Etcd::start().await;
    // As above, no renewal is due.
    let manager = || builder(&etcd).ttl(PATIENCE * 100).connect();
    let holder = manager().await.unwrap();
    for waiters in [2, 8] {
        let guard = lock(&holder, "k").await;
        let mut tasks = Vec::new();
        let released = Arc::new(parking_lot::Mutex::new(Instant::now()));
        for number in 0..waiters {
            let (locks, released) = (manager().await.unwrap(), Arc::clone(&released));
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
        // A release and an acquire for each waiter, and the first release.
        assert_eq!(sent, 2 * waiters + 1);
        println!("p50 of a hand-off with {waiters} waiting {:?}", p50(&mut waited));
        until_nothing_is_left(&etcd).await;
    }
}

fn p50(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}
