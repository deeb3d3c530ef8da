//! What becomes of the waiters while the store can't be reached.
//!
//! # Implementation details
//!
//! A request without an answer, or without a connection, is sent again for the same cycle, which the store takes for one request, as long as a waiter
//! is left that bears an outage for so long ([`InOutage`]). A grant that is pushed meanwhile only makes the queue ask: whether it counts is known by
//! the mark of a reply that never came.
//!
//! The delays grow and are random. They are the shard's matter, as is the time at which the outage began: the queue reads no clock and draws no numbers.

use std::time::Duration;

use super::effect::Effects;
use super::phase::Phase;
use super::terms::{Context, InOutage, Outcome};
use super::{Queue, WaiterId};
use crate::clock::Moment;
use crate::error::LockError;
use crate::protocol::Cycle;

/// That the store can't be reached, as the shard sees it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Outage {
    /// Since when.
    pub(crate) since: Moment,
    /// How long a waiter without a limit of its own bears that.
    pub(crate) patience: Duration,
    /// When to ask again.
    pub(crate) retry_at: Moment,
}

/// The outage that the waiters of a key are in, from the first request that failed to the next that is answered.
#[derive(Debug)]
pub(super) struct Trouble {
    outage: Outage,
    error: LockError,
    /// How many requests have failed.
    attempts: u32,
    /// When the next waiter has borne it for long enough.
    deadline: Option<Moment>,
}

/// Times are rounded up to multiples of this, 16.8 ms, so that thousands of keys in trouble cost few looks. A power of two.
const GRID: u64 = 1 << 24;

impl Trouble {
    /// Until when a waiter bears it that came at that moment. `None` if that is its own matter.
    fn bears_until(&self, waits: InOutage, since: Moment) -> Option<Moment> {
        match waits {
            InOutage::Fail => Some(since),
            InOutage::UntilStoreTimeout => Some(since.max(self.outage.since) + self.outage.patience),
            InOutage::UntilOwnLimit => None,
        }
    }
}

impl<W> Queue<W> {
    /// How many requests have failed since the last that was answered.
    pub(crate) fn failed_attempts(&self) -> u32 {
        self.trouble.as_ref().map_or(0, |trouble| trouble.attempts)
    }

    /// Why there was no answer so far, if the last request had none.
    pub(crate) fn trouble(&self) -> Option<&LockError> {
        self.trouble.as_ref().map(|trouble| &trouble.error)
    }

    /// A request failed. Those who do not bear that, or not any more, are told; the others wait on if the store can't be reached.
    pub(super) fn suffer(
        &mut self,
        error: &LockError,
        outage: Option<Outage>,
        cx: Context<'_>,
        effects: &mut Effects<W>,
    ) {
        let Some(outage) = outage else {
            return self.fail_all(&Outcome::Failed(Box::new(error.clone())), effects);
        };
        let before = self.trouble.take();
        let since = before.as_ref().map_or(outage.since, |before| before.outage.since);
        self.trouble = Some(Box::new(Trouble {
            outage: Outage { since, ..outage },
            error: error.clone(),
            attempts: before.map_or(0, |before| before.attempts).saturating_add(1),
            deadline: None,
        }));
        self.fail_impatient(cx, effects);
        if self.waiters.is_empty() {
            self.trouble = None;
        }
    }

    /// Tells those who have borne the trouble for as long as they want to.
    pub(super) fn fail_impatient(&mut self, cx: Context<'_>, effects: &mut Effects<W>) {
        let Some(trouble) = &mut self.trouble else { return };
        trouble.deadline = None;
        let mut failed: Vec<(WaiterId, Outcome)> = Vec::new();
        for (id, waiter) in self.waiters.iter() {
            let Some(until) = trouble.bears_until(waiter.want.in_outage, waiter.since) else {
                continue;
            };
            if until <= cx.now {
                let error = trouble.error.clone().after(cx.now.since(waiter.since));
                failed.push((id, Outcome::Failed(Box::new(error))));
            } else {
                trouble.deadline = Some(trouble.deadline.map_or(until, |earlier| earlier.min(until)));
            }
        }
        for (id, outcome) in failed {
            self.settle(id, outcome, effects);
        }
    }

    /// What a waiter that comes during an outage is told at once, if it does not bear one.
    pub(super) fn refused_by_outage(&self, in_outage: InOutage) -> Option<Outcome> {
        match (&self.phase, &self.trouble) {
            (Phase::Retrying { .. }, Some(trouble)) if in_outage == InOutage::Fail => {
                let error = trouble.error.clone().after(Duration::ZERO);
                Some(Outcome::Failed(Box::new(error)))
            }
            _ => None,
        }
    }

    /// A waiter came.
    pub(super) fn bear(&mut self, in_outage: InOutage, since: Moment) {
        if let Some(trouble) = &mut self.trouble
            && let Some(until) = trouble.bears_until(in_outage, since)
        {
            trouble.deadline = Some(trouble.deadline.map_or(until, |earlier| earlier.min(until)));
        }
    }

    /// When the store is asked again, or the next waiter is told; later by less than the grid.
    pub(super) fn look_at_trouble(&self) -> Option<Moment> {
        let trouble = self.trouble.as_ref()?;
        let retry_at = matches!(self.phase, Phase::Retrying { .. }).then_some(trouble.outage.retry_at);
        let earliest = retry_at.into_iter().chain(trouble.deadline).min()?;
        // In steps of its own for each process, since the moment at which the outage began is in it.
        let phase = trouble.outage.since.as_nanos() % GRID;
        let nanos = earliest.as_nanos().saturating_sub(phase);
        Some(Moment::from_nanos(
            nanos.div_ceil(GRID).saturating_mul(GRID).saturating_add(phase),
        ))
    }

    /// Time passed in an outage.
    pub(super) fn tick_in_trouble(&mut self, cx: Context<'_>, effects: &mut Effects<W>) {
        let Some(trouble) = &self.trouble else { return };
        let retry_at = trouble.outage.retry_at;
        if trouble.deadline.is_some_and(|deadline| cx.now >= deadline) {
            self.fail_impatient(cx, effects);
        }
        if let Phase::Retrying { cycle, .. } = self.phase {
            if self.waiters.is_empty() {
                self.stop_retrying(cycle, effects);
            } else if cx.now >= retry_at {
                self.ask_again(effects);
            }
        }
    }

    /// Nobody waits any more. The store may know of the cycle.
    pub(super) fn stop_retrying(&mut self, cycle: Cycle, effects: &mut Effects<W>) {
        effects.abandon(cycle);
        self.phase = Phase::Idle;
        self.trouble = None;
    }
}
