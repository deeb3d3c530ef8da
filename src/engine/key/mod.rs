//! The queue of one key inside one manager: a pure state machine.
//!
//! # Implementation details
//!
//! Events arrive as method calls: a task enqueues, cancels or releases; a reply, a grant or a
//! renewal arrives; time passes. Each call returns [`Effects`]: a request to send, cycles to clean
//! up, waiters to wake. The queue reads no clock, knows no tasks and talks to no store, so the same
//! code runs in production, in the exhaustive tests and in the simulation. It never calls or drops
//! a waker or a notifier, because the caller holds the mutex of the key. Wakers leave through the
//! effects and are called or dropped after the mutex is released.
//!
//! A manager is at most one contender for a key: regardless of how many tasks wait, a single
//! *cycle* represents them in the store's queue. Once the manager has the lease, local waiters are
//! served in FIFO order. Each gets its own token from the block that came with the lease.
//!
//! From when remote waiters are known, the manager has a *turn*. It is gated: it serves the tasks
//! that waited when it began, and none that came later, so however fast tasks ask again, it ends.
//! It ends early after `max_burst` guards or `max_slice`. If tasks are left, the request that
//! releases the lease also enqueues the manager at the tail of the store's queue. So a remote
//! waiter that joins that queue waits for at most one turn of each other manager, and the share of
//! a manager grows with the number of its waiting tasks.
//!
//! A grant comes with a block of [`BLOCK_OF_GRANT`] tokens, because the manager that releases does
//! not know how many tasks the next one serves. A turn that needs more requests them while it
//! serves, by an extension of its lease. A lease is never released while its extension is in
//! flight, and tokens that are left are never used by anybody.
//!
//! At most one request for the key is in flight at any time. Renewals by the watchdog do not count:
//! they only extend what is already ours. The caller reports the reply, or the lack of one, as a
//! [`StoreEvent`]. If a request fails because the store is unreachable, it is retried while any
//! waiter tolerates the outage (see `outage`). After a missing reply the store may still know
//! cycles that are over. These are *abandoned*: released in the background until the store
//! confirms.
//!
//! With `min_hold`, nobody gets the key before that time has passed since the grant, not even a
//! local waiter. So a guard that is dropped earlier ends the hold: the lease is released, and stays
//! in the store for the rest of the time ([`MinHolds`](crate::engine::min_holds::MinHolds)). A
//! lease that lasts for `min_hold` even if the process dies can only be a new one. So a waiter with
//! `min_hold` is never served under an earlier lease.
//!
//! Three rules decide whether a pushed grant makes the manager the holder. See [`Queue::on_grant`].

mod acquire;
mod contender;
mod effect;
mod event;
mod group;
mod hold;
mod outage;
mod phase;
mod store_events;
#[cfg(test)]
mod tests;
mod timers;
mod types;
mod waiters;

use std::sync::Arc;
use std::time::Duration;

pub(crate) use contender::Contender;
pub(crate) use effect::{Bound, Effects, Rare, Request, Wake};
pub(crate) use event::StoreEvent;
pub(crate) use outage::StoreOutage;
pub(crate) use types::{Capacity, Context, Granted, InOutage, Linger, MinHold, Outcome, Path, Rules, WaiterOptions};
#[cfg(test)]
pub(crate) use types::{Flaw, Unlimited};
pub(crate) use waiters::WaiterId;

use crate::clock::Moment;
use crate::error::{Failure, LossReason};
use crate::fence::FencingToken;
use crate::lease::Lease;
use crate::mode::LockMode;
use crate::protocol::Cycle;
use outage::KeyOutage;
use phase::{Held, Occupant, Phase, Queued};
use waiters::Waiters;

/// Bounds on the size of a token block.
const BLOCK_MIN: u64 = 64;
const BLOCK_MAX: u64 = 1 << 16;
/// The number of tokens that a release reserves for the next owner.
pub(crate) const BLOCK_OF_GRANT: u32 = BLOCK_MIN as u32;
/// The minimum number of tokens that an extension of a lingering lease reserves. One message per
/// thousand acquisitions is negligible.
const BLOCK_LINGERING: u64 = 1024;

#[derive(Debug)]
struct Waiter<W> {
    options: WaiterOptions,
    since: Moment,
    /// Wakes the waiter when its outcome is available. Taken at that point.
    waker: Option<W>,
    outcome: Option<Outcome>,
}

