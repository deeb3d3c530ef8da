//! Reading the state of a key without changing anything.

use std::sync::Arc;
use std::time::Duration;

use etcd_client::{GetOptions, GetResponse, KeyValue, SortOrder, SortTarget};
use futures_util::{StreamExt, TryStreamExt};

use super::Shared;
use super::error::EtcdError;
use super::link::Link;
use super::names::member;
use super::queue::{MEMBERS_MAX, Member, Queue, in_i64, tokens_of};
use crate::fence::FencingToken;
use crate::identity::parse_owner_tag;
use crate::key::LockKey;
use crate::mode::LockMode;
use crate::store::{Holder, INSPECTED_MAX, KeyState, StoreError};

/// How many leases are asked for their time at once.
const LEASES_AT_A_TIME: usize = 16;

pub(super) async fn inspect(shared: Arc<Shared>, link: Arc<Link>, key: LockKey) -> Result<KeyState, StoreError> {
    let prefix = shared.names.prefix(&key);
    let mut found = read(&shared, &link, &prefix, 1 + INSPECTED_MAX).await?;
    let first = found.kvs().first().map(Member::of);
    let is_exclusive = first.is_none_or(|first| first.mode().is_exclusive());
    if !is_exclusive && found.more() {
        // Any number of members may hold the key together.
        found = read(&shared, &link, &prefix, MEMBERS_MAX).await?;
    }
    let queue = Queue::of(&found, 0);
    let (holding, waiting) = found.kvs().split_at(queue.holders());
    let inspected = holding.iter().take(INSPECTED_MAX);
    let inspected: Vec<_> = inspected.map(|kv| holder(&link, &prefix, kv)).collect();
    let holders: Vec<Holder> = futures_util::stream::iter(inspected)
        .buffered(LEASES_AT_A_TIME)
        .try_collect()
        .await?;
    let mut state = KeyState {
        holder: None,
        holders: Vec::new(),
        holder_count: 0,
        permits_in_use: queue
            .members
            .iter()
            .take(holding.len())
            .map(|member| member.mode().weight())
            .sum(),
        queue_length: queue.waiting(),
        queue: waiting
            .iter()
            .take(INSPECTED_MAX)
            .map(|kv| member(&prefix, kv.key()))
            .collect(),
        last_token: holding.iter().filter_map(|kv| last_token(&prefix, kv)).max(),
    };
    if is_exclusive {
        state.holder = holders.into_iter().next();
    } else {
        state.holder_count = holding.len() as u64;
        state.holders = holders;
        state
            .holders
            .sort_by(|a, b| (a.remaining, &a.owner).cmp(&(b.remaining, &b.owner)));
    }
    Ok(state)
}

/// Reads the first members of the key's queue, with their values.
async fn read(shared: &Shared, link: &Link, prefix: &str, count: usize) -> Result<GetResponse, StoreError> {
    let read = async |mut client: etcd_client::Client| {
        let options = GetOptions::new()
            .with_prefix()
            .with_sort(SortTarget::Create, SortOrder::Ascend)
            .with_limit(in_i64(count));
        client.get(prefix, Some(options)).await
    };
    let (found, _) = link.request(read).await.map_err(EtcdError::into_store_error)?;
    shared.observe_revision(found.header());
    Ok(found)
}

async fn holder(link: &Link, prefix: &str, kv: &KeyValue) -> Result<Holder, StoreError> {
    let owner = member(prefix, kv.key());
    let cycle = parse_owner_tag(&owner).map(|(_, cycle)| cycle);
    Ok(Holder {
        remaining: remaining(link, kv.lease()).await?,
        is_manager: cycle.is_some(),
        mode: cycle.map_or(LockMode::Exclusive, |cycle| cycle.mode()),
        owner,
    })
}

/// The last token of a holder, if a manager has written its key.
fn last_token(prefix: &str, kv: &KeyValue) -> Option<FencingToken> {
    parse_owner_tag(&member(prefix, kv.key()))?;
    // The value is the number of tokens that came with the key's revision.
    let count = kv.value_str().ok()?.parse().ok()?;
    FencingToken::new(tokens_of(kv.mod_revision(), count).ok()?.last())
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
