//! One run, from its seed to its end.

use std::fmt;

use super::clock::{Nanos, nanos};
use super::ledger::Breach;
use super::story::Case;
use super::world::World;
use crate::clock::Moment;
use crate::identity::{ManagerId, parse_owner_tag};
use crate::protocol::{AcquireReply, Cycle};
use crate::store::memory::Terms;

/// Statistics of a run, which show whether the runs are meaningful.
#[derive(Debug, Default, Clone)]
pub(super) struct Stats {
    pub(super) events: u64,
    pub(super) uncontended: u64,
    pub(super) local_hand_offs: u64,
    pub(super) remote_grants: u64,
    /// Locks acquired under a lingering lease, lingering leases that were handed over to another
    /// manager, and lingering leases that were lost.
    pub(super) lingering: u64,
    pub(super) handed_over: u64,
    pub(super) lost_idle: u64,
    /// Shared locks acquired beside others of the same process.
    pub(super) joined: u64,
    /// Guards that began beside others of the same key.
    pub(super) in_company: u64,
    pub(super) busy: u64,
    pub(super) cancelled: u64,
    pub(super) dropped: u64,
    pub(super) failed: u64,
    pub(super) lost: u64,
    pub(super) abandoned: u64,
    pub(super) left_to_run_out: u64,
    pub(super) too_late: u64,
    pub(super) regressed: u64,
    pub(super) pushes_lost: u64,
    pub(super) resubscribed: u64,
    pub(super) crashes: u64,
    pub(super) forgotten: u64,
    /// Commands executed long after their connection was abandoned, and cycles released once more
    /// in case there are any.
    pub(super) late: u64,
    pub(super) second_releases: u64,
    /// Scripts that were sent again, because the server did not know them.
    pub(super) unknown_scripts: u64,
    /// Leases released before their `min_hold` had passed.
    pub(super) retired: u64,
    /// Guards that were served in turns, and turns that had served all tasks which waited when they
    /// began, and left others.
    pub(super) in_turns: u64,
    pub(super) gated: u64,
    /// The maximum share of the guards that a task may have to wait for, in percent.
    pub(super) bypass_of_bound: u64,
    /// Batches of renewals, and the leases in them.
    pub(super) batches: u64,
    pub(super) renewals: u64,
    /// The maximum share of the patience that was needed, in percent.
    pub(super) patience_needed: u64,
}

impl Stats {
    pub(super) fn add(&mut self, other: &Self) {
        for (sum, part) in [
            (&mut self.events, other.events),
            (&mut self.uncontended, other.uncontended),
            (&mut self.local_hand_offs, other.local_hand_offs),
            (&mut self.remote_grants, other.remote_grants),
            (&mut self.lingering, other.lingering),
            (&mut self.handed_over, other.handed_over),
            (&mut self.lost_idle, other.lost_idle),
            (&mut self.joined, other.joined),
            (&mut self.in_company, other.in_company),
            (&mut self.busy, other.busy),
            (&mut self.cancelled, other.cancelled),
            (&mut self.dropped, other.dropped),
            (&mut self.failed, other.failed),
            (&mut self.lost, other.lost),
            (&mut self.abandoned, other.abandoned),
            (&mut self.left_to_run_out, other.left_to_run_out),
            (&mut self.too_late, other.too_late),
            (&mut self.regressed, other.regressed),
            (&mut self.pushes_lost, other.pushes_lost),
            (&mut self.resubscribed, other.resubscribed),
            (&mut self.crashes, other.crashes),
            (&mut self.forgotten, other.forgotten),
            (&mut self.late, other.late),
            (&mut self.second_releases, other.second_releases),
            (&mut self.unknown_scripts, other.unknown_scripts),
            (&mut self.retired, other.retired),
            (&mut self.in_turns, other.in_turns),
            (&mut self.gated, other.gated),
            (&mut self.batches, other.batches),
            (&mut self.renewals, other.renewals),
        ] {
            *sum += part;
        }
        self.patience_needed = self.patience_needed.max(other.patience_needed);
        self.bypass_of_bound = self.bypass_of_bound.max(other.bypass_of_bound);
    }

