//! What a manager knows about its keys, locks and shards, and which shard owns which keys.
//!
//! [`LockManager::hot_keys`](crate::LockManager::hot_keys),
//! [`held`](crate::LockManager::held), [`shards`](crate::LockManager::shards) and
//! [`inspect`](crate::LockManager::inspect) return these types.

pub use crate::key::{SLOTS, Slot};
pub use crate::router::ShardMap;
pub use crate::snapshot::{HeldLock, HotKey, HotKeyHolder, ShardState};
pub use crate::store::{Holder, KeyState};
