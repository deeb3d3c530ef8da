//! Requests that reach the server after their manager has given them up.

use std::future::IntoFuture;
use std::time::{Duration, Instant};

use shardlock::LockManager;
use shardlock::config::Builder;
use support::proxy::Proxy;
use support::quorum::MAX_TTL;
#[cfg(feature = "tls")]
use support::tls::{Authority, TlsServer};
use support::{Cluster, PATIENCE, Quorum, RedisServer};
use support_locks::{STORE_TIMEOUT, lock, lock_keys, soon, until};
use tokio::task::JoinSet;

/// Delays acquire requests on their way, replaces their connections, lets the releases of their
/// cycles complete on the new connections, and then delivers the delayed requests.
async fn assert_late_requests_take_nothing(nodes: &[&RedisServer], proxies: &[Proxy], builder: Builder, ttl: Duration) {
    let builder = builder.ttl(ttl).store_timeout(STORE_TIMEOUT);
    let mut locks = None;
    // In a cluster, whatever its store timeout is, a manager waits for a node for a second at most.
    until("the manager is connected", async || {
        locks = builder.clone().connect().await.ok();
        locks.is_some()
    })
    .await;
    let locks = locks.expect("just seen");
    // Loads the scripts into the servers and opens all connections.
    let keys: Vec<String> = (0..20).map(|number| format!("k{number}")).collect();
    for key in &keys {
        lock(&locks, key).await.release().await.expect("release");
    }
    proxies.iter().for_each(Proxy::withhold);
    let asking: JoinSet<_> = keys
        .iter()
        .map(|key| {
            let request = locks
                .lock(key.as_str())
                .timeout(Duration::from_millis(500))
                .into_future();
            async move { drop(request.await) }
        })
        .collect();
    soon("all requests end", asking.join_all()).await;
    // Covers both kinds of cycles: those whose owner is notified of waiters, and those of contended
    // keys.
    for key in &keys {
        let mut guard = None;
        until("a new connection", async || {
            guard = locks.lock(key.as_str()).await.ok();
            guard.is_some()
        })
        .await;
        guard.expect("a guard").release().await.expect("release");
    }
    let left = || nodes.iter().flat_map(|node| lock_keys(node)).collect::<Vec<_>>();
    until("everything is released", async || left().is_empty()).await;
    // Bytes on a connection that the client has reset are gone. Any other client would keep them
    // until the network is back.
    let reset_by = Instant::now() + PATIENCE;
    while proxies.iter().any(|proxy| proxy.withheld() > 0) && Instant::now() < reset_by {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }

    let late: Vec<String> = proxies
        .iter()
        .flat_map(Proxy::deliver_late)
        .map(|late| late.to_string())
        .collect();
    until("the late requests are executed", async || {
        let known = nodes.iter().map(|node| node.query::<String>(&["CLIENT", "LIST"]));
        known
            .into_iter()
            .all(|known| !late.iter().any(|late| known.contains(late.as_str())))
    })
    .await;
    assert_eq!(left(), [""; 0], "leases and queue entries of finished cycles");
    for key in &keys {
        lock(&locks, key).await.release().await.expect("release");
    }
}

const LONG: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn late_requests_on_a_replaced_connection_take_no_lock() {
    let server = RedisServer::start();
    let proxies = [Proxy::start(server.address())];
    let builder = LockManager::builder().shard(proxies[0].url());
    assert_late_requests_take_nothing(&[&server], &proxies, builder, LONG).await;
}

#[cfg(feature = "tls")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn late_requests_on_a_replaced_encrypted_connection_take_no_lock() {
    let authority = Authority::create();
    let identity = authority.issue("server", &["localhost"]);
    let tls = TlsServer::start(&authority, &identity, false, &[]);
    let proxies = [Proxy::start(format!("127.0.0.1:{}", tls.tls_port))];
    let url = format!("rediss://localhost:{}", proxies[0].port());
    let builder = LockManager::builder().shard(url).tls_ca(authority.ca());
    assert_late_requests_take_nothing(&[&tls.server], &proxies, builder, LONG).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn late_requests_on_replaced_connections_of_a_quorum_take_no_lock() {
    let quorum = Quorum::start(3);
    let nodes: Vec<&RedisServer> = quorum.nodes().iter().collect();
    let proxies: Vec<Proxy> = nodes.iter().map(|node| Proxy::start(node.address())).collect();
    let places: Vec<String> = proxies.iter().map(Proxy::address).collect();
    let builder = LockManager::builder()
        .shard(format!("redlock://{}", places.join(",")))
        .redlock_max_ttl(MAX_TTL);
    assert_late_requests_take_nothing(&nodes, &proxies, builder, MAX_TTL).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn late_requests_on_replaced_connections_of_a_cluster_take_no_lock() {
    let cluster = Cluster::start(1, 0);
    let node = &cluster.nodes()[0];
    let proxies = [Proxy::start(node.address())];
    // The slot map leads through the proxy as well.
    let port = proxies[0].port().to_string();
    node.command(&["CONFIG", "SET", "cluster-announce-port", &port]);
    let builder = LockManager::builder().shard(format!("redis+cluster://{}", proxies[0].address()));
    assert_late_requests_take_nothing(&[node], &proxies, builder, LONG).await;
}

/// Simulates a late acquire of a finished cycle.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lease_without_a_holder_is_released_when_the_key_is_requested() {
    let server = RedisServer::start();
    let (locks, others) = (
        support_locks::connect(&server.url()).await,
        support_locks::connect(&server.url()).await,
    );
    for key in ["unused", "in-use"] {
        let guard = lock(&locks, key).await;
        let lease = format!("lock:{key}");
        let owner: String = server.query(&["GET", &lease]);
        guard.release().await.expect("release");
        let (_, cycle) = owner.rsplit_once(':').expect("a cycle");
        let (number, _) = cycle.split_once('-').expect("a number");
        assert_eq!(
            number.parse::<u64>().expect("a number") % 2,
            0,
            "its owner is notified of waiters"
        );
        until("the key is free", async || {
            server.query::<u64>(&["EXISTS", &lease]) == 0
        })
        .await;
        server.command(&["SET", &lease, &owner, "PX", "60000"]);
        // The same manager may want the key at the same time.
        let once = |locks: &LockManager| {
            let locks = locks.clone();
            async move { lock(&locks, key).await.release().await.expect("release") }
        };
        let own = (key == "in-use").then(|| tokio::spawn(once(&locks)));
        soon("the lock", once(&others)).await;
        if let Some(own) = own {
            soon("the lock", own).await.expect("a task");
        }
    }
}
