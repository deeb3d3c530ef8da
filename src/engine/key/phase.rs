//! The phases of a key: idle, acquiring, queued, held, releasing.

use std::sync::Arc;
use std::time::Duration;

use super::BLOCK_MIN;
use super::effect::Bound;
#[cfg(test)]
use super::types::Flaw;
use super::types::{Context, Linger};
use super::waiters::WaiterId;
use crate::clock::Moment;
use crate::fence::{FencingToken, TokenBlock};
use crate::lease::Lease;
use crate::protocol::{AcquireKind, Cycle, Grant};

#[derive(Debug)]
pub(super) enum Phase {
    /// No request is in flight and no lease is held.
    Idle,
    /// An acquire, or a release that requeues, is in flight.
    Acquiring(Acquiring),
    /// The last acquire got no reply. It is retried with the same cycle, which the store may know.
    Retrying {
        cycle: Cycle,
        /// Whether the cycle was in the queue before.
        was_queued: bool,
    },
    /// The cycle is in the store's queue.
    Queued(Queued),
    /// The lease is ours.
    Held(Held),
    /// A release is in flight. New waiters wait for its reply, so that requests stay in order.
    Releasing {
        cycle: Cycle,
        /// Whether the lease was lingering before the release.
        lingered: bool,
        /// Whether the release has to be repeated.
        in_doubt: bool,
    },
}

#[derive(Debug)]
pub(super) struct Acquiring {
    pub(super) cycle: Cycle,
    pub(super) kind: AcquireKind,
    /// The cycle that the same request releases.
    pub(super) releases: Option<Cycle>,
    /// Whether that release has to be repeated, after its reply.
    pub(super) in_doubt: bool,
    /// A grant that overtook the reply.
    pub(super) early: Option<Grant>,
    /// Whether a remote waiter was reported before the reply arrived.
    pub(super) remote_waiter_seen: bool,
    /// Pushes may have been missed since the request was sent, so a "queued" reply cannot be relied
    /// on.
    pub(super) missed_pushes: bool,
    /// Whether the cycle was in the queue before.
    pub(super) was_queued: bool,
    /// The number of replies that arrived after the lease had expired.
    pub(super) too_late: u32,
}

#[derive(Debug)]
pub(super) struct Queued {
    pub(super) cycle: Cycle,
    pub(super) enqueue_token: u64,
    /// When the request that got the "queued" reply was sent. The grant is made after that.
    pub(super) sent_at: Moment,
    /// When to ask again without a push.
    pub(super) retry_at: Moment,
}

#[derive(Debug)]
pub(super) struct Held {
    pub(super) lease: Arc<Lease>,
    pub(super) tokens: TokenBlock,
    /// A later block, used when the first one is empty.
    pub(super) spare: TokenBlock,
    /// The number of tokens left when the last extension was sent.
    pub(super) left_when_asked: u64,
    /// The number of tokens used during the last round trip.
    pub(super) used_in_a_round_trip: u64,
    pub(super) occupant: Occupant,
    /// How long the lease lingers after the current guard, as requested by the waiter served last.
    pub(super) linger: Linger,
    /// Until when the key stays locked, whenever the guard is dropped.
    pub(super) min_hold_until: Option<Moment>,
    /// An acquire that extends the lease and reserves more tokens is in flight.
    pub(super) extending: bool,
    /// An extension got no reply. It may execute after the release, so the release has to be
    /// repeated.
    pub(super) in_doubt: bool,
    /// The last extension failed. The next one would probably fail as well.
    pub(super) extension_failed: bool,
    /// Set once remote waiters are known.
    pub(super) turn: Option<Turn>,
    /// The total number of guards served, including those before remote waiters were known.
    pub(super) served_in_all: u32,
    pub(super) renew_at: Moment,
    pub(super) renewing: bool,
    /// The epoch of the request that last confirmed the lease, and of the current or last renewal.
    pub(super) confirmed_in: u32,
    pub(super) renewing_in: u32,
    /// Until when the confirmation counts. After that a renewal is overdue, and the store may have
    /// lost the lease.
    pub(super) confirmed_until: Moment,
}