    /// Asserts that every way to get, to miss and to lose a lock occurred often enough.
    pub(super) fn assert_rich(&self) {
        for (what, count, least) in [
            ("uncontended", self.uncontended, 2_000),
            ("local hand-offs", self.local_hand_offs, 2_000),
            ("remote grants", self.remote_grants, 2_000),
            ("locks under kept leases", self.lingering, 2_000),
            ("kept leases that others wanted", self.handed_over, 500),
            ("kept leases that were lost", self.lost_idle, 200),
            ("busy tries", self.busy, 500),
            ("cancelled waits", self.cancelled, 500),
            ("dropped requests", self.dropped, 200),
            ("failed requests", self.failed, 500),
            ("lost guards", self.lost, 500),
            ("abandoned cycles", self.abandoned, 1_000),
            ("replies that came too late", self.too_late, 1),
            ("lost pushes", self.pushes_lost, 100),
            ("new subscriptions", self.resubscribed, 200),
            ("crashes", self.crashes, 100),
            ("late commands", self.late, 100),
            ("cycles that were released once more", self.second_releases, 200),
            ("scripts sent again", self.unknown_scripts, 1_000),
            ("leases released before their min_hold", self.retired, 1_000),
            ("guards in turns", self.in_turns, 2_000),
            ("turns that ended at their gate", self.gated, 500),
        ] {
            assert!(count >= least, "{what}: only {count}\n{self:?}");
        }
        let in_company = self.renewals - self.batches;
        assert!(
            in_company >= 200,
            "batches of several leases: only {in_company}\n{self:?}"
        );
        assert_eq!(
            self.regressed, 0,
            "no token goes back unless something is forgotten: {self:?}"
        );
    }
}

/// How many times a newcomer asks, more than there may be cycles of dead managers in a queue.
const NEWCOMERS_ROUNDS: Nanos = 20;

const LEASE_LEFT: &str = "a lease of a cycle that is over is left";
const STORE_NOT_EMPTY: &str = "the store is not empty";

/// A run in which a guarantee was violated.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) case: Case,
    breach: Breach,
    trace: Vec<String>,
}

impl Failure {
    pub(super) const fn is_unsafe(&self) -> bool {
        self.breach.is_unsafe
    }

    /// The violated guarantee, without the numbers of managers, keys and tokens.
    pub(super) fn kind(&self) -> String {
        let first_line = self.breach.what.lines().next().unwrap_or_default();
        first_line.chars().filter(|char| !char.is_ascii_digit()).collect()
    }

    /// The length of the story.
    pub(super) const fn length(&self) -> usize {
        self.trace.len()
    }

    /// Whether the failure is that the store still contains cycles that are over.
    pub(super) fn is_something_left(&self) -> bool {
        [LEASE_LEFT, STORE_NOT_EMPTY]
            .iter()
            .any(|what| self.breach.what.starts_with(what))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in &self.trace {
            writeln!(f, "{line}")?;
        }
        write!(f, "{}: {}", self.case, self.breach.what)
    }
}

/// Runs one case.
pub(super) fn run(case: &Case, traced: bool) -> Result<Stats, Failure> {
    let mut world = World::new(case, traced);
    match world.run() {
        Ok(()) => Ok(world.stats),
        Err(breach) => Err(Failure {
            case: case.clone(),
            breach,
            trace: world.take_trace(),
        }),
    }
}

impl World {
    fn run(&mut self) -> Result<(), Breach> {
        self.begin();
        while !self.in_calm() && self.checked_step()? {}
        let patience = self.plan.patience();
        let limit = self.plan.faults_end + patience;
        while self.is_busy() {
            if self.now > limit || !self.checked_step()? {
                return Err(self.unended("a task is not served"));
            }
        }
        self.stats.patience_needed = self.now.saturating_sub(self.plan.faults_end) * 100 / patience;
        if self.plan.variant.is_faultless() {
            for m in 0..self.managers.len() {
                self.leave(m);
            }
            return self.end_promptly(limit);
        }
        // Lingering leases end in their own time, and second releases are sent when nothing can
        // arrive late any more.
        let limit = limit + nanos(self.plan.longest_linger() + 3 * self.plan.late_max());
        self.end(limit)?;
        self.a_newcomer_is_served(limit)
    }

    fn checked_step(&mut self) -> Result<bool, Breach> {
        let more = self.step();
        self.check_guards();
        match self.ledger.take_breach() {
            Some(breach) => Err(breach),
            None => Ok(more),
        }
    }

