//! The connections of the managers, two each. Each keeps the order of its commands, and may be
//! slow, stall or break.

use super::clock::{Nanos, nanos};
use super::network::{Driver, InFlight, Order};
use super::world::{Event, World};
use crate::engine::Request;
use crate::engine::orphans::Released;
use crate::protocol::AcquireKind;
use crate::store::Priority;

/// How often a request is resent after its connection broke, as in production.
const RECONNECTS: u32 = 2;

/// A manager's connection of one lane, including the earlier connections that it replaced.
#[derive(Debug, Default)]
pub(super) struct Connection {
    pub(super) generation: usize,
    /// The newest connection that the manager knows of.
    pub(super) noticed: usize,
    /// What becomes of the commands on each broken connection.
    broken: Vec<Broken>,
    /// Commands and replies keep their order.
    last_arrival: Nanos,
    last_reply: Nanos,
    pub(super) stalled_until: Nanos,
}

/// What becomes of the commands that were in transit when their connection broke.
#[derive(Debug, Clone, Copy)]
enum Broken {
    /// Commands that would arrive after this moment are lost.
    LostAfter(Nanos),
    /// The network still has the next `left` commands and delivers them at this time. The others
    /// were discarded by the operating system of the sender.
    Late { at: Nanos, left: u32 },
}

/// What becomes of a command that would arrive now.
pub(super) enum Fate {
    Arrives,
    /// Its connection broke before.
    ArrivesLate,
    /// It arrives at this time.
    Delayed(Nanos),
    Lost,
}

impl Connection {
    /// When a command arrives that takes until `at` if it need not wait for an earlier one.
    pub(super) fn arrival(&mut self, at: Nanos) -> Nanos {
        self.last_arrival = at.max(self.last_arrival).max(self.stalled_until);
        self.last_arrival
    }

    /// The same for a reply.
    pub(super) fn reply_arrival(&mut self, at: Nanos) -> Nanos {
        self.last_reply = at.max(self.last_reply).max(self.stalled_until);
        self.last_reply
    }

    /// Decides about a command of that generation. One that arrives late counts as delivered.
    pub(super) fn fate(&mut self, generation: usize, now: Nanos) -> Fate {
        match self.broken.get_mut(generation) {
            None => Fate::Arrives,
            Some(Broken::LostAfter(moment)) if now <= *moment => Fate::Arrives,
            Some(Broken::Late { at, left: 1.. }) if now < *at => Fate::Delayed(*at),
            Some(Broken::Late { left: left @ 1.., .. }) => {
                *left -= 1;
                Fate::ArrivesLate
            }
            Some(Broken::LostAfter(_) | Broken::Late { .. }) => Fate::Lost,
        }
    }

    /// Breaks the connection and opens the next. Returns the generation that broke.
    fn replace(&mut self, broken: Broken) -> usize {
        let generation = self.generation;
        self.generation += 1;
        self.broken.push(broken);
        (self.last_arrival, self.last_reply, self.stalled_until) = (0, 0, 0);
        generation
    }
}

impl World {
    /// A connection breaks. The commands on it are lost from some point on, and so are all replies.
    pub(super) fn reset(&mut self, m: usize, lane: Priority) {
        let now = self.now;
        let broken = if !self.plan.ghosts || self.chance(0.4) {
            Broken::LostAfter(now)
        } else if self.chance(0.4) {
            Broken::LostAfter(now + self.between(0, self.plan.slow_max))
        } else {
            Broken::Late {
                at: now + self.between(0, nanos(self.plan.late_max())),
                left: self.between(1, 4) as u32,
            }
        };
        let manager = &mut self.managers[m];
        manager.last_cut = Some(manager.clock.at(now));
        let generation = manager.lanes[lane as usize].replace(broken);
        self.note(|_| format!("m{m} the connection of the {lane:?} lane breaks"));
        let waiting: Vec<(u64, Driver)> = self
            .in_flight
            .iter()
            .filter(|(_, in_flight)| in_flight.m == m && in_flight.lane == lane)
            .map(|(&request, in_flight)| (request, in_flight.driver))
            .collect();
        for (request, driver) in waiting {
            // Some requests notice only when their time limit has passed.
            if self.chance(0.8) {
                let at = self.now + self.message_delay();
                self.inside(at, m, driver.part(), Event::Breaks { request, generation });
            }
        }
    }

    /// Sends the request again on a new connection, as the store does.
    pub(super) fn connection_breaks(&mut self, request: u64, generation: usize) {
        let Some(&InFlight { m, lane, .. }) = self.in_flight.get(&request) else {
            return;
        };
        let floor = self.server_time();
        self.managers[m].floor = self.managers[m].floor.max(floor);
        self.find_broken(m, lane);
        let Some(in_flight) = self.in_flight.get_mut(&request) else {
            return;
        };
        let manager = &self.managers[m];
        debug_assert!(manager.lanes[in_flight.lane as usize].generation > generation);
        in_flight.attempts += 1;
        let is_renewal = matches!(in_flight.order, Order::Renew(_));
        if in_flight.attempts > RECONNECTS || is_renewal {
            if let Some(in_flight) = self.in_flight.remove(&request) {
                self.unanswered(in_flight, Released::Unavailable);
            }
            return;
        }
        if let Order::Queue(Request::Acquire { kind, .. }) = &mut in_flight.order
            && *kind == AcquireKind::Fast
        {
            *kind = AcquireKind::Enqueue;
        }
        self.transmit(request);
    }
}
