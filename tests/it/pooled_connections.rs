//! The pooled connections of inspections: how many, how long, and what they survive.

use std::time::{Duration, Instant};

use shardlock::error::LockErrorKind;
use shardlock::{LockManager, namespace};
use support::filter::{Filter, Verdict};
use support::proxy::Proxy;
#[cfg(feature = "tls")]
use support::tls::{Authority, TlsServer};
use support::wait::PATIENCE;
use support::{ClientType, Cluster, RedisServer};
use support_locks::{Kind, Measured, TestStore, lock, on_each_store, soon, until, until_queued, waiting};
use tokio::task::JoinSet;

use crate::connections::named;

/// The largest number of pooled connections that a manager opens to a server.
const POOL_MAX: usize = 4;

/// The pooled connections of a manager to these servers.
fn pooled(nodes: &[&RedisServer], locks: &LockManager) -> usize {
    let purpose = format!(":{}:pool", locks.id());
    nodes.iter().map(|node| named(node, &purpose).len()).sum()
}

/// Whether a node of a quorum has not answered in time: each has only a quarter of a second.
fn has_lacked_an_answer(manager: &Measured) -> bool {
    manager.sum("shardlock_quorum_votes_total", "outcome=\"unanswered\"") > 0.0
}

on_each_store! {
    on(redis_nodes, own);

    async fn locks_open_no_pooled_connection(store: &TestStore) {
        // A probe without an answer is repeated on a pooled connection.
        let patient = || Measured::connect(store.builder().store_timeout(PATIENCE));
        let (first, second) = (patient().await, patient().await);
        let (one, other) = (&first.locks, &second.locks);
        let watcher = store.manager().await;
        for (from, to) in [(one, other), (other, one)] {
            let guard = lock(from, "k").await;
            let waiting = waiting(to, "k");
            until_queued(&watcher, "k", 1).await;
            guard.release().await.expect("release");
            soon("the hand-off", waiting).await.expect("a task").release().await.expect("release");
        }
        // The holder renews its lease while the other one waits, which is checked every few
        // seconds, as both managers probe the servers.
        let guard = lock(one, "k").await;
        let waiting = waiting(other, "k");
        until_queued(&watcher, "k", 1).await;
        let nodes = store.servers().nodes();
        let calls = |name: &str| -> u64 {
            let calls = nodes.iter().map(|node| node.commands().get(name).copied().unwrap_or(0));
            calls.sum()
        };
        let before = calls("zcard");
        until("the waiting key is checked", async || calls("zcard") > before).await;
        guard.release().await.expect("the lock was held throughout");
        soon("the hand-off", waiting).await.expect("a task").release().await.expect("release");
        for Measured { locks, .. } in [&first, &second].into_iter().filter(|manager| !has_lacked_an_answer(manager)) {
            assert_eq!(pooled(&nodes, locks), 0);
        }
        // Only the inspecting manager has one.
        assert!(pooled(&nodes, &watcher) >= 1);
    }

    async fn concurrent_inspections_share_few_connections_which_are_closed_when_idle(store: &TestStore) {
        let locks = store.manager().await;
        let guard = lock(&locks, "k").await;
        let nodes = store.servers().nodes();
        let mut inspections = JoinSet::new();
        for _ in 0..200 {
            let locks = locks.clone();
            inspections.spawn(async move { locks.inspect("k").await.expect("inspect").holder });
        }
        let (mut done, mut seen) = (0, 0);
        while let Some(inspected) = soon("the inspections", inspections.join_next()).await {
            let holder = inspected.expect("a task").expect("a holder");
            assert_eq!(holder.owner, guard.owner());
            if done % 20 == 0 {
                seen = seen.max(pooled(&nodes, &locks));
            }
            done += 1;
        }
        assert!((1..=POOL_MAX * nodes.len()).contains(&seen), "{seen} connections");
        until("idle connections are closed", async || pooled(&nodes, &locks) == 0).await;
        locks.inspect("k").await.expect("on a new connection");
        guard.release().await.expect("release");
    }

    async fn inspections_and_erasing_survive_the_loss_of_all_connections(store: &TestStore) {
        // A quorum waits for a majority for less than half of the store timeout, and its nodes are
        // down after a cut until their next probe.
        let builder = store.builder().store_timeout(PATIENCE);
        let locks = builder.connect().await.expect("connect");
        for round in 0..10 {
            lock(&locks, "k").await.release().await.expect("release");
            if round % 2 == 0 {
                // Connections that are idle in the pool are lost, too.
                locks.inspect("k").await.expect("inspect");
            }
            store.servers().cut(ClientType::Normal);
            locks.inspect("k").await.expect("on a new connection");
            store.servers().cut(ClientType::Normal);
            if store.kind() == Kind::Redlock {
                // Its nodes are down until their next probe, and no node is left out.
                until("the namespace is erased", async || namespace::erase(&locks).await.is_ok()).await;
            } else {
                namespace::erase(&locks).await.expect("on a new connection");
            }
            assert_eq!(store.lock_keys(), [""; 0]);
        }
    }
}

