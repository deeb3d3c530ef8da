//! Reading and storing the shard map in etcd.

use etcd_client::{Client, Compare, CompareOp, KeyValue, PutOptions, Txn, TxnOp};

use super::error::EtcdError;
use super::link::{Link, Servers};
use crate::store::StoreError;
use crate::store::map::{MAP_ATTEMPTS, MapState, MapStep, RESERVED_FOR, StoredMap};

/// Compares the stored map with this manager's.
pub(super) fn check(map: &StoredMap, stored: Option<&KeyValue>) -> Result<MapState, StoreError> {
    let stored = stored.map(|stored| String::from_utf8_lossy(stored.value()));
    map.check(stored.as_deref())
}

/// Reads the map. A majority confirms the reply.
pub(super) async fn read(link: &Link) -> Result<MapState, StoreError> {
    let map = &link.servers.map;
    let get = async |mut client: Client| client.get(map.key(), None).await;
    let (reply, _) = link.request(get).await.map_err(EtcdError::into_store_error)?;
    check(map, reply.kvs().first())
}

/// Performs one step.
///
/// # Errors
///
/// A different map is stored, or there was no answer.
pub(super) async fn step(servers: &Servers, client: &Client, step: MapStep) -> Result<MapState, StoreError> {
    let map = &servers.map;
    let failed = |error: etcd_client::Error| servers.classify(&error).into_store_error();
    let mut client = client.clone();
    for _ in 0..MAP_ATTEMPTS {
        let reply = client.get(map.key(), None).await.map_err(failed)?;
        let stored = reply.kvs().first();
        let state = check(map, stored)?;
        let unchanged = Compare::mod_revision(map.key(), CompareOp::Equal, stored.map_or(0, KeyValue::mod_revision));
        let put = match (step, state) {
            (MapStep::Read, _) | (_, MapState::Ours) | (MapStep::Reserve, MapState::Reserved) => return Ok(state),
            (MapStep::Confirm, MapState::None | MapState::Reserved) => TxnOp::put(map.key(), map.ours(), None),
            (MapStep::Reserve, MapState::None) => {
                let seconds = i64::try_from(RESERVED_FOR.as_secs()).unwrap_or(i64::MAX);
                let lease = client.lease_grant(seconds, None).await.map_err(failed)?;
                let under_it = PutOptions::new().with_lease(lease.id());
                TxnOp::put(map.key(), map.reservation(), Some(under_it))
            }
        };
        // The next read shows whether this took effect: another manager may have been first.
        client
            .txn(Txn::new().when([unchanged]).and_then([put]))
            .await
            .map_err(failed)?;
    }
    Err(StoreError::Unavailable(
        format!("other managers keep changing {}; try again", map.key()).into(),
    ))
}
