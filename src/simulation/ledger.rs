//! The guarantees that hold at every moment, and the records that are kept to check them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::clock::{DRIFT_MAX, Nanos, nanos};
use super::plan::Variant;
use super::tasks::State;
use super::turns::Turn;
use super::world::World;
use crate::clock::Moment;
use crate::fence::{FencingToken, TokenBlock};
use crate::lease::Lease;
use crate::mode::LockMode;
use crate::protocol::Cycle;

/// More blocks than a command issues.
const ISSUED_AT_ONCE: usize = 64;

#[derive(Debug)]
pub(super) struct Ledger {
    keys: Vec<Books>,
    /// The number of token blocks issued so far.
    issued: u64,
    /// The turns of cycles, by manager and key.
    pub(super) turns: BTreeMap<(usize, usize, Cycle), Turn>,
    /// When the first guard of a cycle was granted.
    pub(super) first_granted: BTreeMap<(usize, usize, Cycle), Nanos>,
    /// The request that ended the lease of a cycle.
    released: BTreeMap<(usize, usize, Cycle), u64>,
    breach: Option<Breach>,
}

/// A violated guarantee.
#[derive(Debug, Clone)]
pub(super) struct Breach {
    pub(super) what: String,
    /// Whether it concerns exclusion or tokens.
    pub(super) is_unsafe: bool,
}

#[derive(Debug, Default)]
struct Books {
    guards: Vec<Guard>,
    blocks: Vec<Block>,
    /// The tokens of all guards, each with the number of the block that the store issued it in.
    tokens: BTreeMap<u64, u64>,
    /// The largest token of any guard, and of any exclusive one, so far.
    largest: u64,
    largest_exclusive: u64,
    /// Until when nobody may get the key, because of an earlier guard's `min_hold`.
    min_hold_until: Nanos,
}

#[derive(Debug)]
struct Guard {
    m: usize,
    lease: Arc<Lease>,
    token: FencingToken,
}

#[derive(Debug)]
struct Block {
    m: usize,
    cycle: Cycle,
    tokens: TokenBlock,
    number: u64,
    /// When the store issued it, and granted or extended the lease.
    at: Nanos,
}

impl Ledger {
    pub(super) fn new(keys: usize) -> Self {
        Self {
            keys: (0..keys).map(|_| Books::default()).collect(),
            issued: 0,
            turns: BTreeMap::new(),
            first_granted: BTreeMap::new(),
            released: BTreeMap::new(),
            breach: None,
        }
    }

    pub(super) fn take_breach(&mut self) -> Option<Breach> {
        self.breach.take()
    }

    pub(super) fn breach(&mut self, what: String) {
        let is_unsafe = false;
        self.breach.get_or_insert(Breach { what, is_unsafe });
    }

    pub(super) fn breach_of_safety(&mut self, what: String) {
        let is_unsafe = true;
        self.breach.get_or_insert(Breach { what, is_unsafe });
    }

    /// The number of different keys.
    pub(super) const fn distinct(&self) -> usize {
        self.keys.len()
    }

    /// The books of a key, whatever the mode.
    fn books(&mut self, k: usize) -> &mut Books {
        let distinct = self.distinct();
        &mut self.keys[k % distinct]
    }

    /// The store issued a block of tokens to this cycle. What the same command recorded already is
    /// ignored.
    pub(super) fn issues_block(&mut self, at: Nanos, m: usize, k: usize, cycle: Cycle, tokens: TokenBlock) {
        let is_known = |block: &Block| block.m == m && block.cycle == cycle && block.tokens == tokens;
        if self.books(k).blocks.iter().rev().take(ISSUED_AT_ONCE).any(is_known) {
            return;
        }
        self.issued += 1;
        let number = self.issued;
        self.books(k).blocks.push(Block {
            m,
            cycle,
            tokens,
            number,
            at,
        });
    }

    /// A release was executed and found the lease of its cycle.
    pub(super) fn is_released(&mut self, m: usize, k: usize, cycle: Cycle, request: u64) {
        self.released.insert((m, k, cycle), request);
    }

