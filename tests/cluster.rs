//! A Redis Cluster as a shard: real nodes, slots that move, primaries that die.

// A test is over when its surroundings fail.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

mod support;
mod support_locks;

use std::future::IntoFuture;
use std::time::{Duration, Instant};

use shardlock::{Builder, LockError, LockManager, Slot};
use support::{ClientType, Cluster};
use support_locks::{SHORT_TTL, lock, soon, until, until_queued};

/// Longer than a failover takes.
const PATIENT: Duration = Duration::from_secs(10);

fn builder(cluster: &Cluster) -> Builder {
    LockManager::builder().shard(cluster.url()).store_timeout(PATIENT)
}

async fn connect(cluster: &Cluster) -> LockManager {
    builder(cluster).connect().await.expect("connect")
}

/// The slot of a plain key's lease on the cluster.
fn slot(key: &str) -> u16 {
    Slot::of(format!("lock:{key}").as_bytes()).number()
}

/// A key whose slot the node with this index owns.
fn key_on(cluster: &Cluster, node: usize) -> String {
    let mut names = (0..).map(|number| format!("key-{number}"));
    names.find(|key| cluster.owner(slot(key)) == node).expect("some key")
}

/// The keys that belong to single locks.
fn lock_keys(cluster: &Cluster) -> Vec<String> {
    let mut keys = cluster.keys();
    keys.retain(|key| !key.starts_with("lock:%map") && !key.starts_with("lock:%fence:"));
    keys
}

async fn is_empty(cluster: &Cluster) {
    until("nothing is left", async || lock_keys(cluster).is_empty()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_of_all_shapes_are_locked_handed_on_and_given_back() {
    let cluster = Cluster::start(3, 0);
    // Each names another node, and learns of the others.
    let one = LockManager::connect(&cluster.url_of(0)).await.expect("connect");
    let other = LockManager::connect(&cluster.url_of(1)).await.expect("connect");
    let long = "x".repeat(512);
    let keys = [
        "plain",
        "a:b",
        "{tag}key",
        "{}",
        "a}b{",
        "100%",
        "with space\\",
        "clé",
        "A",
        "a",
        &long,
    ];
    for key in keys {
        let guard = lock(&one, key).await;
        assert!(other.try_lock(key).await.expect("try").is_none(), "{key}");
        let waiting = tokio::spawn({
            let (other, key) = (other.clone(), key.to_owned());
            async move { lock(&other, &key).await }
        });
        until_queued(&one, key, 1).await;
        let seen = one.inspect(key).await.expect("inspect");
        let holder = seen.holder.expect("held");
        assert!(holder.owner.starts_with(one.id()), "{seen:?}", seen = holder.owner);
        assert!(seen.queue[0].starts_with(other.id()), "{:?}", seen.queue);
        let started = Instant::now();
        let token = guard.token();
        guard.release().await.expect("release");
        let next = soon("the hand-off", waiting).await.expect("a task");
        assert!(next.token() > token, "{key}");
        assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
        next.release().await.expect("release");
    }
    is_empty(&cluster).await;
    one.shutdown().await;
    other.shutdown().await;
    drop((one, other));
    until("no channel is left", async || cluster.shard_channels().is_empty()).await;
}
