//! Stores to run one suite on, and what tests of locks ask again and again.

// Each test takes what it needs, and the lints see each test's copy alone.
#![allow(dead_code, unreachable_pub, unused_macros, unused_imports)]
// A test is over when its surroundings fail.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use shardlock::{Builder, LockGuard, LockManager};
use tokio::task::JoinHandle;

use crate::support::{PATIENCE, RedisServer, Worker, worker};

mod kinds;
mod locker;
mod measured;
pub(crate) use kinds::tests_on;
pub use kinds::{Kind, Servers};
pub use locker::{LOCKER, Locker, obey};
pub use measured::Measured;

/// A lease that lives long enough for a loaded machine and short enough to wait for its end.
pub const SHORT_TTL: Duration = Duration::from_millis(400);

/// Runs each test on each kind of store, as `name::on_memory`, `name::on_redis` and so on; or, after `on(...)`, on those kinds and sets
/// of kinds alone (see [`tests_on!`]). The servers are those that all tests share, and a namespace of the test's own is all
/// it has there; after `on(..., own)` the servers, too, are the test's own, so that it can stop, flush and count them.
macro_rules! on_each_store {
    (on($($set:ident)+, own); $($test:tt)*) => {
        $crate::support_locks::on_each_store! { @ own [$($set)+] $($test)* }
    };
    (on($($set:ident)+); $($test:tt)*) => {
        $crate::support_locks::on_each_store! { @ shared [$($set)+] $($test)* }
    };
    (@ $how:ident $sets:tt $($(#[$attribute:meta])* async fn $name:ident($store:ident: &TestStore) $body:block)*) => {$(
        $crate::support_locks::on_each_store! { @@ $how $sets $(#[$attribute])* $name $store $body }
    )*};
    (@@ $how:ident [$($set:ident)+] $(#[$attribute:meta])* $name:ident $store:ident $body:block) => {
        $(#[$attribute])*
        mod $name {
            use super::*;

            async fn test($store: &TestStore) $body

            $crate::support_locks::tests_on! { $how $($set)+ }
        }
    };
    ($($test:tt)*) => {
        $crate::support_locks::on_each_store! { @ shared [all] $($test)* }
    };
}
pub(crate) use on_each_store;

/// A store of one test's own: servers, or a namespace on servers that others use, too.
pub struct TestStore {
    kind: Kind,
    servers: Arc<dyn Servers>,
    urls: Vec<String>,
    namespace: String,
}

impl TestStore {
    /// A namespace that nobody else uses, on the servers that all tests of this process share.
    pub fn shared(kind: Kind) -> Self {
        let test = next_number();
        Self::new(kind, kind.shared(), test, format!("t{test}:"))
    }

    /// Servers that nobody else uses.
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

    /// The URLs of its shards.
    pub fn urls(&self) -> &[String] {
        &self.urls
    }

    /// What its shards are.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// What holds its leases.
    pub fn servers(&self) -> &dyn Servers {
        &*self.servers
    }

    /// [`servers`](Self::servers), for a thread.
    pub fn keep_servers(&self) -> Arc<dyn Servers> {
        Arc::clone(&self.servers)
    }

    /// The only Redis server of a store that has one.
    #[track_caller]
    pub fn server(&self) -> &RedisServer {
        let [server] = self.servers.nodes()[..] else {
            panic!("{:?} is not one server", self.kind)
        };
        server
    }

    /// What the names of its keys begin with.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The name of a key's lease, where the key has neither braces nor percent signs.
    pub fn lease(&self, key: &str) -> String {
        format!("{}{key}", self.namespace)
    }

    /// A builder for a manager of this store.
    pub fn builder(&self) -> Builder {
        builder(self.kind, self.urls.iter().map(String::as_str), &self.namespace)
    }

    /// A manager with the default settings. Each stands for a process: managers share nothing but the store.
    pub async fn manager(&self) -> LockManager {
        self.builder().connect().await.expect("connect")
    }

    /// See [`Kind::short_ttl`].
    pub fn short_ttl(&self) -> Duration {
        self.kind.short_ttl()
    }

    /// A manager whose leases are short.
    pub async fn short_lived_manager(&self) -> LockManager {
        self.builder().ttl(self.short_ttl()).connect().await.expect("connect")
    }

    /// Starts a worker that can reach this store by [`builder_of`].
    #[track_caller]
    pub fn worker(&self, name: &str, vars: &[(&str, &str)]) -> Worker {
        let urls = self.urls.join(" ");
        let mut all = vec![
            ("LOCKTEST_KIND", self.kind.name()),
            ("LOCKTEST_URLS", urls.as_str()),
            ("LOCKTEST_NAMESPACE", self.namespace.as_str()),
        ];
        all.extend_from_slice(vars);
        worker::spawn(name, &all)
    }

    /// What is on the servers of single locks.
    pub fn lock_keys(&self) -> Vec<String> {
        self.servers.lock_keys(&self.namespace)
    }

    /// Waits until nothing is left on the servers but counters and the shard map.
    pub async fn is_clean(&self) {
        until("nothing is left", async || self.lock_keys().is_empty()).await;
    }

    /// Waits until nothing is known of the key any more, and nothing but counters and the shard map is on a server.
    pub async fn is_empty(&self, locks: &LockManager, key: &str) {
        until("the key is free and unwanted", async || {
            let seen = locks.inspect(key).await.expect("inspect");
            seen.holder.is_none() && seen.queue_length == 0
        })
        .await;
        self.is_tidy().await;
    }

    /// After the last release nothing but counters and the shard map is on a server: at once, or soon where the kind tidies up later.
    pub async fn is_tidy(&self) {
        if self.kind.tidies_up_later() {
            return self.is_clean().await;
        }
        assert_eq!(self.lock_keys(), [""; 0]);
    }
}

fn next_number() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// With `LOCKTEST_LINGER` in the environment, leases are kept for so many milliseconds.
fn builder<'a>(kind: Kind, urls: impl Iterator<Item = &'a str>, namespace: &str) -> Builder {
    let builder = LockManager::builder().namespace(namespace);
    let builder = kind.settings(urls.fold(builder, |builder, url| builder.shard(url)));
    match std::env::var("LOCKTEST_LINGER") {
        Ok(millis) => builder.linger(Duration::from_millis(millis.parse().expect("milliseconds"))),
        Err(_) => builder,
    }
}

/// A builder for a manager of the store that the test has given to this worker.
pub fn builder_of(me: &worker::Current) -> Builder {
    let urls = me.var("LOCKTEST_URLS");
    builder(
        Kind::named(&me.var("LOCKTEST_KIND")),
        urls.split(' '),
        &me.var("LOCKTEST_NAMESPACE"),
    )
}

/// The keys on a server that belong to single locks of the default namespace.
pub fn lock_keys(server: &RedisServer) -> Vec<String> {
    server.lock_keys("lock:")
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
