//! A client-side, sharded lock manager on Redis, for many workers that contend for the same keys.

#[cfg(feature = "admin")]
pub mod admin;
mod backoff;
mod clock;
mod config;
mod contention;
mod cycle;
mod endpoint;
mod error;
mod fence;
mod foreign;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
mod guard;
mod identity;
mod key;
mod lease;
mod manager;
mod protocol;
mod queue;
mod request;
mod router;
mod runtime;
mod shard;
#[cfg(test)]
mod simulation;
mod slow_log;
mod snapshot;
mod span;
mod store;
mod telemetry;
mod text;
mod time_limit;
mod watchdog;

pub use config::{Builder, Config, ShardConfig};
pub use endpoint::{Endpoint, ServerUrl};
pub use error::{InvalidSetting, LockError, LossReason};
pub use fence::FencingToken;
pub use guard::LockGuard;
pub use identity::manager_of;
pub use key::{LockKey, SLOTS, Slot};
pub use manager::LockManager;
pub use request::{LockFuture, LockRequest, TryLockFuture, TryLockRequest};
pub use router::ShardMap;
pub use snapshot::{HeldLock, HotKey, HotKeyHolder, ShardState};
pub use store::{Holder, KeyState};
pub use telemetry::{METRICS, Metric, MetricKind, MetricUnit};
pub use text::{must_be_escaped, printable};
