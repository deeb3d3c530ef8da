//! The least token that a server may issue, as far as this manager knows.
//!
//! # Implementation details
//!
//! A server may have lost the latest values of its counters: a promoted replica lacks what was not
//! replicated, and a restarted server what was not persisted. Every request that may issue a token
//! therefore sends a floor, and the script issues only tokens above it. The floor is the larger of
//! two values: the largest token that this manager has seen in the slot, and, for a single primary,
//! the largest server time read when a connection was opened. In a cluster, the scripts read the
//! time themselves.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::key::{SLOTS, Slot};
use crate::protocol::AcquireReply;

/// See the module documentation.
pub(super) struct TokenFloor {
    /// The largest token seen in each slot.
    seen: Box<[AtomicU64]>,
    /// The largest server time seen when connecting, as a token: counters below it were lost.
    server_time: AtomicU64,
}

impl TokenFloor {
    pub(super) fn new() -> Self {
        Self {
            seen: (0..SLOTS).map(|_| AtomicU64::new(0)).collect(),
            server_time: AtomicU64::new(0),
        }
    }

    /// The floor of this slot: every token issued from now on is above it.
    pub(super) fn of(&self, slot: Slot) -> u64 {
        let seen = self.seen[usize::from(slot.number())].load(Ordering::Acquire);
        seen.max(self.server_time.load(Ordering::Acquire))
    }

    /// Records the token in this reply, if there is one.
    pub(super) fn note_reply(&self, slot: Slot, reply: &AcquireReply) {
        match reply {
            AcquireReply::Granted { tokens, .. } => self.note_token(slot, tokens.last()),
            AcquireReply::Queued(position) => self.note_token(slot, position.enqueue_token),
            AcquireReply::Taken | AcquireReply::Busy => {}
        }
    }

    /// Records a token that was issued in this slot.
    pub(super) fn note_token(&self, slot: Slot, token: u64) {
        self.seen[usize::from(slot.number())].fetch_max(token, Ordering::AcqRel);
    }

    /// Records the time of a server, as a token.
    pub(super) fn note_server_time(&self, token: u64) {
        self.server_time.fetch_max(token, Ordering::AcqRel);
    }

    /// Overrides the floor of this slot, and forgets the server time.
    #[cfg(test)]
    pub(super) fn set(&self, slot: Slot, floor: u64) {
        self.server_time.store(0, Ordering::Release);
        self.seen[usize::from(slot.number())].store(floor, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floor_of_a_slot_is_its_largest_token_or_a_later_server_time() {
        let floor = TokenFloor::new();
        let [first, second] = [1, 2].map(|number| Slot::new(number).unwrap());
        floor.note_token(first, 7);
        floor.note_token(first, 5);
        assert_eq!((floor.of(first), floor.of(second)), (7, 0));
        floor.note_server_time(6);
        assert_eq!((floor.of(first), floor.of(second)), (7, 6));
        floor.note_server_time(9);
        floor.note_server_time(8);
        assert_eq!((floor.of(first), floor.of(second)), (9, 9));
        floor.note_reply(second, &AcquireReply::Busy);
        assert_eq!(floor.of(second), 9);
    }
}
