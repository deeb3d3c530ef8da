//! What a connection knows about the inbox: whether its server lately counted the subscription.
//!
//! A cycle that enqueues must know whether a grant would reach it, and to ask the server
//! (`PUBSUB NUMSUB`) would cost each hand-off a call. A connection leads to the same server for as
//! long as it exists, and so does that of the inbox. An answer therefore stays true until either is
//! replaced. Only a proxy that keeps connections while it changes the server behind them can make
//! it wrong, for at most [`VALID_FOR`]. A cycle that enqueues meanwhile may be skipped at its turn,
//! like one whose inbox is lost after it has enqueued, and asks again later. This decides nothing
//! about safety: each hand-off checks the inbox of the next owner before it grants.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use crate::clock::Moment;

/// How long an answer is trusted.
const VALID_FOR: Duration = Duration::from_secs(1);

/// A number for the current subscription of the inbox, or for its absence.
#[derive(Debug, Default)]
pub(super) struct InboxState(AtomicU64);

impl InboxState {
    /// The inbox was subscribed, or its connection has ended.
    pub(super) fn changed(&self) {
        self.0.fetch_add(1, Ordering::AcqRel);
    }

    pub(super) fn now(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }
}

/// The last time that the server at the end of a connection counted the subscription.
#[derive(Debug, Default)]
pub(super) struct KnownInbox(Mutex<Option<Seen>>);

#[derive(Debug, Clone, Copy)]
struct Seen {
    state: u64,
    sent_at: Moment,
}

impl KnownInbox {
    /// A request that was sent at this time, in this state of the inbox, was answered so.
    pub(super) fn seen(&self, state: u64, sent_at: Moment) {
        *self.0.lock() = Some(Seen { state, sent_at });
    }

    /// Whether that is still true.
    pub(super) fn is_valid(&self, state: u64, now: Moment) -> bool {
        let seen = *self.0.lock();
        seen.is_some_and(|seen| seen.state == state && now.since(seen.sent_at) < VALID_FOR)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answer_is_true_for_a_second_and_for_one_state_of_the_inbox() {
        let (inbox, known, start) = (InboxState::default(), KnownInbox::default(), Moment::now());
        assert!(!known.is_valid(inbox.now(), start), "nothing was asked");
        known.seen(inbox.now(), start);
        assert!(known.is_valid(inbox.now(), start + VALID_FOR / 2));
        assert!(!known.is_valid(inbox.now(), start + VALID_FOR));
        inbox.changed();
        assert!(!known.is_valid(inbox.now(), start), "another subscription");
    }

    #[test]
    fn answer_to_a_request_before_a_change_counts_no_more() {
        let (inbox, known, start) = (InboxState::default(), KnownInbox::default(), Moment::now());
        let before = inbox.now();
        inbox.changed();
        known.seen(before, start);
        assert!(!known.is_valid(inbox.now(), start));
    }
}