    /// The reply to a task's release reports that the lease was no longer there. Checks that no
    /// other release of its manager has ended it.
    pub(super) fn check_loss(&mut self, m: usize, k: usize, cycle: Cycle) {
        if let Some(request) = self.released.get(&(m, k, cycle)) {
            self.breach(format!(
                "m{m} k{k} a task loses cycle {cycle}, although request #{request} has released it"
            ));
        }
    }

    /// The largest token of any guard of this key so far.
    pub(super) fn largest(&self, k: usize) -> u64 {
        self.keys[k % self.distinct()].largest
    }

    pub(super) fn manager_dies(&mut self, m: usize) {
        for books in &mut self.keys {
            books.guards.retain(|guard| guard.m != m);
        }
    }
}

impl World {
    /// A task gets its guard.
    pub(super) fn guard_begins(
        &mut self,
        m: usize,
        k: usize,
        lease: &Arc<Lease>,
        token: FencingToken,
        min_hold: Duration,
    ) {
        let cycle = lease.cycle;
        let is_valid = lease.loss_at(self.managers[m].clock.at(self.now)).is_none();
        let books = self.ledger.books(k);
        let number = token.get();
        let block = books.blocks.iter().rev().find(|block| {
            block.m == m && block.cycle == cycle && (block.tokens.first()..=block.tokens.last()).contains(&number)
        });
        // The tokens of those that hold a key at the same time grow in no particular order.
        let is_exclusive = cycle.mode().is_exclusive();
        let largest = if is_exclusive {
            books.largest
        } else {
            books.largest_exclusive
        };
        books.largest = books.largest.max(number);
        if is_exclusive {
            books.largest_exclusive = books.largest_exclusive.max(number);
        }
        let has_company = !books.guards.is_empty();
        books.guards.push(Guard {
            m,
            lease: Arc::clone(lease),
            token,
        });
        let Some((issued, issued_at)) = block.map(|block| (block.number, block.at)) else {
            let what = format!("m{m} k{k} token {token} of cycle {cycle} was never issued to it");
            return self.ledger.breach_of_safety(what);
        };
        let used_before = books.tokens.insert(number, issued).is_some();
        let (below, above) = (
            books.tokens.range(..number).next_back(),
            books.tokens.range(number + 1..).next(),
        );
        let in_order =
            below.is_none_or(|(_, &below)| below <= issued) && above.is_none_or(|(_, &above)| above >= issued);
        if used_before || !in_order {
            let what = format!("m{m} k{k} token {token} does not follow the order in which tokens were issued");
            return self.ledger.breach_of_safety(what);
        }
        if has_company {
            self.stats.in_company += 1;
        }
        if matches!(self.plan.variant, Variant::Faults | Variant::Mixed) && is_valid && number <= largest {
            let what = format!("m{m} k{k} a valid guard begins with token {token} after one with {largest}");
            return self.ledger.breach_of_safety(what);
        }
        // A store that forgets leases forgets those that are retired, too.
        let keeps_leases = !matches!(self.plan.variant, Variant::Forgetting | Variant::Failover);
        // The rest of the time is counted by the clock of the manager.
        let until = books.min_hold_until;
        if keeps_leases && is_valid && self.now < until {
            let what = format!(
                "m{m} k{k} token {token} is served {} ns before a min_hold ends",
                until - self.now
            );
            return self.ledger.breach_of_safety(what);
        }
        if !min_hold.is_zero() {
            let by_any_clock = nanos(min_hold) * (1_000_000 - DRIFT_MAX as Nanos) / 1_000_000;
            books.min_hold_until = until.max(issued_at + by_any_clock);
        }
        self.check_guards();
        self.check_leases(k);
    }

    pub(super) fn guard_ends(&mut self, k: usize, token: FencingToken) {
        self.ledger.books(k).guards.retain(|guard| guard.token != token);
    }

