//! Requests in transit: sent, executed by the store, and answered or not.

use std::time::Duration;

use super::background::Job;
use super::clock::{Nanos, nanos};
use super::connections::Fate;
use super::world::{Event, Orphan, Part, World};
use crate::clock::Moment;
use crate::engine::min_holds::MinHolds;
use crate::engine::orphans::Released;
use crate::engine::renewals::time_limit;
use crate::engine::{Flaw, Request, Rules, StoreEvent, StoreOutage};
use crate::error::{Failure, LockError};
use crate::protocol::{AcquireKind, AcquireReply, Answer, Cycle, Push, ReleaseReply, RenewReply};
use crate::store::Priority;
use crate::store::memory::Terms;

/// The sender that waits for a reply.
#[derive(Debug, Clone, Copy)]
pub(super) enum Driver {
    Task(usize),
    Background,
    Orphans,
    Watchdog,
}

#[derive(Debug, Clone)]
pub(super) enum Order {
    Queue(Request),
    /// A batch of renewals, of any keys.
    Renew(Vec<Lease>),
}

/// A lease to renew.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lease {
    pub(super) k: usize,
    pub(super) cycle: Cycle,
    pub(super) ttl: std::time::Duration,
}

/// A request whose sender waits for the reply.
#[derive(Debug)]
pub(super) struct InFlight {
    pub(super) m: usize,
    k: usize,
    pub(super) order: Order,
    pub(super) driver: Driver,
    /// The pending release that is sent.
    pub(super) orphan: Option<Orphan>,
    pub(super) lane: Priority,
    /// How often it was sent again because its connection broke.
    pub(super) attempts: u32,
    sent_at: Moment,
    floor: u64,
}

/// A request on the wire.
#[derive(Debug)]
pub(super) struct Command {
    request: u64,
    m: usize,
    k: usize,
    order: Order,
    driver: Driver,
    lane: Priority,
    generation: usize,
    floor: u64,
    /// For a release, how long the lease has to stay.
    rest: Option<Duration>,
    /// Whether the server does not know the script. It executes the command only when its sender,
    /// if there still is one, sends it again with the script's text, and thus after later commands.
    is_unknown: bool,
}

#[derive(Debug)]
pub(super) enum Reply {
    Acquired(AcquireReply),
    Released(ReleaseReply),
    Renewed(Vec<RenewReply>),
}

impl Order {
    /// Whether a script executes it, and not plain commands.
    fn is_script(&self) -> bool {
        !matches!(
            self,
            Self::Queue(Request::Acquire {
                kind: AcquireKind::Fast,
                ..
            })
        )
    }
}

impl Driver {
    pub(super) const fn part(self) -> Part {
        match self {
            Self::Task(_) => Part::Tasks,
            Self::Background | Self::Orphans | Self::Watchdog => Part::Background,
        }
    }
}

impl World {
    /// Sends a request and returns its number. A request that acquires something uses the caller's
    /// lane, whichever part sends it.
    pub(super) fn send(&mut self, m: usize, k: usize, order: Order, driver: Driver, lane: Priority) -> u64 {
        let (lane, limit) = match &order {
            Order::Queue(Request::Release { requeue: None, .. }) => (lane, self.plan.timeout),
            Order::Queue(_) => (Priority::Foreground, self.plan.timeout),
            Order::Renew(batch) => {
                let ttls = batch.iter().map(|lease| lease.ttl);
                (Priority::Background, time_limit(ttls, self.plan.timeout))
            }
        };
        let request = self.number();
        self.in_flight.insert(
            request,
            InFlight {
                m,
                k,
                order,
                driver,
                orphan: None,
                lane,
                attempts: 0,
                sent_at: Moment::default(),
                floor: 0,
            },
        );
        let deadline = self.now + nanos(limit);
        self.inside(deadline, m, driver.part(), Event::Deadline { request });
        self.transmit(request);
        request
    }

