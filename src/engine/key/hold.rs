//! The steps from the lease to its end: serving waiters, passing it on, releasing it, losing it.

use std::sync::Arc;
use std::time::Duration;

use super::effect::{Bound, Effects, Request};
use super::phase::{Acquiring, Held, Holder, Occupant, Phase, Turn};
use super::types::{Context, Granted, Linger, MinHold, Outcome, Path, WaiterOptions};
use super::waiters::WaiterId;
use super::{BLOCK_LINGERING, BLOCK_MAX, BLOCK_MIN, BLOCK_OF_GRANT, Queue};
use crate::clock::Moment;
use crate::error::LossReason;
use crate::fence::{FencingToken, TokenBlock};
use crate::lease::{Lease, drift};
use crate::mode::LockMode;
use crate::protocol::{AcquireKind, AcquireReply, Answer, Cycle};

impl<W> Queue<W> {
    /// The lease is ours. Validity counts from `sent_at`.
    #[expect(
        clippy::too_many_arguments,
        reason = "the parts of one fact, named at both call sites"
    )]
    pub(super) fn hold(
        &mut self,
        cycle: Cycle,
        tokens: TokenBlock,
        ttl: Duration,
        sent_at: Moment,
        path: Path,
        cx: Context<'_>,
        effects: &mut Effects<W>,
    ) {
        let valid_until = sent_at + ttl.saturating_sub(drift(ttl));
        if valid_until <= cx.now {
            return self.arrived_too_late(cycle, ttl, cx, effects);
        }
        if self.min_hold_of_first().time() > ttl {
            // The waiter that the lease was requested for has left.
            return self.retry_acquire(cx, effects);
        }
        // The owner of an odd cycle is not notified of remote waiters, so it assumes that there are
        // some.
        let remote_waiters = self.remote_waiters_seen || cycle.expects_remote_waiters();
        let turn = Turn::begin(cx.now, 0, self.in_line(), self.share);
        self.phase = Phase::Held(Held {
            lease: Arc::new(Lease::new(cycle, valid_until, ttl)),
            tokens,
            spare: TokenBlock::EMPTY,
            left_when_asked: 0,
            used_in_a_round_trip: 0,
            occupant: Occupant::Nobody,
            linger: Linger::NONE,
            min_hold_until: None,
            extending: false,
            in_doubt: false,
            extension_failed: false,
            turn: remote_waiters.then_some(turn),
            served_in_all: 0,
            renew_at: sent_at + cx.rules.renew_every(ttl),
            renewing: false,
            confirmed_in: self.asked_in,
            renewing_in: self.asked_in,
            confirmed_until: sent_at + cx.rules.confirmed_for(ttl),
        });
        self.serve(path, cx, effects);
    }

    /// Handles the reply to an acquire that extends our lease.
    pub(super) fn extended(&mut self, answer: Answer<AcquireReply>, cx: Context<'_>, effects: &mut Effects<W>) {
        let Phase::Held(held) = &mut self.phase else { return };
        held.extending = false;
        if held.lease.loss_at(cx.now).is_some() {
            let cycle = held.lease.cycle;
            effects.abandon(cycle);
            return self.lose(LossReason::Expired, cx, effects);
        }
        match answer.reply {
            AcquireReply::Granted {
                tokens,
                queued,
                extended: true,
            } if tokens.first() > answer.floor => {
                held.lease
                    .extend(answer.sent_at + answer.ttl - drift(answer.ttl), answer.ttl);
                held.used_in_a_round_trip = held.left_when_asked.saturating_sub(held.tokens.remaining());
                held.confirm(self.asked_in, answer.sent_at, answer.ttl, cx);
                // This confirmation suffices for the next guard, no matter how long the reply took.
                held.confirmed_until = held.confirmed_until.max(cx.now);
                held.add_tokens(tokens);
                held.extension_failed = false;
                if matches!(held.occupant, Occupant::Nobody) {
                    if queued > 0 {
                        self.note_remote_waiters(cx, effects);
                    }
                    self.pass_on(cx, effects);
                } else if queued > 0 {
                    self.note_remote_waiters(cx, effects);
                }
            }
            // The lease was gone, and another manager may have held the key since. If the store
            // granted it to this cycle again or queued the cycle, the abandoned cycle is released.
            _ => {
                let cycle = held.lease.cycle;
                self.lose(LossReason::Taken, cx, effects);
                effects.abandon(cycle);
            }
        }
    }

    /// Other managers wait for what we hold. A lingering lease is released to them.
    pub(super) fn note_remote_waiters(&mut self, cx: Context<'_>, effects: &mut Effects<W>) {
        let (waiting, share) = (self.in_line(), self.share);
        let Phase::Held(held) = &mut self.phase else { return };
        held.note_remote_waiters(waiting, share, cx.now);
        self.remote_waiters_seen = true;
        self.end_linger(cx, effects);
    }

    /// The guard is gone. The lease goes to the next local waiter or to another process, or
    /// lingers, or is released.
    pub(super) fn pass_on(&mut self, cx: Context<'_>, effects: &mut Effects<W>) {
        let needs_new_lease = !self.min_hold_of_first().is_none();
        let bound = self.waiting_since().and_then(|since| self.reached_bound(since, cx));
        let Phase::Held(held) = &mut self.phase else { return };
        held.occupant = Occupant::Nobody;
        let is_over = needs_new_lease || held.min_hold_until.is_some_and(|until| cx.now < until);
        if self.waiters.is_empty() && !is_over && held.may_linger() && !self.keeps_nothing && cx.capacity.has_room() {
            return self.linger(cx, effects);
        }
        if held.extending && (is_over || self.waiters.is_empty() || bound.is_some()) {
            // An extension is in flight. Wait for its reply, or it could acquire the lease again
            // after the release.
            return;
        }
        let cycle = held.lease.cycle;
        if is_over || self.waiters.is_empty() {
            return self.release(cycle, effects);
        }
        if let Some(bound) = bound {
            // A try that waits for an extension must not wait for other managers as well.
            self.refuse_tries(effects);
            if self.waiters.is_empty() {
                return self.release(cycle, effects);
            }
            effects.yielded = Some(bound);
            return self.requeue(cycle, cx, effects);
        }
        self.serve(Path::LocalHandOff, cx, effects);
    }

    /// Keeps the lease for the next local task. Reserves tokens in advance, so that later
    /// acquisitions need no message.
    fn linger(&mut self, cx: Context<'_>, effects: &mut Effects<W>) {
        let Phase::Held(held) = &mut self.phase else { return };
        let until = cx.now + held.linger.time();
        held.occupant = Occupant::Lingering { until };
        if held.is_low_on_tokens(cx) {
            self.extend(cx, effects);
        }
    }

    /// A task wants the lingering lease.
    pub(super) fn resume(&mut self, cx: Context<'_>, effects: &mut Effects<W>) {
        let Phase::Held(held) = &mut self.phase else { return };
        if held.lease.loss_at(cx.now).is_some() {
            // The lease expired unnoticed, and another manager may have the key.
            return self.lose(LossReason::Expired, cx, effects);
        }
        held.occupant = Occupant::Nobody;
        if !self.min_hold_of_first().is_none() {
            return self.pass_on(cx, effects);
        }
        self.serve(Path::Lingering, cx, effects);
    }

    /// The `min_hold` of the first waiter.
    pub(super) fn min_hold_of_first(&self) -> MinHold {
        let first = self.waiters.front();
        first.map_or(MinHold::NONE, |first| first.options.min_hold)
    }

    /// Releases the lease if it is lingering.
    pub(super) fn end_linger(&mut self, cx: Context<'_>, effects: &mut Effects<W>) {
        let Phase::Held(held) = &mut self.phase else { return };
        if held.lingers_until().is_some() {
            held.linger = Linger::NONE;
            self.pass_on(cx, effects);
            if let Phase::Releasing { lingered, .. } = &mut self.phase {
                *lingered = true;
            }
        }
    }

    /// Serves the first waiter from a lease that has no guard.
    pub(super) fn serve(&mut self, path: Path, cx: Context<'_>, effects: &mut Effects<W>) {
        let Some(id) = self.waiters.first() else {
            return self.pass_on(cx, effects);
        };
        let waiting = self.in_line();
        let Phase::Held(held) = &mut self.phase else { return };
        // Renewals keep the validity close to the full TTL. If little is left, renewals are failing
        // and the lease should not be passed on.
        let long_enough = held.lease.remaining(cx.now) * 4 >= self.ttl;
        let is_older = matches!(path, Path::LocalHandOff | Path::Lingering);
        let is_good = !is_older || long_enough && held.is_confirmed(cx);
        let token = if is_good { held.serve_next() } else { None };
        let Some(token) = token else {
            return self.extend(cx, effects);
        };
        let Some(waiter) = self.waiters.get_mut(id) else { return };
        self.ttl = waiter.options.ttl;
        held.renew_as_for(self.ttl, cx);
        let hold_until = waiter.options.max_hold.map(|longest| cx.now + longest);
        held.linger = waiter.options.linger;
        held.min_hold_until = None;
        if !waiter.options.min_hold.is_none() {
            let until = cx.now + waiter.options.min_hold.time();
            held.min_hold_until = Some(until);
            cx.min_holds.record(held.lease.cycle, until, cx.now);
        }
        held.occupant = Occupant::Guard(Holder {
            token,
            waiter: Some(id),
            hold_until,
        });
        let outcome = Outcome::Granted(Granted {
            at: cx.now,
            lease: Arc::clone(&held.lease),
            token,
            path,
        });
        if waiting > 1 && held.is_low_on_tokens(cx) {
            self.extend(cx, effects);
        }
        self.resolve(id, outcome, effects);
    }

    /// Whether a task that has waited since `waiting_since` came after the turn of our lease began.
    pub(super) fn came_later(&self, waiting_since: Moment) -> bool {
        matches!(&self.phase, Phase::Held(held) if held.came_later(waiting_since))
    }

    /// Why our lease must not serve one more task, which has waited since `waiting_since`, if
    /// remote waiters are the reason.
    pub(super) fn reached_bound(&self, waiting_since: Moment, cx: Context<'_>) -> Option<Bound> {
        match &self.phase {
            Phase::Held(held) => held.reached_bound(waiting_since, cx),
            _ => None,
        }
    }

    /// The number of tasks that wait for our lease.
    fn in_line(&self) -> u64 {
        (self.waiters.len() as u64).max(self.beside)
    }

    /// Whether a task that has waited since `waiting_since` may be let in beside the present guard.
    pub(super) fn may_join(&self, waiting_since: Moment, cx: Context<'_>) -> bool {
        let Phase::Held(held) = &self.phase else { return false };
        let is_held = held.guard().is_some() && held.lease.loss_at(cx.now).is_none();
        is_held && held.reached_bound(waiting_since, cx).is_none()
    }

    /// Lets a task that has waited since `waiting_since` in beside the present guard, and returns
    /// its token. If the lease has too little time or no tokens left, it is extended first, and the
    /// task has to ask again.
    pub(super) fn join(&mut self, waiting_since: Moment, cx: Context<'_>) -> (Option<FencingToken>, Effects<W>) {
        let mut effects = Effects::none();
        if !self.may_join(waiting_since, cx) {
            return (None, effects);
        }
        let Phase::Held(held) = &mut self.phase else {
            return (None, effects);
        };
        let is_good = held.lease.remaining(cx.now) * 4 >= self.ttl && held.is_confirmed(cx);
        let token = if is_good { held.serve_next() } else { None };
        if !held.extension_failed && (token.is_none() || held.is_low_on_tokens(cx)) {
            self.extend(cx, &mut effects);
        }
        (token, effects)
    }

    /// Whether a task that has waited since `waiting_since` may be let in beside the present guard,
    /// but there is no token for it and none will come: the last extension failed.
    pub(super) fn cannot_join(&self, waiting_since: Moment, cx: Context<'_>) -> bool {
        let failed = matches!(&self.phase, Phase::Held(held) if held.extension_failed && !held.extending);
        failed && self.may_join(waiting_since, cx)
    }

    /// Lets the next task that needs an extension try one, although the last one failed.
    pub(super) const fn retry_extension(&mut self) {
        if let Phase::Held(held) = &mut self.phase {
            held.extension_failed = false;
        }
    }

    /// The guard is for another waiter than the one that was served. Returns the lease.
    pub(super) fn serve_for_another(&mut self, options: &WaiterOptions, cx: Context<'_>) -> Option<Arc<Lease>> {
        let Phase::Held(held) = &mut self.phase else {
            return None;
        };
        held.linger = options.linger;
        if self.mode == LockMode::Shared {
            // Each guard watches its own `max_hold`.
            self.ttl = self.ttl.max(options.ttl);
        } else {
            self.ttl = options.ttl;
            if let Occupant::Guard(holder) = &mut held.occupant {
                holder.hold_until = options.max_hold.map(|longest| cx.now + longest);
            }
        }
        held.renew_as_for(self.ttl, cx);
        Some(Arc::clone(&held.lease))
    }

    /// Requests more time and tokens under our lease.
    pub(super) fn extend(&mut self, cx: Context<'_>, effects: &mut Effects<W>) {
        let waiting = self.in_line();
        let Phase::Held(held) = &mut self.phase else { return };
        if held.extending {
            return;
        }
        (held.extending, self.asked_in) = (true, cx.epoch);
        held.left_when_asked = held.tokens.remaining();
        let least = match held.occupant {
            Occupant::Lingering { .. } => BLOCK_LINGERING,
            Occupant::Nobody | Occupant::Guard(_) => BLOCK_MIN,
        };
        let tokens = waiting.max(16 * held.used_in_a_round_trip).clamp(least, BLOCK_MAX) as u32;
        effects.request(Request::Acquire {
            cycle: held.lease.cycle,
            kind: AcquireKind::Extend,
            ttl: self.ttl,
            tokens,
        });
    }

    pub(super) fn release(&mut self, cycle: Cycle, effects: &mut Effects<W>) {
        self.finish_hold(effects);
        let nobody_waits = matches!(&self.phase, Phase::Held(Held { turn: None, .. }));
        self.phase = Phase::Releasing {
            cycle,
            lingered: false,
            in_doubt: self.is_in_doubt(),
        };
        effects.request(Request::Release {
            cycle,
            requeue: None,
            nobody_waits,
            tokens: BLOCK_OF_GRANT,
        });
    }

    pub(super) fn requeue(&mut self, cycle: Cycle, cx: Context<'_>, effects: &mut Effects<W>) {
        self.finish_hold(effects);
        let in_doubt = self.is_in_doubt();
        self.take_ttl_of_first();
        let next = cx.open_cycle(self.mode, self.remote_waiters_seen, self.ttl);
        self.asked_in = cx.epoch;
        self.phase = Phase::Acquiring(Acquiring {
            in_doubt,
            ..Acquiring::new(next, AcquireKind::Enqueue, Some(cycle))
        });
        effects.request(Request::Release {
            cycle,
            requeue: Some(next),
            nobody_waits: false,
            tokens: BLOCK_OF_GRANT,
        });
    }

    /// Whether an extension without a reply may execute after a release that is sent now, which has
    /// to be repeated then.
    const fn is_in_doubt(&self) -> bool {
        matches!(&self.phase, Phase::Held(Held { in_doubt: true, .. }))
    }

    /// The lease is lost. A guard that is out keeps only its lost lease, and waiters start over.
    pub(super) fn lose(&mut self, reason: LossReason, cx: Context<'_>, effects: &mut Effects<W>) {
        let Phase::Held(held) = &mut self.phase else { return };
        held.lease.lose(reason);
        effects.rare().ended.push(Arc::clone(&held.lease));
        let holder = match std::mem::replace(&mut held.occupant, Occupant::Nobody) {
            Occupant::Guard(holder) => Some(holder),
            Occupant::Nobody | Occupant::Lingering { .. } => None,
        };
        let is_out = holder.as_ref().is_some_and(|holder| holder.waiter.is_none());
        if is_out {
            effects.rare().lost.push(reason);
        } else if holder.is_some() {
            held.cancel_min_hold(cx);
        }
        // An outstanding guard releases the lease when it is dropped. Without one, schedule the
        // release: the store may still have the lease, because it was held for too long or a
        // renewal without a reply was executed. An extension in flight may still acquire the key,
        // or a place in the queue, for this dead cycle. If the store has lost the lease, the
        // release makes it serve its waiters.
        if !is_out || held.extending || held.in_doubt || reason == LossReason::Taken {
            effects.abandon(held.lease.cycle);
        } else if !self.closed {
            self.lost_cycles.push(held.lease.cycle);
        }
        if let Some(id) = holder.and_then(|holder| holder.waiter) {
            // The waiter has not collected its guard yet and would get a lost one. It returns to
            // the front.
            if let Some(waiter) = self.waiters.get_mut(id) {
                waiter.outcome = None;
                let class = waiter.options.class;
                self.note_class(class);
            }
            self.waiters.return_to_front(id);
        }
        self.finish_hold(effects);
        self.phase = Phase::Idle;
        self.remote_waiters_seen = true;
        self.start_acquire(cx, effects);
    }

    /// The shard now belongs to managers with another shard map. A lease there no longer excludes
    /// them, nor does a grant from managers that have not noticed the change yet.
    pub(crate) fn disown(&mut self, cx: Context<'_>) -> Effects<W> {
        let mut effects = Effects::none();
        match &self.phase {
            Phase::Held(_) => self.lose(LossReason::ShardMap, cx, &mut effects),
            Phase::Queued(_) | Phase::Retrying { .. } => self.retry_acquire(cx, &mut effects),
            Phase::Idle | Phase::Acquiring(_) | Phase::Releasing { .. } => {}
        }
        effects
    }

    /// Reports how many guards the lease has served, if one is held.
    pub(super) const fn finish_hold(&self, effects: &mut Effects<W>) {
        if let Phase::Held(held) = &self.phase {
            effects.served = Some(held.served_in_all);
        }
    }

    pub(super) fn fail_all(&mut self, outcome: &Outcome, effects: &mut Effects<W>) {
        while let Some(id) = self.waiters.first() {
            self.resolve(id, outcome.clone(), effects);
        }
    }

    /// Fails the tries at the front of the line, because other managers want the key.
    pub(super) fn refuse_tries(&mut self, effects: &mut Effects<W>) {
        while let Some(id) = self.waiters.first()
            && self.waiters.get(id).is_some_and(|waiter| waiter.options.try_only)
        {
            self.resolve(id, Outcome::Busy, effects);
        }
    }

    /// Takes a waiter out of the line and sets its outcome.
    pub(super) fn resolve(&mut self, id: WaiterId, outcome: Outcome, effects: &mut Effects<W>) {
        self.waiters.detach(id);
        if let Some(waiter) = self.waiters.get_mut(id) {
            waiter.outcome = Some(outcome);
            effects.wake(waiter.waker.take());
        }
    }
}
