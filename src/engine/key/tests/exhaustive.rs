//! All short runs of events on one queue with two tasks, checked against the invariants.

use super::*;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// A task enqueues, gives up, collects its outcome, or releases its guard.
    Enqueue(usize),
    Try(usize),
    GiveUp(usize),
    Collect(usize),
    Release(usize),
    /// The request in flight gets a reply, fails, or is cancelled.
    Granted,
    Queued,
    NoneLeft,
    Failed,
    Dropped,
    /// A grant for the current cycle is pushed; the subscription was lost.
    Pushed,
    Resubscribed,
    Wanted,
    /// The store may have been replaced.
    Moved,
    /// Enough time passes for every lease to expire.
    Expire,
    /// A linger period ends; a lingering lease is evicted; a renewal reports a remote waiter.
    LingerEnds,
    Evict,
    RenewedWanted,
    Close,
}

const STEPS: [Step; 24] = [
    Step::Enqueue(0),
    Step::Enqueue(1),
    Step::Try(0),
    Step::Try(1),
    Step::GiveUp(0),
    Step::GiveUp(1),
    Step::Collect(0),
    Step::Collect(1),
    Step::Release(0),
    Step::Release(1),
    Step::Granted,
    Step::Queued,
    Step::NoneLeft,
    Step::Failed,
    Step::Dropped,
    Step::Pushed,
    Step::Resubscribed,
    Step::Wanted,
    Step::Moved,
    Step::Expire,
    Step::LingerEnds,
    Step::Evict,
    Step::RenewedWanted,
    Step::Close,
];

/// The number of steps explored after each beginning.
const DEPTH: usize = 5;

/// Whether leases linger, the maximum number of tokens per block, and the `min_hold` of the first
/// task.
#[derive(Debug, Clone, Copy)]
struct Keeping {
    linger: Linger,
    tokens_max: u32,
    min_hold: MinHold,
}

const NOTHING_KEPT: Keeping = Keeping {
    linger: Linger::NONE,
    tokens_max: u32::MAX,
    min_hold: MinHold::NONE,
};

/// Passes during some runs: each step takes a millisecond.
const MIN_HELD: Keeping = Keeping {
    linger: Linger::of_millis(500),
    min_hold: MinHold::of_millis(4),
    ..NOTHING_KEPT
};

/// Longer than most runs and shorter than a lease.
const KEPT: Keeping = Keeping {
    linger: Linger::of_millis(500),
    ..NOTHING_KEPT
};

/// Every acquisition needs an extension.
const KEPT_WITHOUT_TOKENS: Keeping = Keeping { tokens_max: 1, ..KEPT };

/// The states in which runs begin: nothing; one holder and one waiter; two waiters in the store's
/// queue; an extension in flight for a waiter. With lingering leases: nothing; one holder and one
/// waiter; a lingering lease with tokens; a lingering lease without. With `min_hold`: a holder that
/// asked for it and a waiter; a waiter that asked for it and a holder.
const BEGINNINGS: [(Keeping, &[Step]); 10] = [
    (NOTHING_KEPT, &[]),
    (
        NOTHING_KEPT,
        &[Step::Enqueue(0), Step::Granted, Step::Collect(0), Step::Enqueue(1)],
    ),
    (
        NOTHING_KEPT,
        &[Step::Enqueue(0), Step::NoneLeft, Step::Queued, Step::Enqueue(1)],
    ),
    (
        NOTHING_KEPT,
        &[
            Step::Enqueue(0),
            Step::Granted,
            Step::Collect(0),
            Step::Enqueue(1),
            Step::Release(0),
        ],
    ),
    (KEPT, &[]),
    (
        KEPT,
        &[Step::Enqueue(0), Step::Granted, Step::Collect(0), Step::Enqueue(1)],
    ),
    (
        KEPT,
        &[Step::Enqueue(0), Step::Granted, Step::Collect(0), Step::Release(0)],
    ),
    (
        KEPT_WITHOUT_TOKENS,
        &[Step::Enqueue(0), Step::Granted, Step::Collect(0), Step::Release(0)],
    ),
    (
        MIN_HELD,
        &[Step::Enqueue(0), Step::Enqueue(1), Step::Granted, Step::Collect(0)],
    ),
    (
        MIN_HELD,
        &[Step::Enqueue(1), Step::Granted, Step::Collect(1), Step::Enqueue(0)],
    ),
];

