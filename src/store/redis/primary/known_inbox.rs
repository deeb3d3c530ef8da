//! What a connection knows about the inbox: whether its server lately counted the subscription.
//!
//! A cycle that enqueues must know whether a grant would reach it, and to ask the server
//! (`PUBSUB NUMSUB`) would cost each hand-off a call. A connection leads to the same server for as
//! long as it exists, and so does that of the inbox. An answer therefore stays true until either is
//! replaced, which the manager notices at once, unless a proxy keeps connections while it changes
//! the server behind them, or the server has closed the inbox and that is not known yet. So it is
//! trusted for at most [`VALID_FOR`]. A cycle that enqueues on a wrong answer may be skipped at its
//! turn, like one whose inbox is lost after it has enqueued, and asks again later. This decides
//! nothing about safety: each hand-off checks the inbox of the next owner before it grants.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use crate::clock::Moment;

/// How long an answer is trusted.
const VALID_FOR: Duration = Duration::from_secs(1);

/// The number of the current subscription of the inbox.
#[derive(Debug, Default)]
pub(super) struct InboxState {
    /// Zero while there is none.
    current: AtomicU64,
    subscriptions: AtomicU64,
}

/// A subscription, until this is dropped.
#[must_use]
#[derive(Debug)]
pub(super) struct Subscribed<'a> {
    state: &'a InboxState,
    number: u64,
}

impl InboxState {
    /// Begins a subscription.
    pub(super) fn subscribed(&self) -> Subscribed<'_> {
        let number = self.subscriptions.fetch_add(1, Ordering::AcqRel) + 1;
        self.current.store(number, Ordering::Release);
        Subscribed { state: self, number }
    }

    pub(super) fn subscription(&self) -> Option<u64> {
        Some(self.current.load(Ordering::Acquire)).filter(|&number| number > 0)
    }
}

impl Drop for Subscribed<'_> {
    fn drop(&mut self) {
        // If that fails, the next one has begun.
        self.state
            .current
            .compare_exchange(self.number, 0, Ordering::AcqRel, Ordering::Relaxed)
            .ok();
    }
}

/// The last time that the server at the end of a connection counted the subscription.
#[derive(Debug, Default)]
pub(super) struct KnownInbox(Mutex<Option<Seen>>);

#[derive(Debug, Clone, Copy)]
struct Seen {
    subscription: u64,
    sent_at: Moment,
}

impl KnownInbox {
    /// The server counted this subscription in its answer to a request sent at this time.
    pub(super) fn seen(&self, subscription: u64, sent_at: Moment) {
        *self.0.lock() = Some(Seen { subscription, sent_at });
    }

    /// The server did not count the subscription.
    pub(super) fn not_seen(&self) {
        *self.0.lock() = None;
    }

    /// Whether the server counted this subscription a moment ago.
    pub(super) fn is_known(&self, subscription: Option<u64>, now: Moment) -> bool {
        let seen = *self.0.lock();
        seen.is_some_and(|seen| Some(seen.subscription) == subscription && now.since(seen.sent_at) < VALID_FOR)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answer_is_true_for_a_second_and_for_one_subscription() {
        let (inbox, known, start) = (InboxState::default(), KnownInbox::default(), Moment::now());
        assert!(!known.is_known(inbox.subscription(), start), "there is none");
        let first = inbox.subscribed();
        assert!(!known.is_known(inbox.subscription(), start), "nothing was asked");
        known.seen(inbox.subscription().unwrap(), start);
        assert!(known.is_known(inbox.subscription(), start + VALID_FOR / 2));
        assert!(!known.is_known(inbox.subscription(), start + VALID_FOR));
        drop(first);
        assert!(!known.is_known(inbox.subscription(), start), "it has ended");
        let _second = inbox.subscribed();
        assert!(!known.is_known(inbox.subscription(), start), "another subscription");
    }

    #[test]
    fn contrary_answer_counts_at_once() {
        let (inbox, known, start) = (InboxState::default(), KnownInbox::default(), Moment::now());
        let _subscribed = inbox.subscribed();
        known.seen(inbox.subscription().unwrap(), start);
        known.not_seen();
        assert!(!known.is_known(inbox.subscription(), start));
    }

    #[test]
    fn subscription_that_ends_late_does_not_end_the_next_one() {
        let inbox = InboxState::default();
        let first = inbox.subscribed();
        let _second = inbox.subscribed();
        let current = inbox.subscription();
        drop(first);
        assert!(current.is_some());
        assert_eq!(inbox.subscription(), current);
    }
}
