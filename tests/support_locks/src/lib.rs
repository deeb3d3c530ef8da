//! Stores that the suite runs on, and steps that many lock tests share.

// A failing environment ends the test.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use shardlock::config::Builder;
use shardlock::{LockGuard, LockManager};
use tokio::task::JoinHandle;

use support::{PATIENCE, RedisServer, Worker, worker};

mod kinds;
mod locker;
mod measured;
pub use kinds::{Kind, Servers};
pub use locker::{LOCKER, Locker, run_commands};
pub use measured::Measured;

/// A TTL long enough for a loaded machine and short enough to wait until it expires.
pub const SHORT_TTL: Duration = Duration::from_millis(1500);

/// How much later than it is due something may happen on a busy machine.
pub const MARGIN: Duration = Duration::from_secs(1);

/// Runs each test on each kind of store, as `name::on_memory`, `name::on_redis` and so on.
/// `on(...)` restricts the tests to the given kinds and sets of kinds (see [`tests_on!`]). By
/// default the servers are shared by all tests, and each test has its own namespace on them. With
/// `on(..., own)` the test also has its own servers, so that it can stop and flush them and read
/// their statistics.
#[macro_export]
macro_rules! on_each_store {
    (on($($set:ident)+, own); $($test:tt)*) => {
        $crate::on_each_store! { @ own [$($set)+] $($test)* }
    };
    (on($($set:ident)+); $($test:tt)*) => {
        $crate::on_each_store! { @ shared [$($set)+] $($test)* }
    };
    (@ $how:ident $sets:tt $($(#[$attribute:meta])* async fn $name:ident($store:ident: &TestStore) $body:block)*) => {$(
        $crate::on_each_store! { @@ $how $sets $(#[$attribute])* $name $store $body }
    )*};
    (@@ $how:ident [$($set:ident)+] $(#[$attribute:meta])* $name:ident $store:ident $body:block) => {
        $(#[$attribute])*
        mod $name {
            use super::*;

            async fn test($store: &TestStore) $body

            $crate::tests_on! { $how $($set)+ }
        }
    };
    ($($test:tt)*) => {
        $crate::on_each_store! { @ shared [all] $($test)* }
    };
}

/// The store of one test: either its own servers, or a namespace on shared servers.
pub struct TestStore {
    kind: Kind,
    servers: Arc<dyn Servers>,
    urls: Vec<String>,
    namespace: String,
}

impl TestStore {
    /// A new namespace on the servers that all tests of this process share.
    pub fn shared(kind: Kind) -> Self {
        let test = next_number();
        Self::new(kind, kind.shared(), test, format!("t{test}:"))
    }

    /// New servers for exclusive use.
    #[track_caller]
    pub fn own(kind: Kind) -> Self {
        Self::new(kind, kind.start(), next_number(), "lock:".to_owned())
    }

    fn new(kind: Kind, servers: Arc<dyn Servers>, test: u32, namespace: String) -> Self {
        let urls = servers.urls(test);
        Self {
            kind,
            servers,
            urls,
            namespace,
        }
    }

    /// The URLs of the shards.
    pub fn urls(&self) -> &[String] {
        &self.urls
    }

    /// The kind of the shards.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The servers that hold the leases.
    pub fn servers(&self) -> &dyn Servers {
        &*self.servers
    }

    /// [`servers`](Self::servers) as an owned handle, for a thread.
    pub fn keep_servers(&self) -> Arc<dyn Servers> {
        Arc::clone(&self.servers)
    }

    /// The Redis server of a store with exactly one.
    #[track_caller]
    pub fn server(&self) -> &RedisServer {
        let [server] = self.servers.nodes()[..] else {
            panic!("{:?} does not have exactly one server", self.kind)
        };
        server
    }

    /// The prefix of the store's key names.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The name of a key's lease, for keys without braces and percent signs.
    pub fn lease(&self, key: &str) -> String {
        format!("{}{key}", self.namespace)
    }

    /// A builder for a manager of this store.
    pub fn builder(&self) -> Builder {
        builder(self.kind, self.urls.iter().map(String::as_str), &self.namespace)
    }

    /// A manager with the default settings. Managers share nothing but the store, so each
    /// represents a process.
    pub async fn manager(&self) -> LockManager {
        self.builder().connect().await.expect("connect")
    }

    /// See [`Kind::short_ttl`].
    pub fn short_ttl(&self) -> Duration {
        self.kind.short_ttl()
    }

    /// A manager with short leases.
    pub async fn short_lived_manager(&self) -> LockManager {
        self.builder().ttl(self.short_ttl()).connect().await.expect("connect")
    }

    /// Starts a worker that reaches this store with [`builder_of`].
    #[track_caller]
    pub fn worker(&self, name: &str, vars: &[(&str, &str)]) -> Worker {
        let urls = self.urls.join(" ");
        let mut all = vec![
            ("SHARDLOCK_TEST_KIND", self.kind.name()),
            ("SHARDLOCK_TEST_URLS", urls.as_str()),
            ("SHARDLOCK_TEST_NAMESPACE", self.namespace.as_str()),
        ];
        all.extend_from_slice(vars);
        worker::spawn(name, &all)
    }

    /// The keys on the servers that belong to individual locks.
    pub fn lock_keys(&self) -> Vec<String> {
        self.servers.lock_keys(&self.namespace)
    }

    /// Waits until only counters and the shard map are left on the servers.
    pub async fn is_clean(&self) {
        until("nothing is left", async || self.lock_keys().is_empty()).await;
    }

    /// Waits until the key has neither a holder nor waiters, and only counters and the shard map
    /// are left on the servers.
    pub async fn is_empty(&self, locks: &LockManager, key: &str) {
        until("the key is free and has no waiters", async || {
            let seen = locks.inspect(key).await.expect("inspect");
            seen.holder.is_none() && seen.queue_length == 0
        })
        .await;
        self.is_tidy().await;
    }

    /// Asserts that only counters and the shard map are left on the servers after the last release:
    /// immediately, or soon if the kind cleans up later.
    pub async fn is_tidy(&self) {
        if self.kind.cleans_up_later() {
            return self.is_clean().await;
        }
        assert_eq!(self.lock_keys(), [""; 0]);
    }
}

fn next_number() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// A server on a busy machine may take longer than the default of a second to answer. Tests of
/// servers that do not answer set a limit of their own.
pub const STORE_TIMEOUT: Duration = Duration::from_secs(4);

/// Connects a manager with the default settings, except for the time that a busy machine needs.
///
/// # Panics
///
/// Panics if it can't connect.
pub async fn connect(url: &str) -> LockManager {
    let builder = LockManager::builder().shard(url).store_timeout(STORE_TIMEOUT);
    builder.connect().await.expect("connect")
}

/// If `SHARDLOCK_TEST_LINGER` is set, leases linger for that many milliseconds.
fn builder<'a>(kind: Kind, urls: impl Iterator<Item = &'a str>, namespace: &str) -> Builder {
    let builder = LockManager::builder().namespace(namespace).store_timeout(STORE_TIMEOUT);
    let builder = kind.settings(urls.fold(builder, |builder, url| builder.shard(url)));
    match std::env::var("SHARDLOCK_TEST_LINGER") {
        Ok(millis) => builder.linger(Duration::from_millis(millis.parse().expect("milliseconds"))),
        Err(_) => builder,
    }
}

/// A builder for a manager of the store that the test passed to this worker.
pub fn builder_of(me: &worker::Current) -> Builder {
    let urls = me.var("SHARDLOCK_TEST_URLS");
    builder(
        Kind::named(&me.var("SHARDLOCK_TEST_KIND")),
        urls.split(' '),
        &me.var("SHARDLOCK_TEST_NAMESPACE"),
    )
}

/// The keys on a server that belong to individual locks of the default namespace.
pub fn lock_keys(server: &RedisServer) -> Vec<String> {
    server.lock_keys("lock:")
}

/// Waits for a condition that requires a request to a server.
pub async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition().await {
        assert!(
            Instant::now() < deadline,
            "waited {PATIENCE:?} without success until {what}"
        );
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Waits until `count` managers are in the store's queue.
pub async fn until_queued(locks: &LockManager, key: &str, count: u64) {
    let what = format!("{count} managers wait for {key:?}");
    until(&what, async || {
        locks.inspect(key).await.expect("inspect").queue_length == count
    })
    .await;
}

/// Awaits the future. Fails the test if it takes longer than [`PATIENCE`], so that the test does
/// not hang.
pub async fn soon<F: Future>(what: &str, future: F) -> F::Output {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(output) => output,
        Err(_) => panic!("waited {PATIENCE:?} without success for {what}"),
    }
}

/// Locks, with a timeout that only a hanging test reaches.
pub async fn lock(locks: &LockManager, key: &str) -> LockGuard {
    locks.lock(key).timeout(PATIENCE).await.expect("lock")
}

/// Retries to lock while a failover is in progress, then releases. Returns the token.
pub async fn lock_in_time(locks: &LockManager, key: &str) -> u64 {
    let mut token = 0;
    until("the lock can be acquired again", async || match locks.lock(key).await {
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

/// Spawns a task that waits for the lock.
pub fn waiting(locks: &LockManager, key: &'static str) -> JoinHandle<LockGuard> {
    let locks = locks.clone();
    tokio::spawn(async move { lock(&locks, key).await })
}

/// Hands the lock off between two managers by push, which shows that both inboxes are where the
/// lock is.
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

/// Polls the future once. Its waker does nothing, so the caller must poll it again.
pub fn poll_once<F: Future + Unpin>(future: &mut F) -> Option<F::Output> {
    match Pin::new(future).poll(&mut Context::from_waker(Waker::noop())) {
        std::task::Poll::Ready(output) => Some(output),
        std::task::Poll::Pending => None,
    }
}