    pub(super) fn transmit(&mut self, request: u64) {
        if let Some(&InFlight { m, lane, .. }) = self.in_flight.get(&request) {
            self.find_broken(m, lane);
        }
        let delay = self.message_delay();
        let is_unknown = !self.in_calm() && self.chance(self.plan.unknown_script_chance);
        let now = self.now;
        let Some(in_flight) = self.in_flight.get_mut(&request) else {
            return;
        };
        let (m, k) = (in_flight.m, in_flight.k);
        let distinct = self.ledger.distinct();
        let manager = &mut self.managers[m];
        in_flight.sent_at = manager.clock.at(now);
        in_flight.floor = manager.floor.max(manager.seen[slot(k, distinct)]);
        let connection = &mut manager.lanes[in_flight.lane as usize];
        let at = connection.arrival(now + delay);
        let command = Command {
            request,
            m,
            k,
            order: in_flight.order.clone(),
            driver: in_flight.driver,
            lane: in_flight.lane,
            generation: connection.generation,
            floor: in_flight.floor,
            rest: rest_of(&manager.min_holds, in_flight, &self.plan.rules),
            is_unknown: is_unknown && in_flight.order.is_script(),
        };
        self.note(|_| {
            format!(
                "m{m} k{k} #{request} sends {:?} by {:?}, {:?} lane",
                command.order, command.driver, command.lane
            )
        });
        self.outside(at, m, Event::Arrives(command));
    }

    pub(super) fn message_delay(&mut self) -> Nanos {
        if !self.in_calm() && self.now < self.slow_until {
            self.between(nanos(self.plan.ttls[0]) / 4, nanos(self.plan.ttls[0]) * 5 / 4)
        } else if !self.in_calm() && self.chance(self.plan.slow_chance) {
            self.between(0, self.plan.slow_max)
        } else {
            self.between(10_000, self.plan.message_max)
        }
    }

    /// A command reaches the server and is executed, unless it was lost with its connection.
    pub(super) fn arrives(&mut self, command: Command) {
        let Command { request, m, k, .. } = command;
        let now = self.now;
        let connection = &mut self.managers[m].lanes[command.lane as usize];
        match connection.fate(command.generation, now) {
            Fate::Arrives => {}
            Fate::ArrivesLate => self.stats.late += 1,
            // All commands delivered at that time keep their order.
            Fate::Delayed(at) => return self.outside(at, m, Event::Arrives(command)),
            Fate::Lost => return self.note(|_| format!("m{m} k{k} #{request} is lost")),
        }
        if command.is_unknown {
            let at = now + self.message_delay();
            let part = command.driver.part();
            return self.inside(at, m, part, Event::UnknownScript(command));
        }
        let reply = if !self.in_calm() && self.chance(self.plan.refuse_chance) {
            None
        } else {
            let queue = self.core.queue(&self.keys[command.k]);
            let reply = self.execute(&command);
            self.check_passing(&command, &reply, &queue);
            Some(reply)
        };
        self.note(|_| format!("m{m} k{k} #{request} executes: {reply:?}"));
        match &command.order {
            Order::Queue(_) => self.is_executed(k),
            Order::Renew(batch) => batch.iter().for_each(|lease| self.is_executed(lease.k)),
        }
        let delay = self.message_delay();
        let now = self.now;
        let connection = &mut self.managers[m].lanes[command.lane as usize];
        let at = connection.reply_arrival(now + delay);
        let event = Event::Replies {
            request,
            lane: command.lane,
            generation: command.generation,
            reply,
        };
        self.inside(at, m, command.driver.part(), event);
    }

    /// The sender learns that the server does not know the script, and sends its text.
    pub(super) fn sends_script(&mut self, command: Command) {
        let Command {
            request, m, k, lane, ..
        } = command;
        let connection = &self.managers[m].lanes[lane as usize];
        if connection.generation != command.generation || !self.in_flight.contains_key(&request) {
            return self.note(|_| format!("m{m} k{k} #{request} is not sent again"));
        }
        self.stats.unknown_scripts += 1;
        let at = self.now + self.message_delay();
        let connection = &mut self.managers[m].lanes[lane as usize];
        let at = connection.arrival(at);
        let is_unknown = false;
        self.outside(at, m, Event::Arrives(Command { is_unknown, ..command }));
    }

