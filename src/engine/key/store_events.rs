//! Events from the store: replies, failures and pushes.

use super::Queue;
use super::effect::Effects;
use super::event::StoreEvent;
use super::outage::StoreOutage;
use super::phase::Phase;
use super::types::Context;
use crate::error::LockError;
use crate::protocol::{AcquireReply, Answer, Cycle, Grant, ReleaseReply};

impl<W> Queue<W> {
    /// Something arrived from the store for a cycle.
    pub(crate) fn on_event(&mut self, cycle: Cycle, event: StoreEvent<'_>, cx: Context<'_>) -> Effects<W> {
        match event {
            StoreEvent::AcquireReply(answer) => self.on_acquire_reply(cycle, answer, cx),
            StoreEvent::ReleaseReply(answer) => self.on_release_reply(cycle, answer, cx),
            StoreEvent::RenewalReply { ttl, sent_at, reply } => self.on_renewal_reply(cycle, ttl, sent_at, reply, cx),
            StoreEvent::RequestFailed { error, outage } => self.on_request_failed(cycle, error, outage, cx),
            StoreEvent::RequestCancelled => self.on_request_cancelled(cycle, cx),
            StoreEvent::Grant(grant) => self.on_grant(grant, cx),
            StoreEvent::YourTurn => self.on_your_turn(cycle, cx),
            StoreEvent::RemoteWaiter => self.on_remote_waiter(cycle, cx),
        }
    }

    /// The reply to an acquire arrived.
    pub(super) fn on_acquire_reply(
        &mut self,
        cycle: Cycle,
        answer: Answer<AcquireReply>,
        cx: Context<'_>,
    ) -> Effects<W> {
        let mut effects = Effects::none();
        match &mut self.phase {
            Phase::Acquiring(acquiring) if acquiring.cycle == cycle => {
                self.outage = None;
                self.answered(answer, cx, &mut effects);
            }
            Phase::Held(held) if held.lease.cycle == cycle && held.extending => self.extended(answer, cx, &mut effects),
            // No waiter is left for this cycle. Clean up whatever it left in the store.
            _ => match answer.reply {
                AcquireReply::Granted { .. } | AcquireReply::Queued(_) => effects.abandon(cycle),
                AcquireReply::Taken | AcquireReply::Busy => {}
            },
        }
        effects
    }