/// A queue and the state of its environment.
struct Small {
    bench: Bench,
    waiting: [Option<WaiterId>; 2],
    guards: [Option<Granted>; 2],
    under_way: Option<Request>,
    last_token: u64,
    counter: u64,
    closed: bool,
    keeping: Keeping,
    /// The cycle of the last guard with a `min_hold`, and when that ends.
    min_hold: Option<(Cycle, Moment)>,
    /// When each task last asked, and the cycle whose turn has begun, and when.
    asked_at: [Moment; 2],
    turn: Option<(Cycle, Moment)>,
}

impl Small {
    fn new(keeping: Keeping) -> Self {
        let mut bench = Bench::new();
        bench.rules.max_burst = 2;
        Self {
            bench,
            waiting: [None; 2],
            guards: [None, None],
            under_way: None,
            last_token: 0,
            counter: 100,
            closed: false,
            keeping,
            min_hold: None,
            asked_at: [Moment::default(); 2],
            turn: None,
        }
    }

    /// The cycle that the next reply is for.
    const fn awaited_cycle(&self) -> Option<Cycle> {
        match self.under_way {
            Some(Request::Acquire { cycle, .. }) => Some(cycle),
            Some(Request::Release { cycle, .. }) => Some(cycle),
            None => None,
        }
    }

    /// Applies the step. Returns whether it makes sense in the current state.
    fn step(&mut self, step: Step) -> bool {
        self.bench.pass(ms(1));
        match step {
            Step::Enqueue(task) | Step::Try(task) => {
                if self.waiting[task].is_some() || self.guards[task].is_some() {
                    return false;
                }
                let options = WaiterOptions {
                    try_only: matches!(step, Step::Try(_)),
                    linger: self.keeping.linger,
                    min_hold: match task {
                        0 => self.keeping.min_hold,
                        _ => MinHold::NONE,
                    },
                    in_outage: if task == 1 && step == Step::Enqueue(task) {
                        InOutage::UntilOwnLimit
                    } else {
                        InOutage::Fail
                    },
                    ..OPTIONS
                };
                let (id, seen) = self.bench.enqueue_as(task as u32, options);
                self.waiting[task] = Some(id);
                self.asked_at[task] = self.bench.now;
                self.check_confirmed(&seen);
                self.follow(&seen);
            }
            Step::GiveUp(task) => {
                let Some(id) = self.waiting[task].take() else {
                    return false;
                };
                let seen = self.bench.give_up(id);
                self.follow(&seen);
            }
            Step::Collect(task) => {
                let Some(outcome) = self.waiting[task].and_then(|id| self.bench.collect(id)) else {
                    return false;
                };
                self.waiting[task] = None;
                if let Outcome::Granted(granted) = outcome {
                    if granted.lease.loss_at(self.bench.now).is_none() {
                        assert!(granted.token.get() > self.last_token, "tokens grow");
                    }
                    self.last_token = self.last_token.max(granted.token.get());
                    self.check_min_hold(task, &granted);
                    self.check_turn(task, &granted);
                    self.guards[task] = Some(granted);
                }
            }
            Step::Release(task) => {
                let Some(guard) = self.guards[task].take() else {
                    return false;
                };
                let (_, seen) = self.bench.release(&guard);
                self.check_confirmed(&seen);
                self.follow(&seen);
            }
            Step::Granted | Step::Queued | Step::NoneLeft => return self.answer(step),
            Step::Failed => {
                let Some(cycle) = self.awaited_cycle() else {
                    return false;
                };
                self.under_way = None;
                let seen = self.bench.failed(cycle);
                self.follow(&seen);
            }
            Step::Dropped => {
                let Some(cycle) = self.awaited_cycle() else {
                    return false;
                };
                self.under_way = None;
                let seen = self.bench.cancelled(cycle);
                self.follow(&seen);
            }
            Step::Pushed => {
                let Some(cycle) = self.current() else { return false };
                let (first, last) = self.block(2);
                let seen = self.bench.grant(grant(cycle, first, last));
                self.follow(&seen);
            }
            Step::Resubscribed => {
                let seen = self.bench.resubscribed();
                self.follow(&seen);
            }
            Step::Wanted => {
                let Some(cycle) = self.current() else { return false };
                let seen = self.bench.remote_waiter(cycle);
                self.follow(&seen);
                self.note_turn(cycle);
            }
            Step::Moved => self.bench.epoch += 1,
            Step::Expire => {
                let was_kept = self.bench.queue.lingers_until().is_some();
                self.bench.pass(TTL);
                let seen = self.bench.tick();
                assert!(
                    !was_kept || seen.lost.is_none(),
                    "a loss is reported only if a guard was out"
                );
                self.follow(&seen);
            }
            Step::LingerEnds => {
                let Some(until) = self.bench.queue.lingers_until() else {
                    return false;
                };
                self.bench.now = until.max(self.bench.now);
                let seen = self.bench.tick();
                assert_eq!(self.bench.queue.lingers_until(), None);
                self.follow(&seen);
            }
            Step::Evict => {
                if self.bench.queue.lingers_until().is_none() {
                    return false;
                }
                let seen = self.bench.evict();
                self.follow(&seen);
            }
            Step::RenewedWanted => {
                let Some(cycle) = self.current().filter(|_| self.bench.queue.holds()) else {
                    return false;
                };
                let seen = self
                    .bench
                    .renewed(cycle, self.bench.now, Some(RenewReply::Extended { has_waiters: true }));
                self.follow(&seen);
                self.note_turn(cycle);
            }
            Step::Close => {
                if self.closed {
                    return false;
                }
                self.closed = true;
                let seen = self.bench.close();
                self.follow(&seen);
            }
        }
        true
    }

