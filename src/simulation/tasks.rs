//! Tasks that take locks, as in `request` and `guard`: a waiting task drives its request, and a
//! task that gives up drops it.

use std::sync::Arc;
use std::time::Duration;

use super::background::Job;
use super::clock::{Nanos, nanos};
use super::network::{Driver, Order};
use super::turns::Bypass;
use super::world::{Event, Part, World};
use crate::engine::{
    Effects, Granted, InOutage, Linger, MinHold, Outcome, Path, Request, StoreEvent, WaiterId, WaiterOptions,
};
use crate::fence::FencingToken;
use crate::lease::Lease;
use crate::mode::LockMode;
use crate::store::Priority;

#[derive(Debug, Default)]
pub(super) struct Task {
    /// Counts state changes, so that an event meant for an earlier state is ignored.
    epoch: u32,
    pub(super) state: State,
}

#[derive(Debug, Default)]
pub(super) enum State {
    #[default]
    Idle,
    Waiting(Waiting),
    Holding {
        k: usize,
        lease: Arc<Lease>,
        token: FencingToken,
    },
    /// Waits for the reply to the release of its guard.
    Releasing {
        k: usize,
        request: u64,
    },
}

#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) k: usize,
    pub(super) id: WaiterId,
    /// Its position among all waiters ever enqueued.
    pub(super) order: u64,
    pub(super) try_only: bool,
    pub(super) mode: LockMode,
    /// Whether it has had an outcome: it may lose a guard before it collects it.
    pub(super) was_settled: bool,
    pub(super) asked_at: Nanos,
    pub(super) bypass: Bypass,
    min_hold: MinHold,
    /// The request that this task drives.
    driving: Option<u64>,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Step {
    Start,
    Poll,
    Cancel,
    LetGo,
}

impl World {
    fn enter(&mut self, m: usize, task: usize, state: State) {
        let task = &mut self.managers[m].tasks[task];
        task.epoch += 1;
        task.state = state;
    }

    pub(super) fn later(&mut self, m: usize, task: usize, after: Nanos, step: Step) {
        let epoch = self.managers[m].tasks[task].epoch;
        let event = Event::Task { task, epoch, step };
        self.inside(self.now + after, m, Part::Tasks, event);
    }

    pub(super) fn task_goes_on(&mut self, m: usize, task: usize, epoch: u32, step: Step) {
        if self.managers[m].tasks[task].epoch != epoch {
            return;
        }
        match step {
            Step::Start => self.task_starts(m, task),
            Step::Poll => self.task_polls(m, task),
            Step::Cancel => self.task_is_cancelled(m, task),
            Step::LetGo => self.task_lets_go(m, task),
        }
    }

    fn rests(&mut self, m: usize, task: usize) {
        self.enter(m, task, State::Idle);
        let think = self.between(0, self.plan.think_max);
        self.later(m, task, think, Step::Start);
    }

    fn task_starts(&mut self, m: usize, task: usize) {
        if self.in_calm() || self.managers[m].is_closed || self.managers[m].is_left {
            return;
        }
        let k = self.between(0, self.keys.len() as u64 - 1) as usize;
        let which = self.between(0, self.plan.ttls.len() as u64 - 1) as usize;
        let linger = self.between(0, self.plan.lingers.len() as u64 - 1) as usize;
        let linger = Linger::new(self.plan.lingers[linger]);
        let min_hold = self.between(0, self.plan.min_holds.len() as u64 - 1) as usize;
        let min_hold = MinHold::new(self.plan.min_holds[min_hold]);
        let max_hold = self.chance(self.plan.max_hold_chance);
        let try_only = self.chance(self.plan.try_chance);
        let mode = self.some_mode(k);
        let min_hold = if mode.is_exclusive() { min_hold } else { MinHold::NONE };
        let manager = &self.managers[m];
        let options = WaiterOptions {
            mode,
            ttl: self.plan.ttls[which],
            linger,
            min_hold,
            max_hold: max_hold.then(|| Duration::from_nanos(self.plan.hold_max / 2)),
            try_only,
            in_outage: match task % 3 {
                _ if try_only => InOutage::Fail,
                0 => InOutage::Fail,
                1 => InOutage::UntilStoreTimeout,
                _ => InOutage::UntilOwnLimit,
            },
            contended_hint: manager.queues[k].is_unused() && manager.remote_waiters[k],
            class: 0,
        };
        self.note(|_| format!("m{m} k{k} t{task} wants {options:?}"));
        let order = self.number();
        let (id, request) = self.event(m, k, |queue, cx| queue.enqueue(options, Some(task), cx));
        let was_settled = self.managers[m].queues[k].is_settled(id);
        let mut driving = None;
        match request {
            Some(request) if was_settled => self.job(m, Job::Request { k, request }),
            Some(request) => {
                let request = self.send(m, k, Order::Queue(request), Driver::Task(task), Priority::Foreground);
                driving = Some(request);
            }
            None => {}
        }
        let waiting = Waiting {
            k,
            id,
            order,
            try_only: options.try_only,
            mode,
            was_settled,
            asked_at: self.now,
            bypass: Bypass::default(),
            min_hold: options.min_hold,
            driving,
        };
        self.enter(m, task, State::Waiting(waiting));
        if !options.try_only && self.chance(self.plan.give_up_chance) {
            let patience = self.between(0, nanos(self.plan.ttls[0]));
            self.later(m, task, patience, Step::Cancel);
        }
        self.task_polls(m, task);
    }