    /// Checks that nobody was admitted who was behind a cycle that still waits. Only the fast path
    /// ignores the queue: it may take the key after the owner has died, before a waiter asks.
    fn check_passing(&mut self, command: &Command, reply: &Reply, before: &[String]) {
        let sender = match (&command.order, reply) {
            (Order::Queue(Request::Acquire { cycle, kind, .. }), Reply::Acquired(reply)) => {
                Some((*cycle, *reply)).filter(|_| *kind != AcquireKind::Fast)
            }
            (Order::Queue(Request::Release { requeue, .. }), Reply::Released(reply)) => requeue.zip(reply.requeued),
            _ => None,
        };
        let admitted = sender.filter(|(_, reply)| matches!(reply, AcquireReply::Granted { extended: false, .. }));
        let admitted = admitted.map(|(cycle, _)| self.managers[command.m].id.owner_tag(cycle).to_string());
        let pushed = self.core.outbox.iter().filter_map(|(manager, push)| match push {
            Push::Granted { grant, .. } => Some(format!("{manager}:{}", grant.cycle)),
            _ => None,
        });
        let admitted: Vec<String> = admitted.into_iter().chain(pushed).collect();
        let after = self.core.queue(&self.keys[command.k]);
        for one in admitted {
            let ahead = before.iter().take_while(|member| **member != one);
            if let Some(passed) = ahead.into_iter().find(|member| after.contains(member)) {
                let what = format!("k{} {one} passes {passed}, which waits", command.k);
                return self.ledger.breach_of_safety(what);
            }
        }
    }

    fn is_executed(&mut self, k: usize) {
        self.deliver(k);
        self.check_leases(k);
    }

    fn execute(&mut self, command: &Command) -> Reply {
        let manager = &self.managers[command.m];
        let key = &self.keys[command.k].clone();
        let now = Moment::from_nanos(self.now);
        let ahead = self.plan.ttls[0] / 4 * (command.m as u32 % 2);
        self.core.comes_from_ahead(key, now, ahead);
        let terms = |ttl, tokens| Terms {
            now,
            server_time: self.server_time(),
            ttl,
            tokens,
            floor: command.floor,
        };
        match &command.order {
            &Order::Queue(Request::Acquire {
                cycle,
                kind,
                ttl,
                tokens,
            }) => {
                let (me, terms) = (manager.id.owner_tag(cycle).to_string(), terms(ttl, tokens));
                let reply = match kind {
                    AcquireKind::Fast => self.core.acquire_fast(key, &me, terms),
                    AcquireKind::Enqueue => self.core.acquire(key, &me, false, terms),
                    AcquireKind::Try => self.core.acquire(key, &me, true, terms),
                    AcquireKind::Extend => self.core.acquire_extension(key, &me, terms),
                };
                self.issue(command.m, command.k, cycle, &reply);
                Reply::Acquired(reply)
            }
            &Order::Queue(Request::Release {
                cycle, requeue, tokens, ..
            }) => {
                let ttl = requeue.map_or(std::time::Duration::ZERO, Cycle::ttl);
                let (me, terms) = (manager.id.owner_tag(cycle).to_string(), terms(ttl, tokens));
                let next = requeue.map(|cycle| manager.id.owner_tag(cycle).to_string());
                let is_retired = command.rest.is_some_and(|rest| {
                    let retired = manager.id.owner_tag(cycle.retired()).to_string();
                    self.core.retire(key, &me, &retired, now, now + rest)
                });
                let reply = if is_retired {
                    self.stats.retired += 1;
                    ReleaseReply::HELD
                } else {
                    self.core.release(key, &me, next.as_deref(), terms)
                };
                if reply.held {
                    self.ledger.is_released(command.m, command.k, cycle, command.request);
                }
                if let (Some(next), Some(reply)) = (requeue, &reply.requeued) {
                    self.issue(command.m, command.k, next, reply);
                }
                Reply::Released(reply)
            }
            Order::Renew(batch) => {
                let replies = batch.iter().map(|lease| {
                    let me = manager.id.owner_tag(lease.cycle).to_string();
                    self.core.renew(&self.keys[lease.k], &me, now, lease.ttl)
                });
                Reply::Renewed(replies.collect())
            }
        }
    }

