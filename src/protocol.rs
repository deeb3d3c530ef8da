//! The words that managers and lease stores exchange: cycles, requests, replies and pushes.
//!
//! Every store speaks these, whatever it is made of, so that the queue of a key never knows which store it talks to.

use std::sync::Arc;
use std::time::Duration;

use crate::clock::Moment;
pub(crate) use crate::cycle::{Cycle, Cycles};
use crate::fence::TokenBlock;
use crate::key::{LockKey, Slot};

/// How a lease is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ask {
    /// By the two plain commands of the free path: nobody seems to want the key.
    Free,
    /// By script: take it, or join the queue.
    Join,
    /// By script: take it, or leave no trace. Never passes anybody who waits.
    Try,
    /// By script: more time and tokens for the lease that this cycle has. Where the store has forgotten it, nothing is taken: somebody else may
    /// have had the key since, and a repetition could not be told from an extension.
    Extend,
}

/// A request for a lease.
#[derive(Debug, Clone)]
pub(crate) struct Acquire {
    pub(crate) key: LockKey,
    pub(crate) cycle: Cycle,
    pub(crate) ask: Ask,
    pub(crate) ttl: Duration,
    /// How many tokens to reserve.
    pub(crate) tokens: u32,
}

/// A request to give a lease, or a place in the queue, back.
#[derive(Debug, Clone)]
pub(crate) struct Release {
    pub(crate) key: LockKey,
    pub(crate) cycle: Cycle,
    /// The cycle that joins the tail of the queue before the lease is passed on.
    pub(crate) requeue: Option<Cycle>,
    /// Whether nobody is known to wait, so that the short way back is worth a try.
    pub(crate) nobody_waits: bool,
    /// How many tokens the next owner gets.
    pub(crate) tokens: u32,
}

impl Release {
    /// How long the lease lasts that the request may give to the cycle that it requeues.
    pub(crate) fn ttl(&self) -> Duration {
        self.requeue.map_or(Duration::ZERO, Cycle::ttl)
    }
}

/// What a store says to an [`Acquire`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AcquireReply {
    /// The lease is ours, for the TTL that was asked for.
    Granted {
        tokens: TokenBlock,
        /// How many cycles wait.
        queued: u64,
        /// Whether this cycle had the lease before, so that nobody else can have had it since.
        extended: bool,
    },
    /// We are in the queue.
    Queued(Place),
    /// The free path found the key taken. Nothing was left behind.
    Taken,
    /// A try found the key held or wanted by somebody. Nothing was left behind.
    Busy,
}

/// A place in a key's queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    /// The slot's counter when the reply was made: tokens of later grants are above it.
    pub(crate) mark: u64,
    /// What is left of the owner's lease; `None` if it never ends.
    pub(crate) owner_ttl: Option<Duration>,
    /// Whether the owner is no manager of ours, so that nobody will tell us of its release.
    pub(crate) owner_foreign: bool,
    /// How many cycles are before us.
    pub(crate) ahead: u64,
    /// Whether the inbox of this manager is subscribed on the server that replied. Otherwise no grant
    /// arrives, and the cycle has to ask again by itself.
    pub(crate) is_reached: bool,
}

/// What a store says to a [`Release`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ReleaseReply {
    /// Whether the lease was still ours.
    pub(crate) held: bool,
    /// The answer for the cycle that was requeued, as if it had sent an acquire.
    pub(crate) requeued: Option<AcquireReply>,
}

/// What a store says of one lease in a renewal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RenewReply {
    /// It was extended.
    Extended {
        /// Whether a cycle waits for it.
        wanted: bool,
    },
    /// It is not ours any more.
    NotOurs,
}

/// One lease to renew.
#[derive(Debug, Clone)]
pub(crate) struct Renewal {
    pub(crate) key: LockKey,
    pub(crate) cycle: Cycle,
    pub(crate) ttl: Duration,
}

/// A reply, with what is needed to judge it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Answer<R> {
    /// When the request was about to be sent, on the local clock.
    pub(crate) sent_at: Moment,
    /// The lifetime that the request gave to a lease.
    pub(crate) ttl: Duration,
    /// Every token that is issued after that moment is above this.
    pub(crate) floor: u64,
    pub(crate) reply: R,
}

/// The store's message that a queued cycle now has the lease, for the TTL of that cycle.
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
            Self::Turn { cycle, .. } | Self::Wanted { cycle, .. } => Some(*cycle),
            Self::Resubscribed { .. } | Self::Disconnected | Self::Refused { .. } => None,
        }
    }
}

/// What a store tells a manager unasked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Push {
    Granted {
        key: LockKey,
        grant: Grant,
    },
    /// It is this cycle's turn, as far as the store can tell without being asked: ask again.
    Turn {
        key: LockKey,
        cycle: Cycle,
    },
    /// Somebody began to wait for what this cycle holds.
    Wanted {
        key: LockKey,
        cycle: Cycle,
    },
    /// Pushes may have been missed before this one: look again at everything that waits.
    Resubscribed {
        /// Only keys of that slot of the store are concerned; `None` for all.
        slot: Option<Slot>,
    },
    /// No pushes arrive until `Resubscribed`.
    Disconnected,
    /// The server does not let us listen, and says why; the store keeps trying. No pushes arrive until `Resubscribed`.
    Refused {
        reason: Arc<str>,
    },
}