    fn answer(&mut self, step: Step) -> bool {
        let Some(request) = self.under_way.take() else {
            return false;
        };
        let (first, last) = match request {
            Request::Acquire { tokens, .. } | Request::Release { tokens, .. } => {
                self.block(u64::from(tokens.min(self.keeping.tokens_max)))
            }
        };
        let is_extension = self.bench.queue.holds();
        let reply = match (step, request) {
            (Step::Granted, _) if is_extension => extended(first, last),
            (Step::Granted, _) => granted(first, last),
            (
                Step::NoneLeft,
                Request::Acquire {
                    kind: AcquireKind::Fast,
                    ..
                },
            ) => AcquireReply::Taken,
            (
                Step::NoneLeft,
                Request::Acquire {
                    kind: AcquireKind::Try | AcquireKind::Extend,
                    ..
                },
            ) => AcquireReply::Busy,
            (
                Step::Queued,
                Request::Acquire {
                    kind: AcquireKind::Enqueue,
                    ..
                }
                | Request::Release { requeue: Some(_), .. },
            ) => queued(last),
            (Step::NoneLeft, Request::Release { requeue: None, .. }) => AcquireReply::Busy,
            _ => {
                self.under_way = Some(request);
                return false;
            }
        };
        let seen = match request {
            Request::Acquire { cycle, .. } => self.bench.reply(cycle, reply),
            Request::Release {
                cycle, requeue: None, ..
            } if step == Step::NoneLeft => self.bench.reply_to_release(cycle, None),
            Request::Release {
                cycle,
                requeue: Some(_),
                ..
            } => self.bench.reply_to_release(cycle, Some(reply)),
            Request::Release { .. } => {
                self.under_way = Some(request);
                return false;
            }
        };
        self.follow(&seen);
        true
    }

