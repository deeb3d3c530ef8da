//! Cycles that are over and that a store may still know of: each is released until the store has done it.
//!
//! # Implementation details
//!
//! Each shard has a service for this on the background thread ([`clean`]). What an abandoned cycle costs is bounded: it is a key and a number in a list, of
//! which there are at most [`OWED_MAX`]; at most [`AT_A_TIME_MAX`] of a shard are being released. That number is halved by each release without an answer and
//! grows by one with each that is answered, so that a server that is back is not kept from new requests by old releases. What is beyond the limits is left to run out, as is a lease
//! whose release fails until the longest TTL has passed.
//!
//! The first attempt travels on the caller's lane, where an acquire of that cycle may still be on its way: the release arrives after it. The next ones travel
//! on the background's, which works even if the program's runtime is gone. A release that was answered there proves nothing about what is on its way
//! elsewhere, and nor does one that was answered after a connection had been given up: an acquire may be executed after it and take the lease for a
//! cycle that is over. Such a cycle is released once more when nothing of it can arrive any more ([`LATE_MAX`](crate::store::LATE_MAX)). The same is done
//! for a cycle whose acquire was sent again on another connection and answered there.

use std::cmp::{Ordering as Order, Reverse};
use std::collections::{BinaryHeap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::sync::mpsc;

use super::{Job, Load, Shard};
use crate::backoff::Backoff;
use crate::clock::Moment;
use crate::key::LockKey;
use crate::protocol::{Cycle, Release};
use crate::store::{Lane, StoreError};

const PAUSE_MIN: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// The longest after a while: a server that is away for hours is not asked every second for each key. The end of the manager waits for it.
const PAUSE_LATER: Duration = Duration::from_secs(4);
/// How many cycles of a manager may wait for their release.
const OWED_MAX: usize = 100_000;
/// How many releases of a shard are sent at a time, at most and at least: if one node of several gives no answer, the others must have some, too.
const AT_A_TIME_MAX: usize = 1_000;
const AT_A_TIME_MIN: usize = 64;
/// How many cycles of a shard may wait to be released once more.
const DOUBTED_MAX: usize = 10_000;
/// How often it is logged that leases are left to run out.
const COMPLAIN_EVERY: Duration = Duration::from_secs(10);

/// A cycle that is over and has to be released.
#[derive(Debug)]
pub(crate) struct Abandoned {
    pub(super) key: LockKey,
    pub(super) cycle: Cycle,
    since: Moment,
    /// Whether nothing of it can arrive any more once it is released.
    is_final: bool,
    _owed: Owed,
}

impl Abandoned {
    /// `None` if too many wait already.
    pub(super) fn new(load: &Arc<Load>, key: &LockKey, cycle: Cycle) -> Option<Self> {
        Some(Self {
            key: key.clone(),
            cycle,
            since: Moment::now(),
            is_final: false,
            _owed: Owed::note(load)?,
        })
    }
}

/// What is left to do for a cycle.
#[derive(Debug)]
pub(super) enum Work {
    Release(Abandoned),
    /// Release it once it is over and nothing of it can arrive any more.
    Doubt {
        key: LockKey,
        cycle: Cycle,
    },
}

/// One whose release failed.
struct Failed {
    abandoned: Abandoned,
    backoff: Backoff,
    due: Moment,
}

/// Its order is that of the next attempts.
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

/// A cycle that is released once more.
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
    /// In the order of their moments.
    doubted: VecDeque<Doubted>,
    at_a_time: usize,
    left_to_run_out: u64,
    complained_at: Option<Moment>,
}

/// Releases the cycles that it is given, for as long as it is polled.
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

