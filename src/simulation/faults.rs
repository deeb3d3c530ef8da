//! The faults, and when they happen.

use super::clock::{Nanos, nanos};
use super::pushes::Subscription;
use super::tasks::{State, Step};
use super::world::{Event, PARTS, Part, World};
use crate::clock::Moment;
use crate::store::Priority;

#[derive(Debug, Clone, Copy)]
pub(super) enum Fault {
    /// The process executes nothing for some time.
    Pause,
    /// The application's runtime executes nothing for some time; the background thread continues.
    PauseTasks,
    /// The process is gone.
    Crash,
    /// A connection breaks.
    Reset(Priority),
    /// Nothing passes a connection for some time.
    Stall(Priority),
    /// For some time, every message of every manager takes about as long as a lease lasts.
    SlowTime,
    LoseSubscription,
    /// The inbox is subscribed at a replica for some time.
    ListenElsewhere,
    /// The manager is shut down.
    Shutdown,
    /// The last handle of the manager is dropped: no new requests are made, and held locks are
    /// released as usual.
    Leave,
    /// A lingering lease is evicted.
    Evict(usize),
    /// A client of another library takes the key, if it is free, and may release it later.
    ForeignTakes(usize),
    ForeignGives(usize),
    /// Everything is forgotten, or one lease is deleted, or one lease is overwritten.
    Flush,
    Delete(usize),
    Overwrite(usize),
    /// The replica receives no further updates, and is promoted some time later.
    CutReplicaOff,
    FailOver,
}

const FOREIGN: &str = "another-library";

impl World {
    /// Draws when the faults of the plan happen, and starts the tasks.
    pub(super) fn begin(&mut self) {
        for m in 0..self.plan.managers {
            for task in 0..self.plan.tasks {
                let think = self.between(0, self.plan.think_max);
                self.later(m, task, think, Step::Start);
            }
        }
        self.draw(self.plan.pauses, |_, _| Fault::Pause);
        self.draw(self.plan.task_pauses, |_, _| Fault::PauseTasks);
        self.draw(self.plan.crashes, |_, _| Fault::Crash);
        self.draw(self.plan.resets, |world, _| Fault::Reset(world.some_lane()));
        self.draw(self.plan.stalls, |world, _| Fault::Stall(world.some_lane()));
        self.draw(self.plan.slow_times, |_, _| Fault::SlowTime);
        self.draw(self.plan.subscription_losses, |_, _| Fault::LoseSubscription);
        self.draw(self.plan.inboxes_elsewhere, |_, _| Fault::ListenElsewhere);
        self.draw(self.plan.shutdowns, |world, _| {
            if world.chance(0.7) {
                Fault::Shutdown
            } else {
                Fault::Leave
            }
        });
        self.draw(self.plan.evictions, |_, k| Fault::Evict(k));
        self.draw(self.plan.foreigners, |_, k| Fault::ForeignTakes(k));
        self.draw(self.plan.forgettings, |world, k| match world.between(0, 2) {
            0 => Fault::Flush,
            1 => Fault::Delete(k),
            _ => Fault::Overwrite(k),
        });
        self.draw(self.plan.failovers, |_, _| Fault::CutReplicaOff);
    }

    fn draw(&mut self, count: u32, mut fault: impl FnMut(&mut Self, usize) -> Fault) {
        for _ in 0..count {
            let at = self.between(0, self.plan.faults_end - 1);
            let m = self.between(0, self.plan.managers as u64 - 1) as usize;
            let k = self.between(0, self.keys.len() as u64 - 1) as usize;
            let fault = fault(self, k);
            self.outside(at, m, Event::Fault(fault));
        }
    }

    fn some_lane(&mut self) -> Priority {
        if self.chance(0.6) {
            Priority::Foreground
        } else {
            Priority::Background
        }
    }

