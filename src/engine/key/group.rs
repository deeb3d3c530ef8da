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
//! only a part of them: the line divided by the number of lanes. So a claim counts as waiting for as
//! long as the task that it was made for.
//!
//! Claims belong to nobody: whichever lane is granted first serves the first task. Tasks that were
//! served, or gave up, leave claims behind, and the latest of those are given up. Nobody is passed:
//! a task has a claim only if all before it have one, and the store's queue keeps the order of
//! claims.

use std::sync::Arc;

use super::outage::Trouble;
use super::{
    Context, Effects, Granted, InOutage, Lease, LockMode, LossReason, Moment, Outage, Outcome, Path, Queue, Rare,
    Waiter, WaiterId, WaiterOptions, Waiters,
};
use crate::error::{Failure, LockError};
use crate::fence::FencingToken;
use crate::protocol::{AcquireReply, Answer, Cycle, Grant, ReleaseReply, RenewReply};
use std::time::Duration;

/// How many tasks have a claim at a time. More would not have a lease sooner, but lengthen the
/// store's queue.
const CLAIMS_MAX: usize = 8;

/// See the module documentation. `W` is the type of a waker.
#[derive(Debug)]
pub(crate) struct Group<W> {
    waiters: Waiters<Waiter<W>>,
    lanes: Vec<Lane>,
    guards: Vec<Guard>,
    /// Set while requests fail because the store is unreachable.
    trouble: Option<Box<Trouble>>,
    /// Whether remote waiters were seen when the last hold began.
    remote_waiters_seen: bool,
    closed: bool,
    keeps_nothing: bool,
}

#[derive(Debug)]
struct Lane {
    mode: LockMode,
    queue: Queue<Nobody>,
    /// Our waiter in the queue.
    claim: Option<WaiterId>,
    hold: Option<Hold>,
}

/// The waker of a claim. The outcome is collected after each event instead.
#[derive(Debug)]
pub(super) enum Nobody {}

/// What a lane granted to the group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Hold {
    cycle: Cycle,
    token: FencingToken,
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

impl Lane {
    fn new(mode: LockMode) -> Self {
        Self {
            mode,
            queue: Queue::in_mode(mode),
            claim: None,
            hold: None,
        }
    }

    fn is_unused(&self) -> bool {
        self.queue.is_unused() && self.claim.is_none() && self.hold.is_none()
    }
}

impl<W> Group<W> {
    pub(super) const fn new() -> Self {
        Self {
            waiters: Waiters::new(),
            lanes: Vec::new(),
            guards: Vec::new(),
            trouble: None,
            remote_waiters_seen: false,
            closed: false,
            keeps_nothing: false,
        }
    }

    pub(super) fn is_unused(&self) -> bool {
        self.waiters.is_unused() && self.guards.is_empty() && self.lanes.iter().all(Lane::is_unused)
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
        let first = self.waiters.first().and_then(|id| self.waiters.get(id));
        first.map(|first| first.since)
    }

    /// Calls `see` with the options of each waiter in line and when it enqueued.
    pub(super) fn each_wait(&self, mut see: impl FnMut(&WaiterOptions, Moment)) {
        self.waiters
            .iter()
            .for_each(|(_, waiter)| see(&waiter.want, waiter.since));
    }

    pub(super) fn lingers_until(&self) -> Option<Moment> {
        self.lanes.iter().filter_map(|lane| lane.queue.lingers_until()).min()
    }

    pub(super) fn is_evictable(&self) -> bool {
        let is_free = self.waiters.is_empty() && self.guards.is_empty() && !self.lanes.is_empty();
        is_free && self.lanes.iter().all(|lane| lane.queue.is_evictable())
    }

    /// The leases of the guards, with their tokens.
    pub(super) fn guards(&self) -> impl Iterator<Item = (&Lease, FencingToken)> {
        self.guards.iter().map(|guard| (&*guard.lease, guard.token))
    }

    #[cfg(test)]
    pub(super) fn queues(&self) -> impl Iterator<Item = &Queue<Nobody>> {
        self.lanes.iter().map(|lane| &lane.queue)
    }

