//! What a quorum asks of its nodes other than the sequencer.

use std::time::Duration;

use crate::key::LockKey;
use crate::protocol::Cycle;

/// A request for the lease of a cycle that already holds it on the sequencer, exclusively or
/// shared.
#[derive(Debug, Clone)]
pub(crate) struct Claim {
    pub(crate) key: LockKey,
    pub(crate) cycle: Cycle,
    pub(crate) ttl: Duration,
    /// Minimum value of the counter after the claim.
    pub(crate) at_least: u64,
    pub(crate) kind: ClaimKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ClaimKind {
    /// Takes the lease if nobody has it whose mode excludes it.
    Take,
    /// Extends the lease. Does nothing if the cycle does not hold it.
    Extend,
}

/// A node's reply to a claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Claimed {
    /// The lease is ours on this node; `counter` is the value before the claim raised it.
    Ours { counter: u64 },
    /// Another owner holds the lease, or the lease to extend is gone.
    Refused,
}