/// The queue of one key. `W` is the type of a waker.
#[derive(Debug)]
pub(crate) struct Queue<W> {
    /// The mode in which the key is held.
    mode: LockMode,
    phase: Phase,
    waiters: Waiters<Waiter<W>>,
    /// The TTL of the next request: that of the first waiter, or of the last one that was first.
    ttl: Duration,
    /// The number of tasks that are to be served under our lease, if they are in line elsewhere.
    /// Each needs a token.
    beside: u64,
    /// The largest number of tasks that a turn serves.
    share: u32,
    /// The epoch in which the current or most recent request was made.
    asked_in: u32,
    /// Set while requests for this key fail because the store is unreachable.
    outage: Option<Box<KeyOutage>>,
    /// Whether waiters of different classes may be in line.
    has_mixed_classes: bool,
    /// Whether remote waiters were seen during the last hold, in which case the fast path is
    /// skipped.
    remote_waiters_seen: bool,
    /// Cycles whose lease was lost while a guard was out, which releases them when it is dropped.
    lost_cycles: Vec<Cycle>,
    /// Set on shutdown: new waiters are refused.
    closed: bool,
    /// Set when no task can want the key any more: a lease without a guard is released at once.
    keeps_nothing: bool,
}

impl<W> Queue<W> {
    /// A queue for exclusive locks.
    pub(crate) const fn new() -> Self {
        Self::in_mode(LockMode::Exclusive)
    }

    /// A queue for holding the key in that mode.
    pub(crate) const fn in_mode(mode: LockMode) -> Self {
        Self {
            mode,
            phase: Phase::Idle,
            waiters: Waiters::new(),
            ttl: Duration::from_secs(1),
            beside: 0,
            share: u32::MAX,
            asked_in: 0,
            outage: None,
            has_mixed_classes: false,
            remote_waiters_seen: false,
            lost_cycles: Vec::new(),
            closed: false,
            keeps_nothing: false,
        }
    }

    /// Whether this queue can be discarded without losing anything.
    pub(crate) fn is_unused(&self) -> bool {
        self.is_idle() && self.waiters.is_unused()
    }

    /// Whether nothing is left to do after a shutdown. Tasks may still collect their outcomes, but
    /// a task that is not polled any more would keep the queue in use for ever.
    pub(crate) fn is_over(&self) -> bool {
        self.closed && self.is_idle() && self.waiters.is_empty()
    }

    const fn is_idle(&self) -> bool {
        matches!(self.phase, Phase::Idle) && self.lost_cycles.is_empty()
    }

    /// Whether the lease is ours.
    pub(crate) const fn holds(&self) -> bool {
        matches!(self.phase, Phase::Held(_))
    }

    /// Whether a request is in flight whose reply determines what happens next.
    pub(crate) const fn awaits_store(&self) -> bool {
        match &self.phase {
            Phase::Acquiring(_) | Phase::Releasing { .. } => true,
            Phase::Held(held) => held.extending,
            Phase::Idle | Phase::Queued(_) | Phase::Retrying { .. } => false,
        }
    }

    /// The TTL used to renew the lease.
    pub(crate) const fn ttl(&self) -> Duration {
        self.ttl
    }

    /// Whether `cycle` is in use here: being acquired, queued, held or being released.
    pub(crate) fn is_current(&self, cycle: Cycle) -> bool {
        match &self.phase {
            Phase::Idle => false,
            Phase::Acquiring(acquiring) => acquiring.cycle == cycle || acquiring.releases == Some(cycle),
            Phase::Retrying { cycle: current, .. } => *current == cycle,
            Phase::Queued(queued) => queued.cycle == cycle,
            Phase::Held(held) => held.lease.cycle == cycle,
            Phase::Releasing { cycle: current, .. } => *current == cycle,
        }
    }

    /// The cycle with which the manager contends, or will once the request in flight is executed,
    /// if any. Of several, the oldest joined the store's queue first.
    const fn contending_cycle(&self) -> Option<Cycle> {
        match &self.phase {
            Phase::Acquiring(acquiring) => Some(acquiring.cycle),
            Phase::Retrying { cycle, .. } => Some(*cycle),
            Phase::Queued(queued) => Some(queued.cycle),
            Phase::Held(_) | Phase::Idle | Phase::Releasing { .. } => None,
        }
    }

    /// The cycle that waits in the store's queue, if any.
    pub(crate) const fn queued_cycle(&self) -> Option<Cycle> {
        match &self.phase {
            Phase::Queued(queued) => Some(queued.cycle),
            _ => None,
        }
    }

    /// The number of waiting tasks.
    pub(crate) const fn waiting(&self) -> usize {
        self.waiters.len()
    }

    /// When the first waiter enqueued.
    pub(crate) fn waiting_since(&self) -> Option<Moment> {
        let first = self.waiters.front();
        first.map(|first| first.since)
    }

