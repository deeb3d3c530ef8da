//! A failover: a replica that lacks the last leases replaces the store, and every connection
//! breaks.
//!
//! Once a manager has noticed, it grants no guard under a lease that the new primary does not have,
//! and no token that is not larger than all earlier ones. Leases granted before that may be
//! forgotten, so a key may have two holders meanwhile.

use super::clock::nanos;
use super::world::World;
use crate::clock::Moment;
use crate::engine::Granted;
use crate::store::Priority;
use crate::store::memory::MemoryCore;

/// The data of the replica, and the number of failovers so far.
#[derive(Debug, Default)]
pub(super) struct Replicas {
    /// The state of the store when the replica was cut off.
    has: Option<MemoryCore>,
    pub(super) failovers: u32,
}

impl World {
    /// From now on the replica receives no updates.
    pub(super) fn cut_replica_off(&mut self) {
        self.replicas.has = Some(self.core.clone());
    }

    /// The replica takes over with the data it has.
    pub(super) fn fail_over(&mut self) {
        let Some(mut core) = self.replicas.has.take() else {
            return;
        };
        // The new primary has no subscribers and nothing left to push.
        core.drop_subscriptions();
        self.core = core;
        self.replicas.failovers += 1;
        self.stats.forgotten += 1;
        for m in 0..self.managers.len() {
            self.managers[m].inbox.known_to_server.clear();
            if self.managers[m].is_alive {
                self.reset(m, Priority::Foreground);
                self.reset(m, Priority::Background);
                self.lose_subscription(m);
            }
        }
    }

    /// A manager finds a connection broken. It may now be connected to another server.
    pub(super) fn may_have_forgotten(&mut self, m: usize) {
        let (floor, failovers, now) = (self.server_time(), self.replicas.failovers, self.now);
        let manager = &mut self.managers[m];
        manager.epoch += 1;
        manager.floor = manager.floor.max(floor);
        if manager.noticed.0 != failovers {
            manager.noticed = (failovers, manager.clock.at(now));
        }
    }

    /// Called before something is sent, which is when a broken connection is detected.
    pub(super) fn find_broken(&mut self, m: usize, lane: Priority) {
        let connection = &mut self.managers[m].lanes[lane as usize];
        if std::mem::replace(&mut connection.noticed, connection.generation) != connection.generation {
            self.may_have_forgotten(m);
        }
    }

    /// Checks that the lease of a guard exists in the store and that its token is the largest, if
    /// the manager could know of the last failover when the guard was served.
    pub(super) fn check_after_failover(&mut self, m: usize, k: usize, granted: &Granted) {
        let Granted { lease, token, at, .. } = granted;
        let (failovers, owners) = (
            self.replicas.failovers,
            self.core.owners(&self.keys[k], Moment::from_nanos(self.now)),
        );
        let manager = &self.managers[m];
        let (noticed, noticed_at) = manager.noticed;
        let is_valid = lease.loss_at(manager.clock.at(self.now)).is_none();
        if failovers == 0 || noticed != failovers || noticed_at >= *at || !is_valid {
            return;
        }
        let cycle = lease.cycle;
        if !owners.contains(&manager.id.owner_tag(cycle).to_string()) {
            let what = format!("m{m} k{k} cycle {cycle} has a guard after a failover, but the lease is {owners:?}");
            return self.ledger.breach_of_safety(what);
        }
        let largest = self.ledger.largest(k);
        if token.get() <= largest {
            let what = format!("m{m} k{k} a guard after a failover has token {token}, which is not above {largest}");
            self.ledger.breach_of_safety(what);
        }
    }

    /// The time from the cut to the failover: anything from a moment to the longest TTL.
    pub(super) fn failover_delay(&mut self) -> u64 {
        let long = nanos(self.plan.longest_ttl());
        self.between(0, long)
    }
}
