//! The queue of one key inside one manager: a pure state machine.
//!
//! # Implementation details
//!
//! Events come in as method calls (a task wants the key, gives up, releases; a reply, a grant, a renewal came; time
//! passed), effects come out ([`Effects`]: a request to send, cycles to clean up, waiters to wake). Nothing in here reads
//! a clock, knows a task or talks to a store, so that the same code runs in the product, in the exhaustive tests and in the
//! simulation. No waker and no notifier is called or dropped in here, since the caller holds the mutex of the key: wakers
//! leave through the effects, to be called or dropped after the mutex is released.
//!
//! A manager is at most one contender for a key: however many tasks wait, one *cycle* stands in the store's queue. When
//! the lease is there, local waiters get it one after the other, in the order in which they came, each with a token of
//! its own from the block that came with the lease. Once remote waiters are known, that goes on for `max_burst` guards or
//! `max_slice`, whichever ends first; then the lease is released and the process joins the tail of the store's queue in the same
//! request, so that bypass is bounded.
//!
//! At most one request for the key is on its way at any time, the renewals of the watchdog aside, which take nothing
//! that is not ours. Its reply is told by [`Queue::replied`] or [`Queue::released_remotely`], and where there will be none, by
//! [`Queue::failed`] or [`Queue::dropped`]. A request that failed since the store can't be reached is repeated while a waiter is left that bears
//! that (`outage`). After those the store may know of cycles that are over; they are *abandoned*: released in the
//! background until an answer comes.
//!
//! Who may enter when a grant is pushed is decided by three rules, all in [`Queue::granted`].

mod answers;
mod asking;
mod effect;
mod holding;
mod outage;
mod phase;
mod terms;
#[cfg(test)]
mod tests;
mod time;
mod waiters;

use std::sync::Arc;
use std::time::Duration;

pub(crate) use effect::{Bound, Effects, Rare, Request, Wake};
pub(crate) use outage::Outage;
#[cfg(test)]
pub(crate) use terms::Flaw;
pub(crate) use terms::{Context, Granted, InOutage, Linger, Outcome, Path, Room, Rules, Want};
pub(crate) use waiters::WaiterId;

use crate::clock::Moment;
use crate::error::{LockError, LossReason};
use crate::fence::FencingToken;
use crate::lease::Lease;
use crate::protocol::Cycle;
use outage::Trouble;
use phase::{Held, Phase, Queued, Tenant};
use waiters::Waiters;

/// Bounds for the size of a block of tokens.
const BLOCK_MIN: u64 = 64;
const BLOCK_MAX: u64 = 1 << 16;
/// What an extension brings at least where the lease is kept: a message for every thousand locks is none.
const BLOCK_LINGERING: u64 = 1024;

/// What must be taken off a TTL because two clocks do not run equally fast, and for the granularity of timers: the
/// allowance of the Redlock description, 1 % and 2 ms.
pub(crate) fn drift(ttl: Duration) -> Duration {
    ttl / 100 + Duration::from_millis(2)
}

#[derive(Debug)]
struct Waiter<W> {
    want: Want,
    since: Moment,
    /// How to tell the waiter that its outcome is there. Taken when it is told.
    waker: Option<W>,
    outcome: Option<Outcome>,
}

/// The queue of one key. `W` is what wakes a waiter.
#[derive(Debug)]
pub(crate) struct Queue<W> {
    phase: Phase,
    waiters: Waiters<Waiter<W>>,
    /// The TTL of the next request: that of the waiter which is or was first.
    ttl: Duration,
    /// The epoch in which the request under way, or the last one, was made.
    asked_in: u32,
    /// Set while requests of this key fail since the store can't be reached.
    trouble: Option<Box<Trouble>>,
    /// Whether remote waiters were seen in the last tenure, so that the free path is not worth a try.
    rivals_seen: bool,
    /// Set by a shutdown: whoever still comes is refused.
    closed: bool,
    /// Set when nobody will want the key any more: a lease that has no guard is given back at once.
    keeps_nothing: bool,
}

impl<W> Queue<W> {
    pub(crate) const fn new() -> Self {
        Self {
            phase: Phase::Idle,
            waiters: Waiters::new(),
            ttl: Duration::from_secs(1),
            asked_in: 0,
            trouble: None,
            rivals_seen: false,
            closed: false,
            keeps_nothing: false,
        }
    }

    /// Whether nothing would be lost if this were thrown away.
    pub(crate) fn is_unused(&self) -> bool {
        matches!(self.phase, Phase::Idle) && self.waiters.is_unused()
    }

    /// Whether the lease is ours.
    pub(crate) const fn holds(&self) -> bool {
        matches!(self.phase, Phase::Held(_))
    }

    /// Whether the reply to a request decides on what follows.
    pub(crate) const fn awaits_store(&self) -> bool {
        match &self.phase {
            Phase::Asking(_) | Phase::Releasing { .. } => true,
            Phase::Held(held) => held.extending,
            Phase::Idle | Phase::Queued(_) | Phase::Retrying { .. } => false,
        }
    }

