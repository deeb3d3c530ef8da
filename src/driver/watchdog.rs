//! The watchdog of a shard: renews held leases, reports lost ones, and sends the acquires of queued
//! cycles again when they are due.
//!
//! # Implementation details
//!
//! The watchdog runs on the background thread and sleeps until something is due
//! ([`NextDeadline`](super::deadline::NextDeadline)). Each pass goes through all keys of the shard
//! and applies the passage of time to each. All leases that are due for renewal, or will be soon,
//! are renewed in batches. So a hundred thousand leases cost one pass and a few hundred script
//! calls per tenth of their TTL. Batches are independent: one that hangs does not delay the next.
//! They only wait here if there are more than a server handles in time ([`Renewals`]).

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;
use tracing::Instrument;

use super::{Entry, Shard};
use crate::clock::Moment;
use crate::engine::StoreEvent;
use crate::engine::renewals::{Due, Renewals, time_limit};
use crate::protocol::{RenewReply, Renewal};
use crate::store::StoreError;
use crate::telemetry::RequestKind;

/// The shortest interval between two passes.
const SCAN_EVERY_MIN: Duration = Duration::from_millis(1);

/// Keeps the leases of a shard alive for as long as the background thread lives.
///
/// # Panics
///
/// Panics if a renewal does: its leases would never be renewed again.
pub(crate) async fn keep_alive(shard: Arc<Shard>) {
    let mut renewals = JoinSet::new();
    let mut renewals_due = Renewals::new();
    let mut next_scan = Instant::now();
    loop {
        tokio::select! {
            () = due(&shard, next_scan) => {
                let began = Instant::now();
                let (due, shortest) = scan(&shard);
                renewals_due.add(due);
                next_scan = Instant::now() + pause(began.elapsed(), shortest);
            }
            Some(ended) = renewals.join_next(), if !renewals.is_empty() => match ended {
                Ok(in_time) => renewals_due.ended(in_time),
                Err(error) => if let Ok(panic) = error.try_into_panic() {
                    std::panic::resume_unwind(panic);
                }
            }
        }
        while let Some(batch) = renewals_due.next(Moment::now()) {
            let span = tracing::debug_span!("renew", shard = %shard.name, leases = batch.len());
            let batch = batch.into_iter().map(|due| due.what).collect();
            renewals.spawn_local(renew(Arc::clone(&shard), batch).instrument(span));
        }
        shard.set_strained(renewals_due.is_strained(shard.metrics.leases(), Moment::now()));
    }
}

/// Waits until something is due, but at least until `next_scan`.
async fn due(shard: &Shard, next_scan: Instant) {
    tokio::time::sleep_until(next_scan).await;
    shard.next_deadline.due().await;
}

/// How long to pause after a pass: a pass over many keys must leave most of the time to the
/// renewals it finds. The pause is limited to a fraction of the shortest TTL.
fn pause(took: Duration, shortest: Duration) -> Duration {
    SCAN_EVERY_MIN.max((4 * took).min(shortest / 20))
}

/// A lease that is due for renewal, and its key.
type DueRenewal = Due<(Arc<Entry>, Renewal)>;

/// Applies the passage of time to every key. Returns the leases due for renewal, and the shortest
/// TTL of all leases.
fn scan(shard: &Arc<Shard>) -> (Vec<DueRenewal>, Duration) {
    // Reset first, so that deadlines set by tasks during the pass are kept.
    shard.next_deadline.reset();
    let (mut all_due, mut shortest) = (Vec::new(), Duration::MAX);
    for entry in shard.entries() {
        let mut renewals = Vec::new();
        entry.apply_in_background(|queue, cx| {
            let effects = queue.tick(cx);
            renewals.extend(std::iter::from_fn(|| queue.renewal(cx)));
            if let Some(ttl) = queue.ttl() {
                shortest = shortest.min(ttl);
            }
            effects
        });
        for (cycle, ttl, late) in renewals {
            // Not under the mutex of the key: the recorder is foreign code.
            shard.metrics.renewal_lag.record(late.as_secs_f64());
            let key = entry.key.clone();
            let what = (Arc::clone(&entry), Renewal { key, cycle, ttl });
            all_due.push(Due::new(what, ttl, late, &shard.manager.rules, Moment::now()));
        }
    }
    (all_due, shortest)
}

/// Renews a batch and reports the results to the queues. Returns whether the store replied for all
/// of it in time.
async fn renew(shard: Arc<Shard>, mut due: Vec<(Arc<Entry>, Renewal)>) -> bool {
    // Leases may have been released while the batch waited for its turn.
    due.retain(|(entry, renewal)| entry.holds(renewal.cycle));
    if due.is_empty() {
        return true;
    }
    let sent_at = Moment::now();
    let batch: Vec<Renewal> = due.iter().map(|(_, renewal)| renewal.clone()).collect();
    let limit = time_limit(batch.iter().map(|renewal| renewal.ttl), shard.manager.timeout);
    let replies = tokio::time::timeout(limit, shard.store.renew(batch, limit)).await;
    let replies = replies.unwrap_or_else(|_| Err(StoreError::no_answer(limit)));
    shard
        .metrics
        .request(RequestKind::Renew, Moment::now().since(sent_at), replies.is_ok());
    shard.note_reach(&replies);
    if shard.note_map(&replies) {
        // This also covers leases acquired since the mismatch was first noticed.
        shard.disown();
        return true;
    }
    let replies = match replies {
        Ok(replies) => replies,
        Err(error) => {
            let error = shard.error(error, RequestKind::Renew.step(), None, sent_at);
            shard.renewal_failed(&error, due.len());
            vec![None; due.len()]
        }
    };
    let in_time = replies.iter().all(Option::is_some);
    for ((entry, renewal), reply) in due.into_iter().zip(replies) {
        match reply {
            Some(RenewReply::Extended { .. }) => shard.metrics.renewed.increment(1),
            // A lease released in the meantime is reported as not ours, too. That is expected.
            Some(RenewReply::NotOurs) if entry.holds(renewal.cycle) => {
                tracing::debug!(key = %entry.key, shard = %shard.name, "a lease is no longer ours");
                shard.metrics.renewed_not_ours.increment(1);
            }
            Some(RenewReply::NotOurs) => {}
            None => shard.metrics.renewal_failed.increment(1),
        }
        let (cycle, ttl) = (renewal.cycle, renewal.ttl);
        entry.receive(cycle, StoreEvent::RenewalReply { ttl, sent_at, reply });
    }
    in_time
}
