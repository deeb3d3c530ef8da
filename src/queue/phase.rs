//! How far a key is: wanted, asked for, queued, held, given back.

use std::sync::Arc;
use std::time::Duration;

use super::BLOCK_MIN;
use super::effect::Bound;
#[cfg(test)]
use super::terms::Flaw;
use super::terms::{Context, Linger};
use super::waiters::WaiterId;
use crate::clock::Moment;
use crate::fence::{FencingToken, TokenBlock};
use crate::lease::Lease;
use crate::protocol::{Ask, Cycle, Grant};

#[derive(Debug)]
pub(super) enum Phase {
    /// Nothing is wanted, or what is wanted waits for nothing but the next event.
    Idle,
    /// An acquire, or a release that requeues, is on its way.
    Asking(Asking),
    /// The last acquire had no answer. It is sent again for the same cycle, which the store may know of.
    Retrying {
        cycle: Cycle,
        /// Whether the cycle stood in the queue before.
        was_queued: bool,
    },
    /// The cycle stands in the store's queue.
    Queued(Queued),
    /// The lease is ours.
    Held(Held),
    /// A release is on its way; who comes now waits for its reply, so that one request follows the other.
    Releasing {
        cycle: Cycle,
        /// Whether the lease was kept idle before.
        lingered: bool,
    },
}

#[derive(Debug)]
pub(super) struct Asking {
    pub(super) cycle: Cycle,
    pub(super) ask: Ask,
    /// The cycle that the same request releases.
    pub(super) releases: Option<Cycle>,
    /// A grant that overtook the reply.
    pub(super) early: Option<Grant>,
    /// The owner was told of rivals before the reply came.
    pub(super) wanted: bool,
    /// Pushes may have been missed since the request was sent, so a "queued" reply is not to be trusted.
    pub(super) missed_pushes: bool,
    /// Whether the cycle stood in the queue before.
    pub(super) was_queued: bool,
    /// How many replies came too late to be of use.
    pub(super) too_late: u32,
}

#[derive(Debug)]
pub(super) struct Queued {
    pub(super) cycle: Cycle,
    pub(super) mark: u64,
    /// When the request was sent whose reply said "queued": the grant was executed after that.
    pub(super) asked_at: Moment,
    /// When to look again unasked.
    pub(super) ask_again_at: Moment,
}

#[derive(Debug)]
pub(super) struct Held {
    pub(super) lease: Arc<Lease>,
    pub(super) tokens: TokenBlock,
    /// A later block, used when the first is empty.
    pub(super) spare: TokenBlock,
    /// Remaining tokens when the last extension was sent.
    pub(super) left_when_asked: u64,
    /// How many tokens are used up in a round trip, as last seen.
    pub(super) used_in_a_round_trip: u64,
    pub(super) tenant: Tenant,
    /// For how long the lease is kept when the guard under it is gone: what the last one that was served asked for.
    pub(super) linger: Linger,
    /// An acquire that extends the lease and brings more tokens is on its way.
    pub(super) extending: bool,
    /// An extension had no reply: it may execute after the release, which therefore has to be repeated.
    pub(super) in_doubt: bool,
    /// Whether remote waiters are known, and from when on bypass counts.
    pub(super) rivals: bool,
    pub(super) served: u32,
    /// How many guards were served in all, before rivals were known as well.
    pub(super) served_in_all: u32,
    pub(super) since: Moment,
    pub(super) renew_at: Moment,
    pub(super) renewing: bool,
    /// The epoch of the request that confirmed the lease last, and that of the renewal under way, or the last one.
    pub(super) confirmed_in: u32,
    pub(super) renewing_in: u32,
    /// Until when that is worth something: then a renewal is overdue, and the lease may be forgotten.
    pub(super) confirmed_until: Moment,
}

/// Who is under a lease that is ours.
#[derive(Debug)]
pub(super) enum Tenant {
    /// Nobody yet, or nobody any more: the reply to an extension decides on what follows.
    Nobody,
    /// A guard, be it on its way to its task.
    Guard(Holder),
    /// Nobody, and nobody is known to want it: it is kept for the next task of this process.
    Lingering { until: Moment },
}

