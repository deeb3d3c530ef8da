//! Which counters a script has raised above the server's time a moment ago.
//!
//! # Implementation details
//!
//! Every token of a cluster is above the server's time at the moment it is issued, since a promoted
//! replica may lack the latest ones. Only a script can raise a counter to that, so it raises it
//! above the time by [`COUNTER_AHEAD`]. For that long, every larger number of the counter is above
//! the time, and a free lock can be acquired with the two plain commands of a single primary, which
//! cost the server less than a script.
//!
//! This holds for the server process that executed the script, so the commands must use the same
//! connection. A connection survives if its node loses the slot and gets it back. The node may then
//! lack tokens that another node has issued meanwhile, unless the slot was handed over completely.
//! But losing and regaining it without that takes two failovers, and two elections take longer than
//! [`COUNTER_AHEAD`].
//!
//! It is short since tokens of two nodes are only in order if they are issued further apart: a
//! primary that was paused may act beside its successor for a moment.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use dashmap::DashMap;

use super::super::script::COUNTER_AHEAD;
use crate::clock::Moment;
use crate::fence::TokenBlock;
use crate::key::Slot;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct RaisedCounters {
    /// At most one entry for each slot.
    scripts: DashMap<Slot, Raised>,
    /// Set if the user may not send the plain commands.
    given_up: AtomicBool,
}

/// The last script that raised a counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Raised {
    /// The generation of the connection.
    pub(super) generation: u64,
    /// When the script was about to be sent, so it was executed later.
    sent_at: Moment,
    round_trip: Duration,
    /// The largest token that it issued.
    token: u64,
}

impl RaisedCounters {
    /// A script that was sent on this connection at this time has issued these tokens.
    pub(super) fn note(&self, slot: Slot, generation: u64, sent_at: Moment, now: Moment, tokens: TokenBlock) {
        let raised = Raised {
            generation,
            sent_at,
            round_trip: now.since(sent_at),
            token: tokens.last(),
        };
        self.scripts.insert(slot, raised);
    }

    /// The last script, if plain commands that are sent now will probably be answered in time.
    pub(super) fn recent(&self, slot: Slot, now: Moment) -> Option<Raised> {
        if self.given_up.load(Ordering::Relaxed) {
            return None;
        }
        let raised = *self.scripts.get(&slot)?;
        (now.since(raised.sent_at) + 2 * raised.round_trip < COUNTER_AHEAD).then_some(raised)
    }

    /// From now on, every acquire is a script. Returns whether that is new.
    pub(super) fn give_up(&self) -> bool {
        !self.given_up.swap(true, Ordering::Relaxed)
    }

    /// Forgets all scripts.
    #[cfg(test)]
    pub(super) fn forget(&self) {
        self.scripts.clear();
    }
}

impl Raised {
    /// Whether tokens of a reply that has arrived by now are above the server's time.
    pub(super) fn covers(self, tokens: TokenBlock, now: Moment) -> bool {
        tokens.first() > self.token && now.since(self.sent_at) <= COUNTER_AHEAD
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counter_is_raised_for_a_moment_and_for_one_connection() {
        let (counters, start) = (RaisedCounters::default(), Moment::now());
        let [slot, other] = [1, 2].map(|number| Slot::new(number).unwrap());
        let tokens = |last| TokenBlock::ending_at(last, 2);
        let round_trip = COUNTER_AHEAD / 8;
        counters.note(slot, 7, start, start + round_trip, tokens(100));
        let raised = counters.recent(slot, start + COUNTER_AHEAD / 2).unwrap();
        assert_eq!((raised.generation, counters.recent(other, start)), (7, None));
        let late = start + COUNTER_AHEAD * 3 / 4;
        assert_eq!(counters.recent(slot, late), None, "there is no time for the reply");
        assert!(raised.covers(tokens(102), start + COUNTER_AHEAD));
        assert!(!raised.covers(tokens(102), start + COUNTER_AHEAD + Duration::from_nanos(1)));
        assert!(!raised.covers(tokens(101), start), "the counter was lost");
        counters.note(slot, 8, late, late + round_trip, tokens(200));
        assert_eq!(counters.recent(slot, late).unwrap().generation, 8);
        assert!(counters.give_up() && !counters.give_up());
        assert_eq!(counters.recent(slot, late), None);
    }

    #[test]
    fn slow_server_is_not_asked_twice() {
        let (counters, start) = (RaisedCounters::default(), Moment::now());
        let slot = Slot::new(1).unwrap();
        let now = start + COUNTER_AHEAD / 2;
        counters.note(slot, 7, start, now, TokenBlock::ending_at(100, 1));
        assert_eq!(counters.recent(slot, now), None);
    }
}
