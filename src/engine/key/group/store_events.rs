//! What arrives from the store for a lane: replies, failures, pushes, renewals.

use std::time::Duration;

use super::Group;
use crate::engine::key::outage::Trouble;
use crate::engine::key::{Context, Effects, Moment, Outage, Queue};
use crate::error::LockError;
use crate::protocol::{AcquireReply, Answer, Cycle, Grant, ReleaseReply, RenewReply};

impl<W> Group<W> {
    /// The renewal of a lease that is due or will be soon. Ask again until there is none.
    pub(in crate::engine::key) fn renewal(&mut self, cx: Context<'_>) -> Option<(Cycle, Duration, Duration)> {
        self.lanes.iter_mut().find_map(|lane| lane.queue.renewal(cx))
    }

    pub(in crate::engine::key) fn on_renewal_reply(
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

    pub(in crate::engine::key) fn on_acquire_reply(
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

    pub(in crate::engine::key) fn on_release_reply(
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

    pub(in crate::engine::key) fn on_request_failed(
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

    pub(in crate::engine::key) fn on_request_cancelled(&mut self, cycle: Cycle, cx: Context<'_>) -> Effects<W> {
        let mut effects = Effects::none();
        self.lane_of(cycle, cx, &mut effects, |queue, cx| {
            queue.on_request_cancelled(cycle, cx)
        });
        self.settle(cx, &mut effects);
        effects
    }

    pub(in crate::engine::key) fn on_grant(&mut self, grant: Grant, cx: Context<'_>) -> Effects<W> {
        let mut effects = Effects::none();
        if !self.lane_of(grant.cycle, cx, &mut effects, |queue, cx| queue.on_grant(grant, cx)) {
            effects.rare().stale_grant = true;
            effects.abandon(grant.cycle);
        }
        self.settle(cx, &mut effects);
        effects
    }

    pub(in crate::engine::key) fn on_your_turn(&mut self, cycle: Cycle, cx: Context<'_>) -> Effects<W> {
        let mut effects = Effects::none();
        if !self.lane_of(cycle, cx, &mut effects, |queue, _| queue.on_your_turn(cycle)) {
            effects.abandon(cycle);
        }
        effects
    }

    pub(in crate::engine::key) fn on_remote_waiter(&mut self, cycle: Cycle, cx: Context<'_>) -> Effects<W> {
        let mut effects = Effects::none();
        if !self.lane_of(cycle, cx, &mut effects, |queue, cx| queue.on_remote_waiter(cycle, cx)) {
            effects.abandon(cycle);
        }
        self.settle(cx, &mut effects);
        effects
    }

    pub(in crate::engine::key) fn on_resubscribed(&mut self, cx: Context<'_>) -> Effects<W> {
        let mut effects = Effects::none();
        self.each_lane(cx, &mut effects, Queue::on_resubscribed);
        effects
    }
}
