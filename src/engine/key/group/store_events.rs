//! What arrives from the store for a lane: replies, failures, pushes, renewals.

use std::time::Duration;

use super::Group;
use crate::engine::key::outage::KeyOutage;
use crate::engine::key::{Context, Effects, LockMode, Moment, Outcome, Queue, StoreEvent};
use crate::error::LockError;
use crate::protocol::{AcquireReply, Cycle};

impl<W> Group<W> {
    /// The renewal of a lease that is due or will be soon. Ask again until there is none.
    pub(in crate::engine::key) fn renewal(&mut self, cx: Context<'_>) -> Option<(Cycle, Duration, Duration)> {
        self.lanes.iter_mut().find_map(|lane| lane.queue.renewal(cx))
    }

    /// See [`Queue::on_event`].
    pub(in crate::engine::key) fn on_event(
        &mut self,
        cycle: Cycle,
        event: StoreEvent<'_>,
        cx: Context<'_>,
    ) -> Effects<W> {
        let mut effects = Effects::none();
        if matches!(event, StoreEvent::AcquireReply(_) | StoreEvent::ReleaseReply(_)) {
            self.outage = None;
        }
        let is_known = self.lane_of(cycle, cx, &mut effects, |queue, cx| queue.on_event(cycle, event, cx));
        match event {
            // The cycle is over, and what it left in the store must not stay.
            StoreEvent::AcquireReply(answer) if !is_known => match answer.reply {
                AcquireReply::Granted { .. } | AcquireReply::Queued(_) => effects.abandon(cycle),
                AcquireReply::Taken | AcquireReply::Busy => {}
            },
            StoreEvent::Grant(_) if !is_known => {
                effects.rare().stale_grant = true;
                effects.abandon(cycle);
            }
            StoreEvent::YourTurn | StoreEvent::RemoteWaiter if !is_known => effects.abandon(cycle),
            StoreEvent::RequestFailed {
                error,
                outage: Some(outage),
            } if !self.waiters.is_empty() => {
                self.outage = Some(Box::new(KeyOutage::after(self.outage.take(), outage, error)));
                self.fail_impatient(cx, &mut effects);
            }
            _ => {}
        }
        self.settle(cx, &mut effects);
        if let StoreEvent::RequestFailed { error, outage: None } = event {
            self.refuse_joining(error, cx, &mut effects);
        }
        effects
    }

    /// The store refused a request. Fails the tasks that would share the key, but for which the
    /// store issues no tokens.
    fn refuse_joining(&mut self, error: &LockError, cx: Context<'_>, effects: &mut Effects<W>) {
        while let Some(id) = self.waiters.first()
            && self
                .waiters
                .get(id)
                .is_some_and(|waiter| self.is_refused_to_join(waiter.since, cx))
        {
            self.resolve(id, Outcome::Failed(error.clone()), effects);
        }
    }

    fn is_refused_to_join(&self, waiting_since: Moment, cx: Context<'_>) -> bool {
        let mut held = self.lanes.iter().filter(|lane| lane.hold.is_some());
        held.any(|lane| lane.mode == LockMode::Shared && lane.queue.cannot_join(waiting_since, cx))
    }

    pub(in crate::engine::key) fn on_resubscribed(&mut self, cx: Context<'_>) -> Effects<W> {
        let mut effects = Effects::none();
        self.each_lane(cx, &mut effects, Queue::on_resubscribed);
        effects
    }
}