/// Releases a cycle, unless the store does not do it now. Says on which lane it was answered.
async fn attempt(shard: Arc<Shard>, failed: Failed) -> (Failed, Result<Lane, StoreError>) {
    let Abandoned { key, cycle, .. } = &failed.abandoned;
    let release = |lane| {
        let release = Release {
            key: key.clone(),
            cycle: *cycle,
            requeue: None,
            nobody_waits: false,
            tokens: shard.rules.max_burst,
        };
        tokio::time::timeout(shard.timeout, shard.store.release(lane, release))
    };
    let is_first = failed.due == failed.abandoned.since;
    if is_first && matches!(release(Lane::Caller).await, Ok(Ok(_))) {
        return (failed, Ok(Lane::Caller));
    }
    let released = match release(Lane::Background).await {
        Ok(Ok(_)) => Ok(Lane::Background),
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

    /// The next one whose release is due.
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

    /// When the next one is due, if none is.
    fn next_due(&self) -> Option<Moment> {
        let failed = self.failed.peek().map(|Reverse(failed)| failed.due);
        let doubted = self.doubted.front().map(|doubted| doubted.due);
        failed.into_iter().chain(doubted).min()
    }

    /// Something of that cycle may still arrive.
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

    /// Nothing of these cycles can arrive any more. One that is still under way here is released as any other when it is over.
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
                // The connection that its acquire was sent on may have been given up only then.
                self.doubt(key, cycle, true);
            } else if let Some(abandoned) = Abandoned::new(&self.shard.load, &key, cycle) {
                self.fresh.push_back(Abandoned {
                    is_final: true,
                    ..abandoned
                });
            }
        }
    }

    /// Whether something that was sent on a connection before that was given up may still arrive.
    fn was_cut_lately(&self, now: Moment) -> bool {
        let is_recent = |cut| now.since(cut) < self.shard.late_max;
        self.shard.store.last_cut().is_some_and(is_recent)
    }

    fn ended(&mut self, failed: Failed, released: Result<Lane, StoreError>) {
        let now = Moment::now();
        match &released {
            Err(StoreError::Unavailable(_)) => self.at_a_time = (self.at_a_time / 2).max(AT_A_TIME_MIN),
            _ => self.at_a_time = (self.at_a_time + 1).min(AT_A_TIME_MAX),
        }
        match released {
            Ok(lane) => {
                let Abandoned {
                    key, cycle, is_final, ..
                } = failed.abandoned;
                if !is_final && (lane != Lane::Caller || self.was_cut_lately(now)) {
                    self.doubt(key, cycle, false);
                }
            }
            Err(error) => self.not_released(failed, &error, now),
        }
        if self.shard.load.ending.load(Ordering::SeqCst) && self.shard.load.owes_nothing() {
            self.shard.send(Job::Look);
        }
    }

    /// Tries again, unless its lease must have run out by now. A manager that ends does not wait for the leases that last longest.
    fn not_released(&mut self, mut failed: Failed, error: &StoreError, now: Moment) {
        if matches!(error, StoreError::MapMismatch { .. }) {
            // Nobody of that map asks for the lease here, and this manager holds nothing there any more: it runs out.
            return;
        }
        let is_refused = !matches!(error, StoreError::Unavailable(_));
        let waited = now.since(failed.abandoned.since);
        let patience = match (self.shard.load.ending.load(Ordering::SeqCst), is_refused) {
            (true, true) => Duration::ZERO,
            (true, false) => self.shard.default_ttl,
            (false, _) => self.shard.longest_ttl(),
        };
        if waited >= patience {
            tracing::debug!(key = %failed.abandoned.key, "the key of a lease that could not be given back");
            return self.leave_to_run_out(&error.reason());
        }
        // What was refused may be accepted once replicas are back or a disk has room again, which takes a while.
        let bound = if is_refused { PAUSE_MAX } else { PAUSE_MIN };
        failed
            .backoff
            .set_limits(bound, (waited / 16).clamp(PAUSE_MAX, PAUSE_LATER));
        failed.due = now + failed.backoff.next_delay();
        self.failed.push(Reverse(failed));
    }

    /// Logged once in a while: an outage may leave very many. Not while the shard is known to be down, which was logged.
    fn leave_to_run_out(&mut self, reason: &str) {
        if self.shard.is_in_outage() {
            return tracing::debug!(shard = %self.shard.name, reason, "a lease is left to run out during an outage");
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
            "leases of requests that failed could not be given back; those that exist end with their ttl"
        );
    }
}

/// One of the cycles that wait for their release, until it is dropped.
#[derive(Debug)]
struct Owed(Arc<Load>);

impl Owed {
    /// `None` if there are as many as there may be, which is logged once until there are few again.
    fn note(load: &Arc<Load>) -> Option<Self> {
        let may = |owed: usize| (owed < OWED_MAX).then_some(owed + 1);
        if load.owed.fetch_update(Ordering::AcqRel, Ordering::Acquire, may).is_ok() {
            return Some(Self(Arc::clone(load)));
        }
        if !load.owes_too_many.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                limit = OWED_MAX,
                "too many leases wait to be given back; further ones are left to end with their ttl"
            );
        }
        None
    }
}

impl Drop for Owed {
    fn drop(&mut self) {
        if self.0.owed.fetch_sub(1, Ordering::AcqRel) <= OWED_MAX / 2 {
            self.0.owes_too_many.store(false, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_owed_has_a_limit_and_room_again() {
        let load = Arc::new(Load::new(Box::default()));
        let mut owed: Vec<Owed> = std::iter::from_fn(|| Owed::note(&load)).collect();
        assert_eq!(owed.len(), OWED_MAX);
        assert!(load.owes_too_many.load(Ordering::Relaxed));
        owed.pop();
        owed.extend(Owed::note(&load));
        assert_eq!(owed.len(), OWED_MAX);
        owed.truncate(OWED_MAX / 2 - 1);
        assert!(!load.owes_too_many.load(Ordering::Relaxed));
        drop(owed);
        assert!(load.owes_nothing());
    }
}