    /// The TTL that the lease is renewed with.
    pub(crate) const fn ttl(&self) -> Duration {
        self.ttl
    }

    /// Whether that cycle is under way here: asked for, queued, held, or being released.
    pub(crate) fn is_current(&self, cycle: Cycle) -> bool {
        match &self.phase {
            Phase::Idle => false,
            Phase::Asking(asking) => asking.cycle == cycle || asking.releases == Some(cycle),
            Phase::Retrying { cycle: current, .. } => *current == cycle,
            Phase::Queued(queued) => queued.cycle == cycle,
            Phase::Held(held) => held.lease.cycle == cycle,
            Phase::Releasing { cycle: current, .. } => *current == cycle,
        }
    }

    /// The cycle that stands in the store's queue, if one does.
    pub(crate) const fn queued_cycle(&self) -> Option<Cycle> {
        match &self.phase {
            Phase::Queued(queued) => Some(queued.cycle),
            _ => None,
        }
    }

    /// How many tasks wait.
    pub(crate) const fn waiting(&self) -> usize {
        self.waiters.len()
    }

    /// The first who waits has waited since then.
    pub(crate) fn waiting_since(&self) -> Option<Moment> {
        let first = self.waiters.first().and_then(|id| self.waiters.get(id));
        first.map(|first| first.since)
    }

    /// Until when the lease is kept without a guard, if it is.
    pub(crate) const fn lingers_until(&self) -> Option<Moment> {
        match &self.phase {
            Phase::Held(held) => held.lingers_until(),
            _ => None,
        }
    }

    /// Whether the lease is kept without a guard, or is just given back after that, and nobody here wants it.
    pub(crate) const fn is_spare(&self) -> bool {
        match &self.phase {
            Phase::Held(held) => held.lingers_until().is_some(),
            Phase::Releasing { lingered, .. } => *lingered && self.waiters.is_empty(),
            Phase::Idle | Phase::Asking(_) | Phase::Retrying { .. } | Phase::Queued(_) => false,
        }
    }

    /// Whether whoever comes now has to wait for somebody.
    pub(crate) const fn is_contended(&self) -> bool {
        let is_taken = match &self.phase {
            Phase::Held(held) => held.lingers_until().is_none(),
            Phase::Queued(_) => true,
            Phase::Idle | Phase::Asking(_) | Phase::Retrying { .. } | Phase::Releasing { .. } => false,
        };
        is_taken || self.waiters.len() > 1
    }

    /// The lease that is ours, and the token of the guard under it, if one is out.
    pub(crate) fn lease(&self) -> Option<(&Lease, Option<FencingToken>)> {
        let Phase::Held(held) = &self.phase else { return None };
        Some((&held.lease, held.guard().map(|holder| holder.token)))
    }

    /// Whether other managers were seen to want the key in the last tenure.
    pub(crate) const fn rivals_seen(&self) -> bool {
        self.rivals_seen
    }

    /// A task wants the key. Its outcome is there to be [`collect`](Self::collect)ed when its waker comes out of an
    /// effect, or at once.
    pub(crate) fn want(&mut self, want: Want, waker: Option<W>, cx: Context<'_>) -> (WaiterId, Effects<W>) {
        let mut effects = Effects::none();
        let refused = if self.closed {
            Some(Outcome::Failed(Box::new(LockError::Closed)))
        } else if want.only_try && !self.is_free_for_a_try() {
            Some(Outcome::Busy)
        } else {
            self.refused_by_outage(want.in_outage)
        };
        let settled = refused.is_some();
        // A waiter whose outcome is there keeps no waker.
        let waker = if !settled {
            waker
        } else if want.only_try {
            // A try looks at once.
            effects.discarded = waker;
            None
        } else {
            // It may be asleep by the time it could look.
            effects.wake(waker);
            None
        };
        let id = self.waiters.push_back(Waiter {
            want,
            since: cx.now,
            waker,
            outcome: refused,
        });
        if settled {
            self.waiters.detach(id);
            return (id, effects);
        }
        match &self.phase {
            Phase::Idle => {
                self.rivals_seen |= want.expects_rivals;
                self.ask(cx, &mut effects);
            }
            Phase::Held(held) if held.lingers_until().is_some() => self.resume(cx, &mut effects),
            _ => self.bear(want.in_outage, cx.now),
        }
        (id, effects)
    }

    /// A try neither waits behind a local task nor passes one.
    fn is_free_for_a_try(&self) -> bool {
        let is_free = match &self.phase {
            Phase::Idle | Phase::Releasing { .. } => true,
            Phase::Held(held) => held.lingers_until().is_some(),
            Phase::Asking(_) | Phase::Retrying { .. } | Phase::Queued(_) => false,
        };
        is_free && self.waiters.is_empty()
    }

    /// Whether the outcome is there.
    pub(crate) fn is_settled(&self, id: WaiterId) -> bool {
        self.waiters.get(id).is_some_and(|waiter| waiter.outcome.is_some())
    }