#[derive(Debug)]
pub(super) struct Holder {
    pub(super) token: FencingToken,
    /// The waiter, until it has collected its guard.
    pub(super) waiter: Option<WaiterId>,
    /// When `max_hold` ends.
    pub(super) hold_until: Option<Moment>,
}

impl Asking {
    pub(super) const fn new(cycle: Cycle, ask: Ask, releases: Option<Cycle>) -> Self {
        Self {
            cycle,
            ask,
            releases,
            early: None,
            wanted: false,
            missed_pushes: false,
            was_queued: false,
            too_late: 0,
        }
    }
}

impl Held {
    /// The guard that is out.
    pub(super) const fn guard(&self) -> Option<&Holder> {
        match &self.tenant {
            Tenant::Guard(holder) => Some(holder),
            Tenant::Nobody | Tenant::Lingering { .. } => None,
        }
    }

    /// Until when it is kept idle, if it is.
    pub(super) const fn lingers_until(&self) -> Option<Moment> {
        match self.tenant {
            Tenant::Lingering { until } => Some(until),
            Tenant::Nobody | Tenant::Guard(_) => None,
        }
    }

    /// Whether it may be kept idle: nobody else waits, as far as is known; its cycle is an even one, so that we are told when somebody begins
    /// to; and no request is in doubt, for which the release has to be repeated.
    pub(super) const fn may_linger(&self) -> bool {
        !self.linger.is_none() && !self.rivals && !self.in_doubt
    }

    /// Whether the store has confirmed the lease lately, and after the last event by which it may have forgotten it. Otherwise nobody else gets it
    /// before the store was asked.
    pub(super) fn is_confirmed(&self, cx: Context<'_>) -> bool {
        #[cfg(test)]
        if cx.rules.has(Flaw::BelievesOldServers) {
            return true;
        }
        self.confirmed_in == cx.epoch && cx.now <= self.confirmed_until
    }

    /// The store has the lease: so it says to a request that was made in that epoch and sent at that moment. Tokens of an earlier epoch are not used
    /// any more: a store that had forgotten the lease meanwhile, and was replaced in its turn, may have issued larger ones.
    pub(super) fn confirm(&mut self, epoch: u32, sent_at: Moment, ttl: Duration, cx: Context<'_>) {
        if self.confirmed_in != epoch {
            self.confirmed_in = epoch;
            (self.tokens, self.spare) = (TokenBlock::EMPTY, TokenBlock::EMPTY);
        }
        self.confirmed_until = self.confirmed_until.max(sent_at + cx.rules.confirmed_for(ttl));
    }

    /// Bypass counts from the moment at which rivals are known.
    pub(super) fn meet_rivals(&mut self, now: Moment) {
        if !self.rivals {
            (self.rivals, self.served, self.since) = (true, 1, now);
        }
    }

    pub(super) fn must_yield(&self, cx: Context<'_>) -> bool {
        self.reached_bound(cx).is_some()
    }

    pub(super) fn reached_bound(&self, cx: Context<'_>) -> Option<Bound> {
        if !self.rivals {
            None
        } else if self.served >= cx.rules.max_burst {
            Some(Bound::Burst)
        } else if cx.now.since(self.since) >= cx.rules.max_slice {
            Some(Bound::Slice)
        } else {
            None
        }
    }

    /// A later block than those that are there. It never comes before the spare one: tokens must grow.
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

    pub(super) fn take_token(&mut self) -> Option<FencingToken> {
        if self.tokens.remaining() == 0 {
            self.tokens = std::mem::replace(&mut self.spare, TokenBlock::EMPTY);
        }
        self.tokens.take()
    }

    /// Whether the tokens may run out before a round trip is over.
    pub(super) fn is_low_on_tokens(&self, cx: Context<'_>) -> bool {
        let left = self.tokens.remaining() + self.spare.remaining();
        let enough_for_the_tenure = self.rivals && left >= u64::from(cx.rules.max_burst.saturating_sub(self.served));
        !self.extending && !enough_for_the_tenure && left <= (2 * self.used_in_a_round_trip).max(BLOCK_MIN / 4)
    }
}
