//! Test access: what the comparison with the reference implementation needs to read and set in a
//! store.

use std::time::Duration;

use super::super::Compared;
use super::super::claim::{Claim, Claimed};
use super::RedisStore;
use crate::endpoint::{Endpoint, EndpointKind};
use crate::identity::ManagerId;
use crate::key::LockKey;
use crate::store::{LeaseStore, StoreFuture, StoreOptions};

impl RedisStore {
    /// A connected store, as users get it.
    pub(crate) async fn for_comparison(url: &str, manager: &ManagerId) -> Self {
        let options = StoreOptions {
            timeout: Duration::from_secs(20),
            ..StoreOptions::for_tests(manager.clone())
        };
        let endpoint = Endpoint::parse(url).unwrap();
        let EndpointKind::Redis(server) = endpoint.kind() else {
            panic!("{endpoint} is not a single server")
        };
        let store = Self::new(server, options).unwrap();
        store.connect().await.unwrap();
        // Opening it later would raise the floor that a test has set.
        assert!(store.background.get().await.is_ok());
        store
    }
}

impl Compared for RedisStore {
    fn set_floor(&self, key: &LockKey, floor: u64) {
        let slot = self.shared.commands.names.of(key).slot();
        self.shared.token_floor.set(slot, floor);
    }

    fn lease_name(&self, key: &LockKey) -> String {
        self.shared.commands.names.of(key).lease().to_string()
    }

    fn claim(&self, claim: Claim) -> StoreFuture<Claimed> {
        self.claim(claim)
    }

    fn inboxes(&self, _keys: &[LockKey]) -> Vec<String> {
        vec![self.shared.commands.names.inbox(&self.shared.commands.manager)]
    }

    fn inboxes_changed(&self) {
        // It lasts until the next call.
        std::mem::forget(self.shared.inbox_state.subscribed());
    }
}
