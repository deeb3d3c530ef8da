//! What arrives from the store for a cycle.

use std::time::Duration;

use super::StoreOutage;
use crate::clock::Moment;
use crate::error::LockError;
use crate::protocol::{AcquireReply, Answer, Grant, ReleaseReply, RenewReply};

/// A reply, the lack of one, or a push.
#[derive(Debug, Clone, Copy)]
pub(crate) enum StoreEvent<'a> {
    /// The reply to an acquire.
    AcquireReply(Answer<AcquireReply>),
    /// The reply to a release.
    ReleaseReply(Answer<ReleaseReply>),
    /// The reply to a renewal, or none. It was sent at that time with that TTL.
    RenewalReply {
        ttl: Duration,
        sent_at: Moment,
        reply: Option<RenewReply>,
    },
    /// A request failed or timed out, so its effect is unknown.
    RequestFailed {
        error: &'a LockError,
        /// Set if the store is unreachable.
        outage: Option<StoreOutage>,
    },
    /// The task that executed a request was cancelled before the reply arrived.
    RequestCancelled,
    /// A grant was pushed.
    Grant(Grant),
    /// The store reports that the cycle may be at the head of its queue.
    YourTurn,
    /// The store reports that a remote waiter began to wait for what the cycle holds.
    RemoteWaiter,
}
