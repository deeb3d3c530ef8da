//! The state of a run: the managers, the store, and the schedule of events.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::background::Job;
use super::clock::{DRIFT_MAX, LocalClock, Nanos};
use super::connections::Connection;
use super::failover::Replicas;
use super::faults::Fault;
use super::ledger::Ledger;
use super::network::{Command, InFlight, Lease, Reply};
use super::plan::Plan;
use super::pushes::{Inbox, Subscription};
use super::run::Stats;
use super::story::Case;
use super::tasks::{State, Step, Task};
use crate::clock::Moment;
use crate::engine::min_holds::MinHolds;
use crate::engine::orphans::{Attempt, Orphans};
use crate::engine::renewals::Renewals;
use crate::engine::{Bound, Contender, Context, Effects, Rare, Request, Unlimited};
use crate::identity::ManagerId;
use crate::key::LockKey;
use crate::late_requests::LateRequests;
use crate::mode::LockMode;
use crate::protocol::{AcquireKind, Cycles, Push};
use crate::store::Priority;
use crate::store::memory::MemoryCore;

pub(super) struct World {
    pub(super) now: Nanos,
    pub(super) rng: SmallRng,
    pub(super) plan: Plan,
    pub(super) core: MemoryCore,
    pub(super) replicas: Replicas,
    /// The keys, once for each kind of mode that tasks use.
    pub(super) keys: Vec<LockKey>,
    pub(super) managers: Vec<Manager>,
    pub(super) in_flight: BTreeMap<u64, InFlight>,
    pub(super) ledger: Ledger,
    pub(super) stats: Stats,
    /// Until this time, every message is slow.
    pub(super) slow_until: Nanos,
    agenda: BinaryHeap<Reverse<Scheduled>>,
    numbers: u64,
    trace: Option<Vec<String>>,
}

/// A pending release of a key.
pub(super) type Orphan = Attempt<usize, ()>;

/// One process.
pub(super) struct Manager {
    pub(super) id: ManagerId,
    pub(super) cycles: Cycles,
    pub(super) min_holds: MinHolds,
    pub(super) clock: LocalClock,
    pub(super) queues: Vec<Contender<usize>>,
    /// The keys for which other managers were seen to wait.
    pub(super) remote_waiters: Vec<bool>,
    pub(super) tasks: Vec<Task>,
    pub(super) is_alive: bool,
    pub(super) is_closed: bool,
    /// No new tasks start.
    pub(super) is_left: bool,
    pub(super) lanes: [Connection; 2],
    /// When one of those connections last broke.
    pub(super) last_cut: Option<Moment>,
    pub(super) late: LateRequests,
    pub(super) orphans: Orphans<usize, ()>,
    /// When the next event for those is scheduled.
    pub(super) orphans_due: Nanos,
    pub(super) renewals: Renewals<Lease>,
    pub(super) inbox: Inbox,
    /// The server's time at the last connect, and the largest token seen in the slot of each key.
    pub(super) floor: u64,
    pub(super) seen: Vec<u64>,
    /// How often a connection was found broken. Then the number of failovers known, and when the
    /// last of them was noticed.
    pub(super) epoch: u32,
    pub(super) noticed: (u32, Moment),
    /// Until when each part of the process is blocked.
    pub(super) blocked_until: [Nanos; PARTS],
    pub(super) next_scan: Nanos,
    pub(super) last_job: Nanos,
}

/// The parts of a process that can be blocked independently of each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Tasks,
    Background,
    Pushes,
    Watchdog,
}

pub(super) const PARTS: usize = 4;

pub(super) enum Event {
    /// A command reaches the server. All other events happen in the process of a manager.
    Arrives(Command),
    /// The server has replied that it does not know the script of a command.
    UnknownScript(Command),
    Replies {
        request: u64,
        lane: Priority,
        generation: usize,
        reply: Option<Reply>,
    },
    /// The sender that waits for a reply finds its connection broken.
    Breaks {
        request: u64,
        generation: usize,
    },
    Deadline {
        request: u64,
    },
    Job(Job),
    /// A release of a cycle that is over is due.
    OrphansDue {
        at: Nanos,
    },
    Look {
        at: Nanos,
    },
    Pushed {
        generation: usize,
        push: Push,
    },
    Subscription(Subscription),
    Task {
        task: usize,
        epoch: u32,
        step: Step,
    },
    Fault(Fault),
}

struct Scheduled {
    at: Nanos,
    number: u64,
    manager: usize,
    /// `None` if it happens outside of any process.
    part: Option<Part>,
    event: Event,
}

