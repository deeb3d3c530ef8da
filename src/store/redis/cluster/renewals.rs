//! Renews leases, whose slots are spread over the cluster.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::time::Duration;

use deadpool_redis::redis::Cmd;
use futures_util::StreamExt;
use futures_util::stream;

use super::super::batch::{self as batches, Part, RENEWALS_PER_CALL};
use super::super::reply::renewed;
use super::super::script::{LuaScript, Named};
use super::dispatch::{Call, CallError};
use super::inbox::Inbox;
use super::pool::NodePool;
use crate::clock::Moment;
use crate::key::Slot;
use crate::protocol::{RenewReply, Renewal};
use crate::store::{MapState, MapStep, StoreError};

/// How many calls may be in flight at a time.
const CALLS_AT_A_TIME: usize = 256;

/// Renews the leases that are still ours. If a node does not answer in time, only the renewals of
/// its slots fail.
///
/// # Errors
///
/// The cluster has another shard map by now.
pub(super) async fn renew(
    pool: &NodePool,
    inbox: &Inbox,
    batch: &[Renewal],
    limit: Duration,
) -> Result<Vec<Option<RenewReply>>, StoreError> {
    // Each call has leases of one slot and of one script.
    let mut by_slot: HashMap<(Slot, bool), Vec<usize>> = HashMap::new();
    for (index, renewal) in batch.iter().enumerate() {
        let slot = pool.shared.commands.names.of(&renewal.key).slot();
        // The inbox must stay subscribed while a lease is held for long or kept without a guard, so
        // that its holder is notified of waiters.
        inbox.keep_for(slot, renewal.ttl);
        let is_exclusive = renewal.cycle.mode().is_exclusive();
        by_slot.entry((slot, is_exclusive)).or_default().push(index);
    }
    let groups: Vec<(Slot, Vec<usize>)> = by_slot
        .iter()
        .flat_map(|((slot, _), indices)| indices.chunks(RENEWALS_PER_CALL).map(|group| (*slot, group.to_vec())))
        .collect();
    // The sender stops waiting at the limit itself, and the last attempt of a call ends before the
    // call does.
    let (now, share) = (tokio::time::Instant::now(), limit / 10);
    let (deadline, until) = (now + share * 9, now + share * 8);
    let mut replies = vec![None; batch.len()];
    let mut calls = stream::iter(groups)
        .map(|(slot, group)| async move {
            let renewed = tokio::time::timeout_at(deadline, renew_group(pool, slot, batch, &group, until)).await;
            (slot, group, renewed)
        })
        .buffer_unordered(CALLS_AT_A_TIME);
    let check = tokio::time::timeout_at(deadline, pool.map(MapStep::Read));
    let renewing = async {
        while let Some((slot, group, renewed)) = calls.next().await {
            match renewed {
                Ok(Ok(renewed)) => {
                    for (index, reply) in group.iter().zip(renewed) {
                        replies[*index] = reply;
                    }
                }
                Ok(Err(error)) => failed(pool, slot, group.len(), &error.to_string()),
                Err(_) => {
                    pool.shared.slots_are_stale.store(true, Ordering::Release);
                    failed(pool, slot, group.len(), &format!("no answer within {limit:?}"));
                }
            }
        }
    };
    let (map, ()) = tokio::join!(check, renewing);
    drop(calls);
    match map {
        Ok(Err(error @ StoreError::MapMismatch { .. })) => return Err(error),
        Ok(Ok(MapState::None | MapState::Reserved)) if RenewReply::some_are_extended(&replies) => {
            // The map was deleted while the leases were kept. Restore it before another map is
            // stored.
            let restored = tokio::time::timeout_at(deadline, pool.map(MapStep::Confirm)).await;
            if let Ok(Err(error @ StoreError::MapMismatch { .. })) = restored {
                return Err(error);
            }
        }
        // If the map can't be read, the renewals themselves report why.
        Ok(_) | Err(_) => {}
    }
    Ok(replies)
}

/// Logs that some leases of a slot were not renewed. A shard's outage is logged elsewhere.
fn failed(pool: &NodePool, slot: Slot, leases: usize, reason: &str) {
    let shared = &pool.shared;
    match shared.failed_renewals.admit(Moment::now()) {
        Some(suppressed) if shared.metrics.is_up() => {
            crate::log::warn!(shard = %shared.shard, %slot, reason, leases, suppressed, "failed to renew leases; retrying until they expire");
        }
        _ => crate::log::debug!(shard = %shared.shard, %slot, reason, leases, "failed to renew leases"),
    }
}