/// The stretch in which the lease serves local tasks although remote waiters are known. A turn is
/// gated: it serves the tasks that waited when it began, and none that came later.
#[derive(Debug)]
pub(super) struct Turn {
    began: Moment,
    /// The number of guards served so far.
    served: u32,
    /// The largest number of guards that it serves. Bounded for permits, of which a process may
    /// have several at a time: each serves its part of the line.
    share: u32,
    /// The largest number of tasks still to serve: tasks that have given up may be included.
    left: u32,
}

/// Who occupies our lease.
#[derive(Debug)]
pub(super) enum Occupant {
    /// No guard yet, or none any more: the reply to an extension determines what happens next.
    Nobody,
    /// A guard, which may not have been collected by its task yet.
    Guard(Holder),
    /// No guard, and no other task or manager is known to want the key. Kept for the next local
    /// task.
    Lingering { until: Moment },
}

#[derive(Debug)]
pub(super) struct Holder {
    pub(super) token: FencingToken,
    /// The waiter, until it collects the guard.
    pub(super) waiter: Option<WaiterId>,
    /// When `max_hold` ends.
    pub(super) hold_until: Option<Moment>,
}

impl Acquiring {
    pub(super) const fn new(cycle: Cycle, kind: AcquireKind, releases: Option<Cycle>) -> Self {
        Self {
            cycle,
            kind,
            releases,
            in_doubt: false,
            early: None,
            remote_waiter_seen: false,
            missed_pushes: false,
            was_queued: false,
            too_late: 0,
        }
    }
}

impl Turn {
    /// `waiting` tasks are in line, of which the turn serves `share` at most.
    pub(super) fn begin(now: Moment, served: u32, waiting: u64, share: u32) -> Self {
        Self {
            began: now,
            served,
            share,
            left: u32::try_from(waiting).unwrap_or(u32::MAX).min(share),
        }
    }

    /// The largest number of guards that are still to be served.
    fn left_at_most(&self, cx: Context<'_>) -> u64 {
        let in_burst = cx.rules.max_burst.saturating_sub(self.served);
        self.left.min(in_burst).into()
    }
}

impl Held {
    /// The guard under the lease, if any.
    pub(super) const fn guard(&self) -> Option<&Holder> {
        match &self.occupant {
            Occupant::Guard(holder) => Some(holder),
            Occupant::Nobody | Occupant::Lingering { .. } => None,
        }
    }

    /// When the linger period ends, if the lease is lingering.
    pub(super) const fn lingers_until(&self) -> Option<Moment> {
        match self.occupant {
            Occupant::Lingering { until } => Some(until),
            Occupant::Nobody | Occupant::Guard(_) => None,
        }
    }

    /// Whether the lease may linger: the guard asked for it, no remote waiters are known, and no
    /// extension is in doubt, for which the release would have to be repeated. The cycle is then
    /// even, so the store notifies us when a remote waiter arrives.
    pub(super) const fn may_linger(&self) -> bool {
        !self.linger.is_none() && self.turn.is_none() && !self.in_doubt
    }

    /// The task did not take its guard, so nothing happened under it.
    pub(super) fn cancel_min_hold(&mut self, cx: Context<'_>) {
        if self.min_hold_until.take().is_some() {
            cx.min_holds.forget(self.lease.cycle);
        }
    }

    /// Whether the store confirmed the lease recently, and after the last event that may have made
    /// it lose the lease. If not, the store has to be asked before the lease is passed on.
    pub(super) fn is_confirmed(&self, cx: Context<'_>) -> bool {
        #[cfg(test)]
        if cx.rules.has(Flaw::BelievesOldServers) {
            return true;
        }
        self.confirmed_in == cx.epoch && cx.now <= self.confirmed_until
    }