    pub(super) const fn remote_waiters_seen(&self) -> bool {
        self.remote_waiters_seen
    }

    pub(super) fn failed_attempts(&self) -> u32 {
        let attempts = self.lanes.iter().map(|lane| lane.queue.failed_attempts());
        attempts.max().unwrap_or(0)
    }

    pub(super) fn trouble(&self) -> Option<&LockError> {
        self.trouble.as_ref().map(|trouble| trouble.error())
    }

    pub(super) fn want(&mut self, want: WaiterOptions, waker: Option<W>, cx: Context<'_>) -> (WaiterId, Effects<W>) {
        let mut effects = Effects::none();
        let refused = if self.closed {
            Some(Outcome::Failed(Failure::Closed.into()))
        } else if want.try_only && !self.is_free_for_a_try(want.mode, cx) {
            Some(Outcome::Busy)
        } else {
            self.trouble
                .as_ref()
                .and_then(|trouble| trouble.refuses(want.in_outage))
        };
        let is_refused = refused.is_some();
        let id = self.waiters.push_back(Waiter {
            want,
            since: cx.now,
            waker: None,
            outcome: refused,
        });
        if is_refused {
            self.waiters.detach(id);
        } else {
            self.remote_waiters_seen |= want.contended_hint;
            if let Some(trouble) = &mut self.trouble {
                trouble.bear(want.in_outage, cx.now);
            }
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
        let trouble = self.trouble.as_ref().and_then(|trouble| trouble.deadline());
        lanes.chain(guards).chain(trouble).min()
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

    /// The renewal of a lease that is due or will be soon. Ask again until there is none.
    pub(super) fn renewal(&mut self, cx: Context<'_>) -> Option<(Cycle, Duration, Duration)> {
        self.lanes.iter_mut().find_map(|lane| lane.queue.renewal(cx))
    }

    pub(super) fn on_renewal_reply(
        &mut self,
        cycle: Cycle,
        ttl: Duration,
        sent_at: Moment,
        reply: Option<RenewReply>,
        cx: Context<'_>,
    ) -> Effects<W> {
        let mut effects = Effects::none();
        self.lane_of(cycle, cx, &mut effects, |queue, cx| {
            queue.on_renewal_reply(cycle, ttl, sent_at, reply, cx)
        });
        self.settle(cx, &mut effects);
        effects
    }

    pub(super) fn on_acquire_reply(
        &mut self,
        cycle: Cycle,
        answer: Answer<AcquireReply>,
        cx: Context<'_>,
    ) -> Effects<W> {
        let mut effects = Effects::none();
        self.trouble = None;
        let found = self.lane_of(cycle, cx, &mut effects, |queue, cx| {
            queue.on_acquire_reply(cycle, answer, cx)
        });
        let leaves_a_trace = matches!(answer.reply, AcquireReply::Granted { .. } | AcquireReply::Queued(_));
        if !found && leaves_a_trace {
            effects.abandon(cycle);
        }
        self.settle(cx, &mut effects);
        effects
    }

    pub(super) fn on_release_reply(
        &mut self,
        cycle: Cycle,
        answer: Answer<ReleaseReply>,
        cx: Context<'_>,
    ) -> Effects<W> {
        let mut effects = Effects::none();
        self.trouble = None;
        self.lane_of(cycle, cx, &mut effects, |queue, cx| {
            queue.on_release_reply(cycle, answer, cx)
        });
        self.settle(cx, &mut effects);
        effects
    }

    pub(super) fn on_request_failed(
        &mut self,
        cycle: Cycle,
        error: &LockError,
        outage: Option<Outage>,
        cx: Context<'_>,
    ) -> Effects<W> {
        let mut effects = Effects::none();
        self.lane_of(cycle, cx, &mut effects, |queue, cx| {
            queue.on_request_failed(cycle, error, outage, cx)
        });
        if let Some(outage) = outage
            && !self.waiters.is_empty()
        {
            self.trouble = Some(Box::new(Trouble::after(self.trouble.take(), outage, error)));
            self.fail_impatient(cx, &mut effects);
        }
        self.settle(cx, &mut effects);
        effects
    }

    pub(super) fn on_request_cancelled(&mut self, cycle: Cycle, cx: Context<'_>) -> Effects<W> {
        let mut effects = Effects::none();
        self.lane_of(cycle, cx, &mut effects, |queue, cx| {
            queue.on_request_cancelled(cycle, cx)
        });
        self.settle(cx, &mut effects);
        effects
    }

    pub(super) fn on_grant(&mut self, grant: Grant, cx: Context<'_>) -> Effects<W> {
        let mut effects = Effects::none();
        if !self.lane_of(grant.cycle, cx, &mut effects, |queue, cx| queue.on_grant(grant, cx)) {
            effects.rare().stale_grant = true;
            effects.abandon(grant.cycle);
        }
        self.settle(cx, &mut effects);
        effects
    }

    pub(super) fn on_your_turn(&mut self, cycle: Cycle, cx: Context<'_>) -> Effects<W> {
        let mut effects = Effects::none();
        if !self.lane_of(cycle, cx, &mut effects, |queue, _| queue.on_your_turn(cycle)) {
            effects.abandon(cycle);
        }
        effects
    }

    pub(super) fn on_remote_waiter(&mut self, cycle: Cycle, cx: Context<'_>) -> Effects<W> {
        let mut effects = Effects::none();
        if !self.lane_of(cycle, cx, &mut effects, |queue, cx| queue.on_remote_waiter(cycle, cx)) {
            effects.abandon(cycle);
        }
        self.settle(cx, &mut effects);
        effects
    }

    pub(super) fn on_resubscribed(&mut self, cx: Context<'_>) -> Effects<W> {
        let mut effects = Effects::none();
        self.each_lane(cx, &mut effects, Queue::on_resubscribed);
        effects
    }

    /// Applies an event to every lane.
    fn each_lane(
        &mut self,
        cx: Context<'_>,
        effects: &mut Effects<W>,
        event: impl Fn(&mut Queue<Nobody>, Context<'_>) -> Effects<Nobody>,
    ) {
        for index in 0..self.lanes.len() {
            self.on_lane(index, effects, |queue| event(queue, cx));
        }
    }

    /// Applies an event to the lane in which the cycle is in use. Returns whether there is one.
    fn lane_of(
        &mut self,
        cycle: Cycle,
        cx: Context<'_>,
        effects: &mut Effects<W>,
        event: impl FnOnce(&mut Queue<Nobody>, Context<'_>) -> Effects<Nobody>,
    ) -> bool {
        let Some(index) = self.lanes.iter().position(|lane| lane.queue.is_current(cycle)) else {
            return false;
        };
        self.on_lane(index, effects, |queue| event(queue, cx));
        true
    }

    /// Applies an event to a lane, and adds its effects to those of the group.
    fn on_lane(
        &mut self,
        index: usize,
        effects: &mut Effects<W>,
        event: impl FnOnce(&mut Queue<Nobody>) -> Effects<Nobody>,
    ) {
        let waiting = self.waiters.len();
        let Some(lane) = self.lanes.get_mut(index) else { return };
        match lane.mode {
            LockMode::Permits { weight, limit } => lane.queue.share = share_of_turn(waiting, weight, limit),
            LockMode::Shared | LockMode::Exclusive => lane.queue.beside = waiting as u64,
        }
        let done = event(&mut lane.queue);
        let mut reason = LossReason::Expired;
        if let Some(rare) = done.rare {
            let Rare {
                abandoned,
                ended,
                // Counted for each guard below.
                lost: _,
                stale_grant,
                more_requests: _,
                more_served: _,
            } = *rare;
            if let Some(known) = ended.iter().find_map(|lease| lease.loss()) {
                reason = known;
            }
            abandoned.into_iter().for_each(|cycle| effects.abandon(cycle));
            let all = effects.rare();
            all.ended.extend(ended);
            all.stale_grant |= stale_grant;
        }
        if let Some(request) = done.request {
            effects.add_request(request);
        }
        if let Some(served) = done.served {
            effects.add_served(served);
        }
        effects.yielded = effects.yielded.or(done.yielded);
        let held = lane.queue.lease().map(|(lease, _)| (lease.cycle, lease.valid_until()));
        let Some(hold) = lane.hold else { return };
        match held {
            Some((cycle, until)) if cycle == hold.cycle => {
                let ttl = lane.queue.ttl();
                let guards = self.guards.iter().filter(|guard| guard.cycle == cycle);
                guards.for_each(|guard| guard.lease.extend(until, ttl));
            }
            _ => {
                lane.hold = None;
                effects.abandon(hold.cycle);
                let lost: Vec<Guard> = self.guards.extract_if(.., |guard| guard.cycle == hold.cycle).collect();
                self.lose_guards(lost, reason, effects);
            }
        }
    }

    /// Guards were lost. A task that has not collected its guard yet would get a lost one: it
    /// returns to the front.
    fn lose_guards(&mut self, lost: Vec<Guard>, reason: LossReason, effects: &mut Effects<W>) {
        for guard in lost.into_iter().rev() {
            guard.lease.lose(reason);
            match guard.waiter {
                Some(id) => {
                    if let Some(waiter) = self.waiters.get_mut(id) {
                        waiter.outcome = None;
                    }
                    self.waiters.return_to_front(id);
                }
                None => effects.rare().lost.push(reason),
            }
            effects.rare().ended.push(guard.lease);
        }
    }

    /// Follows up on an event until nothing is left to do.
    fn settle(&mut self, cx: Context<'_>, effects: &mut Effects<W>) {
        while self.take_outcome(cx, effects)
            || self.join(cx, effects)
            || self.end_hold(cx, effects)
            || self.claim(cx, effects)
        {}
        if self.waiters.is_empty() {
            self.trouble = None;
        }
        self.lanes.retain(|lane| !lane.is_unused());
    }

    /// Handles the outcome of a claim, if one is known.
    fn take_outcome(&mut self, cx: Context<'_>, effects: &mut Effects<W>) -> bool {
        let found = self.lanes.iter_mut().enumerate().find_map(|(index, lane)| {
            let outcome = lane.queue.collect(lane.claim?)?;
            lane.claim = None;
            Some((index, outcome))
        });
        let Some((index, outcome)) = found else { return false };
        let first = self.waiters.first();
        match outcome {
            Outcome::Granted(granted) => self.begin_hold(index, &granted, cx, effects),
            Outcome::Busy => {
                self.remote_waiters_seen = true;
                let is_try = first.and_then(|id| self.waiters.get(id));
                if let Some(id) = first
                    && is_try.is_some_and(|waiter| waiter.want.try_only)
                {
                    self.resolve(id, Outcome::Busy, effects);
                }
            }
            Outcome::Regressed { .. } => {
                if let Some(id) = first {
                    self.resolve(id, outcome, effects);
                }
            }
            Outcome::Failed(_) | Outcome::TooLate => self.fail_all(&outcome, effects),
        }
        true
    }

    fn begin_hold(&mut self, index: usize, granted: &Granted, cx: Context<'_>, effects: &mut Effects<W>) {
        let Some(lane) = self.lanes.get_mut(index) else { return };
        let (cycle, token) = (granted.lease.cycle, granted.token);
        lane.hold = Some(Hold { cycle, token });
        self.remote_waiters_seen = lane.queue.remote_waiters_seen();
        let mode = lane.mode;
        let found = self.waiters.iter().find(|(_, waiter)| waiter.want.mode == mode);
        // The task that the claim was made for may have been served elsewhere, and the turn may not
        // include the next one. The hold then ends without a guard.
        if let Some((id, since)) = found.map(|(id, waiter)| (id, waiter.since))
            && !lane.queue.came_later(since)
        {
            self.admit(index, id, token, granted.path, cx, effects);
        }
    }

    /// Gives the key to a task, under the hold of a lane.
    fn admit(
        &mut self,
        index: usize,
        id: WaiterId,
        token: FencingToken,
        path: Path,
        cx: Context<'_>,
        effects: &mut Effects<W>,
    ) {
        let (Some(lane), Some(waiter)) = (self.lanes.get_mut(index), self.waiters.get(id)) else {
            return;
        };
        let Some(lane_lease) = lane.queue.serve_for_another(&waiter.want, cx) else {
            return;
        };
        let is_shared = lane.mode == LockMode::Shared;
        let lease = if is_shared {
            let (cycle, until) = (lane_lease.cycle, lane_lease.valid_until());
            Arc::new(Lease::new(cycle, until, lane.queue.ttl()))
        } else {
            lane_lease
        };
        let hold_until = waiter
            .want
            .max_hold
            .filter(|_| is_shared)
            .map(|longest| cx.now + longest);
        self.guards.push(Guard {
            cycle: lease.cycle,
            token,
            lease: Arc::clone(&lease),
            waiter: Some(id),
            hold_until,
        });
        let outcome = Outcome::Granted(Granted {
            at: cx.now,
            lease,
            token,
            path,
        });
        self.resolve(id, outcome, effects);
    }

    /// Lets the first task share the key with those that hold it.
    fn join(&mut self, cx: Context<'_>, effects: &mut Effects<W>) -> bool {
        let is_open = |lane: &Lane| lane.mode == LockMode::Shared && lane.hold.is_some();
        let (Some(index), Some((id, first))) = (self.lanes.iter().position(is_open), self.waiters.iter().next()) else {
            return false;
        };
        let asked_at = first.since;
        let mut token = None;
        self.on_lane(index, effects, |queue| {
            let (joined, effects) = queue.join(asked_at, cx);
            token = joined;
            effects
        });
        let Some(token) = token else { return false };
        let path = if asked_at == cx.now {
            Path::Joined
        } else {
            Path::LocalHandOff
        };
        self.admit(index, id, token, path, cx, effects);
        true
    }

    /// Ends a hold without guards. A task that can use the lease claims it first, or claims the
    /// next lease of the lane if the turn must not serve it.
    fn end_hold(&mut self, cx: Context<'_>, effects: &mut Effects<W>) -> bool {
        let is_over = |lane: &Lane| {
            lane.hold
                .is_some_and(|hold| self.guards.iter().all(|guard| guard.cycle != hold.cycle))
        };
        let Some(index) = self.lanes.iter().position(is_over) else {
            return false;
        };
        let Some((mode, hold)) = self.lanes.get_mut(index).map(|lane| (lane.mode, lane.hold.take())) else {
            return false;
        };
        let first = self.waiters.first().and_then(|id| self.waiters.get(id));
        if let Some((want, since)) = first.map(|first| (first.want, first.since))
            && want.mode == mode
            && (self.may_serve(index, since, cx) || !self.has_claims_for_all(mode))
        {
            self.claim_in(index, want, since, cx, effects);
        }
        if let Some(hold) = hold {
            self.on_lane(index, effects, |queue| queue.released(hold.cycle, hold.token, cx).1);
        }
        true
    }

    /// Whether the turn of the lane includes a task that has waited since then.
    fn may_serve(&self, index: usize, since: Moment, cx: Context<'_>) -> bool {
        let lane = self.lanes.get(index);
        lane.is_some_and(|lane| lane.queue.reached_bound(since, cx).is_none())
    }

    /// Whether the tasks that may have a claim in this mode all have one.
    fn has_claims_for_all(&self, mode: LockMode) -> bool {
        let line = self.waiters.iter().take(CLAIMS_MAX);
        let tasks = line.filter(|(_, waiter)| waiter.want.mode == mode).count();
        let lanes = self.lanes.iter();
        tasks <= lanes.filter(|lane| lane.mode == mode && lane.claim.is_some()).count()
    }

    /// The lanes with a claim, those that will have a lease first before the others.
    fn claims(&self) -> Vec<usize> {
        let place = |lane: &Lane| match lane.queue.contending_cycle() {
            _ if lane.queue.holds() => (0, None),
            Some(cycle) => (1, Some(cycle)),
            // Its cycle begins when a release has been answered.
            None => (2, None),
        };
        let lanes = self.lanes.iter().enumerate();
        let mut claims: Vec<_> = lanes
            .filter(|(_, lane)| lane.claim.is_some())
            .map(|(index, lane)| (place(lane), index))
            .collect();
        claims.sort_unstable();
        claims.into_iter().map(|(_, index)| index).collect()
    }

    /// Makes a claim for the first task that has none, or gives up one that no task needs.
    fn claim(&mut self, cx: Context<'_>, effects: &mut Effects<W>) -> bool {
        let mut unused = self.claims();
        let mut wanted = None;
        for (_, waiter) in self.waiters.iter().take(CLAIMS_MAX) {
            let mode = waiter.want.mode;
            let found = unused
                .iter()
                .position(|&index| self.lanes.get(index).is_some_and(|lane| lane.mode == mode));
            match found {
                Some(place) => {
                    unused.remove(place);
                }
                None => {
                    wanted = Some((waiter.want, waiter.since));
                    break;
                }
            }
            if mode == LockMode::Shared {
                break;
            }
        }
        // A claim that nobody needs is given up before another one is made.
        if let Some(index) = unused.pop() {
            let claim = self.lanes.get_mut(index).and_then(|lane| lane.claim.take());
            if let Some(id) = claim {
                self.on_lane(index, effects, |queue| queue.give_up(id, cx));
            }
            return true;
        }
        let Some((want, since)) = wanted else { return false };
        let is_shared = want.mode == LockMode::Shared;
        if is_shared && self.lanes.iter().any(|lane| lane.hold.is_some())
            || !is_shared && self.weight_in_use() + want.mode.weight() > want.mode.limit()
        {
            return false;
        }
        let is_free = |lane: &Lane| lane.mode == want.mode && lane.claim.is_none() && lane.hold.is_none();
        let index = self.lanes.iter().position(is_free).unwrap_or_else(|| {
            let mut lane = Lane::new(want.mode);
            lane.queue.keeps_nothing = self.keeps_nothing;
            self.lanes.push(lane);
            self.lanes.len() - 1
        });
        self.claim_in(index, want, since, cx, effects);
        true
    }

    /// Makes a claim for a task that has waited since then.
    fn claim_in(
        &mut self,
        index: usize,
        want: WaiterOptions,
        since: Moment,
        cx: Context<'_>,
        effects: &mut Effects<W>,
    ) {
        let claim = WaiterOptions {
            // The patience of tasks is watched by the group.
            in_outage: InOutage::UntilOwnLimit,
            contended_hint: self.remote_waiters_seen,
            max_hold: None,
            ..want
        };
        let mut id = None;
        self.on_lane(index, effects, |queue| {
            let (claim, effects) = queue.want_since(since, claim, None, cx);
            id = Some(claim);
            effects
        });
        if let Some(lane) = self.lanes.get_mut(index) {
            lane.claim = id;
        }
    }

    /// The permits that this process has or waits for. Leases that linger are given up for others.
    fn weight_in_use(&self) -> u32 {
        let is_used = |lane: &&Lane| lane.claim.is_some() || lane.hold.is_some();
        self.lanes.iter().filter(is_used).map(|lane| lane.mode.weight()).sum()
    }

    fn fail_impatient(&mut self, cx: Context<'_>, effects: &mut Effects<W>) {
        let Some(trouble) = &mut self.trouble else { return };
        let line = self.waiters.iter();
        let failed = trouble.impatient(line.map(|(id, waiter)| (id, waiter.want.in_outage, waiter.since)), cx);
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

/// The largest number of tasks that a turn of a permit's lane serves, with `waiting` tasks in line.
///
/// A process may have several lanes, and a turn of each that served the whole line would be the
/// longer the fewer there are. With their parts of the line, the number of turns decides, and that
/// is the store's queue.
fn share_of_turn(waiting: usize, weight: u16, limit: u16) -> u32 {
    let lanes = usize::from(limit / weight.max(1)).clamp(1, CLAIMS_MAX);
    u32::try_from(waiting.div_ceil(lanes)).unwrap_or(u32::MAX).max(1)
}
