//! The tool on a Redis Cluster.

use shardlock::LockManager;
use support::{Cluster, PATIENCE};
use support_locks::{lock, until, until_queued};

use crate::tool::{Run, bare, run};

/// The keys that any node has for locks, but for what stays: counters and the map.
fn lock_keys(cluster: &Cluster) -> Vec<String> {
    let keys = cluster
        .nodes()
        .iter()
        .flat_map(|node| node.query::<Vec<String>>(&["KEYS", "lock:*"]));
    keys.filter(|key| !key.starts_with("lock:%")).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_tool_runs_a_command_under_a_lock_of_a_cluster() {
    let cluster = Cluster::start(3, 0);
    let command = |args: &[&str]| {
        let mut command = bare(args);
        command.env("SHARDLOCK_SHARDS", cluster.url());
        command
    };
    let ended = run(command(&["exec", "k", "sh", "-c", "exit 7"]));
    assert_eq!(ended.code, 7, "{ended:?}");
    let locks = LockManager::builder()
        .shard(cluster.url())
        .store_timeout(PATIENCE)
        .connect()
        .await
        .expect("connect");
    let guard = lock(&locks, "k").await;
    let ended = run(command(&["inspect", "k"]));
    assert!(ended.code == 0 && ended.stdout.contains(locks.id()), "{ended:?}");
    let waits = Run::start(command(&["exec", "k", "true"]));
    until_queued(&locks, "k", 1).await;
    guard.release().await.expect("release");
    let mut waits = waits;
    assert_eq!(waits.end().code, 0);
    until("nothing is left", async || lock_keys(&cluster).is_empty()).await;
    until("the tool has left no channel", async || {
        cluster.shard_channels().is_empty()
    })
    .await;
}
