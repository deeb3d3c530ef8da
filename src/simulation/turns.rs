//! Turns: which tasks they serve, and how long those in other processes wait for them.
//!
//! # Implementation details
//!
//! The checks know nothing of the engine's turns. A turn begins when the manager of a cycle learns
//! that somebody else waits, or when the first guard of an odd cycle is granted. It is found out
//! from messages, guards and the queue of the store only.

use std::collections::BTreeMap;

use super::clock::Nanos;
use super::ledger::Ledger;
use super::tasks::{State, Waiting};
use super::world::World;
use crate::identity::parse_owner_tag;
use crate::mode::LockMode;
use crate::protocol::{AcquireReply, Cycle};

/// How much later a moment may seem after it was converted to a local clock and back.
const ROUNDING: Nanos = 10;

/// A turn, as far as it is known outside of the engine.
#[derive(Debug)]
pub(super) struct Turn {
    began: Nanos,
    /// The number of guards served since.
    served: u32,
}

/// How often others were served while a task waited.
#[derive(Debug, Default)]
pub(super) struct Bypass {
    /// The number of guards that turns of others served while the manager of the task was in the
    /// store's queue, by their manager and key.
    guards: BTreeMap<(usize, usize), u32>,
    /// The cycle of its own manager that was in the queue, and the number of cycles that were.
    queued: Option<Cycle>,
    cycles: u32,
}

impl Ledger {
    /// The reply that grants a lease contains the number of waiters. It supersedes what was known
    /// of an earlier lease of the same cycle whose reply came too late.
    pub(super) fn notes_remote_waiters_of(
        &mut self,
        now: Nanos,
        (m, k, cycle): (usize, usize, Cycle),
        reply: &AcquireReply,
        is_new: bool,
    ) {
        match reply {
            AcquireReply::Granted { queued: 0, .. } if is_new => {
                self.turns.remove(&(m, k, cycle));
            }
            AcquireReply::Granted { queued: 1.., .. } => self.notes_remote_waiter(now, m, k, cycle),
            _ => {}
        }
    }

    /// A turn of this cycle begins, unless it has one.
    pub(super) fn notes_remote_waiter(&mut self, now: Nanos, m: usize, k: usize, cycle: Cycle) {
        let turn = Turn { began: now, served: 0 };
        self.turns.entry((m, k, cycle)).or_insert(turn);
    }
}

impl World {
    /// A task that has waited since `asked_at` got its guard, which was granted at `granted_at`.
    pub(super) fn check_turn(&mut self, m: usize, k: usize, cycle: Cycle, asked_at: Nanos, granted_at: Nanos) {
        if cycle.expects_remote_waiters() {
            self.ledger.notes_remote_waiter(granted_at, m, k, cycle);
        }
        // The manager may have learned of remote_waiters before the reply that granted the lease
        // arrived.
        let first_granted = *self.ledger.first_granted.entry((m, k, cycle)).or_insert(granted_at);
        let turn = self.ledger.turns.get(&(m, k, cycle));
        let began = turn.map(|turn| turn.began.max(first_granted));
        let (Some(turn), Some(began)) = (self.ledger.turns.get_mut(&(m, k, cycle)), began) else {
            return;
        };
        let came_later = asked_at > began + ROUNDING;
        // Several shared guards may have been granted together before that, and begin after it.
        let is_served_by_turn = granted_at > turn.began;
        if cycle.mode().is_exclusive() || is_served_by_turn {
            turn.served += 1;
            if turn.served > self.plan.rules.max_burst {
                let served = turn.served;
                let what = format!("m{m} k{k} cycle {cycle} served {served} guards while others waited");
                return self.ledger.breach(what);
            }
        }
        if came_later {
            let what = format!("m{m} k{k} the turn of cycle {cycle} serves a task that came after it began");
            return self.ledger.breach(what);
        }
        if is_served_by_turn {
            self.stats.in_turns += 1;
            if self.plan.variant.is_faultless() {
                self.count_bypass(m, k);
            }
        }
    }

    /// Checks that tasks wait for one turn of each other process, which serves each task of that
    /// process at most once. If the turn of their own process was ended by `max_burst` or
    /// `max_slice` before they were served, its next cycle waits for another one.
    fn count_bypass(&mut self, m: usize, k: usize) {
        if self.has_lanes(k) {
            return;
        }
        let key = &self.keys[k].clone();
        let queued = self.core.queue(key);
        let distinct = self.distinct();
        for p in 0..self.managers.len() {
            for other in (k % distinct..self.keys.len()).step_by(distinct) {
                if (p, other) == (m, k) || self.has_lanes(other) {
                    continue;
                }
                let manager = &mut self.managers[p];
                let queue = &manager.queues[other];
                let is_queued = queued.iter().filter_map(|member| parse_owner_tag(member));
                let mut is_queued = is_queued.filter(|(name, _)| *name == manager.id.as_str());
                let Some((_, cycle)) = is_queued.find(|(_, cycle)| queue.is_current(*cycle)) else {
                    continue;
                };
                for (t, task) in manager.tasks.iter_mut().enumerate() {
                    let State::Waiting(Waiting {
                        bypass, k: wanted, id, ..
                    }) = &mut task.state
                    else {
                        continue;
                    };
                    if *wanted != other || queue.is_settled(*id) {
                        continue;
                    }
                    let guards = bypass.guards.entry((m, k)).or_default();
                    *guards += 1;
                    if bypass.queued.replace(cycle) != Some(cycle) {
                        bypass.cycles += 1;
                    }
                    if self.plan.variant.is_turns() && bypass.cycles > 1 {
                        let what = format!("m{p} k{other} t{t} is not served in the first turn after it came");
                        return self.ledger.breach(what);
                    }
                    let bound = self.plan.tasks as u32 * bypass.cycles;
                    self.stats.bypass_of_bound = self.stats.bypass_of_bound.max((*guards * 100 / bound).into());
                    if *guards > bound {
                        let what = format!(
                            "m{p} k{other} t{t} waits while m{m} serves {guards} guards in turns, more than {bound}"
                        );
                        self.ledger.breach(what);
                    }
                }
            }
        }
    }

    /// Whether a manager may have several leases of that key: it has a turn for each.
    fn has_lanes(&self, k: usize) -> bool {
        matches!(self.kind(k), LockMode::Permits { .. })
    }

    /// Checks that a task without obstacles waited no longer than its own place in line and one
    /// turn of each other process take.
    pub(super) fn check_wait(&mut self, m: usize, k: usize, asked_at: Nanos) {
        let longest = self.plan.patience();
        let waited = self.now - asked_at;
        if self.plan.variant.is_turns() && waited > longest {
            let what = format!("m{m} k{k} a task waits for {waited} ns, longer than {longest} ns");
            self.ledger.breach(what);
        }
    }
}