    /// Nobody gets the key from this process before a `min_hold` has passed, and a guard with one
    /// has a lease of its own.
    fn check_min_hold(&mut self, task: usize, granted: &Granted) {
        let is_older = matches!(granted.path, Path::LocalHandOff | Path::Lingering);
        if let Some((_, until)) = self.min_hold {
            assert!(!is_older || granted.at >= until, "a min_hold has not passed");
        }
        let is_valid = granted.lease.loss_at(self.bench.now).is_none();
        if task == 0 && is_valid && !self.keeping.min_hold.is_none() {
            assert!(!is_older, "a guard with min_hold is served under an earlier lease");
            self.min_hold = Some((granted.lease.cycle, granted.at + self.keeping.min_hold.time()));
        }
    }

    /// The manager of that cycle has learned that another one waits.
    fn note_turn(&mut self, cycle: Cycle) {
        if self.bench.queue.holds() && self.turn.is_none_or(|(of, _)| of != cycle) {
            self.turn = Some((cycle, self.bench.now));
        }
    }

    /// A turn serves the tasks that asked before it began. That of an odd cycle begins with its
    /// first guard.
    fn check_turn(&mut self, task: usize, granted: &Granted) {
        let cycle = granted.lease.cycle;
        let is_first = matches!(granted.path, Path::Uncontended | Path::RemoteGrant);
        if is_first && cycle.expects_remote_waiters() {
            self.turn = Some((cycle, granted.at));
        }
        if let Some((_, began)) = self.turn.filter(|(of, _)| *of == cycle) {
            assert!(self.asked_at[task] <= began, "a turn serves a task that came later");
        }
    }

    /// A guard served without a request must be under a lease that the store has confirmed in the
    /// current epoch.
    fn check_confirmed(&self, seen: &Seen) {
        if let Phase::Held(held) = &self.bench.queue.phase
            && held.guard().is_some()
            && !seen.woken.is_empty()
        {
            assert_eq!(held.confirmed_in, self.bench.epoch);
        }
    }

    /// The next tokens of the store.
    fn block(&mut self, count: u64) -> (u64, u64) {
        self.counter += count;
        (self.counter + 1 - count, self.counter)
    }

    /// The cycle that the store may know, as far as the environment can tell.
    fn current(&self) -> Option<Cycle> {
        match &self.bench.queue.phase {
            Phase::Idle => None,
            Phase::Acquiring(asking) => Some(asking.cycle),
            Phase::Queued(queued) => Some(queued.cycle),
            Phase::Held(held) => Some(held.lease.cycle),
            Phase::Retrying { cycle, .. } | Phase::Releasing { cycle, .. } => Some(*cycle),
        }
    }

    fn follow(&mut self, seen: &Seen) {
        if let Some(request) = seen.request {
            // A request in flight for a lease that has since been lost no longer matters.
            let moot = self.under_way.is_some_and(|before| match before {
                Request::Acquire { cycle, .. } => seen.abandoned.contains(&cycle),
                Request::Release { .. } => false,
            });
            assert!(self.under_way.is_none() || moot, "two requests are in flight");
            self.under_way = Some(request);
        } else if let Some(Request::Acquire { cycle, .. }) = self.under_way
            && seen.abandoned.contains(&cycle)
        {
            self.under_way = None;
        }
    }