    pub(super) fn task_is_woken(&mut self, m: usize, task: usize) {
        let delay = self.between(1_000, 100_000);
        if self.chance(self.plan.give_up_chance / 3.0) {
            self.later(m, task, delay / 2, Step::Cancel);
        }
        self.later(m, task, delay, Step::Poll);
    }

    /// The request driven by this task was answered; `next` follows.
    pub(super) fn task_drives_on(&mut self, m: usize, k: usize, task: usize, next: Option<Request>) {
        match &mut self.managers[m].tasks[task].state {
            State::Waiting(waiting) => {
                waiting.driving = None;
                let id = waiting.id;
                match next {
                    Some(request) if self.managers[m].queues[k].is_settled(id) => {
                        self.job(m, Job::Request { k, request });
                    }
                    Some(request) => {
                        let request = self.send(m, k, Order::Queue(request), Driver::Task(task), Priority::Foreground);
                        if let State::Waiting(waiting) = &mut self.managers[m].tasks[task].state {
                            waiting.driving = Some(request);
                        }
                    }
                    None => {}
                }
                self.task_polls(m, task);
            }
            State::Releasing { .. } => {
                if let Some(request) = next {
                    self.job(m, Job::Request { k, request });
                }
                self.rests(m, task);
            }
            State::Idle | State::Holding { .. } => {
                self.ledger
                    .breach(format!("m{m} t{task} drove a request and did not wait for it"));
            }
        }
    }

    fn task_polls(&mut self, m: usize, task: usize) {
        let State::Waiting(Waiting {
            k,
            id,
            order,
            asked_at,
            min_hold,
            driving,
            ..
        }) = self.managers[m].tasks[task].state
        else {
            return;
        };
        let (outcome, _) = self.event(m, k, |queue, _| {
            let outcome = queue.collect(id);
            if outcome.is_none() {
                let _number = queue.set_waker(id, task);
            }
            (outcome, Effects::none())
        });
        let Some(outcome) = outcome else { return };
        self.note(|_| match &outcome {
            Outcome::Granted(Granted { lease, token, path, .. }) => {
                format!(
                    "m{m} k{k} t{task} gets token {token} of cycle {} by {path:?}",
                    lease.cycle
                )
            }
            outcome => format!("m{m} k{k} t{task} gets nothing: {outcome:?}"),
        });
        self.rests(m, task);
        // A request that the task still drives is dropped together with its wait.
        self.drop_request(m, k, driving);
        match outcome {
            Outcome::Granted(granted) => self.task_has_it(m, k, task, (order, asked_at), min_hold, granted),
            Outcome::Busy => self.stats.busy += 1,
            Outcome::Failed(_) => {}
            Outcome::TooLate => self.stats.too_late += 1,
            Outcome::Regressed { token, floor } => {
                self.stats.regressed += 1;
                self.note(|_| format!("m{m} k{k} t{task} token {token} is not above {floor}"));
            }
        }
    }