    /// Records the tokens that a command issued to its sender and to others, in order.
    fn issue(&mut self, m: usize, k: usize, cycle: Cycle, reply: &AcquireReply) {
        let mut issued = Vec::new();
        if let AcquireReply::Granted { tokens, .. } = reply {
            issued.push((m, cycle, *tokens));
        }
        for (name, push) in &self.core.outbox {
            if let Push::Granted { grant, .. } = push
                && let Some(m) = self.managers.iter().position(|manager| manager.id.as_str() == name)
            {
                issued.push((m, grant.cycle, grant.tokens));
            }
        }
        issued.sort_by_key(|(_, _, tokens)| tokens.first());
        for (m, cycle, tokens) in issued {
            self.ledger.issues_block(self.now, m, k, cycle, tokens);
        }
    }

    pub(super) fn reply_comes(
        &mut self,
        m: usize,
        request: u64,
        lane: Priority,
        generation: usize,
        reply: Option<Reply>,
    ) {
        if self.managers[m].lanes[lane as usize].generation != generation {
            return;
        }
        let Some(in_flight) = self.in_flight.remove(&request) else {
            return;
        };
        match reply {
            Some(reply) => self.answered(request, in_flight, reply),
            None => self.unanswered(in_flight, Released::Refused),
        }
    }

    fn answered(&mut self, request: u64, in_flight: InFlight, reply: Reply) {
        let InFlight {
            m, k, sent_at, floor, ..
        } = in_flight;
        let saw = match &reply {
            Reply::Acquired(reply) => seen_in(reply),
            Reply::Released(reply) => reply.requeued.as_ref().map_or(0, seen_in),
            Reply::Renewed(_) => 0,
        };
        let distinct = self.distinct();
        let seen = &mut self.managers[m].seen[slot(k, distinct)];
        *seen = saw.max(*seen);
        if let Order::Queue(Request::Release { cycle, .. }) = in_flight.order {
            self.managers[m].min_holds.forget(cycle);
        }
        if let Some(orphan) = in_flight.orphan {
            return self.orphan_ended(m, orphan, Released::Confirmed);
        }
        let takes = match in_flight.order {
            Order::Queue(Request::Acquire { cycle, .. }) => Some(cycle),
            Order::Queue(Request::Release { requeue, .. }) => requeue,
            Order::Renew(_) => None,
        };
        if let Some(cycle) = takes.filter(|&cycle| self.may_arrive_late(m, cycle)) {
            // An earlier attempt may still be executed.
            self.job(m, Job::ReleaseAgain { k, cycle });
        }
        match (in_flight.order, reply) {
            (Order::Queue(Request::Acquire { cycle, ttl, .. }), Reply::Acquired(reply)) => {
                let is_new = !self.managers[m].queues[k].has_lease_of(cycle);
                self.ledger
                    .notes_remote_waiters_of(self.now, (m, k, cycle), &reply, is_new);
                let answer = Answer {
                    sent_at,
                    ttl,
                    floor,
                    reply,
                };
                let ((), next) = self.event(m, k, |queue, cx| {
                    ((), queue.on_event(cycle, StoreEvent::AcquireReply(answer), cx))
                });
                self.drive_on(m, k, in_flight.driver, next);
            }
            (Order::Queue(Request::Release { cycle, requeue, .. }), Reply::Released(reply)) => {
                if !reply.held && in_flight.attempts == 0 && self.is_awaited_release(m, request) {
                    self.ledger.check_loss(m, k, cycle);
                }
                let ttl = requeue.map_or(std::time::Duration::ZERO, Cycle::ttl);
                if let (Some(next), Some(reply)) = (requeue, &reply.requeued) {
                    self.ledger.notes_remote_waiters_of(self.now, (m, k, next), reply, true);
                }
                let answer = Answer {
                    sent_at,
                    ttl,
                    floor,
                    reply,
                };
                let ((), next) = self.event(m, k, |queue, cx| {
                    ((), queue.on_event(cycle, StoreEvent::ReleaseReply(answer), cx))
                });
                self.drive_on(m, k, in_flight.driver, next);
            }
            (Order::Renew(batch), Reply::Renewed(replies)) => {
                for (lease, reply) in batch.into_iter().zip(replies) {
                    self.renewed(m, lease, sent_at, Some(reply));
                }
                self.batch_ended(m, true);
            }
            (order, reply) => self.ledger.breach(format!("{order:?} was answered by {reply:?}")),
        }
    }

