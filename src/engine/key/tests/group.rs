//! All short runs of events on a group with two tasks, checked against the invariants.

mod cases;

use super::*;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    Want(usize),
    Try(usize),
    GiveUp(usize),
    Collect(usize),
    Release(usize),
    /// The oldest or the newest request in flight is granted, queued, refused, or fails.
    Granted(End),
    Queued(End),
    Busy(End),
    Failed(End),
    Dropped(End),
    /// A grant for the cycle in the store's queue is pushed; another manager waits for the lease.
    Pushed,
    Wanted,
    /// Enough time passes for every lease to expire.
    Expire,
    Close,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    Oldest,
    Newest,
}

use End::{Newest, Oldest};

const STEPS: [Step; 24] = [
    Step::Want(0),
    Step::Want(1),
    Step::Try(0),
    Step::Try(1),
    Step::GiveUp(0),
    Step::GiveUp(1),
    Step::Collect(0),
    Step::Collect(1),
    Step::Release(0),
    Step::Release(1),
    Step::Granted(Oldest),
    Step::Granted(Newest),
    Step::Queued(Oldest),
    Step::Queued(Newest),
    Step::Busy(Oldest),
    Step::Busy(Newest),
    Step::Failed(Oldest),
    Step::Failed(Newest),
    Step::Dropped(Oldest),
    Step::Dropped(Newest),
    Step::Pushed,
    Step::Wanted,
    Step::Expire,
    Step::Close,
];

const DEPTH: usize = 5;

pub(super) const fn permits(weight: u16, limit: u16) -> LockMode {
    LockMode::Permits { weight, limit }
}

/// The modes in which the two tasks want the key.
const MODES: [[LockMode; 2]; 4] = [
    [LockMode::Shared, LockMode::Shared],
    [permits(1, 2), permits(1, 2)],
    [permits(1, 1), permits(1, 1)],
    [permits(2, 2), permits(1, 2)],
];

/// The states in which runs begin: nothing; one guard and one waiter; two waiters.
const BEGINNINGS: [&[Step]; 3] = [
    &[],
    &[Step::Want(0), Step::Granted(Oldest), Step::Collect(0), Step::Want(1)],
    &[Step::Want(0), Step::Queued(Oldest), Step::Want(1)],
];

/// A group and the state of its environment. The store grants whatever it is asked for.
pub(super) struct GroupBench {
    pub(super) key: Contender<u32>,
    modes: [LockMode; 2],
    pub(super) rules: Rules,
    cycles: Cycles,
    min_holds: MinHolds,
    pub(super) now: Moment,
    waiting: [Option<WaiterId>; 2],
    guards: [Option<Granted>; 2],
    pub(super) in_flight: Vec<Request>,
    queued: Vec<Cycle>,
    counter: u64,
    tokens: Vec<u64>,
    closed: bool,
}

impl GroupBench {
    pub(super) fn new(modes: [LockMode; 2]) -> Self {
        Self {
            key: Contender::new(modes[0]),
            modes,
            rules: Bench::new().rules,
            cycles: Cycles::default(),
            min_holds: MinHolds::default(),
            now: at(1_000),
            waiting: [None; 2],
            guards: [None, None],
            in_flight: Vec::new(),
            queued: Vec::new(),
            counter: 100,
            tokens: Vec::new(),
            closed: false,
        }
    }

