//! Timers: expiry, renewals, and retries while queued.

use std::time::Duration;

use super::Queue;
use super::effect::Effects;
use super::phase::{Occupant, Phase};
use super::types::Context;
use crate::clock::Moment;
use crate::error::LossReason;
use crate::lease::drift;
use crate::protocol::{Cycle, RenewReply};

/// A lingering lease may be released early by this fraction of its linger time (1/8).
const LINGER_EARLY: u32 = 8;
/// The longest delay before a failed renewal is retried if the store may have lost the lease.
const RENEW_AGAIN_MAX: Duration = Duration::from_secs(1);

impl<W> Queue<W> {
    /// When the next timer is due.
    pub(crate) fn next_deadline(&self) -> Option<Moment> {
        match &self.phase {
            Phase::Held(held) => {
                let ends_at = match &held.occupant {
                    Occupant::Guard(holder) => holder.hold_until,
                    Occupant::Lingering { until } => Some(*until),
                    Occupant::Nobody => None,
                };
                let renew_at = (!held.renewing).then_some(held.renew_at);
                [Some(held.lease.valid_until()), ends_at, renew_at]
                    .into_iter()
                    .flatten()
                    .min()
            }
            Phase::Queued(queued) => Some(queued.retry_at),
            Phase::Acquiring(_) | Phase::Retrying { .. } => self.outage_deadline(),
            Phase::Idle | Phase::Releasing { .. } => None,
        }
    }

    /// Time passed. If this ends a lease, the lease records the reason.
    pub(crate) fn tick(&mut self, cx: Context<'_>) -> Effects<W> {
        let mut effects = Effects::none();
        match &mut self.phase {
            Phase::Held(held) => {
                let held_for_too_long = held
                    .guard()
                    .and_then(|holder| holder.hold_until)
                    .is_some_and(|until| cx.now >= until);
                // End what would end soon, so that a hundred thousand staggered linger periods need
                // few checks.
                let kept_for_long_enough = held
                    .lingers_until()
                    .is_some_and(|until| cx.now + held.linger.time() / LINGER_EARLY >= until);
                if let Some(reason) = held.lease.loss_at(cx.now) {
                    self.lose(reason, cx, &mut effects);
                } else if held_for_too_long {
                    self.lose(LossReason::MaxHold, cx, &mut effects);
                } else if kept_for_long_enough {
                    self.end_linger(cx, &mut effects);
                }
            }
            Phase::Queued(queued) if cx.now >= queued.retry_at => self.retry_acquire(cx, &mut effects),
            Phase::Acquiring(_) | Phase::Retrying { .. } => self.tick_in_outage(cx, &mut effects),
            _ => {}
        }
        effects
    }

    /// Takes the renewal that is due or will be soon, so that all renewals of a shard are sent
    /// together. It counts as sent from now on. The second duration is how late it is.
    pub(crate) fn renewal(&mut self, cx: Context<'_>) -> Option<(Cycle, Duration, Duration)> {
        let Phase::Held(held) = &mut self.phase else {
            return None;
        };
        if held.renewing || held.renew_at > cx.now + cx.rules.renew_every(self.ttl) / 2 {
            return None;
        }
        (held.renewing, held.renewing_in) = (true, cx.epoch);
        Some((held.lease.cycle, self.ttl, cx.now.since(held.renew_at)))
    }

    /// The reply to a renewal arrived. `None` means that there was none, and the renewal is
    /// retried.
    pub(super) fn on_renewal_reply(
        &mut self,
        cycle: Cycle,
        ttl: Duration,
        sent_at: Moment,
        reply: Option<RenewReply>,
        cx: Context<'_>,
    ) -> Effects<W> {
        let mut effects = Effects::none();
        let Phase::Held(held) = &mut self.phase else {
            return effects;
        };
        if held.lease.cycle != cycle {
            return effects;
        }
        held.renewing = false;
        if held.lease.loss_at(cx.now).is_some() {
            // The reply came too late: the guard already reports its lease as invalid.
            self.lose(LossReason::Expired, cx, &mut effects);
            return effects;
        }
        // The lease may have been passed on to a task with a shorter TTL meanwhile.
        let least_ttl = ttl.min(self.ttl);
        match reply {
            Some(RenewReply::Extended { has_waiters }) => {
                held.lease.extend(sent_at + ttl - drift(ttl), ttl);
                held.confirm(held.renewing_in, sent_at, least_ttl, cx);
                held.renew_at = sent_at + cx.rules.renew_every(least_ttl);
                // The store answers again, so an extension may succeed, too.
                held.extension_failed = false;
                if held.confirmed_in != cx.epoch {
                    held.renew_at = cx.now;
                }
                if has_waiters {
                    self.note_remote_waiters(cx, &mut effects);
                }
            }
            Some(RenewReply::NotOurs) => self.lose(LossReason::Taken, cx, &mut effects),
            // The store may have changed since the renewal was sent, and the new one has not been
            // asked yet.
            None if held.renewing_in != cx.epoch => held.renew_at = cx.now,
            None => {
                let soon = cx.rules.renew_every(least_ttl) / 2;
                let is_known = held.confirmed_in == cx.epoch;
                held.renew_at = cx.now + if is_known { soon } else { soon.min(RENEW_AGAIN_MAX) };
            }
        }
        effects
    }
}
