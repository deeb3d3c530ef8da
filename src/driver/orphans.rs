//! Cycles that are over but may still exist in the store. Each is released until the store
//! confirms.
//!
//! # Implementation details
//!
//! Each shard runs a service for this on the background thread ([`clean`]). The cost of abandoned
//! cycles is bounded. Each is a key and a number in a list, and a manager keeps at most
//! [`PENDING_MAX`] of them. A shard sends at most [`AT_A_TIME_MAX`] releases at a time. This number is
//! halved by each release without a reply and grows by one with each reply, so that old releases do
//! not crowd out new requests when a server comes back. Cycles beyond the limits are left to
//! expire. So is a lease whose release has failed for as long as the longest TTL.
//!
//! The first attempt uses a foreground connection, where an acquire of the same cycle may still be
//! in flight: the release arrives after it. Further attempts use the background connection, which
//! works even if the application's runtime is gone. But a reply that arrives there proves nothing
//! about requests in flight elsewhere. Neither does a reply that arrives after a connection was
//! given up. An acquire may execute later and acquire the lease for a cycle that is over. Such a
//! cycle is released once more when no request of it can arrive any more
//! ([`LATE_MAX`](crate::store::LATE_MAX)). The same applies to a cycle whose acquire was sent again
//! on another connection and got its reply there.

