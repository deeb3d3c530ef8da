//! The steps from the first waiter to the lease.

use std::time::Duration;

use super::effect::{Effects, Request};
use super::phase::{Acquiring, Phase, Queued};
#[cfg(test)]
use super::types::Flaw;
use super::types::{Context, Outcome, Path};
use super::{BLOCK_MAX, BLOCK_MIN, Queue};
use crate::clock::Moment;
use crate::mode::LockMode;
use crate::protocol::{AcquireKind, AcquireReply, Answer, Cycle, Grant, QueuePosition};

/// How many replies may arrive after the lease has expired before the waiters fail.
const TOO_LATE_MAX: u32 = 3;
/// How long after the expiry of the owner's lease the head of the queue asks again. Each position
/// further back adds the same amount.
const SPREAD: Duration = Duration::from_millis(2);
/// How often the head of the queue checks on a foreign owner, which does not notify us when it
/// releases.
const FOREIGN_OWNER_RETRY: Duration = Duration::from_millis(400);
/// How often a cycle asks again if grants cannot reach this manager. When its turn comes, the
/// script reserves the lease for it for one second.
const UNREACHED_RETRY: Duration = Duration::from_millis(250);
/// The longest interval between two acquires while queued. The next holder may die with a shorter
/// lease than the one last seen, and each acquire keeps the store's queue from expiring.
const RETRY_MAX: Duration = Duration::from_secs(10);

impl<W> Queue<W> {
    /// Starts a cycle for the first waiter, if there is one.
    pub(super) fn start_acquire(&mut self, cx: Context<'_>, effects: &mut Effects<W>) {
        let Some(first) = self.waiters.front() else {
            return;
        };
        let kind = match (first.options.try_only, self.remote_waiters_seen) {
            (true, _) => AcquireKind::Try,
            (false, true) => AcquireKind::Enqueue,
            // The fast path is for exclusive locks.
            (false, false) if self.mode != LockMode::Exclusive => AcquireKind::Enqueue,
            (false, false) => AcquireKind::Fast,
        };
        // A try cannot be queued, so as an owner it needs notifications of remote waiters.
        let expects_remote_waiters = kind == AcquireKind::Enqueue && self.remote_waiters_seen;
        self.start_acquire_as(kind, expects_remote_waiters, cx, effects);
    }

    /// Starts a cycle.
    pub(super) fn start_acquire_as(
        &mut self,
        kind: AcquireKind,
        expects_remote_waiters: bool,
        cx: Context<'_>,
        effects: &mut Effects<W>,
    ) {
        self.take_ttl_of_first();
        let cycle = cx.open_cycle(self.mode, expects_remote_waiters, self.ttl);
        self.asked_in = cx.epoch;
        self.phase = Phase::Acquiring(Acquiring::new(cycle, kind, None));
        let request = self.acquire_request(cycle, kind);
        effects.request(request);
    }

    /// Sends the acquire of the current cycle again. A try remains a try: it must not join the
    /// store's queue.
    pub(super) fn retry_acquire(&mut self, cx: Context<'_>, effects: &mut Effects<W>) {
        let first = self.waiters.front();
        let kind = if first.is_some_and(|first| first.options.try_only) {
            AcquireKind::Try
        } else {
            AcquireKind::Enqueue
        };
        let (cycle, was_queued, too_late) = match &self.phase {
            Phase::Queued(queued) => (queued.cycle, true, 0),
            Phase::Acquiring(acquiring) => (acquiring.cycle, acquiring.was_queued, acquiring.too_late),
            Phase::Retrying { cycle, was_queued } => (*cycle, *was_queued, 0),
            _ => return,
        };
        let mut acquiring = Acquiring::new(cycle, kind, None);
        (acquiring.was_queued, acquiring.too_late) = (was_queued, too_late);
        self.asked_in = cx.epoch;
        self.phase = Phase::Acquiring(acquiring);
        let request = self.acquire_request(cycle, kind);
        effects.request(request);
    }

    /// The lease gets the TTL requested by the first waiter.
    pub(super) fn take_ttl_of_first(&mut self) {
        if let Some(first) = self.waiters.front() {
            self.ttl = first.options.lease_ttl();
        }
    }

    pub(super) fn acquire_request(&mut self, cycle: Cycle, kind: AcquireKind) -> Request {
        self.take_ttl_of_first();
        let lingers = self
            .waiters
            .front()
            .is_some_and(|first| !first.options.linger.is_none());
        // One token is enough if no other task waits, unless the lease is to linger for later
        // tasks.
        let tokens = match (self.waiters.len() as u64).max(self.beside) {
            0 | 1 if lingers || self.mode == LockMode::Shared => BLOCK_MIN,
            0 | 1 => 1,
            waiting => (2 * waiting).clamp(BLOCK_MIN, BLOCK_MAX),
        };
        Request::Acquire {
            cycle,
            kind,
            ttl: self.ttl,
            tokens: tokens as u32,
        }
    }

