//! A key that several guards hold at once: shared locks and permits.
//!
//! # Implementation details
//!
//! A group puts the tasks of one key in order and lets [`Queue`]s contend for the leases: each
//! *lane* is a queue of its own cycle, and waits as one contender in the store's queue. The group
//! is the only task that a lane knows. While the group wants a lease it has a *claim*, a waiter in
//! the lane. What the lane then grants is the group's *hold*, which it hands to its first task. So
//! validity, renewals, tokens, outages, turns and lingering are those of an exclusive lock.
//!
//! - *Shared*: one lane. Its hold serves all waiting tasks, and those that arrive later, until
//!   remote waiters are known: from then on it has a turn. Each guard has its own token and its own
//!   end. The hold ends with the last guard.
//! - *Permits*: a lane for each lease. A lease is for the number of permits that a task asked for,
//!   and serves one guard at a time. It passes to the next task without network traffic if that
//!   task asks for the same, and if the turn of the lane is not over.
//!
//! A turn serves the tasks that waited when it began, as for exclusive locks, and that of a permit
//! only a part of them: the line divided by the number of lanes. So a claim counts as waiting for
//! as long as the task that it was made for.
//!
//! Claims belong to nobody: whichever lane is granted first serves the first task. Tasks that were
//! served, or gave up, leave claims behind, and the latest of those are given up. Nobody is passed:
//! a task has a claim only if all before it have one, and the store's queue keeps the order of
//! claims.

mod lane;
mod settle;
mod store_events;

use std::sync::Arc;
use std::time::Duration;

use self::lane::Lane;
#[cfg(test)]
use self::lane::NoWaiter;
use super::outage::KeyOutage;
use super::{
    Context, Effects, Lease, LockMode, LossReason, Moment, Outcome, Queue, Waiter, WaiterId, WaiterOptions, Waiters,
};
use crate::error::{Failure, LockError};
use crate::fence::FencingToken;
use crate::protocol::Cycle;

/// See the module documentation. `W` is the type of a waker.
#[derive(Debug)]
pub(crate) struct Group<W> {
    waiters: Waiters<Waiter<W>>,
    lanes: Vec<Lane>,
    guards: Vec<Guard>,
    /// Set while requests fail because the store is unreachable.
    outage: Option<Box<KeyOutage>>,
    /// Whether remote waiters were seen when the last hold began.
    remote_waiters_seen: bool,
    closed: bool,
    keeps_nothing: bool,
}

/// A task that holds the key.
#[derive(Debug)]
struct Guard {
    cycle: Cycle,
    token: FencingToken,
    /// That of the lane, or, for shared locks, one of its own that ends with the lane's.
    lease: Arc<Lease>,
    /// The waiter, until it collects the guard.
    waiter: Option<WaiterId>,
    /// When `max_hold` ends, for shared locks. A lane watches that of permits.
    hold_until: Option<Moment>,
}

impl<W> Group<W> {
    pub(super) const fn new() -> Self {
        Self {
            waiters: Waiters::new(),
            lanes: Vec::new(),
            guards: Vec::new(),
            outage: None,
            remote_waiters_seen: false,
            closed: false,
            keeps_nothing: false,
        }
    }

    /// See [`Queue::is_unused`].
    pub(super) fn is_unused(&self) -> bool {
        self.is_idle() && self.waiters.is_unused()
    }

    /// See [`Queue::is_over`].
    pub(super) fn is_over(&self) -> bool {
        self.closed && self.is_idle() && self.waiters.is_empty()
    }

    fn is_idle(&self) -> bool {
        self.guards.is_empty() && self.lanes.iter().all(Lane::is_unused)
    }

    /// The number of leases that are ours.
    pub(super) fn leases(&self) -> usize {
        self.lanes.iter().filter(|lane| lane.queue.holds()).count()
    }

    pub(super) fn awaits_store(&self) -> bool {
        self.lanes.iter().any(|lane| lane.queue.awaits_store())
    }

    /// The shortest TTL of the leases that are ours.
    pub(super) fn ttl(&self) -> Option<Duration> {
        let held = self.lanes.iter().filter(|lane| lane.queue.holds());
        held.map(|lane| lane.queue.ttl()).min()
    }

    pub(super) fn is_current(&self, cycle: Cycle) -> bool {
        self.lanes.iter().any(|lane| lane.queue.is_current(cycle))
    }

    pub(super) fn has_lease_of(&self, cycle: Cycle) -> bool {
        let mut leases = self.lanes.iter().filter_map(|lane| lane.queue.lease());
        leases.any(|(lease, _)| lease.cycle == cycle)
    }