use std::cmp::{Ordering as Order, Reverse};
use std::collections::{BinaryHeap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::sync::mpsc;

use super::{Job, Shard, Usage};
use crate::backoff::Backoff;
use crate::clock::Moment;
use crate::key::LockKey;
use crate::protocol::{Cycle, Release};
use crate::store::{Priority, StoreError};

const PAUSE_MIN: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// The longest pause after a while: a server that is down for hours is not queried every second for
/// each key. Kept short because a shutdown of the manager waits for it.
const PAUSE_LATER: Duration = Duration::from_secs(4);
/// How many cycles of a manager may wait for their release.
const PENDING_MAX: usize = 100_000;
/// The largest and smallest number of releases that a shard sends at a time. If one of several
/// nodes does not reply, the others still need a share.
const AT_A_TIME_MAX: usize = 1_000;
const AT_A_TIME_MIN: usize = 64;
/// How many cycles of a shard may wait to be released once more.
const DOUBTED_MAX: usize = 10_000;
/// How often it is logged that leases are left to expire.
const COMPLAIN_EVERY: Duration = Duration::from_secs(10);

/// A cycle that is over and has to be released.
#[derive(Debug)]
pub(crate) struct Abandoned {
    pub(super) key: LockKey,
    pub(super) cycle: Cycle,
    since: Moment,
    /// Whether no request of the cycle can arrive any more after its release.
    is_final: bool,
    _pending: PendingRelease,
}

impl Abandoned {
    /// Returns `None` if too many cycles are waiting already.
    pub(super) fn new(usage: &Arc<Usage>, key: &LockKey, cycle: Cycle) -> Option<Self> {
        Some(Self {
            key: key.clone(),
            cycle,
            since: Moment::now(),
            is_final: false,
            _pending: PendingRelease::note(usage)?,
        })
    }
}

/// What remains to be done for a cycle.
#[derive(Debug)]
pub(super) enum Work {
    Release(Abandoned),
    /// Release the cycle once it is over and no request of it can arrive late.
    Doubt {
        key: LockKey,
        cycle: Cycle,
    },
}

/// A cycle to be released, or one whose release failed.
struct Failed {
    abandoned: Abandoned,
    backoff: Backoff,
    due: Moment,
}

/// Ordered by the time of the next attempt.
impl Ord for Failed {
    fn cmp(&self, other: &Self) -> Order {
        (self.due, self.abandoned.cycle).cmp(&(other.due, other.abandoned.cycle))
    }
}

impl PartialOrd for Failed {
    fn partial_cmp(&self, other: &Self) -> Option<Order> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Failed {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Failed {}

/// A cycle that will be released once more.
struct Doubted {
    key: LockKey,
    cycle: Cycle,
    due: Moment,
    is_postponed: bool,
}

/// The cycles of a shard that are over.
struct Cleaner {
    shard: Arc<Shard>,
    fresh: VecDeque<Abandoned>,
    failed: BinaryHeap<Reverse<Failed>>,
    /// Ordered by due time.
    doubted: VecDeque<Doubted>,
    at_a_time: usize,
    left_to_run_out: u64,
    complained_at: Option<Moment>,
}

/// Releases the cycles it receives, for as long as it is polled.
pub(super) async fn clean(shard: Arc<Shard>, mut work: mpsc::UnboundedReceiver<Work>) {
    let mut cleaner = Cleaner::new(shard);
    let mut under_way = FuturesUnordered::new();
    loop {
        let now = Moment::now();
        cleaner.take_doubted(now);
        while under_way.len() < cleaner.at_a_time
            && let Some(next) = cleaner.next(now)
        {
            under_way.push(Box::pin(attempt(Arc::clone(&cleaner.shard), next)));
        }
        let pause = match under_way.len() < cleaner.at_a_time {
            true => cleaner.next_due().map(|due| due.since(now)),
            false => None,
        };
        tokio::select! {
            received = work.recv() => match received {
                Some(Work::Release(abandoned)) => cleaner.fresh.push_back(abandoned),
                Some(Work::Doubt { key, cycle }) => cleaner.doubt(key, cycle, false),
                // The background thread is gone.
                None => return,
            },
            Some((failed, released)) = under_way.next(), if !under_way.is_empty() => cleaner.ended(failed, released),
            () = tokio::time::sleep(pause.unwrap_or_default()), if pause.is_some() => {}
        }
    }
}

/// Tries to release a cycle once. Returns the class of connection on which the reply
/// arrived.
async fn attempt(shard: Arc<Shard>, failed: Failed) -> (Failed, Result<Priority, StoreError>) {
    let Abandoned { key, cycle, .. } = &failed.abandoned;
    let release = |priority| {
        let release = Release {
            key: key.clone(),
            cycle: *cycle,
            requeue: None,
            nobody_waits: false,
            tokens: shard.rules.max_burst,
        };
        tokio::time::timeout(shard.timeout, shard.store.release(priority, release))
    };
    let is_first = failed.due == failed.abandoned.since;
    if is_first && matches!(release(Priority::Foreground).await, Ok(Ok(_))) {
        return (failed, Ok(Priority::Foreground));
    }
    let released = match release(Priority::Background).await {
        Ok(Ok(_)) => Ok(Priority::Background),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(shard.no_answer()),
    };
    (failed, released)
}

impl Cleaner {
    fn new(shard: Arc<Shard>) -> Self {
        Self {
            shard,
            fresh: VecDeque::new(),
            failed: BinaryHeap::new(),
            doubted: VecDeque::new(),
            at_a_time: AT_A_TIME_MAX,
            left_to_run_out: 0,
            complained_at: None,
        }
    }

    /// The next cycle whose release is due.
    fn next(&mut self, now: Moment) -> Option<Failed> {
        if self.failed.peek().is_some_and(|Reverse(failed)| failed.due <= now) {
            return self.failed.pop().map(|Reverse(failed)| failed);
        }
        self.fresh.pop_front().map(|abandoned| Failed {
            backoff: Backoff::new(PAUSE_MIN, PAUSE_MAX),
            due: abandoned.since,
            abandoned,
        })
    }

    /// When the next release or repetition is due.
    fn next_due(&self) -> Option<Moment> {
        let failed = self.failed.peek().map(|Reverse(failed)| failed.due);
        let doubted = self.doubted.front().map(|doubted| doubted.due);
        failed.into_iter().chain(doubted).min()
    }

    /// A request of the cycle may still arrive.
    fn doubt(&mut self, key: LockKey, cycle: Cycle, is_postponed: bool) {
        if self.doubted.len() >= DOUBTED_MAX {
            return self.leave_to_run_out("too many requests were cut off at once");
        }
        self.doubted.push_back(Doubted {
            key,
            cycle,
            due: Moment::now() + self.shard.late_max,
            is_postponed,
        });
    }

    /// No request of these cycles can arrive any more. A cycle that is still in use here is
    /// skipped: it is released as usual when it is over.
    fn take_doubted(&mut self, now: Moment) {
        while self.doubted.front().is_some_and(|doubted| doubted.due <= now)
            && let Some(doubted) = self.doubted.pop_front()
        {
            let Doubted {
                key,
                cycle,
                is_postponed,
                ..
            } = doubted;
            let entry = self.shard.table.get(&key);
            if entry.is_some_and(|entry| entry.is_current(cycle)) {
                continue;
            }
            if !is_postponed && self.was_cut_lately(now) {
                // The connection used for its acquire may have been given up only after that.
                self.doubt(key, cycle, true);
            } else if let Some(abandoned) = Abandoned::new(&self.shard.usage, &key, cycle) {
                self.fresh.push_back(Abandoned {
                    is_final: true,
                    ..abandoned
                });
            }
        }
    }

    /// Whether a request sent on a connection that was given up may still arrive.
    fn was_cut_lately(&self, now: Moment) -> bool {
        let is_recent = |cut| now.since(cut) < self.shard.late_max;
        self.shard.store.last_cut().is_some_and(is_recent)
    }

    fn ended(&mut self, failed: Failed, released: Result<Priority, StoreError>) {
        let now = Moment::now();
        match &released {
            Err(StoreError::Unavailable(_)) => self.at_a_time = (self.at_a_time / 2).max(AT_A_TIME_MIN),
            _ => self.at_a_time = (self.at_a_time + 1).min(AT_A_TIME_MAX),
        }
        match released {
            Ok(priority) => {
                let Abandoned {
                    key, cycle, is_final, ..
                } = failed.abandoned;
                if !is_final && (priority != Priority::Foreground || self.was_cut_lately(now)) {
                    self.doubt(key, cycle, false);
                }
            }
            Err(error) => self.not_released(failed, &error, now),
        }
        if self.shard.usage.ending.load(Ordering::SeqCst) && self.shard.usage.has_no_pending_releases() {
            self.shard.send(Job::CheckIdle);
        }
    }

    /// Retries, unless the lease must have expired by now. A manager that shuts down does not wait
    /// for the longest leases.
    fn not_released(&mut self, mut failed: Failed, error: &StoreError, now: Moment) {
        if matches!(error, StoreError::MapMismatch { .. }) {
            // Managers with the other map do not use this lease, and this manager holds nothing on
            // the shard any more. The lease expires.
            return;
        }
        let is_refused = !matches!(error, StoreError::Unavailable(_));
        let waited = now.since(failed.abandoned.since);
        let patience = match (self.shard.usage.ending.load(Ordering::SeqCst), is_refused) {
            (true, true) => Duration::ZERO,
            (true, false) => self.shard.default_ttl,
            (false, _) => self.shard.longest_ttl(),
        };
        if waited >= patience {
            tracing::debug!(key = %failed.abandoned.key, "a lease of this key could not be released");
            return self.leave_to_run_out(&error.reason());
        }
        // A refused release may be accepted once replicas are back or a disk has space again, which
        // takes a while.
        let bound = if is_refused { PAUSE_MAX } else { PAUSE_MIN };
        failed
            .backoff
            .set_limits(bound, (waited / 16).clamp(PAUSE_MAX, PAUSE_LATER));
        failed.due = now + failed.backoff.next_delay();
        self.failed.push(Reverse(failed));
    }

    /// Logged at most every [`COMPLAIN_EVERY`], because an outage may leave very many. During an
    /// outage, which has its own log line, only at debug level.
    fn leave_to_run_out(&mut self, reason: &str) {
        if self.shard.is_in_outage() {
            return tracing::debug!(shard = %self.shard.name, reason, "a lease is left to expire during an outage");
        }
        self.left_to_run_out += 1;
        let now = Moment::now();
        if self.complained_at.is_some_and(|at| now.since(at) < COMPLAIN_EVERY) {
            return;
        }
        self.complained_at = Some(now);
        let leases = std::mem::take(&mut self.left_to_run_out);
        let reason = crate::text::printable(reason);
        tracing::warn!(
            shard = %self.shard.name,
            leases,
            %reason,
            "leases of failed requests could not be released; those that exist expire with their ttl"
        );
    }
}

/// Counts one cycle as waiting for its release until dropped.
#[derive(Debug)]
struct PendingRelease(Arc<Usage>);

impl PendingRelease {
    /// Returns `None` if the limit is reached. This is logged once, and again only after the number
    /// has fallen to half the limit.
    fn note(usage: &Arc<Usage>) -> Option<Self> {
        let may = |owed: usize| (owed < PENDING_MAX).then_some(owed + 1);
        if usage
            .pending_releases
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, may)
            .is_ok()
        {
            return Some(Self(Arc::clone(usage)));
        }
        if !usage.limit_reported.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                limit = PENDING_MAX,
                "too many leases wait to be released; further ones are left to expire with their ttl"
            );
        }
        None
    }
}

impl Drop for PendingRelease {
    fn drop(&mut self) {
        if self.0.pending_releases.fetch_sub(1, Ordering::AcqRel) <= PENDING_MAX / 2 {
            self.0.limit_reported.store(false, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_owed_has_a_limit_and_room_again() {
        let usage = Arc::new(Usage::new(Box::default()));
        let mut owed: Vec<PendingRelease> = std::iter::from_fn(|| PendingRelease::note(&usage)).collect();
        assert_eq!(owed.len(), PENDING_MAX);
        assert!(usage.limit_reported.load(Ordering::Relaxed));
        owed.pop();
        owed.extend(PendingRelease::note(&usage));
        assert_eq!(owed.len(), PENDING_MAX);
        owed.truncate(PENDING_MAX / 2 - 1);
        assert!(!usage.limit_reported.load(Ordering::Relaxed));
        drop(owed);
        assert!(usage.has_no_pending_releases());
    }
}