    /// There was no reply, or the reply reports that nothing was done.
    pub(super) fn unanswered(&mut self, in_flight: InFlight, why: Released) {
        let InFlight { m, k, sent_at, .. } = in_flight;
        if let Some(orphan) = in_flight.orphan {
            return self.orphan_ended(m, orphan, why);
        }
        match in_flight.order {
            Order::Renew(batch) => {
                for lease in batch {
                    self.renewed(m, lease, sent_at, None);
                }
                self.batch_ended(m, false);
            }
            Order::Queue(Request::Acquire { cycle, .. } | Request::Release { cycle, .. }) => {
                self.stats.failed += 1;
                let error = no_answer();
                let outage = StoreOutage {
                    since: sent_at,
                    patience: self.plan.timeout,
                    retry_at: self.managers[m].clock.at(self.now) + self.plan.timeout / 8,
                };
                let failed = StoreEvent::RequestFailed {
                    error: &error,
                    outage: Some(outage),
                };
                let ((), next) = self.event(m, k, |queue, cx| ((), queue.on_event(cycle, failed, cx)));
                self.drive_on(m, k, in_flight.driver, next);
            }
        }
    }

    fn renewed(&mut self, m: usize, lease: Lease, sent_at: Moment, reply: Option<RenewReply>) {
        let Lease { k, cycle, ttl } = lease;
        if reply == Some(RenewReply::Extended { has_waiters: true }) {
            self.ledger.notes_remote_waiter(self.now, m, k, cycle);
        }
        let event = StoreEvent::RenewalReply { ttl, sent_at, reply };
        self.event_in_background(m, k, |queue, cx| queue.on_event(cycle, event, cx));
    }

    pub(super) fn deadline_passes(&mut self, request: u64) {
        if let Some(in_flight) = self.in_flight.remove(&request) {
            self.note(|_| format!("m{} k{} #{request} has no answer in time", in_flight.m, in_flight.k));
            self.unanswered(in_flight, Released::Unavailable);
        }
    }

    /// The sender no longer waits for the reply.
    pub(super) fn forget_request(&mut self, request: u64) -> Option<Cycle> {
        match self.in_flight.remove(&request)?.order {
            Order::Queue(Request::Acquire { cycle, .. } | Request::Release { cycle, .. }) => Some(cycle),
            Order::Renew(_) => None,
        }
    }
}

/// How long the lease has to stay if it is released now, as `driver::execute` and `driver::orphans`
/// find out.
fn rest_of(min_holds: &MinHolds, in_flight: &InFlight, rules: &Rules) -> Option<Duration> {
    let Order::Queue(Request::Release { cycle, .. }) = in_flight.order else {
        return None;
    };
    if rules.has(Flaw::ForgetsMinHolds) && matches!(in_flight.driver, Driver::Orphans) {
        return None;
    }
    let until = min_holds.until(cycle, in_flight.sent_at)?;
    Some(until.since(in_flight.sent_at))
}

/// The first two keys share a slot and therefore a counter.
const fn slot(k: usize, distinct: usize) -> usize {
    match k % distinct {
        1 => 0,
        k => k,
    }
}

const fn seen_in(reply: &AcquireReply) -> u64 {
    match reply {
        AcquireReply::Granted { tokens, .. } => tokens.last(),
        AcquireReply::Queued(position) => position.enqueue_token,
        AcquireReply::Taken | AcquireReply::Busy => 0,
    }
}

fn no_answer() -> LockError {
    Failure::Unavailable {
        shard: "sim".to_owned(),
        step: "acquire",
        key: None,
        waited: std::time::Duration::ZERO,
        reason: "no answer".into(),
    }
    .into()
}
