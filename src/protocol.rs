//! The vocabulary of managers and lease stores: cycles, requests, replies and pushes.
//!
//! All stores share it, so the queue of a key does not depend on the kind of store.

use std::sync::Arc;
use std::time::Duration;

use crate::clock::Moment;
pub(crate) use crate::cycle::{Cycle, Cycles};
use crate::fence::TokenBlock;
use crate::key::{LockKey, Slot};

/// How to acquire a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AcquireKind {
    /// The fast path, with two plain commands: no other manager seems to want the key.
    Fast,
    /// By script: acquire the lease, or join the queue.
    Enqueue,
    /// By script: acquire the lease, or leave no trace. Never passes a waiter.
    Try,
    /// By script: more time and tokens for the lease that this cycle has. If the store has lost the
    /// lease, nothing is acquired: another manager may have had the key since, and a second
    /// acquisition could not be distinguished from an extension.
    Extend,
}

/// A request for a lease.
#[derive(Debug, Clone)]
pub(crate) struct Acquire {
    pub(crate) key: LockKey,
    pub(crate) cycle: Cycle,
    pub(crate) kind: AcquireKind,
    pub(crate) ttl: Duration,
    /// How many tokens to reserve.
    pub(crate) tokens: u32,
}

/// A request to release a lease or leave the queue.
#[derive(Debug, Clone)]
pub(crate) struct Release {
    pub(crate) key: LockKey,
    pub(crate) cycle: Cycle,
    /// The cycle that joins the tail of the queue before the lease is passed on.
    pub(crate) requeue: Option<Cycle>,
    /// Whether no waiter is known, in which case the short release is attempted first.
    pub(crate) nobody_waits: bool,
    /// How many tokens to reserve for the next owner.
    pub(crate) tokens: u32,
    /// When the `min_hold` of the lease ends. A lease that is released before stays for the rest of
    /// that time, [retired](Cycle::retired): nobody has it, and nobody can renew or release it.
    pub(crate) retire_until: Option<Moment>,
}

impl Release {
    /// Whether both cycles are exclusive.
    pub(crate) fn is_exclusive(&self) -> bool {
        let next = self.requeue.map(Cycle::mode).unwrap_or_default();
        self.cycle.mode().is_exclusive() && next.is_exclusive()
    }

    /// How long the lease has to stay, if it is released at `now`.
    pub(crate) fn rest(&self, now: Moment) -> Option<Duration> {
        let rest = self.retire_until?.since(now);
        (!rest.is_zero()).then_some(rest)
    }

    /// The TTL of a lease that this request may give to the requeued cycle.
    pub(crate) fn ttl(&self) -> Duration {
        self.requeue.map_or(Duration::ZERO, Cycle::ttl)
    }
}

/// A store's reply to an [`Acquire`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AcquireReply {
    /// The lease is ours, with the requested TTL.
    Granted {
        tokens: TokenBlock,
        /// The number of waiting cycles.
        queued: u64,
        /// Whether this cycle already had the lease, so that no other cycle can have had it since.
        extended: bool,
    },
    /// The cycle is in the queue.
    Queued(QueuePosition),
    /// The fast path found the key taken. Nothing was left behind.
    Taken,
    /// A try found the key held or wanted. Nothing was left behind.
    Busy,
}

/// A position in a key's queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct QueuePosition {
    /// The slot's counter at the time of the reply. Tokens of later grants are larger.
    pub(crate) enqueue_token: u64,
    /// The remaining TTL of the owner's lease; `None` if it never ends.
    pub(crate) owner_ttl: Option<Duration>,
    /// Whether the owner is not a shardlock manager, so that its release causes no notification.
    pub(crate) owner_foreign: bool,
    /// The number of cycles ahead of this one.
    pub(crate) ahead: u64,
    /// Whether the inbox of this manager is subscribed on the server that replied. If not, no grant
    /// arrives, and the cycle has to ask again by itself.
    pub(crate) is_subscribed: bool,
}

/// A store's reply to a [`Release`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ReleaseReply {
    /// Whether the lease was still ours.
    pub(crate) held: bool,
    /// The reply for the requeued cycle, as if it had sent an acquire.
    pub(crate) requeued: Option<AcquireReply>,
}

impl ReleaseReply {
    /// The lease was ours, and no cycle was requeued.
    pub(crate) const HELD: Self = Self {
        held: true,
        requeued: None,
    };
}

/// A store's reply about one lease in a renewal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RenewReply {
    /// The lease was extended.
    Extended {
        /// Whether a cycle waits for it.
        has_waiters: bool,
    },
    /// The lease is no longer ours.
    NotOurs,
}

impl RenewReply {
    /// Whether the store extended one of the leases of a batch.
    pub(crate) fn some_are_extended(replies: &[Option<Self>]) -> bool {
        replies.iter().any(|reply| matches!(reply, Some(Self::Extended { .. })))
    }
}

/// One lease to renew.
#[derive(Debug, Clone)]
pub(crate) struct Renewal {
    pub(crate) key: LockKey,
    pub(crate) cycle: Cycle,
    pub(crate) ttl: Duration,
}

/// A reply, with the data needed to judge it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Answer<R> {
    /// When the request was about to be sent, on the local clock.
    pub(crate) sent_at: Moment,
    /// The TTL that the request gave to a lease.
    pub(crate) ttl: Duration,
    /// Every token issued after `sent_at` is larger than this.
    pub(crate) floor: u64,
    pub(crate) reply: R,
}

/// The store's message that a queued cycle now has the lease, with the TTL of that cycle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Grant {
    pub(crate) cycle: Cycle,
    pub(crate) tokens: TokenBlock,
    pub(crate) queued: u64,
}

impl Push {
    /// The cycle that a message is about.
    pub(crate) const fn cycle(&self) -> Option<Cycle> {
        match self {
            Self::Granted { grant, .. } => Some(grant.cycle),
            Self::YourTurn { cycle, .. } | Self::RemoteWaiter { cycle, .. } => Some(*cycle),
            Self::Resubscribed { .. } | Self::Disconnected | Self::Refused { .. } => None,
        }
    }
}

/// A message that a store sends to a manager unprompted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Push {
    Granted {
        key: LockKey,
        grant: Grant,
    },
    /// The cycle may be at the head of the queue, as far as the store knows: ask again.
    YourTurn {
        key: LockKey,
        cycle: Cycle,
    },
    /// Another manager began to wait for what this cycle holds.
    RemoteWaiter {
        key: LockKey,
        cycle: Cycle,
    },
    /// Earlier pushes may have been missed: ask again for everything that waits.
    Resubscribed {
        /// Limits this to keys of one slot of the store; `None` for all keys.
        slot: Option<Slot>,
    },
    /// No pushes arrive until `Resubscribed`.
    Disconnected,
    /// The server refuses the subscription, for this reason. The store keeps trying. No pushes
    /// arrive until `Resubscribed`.
    Refused {
        reason: Arc<str>,
    },
}
