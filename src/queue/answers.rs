//! What the store says: replies, failures and pushes.

use super::Queue;
use super::effect::Effects;
use super::outage::Outage;
use super::phase::Phase;
use super::terms::Context;
use crate::error::LockError;
use crate::protocol::{AcquireReply, Answer, Cycle, Grant, ReleaseReply};

impl<W> Queue<W> {
    /// The reply to an acquire came.
    pub(crate) fn replied(&mut self, cycle: Cycle, answer: Answer<AcquireReply>, cx: Context<'_>) -> Effects<W> {
        let mut effects = Effects::none();
        match &mut self.phase {
            Phase::Asking(asking) if asking.cycle == cycle => {
                self.trouble = None;
                self.answered(answer, cx, &mut effects);
            }
            Phase::Held(held) if held.lease.cycle == cycle && held.extending => self.extended(answer, cx, &mut effects),
            // Nobody waits for it any more; whatever it left in the store goes.
            _ => match answer.reply {
                AcquireReply::Granted { .. } | AcquireReply::Queued(_) => effects.abandon(cycle),
                AcquireReply::Taken | AcquireReply::Busy => {}
            },
        }
        effects
    }

    /// The reply to a release came.
    pub(crate) fn released_remotely(
        &mut self,
        cycle: Cycle,
        answer: Answer<ReleaseReply>,
        cx: Context<'_>,
    ) -> Effects<W> {
        let mut effects = Effects::none();
        match &mut self.phase {
            Phase::Releasing { cycle: current, .. } if *current == cycle => {
                self.phase = Phase::Idle;
                self.ask(cx, &mut effects);
            }
            Phase::Asking(asking) if asking.releases == Some(cycle) => {
                asking.releases = None;
                self.trouble = None;
                match answer.reply.requeued {
                    Some(reply) => {
                        let Answer {
                            sent_at, ttl, floor, ..
                        } = answer;
                        let answer = Answer {
                            sent_at,
                            ttl,
                            floor,
                            reply,
                        };
                        self.answered(answer, cx, &mut effects);
                    }
                    None => self.ask_again(&mut effects),
                }
            }
            _ => {}
        }
        effects
    }

    /// A request failed, or had no reply in time: what it did is unknown. Waiters that depend on it are told, but for those that bear an `outage`.
    pub(crate) fn failed(
        &mut self,
        cycle: Cycle,
        error: &LockError,
        outage: Option<Outage>,
        cx: Context<'_>,
    ) -> Effects<W> {
        let mut effects = Effects::none();
        match &mut self.phase {
            Phase::Asking(asking) if asking.cycle == cycle || asking.releases == Some(cycle) => {
                if let Some(released) = asking.releases {
                    effects.abandon(released);
                }
                let (cycle, was_queued) = (asking.cycle, asking.was_queued || asking.early.is_some());
                self.suffer(error, outage, cx, &mut effects);
                if self.waiters.is_empty() {
                    effects.abandon(cycle);
                    self.phase = Phase::Idle;
                } else {
                    self.phase = Phase::Retrying { cycle, was_queued };
                }
            }
            Phase::Held(held) if held.lease.cycle == cycle && held.extending => {
                held.extending = false;
                held.in_doubt = true;
                if held.guard().is_none() {
                    self.suffer(error, outage, cx, &mut effects);
                    // It has no token for those who are left: they begin anew.
                    self.trouble = None;
                    self.release(cycle, cx, &mut effects);
                }
            }
            Phase::Releasing { cycle: current, .. } if *current == cycle => {
                effects.abandon(cycle);
                self.phase = Phase::Idle;
                self.ask(cx, &mut effects);
            }
            _ => {}
        }
        effects
    }

