//! Lease stores backed by Redis (or Valkey) servers.
//!
//! Every change of a lock's state is one Lua script, or the two plain commands of the fast path, so
//! it is atomic on the server. `scripts/*.lua` implement the protocol. Every script is idempotent
//! for its cycle. Commands and replies do not depend on how the server is found: `names`,
//! `commands`, `script` and `reply`.

use std::time::Duration;

use deadpool_redis::redis::{IntoConnectionInfo, RedisError};

use super::StoreError;
use crate::endpoint::ServerUrl;

mod batch;
mod checked_pool;
pub(crate) mod claim;
mod client;
pub(crate) mod cluster;
mod commands;
mod connection;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod map;
pub(crate) mod names;
mod permission;
pub(crate) mod primary;
mod refusal;
mod replica_ack;
mod reply;
mod script;
mod server_time;
mod subscriber;
mod token_floor;

pub(crate) use script::MARKER;

/// See [`tool::why_not_connected`](crate::tool::why_not_connected).
pub(crate) async fn why_not_connected(server: &ServerUrl, error: &RedisError, timeout: Duration) -> String {
    let explained = match server.with_password().into_connection_info() {
        Ok(info) => client::explained(&info, timeout, error).await,
        Err(_) => reply::to_store_error(error),
    };
    match explained {
        StoreError::Unavailable(reason) | StoreError::Refused(reason) => reason.to_string(),
        StoreError::MapMismatch { .. } => error.to_string(),
    }
}

/// What the comparison with the reference implementation needs to read and set in a store.
#[cfg(test)]
pub(crate) trait Compared: super::LeaseStore {
    /// Overrides the floor that the next request for this key sends, in place of the observed one.
    fn set_floor(&self, key: &crate::key::LockKey, floor: u64);

    fn lease_name(&self, key: &crate::key::LockKey) -> String;

    /// The channels on which the store's manager is notified about these keys.
    fn inboxes(&self, keys: &[crate::key::LockKey]) -> Vec<String>;

    /// The caller has subscribed to these channels, or has unsubscribed.
    fn inboxes_changed(&self) {}

    /// Claims a lease, as on a node of a quorum. Only a primary can be one.
    fn claim(&self, claim: claim::Claim) -> super::StoreFuture<claim::Claimed> {
        panic!("a cluster is no node of a quorum: {claim:?}")
    }
}

/// A connected store for the server at this URL.
#[cfg(test)]
pub(crate) async fn for_comparison(
    url: &str,
    in_cluster: bool,
    manager: &crate::identity::ManagerId,
) -> Box<dyn Compared> {
    if in_cluster {
        Box::new(cluster::tests::for_comparison(url, manager).await)
    } else {
        Box::new(primary::RedisStore::for_comparison(url, manager).await)
    }
}

#[cfg(test)]
pub(crate) use script::tests::with_unnotified_lease;

#[cfg(test)]
pub(crate) fn read_push(message: &str) -> Option<crate::protocol::Push> {
    reply::push(message)
}