    fn task_has_it(
        &mut self,
        m: usize,
        k: usize,
        task: usize,
        (order, asked_at): (u64, Nanos),
        min_hold: MinHold,
        granted: Granted,
    ) {
        self.check_after_failover(m, k, &granted);
        let Granted { lease, token, path, at } = granted;
        if self.managers[m].is_closed {
            // The request fails with `Closed`, and there is no guard.
            return;
        }
        match path {
            Path::Uncontended => self.stats.uncontended += 1,
            Path::LocalHandOff => self.stats.local_hand_offs += 1,
            Path::RemoteGrant => self.stats.remote_grants += 1,
            Path::Lingering => self.stats.lingering += 1,
            Path::Joined => self.stats.joined += 1,
        }
        self.check_order(m, k, order, lease.cycle.mode());
        self.guard_begins(m, k, &lease, token, min_hold.time());
        let granted_at = self.managers[m].clock.when(at);
        self.check_turn(m, k, lease.cycle, asked_at, granted_at);
        self.check_wait(m, k, asked_at);
        self.enter(m, task, State::Holding { k, lease, token });
        let hold = if self.chance(self.plan.long_hold_chance) {
            self.between(0, self.plan.long_hold_max)
        } else {
            self.between(0, self.plan.hold_max)
        };
        self.later(m, task, hold, Step::LetGo);
    }

    /// A mode of the kind in which key `k` of the list is held.
    fn some_mode(&mut self, k: usize) -> LockMode {
        let LockMode::Permits { .. } = self.kind(k) else {
            return self.kind(k);
        };
        let which = self.between(0, self.plan.limits.len() as u64 - 1) as usize;
        let limit = self.plan.limits[which];
        let weight = if self.chance(0.7) {
            1
        } else {
            self.between(1, limit.into()) as u16
        };
        LockMode::Permits { weight, limit }
    }

    fn task_is_cancelled(&mut self, m: usize, task: usize) {
        match self.managers[m].tasks[task].state {
            State::Waiting(Waiting { k, id, driving, .. }) => {
                self.stats.cancelled += 1;
                self.note(|_| format!("m{m} k{k} t{task} stops waiting"));
                self.event_in_background(m, k, |queue, cx| queue.give_up(id, cx));
                self.drop_request(m, k, driving);
            }
            State::Releasing { k, request } => {
                self.note(|_| format!("m{m} k{k} t{task} drops its release"));
                self.drop_request(m, k, Some(request));
            }
            State::Idle | State::Holding { .. } => return,
        }
        self.rests(m, task);
    }

    fn drop_request(&mut self, m: usize, k: usize, request: Option<u64>) {
        if let Some(cycle) = request.and_then(|request| self.forget_request(request)) {
            self.stats.dropped += 1;
            self.event_in_background(m, k, |queue, cx| {
                queue.on_event(cycle, StoreEvent::RequestCancelled, cx)
            });
        }
    }

    /// Whether a task waits for the reply to this release of its guard, and would report a loss.
    pub(super) fn is_awaited_release(&self, m: usize, request: u64) -> bool {
        let awaits =
            |task: &Task| matches!(task.state, State::Releasing { request: awaited, .. } if awaited == request);
        self.managers[m].tasks.iter().any(awaits)
    }

    fn task_lets_go(&mut self, m: usize, task: usize) {
        let State::Holding { k, ref lease, token } = self.managers[m].tasks[task].state else {
            return;
        };
        let cycle = lease.cycle;
        self.guard_ends(k, token);
        let (held, request) = self.event(m, k, |queue, cx| queue.released(cycle, token, cx));
        self.note(|_| format!("m{m} k{k} t{task} lets go of {cycle}, held: {held}"));
        let Some(request) = request else {
            return self.rests(m, task);
        };
        let awaited = held && matches!(request, Request::Release { .. }) && self.chance(0.7);
        if !awaited {
            // The guard is dropped, or the request is not a release.
            self.job(m, Job::Request { k, request });
            return self.rests(m, task);
        }
        let request = self.send(m, k, Order::Queue(request), Driver::Task(task), Priority::Foreground);
        self.enter(m, task, State::Releasing { k, request });
        if self.chance(self.plan.give_up_chance) {
            let patience = self.between(0, 4 * self.plan.message_max);
            self.later(m, task, patience, Step::Cancel);
        }
    }
}
