//! The watchdog of a shard: renews what is held, tells what is lost, and looks after what waits too long.
//!
//! # Implementation details
//!
//! It runs on the background thread and sleeps until something is due ([`Watch`](crate::shard::Shard)). A look goes through
//! all keys of the shard: time passes for each of them, and all leases that are due for renewal, or soon will be, go
//! out in one batch, so that a hundred thousand leases cost one look and a few hundred script calls in each tenth of their TTL.
//! Batches do not wait for one another: one that hangs does not delay the next.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tracing::Instrument;

use crate::clock::Moment;
use crate::protocol::{RenewReply, Renewal};
use crate::shard::{Entry, Shard};
use crate::store::StoreError;
use crate::telemetry::RequestKind;

/// The shortest time between two looks, so that a thousand keys that are due one after the other cost few looks.
const LOOK_EVERY_MIN: Duration = Duration::from_millis(1);

/// Keeps the leases of a shard alive for as long as the background thread lives.
///
/// # Panics
///
/// If a renewal does: its leases would never be renewed again.
pub(crate) async fn keep_alive(shard: Arc<Shard>) {
    let mut renewals = JoinSet::new();
    loop {
        tokio::select! {
            () = shard.watch.due() => {}
            Some(ended) = renewals.join_next(), if !renewals.is_empty() => {
                if let Err(error) = ended && let Ok(panic) = error.try_into_panic() {
                    std::panic::resume_unwind(panic);
                }
                continue;
            }
        }
        for batch in look(&shard) {
            let span = tracing::debug_span!("renew", shard = %shard.name, leases = batch.len());
            renewals.spawn_local(renew(Arc::clone(&shard), batch).instrument(span));
        }
        tokio::time::sleep(LOOK_EVERY_MIN).await;
    }
}

/// Lets time pass for every key. Returns what is due for renewal, in batches.
fn look(shard: &Arc<Shard>) -> Vec<Vec<(Arc<Entry>, Renewal)>> {
    // First, so that what a task tells during the look is not forgotten.
    shard.watch.reset();
    let mut due: Vec<(Arc<Entry>, Renewal)> = Vec::new();
    for entry in shard.entries() {
        let mut renewal = None;
        entry.in_background(|queue, cx| {
            let effects = queue.tick(cx);
            renewal = queue.renewal(cx);
            effects
        });
        if let Some((cycle, ttl, late)) = renewal {
            // Not under the mutex of the key: the recorder is foreign code.
            shard.metrics.renewal_lag.record(late.as_secs_f64());
            let key = entry.key.clone();
            due.push((entry, Renewal { key, cycle, ttl }));
        }
    }
    batches(due, |(_, renewal)| renewal.ttl)
}

/// Parts in which no TTL is more than twice the shortest: a batch waits for its answer for a part of its shortest TTL, which may be too short a time for
/// any answer, and must not be so for leases that could bear more.
fn batches<T>(mut due: Vec<T>, ttl: impl Fn(&T) -> Duration) -> Vec<Vec<T>> {
    due.sort_by_key(&ttl);
    let mut batches = Vec::new();
    while let Some(shortest) = due.first().map(&ttl) {
        let longer = due.split_off(due.partition_point(|one| ttl(one) <= 2 * shortest));
        batches.push(std::mem::replace(&mut due, longer));
    }
    batches
}

/// Renews a batch and tells the queues.
async fn renew(shard: Arc<Shard>, due: Vec<(Arc<Entry>, Renewal)>) {
    let sent_at = Moment::now();
    let batch: Vec<Renewal> = due.iter().map(|(_, renewal)| renewal.clone()).collect();
    // A batch that hangs must leave time for another before the first lease of it ends.
    let shortest = batch.iter().map(|renewal| renewal.ttl).min().unwrap_or(shard.timeout);
    let limit = shard.timeout.min((shortest / 3).max(Duration::from_millis(10)));
    let replies = tokio::time::timeout(limit, shard.store.renew(batch, limit)).await;
    let replies =
        replies.unwrap_or_else(|_| Err(StoreError::Unavailable(format!("no answer within {limit:?}").into())));
    shard
        .metrics
        .request(RequestKind::Renew, Moment::now().since(sent_at), replies.is_ok());
    shard.note_reach(&replies);
    if shard.note_map(&replies) {
        // Also what was acquired since that was first noticed.
        shard.disown();
        return;
    }
    let replies = match replies {
        Ok(replies) => replies,
        Err(error) => {
            let error = shard.error(error, RequestKind::Renew.step(), None, sent_at);
            shard.renewal_failed(&error, due.len());
            vec![None; due.len()]
        }
    };
    for ((entry, renewal), reply) in due.into_iter().zip(replies) {
        match reply {
            Some(RenewReply::Extended { .. }) => shard.metrics.renewed.increment(1),
            // What was given back meanwhile is not ours either, as it should be.
            Some(RenewReply::NotOurs) if entry.holds(renewal.cycle) => {
                tracing::debug!(key = %entry.key, shard = %shard.name, "a lease is not ours any more");
                shard.metrics.renewed_not_ours.increment(1);
            }
            Some(RenewReply::NotOurs) => {}
            None => shard.metrics.renewal_failed.increment(1),
        }
        entry.in_background(|queue, cx| queue.renewed(renewal.cycle, renewal.ttl, sent_at, reply, cx));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leases_that_can_wait_are_not_in_a_batch_with_those_that_cannot() {
        let millis = |ttls: &[u64]| ttls.iter().copied().map(Duration::from_millis).collect::<Vec<_>>();
        let of = |ttls: &[u64]| batches(millis(ttls), |&ttl| ttl);
        assert!(of(&[]).is_empty());
        assert_eq!(of(&[10_000; 3]), [millis(&[10_000; 3])]);
        assert_eq!(
            of(&[10_000, 150, 300, 301, 150, 20_000, 20_001]),
            [
                millis(&[150, 150, 300]),
                millis(&[301]),
                millis(&[10_000, 20_000]),
                millis(&[20_001])
            ]
        );
    }
}
