//! Drives the pending releases of a shard ([`engine::orphans`](crate::engine::orphans) has the
//! rules): sends what is due, with the priority that each attempt needs, and reports the results.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::sync::mpsc;

use super::{Job, Shard, Usage};
use crate::clock::Moment;
use crate::engine::BLOCK_OF_GRANT;
use crate::engine::orphans::{Attempt, Circumstances, OrphanRules, Orphans, PENDING_MAX, Released, Verdict};
use crate::key::LockKey;
use crate::protocol::{Cycle, Release};
use crate::random;
use crate::rate_limit::RateLimit;
use crate::store::{Priority, StoreError};

/// A cycle that is over and has to be released.
#[derive(Debug)]
pub(crate) struct Abandoned {
    pub(super) key: LockKey,
    cycle: Cycle,
    since: Moment,
    pending: PendingRelease,
}

impl Abandoned {
    /// Returns `None` if too many cycles are waiting already.
    pub(super) fn new(usage: &Arc<Usage>, key: &LockKey, cycle: Cycle) -> Option<Self> {
        Some(Self {
            key: key.clone(),
            cycle,
            since: Moment::now(),
            pending: PendingRelease::note(usage).or_else(|| {
                usage.leave_to_expire();
                None
            })?,
        })
    }
}

/// What remains to be done for a cycle.
#[derive(Debug)]
pub(super) enum Work {
    Release(Abandoned),
    /// Release the cycle once it is over and no request of it can arrive late.
    ReleaseAgain {
        key: LockKey,
        cycle: Cycle,
    },
}

type Sent = Attempt<LockKey, PendingRelease>;

/// The cycles of a shard that are over.
struct Cleaner {
    shard: Arc<Shard>,
    orphans: Orphans<LockKey, PendingRelease>,
    /// Limits log lines about leases that are left to expire, because an outage may leave very
    /// many.
    log_limit: RateLimit,
}

/// Releases the cycles it receives, for as long as it is polled.
pub(super) async fn clean(shard: Arc<Shard>, mut work: mpsc::UnboundedReceiver<Work>) {
    let mut cleaner = Cleaner::new(shard);
    let mut in_flight = FuturesUnordered::new();
    loop {
        let now = Moment::now();
        cleaner.start_second_releases(now);
        while let Some(next) = cleaner.orphans.next(now) {
            in_flight.push(Box::pin(attempt(Arc::clone(&cleaner.shard), next)));
        }
        let pause = cleaner.orphans.next_due().map(|due| due.since(now));
        tokio::select! {
            received = work.recv() => match received {
                Some(Work::Release(Abandoned { key, cycle, since, pending })) => {
                    cleaner.orphans.add(key, cycle, pending, since);
                }
                Some(Work::ReleaseAgain { key, cycle }) => {
                    let verdict = cleaner.orphans.release_again_later(key, cycle, Moment::now());
                    cleaner.report(&verdict, None);
                }
                // The background thread is gone.
                None => return,
            },
            Some((attempt, released)) = in_flight.next(), if !in_flight.is_empty() => cleaner.ended(attempt, released),
            () = tokio::time::sleep(pause.unwrap_or_default()), if pause.is_some() => {}
        }
    }
}

/// Tries to release a cycle, and once more in the background if the first attempt fails.
async fn attempt(shard: Arc<Shard>, mut attempt: Sent) -> (Sent, Result<(), StoreError>) {
    loop {
        let release = Release {
            key: attempt.key.clone(),
            cycle: attempt.cycle,
            requeue: None,
            nobody_waits: false,
            tokens: BLOCK_OF_GRANT,
            retire_until: shard.manager.min_holds.until(attempt.cycle, Moment::now()),
        };
        let priority = match attempt.is_ordered() {
            true => Priority::Foreground,
            false => Priority::Background,
        };
        let released = match tokio::time::timeout(shard.manager.timeout, shard.store.release(priority, release)).await {
            Ok(Ok(_)) => return (attempt, Ok(())),
            Ok(Err(error)) => error,
            Err(_) => shard.no_answer(),
        };
        if !attempt.falls_back() {
            return (attempt, Err(released));
        }
    }
}

