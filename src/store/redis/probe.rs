//! What the comparison with the reference needs to see and to set of a store.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{RedisOptions, RedisStore, reply};
use crate::identity::ManagerId;
use crate::key::LockKey;
use crate::protocol::Push;
use crate::telemetry::ShardMetrics;

impl RedisStore {
    /// A store as the product makes it, connected.
    pub(crate) async fn for_comparison(url: &str, manager: &ManagerId) -> Self {
        let options = RedisOptions {
            namespace: "lock:".to_owned(),
            manager: manager.clone(),
            map: "a map".to_owned(),
            connections: 1,
            timeout: Duration::from_secs(20),
            metrics: Arc::new(ShardMetrics::new("comparison")),
        };
        let store = Self::new(url, options).unwrap();
        store.connect().await.unwrap();
        // A connection that is opened later would raise the floor that a test has set.
        assert!(store.background.get().await.is_ok());
        store
    }

    /// Sets what the next request of that key says of the counter, in place of what the store has seen.
    pub(crate) fn set_floor(&self, key: &LockKey, floor: u64) {
        let slot = self.shared.names.of(key).slot;
        self.shared.floor.store(floor, Ordering::Release);
        self.shared.seen[usize::from(slot.number())].store(0, Ordering::Release);
    }

    pub(crate) fn lease_name(&self, key: &LockKey) -> String {
        self.shared.names.of(key).lease().to_string()
    }

    pub(crate) fn inbox_name(&self) -> String {
        self.shared.names.inbox(&self.shared.manager)
    }

    pub(crate) fn read_push(message: &str) -> Option<Push> {
        reply::push(message)
    }
}