    /// The task that carried a request out went away before the reply came. Where others wait, the request is sent
    /// again: the store takes two requests of one cycle for one.
    pub(crate) fn dropped(&mut self, cycle: Cycle, cx: Context<'_>) -> Effects<W> {
        let mut effects = Effects::none();
        match &mut self.phase {
            Phase::Asking(asking) if asking.cycle == cycle || asking.releases == Some(cycle) => {
                if let Some(released) = asking.releases.take() {
                    effects.abandon(released);
                }
                if self.waiters.is_empty() {
                    effects.abandon(asking.cycle);
                    self.phase = Phase::Idle;
                } else {
                    self.ask_again(&mut effects);
                }
            }
            Phase::Held(held) if held.lease.cycle == cycle && held.extending => {
                held.extending = false;
                held.in_doubt = true;
                if held.guard().is_none() {
                    self.pass_on(cx, &mut effects);
                }
            }
            Phase::Releasing { cycle: current, .. } if *current == cycle => {
                effects.abandon(cycle);
                self.phase = Phase::Idle;
                self.ask(cx, &mut effects);
            }
            _ => {}
        }
        effects
    }

    /// A grant was pushed.
    ///
    /// 1. Its cycle must be the current one; otherwise that cycle is released.
    /// 2. Its tokens must be above the mark of the last "queued" reply, otherwise it is an old grant that ran out. A grant
    ///    that overtakes that reply waits for it.
    /// 3. Validity counts from the sending of the request that got the "queued" reply, since the grant was made after it. Where
    ///    less than half of the TTL is left by that count, the store is asked again.
    pub(crate) fn granted(&mut self, grant: Grant, cx: Context<'_>) -> Effects<W> {
        let mut effects = Effects::none();
        match &mut self.phase {
            Phase::Asking(asking) if asking.cycle == grant.cycle => {
                if asking
                    .early
                    .is_none_or(|early| early.tokens.first() < grant.tokens.first())
                {
                    asking.early = Some(grant);
                }
            }
            Phase::Queued(queued) if queued.cycle == grant.cycle => {
                let (mark, asked_at) = (queued.mark, queued.asked_at);
                self.enter(grant, mark, asked_at, cx, &mut effects);
            }
            // Its mark is not known, so only a reply can say whether it counts.
            Phase::Retrying { cycle, .. } if *cycle == grant.cycle => self.ask_again(&mut effects),
            Phase::Held(held) if held.lease.cycle == grant.cycle => {}
            Phase::Releasing { cycle, .. } if *cycle == grant.cycle => {}
            _ => {
                effects.rare().stale_grant = true;
                effects.abandon(grant.cycle);
            }
        }
        effects
    }

    /// The store says that it may be the turn of a cycle: it asks again, and nothing but the reply makes it the holder.
    pub(crate) fn turn(&mut self, cycle: Cycle) -> Effects<W> {
        let mut effects = Effects::none();
        match &mut self.phase {
            Phase::Queued(queued) if queued.cycle == cycle => self.ask_again(&mut effects),
            Phase::Retrying { cycle: current, .. } if *current == cycle => self.ask_again(&mut effects),
            // It may have been executed before the turn came.
            Phase::Asking(asking) if asking.cycle == cycle => asking.missed_pushes = true,
            Phase::Held(held) if held.lease.cycle == cycle => {}
            Phase::Releasing { cycle: current, .. } if *current == cycle => {}
            _ => effects.abandon(cycle),
        }
        effects
    }

    /// Somebody began to wait for what we hold. Where it is only kept, it is given back at once. A cycle that is over holds it only because a request that was
    /// given up long ago was executed late; it is released.
    pub(crate) fn wanted(&mut self, cycle: Cycle, cx: Context<'_>) -> Effects<W> {
        let mut effects = Effects::none();
        let is_current = self.is_current(cycle);
        match &mut self.phase {
            Phase::Held(held) if held.lease.cycle == cycle => self.meet_rivals(cx, &mut effects),
            Phase::Asking(asking) if asking.cycle == cycle => asking.wanted = true,
            _ if is_current => {}
            _ => effects.abandon(cycle),
        }
        effects
    }

    /// Pushes may have been missed: whoever waits in the store's queue asks again. And the store may have forgotten a lease: a renewal says so.
    pub(crate) fn resubscribed(&mut self, cx: Context<'_>) -> Effects<W> {
        let mut effects = Effects::none();
        match &mut self.phase {
            Phase::Asking(asking) => asking.missed_pushes = true,
            Phase::Queued(_) | Phase::Retrying { .. } => self.ask_again(&mut effects),
            Phase::Held(held) if held.confirmed_in != cx.epoch => held.renew_at = held.renew_at.min(cx.now),
            _ => {}
        }
        effects
    }
}