    /// Calls `see` with the options of each waiter in line and when it enqueued, first to last. If
    /// all are of one class, as they usually are, only with the first.
    pub(crate) fn each_wait(&self, mut see: impl FnMut(&WaiterOptions, Moment)) {
        let most = if self.has_mixed_classes { usize::MAX } else { 1 };
        for (_, waiter) in self.waiters.iter().take(most) {
            see(&waiter.options, waiter.since);
        }
    }

    /// Called before a waiter of this class joins the line.
    fn note_class(&mut self, class: u16) {
        let first = self.waiters.front();
        self.has_mixed_classes = first.is_some_and(|first| self.has_mixed_classes || first.options.class != class);
    }

    /// When the linger period ends, if the lease is lingering.
    pub(crate) const fn lingers_until(&self) -> Option<Moment> {
        match &self.phase {
            Phase::Held(held) => held.lingers_until(),
            _ => None,
        }
    }

    /// Whether the lease can be evicted, or is already being evicted: it lingers without a guard,
    /// or is being released after lingering, and no local task wants it.
    pub(crate) const fn is_evictable(&self) -> bool {
        match &self.phase {
            Phase::Held(held) => held.lingers_until().is_some(),
            Phase::Releasing { lingered, .. } => *lingered && self.waiters.is_empty(),
            Phase::Idle | Phase::Acquiring(_) | Phase::Retrying { .. } | Phase::Queued(_) => false,
        }
    }

    /// Whether a task that arrives now has to wait for another one.
    pub(crate) const fn is_contended(&self) -> bool {
        let is_taken = match &self.phase {
            Phase::Held(held) => held.lingers_until().is_none(),
            Phase::Queued(_) => true,
            Phase::Idle | Phase::Acquiring(_) | Phase::Retrying { .. } | Phase::Releasing { .. } => false,
        };
        is_taken || self.waiters.len() > 1
    }

    /// The lease, if it is ours, and the token of the guard under it, if any.
    pub(crate) fn lease(&self) -> Option<(&Lease, Option<FencingToken>)> {
        let Phase::Held(held) = &self.phase else { return None };
        Some((&held.lease, held.guard().map(|holder| holder.token)))
    }

    /// Whether other managers were seen to want the key during the last hold.
    pub(crate) const fn remote_waiters_seen(&self) -> bool {
        self.remote_waiters_seen
    }

    /// Enqueues a waiter. Its outcome can be [`collect`](Self::collect)ed when an effect returns
    /// its waker, or immediately.
    pub(crate) fn enqueue(
        &mut self,
        options: WaiterOptions,
        waker: Option<W>,
        cx: Context<'_>,
    ) -> (WaiterId, Effects<W>) {
        let is_busy = options.try_only && !self.is_free_for_a_try();
        self.enqueue_since(cx.now, is_busy, options, waker, cx)
    }

    /// Enqueues a waiter that has been waiting since then, at the end of the line. It is refused if
    /// it is a try and the key is busy for it.
    fn enqueue_since(
        &mut self,
        since: Moment,
        is_busy: bool,
        options: WaiterOptions,
        waker: Option<W>,
        cx: Context<'_>,
    ) -> (WaiterId, Effects<W>) {
        let mut effects = Effects::none();
        let refused = if self.closed {
            Some(Outcome::Failed(Failure::Closed.into()))
        } else if is_busy {
            Some(Outcome::Busy)
        } else {
            self.refused_by_outage(options.in_outage)
        };
        let settled = refused.is_some();
        // A waiter that already has its outcome keeps no waker.
        let waker = if !settled {
            waker
        } else if options.try_only {
            // A try collects its outcome immediately.
            effects.discarded = waker;
            None
        } else {
            // The task may already be asleep, so it is woken.
            effects.wake(waker);
            None
        };
        self.note_class(options.class);
        let id = self.waiters.push_back(Waiter {
            options,
            since,
            waker,
            outcome: refused,
        });
        if settled {
            self.waiters.detach(id);
            return (id, effects);
        }
        match &self.phase {
            Phase::Idle => {
                self.remote_waiters_seen |= options.contended_hint;
                self.start_acquire(cx, &mut effects);
            }
            Phase::Held(held) if held.lingers_until().is_some() => self.resume(cx, &mut effects),
            _ => self.note_deadline(options.in_outage, cx.now),
        }
        (id, effects)
    }

    /// A try neither waits behind a local waiter nor passes one.
    pub(super) fn is_free_for_a_try(&self) -> bool {
        let is_free = match &self.phase {
            Phase::Idle | Phase::Releasing { .. } => true,
            Phase::Held(held) => held.lingers_until().is_some(),
            Phase::Acquiring(_) | Phase::Retrying { .. } | Phase::Queued(_) => false,
        };
        is_free && self.waiters.is_empty()
    }

