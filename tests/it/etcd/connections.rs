//! Connections whose state a device on the path has lost, so that neither side notices that they
//! are dead.

use support::proxy::Proxy;

use super::*;

/// TTL of the leases, long enough that one renewal may fail, on a busy machine as well.
const TTL: Duration = Duration::from_secs(6);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lock_outlives_connections_that_fall_silent() {
    let etcd = Etcd::start().await;
    let proxy = Proxy::start(etcd.place(0));
    let behind = LockManager::builder()
        .shard(format!("etcd://{}", proxy.address()))
        .ttl(TTL)
        .store_timeout(STORE_TIMEOUT);
    let behind = behind.connect().await.unwrap();
    for round in 0..2 {
        let guard = lock(&behind, "held").await;
        proxy.silence();
        // Without a renewal on a new connection, the lease would end before that.
        let lost = tokio::time::timeout(TTL, guard.lost()).await;
        assert!(lost.is_err() && guard.is_valid(), "round {round}: {lost:?}");
        guard.release().await.unwrap();
    }
    until_nothing_is_left(&etcd).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waiter_keeps_its_place_and_gets_its_turn_when_connections_fall_silent() {
    let etcd = Etcd::start().await;
    let proxy = Proxy::start(etcd.place(0));
    // A silent connection is left after a part of this time.
    let behind = LockManager::builder()
        .shard(format!("etcd://{}", proxy.address()))
        .ttl(TTL)
        .store_timeout(STORE_TIMEOUT * 2 / 3);
    let behind = behind.connect().await.unwrap();
    let (direct, last) = (manager(&etcd).await, manager(&etcd).await);
    let guard = lock(&direct, "k").await;
    let wait = |locks: &LockManager| {
        let locks = locks.clone();
        tokio::spawn(async move { lock(&locks, "k").await })
    };
    let second = wait(&behind);
    until_queued(&direct, "k", 1).await;
    let third = wait(&last);
    until_queued(&direct, "k", 2).await;
    let order = direct.inspect("k").await.unwrap().queue;
    proxy.silence();
    // Etcd ends a lease up to a second and a half late.
    tokio::time::sleep(TTL + Duration::from_secs(2)).await;
    assert_eq!(
        direct.inspect("k").await.unwrap().queue,
        order,
        "no waiter has lost its place"
    );

    // By now the watch also uses another connection.
    proxy.silence();
    let released = Instant::now();
    guard.release().await.unwrap();
    let guard = soon("the second's turn", second).await.unwrap();
    assert!(!third.is_finished());
    assert!(released.elapsed() < STORE_TIMEOUT, "{:?}", released.elapsed());
    guard.release().await.unwrap();
    soon("the third's turn", third).await.unwrap().release().await.unwrap();
    lock(&behind, "other").await.release().await.unwrap();
    until_nothing_is_left(&etcd).await;
}