/// A device on the path has lost the connections' state, and neither side is notified.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inspections_and_erasing_work_while_all_earlier_connections_are_silent() {
    let (server, cluster) = (RedisServer::start(), Cluster::start(1, 0));
    let node = &cluster.nodes()[0];
    let proxies = [server.address(), node.address()].map(Proxy::start);
    // The slot map leads through the proxy as well.
    let port = proxies[1].port().to_string();
    node.command(&["CONFIG", "SET", "cluster-announce-port", &port]);
    let urls = [proxies[0].url(), format!("redis+cluster://{}", proxies[1].address())];
    for (url, proxy) in urls.iter().zip(&proxies) {
        // The check of a silent connection takes an eighth of it, and those of all four would take
        // half of it.
        let limit = Duration::from_secs(6);
        let builder = LockManager::builder().shard(url).store_timeout(limit);
        let locks = builder.connect().await.expect("connect");
        let guard = lock(&locks, "k").await;
        for _ in 0..2 {
            // Leaves several connections in the pool.
            let inspections: JoinSet<_> = (0..20)
                .map(|_| {
                    let locks = locks.clone();
                    async move { locks.inspect("k").await.expect("inspect") }
                })
                .collect();
            soon("the inspections", inspections.join_all()).await;
            proxy.silence();
            let started = Instant::now();
            let seen = locks.inspect("k").await.expect("on a new connection");
            assert_eq!(seen.holder.expect("a holder").owner, guard.owner());
            assert!(started.elapsed() < limit / 2, "{:?}", started.elapsed());
        }
        drop(guard);
        proxy.silence();
        let started = Instant::now();
        assert!(namespace::erase(&locks).await.expect("on a new connection") >= 1);
        assert!(started.elapsed() < limit / 2, "{:?}", started.elapsed());
    }
}

/// A dead connection is not a dead server.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silent_connection_of_an_idle_manager_is_replaced_and_its_shard_stays_up() {
    let server = RedisServer::start();
    let proxy = Proxy::start(server.address());
    // A busy server has a third of it for its answer on another connection.
    let builder = LockManager::builder()
        .shard(proxy.url())
        .store_timeout(Duration::from_secs(3));
    let measured = Measured::connect(builder).await;
    let purpose = format!(":{}:renewals", measured.locks.id());
    let before = named(&server, &purpose);
    assert_eq!(before.len(), 1);
    proxy.silence();
    until("the connection is replaced", async || {
        assert_eq!(measured.value("shardlock_shard_up"), 1.0);
        let now = named(&server, &purpose);
        now.len() == 1 && now != before
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inspections_work_on_a_server_that_takes_no_more_connections() {
    let server = RedisServer::start();
    let locks = support_locks::connect(&server.url()).await;
    let guard = lock(&locks, "k").await;
    server.command(&["CONFIG", "SET", "maxclients", "1"]);
    let seen = locks.inspect("k").await.expect("on a kept connection");
    assert_eq!(seen.holder.expect("a holder").owner, guard.owner());
    guard.release().await.expect("release");
}

/// An inspection from a runtime that then ends must not leave its connection without a driver.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pooled_connections_outlive_the_runtime_of_their_first_user() {
    let server = RedisServer::start_with(&["--requirepass", "s3cret"]);
    let url = format!("redis://:s3cret@{}/3", server.address());
    // A pooled connection that gives no answer for an eighth of it is not reused.
    let builder = LockManager::builder().shard(url).store_timeout(PATIENCE);
    let locks = builder.connect().await.expect("connect");
    let once = {
        let locks = locks.clone();
        move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime
                .expect("a runtime")
                .block_on(locks.inspect("k"))
                .expect("inspect");
        }
    };
    tokio::task::spawn_blocking(once).await.expect("a thread");
    let first = named(&server, ":pool");
    assert_eq!(first.len(), 1);
    locks.inspect("k").await.expect("inspect");
    assert_eq!(named(&server, ":pool"), first, "the connection is reused");
    let list: String = server.query(&["CLIENT", "LIST"]);
    let client = list
        .lines()
        .find(|client| client.contains(":pool "))
        .expect("a connection");
    assert!(client.contains(" db=3 "), "{client}");
}

#[cfg(feature = "tls")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pooled_connections_are_encrypted_like_all_others() {
    let authority = Authority::create();
    let identity = authority.issue("server", &["localhost"]);
    let tls = TlsServer::start(&authority, &identity, false, &[]);
    let builder = LockManager::builder()
        .shard(tls.url("localhost"))
        .tls_ca(authority.ca());
    let locks = builder
        .store_timeout(support_locks::STORE_TIMEOUT)
        .connect()
        .await
        .expect("connect");
    locks.inspect("k").await.expect("inspect");
    assert_eq!(named(&tls.server, ":pool").len(), 1);
}

/// Regression: it waited for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn erasing_ends_when_the_server_stops_answering() {
    let (server, cluster) = (RedisServer::start(), Cluster::start(1, 0));
    let node = &cluster.nodes()[0];
    for (scheme, address) in [("redis", server.address()), ("redis+cluster", node.address())] {
        // The search for keys has no answer until the test is over.
        let (over, is_over) = std::sync::mpsc::channel::<()>();
        let is_over = parking_lot::Mutex::new(is_over);
        let proxy = Filter::start(address, move |words| match words[0].eq_ignore_ascii_case(b"SCAN") {
            true => {
                is_over.lock().recv().ok();
                Verdict::HangUp
            }
            false => Verdict::Pass,
        });
        if scheme == "redis+cluster" {
            let port = proxy.address().rsplit_once(':').expect("a port").1.to_owned();
            node.command(&["CONFIG", "SET", "cluster-announce-port", &port]);
        }
        let builder = LockManager::builder().shard(format!("{scheme}://{}", proxy.address()));
        let locks = builder
            .store_timeout(Duration::from_secs(2))
            .connect()
            .await
            .expect("connect");
        let error = soon("the end", namespace::erase(&locks)).await.expect_err("no answer");
        assert_eq!(
            (error.kind(), error.step()),
            (LockErrorKind::Unavailable, Some("erase")),
            "{error}"
        );
        drop(over);
    }
}
