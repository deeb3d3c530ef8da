//! Quorums of independent primaries, with real servers.

#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

mod support;

use std::time::Duration;

use shardlock::{LockError, LockManager};
use support::{PATIENCE, RedisServer, eventually};

const MAX_TTL: Duration = Duration::from_secs(1);

async fn servers(count: usize) -> Vec<RedisServer> {
    let servers: Vec<RedisServer> = (0..count).map(|_| RedisServer::start()).collect();
    let uptime = |server: &RedisServer| {
        let info: String = server.query(&["INFO", "server"]);
        let line = info.lines().find_map(|line| line.strip_prefix("uptime_in_seconds:"));
        line.unwrap().trim().parse::<u64>().unwrap()
    };
    eventually("all nodes have a vote", PATIENCE, || {
        servers.iter().all(|server| uptime(server) >= 2)
    })
    .await;
    servers
}

async fn manager(servers: &[RedisServer]) -> LockManager {
    let places: Vec<String> = servers.iter().map(RedisServer::address).collect();
    let builder = LockManager::builder().shard(format!("redlock://{}", places.join(",")));
    let builder = builder.ttl(Duration::from_millis(800)).redlock_max_ttl(MAX_TTL);
    builder.connect().await.expect("connect")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_dead_nodes_are_survived_and_three_are_an_error() {
    let servers = servers(5).await;
    let locks = manager(&servers).await;
    let mut last = 0;
    for dead in 0..3 {
        for round in 0..5 {
            let guard = locks
                .lock("key")
                .await
                .unwrap_or_else(|error| panic!("{dead} dead, {round}: {error}"));
            assert!(guard.token().get() > last);
            last = guard.token().get();
            guard.release().await.expect("release");
        }
        servers[dead].kill();
    }
    let error = locks.lock("key").await.expect_err("three of five are dead");
    assert!(matches!(error, LockError::Unavailable { .. }), "{error}");
    eventually("nothing is left", PATIENCE, || {
        servers[3..]
            .iter()
            .all(|server| server.keys().iter().all(|key| key.contains('%')))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_managers_take_turns() {
    let servers = servers(3).await;
    let (one, other) = (manager(&servers).await, manager(&servers).await);
    let mut last = 0;
    for _ in 0..10 {
        for locks in [&one, &other] {
            let guard = locks.lock("key").await.expect("lock");
            assert!(locks.inspect("key").await.expect("inspect").holder.is_some());
            assert!(guard.token().get() > last);
            last = guard.token().get();
            guard.release().await.expect("release");
        }
    }
    let guard = one.lock("key").await.expect("lock");
    assert!(other.try_lock("key").await.expect("try").is_none());
    let (waited, ()) = tokio::join!(other.lock("key"), async { guard.release().await.expect("release") });
    waited.expect("handed on").release().await.expect("release");
}
