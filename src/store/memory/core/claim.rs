//! What a node of a quorum does for a manager whose sequencer is another node: the reference for
//! `claim.lua` and `claim_shared.lua`.

use super::{MemoryCore, Terms, mode_of};
use crate::key::LockKey;
use crate::store::redis::claim::{ClaimKind, Claimed};

impl MemoryCore {
    /// Takes or extends a lease for a cycle that has it at the sequencer, and removes the cycle
    /// from the queue, which decides nothing here. Raises the counter to `at_least`.
    pub(crate) fn claim(&mut self, key: &LockKey, me: &str, kind: ClaimKind, at_least: u64, terms: Terms) -> Claimed {
        let lock = self.lock(key, terms.now);
        let is_held = lock.is_held_by(me);
        if !is_held && (kind == ClaimKind::Extend || !lock.admits(mode_of(me))) {
            self.forget_if_unused(key);
            return Claimed::Refused;
        }
        if is_held {
            self.extend(key, me, terms.now + terms.ttl);
        } else {
            self.leave(key, me);
            self.admit(key, me, terms);
        }
        let counter = self.counters.entry(key.slot()).or_default();
        if *counter < terms.floor {
            *counter = terms.floor.max(terms.server_time);
        }
        let before = *counter;
        *counter = before.max(at_least);
        Claimed::Ours { counter: before }
    }
}
