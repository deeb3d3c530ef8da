//! A client-side, sharded lock manager on Redis, for many workers that contend for the same keys.
//!
//! A mutex works inside one process. A [`LockManager`] gives the tasks of many processes the same:
//! at most one of them holds a key at a time. Its locks are leases on servers (Redis or Valkey,
//! with or without Sentinel or Cluster, a quorum of them, or etcd), kept alive in the background
//! for as long as a guard lives. Waiters do not poll, are served in order, and cost a server next
//! to nothing, because all tasks of a process are one contender.
//!
//! # The first lock
//!
//! Create one manager per process and clone it: clones share everything. The examples on this page
//! use `memory://`, which keeps locks inside the process, so they run without a server. In
//! production the URL is that of a server, such as `redis://10.0.0.1`.
//!
//! ```
//! use shardlock::LockManager;
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let locks = LockManager::connect("memory://").await?;
//!
//! let guard = locks.lock("coupon:123").await?;
//! println!("{} holds {}", guard.owner(), guard.key());
//! guard.release().await?;
//!
//! // Waits until the servers have confirmed everything that was released.
//! locks.shutdown().await?;
//! # Ok(()) }
//! ```
//!
//! Dropping a guard releases the lock in the background. [`LockGuard::release`] waits for the
//! server and reports whether the lock was still held. Make
//! [`shutdown`](LockManager::shutdown) the last thing a program does: otherwise a key whose guard
//! was dropped just before the process ends may stay locked for its TTL.
//!
//! With several shards, keys are spread over them by hash. All processes must have the same shards
//! in the same order; a manager with another list is refused
//! ([`LockErrorKind::ShardMapMismatch`](error::LockErrorKind::ShardMapMismatch)).
//!
//! ```
//! use std::time::Duration;
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), shardlock::LockError> {
//! let locks = shardlock::LockManager::builder()
//!     .shard("memory://one")
//!     .shard("memory://two")
//!     .ttl(Duration::from_secs(5))
//!     .max_hold(Duration::from_secs(60))
//!     .connect()
//!     .await?;
//! assert_eq!(locks.shard_states().len(), 2);
//! # Ok(()) }
//! ```
//!
//! [`Config`](config::Config) documents every setting. The same names are used in code, in the
//! environment, and in a file.
//!
//! # Waiting, limits and tries
//!
//! [`LockManager::lock`] waits for as long as it takes, unless a
//! [`timeout`](LockRequest::timeout) is set for the request or for the manager.
//! [`LockManager::try_lock`] never waits.
//!
//! ```
//! use std::time::Duration;
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), shardlock::LockError> {
//! # let locks = shardlock::LockManager::connect("memory://").await?;
//! let guard = locks.lock("report").await?;
//!
//! // The key is held: a try returns `None`, and a request with a limit gives up.
//! assert!(locks.try_lock("report").await?.is_none());
//! let error = locks.lock("report").timeout(Duration::from_millis(10)).await.unwrap_err();
//! assert!(error.is_timeout());
//!
//! guard.release().await?;
//! # Ok(()) }
//! ```
//!
//! A request with a timeout also survives an outage of its shard that ends in time: see
//! [`LockRequest`]. The number of waiting tasks is limited per key and in all, and so is the number
//! of keys. A request beyond a limit fails at once with an error that names the limit
//! ([`LockError`]).
//!
//! **Locks are not reentrant.** A task that requests a key it already holds waits for itself. Pass
//! the guard to the functions that need the lock:
//!
//! ```
//! use shardlock::{LockError, LockGuard, LockManager};
//!
//! /// Must be called with the lock on the account.
//! async fn book(guard: &LockGuard) -> u64 {
//!     guard.token().get()
//! }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), LockError> {
//! # let locks = LockManager::connect("memory://").await?;
//! let guard = locks.lock("account:7").await?;
//! book(&guard).await;
//! book(&guard).await;
//! # guard.release().await }
//! ```
//!
//! # Several keys
//!
//! Two tasks that lock the same two keys in different orders can wait for each other forever.
//! [`LockManager::lock_all`] locks any set of keys in one order, all or none, under one timeout:
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), shardlock::LockError> {
//! # let locks = shardlock::LockManager::connect("memory://").await?;
//! let guard = locks.lock_all(["account:7", "account:3"]).await?;
//! assert!(guard.is_valid() && guard.token("account:3").is_some());
//! # guard.release().await }
//! ```
//!
//! [`LockAllRequest`] explains the cost: it holds the first keys while it waits for the others.
//!
//! # Leadership
//!
//! [`LockManager::lead`] runs a body in one process at a time, for as long as there is a process
//! that can run it. If leadership is lost, the body is cancelled and the process campaigns again:
//!
//! ```
//! use shardlock::LockGuard;
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), shardlock::LockError> {
//! # let locks = shardlock::LockManager::connect("memory://").await?;
//! let token = locks.lead("scheduler", async |term: &LockGuard| term.token()).await?;
//! println!("led with token {token}");
//! # Ok(()) }
//! ```
//!
//! # Shared locks and permits
//!
//! A key can also be held by several at once: by any number of *shared* holders, or by as many as
//! have *permits*. Both are requests like any other, with the same settings, and wait in the same
//! queue. Nobody can jump it, so a writer among many readers, or a request for many permits, is
//! served in its turn.
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), shardlock::LockError> {
//! # let locks = shardlock::LockManager::connect("memory://").await?;
//! // Readers share; a writer, which takes the same key as usual, has it alone.
//! let reader = locks.lock("prices").shared().await?;
//! assert!(locks.try_lock("prices").shared().await?.is_some());
//! assert!(locks.try_lock("prices").await?.is_none());
//!
//! // At most ten calls to a partner at a time, over all processes.
//! let call = locks.permits("partner", 10).await?;
//! let batch = locks.permits("partner", 10).weight(5).await?;
//! # for guard in [reader, call, batch] { guard.release().await?; }
//! # Ok(()) }
//! ```
//!
//! [`LockRequest::shared`] and [`LockManager::permits`] have the details. Every kind of shard has
//! shared locks; all but `redlock://` have permits.
//!
//! # Losing a lock
//!
//! A lease is renewed after a tenth of its TTL, so nine renewals may fail before it is lost. It is
//! lost if it expires because the server can't be reached or the process is paused, if an
//! administrator deletes it, or if the guard is held for longer than `max_hold`. The holder learns
//! of the loss before anybody else can hold the lease, unless the lease vanished on the server
//! itself.
//!
//! [`LockManager::with_lock`] cancels its body when the lock is lost, that is, drops it:
//!
//! ```
//! use std::time::Duration;
//!
//! use shardlock::LossReason;
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), shardlock::LockError> {
//! # let locks = shardlock::LockManager::connect("memory://").await?;
//! let sum = locks.with_lock("cart:1", async |_guard| 2 + 2).await?;
//! assert_eq!(sum, 4);
//!
//! let stuck = locks.lock("cart:1").max_hold(Duration::from_millis(20));
//! let outcome = stuck.with(async |_guard| std::future::pending::<()>().await).await;
//! assert_eq!(outcome.unwrap_err().loss_reason(), Some(LossReason::MaxHold));
//! # Ok(()) }
//! ```
//!
//! Without `with_lock`, select on [`LockGuard::lost`], or ask [`LockGuard::is_valid`] before each
//! step that must not happen without the lock. It reads the clock, so it is right even in the first
//! instruction after a pause.
//!
//! # Fencing tokens
//!
//! No lock service can stop a process that is paused between its check and its write. The resource
//! can: every acquisition has a [`FencingToken`] that is larger than all earlier ones of the key.
//! Send it along with each write, and reject a write whose token is smaller than the largest seen.
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), shardlock::LockError> {
//! # let locks = shardlock::LockManager::connect("memory://").await?;
//! let first = locks.lock("file").await?;
//! let old = first.token();
//! first.release().await?;
//!
//! let second = locks.lock("file").await?;
//! assert!(second.token() > old);
//! // In SQL: UPDATE files SET data = $1, token = $2 WHERE name = 'file' AND token <= $2
//! # second.release().await }
//! ```
//!
//! # What is promised, and what is not
//!
//! - At most one exclusive guard of a key is valid at a time, none beside shared ones, and never
//!   more permits than the limit. A loss is reported first.
//! - Tokens of a key grow, also after its server lost its data, on servers whose clocks agree.
//! - Tasks of a process are served in the order in which they asked. Processes take turns; while
//!   others wait, a turn serves the tasks that waited when it began, for at most `max_slice`.
//! - No decision of a client uses a wall clock.
//! - A lock is as safe as its shard. Redis replicates asynchronously, so a failover can forget a
//!   lease, unless [`min_replicas_acked`](config::Config::min_replicas_acked) is the number of
//!   replicas. A single Redis without persistence forgets all leases when it crashes. Two holders
//!   may then overlap until the first one learns of it.
//! - The server decides when a lease ends, by its own clock. A jump forward frees locks early.
//! - Locks are not reentrant, and a shared lock can't become an exclusive one.
//!
//! `docs/guarantees.md` in the repository has the whole list.
//!
//! # Choosing a kind of shard
//!
//! The URL selects the kind. Locks, guards and tokens are the same on each, and kinds can be mixed.
//!
//! | URL | what a lock survives | choose it |
//! |---|---|---|
//! | `redis://host` | the death of any client | by default, when a lock is about not doing work twice |
//! | `redis+sentinel://h1,h2,h3/name` | also that of the primary, once a replica is promoted | when one Redis must not be a single point of failure |
//! | `redis+cluster://h1,h2,h3` | the same, and slots that move | when one machine is not enough |
//! | `redlock://h1,h2,h3,h4,h5` | the loss of any minority of independent nodes | when a lock must survive the loss of a machine and etcd is too slow |
//! | `etcd://h1,h2,h3` | the loss of a minority of members: strict consistency | when a second holder is worse than a slow lock |
//! | `memory://[name]` | nothing | for tests |
//!
//! [`Endpoint`](config::Endpoint) describes the URLs in full. Within one process,
//! `tokio::sync::Mutex` is several times faster and can't be lost. If the data is in one SQL
//! database, a row lock or an advisory lock there is simpler and safer.
//!
//! # Cancel safety
//!
//! Every future of this crate may be dropped at any point. A dropped request gives up its place in
//! the queue; a lock that was just being handed to it goes to the next waiter; whatever the server
//! may have stored for it is released in the background. A lock is released even if the future of
//! [`LockGuard::release`] is dropped. Each method documents the details under "Cancel safety".
//!
//! ```
//! use std::time::Duration;
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), shardlock::LockError> {
//! # let locks = shardlock::LockManager::connect("memory://").await?;
//! let guard = locks.lock("k").await?;
//! let waiting = tokio::time::timeout(Duration::from_millis(10), locks.lock("k"));
//! assert!(waiting.await.is_err());
//! guard.release().await?;
//! // The dropped request left nothing behind.
//! assert!(locks.try_lock("k").await?.is_some());
//! # Ok(()) }
//! ```
//!
//! # Metrics and logs
//!
//! Metrics go through the [`metrics`](https://docs.rs/metrics) facade: install a recorder before
//! connecting. [`METRICS`](metrics::METRICS) lists them, with what to do when one moves. With the
//! feature `admin`, `shardlock::admin::Admin` serves them to Prometheus, together with health, hot
//! keys and held locks. [`LockManager::hot_keys`], [`held`](LockManager::held) and
//! [`shard_states`](LockManager::shard_states) return the same to the program:
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), shardlock::LockError> {
//! # let locks = shardlock::LockManager::connect("memory://").await?;
//! let guard = locks.lock("k").class("reports").await?;
//! let held = locks.held();
//! assert_eq!((held[0].key.as_str(), held[0].token), ("k", guard.token()));
//! # guard.release().await }
//! ```
//!
//! Lost locks, outages, slow waits and long holds are logged through `tracing`. Spans are at debug
//! level.
//!
//! # Features
//!
//! None is enabled by default.
//!
//! - `tls`: encrypted connections (`rediss://` and the like), with rustls and ring
//! - `etcd`: etcd as a shard; building it needs `protoc`
//! - `file`: settings from a TOML file
//! - `admin`: the HTTP endpoint for operators
//! - `serde`: `Serialize` for the types of [`introspect`], as the endpoint shows them
//! - `tower`: a layer that serves requests under locks, for axum, apalis and others
//! - `sqlx`: [`FencingToken`] as a parameter and a column of queries with sqlx 0.8
//!
//! # Testing your own code
//!
//! Give the code under test a manager for `memory://`. Without a name each manager has a store of
//! its own; managers with the same name share one, as processes share a server. `memory://` also
//! works with tokio's paused clock: the timeouts of requests follow it, and pass at once when no
//! task has anything else to do. Leases follow the clock of the machine, so they do not expire when
//! the paused clock moves.
//!
//! ```
//! use std::time::Duration;
//!
//! use shardlock::LockManager;
//!
//! // In a test: #[tokio::test(start_paused = true)]
//! #[tokio::main(flavor = "current_thread", start_paused = true)]
//! async fn main() -> Result<(), shardlock::LockError> {
//!     let one = LockManager::connect("memory://stock").await?;
//!     let other = LockManager::connect("memory://stock").await?;
//!     let guard = one.lock("item").await?;
//!
//!     // An hour passes in an instant, and the lock is still held.
//!     let late = other.lock("item").timeout(Duration::from_secs(3600)).await;
//!     assert!(late.unwrap_err().is_timeout());
//!     assert!(guard.is_valid());
//!     Ok(())
//! }
//! ```
//!
//! To test what your code does when it loses a lock, set a short
//! [`max_hold`](LockRequest::max_hold), or call [`LockManager::shutdown`] while it holds one.

#[cfg(feature = "admin")]
pub mod admin;
mod backoff;
mod body;
mod clock;
pub mod config;
mod connect;
mod contention;
mod credentials;
mod cycle;
mod driver;
mod endpoint;
mod engine;
pub mod error;
mod fence;
mod foreign;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
mod guard;
mod identity;
pub mod introspect;
mod key;
mod late_requests;
mod lead;
mod lease;
mod lock_all;
mod log;
mod manager;
mod manager_inner;
pub mod metrics;
#[cfg(feature = "serde")]
mod millis;
mod mode;
pub mod namespace;
mod protocol;
mod random;
mod rate_limit;
mod request;
mod router;
mod runtime;
#[cfg(test)]
mod simulation;
mod slow_log;
mod snapshot;
mod span;
#[cfg(feature = "sqlx")]
mod sqlx;
mod store;
mod sync;
mod telemetry;
mod text;
mod time_limit;
#[doc(hidden)]
pub mod tool;
#[cfg(feature = "tower")]
pub mod tower;

pub use error::{LockError, LossReason};
pub use fence::FencingToken;
pub use guard::LockGuard;
pub use key::LockKey;
pub use lead::Election;
pub use lock_all::{LockAllFuture, LockAllGuard, LockAllRequest, LostKey, TryLockAllFuture, TryLockAllRequest};
pub use manager::LockManager;
pub use mode::LockMode;
pub use request::{LockFuture, LockRequest, TryLockFuture, TryLockRequest};

/// Compiles and runs the examples of the README and of the guides.
#[cfg(doctest)]
mod documents {
    macro_rules! document {
        ($($name:ident = $file:literal,)*) => {
            $(
                #[doc = include_str!(concat!("../", $file))]
                pub struct $name;
            )*
        };
    }

    document! {
        Readme = "README.md",
        ComingFrom = "docs/coming-from.md",
        Credentials = "docs/credentials.md",
        Cron = "docs/cron.md",
        Failures = "docs/failures.md",
        GettingStarted = "docs/getting-started.md",
        Leadership = "docs/leadership.md",
        RateLimiting = "docs/rate-limiting.md",
        Testing = "docs/testing.md",
    }

    #[cfg(feature = "admin")]
    document! {
        Operations = "docs/operations.md",
    }
}