    /// Checks that the task which got the lock asked before all tasks of the same process that
    /// still wait for it. A task that lost a guard in another mode than exclusive before it
    /// collected it waits again, while those granted beside it collect theirs.
    pub(super) fn check_order(&mut self, m: usize, k: usize, order: u64, mode: LockMode) {
        let manager = &self.managers[m];
        let passed = manager.tasks.iter().position(|task| {
            matches!(&task.state, State::Waiting(earlier)
                if earlier.k == k && earlier.mode == mode && earlier.order < order
                    && (mode.is_exclusive() || !earlier.was_settled) && !manager.queues[k].is_settled(earlier.id))
        });
        if let Some(passed) = passed {
            self.ledger
                .breach(format!("m{m} k{k} t{passed} was overtaken by a later task"));
        }
    }

    /// Checks that a try does not join the queue in the store.
    pub(super) fn check_try(&mut self, m: usize, k: usize) {
        let manager = &self.managers[m];
        let queue = &manager.queues[k];
        let waiting = manager.tasks.iter().filter_map(|task| match &task.state {
            State::Waiting(waiting) if waiting.k == k && !queue.is_settled(waiting.id) => Some(waiting),
            _ => None,
        });
        let first = waiting.min_by_key(|waiting| waiting.order);
        if queue.leases() == 0 && first.is_some_and(|first| first.try_only) {
            self.ledger.breach(format!("m{m} k{k} a try waits"));
        }
    }

    /// Checks that the guards of one key that are valid at once can hold it beside each other.
    pub(super) fn check_guards(&mut self) {
        if !self.plan.variant.keeps_data() {
            return;
        }
        for k in 0..self.distinct() {
            let guards = &self.ledger.keys[k].guards;
            if guards.len() < 2 {
                continue;
            }
            let valid = || {
                guards.iter().filter(|guard| {
                    let now = self.managers[guard.m].clock.at(self.now);
                    guard.lease.loss_at(now).is_none()
                })
            };
            let modes = || valid().map(|guard| guard.lease.cycle.mode());
            let in_use: u32 = modes().map(LockMode::weight).sum();
            let limit = modes().map(LockMode::limit).min().unwrap_or(u32::MAX);
            let breach = if modes().any(LockMode::is_exclusive) && modes().count() > 1 {
                "two guards are valid at once"
            } else if in_use > limit {
                "too many permits are in use at once"
            } else {
                continue;
            };
            let valid = valid().map(|guard| format!("m{} cycle {} token {}", guard.m, guard.lease.cycle, guard.token));
            let valid: Vec<String> = valid.collect();
            self.ledger
                .breach_of_safety(format!("k{k} {breach}: {}", valid.join(", ")));
        }
    }

    /// Checks that the lease of every valid guard exists in the store.
    pub(super) fn check_leases(&mut self, k: usize) {
        if !self.plan.variant.keeps_data() {
            return;
        }
        let now = Moment::from_nanos(self.now);
        for guard in &self.ledger.keys[k % self.ledger.distinct()].guards {
            let manager = &self.managers[guard.m];
            if guard.lease.loss_at(manager.clock.at(self.now)).is_some() {
                continue;
            }
            let owners = self.core.owners(&self.keys[k], now);
            if !owners.contains(&manager.id.owner_tag(guard.lease.cycle).to_string()) {
                let (m, cycle) = (guard.m, guard.lease.cycle);
                let what = format!("k{k} the guard of m{m} under cycle {cycle} is valid, but the lease is {owners:?}");
                return self.ledger.breach_of_safety(what);
            }
        }
        self.check_kept_leases(k);
    }

    /// Checks the same for a lingering lease: the next task gets it without a request to the store.
    fn check_kept_leases(&mut self, k: usize) {
        let now = Moment::from_nanos(self.now);
        for (m, manager) in self.managers.iter().enumerate().filter(|(_, manager)| manager.is_alive) {
            let is_valid = |lease: &&Lease| lease.loss_at(manager.clock.at(self.now)).is_none();
            for lease in manager.queues[k].lingering().filter(is_valid) {
                let owners = self.core.owners(&self.keys[k], now);
                if !owners.contains(&manager.id.owner_tag(lease.cycle).to_string()) {
                    let cycle = lease.cycle;
                    let what = format!("k{k} m{m} keeps its lease of cycle {cycle}, but the lease is {owners:?}");
                    return self.ledger.breach_of_safety(what);
                }
            }
        }
    }
}
