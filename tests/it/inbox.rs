//! The subscription on which a manager receives grants.

use std::time::{Duration, Instant};

use support::RedisServer;
use support::proxy::Proxy;
use support_locks::{hand_off, until};

/// Commands are answered but published messages never arrive. The waiter would only notice the free
/// lock when it asks every ten seconds, forever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silent_inbox_is_resubscribed() {
    let server = RedisServer::start();
    let proxy = Proxy::start(server.address());
    let holder = support_locks::connect(&server.url()).await;
    let waiter = support_locks::connect(&proxy.url()).await;
    let before = server.subscribers();
    assert_eq!(before.len(), 2);
    proxy.silence();
    until("the inbox is subscribed again", async || {
        let now = server.subscribers();
        now.len() == 2 && now != before
    })
    .await;
    // On the connection that the hand-off uses; inspecting uses another one.
    until("locks can be acquired again", async || {
        match waiter.try_lock("k").await {
            Ok(Some(guard)) => guard.release().await.is_ok(),
            _ => false,
        }
    })
    .await;
    let started = Instant::now();
    hand_off(&holder, &waiter, "k").await;
    assert!(started.elapsed() < Duration::from_secs(8), "{:?}", started.elapsed());
}

/// Whether a grant would reach a manager that waits is checked once a second on each connection. To
/// check it for each waiter would cost each hand-off a call.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inbox_is_checked_once_a_second_and_not_for_each_waiter() {
    const HAND_OFFS: u64 = 30;
    let server = RedisServer::start();
    let holder = support_locks::connect(&server.url()).await;
    let waiter = support_locks::connect(&server.url()).await;
    hand_off(&holder, &waiter, "k").await;
    let (started, before) = (Instant::now(), server.calls("pubsub"));
    for _ in 0..HAND_OFFS {
        hand_off(&holder, &waiter, "k").await;
    }
    let seconds = started.elapsed().as_secs();
    let checked = server.calls("pubsub") - before;
    // Each grant is checked, always: see the tests of inboxes at a replica.
    assert!(checked >= HAND_OFFS, "{checked}");
    // On a busy machine, the check after a connect may fall into this period as well.
    assert!(checked <= HAND_OFFS + seconds + 8, "{checked} in {seconds} s");
}
