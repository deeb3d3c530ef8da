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

use super::{Entry, Shard};
use crate::clock::Moment;
use crate::engine::StoreEvent;
use crate::engine::renewals::{Due, Renewals, time_limit};
use crate::protocol::{RenewReply, Renewal};
use crate::span::DebugSpan;
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
                let pass = scan(&shard);
                next_scan = Instant::now() + pass.pause(began.elapsed(), Moment::now());
                renewals_due.add(pass.due);
            }
            Some(ended) = renewals.join_next(), if !renewals.is_empty() => match ended {
                Ok(in_time) => renewals_due.ended(in_time),
                Err(error) => if let Ok(panic) = error.try_into_panic() {
                    std::panic::resume_unwind(panic);
                }
            }
        }
        while let Some(batch) = renewals_due.next(Moment::now()) {
            let span = DebugSpan::open(|| tracing::debug_span!("renew", shard = %shard.name, leases = batch.len()));
            let batch = batch.into_iter().map(|due| due.what).collect();
            renewals.spawn_local(span.around(renew(Arc::clone(&shard), batch)));
        }
        shard.set_strained(renewals_due.is_strained(shard.metrics.leases(), Moment::now()));
    }
}

/// Waits until something is due, but at least until `next_scan`.
async fn due(shard: &Shard, next_scan: Instant) {
    tokio::time::sleep_until(next_scan).await;
    shard.next_deadline.due().await;
}

/// What a pass over all keys has found.
struct Pass {
    /// The leases that are due for renewal, each with its key.
    due: Vec<Due<(Arc<Entry>, Renewal)>>,
    /// The shortest TTL of all leases.
    shortest: Duration,
    /// When the first lease with a guard ends, unless it is renewed.
    first_end: Option<Moment>,
}

impl Pass {
    /// How long to pause afterwards: a pass over many keys must leave most of the time to the
    /// renewals it finds. The pause is limited to a fraction of the shortest TTL, and it lasts at
    /// most until a guard has to learn that its lease has ended: the server may pass the key on
    /// shortly after.
    fn pause(&self, took: Duration, now: Moment) -> Duration {
        let until_first_end = self.first_end.map_or(Duration::MAX, |end| end.since(now));
        let pause = (4 * took).min(self.shortest / 20).min(until_first_end);
        pause.max(SCAN_EVERY_MIN)
    }
}

/// Applies the passage of time to every key.
fn scan(shard: &Arc<Shard>) -> Pass {
    // Reset first, so that deadlines set by tasks during the pass are kept.
    shard.next_deadline.reset();
    let mut pass = Pass {
        due: Vec::new(),
        shortest: Duration::MAX,
        first_end: None,
    };
    for entry in shard.entries() {
        let mut renewals = Vec::new();
        entry.apply_in_background(|queue, cx| {
            let effects = queue.tick(cx);
            renewals.extend(std::iter::from_fn(|| queue.renewal(cx)));
            if let Some(ttl) = queue.ttl() {
                pass.shortest = pass.shortest.min(ttl);
            }
            let ends = queue.guards().map(|(lease, _)| lease.valid_until());
            pass.first_end = ends.chain(pass.first_end).min();
            effects
        });
        for (cycle, ttl, late) in renewals {
            // Not under the mutex of the key: the recorder is foreign code.
            shard.metrics.renewal_lag.record(late.as_secs_f64());
            let key = entry.key.clone();
            let what = (Arc::clone(&entry), Renewal { key, cycle, ttl });
            pass.due
                .push(Due::new(what, ttl, late, &shard.manager.rules, Moment::now()));
        }
    }
    pass
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
                crate::log::debug!(key = %entry.key, shard = %shard.name, "a lease is no longer ours");
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Regression: with many keys, a pause could last longer than the time between the end of a
    /// lease here and at the server, and a guard learned of its loss after the next holder entered.
    #[test]
    fn pause_after_a_pass_ends_with_the_first_lease() {
        let now = Moment::now();
        let pause = |took: u64, first_end: Option<u64>| {
            let pass = Pass {
                due: Vec::new(),
                shortest: Duration::from_secs(10),
                first_end: first_end.map(|millis| now + Duration::from_millis(millis)),
            };
            pass.pause(Duration::from_millis(took), now).as_millis()
        };
        assert_eq!([pause(0, None), pause(50, None), pause(1_000, None)], [1, 200, 500]);
        assert_eq!(
            [pause(50, Some(300)), pause(50, Some(30)), pause(50, Some(0))],
            [200, 30, 1]
        );
    }

    #[tokio::test]
    async fn pass_finds_the_first_end_of_a_lease() {
        let locks = crate::LockManager::connect("memory://").await.unwrap();
        let shard = &locks.inner.shards[0];
        assert!(scan(shard).first_end.is_none());
        let _long = locks.lock("long").ttl(Duration::from_secs(600)).await.unwrap();
        let short = locks.lock("short").ttl(Duration::from_secs(60)).shared().await.unwrap();
        let seconds = || scan(shard).first_end.unwrap().since(Moment::now()).as_secs();
        assert!(seconds() < 60);
        drop(short);
        assert!(seconds() > 60);
    }
}
