//! Which counters a script has raised above the server's time a moment ago.
//!
//! # Implementation details
//!
//! Every token of a cluster is above the server's time at the moment it is issued, since a promoted
//! replica may lack the latest ones. Only a script can raise a counter to that, so it raises it
//! above the time by [`COUNTER_AHEAD`]. For that long, every number of the counter is above the
//! time, and a free lock can be acquired with the two plain commands of a single primary, which
//! cost the server less.
//!
//! This holds for the process that executed the script, so the commands must use its connection.
//! That is not enough: a connection survives if its node loses the slot and gets it back, and the
//! node may then lack tokens that another node issued meanwhile. But a failover there and another
//! one back, each without a complete handover, take longer than [`COUNTER_AHEAD`].

use std::collections::HashMap;

use parking_lot::Mutex;

use super::super::script::COUNTER_AHEAD;
use crate::clock::Moment;
use crate::key::Slot;

/// See the module. At most one entry for each slot.
#[derive(Debug, Default)]
pub(super) struct RaisedCounters(Mutex<HashMap<Slot, Raised>>);

/// The last time that a script raised a counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Raised {
    /// The generation of the connection.
    pub(super) generation: u64,
    /// When the script was about to be sent, so it was executed later.
    sent_at: Moment,
}

impl RaisedCounters {
    /// A script that was sent on this connection at this time has issued tokens in the slot.
    pub(super) fn note(&self, slot: Slot, generation: u64, sent_at: Moment) {
        self.0.lock().insert(slot, Raised { generation, sent_at });
    }

    /// The last time, if plain commands that are sent now will probably be executed early enough.
    pub(super) fn recent(&self, slot: Slot, now: Moment) -> Option<Raised> {
        let raised = self.0.lock().get(&slot).copied()?;
        (now.since(raised.sent_at) < COUNTER_AHEAD / 2).then_some(raised)
    }

    /// Forgets all of them.
    #[cfg(test)]
    pub(super) fn forget(&self) {
        self.0.lock().clear();
    }
}

impl Raised {
    /// Whether a command whose reply has arrived by now was executed early enough.
    pub(super) fn covers(self, now: Moment) -> bool {
        now.since(self.sent_at) <= COUNTER_AHEAD
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn counter_is_raised_for_a_moment_and_for_one_connection() {
        let (counters, start) = (RaisedCounters::default(), Moment::now());
        let [slot, other] = [1, 2].map(|number| Slot::new(number).unwrap());
        counters.note(slot, 7, start);
        let raised = counters.recent(slot, start + COUNTER_AHEAD / 4).unwrap();
        assert_eq!((raised.generation, counters.recent(other, start)), (7, None));
        assert_eq!(
            counters.recent(slot, start + COUNTER_AHEAD / 2),
            None,
            "half is for the round trip"
        );
        assert!(raised.covers(start + COUNTER_AHEAD));
        assert!(!raised.covers(start + COUNTER_AHEAD + Duration::from_nanos(1)));
        counters.note(slot, 8, start + COUNTER_AHEAD);
        assert_eq!(counters.recent(slot, start + COUNTER_AHEAD).unwrap().generation, 8);
    }
}