    /// Handles the reply to the acquire that [`Phase::Acquiring`] waits for.
    pub(super) fn answered(&mut self, answer: Answer<AcquireReply>, cx: Context<'_>, effects: &mut Effects<W>) {
        let Phase::Acquiring(acquiring) = &mut self.phase else {
            return;
        };
        let (cycle, kind, was_queued) = (
            acquiring.cycle,
            acquiring.kind,
            acquiring.was_queued || acquiring.early.is_some(),
        );
        match answer.reply {
            AcquireReply::Granted { tokens, .. } if tokens.first() <= answer.floor && kind == AcquireKind::Fast => {
                // The counter was lost. The script raises it.
                self.retry_acquire(cx, effects);
            }
            AcquireReply::Granted { tokens, .. } if tokens.first() <= answer.floor => {
                self.regress(cycle, tokens.first(), answer.floor, cx, effects);
            }
            AcquireReply::Granted { tokens, queued, .. } => {
                let path = if was_queued {
                    Path::RemoteGrant
                } else {
                    Path::Uncontended
                };
                self.remote_waiters_seen = acquiring.remote_waiter_seen || queued > 0 || was_queued;
                self.hold(cycle, tokens, answer.ttl, answer.sent_at, path, cx, effects);
            }
            AcquireReply::Queued(position) => self.queued(answer.sent_at, position, cx, effects),
            AcquireReply::Taken => {
                // The cycle left nothing behind in the store. The next one expects remote waiters.
                self.remote_waiters_seen = true;
                self.phase = Phase::Idle;
                self.start_acquire(cx, effects);
            }
            AcquireReply::Busy => {
                self.remote_waiters_seen = true;
                self.phase = Phase::Idle;
                self.refuse_tries(effects);
                self.start_acquire(cx, effects);
            }
        }
    }

    pub(super) fn queued(
        &mut self,
        sent_at: Moment,
        position: QueuePosition,
        cx: Context<'_>,
        effects: &mut Effects<W>,
    ) {
        let Phase::Acquiring(acquiring) = &mut self.phase else {
            return;
        };
        let (cycle, early, missed_pushes) = (acquiring.cycle, acquiring.early, acquiring.missed_pushes);
        self.remote_waiters_seen = true;
        if self.waiters.is_empty() {
            return self.release(cycle, effects);
        }
        let ahead = u32::try_from(position.ahead).unwrap_or(u32::MAX);
        let spread = SPREAD.saturating_mul(ahead.saturating_add(1)).min(RETRY_MAX / 4);
        let retry_in = match (position.owner_ttl, position.owner_foreign) {
            (owner_ttl, _) if !position.is_subscribed => {
                let retry = UNREACHED_RETRY.min(cycle.ttl() / 4);
                owner_ttl.map_or(retry, |ttl| retry.min(ttl + SPREAD))
            }
            (Some(ttl), false) => ttl.min(RETRY_MAX) + spread,
            (Some(ttl), true) => {
                ttl.min(
                    FOREIGN_OWNER_RETRY
                        .saturating_mul(ahead.saturating_add(1))
                        .min(RETRY_MAX),
                ) + spread
            }
            (None, _) => {
                FOREIGN_OWNER_RETRY
                    .saturating_mul(ahead.saturating_add(1))
                    .min(RETRY_MAX)
                    + spread
            }
        };
        self.phase = Phase::Queued(Queued {
            cycle,
            enqueue_token: position.enqueue_token,
            sent_at,
            retry_at: cx.now + retry_in,
        });
        if let Some(grant) = early {
            self.enter(grant, position.enqueue_token, sent_at, cx, effects);
        }
        if missed_pushes && matches!(self.phase, Phase::Queued(_)) {
            self.retry_acquire(cx, effects);
        }
    }

    /// Applies rules 2 to 4 to a grant for the queued cycle.
    pub(super) fn enter(
        &mut self,
        grant: Grant,
        enqueue_token: u64,
        sent_at: Moment,
        cx: Context<'_>,
        effects: &mut Effects<W>,
    ) {
        #[cfg(test)]
        let (enqueue_token, sent_at) = (
            if cx.rules.has(Flaw::IgnoresMarks) {
                0
            } else {
                enqueue_token
            },
            if cx.rules.has(Flaw::CountsFromReceipt) {
                cx.now
            } else {
                sent_at
            },
        );
        if grant.tokens.first() <= enqueue_token {
            effects.rare().stale_grant = true;
            return;
        }
        if self.asked_in != cx.epoch {
            // The server that sent it has been replaced.
            return self.retry_acquire(cx, effects);
        }
        let ttl = grant.cycle.ttl();
        if (sent_at + ttl).since(cx.now) * 2 <= ttl {
            return self.retry_acquire(cx, effects);
        }
        self.hold(grant.cycle, grant.tokens, ttl, sent_at, Path::RemoteGrant, cx, effects);
    }

    /// The reply grants the lease, but it expired in transit. After some of them, the tasks fail
    /// whose leases would last no longer than that one.
    pub(super) fn arrived_too_late(&mut self, cycle: Cycle, ttl: Duration, cx: Context<'_>, effects: &mut Effects<W>) {
        let Phase::Acquiring(acquiring) = &mut self.phase else {
            return;
        };
        acquiring.too_late += 1;
        if acquiring.too_late < TOO_LATE_MAX && !self.waiters.is_empty() {
            return self.retry_acquire(cx, effects);
        }
        effects.abandon(cycle);
        self.phase = Phase::Idle;
        for id in self.waiters.find_all(|waiter| waiter.options.lease_ttl() <= ttl) {
            self.resolve(id, Outcome::TooLate, effects);
        }
        self.start_acquire(cx, effects);
    }

    pub(super) fn regress(&mut self, cycle: Cycle, token: u64, floor: u64, cx: Context<'_>, effects: &mut Effects<W>) {
        effects.abandon(cycle);
        self.phase = Phase::Idle;
        if let Some(id) = self.waiters.first() {
            self.resolve(id, Outcome::Regressed { token, floor }, effects);
        }
        self.start_acquire(cx, effects);
    }
}