impl World {
    pub(super) fn new(case: &Case, traced: bool) -> Self {
        let mut rng = SmallRng::seed_from_u64(case.seed);
        let mut plan = Plan::draw(&mut rng, case.variant, case.flaw);
        plan.draw_unknown_scripts(case.seed);
        case.simplify(&mut plan);
        if case.salt > 0 {
            rng = SmallRng::seed_from_u64(case.seed.wrapping_add(case.salt << 32));
        }
        let keys: Vec<LockKey> = ["{s}one", "{s}two", "three"][..plan.keys]
            .iter()
            .filter_map(|name| LockKey::new(name).ok())
            .collect();
        let distinct = keys.len();
        let kinds = if plan.variant.is_mixed() { LockMode::KINDS } else { 1 };
        let keys: Vec<LockKey> = keys.iter().cycle().take(kinds * distinct).cloned().collect();
        let mut world = Self {
            now: 0,
            core: MemoryCore::with_flaw(plan.rules.flaw),
            replicas: Replicas::default(),
            managers: Vec::new(),
            in_flight: BTreeMap::new(),
            ledger: Ledger::new(distinct),
            stats: Stats::default(),
            slow_until: 0,
            agenda: BinaryHeap::new(),
            numbers: 0,
            trace: traced.then(Vec::new),
            keys,
            plan,
            rng,
        };
        for number in 0..world.plan.managers {
            let manager = world.new_manager(number);
            world.core.set_subscribed(manager.id.as_str(), true);
            world.managers.push(manager);
        }
        world.note(|world| format!("{:?}", world.plan));
        world
    }

    fn new_manager(&mut self, number: usize) -> Manager {
        Manager {
            id: ManagerId::of("sim", 1, number as u64),
            cycles: Cycles::default(),
            min_holds: MinHolds::default(),
            clock: LocalClock {
                offset: self.rng.random_range(1_000_000_000..1_000_000_000_000),
                drift: self.rng.random_range(-DRIFT_MAX..=DRIFT_MAX),
            },
            queues: (0..self.keys.len()).map(|k| Contender::new(self.kind(k))).collect(),
            remote_waiters: vec![false; self.keys.len()],
            tasks: (0..self.plan.tasks).map(|_| Task::default()).collect(),
            is_alive: true,
            is_closed: false,
            is_left: false,
            lanes: [Connection::default(), Connection::default()],
            last_cut: None,
            late: LateRequests::default(),
            orphans: Orphans::new(self.plan.orphan_rules()),
            orphans_due: Nanos::MAX,
            renewals: Renewals::new(),
            inbox: Inbox::default(),
            floor: self.server_time(),
            seen: vec![0; self.keys.len()],
            epoch: 0,
            noticed: (0, Moment::default()),
            blocked_until: [0; PARTS],
            next_scan: Nanos::MAX,
            last_job: 0,
        }
    }

    /// The number of different keys. Key `k` of the list has the kind of mode `k / distinct`.
    pub(super) fn distinct(&self) -> usize {
        self.ledger.distinct()
    }

    /// A mode of the kind in which key `k` of the list is held.
    pub(super) fn kind(&self, k: usize) -> LockMode {
        match k / self.distinct() {
            0 => LockMode::Exclusive,
            1 => LockMode::Shared,
            _ => LockMode::Permits { weight: 1, limit: 1 },
        }
    }

    /// Where the key is in the list for that mode.
    pub(super) fn index_of(&self, key: &LockKey, mode: LockMode) -> Option<usize> {
        let first = self.keys.iter().position(|known| known == key)?;
        (first..self.keys.len())
            .step_by(self.distinct())
            .find(|&k| std::mem::discriminant(&self.kind(k)) == std::mem::discriminant(&mode))
    }

    /// The store's time as a token.
    pub(super) fn server_time(&self) -> u64 {
        1_000_000_000 + self.now / 125
    }

    pub(super) fn in_calm(&self) -> bool {
        self.now >= self.plan.faults_end
    }

    /// A random number from `least` to `most`.
    pub(super) fn between(&mut self, least: Nanos, most: Nanos) -> Nanos {
        self.rng.random_range(least..=most.max(least))
    }

    pub(super) fn chance(&mut self, chance: f64) -> bool {
        chance > 0.0 && self.rng.random_bool(chance)
    }

    /// Schedules an event outside of any process, possibly on behalf of a manager.
    pub(super) fn outside(&mut self, at: Nanos, manager: usize, event: Event) {
        self.schedule(at, manager, None, event);
    }

    /// Schedules an event in a part of a process. It is delayed while that part is blocked.
    pub(super) fn inside(&mut self, at: Nanos, manager: usize, part: Part, event: Event) {
        self.schedule(at, manager, Some(part), event);
    }

    fn schedule(&mut self, at: Nanos, manager: usize, part: Option<Part>, event: Event) {
        self.numbers += 1;
        self.agenda.push(Reverse(Scheduled {
            at: at.max(self.now),
            number: self.numbers,
            manager,
            part,
            event,
        }));
    }

