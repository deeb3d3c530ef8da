//! What time brings: losses, renewals, another look at an owner.

use std::time::Duration;

use super::effect::Effects;
use super::phase::{Phase, Tenant};
use super::terms::Context;
use super::{Queue, drift};
use crate::clock::Moment;
use crate::error::LossReason;
use crate::protocol::{Cycle, RenewReply};

/// A lease that is kept may be given back earlier by one part in so many of the time.
const LINGER_EARLY: u32 = 8;
/// The longest time until a renewal without an answer is sent again where the store may have forgotten the lease.
const RENEW_AGAIN_MAX: Duration = Duration::from_secs(1);

impl<W> Queue<W> {
    /// When something is due next.
    pub(crate) fn look_at(&self) -> Option<Moment> {
        match &self.phase {
            Phase::Held(held) => {
                let ends_at = match &held.tenant {
                    Tenant::Guard(holder) => holder.hold_until,
                    Tenant::Lingering { until } => Some(*until),
                    Tenant::Nobody => None,
                };
                let renew_at = (!held.renewing).then_some(held.renew_at);
                [Some(held.lease.valid_until()), ends_at, renew_at]
                    .into_iter()
                    .flatten()
                    .min()
            }
            Phase::Queued(queued) => Some(queued.ask_again_at),
            Phase::Asking(_) | Phase::Retrying { .. } => self.look_at_trouble(),
            Phase::Idle | Phase::Releasing { .. } => None,
        }
    }

    /// Time passed. Where a lease was lost by it, the lease says why.
    pub(crate) fn tick(&mut self, cx: Context<'_>) -> Effects<W> {
        let mut effects = Effects::none();
        match &mut self.phase {
            Phase::Held(held) => {
                let held_for_too_long = held
                    .guard()
                    .and_then(|holder| holder.hold_until)
                    .is_some_and(|until| cx.now >= until);
                // What would end soon ends now, so that a hundred thousand that end one after the other cost few looks.
                let kept_for_long_enough = held
                    .lingers_until()
                    .is_some_and(|until| cx.now + held.linger.time() / LINGER_EARLY >= until);
                if cx.now >= held.lease.valid_until() {
                    self.lose(LossReason::Expired, cx, &mut effects);
                } else if held_for_too_long {
                    self.lose(LossReason::MaxHold, cx, &mut effects);
                } else if kept_for_long_enough {
                    self.end_linger(cx, &mut effects);
                }
            }
            Phase::Queued(queued) if cx.now >= queued.ask_again_at => self.ask_again(&mut effects),
            Phase::Asking(_) | Phase::Retrying { .. } => self.tick_in_trouble(cx, &mut effects),
            _ => {}
        }
        effects
    }

    /// The renewal that is due, or soon will be, so that all of a shard go out together; from now on it counts as sent. Also
    /// says how late it is.
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

    /// The reply to a renewal came; `None` if there was none, in which case it is tried again.
    pub(crate) fn renewed(
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
            // Told too late: the guard has said already that it is not valid any more.
            self.lose(LossReason::Expired, cx, &mut effects);
            return effects;
        }
        match reply {
            Some(RenewReply::Extended { wanted }) => {
                held.lease.extend(sent_at + ttl - drift(ttl), ttl);
                held.confirm(held.renewing_in, sent_at, ttl, cx);
                held.renew_at = sent_at + cx.rules.renew_every(ttl);
                if held.confirmed_in != cx.epoch {
                    held.renew_at = cx.now;
                }
                if wanted {
                    self.meet_rivals(cx, &mut effects);
                }
            }
            Some(RenewReply::NotOurs) => self.lose(LossReason::Taken, cx, &mut effects),
            // The store may be another one by now, which has not been asked yet.
            None if held.renewing_in != cx.epoch => held.renew_at = cx.now,
            None => {
                let soon = cx.rules.renew_every(ttl) / 2;
                let is_known = held.confirmed_in == cx.epoch;
                held.renew_at = cx.now + if is_known { soon } else { soon.min(RENEW_AGAIN_MAX) };
            }
        }
        effects
    }
}
