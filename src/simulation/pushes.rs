//! Pushes and subscriptions. Messages keep their order and are lost only with their connection,
//! which may be dead for some time before either side notices.

use std::collections::BTreeSet;

use rand::Rng;

use super::background::Job;
use super::clock::{Nanos, nanos};
use super::world::{Event, Part, World};
use crate::engine::StoreEvent;
use crate::protocol::Push;

/// A manager's subscription, including the earlier connections that it replaced.
#[derive(Debug)]
pub(super) struct Inbox {
    /// The newest connection. Messages sent on an older one are lost.
    generation: usize,
    /// The connections that the server considers alive.
    pub(super) known_to_server: BTreeSet<usize>,
    last_delivery: Nanos,
    /// Whether the newest connection is subscribed, as far as the manager knows.
    is_subscribed: bool,
    /// Whether the newest connection leads to a replica. The store does not know of it, yet all
    /// published messages arrive on it.
    pub(super) is_at_replica: bool,
}

impl Default for Inbox {
    fn default() -> Self {
        Self {
            generation: 0,
            known_to_server: BTreeSet::from([0]),
            last_delivery: 0,
            is_subscribed: true,
            is_at_replica: false,
        }
    }
}

/// The steps in which a subscription is lost and restored.
#[derive(Debug, Clone, Copy)]
pub(super) enum Subscription {
    /// The server notices that this connection is gone.
    ServerForgets(usize),
    /// The manager notices that its connection is gone.
    Noticed,
    /// The subscription of the new connection reaches the server.
    Arrives,
    /// The manager is notified that it is subscribed again.
    Confirmed,
    /// The time limit of a request has passed since the connection was lost.
    CutOff(usize),
    /// The manager detects that the newest connection leads to a replica, and leaves it.
    LeavesReplica,
}

impl World {
    /// Sends the messages that the store wants to push.
    pub(super) fn deliver(&mut self, k: usize) {
        for (name, push) in std::mem::take(&mut self.core.outbox) {
            let Some(m) = self.managers.iter().position(|manager| manager.id.as_str() == name) else {
                continue;
            };
            if let Push::Granted { grant, .. } = &push {
                self.ledger.issues_block(self.now, m, k, grant.cycle, grant.tokens);
            }
            self.note(|_| format!("m{m} k{k} is pushed {push:?}"));
            let delay = self.message_delay();
            let inbox = &mut self.managers[m].inbox;
            inbox.last_delivery = inbox.last_delivery.max(self.now + delay);
            // If only dead connections are left, the message goes to the newest one and is lost.
            let known = inbox.known_to_server.last().copied();
            let at_replica = inbox.is_at_replica.then_some(inbox.generation);
            let generation = at_replica.or(known).unwrap_or(usize::MAX);
            let at = inbox.last_delivery;
            self.inside(at, m, Part::Pushes, Event::Pushed { generation, push });
        }
    }

    pub(super) fn push_comes(&mut self, m: usize, generation: usize, push: Push) {
        let inbox = &self.managers[m].inbox;
        let is_missed =
            matches!(push, Push::RemoteWaiter { .. }) && self.plan.misses_remote_waiters && self.rng.random_bool(0.5);
        if is_missed || inbox.generation != generation || !inbox.is_subscribed {
            self.stats.pushes_lost += 1;
            return self.note(|_| format!("m{m} {push:?} is lost"));
        }
        self.note(|_| format!("m{m} receives {push:?}"));
        match push {
            Push::Granted { key, grant } => {
                let Some(k) = self.index_of(&key, grant.cycle.mode()) else {
                    return;
                };
                if self.managers[m].queues[k].is_unused() {
                    return self.job(m, Job::Abandon { k, cycle: grant.cycle });
                }
                self.event_in_background(m, k, |queue, cx| {
                    queue.on_event(grant.cycle, StoreEvent::Grant(grant), cx)
                });
            }
            Push::RemoteWaiter { key, cycle } => {
                let Some(k) = self.index_of(&key, cycle.mode()) else {
                    return;
                };
                self.ledger.notes_remote_waiter(self.now, m, k, cycle);
                if self.managers[m].queues[k].lingers_until().is_some() {
                    self.stats.handed_over += 1;
                }
                self.event_in_background(m, k, |queue, cx| queue.on_event(cycle, StoreEvent::RemoteWaiter, cx));
            }
            Push::YourTurn { key, cycle } => {
                let Some(k) = self.index_of(&key, cycle.mode()) else {
                    return;
                };
                self.event_in_background(m, k, |queue, cx| queue.on_event(cycle, StoreEvent::YourTurn, cx));
            }
            Push::Resubscribed { .. } | Push::Disconnected | Push::Refused { .. } => {}
        }
    }