/// Renews leases of one slot. A refused call is resent in parts until each lease that the node
/// refuses is alone.
async fn renew_group(
    pool: &NodePool,
    slot: Slot,
    batch: &[Renewal],
    group: &[usize],
    until: tokio::time::Instant,
) -> Result<Vec<Option<RenewReply>>, StoreError> {
    let mut replies = vec![None; group.len()];
    // Indices into the group.
    let mut parts: Vec<Part> = vec![(0..group.len()).collect()];
    let (mut refused, mut count) = (None, 0_usize);
    while !parts.is_empty() {
        let calls = parts.into_iter().map(|part| async {
            let renewals: Vec<&Renewal> = part.iter().map(|&item| &batch[group[item]]).collect();
            (renew_part(pool, slot, &renewals, until).await, part)
        });
        let answers = futures_util::future::join_all(calls).await;
        parts = Vec::new();
        for (answer, part) in answers {
            match answer {
                Ok(renewed) => part
                    .iter()
                    .zip(renewed)
                    .for_each(|(&item, reply)| replies[item] = reply),
                Err(StoreError::Refused(_)) if part.len() > 1 => parts.extend(batches::halves(part)),
                Err(error @ StoreError::Refused(_)) => {
                    count += 1;
                    refused = refused.or_else(|| Some((part.first().map(|&item| &batch[group[item]].key), error)));
                }
                Err(error) => return Err(error),
            }
        }
    }
    match refused {
        Some((_, error)) if count == group.len() => Err(error),
        Some((key, error)) => {
            failed(pool, slot, count, &error.to_string());
            let key = key.map(tracing::field::display);
            crate::log::debug!(shard = %pool.shared.shard, %slot, key, %error, "the renewal of this lease was refused");
            Ok(replies)
        }
        None => Ok(replies),
    }
}

/// Renews leases of one slot in one call; all of them are exclusive, or none is.
async fn renew_part(
    pool: &NodePool,
    slot: Slot,
    renewals: &[&Renewal],
    until: tokio::time::Instant,
) -> Result<Vec<Option<RenewReply>>, StoreError> {
    let shared = &*pool.shared;
    let is_exclusive = renewals.iter().all(|renewal| renewal.cycle.mode().is_exclusive());
    let command = |named: Named| {
        let (commands, renewals) = (&shared.commands, renewals.iter().copied());
        match is_exclusive {
            true => {
                let fill = |command: &mut Cmd| commands.fill_renew(command, renewals.clone());
                shared.scripts.renew.command(named, fill)
            }
            false => {
                let fill = |command: &mut Cmd| commands.fill_renew_modes(command, renewals.clone());
                shared.scripts.modes.renew.command(named, fill)
            }
        }
    };
    let call = Call {
        slot,
        command: &command,
        wait: shared.wait_for_replicas(),
        stops_at_try_again: true,
        deadline: Some(Moment::now() + until.saturating_duration_since(tokio::time::Instant::now())),
    };
    match pool.call(call).await {
        Ok(node_reply) if !shared.has_acks(&node_reply) => Ok(vec![None; renewals.len()]),
        Ok(node_reply) => Ok(renewed(&node_reply.value, renewals.len())?
            .into_iter()
            .map(Some)
            .collect()),
        Err(CallError::Failed(error)) => Err(error),
        Err(CallError::TryAgain) => {
            let alone = renewals.iter().map(|renewal| renew_alone(pool, slot, renewal));
            let replies: Vec<Option<RenewReply>> = futures_util::future::join_all(alone).await;
            Ok(replies)
        }
    }
}

/// Renews one lease while its slot is being moved. A shared lease or permit has two keys, which may
/// be on different nodes. The marker comes first: if there is none, there is no lease, and one that
/// lasts for too long is deleted by the next request.
async fn renew_alone(pool: &NodePool, slot: Slot, renewal: &Renewal) -> Option<RenewReply> {
    let (commands, scripts) = (&pool.shared.commands, &pool.shared.scripts);
    if renewal.cycle.mode().is_exclusive() {
        let fill = |command: &mut Cmd| commands.fill_renew_alone(command, renewal);
        return renew_key(pool, slot, &scripts.renew_alone, &fill).await;
    }
    let fill = |command: &mut Cmd| commands.fill_renew_marker_alone(command, renewal);
    match renew_key(pool, slot, &scripts.renew_alone, &fill).await {
        Some(RenewReply::Extended { .. }) => {
            let fill = |command: &mut Cmd| commands.fill_renew_holder_alone(command, renewal);
            renew_key(pool, slot, &scripts.modes.renew_alone, &fill).await
        }
        reply => reply,
    }
}

/// Calls a script that renews a single key.
async fn renew_key(
    pool: &NodePool,
    slot: Slot,
    script: &LuaScript,
    fill: &(dyn Fn(&mut Cmd) + Send + Sync),
) -> Option<RenewReply> {
    let shared = &*pool.shared;
    let node_reply = match pool.script(script, slot, shared.wait_for_replicas(), None, fill).await {
        Ok(node_reply) if shared.has_acks(&node_reply) => node_reply,
        Ok(_) => return None,
        Err(error) => {
            let error = StoreError::from(error);
            crate::log::debug!(shard = %shared.shard, %slot, %error, "failed to renew a lease whose slot is being moved");
            return None;
        }
    };
    renewed(&node_reply.value, 1).ok()?.pop()
}