    pub(super) fn queued_cycle(&self) -> Option<Cycle> {
        self.lanes.iter().find_map(|lane| lane.queue.queued_cycle())
    }

    pub(super) const fn waiting(&self) -> usize {
        self.waiters.len()
    }

    pub(super) fn waiting_since(&self) -> Option<Moment> {
        let first = self.waiters.front();
        first.map(|first| first.since)
    }

    /// Calls `see` with the options of each waiter in line and when it enqueued.
    pub(super) fn each_wait(&self, mut see: impl FnMut(&WaiterOptions, Moment)) {
        self.waiters
            .iter()
            .for_each(|(_, waiter)| see(&waiter.options, waiter.since));
    }

    pub(super) fn lingers_until(&self) -> Option<Moment> {
        self.lanes.iter().filter_map(|lane| lane.queue.lingers_until()).min()
    }

    pub(super) fn is_evictable(&self) -> bool {
        !self.lanes.is_empty() && self.lanes.iter().all(|lane| lane.queue.is_evictable())
    }

    /// The leases of the guards, with their tokens.
    pub(super) fn guards(&self) -> impl Iterator<Item = (&Lease, FencingToken)> {
        self.guards.iter().map(|guard| (&*guard.lease, guard.token))
    }

    #[cfg(test)]
    pub(super) fn queues(&self) -> impl Iterator<Item = &Queue<NoWaiter>> {
        self.lanes.iter().map(|lane| &lane.queue)
    }

    pub(super) const fn remote_waiters_seen(&self) -> bool {
        self.remote_waiters_seen
    }

    pub(super) fn failed_attempts(&self) -> u32 {
        let attempts = self.lanes.iter().map(|lane| lane.queue.failed_attempts());
        attempts.max().unwrap_or(0)
    }

    pub(super) fn outage(&self) -> Option<&LockError> {
        self.outage.as_ref().map(|outage| outage.error())
    }

    pub(super) fn enqueue(
        &mut self,
        options: WaiterOptions,
        waker: Option<W>,
        cx: Context<'_>,
    ) -> (WaiterId, Effects<W>) {
        let mut effects = Effects::none();
        let refused = if self.closed {
            Some(Outcome::Failed(Failure::Closed.into()))
        } else if options.try_only && !self.is_free_for_a_try(options.mode, cx) {
            Some(Outcome::Busy)
        } else {
            self.outage
                .as_ref()
                .and_then(|outage| outage.refuses(options.in_outage))
        };
        let is_refused = refused.is_some();
        let id = self.waiters.push_back(Waiter {
            options,
            since: cx.now,
            waker: None,
            outcome: refused,
        });
        if is_refused {
            self.waiters.detach(id);
        } else {
            self.remote_waiters_seen |= options.contended_hint;
            if let Some(outage) = &mut self.outage {
                outage.note_deadline(options.in_outage, cx.now);
            }
            // Each new task asks the store anew. A try, for example, must not wait for a renewal.
            self.lanes.iter_mut().for_each(|lane| lane.queue.retry_extension());
            self.settle(cx, &mut effects);
        }
        // A waiter that already has its outcome keeps no waker.
        if self.is_settled(id) {
            effects.discarded = waker;
        } else if let Some(waiter) = self.waiters.get_mut(id) {
            waiter.waker = waker;
        }
        (id, effects)
    }

    /// A try neither waits behind a local waiter nor passes one.
    fn is_free_for_a_try(&self, mode: LockMode, cx: Context<'_>) -> bool {
        if !self.waiters.is_empty() {
            return false;
        }
        match (mode, self.lanes.first()) {
            (LockMode::Shared, Some(lane)) => match lane.hold {
                Some(_) => lane.queue.may_join(cx.now, cx),
                None => lane.claim.is_none() && lane.queue.is_free_for_a_try(),
            },
            _ => self.weight_in_use() + mode.weight() <= mode.limit(),
        }
    }

    pub(super) fn is_settled(&self, id: WaiterId) -> bool {
        self.waiters.get(id).is_some_and(|waiter| waiter.outcome.is_some())
    }

    pub(super) fn collect(&mut self, id: WaiterId) -> Option<Outcome> {
        self.waiters.get(id)?.outcome.as_ref()?;
        for guard in &mut self.guards {
            guard.waiter.take_if(|waiter| *waiter == id);
        }
        self.waiters.remove(id)?.outcome
    }

    pub(super) fn set_waker(&mut self, id: WaiterId, waker: W) -> Option<W> {
        match self.waiters.get_mut(id) {
            Some(waiter) => waiter.waker.replace(waker),
            None => Some(waker),
        }
    }

