//! What happens to waiters while the store is unreachable.
//!
//! # Implementation details
//!
//! A request without a reply or without a connection is sent again for the same cycle, as long as
//! any waiter still tolerates the outage ([`InOutage`]). The store treats such requests as one. A
//! grant pushed meanwhile only triggers an immediate retry: it can only be checked against an
//! enqueue mark, and the reply with the mark never arrived.
//!
//! Retry delays grow and are random. The shard computes them, and it records when the outage began:
//! the queue reads no clock and draws no random numbers.

use std::time::Duration;

use super::effect::Effects;
use super::phase::Phase;
use super::types::{Context, InOutage, Outcome};
use super::{Queue, WaiterId};
use crate::clock::Moment;
use crate::error::LockError;
use crate::protocol::Cycle;

/// The store is unreachable, as seen by the shard.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StoreOutage {
    /// When the outage began.
    pub(crate) since: Moment,
    /// How long a waiter without its own limit waits through an outage.
    pub(crate) patience: Duration,
    /// When to retry.
    pub(crate) retry_at: Moment,
}

/// The outage that affects the waiters of a key, from the first failed request to the next reply.
#[derive(Debug)]
pub(super) struct KeyOutage {
    store: StoreOutage,
    error: LockError,
    /// The number of failed requests.
    attempts: u32,
    /// When the next waiter runs out of patience.
    deadline: Option<Moment>,
}

/// Deadlines are rounded up to multiples of this (16.8 ms, a power of two in nanoseconds), so that
/// thousands of affected keys need few checks.
const GRID: u64 = 1 << 24;

impl KeyOutage {
    /// Until when a waiter that enqueued at `since` waits. `None` if the waiter has its own limit.
    fn bears_until(&self, waits: InOutage, since: Moment) -> Option<Moment> {
        match waits {
            InOutage::Fail => Some(since),
            InOutage::UntilStoreTimeout => Some(since.max(self.store.since) + self.store.patience),
            InOutage::UntilOwnLimit => None,
        }
    }

    /// The outage after another failed request.
    pub(super) fn after(before: Option<Box<Self>>, outage: StoreOutage, error: &LockError) -> Self {
        let since = before.as_ref().map_or(outage.since, |before| before.store.since);
        Self {
            store: StoreOutage { since, ..outage },
            error: error.clone(),
            attempts: before.map_or(0, |before| before.attempts).saturating_add(1),
            deadline: None,
        }
    }

    /// The waiters that have run out of patience, with their outcomes. Finds the next deadline.
    pub(super) fn expired_waiters(
        &mut self,
        waiters: impl Iterator<Item = (WaiterId, InOutage, Moment)>,
        cx: Context<'_>,
    ) -> Vec<(WaiterId, Outcome)> {
        self.deadline = None;
        let mut failed = Vec::new();
        for (id, in_outage, since) in waiters {
            match self.bears_until(in_outage, since) {
                Some(until) if until <= cx.now => {
                    let error = self.error.clone().after(cx.now.since(since));
                    failed.push((id, Outcome::Failed(error)));
                }
                Some(_) => self.note_deadline(in_outage, since),
                None => {}
            }
        }
        failed
    }

    /// Accounts for a waiter.
    pub(super) fn note_deadline(&mut self, in_outage: InOutage, since: Moment) {
        if let Some(until) = self.bears_until(in_outage, since) {
            self.deadline = Some(self.deadline.map_or(until, |earlier| earlier.min(until)));
        }
    }

    /// The outcome for a waiter that arrives now and does not tolerate an outage.
    pub(super) fn refuses(&self, in_outage: InOutage) -> Option<Outcome> {
        (in_outage == InOutage::Fail).then(|| Outcome::Failed(self.error.clone().after(Duration::ZERO)))
    }

    pub(super) const fn error(&self) -> &LockError {
        &self.error
    }

    /// When the next waiter runs out of patience.
    pub(super) const fn deadline(&self) -> Option<Moment> {
        self.deadline
    }
}

impl<W> Queue<W> {
    /// The number of requests that failed since the last reply.
    pub(crate) fn failed_attempts(&self) -> u32 {
        self.outage.as_ref().map_or(0, |outage| outage.attempts)
    }

    /// Why the last request got no reply, if it failed.
    pub(crate) fn outage(&self) -> Option<&LockError> {
        self.outage.as_ref().map(|outage| &outage.error)
    }

    /// A request failed. Waiters that do not tolerate the outage, or no longer do, fail. The others
    /// keep waiting if the store is unreachable.
    pub(super) fn on_outage_failure(
        &mut self,
        error: &LockError,
        outage: Option<StoreOutage>,
        cx: Context<'_>,
        effects: &mut Effects<W>,
    ) {
        let Some(outage) = outage else {
            return self.fail_all(&Outcome::Failed(error.clone()), effects);
        };
        self.outage = Some(Box::new(KeyOutage::after(self.outage.take(), outage, error)));
        self.fail_impatient(cx, effects);
        if self.waiters.is_empty() {
            self.outage = None;
        }
    }

    /// Fails the waiters that have run out of patience.
    pub(super) fn fail_impatient(&mut self, cx: Context<'_>, effects: &mut Effects<W>) {
        let Some(outage) = &mut self.outage else { return };
        let line = self.waiters.iter();
        let failed = outage.expired_waiters(
            line.map(|(id, waiter)| (id, waiter.options.in_outage, waiter.since)),
            cx,
        );
        for (id, outcome) in failed {
            self.resolve(id, outcome, effects);
        }
    }

    /// The outcome for a waiter that arrives during an outage and does not tolerate one.
    pub(super) fn refused_by_outage(&self, in_outage: InOutage) -> Option<Outcome> {
        match (&self.phase, &self.outage) {
            (Phase::Retrying { .. }, Some(outage)) => outage.refuses(in_outage),
            _ => None,
        }
    }

    /// Accounts for a new waiter.
    pub(super) fn note_deadline(&mut self, in_outage: InOutage, since: Moment) {
        if let Some(outage) = &mut self.outage {
            outage.note_deadline(in_outage, since);
        }
    }

    /// When the next retry is due or the next waiter fails, rounded up to the grid.
    pub(super) fn outage_deadline(&self) -> Option<Moment> {
        let outage = self.outage.as_ref()?;
        let retry_at = matches!(self.phase, Phase::Retrying { .. }).then_some(outage.store.retry_at);
        let earliest = retry_at.into_iter().chain(outage.deadline).min()?;
        // The grid begins with the outage, so each process has its own.
        let since = outage.store.since.as_nanos();
        let nanos = earliest.as_nanos().saturating_sub(since);
        Some(Moment::from_nanos(
            nanos.div_ceil(GRID).saturating_mul(GRID).saturating_add(since),
        ))
    }

    /// Time passed during an outage.
    pub(super) fn tick_in_outage(&mut self, cx: Context<'_>, effects: &mut Effects<W>) {
        let Some(outage) = &self.outage else { return };
        let retry_at = outage.store.retry_at;
        if outage.deadline.is_some_and(|deadline| cx.now >= deadline) {
            self.fail_impatient(cx, effects);
        }
        if let Phase::Retrying { cycle, .. } = self.phase {
            if self.waiters.is_empty() {
                self.stop_retrying(cycle, effects);
            } else if cx.now >= retry_at {
                self.retry_acquire(cx, effects);
            }
        }
    }

    /// No waiter is left. The store may still know the cycle.
    pub(super) fn stop_retrying(&mut self, cycle: Cycle, effects: &mut Effects<W>) {
        effects.abandon(cycle);
        self.phase = Phase::Idle;
        self.outage = None;
    }
}