impl Cleaner {
    fn new(shard: Arc<Shard>) -> Self {
        Self {
            orphans: Orphans::new(OrphanRules::new(shard.manager.late_max)),
            shard,
            log_limit: RateLimit::default(),
        }
    }

    /// Schedules the second release of cycles of which no request can arrive any more.
    fn start_second_releases(&mut self, now: Moment) {
        let shard = Arc::clone(&self.shard);
        let is_current = |key: &LockKey, cycle: Cycle| {
            let entry = shard.table.get(key, cycle.mode());
            entry.is_some_and(|entry| entry.is_current(cycle))
        };
        while let Some(verdict) = self
            .orphans
            .next_second_release(now, shard.store.last_cut(), is_current, || {
                PendingRelease::note(&shard.manager.usage)
            })
        {
            self.report(&verdict, None);
        }
    }

    fn ended(&mut self, attempt: Sent, released: Result<(), StoreError>) {
        let (released, error) = match released {
            Ok(()) => {
                self.shard.manager.min_holds.forget(attempt.cycle);
                (Released::Confirmed, None)
            }
            Err(error) => (
                match error {
                    StoreError::Unavailable(_) => Released::Unavailable,
                    StoreError::Refused(_) => Released::Refused,
                    StoreError::MapMismatch { .. } => Released::OtherMap,
                },
                Some(error),
            ),
        };
        let usage = Arc::clone(&self.shard.manager.usage);
        let is_ending = usage.ending.load(Ordering::SeqCst);
        let circumstances = Circumstances {
            now: Moment::now(),
            last_cut: self.shard.store.last_cut(),
            is_ending,
            default_ttl: self.shard.manager.default_ttl,
            longest_ttl: self.shard.longest_ttl(),
        };
        let (key, is_final) = (attempt.key.clone(), attempt.is_final());
        let verdict = self
            .orphans
            .on_result(attempt, released, circumstances, random::time_in);
        self.report(&verdict, error.as_ref());
        if let Verdict::LeftToExpire(pending) = verdict {
            crate::log::debug!(%key, "a lease of this key could not be released");
            if !is_final {
                pending.leave_to_expire();
            }
        }
        if is_ending && usage.has_no_pending_releases() {
            self.shard.send(Job::CheckIdle);
        }
    }

    fn report(&mut self, verdict: &Verdict<PendingRelease>, error: Option<&StoreError>) {
        match verdict {
            Verdict::Done | Verdict::ReleasedAgainLater | Verdict::Retried => {}
            Verdict::LeftToExpire(_) => {
                let reason = error.map(StoreError::reason).unwrap_or_default();
                self.log_left_to_expire(&reason);
            }
            Verdict::TooManySecondReleases => self.log_left_to_expire("too many requests were cut off at once"),
        }
    }

    /// During an outage, which has its own log line, this is logged only at debug level.
    fn log_left_to_expire(&mut self, reason: &str) {
        if self.shard.is_in_outage() {
            return crate::log::debug!(shard = %self.shard.name, reason, "a lease is left to expire during an outage");
        }
        let Some(suppressed) = self.log_limit.admit(Moment::now()) else {
            return;
        };
        let leases = suppressed + 1;
        let reason = crate::text::printable(reason);
        crate::log::warn!(
            shard = %self.shard.name,
            leases,
            %reason,
            "leases of failed requests could not be released; those that exist expire with their ttl"
        );
    }
}

/// Counts one cycle as waiting for its release until dropped.
#[derive(Debug)]
pub(super) struct PendingRelease(Arc<Usage>);

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
            crate::log::warn!(
                limit = PENDING_MAX,
                "too many leases wait to be released; further ones are left to expire with their ttl"
            );
        }
        None
    }

    /// Gives the release up. The lease counts as pending until it counts as left to expire.
    fn leave_to_expire(self) {
        self.0.leave_to_expire();
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
    fn pending_releases_are_limited_and_completed_ones_make_room() {
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
