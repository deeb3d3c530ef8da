//! Stores to run one suite on, and what tests of locks ask again and again.

// Each test takes what it needs, and the lints see each test's copy alone.
#![allow(dead_code, unreachable_pub, unused_macros, unused_imports)]
// A test is over when its surroundings fail.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use shardlock::{Builder, LockGuard, LockManager};
use tokio::task::JoinHandle;

use crate::support::{PATIENCE, RedisServer};

/// A lease that lives long enough for a loaded machine and short enough to wait for its end.
pub const SHORT_TTL: Duration = Duration::from_millis(400);

/// Runs each test on a memory and on a Redis of its own, as `name::on_memory` and `name::on_redis`.
macro_rules! on_each_store {
    ($($(#[$attribute:meta])* async fn $name:ident($store:ident: &TestStore) $body:block)*) => {$(
        $(#[$attribute])*
        mod $name {
            use super::*;

            async fn test($store: &TestStore) $body

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn on_memory() {
                test(&TestStore::memory()).await;
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn on_redis() {
                test(&TestStore::redis()).await;
            }
        }
    )*};
}
pub(crate) use on_each_store;

/// A store of one test's own.
pub enum TestStore {
    /// Inside of this process; the number makes its name.
    Memory(u32),
    /// A server.
    Redis(Box<RedisServer>),
}

impl TestStore {
    /// A memory that nobody else uses.
    pub fn memory() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        Self::Memory(NEXT.fetch_add(1, Ordering::Relaxed))
    }

    /// A server that nobody else uses.
    #[track_caller]
    pub fn redis() -> Self {
        Self::Redis(Box::new(RedisServer::start()))
    }

    /// The URL of the shard.
    pub fn url(&self) -> String {
        match self {
            Self::Memory(number) => format!("memory://test-{number}"),
            Self::Redis(server) => server.url(),
        }
    }

    /// A builder for a manager of this store.
    pub fn builder(&self) -> Builder {
        LockManager::builder().shard(self.url())
    }

    /// A manager with the default settings. Each stands for a process: managers share nothing but the store.
    pub async fn manager(&self) -> LockManager {
        self.builder().connect().await.expect("connect")
    }

    /// A manager whose leases are short.
    pub async fn short_lived_manager(&self) -> LockManager {
        self.builder().ttl(SHORT_TTL).connect().await.expect("connect")
    }

    /// Waits until nothing is known of the key any more, and nothing but counters and the shard map is on a server.
    pub async fn is_empty(&self, locks: &LockManager, key: &str) {
        until("the key is free and unwanted", async || {
            let seen = locks.inspect(key).await.expect("inspect");
            seen.holder.is_none() && seen.queue_length == 0
        })
        .await;
        if let Self::Redis(server) = self {
            assert_eq!(lock_keys(server), [""; 0]);
        }
    }
}

/// The keys on a server that belong to single locks: all but the counters of the slots and the shard map.
pub fn lock_keys(server: &RedisServer) -> Vec<String> {
    let mut keys = server.keys();
    keys.retain(|key| !key.starts_with("lock:%map") && !key.starts_with("lock:%fence:"));
    keys
}

/// Waits for a condition that takes a question to a server.
pub async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition().await {
        assert!(Instant::now() < deadline, "waited {PATIENCE:?} in vain until {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Waits until so many managers stand in the store's queue.
pub async fn until_queued(locks: &LockManager, key: &str, count: u64) {
    let what = format!("{count} wait for {key:?}");
    until(&what, async || {
        locks.inspect(key).await.expect("inspect").queue_length == count
    })
    .await;
}

/// Fails the test rather than hang if the future takes for ever.
pub async fn soon<F: Future>(what: &str, future: F) -> F::Output {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(output) => output,
        Err(_) => panic!("waited {PATIENCE:?} in vain for {what}"),
    }
}

/// Locks with a limit that only a hanging test reaches.
pub async fn lock(locks: &LockManager, key: &str) -> LockGuard {
    locks.lock(key).timeout(PATIENCE).await.expect("lock")
}

/// Locks, again and again while a failover is under way. Returns the token.
pub async fn lock_in_time(locks: &LockManager, key: &str) -> u64 {
    let mut token = 0;
    until("the lock can be had again", async || match locks.lock(key).await {
        Ok(guard) => {
            token = guard.token().get();
            guard.release().await.is_ok()
        }
        Err(error) => {
            assert!(error.is_retryable(), "{error}");
            false
        }
    })
    .await;
    token
}

/// A task that waits for the lock.
pub fn waiting(locks: &LockManager, key: &'static str) -> JoinHandle<LockGuard> {
    let locks = locks.clone();
    tokio::spawn(async move { lock(&locks, key).await })
}

/// A hand-off between two managers, by push: both inboxes are where the lock is.
pub async fn hand_off(from: &LockManager, to: &LockManager, key: &'static str) {
    let guard = lock(from, key).await;
    let waiting = waiting(to, key);
    until_queued(from, key, 1).await;
    let token = guard.token();
    guard.release().await.expect("release");
    let guard = soon("the hand-off", waiting).await.expect("a task");
    assert!(guard.token() > token);
    guard.release().await.expect("release");
}

/// Polls once: whether the future is ready then. Its waker does nothing, so something has to poll it again.
pub fn poll_once<F: Future + Unpin>(future: &mut F) -> Option<F::Output> {
    match Pin::new(future).poll(&mut Context::from_waker(Waker::noop())) {
        std::task::Poll::Ready(output) => Some(output),
        std::task::Poll::Pending => None,
    }
}