    fn unended(&self, what: &str) -> Breach {
        let mut what = what.to_owned();
        for (m, manager) in self.managers.iter().enumerate().filter(|(_, manager)| manager.is_alive) {
            for (k, queue) in manager
                .queues
                .iter()
                .enumerate()
                .filter(|(_, queue)| !queue.is_unused())
            {
                what += &format!("\nm{m} k{k} {queue:?}");
            }
            for (t, task) in manager.tasks.iter().enumerate() {
                what += &format!("\nm{m} t{t} {:?}", task.state);
            }
        }
        what += &format!("\n{:?}", self.core);
        Breach { what, is_unsafe: false }
    }

    /// Checks that the store is empty long before any lease or time limit has expired.
    fn end_promptly(&mut self, limit: Nanos) -> Result<(), Breach> {
        while self.next_at().is_some_and(|at| at <= limit) {
            self.checked_step()?;
        }
        // A retired lease ends by itself, by the clock of its manager.
        self.now += nanos(self.plan.longest_min_hold()) * 102 / 100;
        if !self.in_flight.is_empty() || self.core.keys_in_use(Moment::from_nanos(self.now)) > 0 {
            return Err(self.unended("something is left"));
        }
        Ok(())
    }

    /// Runs everything in progress to its end and checks that nothing is left, except for what dead
    /// managers left behind and what could not be released during the faults.
    fn end(&mut self, limit: Nanos) -> Result<(), Breach> {
        while self.checked_step()? {
            if self.now > limit {
                return Err(self.unended("some activity never ends"));
            }
        }
        let is_used = |queue: &crate::engine::Contender<usize>| !queue.is_unused();
        let living = || self.managers.iter().filter(|manager| manager.is_alive);
        if living().any(|manager| manager.queues.iter().any(is_used)) || !self.in_flight.is_empty() {
            return Err(self.unended("a queue is left in use"));
        }
        let all_was_released = self.stats.crashes == 0
            && self.stats.left_to_run_out == 0
            // A lease that the replica still had may have been released before the failover.
            && self.replicas.failovers == 0;
        if all_was_released && self.is_held_by_nobody() {
            return Err(self.unended(LEASE_LEFT));
        }
        self.now += nanos(self.plan.longest_ttl()) * 4;
        if all_was_released && self.core.keys_in_use(Moment::from_nanos(self.now)) > 0 {
            return Err(self.unended(STORE_NOT_EMPTY));
        }
        Ok(())
    }

    /// Whether a manager has a lease that it does not know of: all its queues are unused.
    fn is_held_by_nobody(&mut self) -> bool {
        let now = Moment::from_nanos(self.now);
        self.keys.iter().any(|key| {
            let owners = self.core.owners(key, now);
            let mut managers = owners.iter().filter_map(|owner| parse_owner_tag(owner));
            managers.any(|(manager, cycle)| {
                !cycle.is_retired() && self.managers.iter().any(|one| one.id.as_str() == manager)
            })
        })
    }

    /// Checks that a new manager gets every key, whatever was left behind, and leaves nothing.
    fn a_newcomer_is_served(&mut self, limit: Nanos) -> Result<(), Breach> {
        let newcomer = ManagerId::of("sim", 1, 99);
        self.core.set_subscribed(newcomer.as_str(), true);
        let me = newcomer.owner_tag(Cycle::of(2)).to_string();
        for k in 0..self.distinct() {
            for round in 2..NEWCOMERS_ROUNDS {
                let terms = self.newcomers_terms();
                let reply = self.core.acquire(&self.keys[k], &me, false, terms);
                if matches!(reply, AcquireReply::Granted { .. }) {
                    break;
                }
                // A cycle that is over but was still in the queue got the grant. Its manager
                // releases it, or has died. A manager may have left one for each mode.
                self.deliver(k);
                self.end(limit * round)?;
            }
            let terms = self.newcomers_terms();
            if !self.core.release(&self.keys[k], &me, None, terms).held {
                return Err(self.unended("a newcomer is not served"));
            }
        }
        if self.core.keys_in_use(Moment::from_nanos(self.now)) > 0 {
            return Err(self.unended("a newcomer does not leave the store empty"));
        }
        Ok(())
    }

    fn newcomers_terms(&self) -> Terms {
        Terms {
            now: Moment::from_nanos(self.now),
            server_time: self.server_time(),
            ttl: self.plan.longest_ttl() * 100,
            tokens: 1,
            floor: self.server_time(),
        }
    }
}