    /// Checks the invariants, after every step.
    fn check(&self) {
        if let Some((cycle, until)) = self.min_hold.filter(|(_, until)| *until > self.bench.now) {
            assert_eq!(self.bench.min_holds.until(cycle, self.bench.now), Some(until));
            let is_passed_on = matches!(
                self.under_way,
                Some(Request::Release { cycle: released, requeue: Some(_), .. }) if released == cycle
            );
            assert!(!is_passed_on, "the release passes the lease on");
        }
        let queue = &self.bench.queue;
        let phase = &queue.phase;
        let needs_request = match phase {
            Phase::Acquiring(_) | Phase::Releasing { .. } => true,
            Phase::Held(held) => held.extending,
            Phase::Idle | Phase::Retrying { .. } | Phase::Queued(_) => false,
        };
        assert_eq!(needs_request, self.under_way.is_some(), "{phase:?}");
        let holder = match phase {
            Phase::Held(held) => held.guard(),
            _ => None,
        };
        for id in self.waiting.iter().flatten() {
            let granted = matches!(
                queue.waiters.get(*id).and_then(|waiter| waiter.outcome.as_ref()),
                Some(Outcome::Granted(granted)) if granted.lease.loss_at(self.bench.now).is_none()
            );
            assert!(!granted || holder.is_some_and(|holder| holder.waiter == Some(*id)));
        }
        let in_line = self
            .waiting
            .iter()
            .flatten()
            .filter(|&&id| !queue.is_settled(id))
            .count();
        assert_eq!(in_line, queue.waiting(), "every waiter is in line");
        if in_line > 0 {
            let served = matches!(phase, Phase::Held(held) if held.guard().is_some());
            let looked_after = needs_request || served || matches!(phase, Phase::Queued(_) | Phase::Retrying { .. });
            assert!(!matches!(phase, Phase::Retrying { .. }) || queue.next_deadline().is_some());
            assert!(looked_after, "a waiter waits for no event: {phase:?}");
        }
        let valid = self.guards.iter().flatten().filter(|guard| {
            let lost = guard.lease.loss_at(self.bench.now).is_some();
            !lost
        });
        assert!(valid.count() <= 1, "two guards");
        let is_out = |lost: &Cycle| self.guards.iter().flatten().any(|guard| guard.lease.cycle == *lost);
        assert!(queue.lost_cycles.iter().all(is_out), "its guard has been dropped");
        let is_idle = matches!(phase, Phase::Idle) && queue.lost_cycles.is_empty();
        assert_eq!(queue.is_unused(), is_idle && self.waiting == [None; 2]);
        assert_eq!(queue.is_over(), is_idle && self.closed && in_line == 0);
        if queue.lingers_until().is_some() {
            assert!(in_line == 0 && !self.closed, "a lingering lease goes to a waiter");
            assert!(
                !queue.remote_waiters_seen(),
                "a lease with a remote waiter does not linger"
            );
        }
        if let Phase::Held(_) | Phase::Queued(_) = phase {
            assert!(queue.next_deadline().is_some(), "a timer must be set");
        }
    }

    /// All tasks leave and all requests get a reply. Nothing must be left.
    fn wind_up(&mut self) {
        for task in 0..2 {
            self.step(Step::GiveUp(task));
            self.step(Step::Release(task));
            self.check();
        }
        for _ in 0..6 {
            if self.under_way.is_none() && !self.step(Step::LingerEnds) {
                break;
            }
            if self.under_way.is_none() {
                continue;
            }
            let answered = self.step(Step::Granted) || self.step(Step::NoneLeft);
            assert!(answered, "{:?}", self.under_way);
            self.check();
        }
        assert!(self.bench.queue.is_unused(), "{:?}", self.bench.queue);
    }
}

fn replay(keeping: Keeping, steps: &[Step]) -> (Small, bool) {
    let mut small = Small::new(keeping);
    let mut made_sense = true;
    for &step in steps {
        made_sense = small.step(step);
        small.check();
    }
    (small, made_sense)
}

/// Explores all runs that begin with `steps` and have up to `more` further steps.
fn explore(keeping: Keeping, steps: &mut Vec<Step>, more: usize) -> u64 {
    let mut count = 0;
    for step in STEPS {
        steps.push(step);
        let result = std::panic::catch_unwind(|| {
            let (mut small, made_sense) = replay(keeping, steps);
            if made_sense {
                small.wind_up();
            }
            made_sense
        });
        match result {
            Ok(false) => {}
            Ok(true) if more > 1 => count += 1 + explore(keeping, steps, more - 1),
            Ok(true) => count += 1,
            Err(_) => panic!("after {steps:?} with {keeping:?}"),
        }
        steps.pop();
    }
    count
}

#[test]
fn all_short_runs_keep_the_rules() {
    let counts = std::thread::scope(|scope| {
        let explorers =
            BEGINNINGS.map(|(keeping, steps)| scope.spawn(move || explore(keeping, &mut steps.to_vec(), DEPTH)));
        explorers.map(|explorer| explorer.join().unwrap())
    });
    println!("{counts:?} runs");
    assert!(counts.iter().all(|&count| count > 50_000), "{counts:?}");
}