    pub(super) fn event<R>(&mut self, event: impl FnOnce(&mut Contender<u32>, Context<'_>) -> (R, Effects<u32>)) -> R {
        let cx = Context {
            now: self.now,
            rules: &self.rules,
            cycles: &self.cycles,
            capacity: &Unlimited,
            min_holds: &self.min_holds,
            epoch: 0,
        };
        let (result, effects) = event(&mut self.key, cx);
        let more = effects.rare.map(|rare| rare.more_requests).unwrap_or_default();
        self.in_flight.extend(effects.request.into_iter().chain(more));
        result
    }

    fn take(&mut self, end: End) -> Option<Request> {
        match end {
            Oldest if self.in_flight.is_empty() => None,
            Oldest => Some(self.in_flight.remove(0)),
            // With one request both are the same.
            Newest if self.in_flight.len() < 2 => None,
            Newest => self.in_flight.pop(),
        }
    }

    /// Applies the step. Returns whether it makes sense in the current state.
    pub(super) fn step(&mut self, step: Step) -> bool {
        self.now = self.now + ms(1);
        match step {
            Step::Want(task) | Step::Try(task) => {
                if self.waiting[task].is_some() || self.guards[task].is_some() {
                    return false;
                }
                let options = WaiterOptions {
                    mode: self.modes[task],
                    try_only: matches!(step, Step::Try(_)),
                    ..OPTIONS
                };
                let id = self.event(|group, cx| group.enqueue(options, Some(task as u32), cx));
                self.waiting[task] = Some(id);
            }
            Step::GiveUp(task) => {
                let Some(id) = self.waiting[task].take() else {
                    return false;
                };
                self.event(|group, cx| ((), group.give_up(id, cx)));
            }
            Step::Collect(task) => {
                let Some(outcome) = self.waiting[task].and_then(|id| self.key.collect(id)) else {
                    return false;
                };
                self.waiting[task] = None;
                if let Outcome::Granted(granted) = outcome {
                    let token = granted.token.get();
                    assert!(!self.tokens.contains(&token), "token {token} is used twice");
                    self.tokens.push(token);
                    self.guards[task] = Some(granted);
                }
            }
            Step::Release(task) => {
                let Some(guard) = self.guards[task].take() else {
                    return false;
                };
                let was_valid = guard.lease.loss_at(self.now).is_none();
                let held = self.event(|group, cx| group.released(guard.lease.cycle, guard.token, cx));
                assert_eq!(held, was_valid);
            }
            Step::Granted(end) | Step::Queued(end) | Step::Busy(end) => {
                let Some(request) = self.take(end) else { return false };
                return self.answer(step, request);
            }
            Step::Failed(end) => {
                let Some(request) = self.take(end) else { return false };
                let (error, cycle) = (no_answer(), request.cycle());
                let outage = StoreOutage {
                    since: self.now,
                    patience: TTL,
                    retry_at: self.now,
                };
                let failed = StoreEvent::RequestFailed {
                    error: &error,
                    outage: Some(outage),
                };
                self.event(|group, cx| ((), group.on_event(cycle, failed, cx)));
            }
            Step::Dropped(end) => {
                let Some(request) = self.take(end) else { return false };
                let cycle = request.cycle();
                self.event(|group, cx| ((), group.on_event(cycle, StoreEvent::RequestCancelled, cx)));
            }
            Step::Pushed => {
                let Some(cycle) = self.queued.pop() else { return false };
                let grant = grant(cycle, self.counter + 1, self.counter + 2);
                self.counter += 2;
                self.event(|group, cx| ((), group.on_event(cycle, StoreEvent::Grant(grant), cx)));
            }
            Step::Wanted => {
                let Some(cycle) = self.guards.iter().flatten().map(|guard| guard.lease.cycle).next() else {
                    return false;
                };
                self.event(|group, cx| ((), group.on_event(cycle, StoreEvent::RemoteWaiter, cx)));
            }
            Step::Expire => {
                self.now = self.now + TTL;
                self.event(|group, cx| ((), group.tick(cx)));
            }
            Step::Close => {
                if std::mem::replace(&mut self.closed, true) {
                    return false;
                }
                self.event(|group, cx| ((), group.close(cx)));
            }
        }
        true
    }

    fn answer(&mut self, step: Step, request: Request) -> bool {
        let cycle = request.cycle();
        let tokens = match request {
            Request::Acquire { tokens, .. } | Request::Release { tokens, .. } => u64::from(tokens),
        };
        let (first, last) = (self.counter + 1, self.counter + tokens);
        let is_extension = self.key.has_lease_of(cycle);
        let reply = match step {
            Step::Granted(_) if is_extension => extended(first, last),
            Step::Granted(_) => granted(first, last),
            Step::Queued(_) if !is_extension => queued(self.counter),
            Step::Busy(_)
                if matches!(
                    request,
                    Request::Acquire {
                        kind: AcquireKind::Try,
                        ..
                    }
                ) =>
            {
                AcquireReply::Busy
            }
            _ => return false,
        };
        self.counter = last;
        let acquired = match request {
            Request::Acquire { cycle, .. } => Some(cycle),
            Request::Release { requeue, .. } => requeue,
        };
        if matches!(reply, AcquireReply::Queued(_)) {
            self.queued.extend(acquired);
        }
        match request {
            Request::Acquire { .. } => {
                let answer = answer(self.now, reply);
                self.event(|group, cx| ((), group.on_event(cycle, StoreEvent::AcquireReply(answer), cx)));
            }
            Request::Release { requeue, .. } => {
                let reply = ReleaseReply {
                    held: true,
                    requeued: requeue.map(|_| reply),
                };
                let answer = Answer {
                    sent_at: self.now,
                    ttl: TTL,
                    floor: 0,
                    reply,
                };
                self.event(|group, cx| ((), group.on_event(cycle, StoreEvent::ReleaseReply(answer), cx)));
            }
        }
        true
    }

    fn check(&self) {
        let mut cycles: Vec<Cycle> = self.in_flight.iter().map(Request::cycle).collect();
        cycles.sort_unstable();
        cycles.dedup();
        assert_eq!(cycles.len(), self.in_flight.len(), "two requests for one cycle");
        let valid = || {
            self.guards
                .iter()
                .flatten()
                .filter(|guard| guard.lease.loss_at(self.now).is_none())
        };
        let in_use: u32 = valid().map(|guard| guard.lease.cycle.mode().weight()).sum();
        let limit = valid()
            .map(|guard| guard.lease.cycle.mode().limit())
            .min()
            .unwrap_or(u32::MAX);
        assert!(in_use <= limit, "{in_use} permits of {limit} are in use");
        for id in self.waiting.iter().flatten().filter(|&&id| !self.key.is_settled(id)) {
            let goes_on = !self.in_flight.is_empty() || self.key.next_deadline().is_some();
            assert!(goes_on, "nothing serves {id:?}");
        }
        if self.closed {
            assert_eq!(valid().count(), 0, "a guard of a closed manager is valid");
        }
    }

    /// All tasks leave and all requests get replies. Nothing may be left.
    fn check_end(&mut self) {
        for task in 0..2 {
            self.step(Step::Release(task));
            self.step(Step::GiveUp(task));
        }
        for _ in 0..20 {
            if !self.step(Step::Granted(Oldest)) {
                break;
            }
        }
        assert!(self.key.is_unused(), "something is left: {:?}", self.key);
    }
}

/// Replays the steps. Returns `None` if the last one makes no sense.
fn replay(modes: [LockMode; 2], steps: &[Step]) -> Option<GroupBench> {
    let mut bench = GroupBench::new(modes);
    for &step in steps {
        if !bench.step(step) {
            return None;
        }
        bench.check();
    }
    Some(bench)
}

fn explore(modes: [LockMode; 2], steps: &mut Vec<Step>, depth: usize, runs: &mut u64) {
    for step in STEPS {
        steps.push(step);
        let made = std::panic::catch_unwind(|| {
            let bench = replay(modes, steps);
            let makes_sense = bench.is_some();
            if let Some(mut bench) = bench {
                bench.check_end();
            }
            makes_sense
        });
        let makes_sense = made.unwrap_or_else(|_| panic!("with {modes:?} after {steps:?}"));
        if makes_sense {
            *runs += 1;
            if depth > 1 {
                explore(modes, steps, depth - 1, runs);
            }
        }
        steps.pop();
    }
}

#[test]
fn invariants_of_a_group_hold_after_every_short_run_of_events() {
    let mut runs = 0;
    for modes in MODES {
        for beginning in BEGINNINGS {
            explore(modes, &mut beginning.to_vec(), DEPTH, &mut runs);
        }
    }
    println!("{runs} runs");
    assert!(runs > 100_000, "only {runs} runs");
}