    /// The reply to a release arrived.
    pub(super) fn on_release_reply(
        &mut self,
        cycle: Cycle,
        answer: Answer<ReleaseReply>,
        cx: Context<'_>,
    ) -> Effects<W> {
        let mut effects = Effects::none();
        match &mut self.phase {
            Phase::Releasing {
                cycle: current,
                in_doubt,
                ..
            } if *current == cycle => {
                // Not before the reply: if the repetition overtook the release, a guard would
                // report that its lease was lost.
                if *in_doubt {
                    effects.abandon(cycle);
                }
                self.phase = Phase::Idle;
                self.start_acquire(cx, &mut effects);
            }
            Phase::Acquiring(acquiring) if acquiring.releases == Some(cycle) => {
                if acquiring.in_doubt {
                    effects.abandon(cycle);
                }
                acquiring.releases = None;
                self.outage = None;
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
                    None => self.retry_acquire(cx, &mut effects),
                }
            }
            _ => {}
        }
        effects
    }

    /// A request failed or timed out, so its effect is unknown. Waiters that depend on it fail,
    /// except those that tolerate an `outage`.
    pub(super) fn on_request_failed(
        &mut self,
        cycle: Cycle,
        error: &LockError,
        outage: Option<StoreOutage>,
        cx: Context<'_>,
    ) -> Effects<W> {
        let mut effects = Effects::none();
        match &mut self.phase {
            Phase::Acquiring(acquiring) if acquiring.cycle == cycle || acquiring.releases == Some(cycle) => {
                if let Some(released) = acquiring.releases {
                    effects.abandon(released);
                }
                let (cycle, was_queued) = (acquiring.cycle, acquiring.was_queued || acquiring.early.is_some());
                self.on_outage_failure(error, outage, cx, &mut effects);
                if self.waiters.is_empty() {
                    effects.abandon(cycle);
                    self.phase = Phase::Idle;
                } else {
                    self.phase = Phase::Retrying { cycle, was_queued };
                }
            }
            Phase::Held(held) if held.lease.cycle == cycle && held.extending => {
                held.extending = false;
                (held.in_doubt, held.extension_failed) = (true, true);
                if held.guard().is_none() {
                    self.on_outage_failure(error, outage, cx, &mut effects);
                    // There is no token for the remaining waiters; a new cycle serves them.
                    self.outage = None;
                    self.release(cycle, &mut effects);
                }
            }
            Phase::Releasing { cycle: current, .. } if *current == cycle => {
                effects.abandon(cycle);
                self.phase = Phase::Idle;
                self.start_acquire(cx, &mut effects);
            }
            _ => {}
        }
        effects
    }

    /// The task that executed a request was cancelled before the reply arrived. If other waiters
    /// are left, the request is sent again: the store treats two requests of one cycle as one.
    pub(super) fn on_request_cancelled(&mut self, cycle: Cycle, cx: Context<'_>) -> Effects<W> {
        let mut effects = Effects::none();
        match &mut self.phase {
            Phase::Acquiring(acquiring) if acquiring.cycle == cycle || acquiring.releases == Some(cycle) => {
                if let Some(released) = acquiring.releases.take() {
                    effects.abandon(released);
                }
                if self.waiters.is_empty() {
                    effects.abandon(acquiring.cycle);
                    self.phase = Phase::Idle;
                } else {
                    self.retry_acquire(cx, &mut effects);
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
                self.start_acquire(cx, &mut effects);
            }
            _ => {}
        }
        effects
    }

    /// A grant was pushed.
    ///
    /// 1. Its cycle must be the current one. If not, the granted cycle is released; if the request
    ///    in flight releases it already, once more after the reply.
    /// 2. Its tokens must be above the enqueue mark of the last "queued" reply. If not, it is an
    ///    old grant that has expired. A grant that overtakes the reply is kept until the reply
    ///    arrives.
    /// 3. Validity counts from when the request that got the "queued" reply was sent, because the
    ///    grant was made after that. If at most half of the TTL is left by that count, the acquire
    ///    is sent again.
    /// 4. The server must not have been replaced since then, since the new one knows nothing of the
    ///    grant. If it has, the acquire is sent again.
    pub(super) fn on_grant(&mut self, grant: Grant, cx: Context<'_>) -> Effects<W> {
        let mut effects = Effects::none();
        match &mut self.phase {
            Phase::Acquiring(acquiring) if acquiring.cycle == grant.cycle => {
                if acquiring
                    .early
                    .is_none_or(|early| early.tokens.first() < grant.tokens.first())
                {
                    acquiring.early = Some(grant);
                }
            }
            Phase::Queued(queued) if queued.cycle == grant.cycle => {
                let (enqueue_token, sent_at) = (queued.enqueue_token, queued.sent_at);
                self.enter(grant, enqueue_token, sent_at, cx, &mut effects);
            }
            // The enqueue mark is unknown, so only a reply can confirm the grant.
            Phase::Retrying { cycle, .. } if *cycle == grant.cycle => self.retry_acquire(cx, &mut effects),
            Phase::Held(held) if held.lease.cycle == grant.cycle => {}
            Phase::Releasing { cycle, .. } if *cycle == grant.cycle => {}
            Phase::Acquiring(acquiring) if acquiring.releases == Some(grant.cycle) => {
                effects.rare().stale_grant = true;
                acquiring.in_doubt = true;
            }
            _ => {
                effects.rare().stale_grant = true;
                effects.abandon(grant.cycle);
            }
        }
        effects
    }

    /// The store reports that the cycle may be at the head of its queue. The acquire is sent again,
    /// and only the reply to it makes the manager the holder.
    pub(super) fn on_your_turn(&mut self, cycle: Cycle, cx: Context<'_>) -> Effects<W> {
        let mut effects = Effects::none();
        match &mut self.phase {
            Phase::Queued(queued) if queued.cycle == cycle => self.retry_acquire(cx, &mut effects),
            Phase::Retrying { cycle: current, .. } if *current == cycle => self.retry_acquire(cx, &mut effects),
            // The request in flight may have been executed before the turn came.
            Phase::Acquiring(acquiring) if acquiring.cycle == cycle => acquiring.missed_pushes = true,
            Phase::Held(held) if held.lease.cycle == cycle => {}
            Phase::Releasing { cycle: current, .. } if *current == cycle => {}
            Phase::Acquiring(acquiring) if acquiring.releases == Some(cycle) => acquiring.in_doubt = true,
            _ => effects.abandon(cycle),
        }
        effects
    }

    /// A remote waiter began to wait for what we hold. A lingering lease is released at once. A
    /// cycle that is over can only hold the lease because a request given up long ago was executed
    /// late; it is released too.
    pub(super) fn on_remote_waiter(&mut self, cycle: Cycle, cx: Context<'_>) -> Effects<W> {
        let mut effects = Effects::none();
        let is_current = self.is_current(cycle);
        match &mut self.phase {
            Phase::Held(held) if held.lease.cycle == cycle => self.note_remote_waiters(cx, &mut effects),
            Phase::Acquiring(acquiring) if acquiring.cycle == cycle => acquiring.remote_waiter_seen = true,
            _ if is_current => {}
            _ => effects.abandon(cycle),
        }
        effects
    }

    /// Pushes may have been missed, so a manager waiting in the store's queue sends its acquire
    /// again. The store may also have lost a lease; a renewal finds out.
    pub(crate) fn on_resubscribed(&mut self, cx: Context<'_>) -> Effects<W> {
        let mut effects = Effects::none();
        match &mut self.phase {
            Phase::Acquiring(acquiring) => acquiring.missed_pushes = true,
            Phase::Queued(_) | Phase::Retrying { .. } => self.retry_acquire(cx, &mut effects),
            Phase::Held(held) if held.confirmed_in != cx.epoch => held.renew_at = held.renew_at.min(cx.now),
            _ => {}
        }
        effects
    }
}
