//! The command-line tool on etcd.

use std::time::{Duration, Instant};

use shardlock::LockManager;
use support::etcd::{Etcd, LEASE_MIN};
use support_locks::{lock, until, until_queued};

use crate::tool::{Run, bare, run};

/// Longer than an election takes.
const STORE_TIMEOUT: Duration = Duration::from_secs(6);

async fn manager(etcd: &Etcd) -> LockManager {
    let builder = LockManager::builder().shard(etcd.url()).store_timeout(STORE_TIMEOUT);
    builder.connect().await.expect("connect")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tool_runs_commands_under_a_lock_and_inspects_the_lock() {
    let etcd = Etcd::start().await;
    let locks = manager(&etcd).await;
    let tool = |args: &[&str]| {
        let mut command = bare(args);
        command.env("SHARDLOCK_SHARDS", etcd.url());
        command
    };
    let guard = lock(&locks, "k").await;
    let mut waiting = Run::start(tool(&["exec", "k", "sh", "-c", "echo $LOCK_TOKEN"]));
    until_queued(&locks, "k", 1).await;
    let shown = run(tool(&["inspect", "k", "--json"]));
    let shown: serde_json::Value = serde_json::from_str(&shown.stdout).unwrap_or_else(|_| panic!("{shown:?}"));
    assert_eq!(shown["holder"]["is_manager"], true);
    assert!(shown["holder"]["owner"].as_str().unwrap().starts_with(locks.id()));
    assert_eq!(shown["last_token"], guard.token().get());
    assert_eq!(shown["queue"].as_array().unwrap().len(), 1);
    let token = guard.token().get();
    guard.release().await.unwrap();
    let ended = waiting.end();
    assert_eq!(ended.code, 0, "{ended:?}");
    let theirs: u64 = ended.stdout.trim().parse().unwrap_or_else(|_| panic!("{ended:?}"));
    assert!(theirs > token);
    // The tool releases everything before it exits; this manager does so here.
    locks.shutdown().await.ok();
    assert_eq!((etcd.lock_keys().await.len(), etcd.leases().await), (0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_key_of_a_process_that_was_killed_is_free_when_its_lease_ends() {
    let etcd = Etcd::start().await;
    let locks = manager(&etcd).await;
    let mut command = bare(&["exec", "--ttl", "2s", "k", "cat"]);
    command
        .env("SHARDLOCK_SHARDS", etcd.url())
        .stdin(std::process::Stdio::piped());
    let mut holder = Run::start(command);
    let _its_input = holder.take_stdin();
    until("the tool has the lock", async || {
        locks.inspect("k").await.unwrap().holder.is_some()
    })
    .await;
    holder.kill_keeper();
    let started = Instant::now();
    let guard = lock(&locks, "k").await;
    let waited = started.elapsed();
    // Etcd looks for expired leases twice a second, and the machine may be busy.
    assert!(waited < LEASE_MIN + Duration::from_secs(5), "{waited:?}");
    guard.release().await.unwrap();
    until("no key of a lock is left", async || etcd.lock_keys().await.is_empty()).await;
    until("no lease is left", async || etcd.leases().await == 0).await;
}
