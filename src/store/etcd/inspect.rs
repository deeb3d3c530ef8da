//! Reading the state of a key without changing anything.

use std::sync::Arc;
use std::time::Duration;

use etcd_client::{GetOptions, SortOrder, SortTarget};

use super::Shared;
use super::error::EtcdError;
use super::link::Link;
use super::names::member;
use super::queue::tokens_of;
use crate::fence::FencingToken;
use crate::identity::parse_owner_tag;
use crate::key::LockKey;
use crate::mode::LockMode;
use crate::store::{Holder, INSPECTED_QUEUE_MAX, KeyState, StoreError};

pub(super) async fn inspect(shared: Arc<Shared>, link: Arc<Link>, key: LockKey) -> Result<KeyState, StoreError> {
    let prefix = shared.names.prefix(&key);
    let read = async |mut client: etcd_client::Client| {
        let options = GetOptions::new()
            .with_prefix()
            .with_sort(SortTarget::Create, SortOrder::Ascend)
            .with_limit(1 + INSPECTED_QUEUE_MAX as i64);
        client.get(prefix.as_str(), Some(options)).await
    };
    let (found, _) = link.request(read).await.map_err(EtcdError::into_store_error)?;
    shared.observe_revision(found.header());
    let mut members = found.kvs().iter();
    let Some(owner) = members.next() else {
        return Ok(KeyState {
            holder: None,
            holders: Vec::new(),
            holder_count: 0,
            permits_in_use: 0,
            queue_length: 0,
            queue: Vec::new(),
            last_token: None,
        });
    };
    let name = member(&prefix, owner.key());
    let is_manager = parse_owner_tag(&name).is_some();
    // The value is the number of tokens that came with the key's revision.
    let issued = owner.value_str().ok().and_then(|value| value.parse().ok());
    let tokens = issued.and_then(|count| tokens_of(owner.mod_revision(), count).ok());
    Ok(KeyState {
        holder: Some(Holder {
            remaining: remaining(&link, owner.lease()).await?,
            is_manager,
            owner: name,
            mode: LockMode::Exclusive,
        }),
        holders: Vec::new(),
        holder_count: 0,
        permits_in_use: 0,
        queue_length: u64::try_from(found.count().saturating_sub(1)).unwrap_or(0),
        queue: members.map(|waiting| member(&prefix, waiting.key())).collect(),
        last_token: tokens
            .filter(|_| is_manager)
            .and_then(|tokens| FencingToken::new(tokens.last())),
    })
}

/// The remaining time of a lease; a key without a lease never ends.
async fn remaining(link: &Link, lease: i64) -> Result<Option<Duration>, StoreError> {
    if lease == 0 {
        return Ok(None);
    }
    let ask = async |mut client: etcd_client::Client| client.lease_time_to_live(lease, None).await;
    match link.request(ask).await {
        Ok((left, _)) => Ok(Some(Duration::from_secs(u64::try_from(left.ttl()).unwrap_or(0)))),
        Err(EtcdError::LeaseGone) => Ok(Some(Duration::ZERO)),
        Err(error) => Err(error.into_store_error()),
    }
}