    pub(super) fn number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }

    /// When the next event happens.
    pub(super) fn next_at(&self) -> Option<Nanos> {
        self.agenda.peek().map(|Reverse(next)| next.at)
    }

    /// Executes the next event. Returns whether there was one.
    pub(super) fn step(&mut self) -> bool {
        let Some(Reverse(mut next)) = self.agenda.pop() else {
            return false;
        };
        self.now = next.at;
        if let Some(part) = next.part {
            let manager = &self.managers[next.manager];
            if !manager.is_alive {
                return true;
            }
            let blocked_until = manager.blocked_until[part as usize];
            if blocked_until > self.now {
                // The event keeps its number, and therefore its order among the events of this
                // part.
                next.at = blocked_until;
                self.agenda.push(Reverse(next));
                return true;
            }
        }
        self.happen(next.manager, next.event);
        self.stats.events += 1;
        true
    }

    fn happen(&mut self, m: usize, event: Event) {
        match event {
            Event::Arrives(command) => self.arrives(command),
            Event::UnknownScript(command) => self.sends_script(command),
            Event::Replies {
                request,
                lane,
                generation,
                reply,
            } => self.reply_comes(m, request, lane, generation, reply),
            Event::Breaks { request, generation } => self.connection_breaks(request, generation),
            Event::Deadline { request } => self.deadline_passes(request),
            Event::Job(job) => self.job_starts(m, job),
            Event::OrphansDue { at } => self.orphans_are_due(m, at),
            Event::Look { at } => self.watchdog_looks(m, at),
            Event::Pushed { generation, push } => self.push_comes(m, generation, push),
            Event::Subscription(step) => self.subscription_goes_on(m, step),
            Event::Task { task, epoch, step } => self.task_goes_on(m, task, epoch, step),
            Event::Fault(fault) => self.fault_happens(m, fault),
        }
    }

    /// Applies an event to a queue, as `driver::Entry` does, and carries out its effects, except
    /// for the request, which is returned to the caller.
    pub(super) fn event<R>(
        &mut self,
        m: usize,
        k: usize,
        happens: impl FnOnce(&mut Contender<usize>, Context<'_>) -> (R, Effects<usize>),
    ) -> (R, Option<Request>) {
        let kind = self.kind(k);
        let manager = &mut self.managers[m];
        let cx = Context {
            now: manager.clock.at(self.now),
            rules: &self.plan.rules,
            cycles: &manager.cycles,
            capacity: &Unlimited,
            min_holds: &manager.min_holds,
            epoch: manager.epoch,
        };
        let queue = &mut manager.queues[k];
        let lingered = queue.lingers_until().is_some();
        let (result, effects) = happens(queue, cx);
        let waiting = manager.tasks.iter_mut().filter_map(|task| match &mut task.state {
            State::Waiting(waiting) if waiting.k == k => Some(waiting),
            _ => None,
        });
        waiting.for_each(|waiting| waiting.was_settled |= queue.is_settled(waiting.id));
        let look_at = queue.next_deadline();
        let lost_idle = lingered && queue.leases() == 0 && !queue.is_evictable();
        let is_exclusive = queue.is_exclusive();
        if queue.is_unused() {
            manager.remote_waiters[k] = queue.remote_waiters_seen();
            *queue = Contender::new(kind);
        }
        let Effects {
            request,
            wake,
            rare,
            yielded,
            ..
        } = effects;
        self.stats.gated += u64::from(yielded == Some(Bound::Gate));
        let Rare {
            abandoned,
            lost,
            more_requests,
            ..
        } = rare.map_or_else(Rare::default, |rare| *rare);
        if let Some(look_at) = look_at {
            self.look_at(m, look_at);
        }
        for task in wake {
            self.task_is_woken(m, task);
        }
        for request in more_requests {
            self.job(m, Job::Request { k, request });
        }
        for cycle in abandoned {
            self.job(m, Job::Abandon { k, cycle });
        }
        if lost_idle {
            self.stats.lost_idle += 1;
        }
        for reason in lost {
            if lingered && is_exclusive {
                self.ledger
                    .breach(format!("m{m} k{k} a loss is reported for a lease without a guard"));
            }
            self.stats.lost += 1;
            self.note(|_| format!("m{m} k{k} a guard is lost: {reason}"));
        }
        if is_exclusive
            && let Some(Request::Acquire {
                kind: AcquireKind::Enqueue,
                ..
            }) = request
        {
            self.check_try(m, k);
        }
        (result, request)
    }

    /// Like [`event`](Self::event), but passes the request to the background.
    pub(super) fn event_in_background(
        &mut self,
        m: usize,
        k: usize,
        happens: impl FnOnce(&mut Contender<usize>, Context<'_>) -> Effects<usize>,
    ) {
        let ((), request) = self.event(m, k, |queue, cx| ((), happens(queue, cx)));
        if let Some(request) = request {
            self.job(m, Job::Request { k, request });
        }
    }

    /// Adds a line to the trace, if there is one.
    pub(super) fn note(&mut self, line: impl FnOnce(&Self) -> String) {
        if self.trace.is_some() {
            let line = format!("{:10.3} ms  {}", self.now as f64 / 1e6, line(self));
            if let Some(trace) = &mut self.trace {
                trace.push(line);
            }
        }
    }

    pub(super) fn take_trace(&mut self) -> Vec<String> {
        self.trace.take().unwrap_or_default()
    }
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        self.number == other.number
    }
}

impl Eq for Scheduled {}

impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Scheduled {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}