    /// Whether the outcome is available.
    pub(crate) fn is_settled(&self, id: WaiterId) -> bool {
        self.waiters.get(id).is_some_and(|waiter| waiter.outcome.is_some())
    }

    /// Takes the outcome, if it is available. A guard handed out here must later be reported to
    /// [`released`](Self::released).
    pub(crate) fn collect(&mut self, id: WaiterId) -> Option<Outcome> {
        self.waiters.get(id)?.outcome.as_ref()?;
        if let Phase::Held(Held {
            occupant: Occupant::Guard(holder),
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

    /// Replaces the waker of a waiter. Returns the waker that is no longer needed.
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

    /// A waiter leaves without collecting. If it already had the lock, the lock is passed on.
    pub(crate) fn give_up(&mut self, id: WaiterId, cx: Context<'_>) -> Effects<W> {
        let mut effects = Effects::none();
        effects.discarded = self.waiters.remove(id).and_then(|waiter| waiter.waker);
        match &mut self.phase {
            Phase::Held(held) if held.guard().is_some_and(|holder| holder.waiter == Some(id)) => {
                held.cancel_min_hold(cx);
                self.pass_on(cx, &mut effects);
            }
            Phase::Queued(Queued { cycle, .. }) if self.waiters.is_empty() => {
                let cycle = *cycle;
                self.release(cycle, &mut effects);
            }
            Phase::Retrying { cycle, .. } if self.waiters.is_empty() => {
                let cycle = *cycle;
                self.stop_retrying(cycle, &mut effects);
            }
            // If a request is in flight, its reply will find no waiter.
            _ => {}
        }
        effects
    }

    /// A guard was dropped. Returns whether it still had the lock; if it did not, a later holder is
    /// not affected.
    pub(crate) fn released(&mut self, cycle: Cycle, token: FencingToken, cx: Context<'_>) -> (bool, Effects<W>) {
        let mut effects = Effects::none();
        self.lost_cycles.retain(|&lost| lost != cycle);
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
            // The lease expired unnoticed. The guard is not out any more.
            self.lose(LossReason::Expired, cx, &mut effects);
            self.lost_cycles.retain(|&lost| lost != cycle);
            effects.abandon(cycle);
            return (false, effects);
        }
        self.pass_on(cx, &mut effects);
        (true, effects)
    }

    /// Releases the lease if it is lingering, to make room.
    pub(crate) fn evict(&mut self, cx: Context<'_>) -> Effects<W> {
        let mut effects = Effects::none();
        self.end_linger(cx, &mut effects);
        effects
    }

    /// No task can want the key any more, although a guard may still be out. From now on the lease
    /// never lingers.
    pub(crate) fn stop_lingering(&mut self, cx: Context<'_>) -> Effects<W> {
        self.keeps_nothing = true;
        self.evict(cx)
    }

    /// The manager shuts down: waiters are refused, a holder loses its lease, and the store is sent
    /// a release.
    pub(crate) fn close(&mut self, cx: Context<'_>) -> Effects<W> {
        let mut effects = Effects::none();
        (self.closed, self.keeps_nothing) = (true, true);
        self.fail_all(&Outcome::Failed(Failure::Closed.into()), &mut effects);
        // Their guards may be dropped only when nobody can release anything any more.
        std::mem::take(&mut self.lost_cycles)
            .into_iter()
            .for_each(|cycle| effects.abandon(cycle));
        match &mut self.phase {
            Phase::Held(held) => {
                if held.guard().is_some_and(|holder| holder.waiter.is_some()) {
                    held.cancel_min_hold(cx);
                }
                held.lease.lose(LossReason::Closed);
                effects.rare().ended.push(Arc::clone(&held.lease));
                effects.rare().lost.extend(held.guard().map(|_| LossReason::Closed));
                let cycle = held.lease.cycle;
                if held.extending {
                    effects.abandon(cycle);
                    self.finish_hold(&mut effects);
                    self.phase = Phase::Idle;
                } else {
                    self.release(cycle, &mut effects);
                }
            }
            Phase::Queued(Queued { cycle, .. }) => {
                let cycle = *cycle;
                self.release(cycle, &mut effects);
            }
            Phase::Retrying { cycle, .. } => {
                let cycle = *cycle;
                self.stop_retrying(cycle, &mut effects);
            }
            Phase::Idle | Phase::Acquiring(_) | Phase::Releasing { .. } => {}
        }
        effects
    }
}