    pub(super) fn fault_happens(&mut self, m: usize, fault: Fault) {
        if !self.managers[m].is_alive
            && !matches!(
                fault,
                Fault::ForeignTakes(_) | Fault::ForeignGives(_) | Fault::Flush | Fault::CutReplicaOff | Fault::FailOver
            )
        {
            return;
        }
        self.note(|_| format!("m{m} fault: {fault:?}"));
        match fault {
            Fault::Pause => {
                let until = self.now + self.some_time();
                for part in 0..PARTS {
                    // The parts resume in any order.
                    let until = until + self.between(0, 2_000_000);
                    self.block(m, part, until);
                }
            }
            Fault::PauseTasks => {
                let until = self.now + self.some_time();
                self.block(m, Part::Tasks as usize, until);
            }
            Fault::Crash => self.crash(m),
            Fault::Reset(lane) => self.reset(m, lane),
            Fault::Stall(lane) => {
                let until = self.now + self.some_time();
                self.managers[m].lanes[lane as usize].stalled_until = until;
                if self.plan.ghosts && self.chance(0.6) {
                    // The connection is considered broken while it carries commands.
                    let at = self.between(self.now, until.min(self.plan.faults_end));
                    self.outside(at, m, Event::Fault(Fault::Reset(lane)));
                }
            }
            Fault::SlowTime => {
                self.slow_until = self.now + self.between(0, nanos(self.plan.ttls[0]) * 8);
            }
            Fault::LoseSubscription => self.lose_subscription(m),
            Fault::ListenElsewhere => self.listen_elsewhere(m),
            Fault::Shutdown => self.shut_down(m),
            Fault::Leave => {
                self.managers[m].is_left = true;
                self.leave(m);
            }
            Fault::Evict(k) => self.event_in_background(m, k, |queue, cx| queue.evict(cx)),
            Fault::ForeignTakes(k) => self.foreign_takes(m, k),
            Fault::ForeignGives(k) => {
                if self.core.owner(&self.keys[k], Moment::from_nanos(self.now)).as_deref() == Some(FOREIGN) {
                    self.core.delete(&self.keys[k]);
                }
            }
            Fault::Flush => {
                self.stats.forgotten += 1;
                self.core.flush();
            }
            Fault::Delete(k) => {
                self.stats.forgotten += 1;
                self.core.delete(&self.keys[k]);
            }
            Fault::CutReplicaOff => {
                self.cut_replica_off();
                let at = self.now + self.failover_delay();
                self.outside(at, m, Event::Fault(Fault::FailOver));
            }
            Fault::FailOver => self.fail_over(),
            Fault::Overwrite(k) => {
                self.stats.forgotten += 1;
                let ends = Moment::from_nanos(self.now + nanos(self.plan.ttls[0]));
                self.core.put(&self.keys[k], FOREIGN, Some(ends));
            }
        }
    }

    /// From a moment to a few TTLs, so that it does not end long after the other faults.
    pub(super) fn some_time(&mut self) -> Nanos {
        let long = nanos(self.plan.longest_ttl()) * 5 / 2;
        self.between(0, long)
    }

    fn block(&mut self, m: usize, part: usize, until: Nanos) {
        let blocked = &mut self.managers[m].blocked_until[part];
        *blocked = (*blocked).max(until);
    }

    fn crash(&mut self, m: usize) {
        self.stats.crashes += 1;
        self.managers[m].is_alive = false;
        self.ledger.manager_dies(m);
        self.in_flight.retain(|_, in_flight| in_flight.m != m);
        let long = self.plan.slow_max;
        self.managers[m].inbox.is_at_replica = false;
        let connections: Vec<usize> = self.managers[m].inbox.known_to_server.iter().copied().collect();
        for generation in connections {
            // The server may consider a dead machine alive for some time.
            let forgets = Subscription::ServerForgets(generation);
            let after = if self.chance(0.5) { 0 } else { self.between(0, long) };
            self.outside(self.now + after, m, Event::Subscription(forgets));
        }
    }

    fn shut_down(&mut self, m: usize) {
        self.managers[m].is_closed = true;
        for k in 0..self.keys.len() {
            self.event_in_background(m, k, |queue, cx| queue.close(cx));
        }
    }

    /// No leases linger any more. Waiters are still served. In production a waiting task has a
    /// handle, but this makes no difference to the queue.
    pub(super) fn leave(&mut self, m: usize) {
        for k in 0..self.keys.len() {
            self.event_in_background(m, k, |queue, cx| queue.stop_lingering(cx));
        }
    }

    fn foreign_takes(&mut self, m: usize, k: usize) {
        let now = Moment::from_nanos(self.now);
        if !self.core.owners(&self.keys[k], now).is_empty() {
            return;
        }
        let ends = now + self.plan.ttls[0];
        self.core.put(&self.keys[k], FOREIGN, Some(ends));
        self.check_leases(k);
        let gives = self.now + self.between(0, nanos(self.plan.ttls[0]) * 3 / 2);
        self.outside(gives, m, Event::Fault(Fault::ForeignGives(k)));
    }

    /// Whether any task of a living manager waits for or holds a lock.
    pub(super) fn is_busy(&self) -> bool {
        self.managers
            .iter()
            .filter(|manager| manager.is_alive)
            .any(|manager| manager.tasks.iter().any(|task| !matches!(task.state, State::Idle)))
    }
}