    pub(super) fn waker(&self, id: WaiterId) -> Option<&W> {
        self.waiters.get(id)?.waker.as_ref()
    }

    pub(super) fn give_up(&mut self, id: WaiterId, cx: Context<'_>) -> Effects<W> {
        let mut effects = Effects::none();
        effects.discarded = self.waiters.remove(id).and_then(|waiter| waiter.waker);
        self.guards.retain(|guard| guard.waiter != Some(id));
        self.settle(cx, &mut effects);
        effects
    }

    pub(super) fn released(&mut self, cycle: Cycle, token: FencingToken, cx: Context<'_>) -> (bool, Effects<W>) {
        let mut effects = Effects::none();
        let found = self
            .guards
            .iter()
            .position(|guard| guard.cycle == cycle && guard.token == token);
        let Some(index) = found else {
            // Other guards may hold the key under the same lease.
            if !self.is_current(cycle) {
                effects.abandon(cycle);
            }
            return (false, effects);
        };
        let guard = self.guards.remove(index);
        let is_held = guard.lease.loss_at(cx.now).is_none();
        if !is_held {
            // The lease expired unnoticed.
            guard.lease.lose(LossReason::Expired);
            let rare = effects.rare();
            rare.lost.push(LossReason::Expired);
            rare.ended.push(guard.lease);
            self.each_lane(cx, &mut effects, Queue::tick);
        }
        self.settle(cx, &mut effects);
        (is_held, effects)
    }

    pub(super) fn evict(&mut self, cx: Context<'_>) -> Effects<W> {
        let mut effects = Effects::none();
        self.each_lane(cx, &mut effects, Queue::evict);
        self.settle(cx, &mut effects);
        effects
    }

    pub(super) fn stop_lingering(&mut self, cx: Context<'_>) -> Effects<W> {
        self.keeps_nothing = true;
        let mut effects = Effects::none();
        self.each_lane(cx, &mut effects, Queue::stop_lingering);
        self.settle(cx, &mut effects);
        effects
    }

    pub(super) fn close(&mut self, cx: Context<'_>) -> Effects<W> {
        let mut effects = Effects::none();
        (self.closed, self.keeps_nothing) = (true, true);
        self.fail_all(&Outcome::Failed(Failure::Closed.into()), &mut effects);
        self.each_lane(cx, &mut effects, Queue::close);
        self.settle(cx, &mut effects);
        effects
    }

    pub(super) fn disown(&mut self, cx: Context<'_>) -> Effects<W> {
        let mut effects = Effects::none();
        self.each_lane(cx, &mut effects, Queue::disown);
        self.settle(cx, &mut effects);
        effects
    }

    pub(super) fn next_deadline(&self) -> Option<Moment> {
        let lanes = self.lanes.iter().filter_map(|lane| lane.queue.next_deadline());
        let guards = self.guards.iter().filter_map(|guard| guard.hold_until);
        let outage = self.outage.as_ref().and_then(|outage| outage.deadline());
        lanes.chain(guards).chain(outage).min()
    }

    pub(super) fn tick(&mut self, cx: Context<'_>) -> Effects<W> {
        let mut effects = Effects::none();
        self.each_lane(cx, &mut effects, Queue::tick);
        self.end_long_holds(cx, &mut effects);
        self.fail_impatient(cx, &mut effects);
        self.settle(cx, &mut effects);
        effects
    }

    /// Ends shared guards whose `max_hold` has passed. The others keep the lease.
    fn end_long_holds(&mut self, cx: Context<'_>, effects: &mut Effects<W>) {
        let is_over = |guard: &mut Guard| guard.hold_until.is_some_and(|until| cx.now >= until);
        let over: Vec<Guard> = self.guards.extract_if(.., is_over).collect();
        self.lose_guards(over, LossReason::MaxHold, effects);
    }

    fn fail_impatient(&mut self, cx: Context<'_>, effects: &mut Effects<W>) {
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

    fn fail_all(&mut self, outcome: &Outcome, effects: &mut Effects<W>) {
        while let Some(id) = self.waiters.first() {
            self.resolve(id, outcome.clone(), effects);
        }
    }

    fn resolve(&mut self, id: WaiterId, outcome: Outcome, effects: &mut Effects<W>) {
        self.waiters.detach(id);
        if let Some(waiter) = self.waiters.get_mut(id) {
            waiter.outcome = Some(outcome);
            effects.wake(waiter.waker.take());
        }
    }
}
