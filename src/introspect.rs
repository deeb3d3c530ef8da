//! What a manager knows about its keys, locks and shards, and which shard owns which keys.
//!
//! [`LockManager::hot_keys`](crate::LockManager::hot_keys),
//! [`held`](crate::LockManager::held), [`shard_states`](crate::LockManager::shard_states) and
//! [`inspect`](crate::LockManager::inspect) return these types. With the feature `serde` they
//! implement `Serialize`, as the pages of the admin endpoint show them. Those of its pages also
//! implement `Deserialize`, to read a page.

pub use crate::key::{SLOTS, Slot};
pub use crate::router::ShardMap;
pub use crate::snapshot::{HeldLock, HotKey, HotKeyHolder, RoundTrips, ShardState, Waits};
pub use crate::store::{Holder, KeyState};

#[cfg(all(test, feature = "serde"))]
mod tests {
    use serde_json::json;

    use super::{HeldLock, ShardState};
    use crate::LockManager;

    #[tokio::test]
    async fn introspection_serializes_in_milliseconds_and_deserializes() {
        let locks = LockManager::builder().named_shard("m", "memory://").connect().await;
        let locks = locks.expect("connect");
        let guard = locks.lock("k").await.expect("lock");
        let json = serde_json::to_value(locks.held()).expect("JSON");
        assert_eq!(json[0]["token"], guard.token().get());
        let read: Vec<HeldLock> = serde_json::from_value(json.clone()).expect("a page");
        assert_eq!((read[0].key.as_str(), read[0].token), ("k", guard.token()));
        assert_eq!(serde_json::to_value(&read).expect("JSON"), json);

        let json = serde_json::to_value(locks.shard_states()).expect("JSON");
        assert_eq!((&json[0]["name"], &json[0]["up"]), (&json!("m"), &json!(true)));
        assert!(json[0]["round_trip_ms"]["p99"].is_f64(), "{json}");
        let read: Vec<ShardState> = serde_json::from_value(json).expect("a page");
        assert_eq!(read.len(), 1);

        let state = locks.inspect("k").await.expect("inspect");
        let json = serde_json::to_value(state).expect("JSON");
        assert!(json["holder"]["remaining_ms"].is_u64(), "{json}");
    }
}
