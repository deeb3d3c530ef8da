//! The raft term of a reply, which proves that a renewal counts.
//!
//! # Implementation details
//!
//! The leader of etcd keeps the ends of all leases in its memory, and a new leader gives every
//! lease its whole time anew. Before etcd 3.6, the leader answers a keep-alive alone, without
//! asking the others. So a leader that was paused or cut off renews leases for which its successor
//! counts another end, until it learns of the successor.
//!
//! Therefore a renewal counts only if its term is at least that of a linearizable reply, a
//! transaction or a read, in which the key was attached to the lease:
//!
//! - The header of a keep-alive's reply has the term of the last entry that its member had applied
//!   *before* it had the lease renewed: the leader that renewed it is of that term or a later one.
//! - The header of a linearizable reply has a term no earlier than that of the leader that a
//!   majority confirmed for it.
//!
//! Both requests must be sent after the moment from which the lease's time is counted. Their order
//! does not matter, so they are sent concurrently. Let E be the term of the confirmed leader. A
//! leader of a later term was elected after the confirmation, and gives the lease its whole time
//! after that moment. For the leader of E there are two cases. If it made the renewal itself, it
//! gave the lease its whole time then. If a later leader made the renewal, the previous case
//! applies. Either way the lease lasts for its whole time from that moment.
//!
//! A grant needs no such proof, because it is an entry of the log: leaders count from when they
//! applied it, or from when they became leader.

use etcd_client::ResponseHeader;

/// The earliest possible term of the leader that renewed a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RenewedIn(pub(super) u64);

/// The latest possible term of the leader that a majority confirmed for a linearizable reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ConfirmedIn(pub(super) u64);

impl RenewedIn {
    /// A reply without a header proves nothing.
    pub(super) fn of(header: Option<&ResponseHeader>) -> Self {
        Self(header.map_or(0, ResponseHeader::raft_term))
    }

    /// Whether the renewal counts.
    pub(super) const fn is_confirmed_by(self, reply: ConfirmedIn) -> bool {
        self.0 >= reply.0
    }
}

impl ConfirmedIn {
    /// A reply without a header proves nothing.
    pub(super) fn of(header: Option<&ResponseHeader>) -> Self {
        Self(header.map_or(u64::MAX, ResponseHeader::raft_term))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renewal_counts_if_its_leader_is_no_older_than_the_confirmed_one() {
        let counts = |renewed, confirmed| RenewedIn(renewed).is_confirmed_by(ConfirmedIn(confirmed));
        assert!(counts(2, 2) && counts(3, 2));
        assert!(!counts(1, 2));
        assert!(!RenewedIn::of(None).is_confirmed_by(ConfirmedIn(1)));
        assert!(!RenewedIn(7).is_confirmed_by(ConfirmedIn::of(None)));
    }
}