    /// Takes the outcome, if it is there. A guard that is handed out here is from then on ended by
    /// [`released`](Self::released).
    pub(crate) fn collect(&mut self, id: WaiterId) -> Option<Outcome> {
        self.waiters.get(id)?.outcome.as_ref()?;
        if let Phase::Held(Held {
            tenant: Tenant::Guard(holder),
            ..
        }) = &mut self.phase
            && holder.waiter == Some(id)
        {
            holder.waiter = None;
        }
        let waiter = self.waiters.remove(id)?;
        debug_assert!(waiter.waker.is_none(), "a settled waiter still has its waker");
        waiter.outcome
    }

    /// Replaces the waker of a waiter. Returns the one that is not needed any more.
    #[must_use = "a waker must not be dropped under the mutex of the key"]
    pub(crate) fn set_waker(&mut self, id: WaiterId, waker: W) -> Option<W> {
        match self.waiters.get_mut(id) {
            Some(waiter) => waiter.waker.replace(waker),
            None => Some(waker),
        }
    }

    /// The waker of a waiter that has not been woken yet.
    pub(crate) fn waker(&self, id: WaiterId) -> Option<&W> {
        self.waiters.get(id)?.waker.as_ref()
    }

    /// A waiter goes away without collecting. Where the lock was already its own, it is passed on.
    pub(crate) fn give_up(&mut self, id: WaiterId, cx: Context<'_>) -> Effects<W> {
        let mut effects = Effects::none();
        effects.discarded = self.waiters.remove(id).and_then(|waiter| waiter.waker);
        match &mut self.phase {
            Phase::Held(held) if held.guard().is_some_and(|holder| holder.waiter == Some(id)) => {
                self.pass_on(cx, &mut effects);
            }
            Phase::Queued(Queued { cycle, .. }) if self.waiters.is_empty() => {
                let cycle = *cycle;
                self.release(cycle, cx, &mut effects);
            }
            Phase::Retrying { cycle, .. } if self.waiters.is_empty() => {
                let cycle = *cycle;
                self.stop_retrying(cycle, &mut effects);
            }
            // A request that is on its way finds nobody when its reply comes.
            _ => {}
        }
        effects
    }

    /// A guard is given back. Says whether the lock was still its own; where it was not, nothing of a later holder's is
    /// touched.
    pub(crate) fn released(&mut self, cycle: Cycle, token: FencingToken, cx: Context<'_>) -> (bool, Effects<W>) {
        let mut effects = Effects::none();
        let Phase::Held(held) = &mut self.phase else {
            effects.abandon(cycle);
            return (false, effects);
        };
        if held.lease.cycle != cycle {
            effects.abandon(cycle);
            return (false, effects);
        }
        if held.guard().is_none_or(|holder| holder.token != token) {
            return (false, effects);
        }
        if held.lease.loss_at(cx.now).is_some() {
            // Nobody noticed yet that its time has passed.
            self.lose(LossReason::Expired, cx, &mut effects);
            effects.abandon(cycle);
            return (false, effects);
        }
        self.pass_on(cx, &mut effects);
        (true, effects)
    }

    /// Gives back what is kept, if it is, to make room.
    pub(crate) fn let_go(&mut self, cx: Context<'_>) -> Effects<W> {
        let mut effects = Effects::none();
        self.end_linger(cx, &mut effects);
        effects
    }

    /// Nobody will want the key any more, though a guard may still be out: nothing is kept from now on.
    pub(crate) fn keep_nothing(&mut self, cx: Context<'_>) -> Effects<W> {
        self.keeps_nothing = true;
        self.let_go(cx)
    }

    /// The manager is shut down: whoever waits is refused, whoever holds has lost, and the store is told.
    pub(crate) fn close(&mut self, cx: Context<'_>) -> Effects<W> {
        let mut effects = Effects::none();
        (self.closed, self.keeps_nothing) = (true, true);
        self.fail_all(&Outcome::Failed(Box::new(LockError::Closed)), &mut effects);
        match &mut self.phase {
            Phase::Held(held) => {
                held.lease.lose(LossReason::Closed);
                effects.rare().ended = Some(Arc::clone(&held.lease));
                effects.rare().lost = held.guard().is_some().then_some(LossReason::Closed);
                let cycle = held.lease.cycle;
                if held.extending {
                    effects.abandon(cycle);
                    self.end_tenure(&mut effects);
                    self.phase = Phase::Idle;
                } else {
                    self.release(cycle, cx, &mut effects);
                }
            }
            Phase::Queued(Queued { cycle, .. }) => {
                let cycle = *cycle;
                self.release(cycle, cx, &mut effects);
            }
            Phase::Retrying { cycle, .. } => {
                let cycle = *cycle;
                self.stop_retrying(cycle, &mut effects);
            }
            Phase::Idle | Phase::Asking(_) | Phase::Releasing { .. } => {}
        }
        effects
    }
}