    /// The connection of the inbox dies. Either side may notice later.
    pub(super) fn lose_subscription(&mut self, m: usize) {
        let inbox = &mut self.managers[m].inbox;
        if !inbox.is_subscribed {
            return;
        }
        inbox.is_subscribed = false;
        inbox.is_at_replica = false;
        let generation = inbox.generation;
        let long = self.plan.slow_max;
        let (server, client) = match self.between(0, 2) {
            0 => (0, self.message_delay()),
            1 => (self.between(0, long), self.message_delay()),
            _ => (self.between(0, long), self.between(0, long)),
        };
        let forgets = Subscription::ServerForgets(generation);
        self.outside(self.now + server, m, Event::Subscription(forgets));
        self.inside(
            self.now + client,
            m,
            Part::Pushes,
            Event::Subscription(Subscription::Noticed),
        );
        self.note(|_| format!("m{m} the subscription is dead"));
    }

    /// The address of the store leads the inbox to a replica, while commands still go to the
    /// primary.
    pub(super) fn listen_elsewhere(&mut self, m: usize) {
        let inbox = &mut self.managers[m].inbox;
        if !inbox.is_subscribed || inbox.is_at_replica {
            return;
        }
        inbox.is_at_replica = true;
        inbox.known_to_server.clear();
        self.tell_store_who_listens(m);
        let until = self.now + self.some_time();
        let leaves = Event::Subscription(Subscription::LeavesReplica);
        self.inside(until, m, Part::Pushes, leaves);
    }

    pub(super) fn subscription_goes_on(&mut self, m: usize, step: Subscription) {
        match step {
            Subscription::ServerForgets(generation) => {
                self.managers[m].inbox.known_to_server.remove(&generation);
                self.tell_store_who_listens(m);
            }
            Subscription::Noticed => {
                self.may_have_forgotten(m);
                let generation = {
                    let inbox = &mut self.managers[m].inbox;
                    inbox.generation += 1;
                    inbox.generation
                };
                let pause = self.between(0, nanos(self.plan.timeout) / 2) + self.message_delay();
                let arrives = Event::Subscription(Subscription::Arrives);
                self.outside(self.now + pause, m, arrives);
                let cut_off = self.now + nanos(self.plan.timeout);
                let timer = Event::Subscription(Subscription::CutOff(generation));
                self.inside(cut_off, m, Part::Pushes, timer);
            }
            Subscription::Arrives => {
                if !self.managers[m].is_alive {
                    return;
                }
                let delay = self.message_delay();
                let inbox = &mut self.managers[m].inbox;
                inbox.known_to_server.insert(inbox.generation);
                inbox.last_delivery = self.now + delay;
                let at = inbox.last_delivery;
                self.tell_store_who_listens(m);
                let confirmed = Event::Subscription(Subscription::Confirmed);
                self.inside(at, m, Part::Pushes, confirmed);
            }
            Subscription::Confirmed => {
                self.managers[m].inbox.is_subscribed = true;
                self.stats.resubscribed += 1;
                self.note(|_| format!("m{m} is subscribed again"));
                self.ask_again(m);
            }
            Subscription::LeavesReplica => {
                let inbox = &mut self.managers[m].inbox;
                if std::mem::take(&mut inbox.is_at_replica) {
                    inbox.is_subscribed = false;
                    self.tell_store_who_listens(m);
                    self.subscription_goes_on(m, Subscription::Noticed);
                }
            }
            Subscription::CutOff(generation) => {
                let inbox = &self.managers[m].inbox;
                if inbox.generation == generation && !inbox.is_subscribed {
                    self.ask_again(m);
                }
            }
        }
    }

    fn ask_again(&mut self, m: usize) {
        for k in 0..self.keys.len() {
            self.event_in_background(m, k, |queue, cx| queue.on_resubscribed(cx));
        }
    }

    fn tell_store_who_listens(&mut self, m: usize) {
        let manager = &self.managers[m];
        self.core
            .set_subscribed(manager.id.as_str(), !manager.inbox.known_to_server.is_empty());
        self.core
            .set_subscribed_at_replica(manager.id.as_str(), manager.inbox.is_at_replica);
    }
}