    /// The store confirmed the lease in reply to a request made in `epoch` and sent at `sent_at`.
    /// Tokens from an earlier epoch are discarded: a store that had lost the lease in between, and
    /// was replaced in turn, may have issued larger ones.
    pub(super) fn confirm(&mut self, epoch: u32, sent_at: Moment, ttl: Duration, cx: Context<'_>) {
        if self.confirmed_in != epoch {
            self.confirmed_in = epoch;
            (self.tokens, self.spare) = (TokenBlock::EMPTY, TokenBlock::EMPTY);
        }
        self.confirmed_until = self.confirmed_until.max(sent_at + cx.rules.confirmed_for(ttl));
    }

    /// The lease serves a task with this TTL, which may be shorter than that of the last request.
    /// From now on it is renewed as often as a lease of that TTL.
    pub(super) fn renew_as_for(&mut self, ttl: Duration, cx: Context<'_>) {
        self.renew_at = self.renew_at.min(cx.now + cx.rules.renew_every(ttl));
        self.confirmed_until = self.confirmed_until.min(cx.now + cx.rules.confirmed_for(ttl));
    }

    /// Begins a turn, unless remote waiters were known before. The present guard belongs to it, but
    /// has no part of the share: it does not wait any more.
    pub(super) fn note_remote_waiters(&mut self, waiting: u64, share: u32, now: Moment) {
        self.turn
            .get_or_insert(Turn::begin(now, 1, waiting, share.saturating_add(1)));
    }

    /// Whether a task that has waited since `waiting_since` came after the turn began.
    pub(super) fn came_later(&self, waiting_since: Moment) -> bool {
        self.turn.as_ref().is_some_and(|turn| waiting_since > turn.began)
    }

    /// Why the turn must not serve one more task, which has waited since `waiting_since`, if it
    /// must not.
    pub(super) fn reached_bound(&self, waiting_since: Moment, cx: Context<'_>) -> Option<Bound> {
        let turn = self.turn.as_ref()?;
        let came_later = self.came_later(waiting_since);
        #[cfg(test)]
        let came_later = came_later && !cx.rules.has(Flaw::ServesNewcomers);
        if came_later || turn.served >= turn.share {
            Some(Bound::Gate)
        } else if turn.served >= cx.rules.max_burst {
            Some(Bound::Burst)
        } else if cx.now.since(turn.began) >= cx.rules.max_slice {
            Some(Bound::Slice)
        } else {
            None
        }
    }

    /// Takes the token for the next guard, if there is one, and counts the guard.
    pub(super) fn serve_next(&mut self) -> Option<FencingToken> {
        let token = self.take_token()?;
        self.served_in_all = self.served_in_all.saturating_add(1);
        if let Some(turn) = &mut self.turn {
            turn.served = turn.served.saturating_add(1);
            turn.left = turn.left.saturating_sub(1);
        }
        Some(token)
    }

    /// Adds a block with larger tokens than those at hand. It is never used before the spare block,
    /// because tokens must grow.
    pub(super) fn add_tokens(&mut self, tokens: TokenBlock) {
        if self.tokens.remaining() == 0 {
            self.tokens = std::mem::replace(&mut self.spare, TokenBlock::EMPTY);
        }
        if self.tokens.remaining() == 0 {
            self.tokens = tokens;
        } else {
            self.spare = tokens;
        }
    }

    fn take_token(&mut self) -> Option<FencingToken> {
        if self.tokens.remaining() == 0 {
            self.tokens = std::mem::replace(&mut self.spare, TokenBlock::EMPTY);
        }
        self.tokens.take()
    }

    /// Whether the tokens may run out within a round trip.
    pub(super) fn is_low_on_tokens(&self, cx: Context<'_>) -> bool {
        let left = self.tokens.remaining() + self.spare.remaining();
        let enough_for_this_turn = self.turn.as_ref().is_some_and(|turn| left >= turn.left_at_most(cx));
        !self.extending && !enough_for_this_turn && left <= (2 * self.used_in_a_round_trip).max(BLOCK_MIN / 4)
    }
}
