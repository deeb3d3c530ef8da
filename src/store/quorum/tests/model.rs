//! The protocol of a quorum in virtual time: nodes that restart, messages that are late, overtake
//! each other or get lost, and managers that disagree about the sequencer. The nodes are the
//! reference of the scripts; votes are counted and tokens chosen by production code. The managers
//! are written anew, and have no queue: a request is a single try.
//!
//! Deliberate flaws show that the runs are able to find mistakes.

mod managers;
mod promises;

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use managers::{ManagerModel, State};
use promises::Promises;

use super::*;
use crate::store::memory::{MemoryCore, Terms};
use crate::store::redis::claim::{ClaimKind, Claimed};

/// All times are in milliseconds.
const TTL: u64 = 100;
/// How long a manager waits for nodes.
const PATIENCE: u64 = 40;
const END: u64 = 3_000;
const MANAGERS: usize = 4;
const TOKENS: u32 = 4;
const SEEDS: u64 = 40;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flaw {
    /// A node votes although it may have forgotten leases.
    VotesAfterRestart,
    /// The validity of a lease counts from the last vote.
    CountsFromVote,
    /// The tokens of the sequencer are used whatever the other nodes report.
    KeepsTokens,
    /// A reader chooses tokens above the counters once, as a writer does.
    ChoosesOnce,
}

#[derive(Debug, Clone, Copy)]
enum Request {
    Acquire,
    Claim { kind: ClaimKind, at_least: u64 },
    Renew,
    Release,
}

#[derive(Debug, Clone, Copy)]
enum Reply {
    Tokens(TokenBlock),
    Counter(u64),
    Renewed,
    Refused,
}

#[derive(Debug, Clone, Copy)]
enum Event {
    /// A request arrives at a node. The answer is for this stage of the manager.
    Arrive {
        node: usize,
        manager: usize,
        stage: u64,
        cycle: Cycle,
        request: Request,
    },
    Answer {
        node: usize,
        /// How often the node had restarted when it executed the request.
        restarts: u64,
        manager: usize,
        stage: u64,
        reply: Reply,
    },
    /// Nothing more is waited for in this stage.
    GiveUp {
        manager: usize,
        stage: u64,
    },
    /// The manager does the next thing by itself.
    Wake {
        manager: usize,
        cycle: Option<Cycle>,
    },
    Restart {
        node: usize,
    },
}

struct NodeModel {
    core: MemoryCore,
    restarts: u64,
    votes_from: u64,
    floor: u64,
}

#[derive(Debug, Default)]
struct Stats {
    writers: u64,
    readers: u64,
    /// Readers that had the key beside another one.
    beside: u64,
    /// Further choices of tokens, by writers and by readers.
    choices: [u64; 2],
    renewals: u64,
    lost: u64,
    restarts: u64,
}

struct World {
    rng: SmallRng,
    flaw: Option<Flaw>,
    /// How many of the requests are those of readers. Few writers win against many.
    readers: f64,
    now: u64,
    events: BinaryHeap<Reverse<(u64, u64)>>,
    /// By number, so that the heap holds only times and numbers.
    pending: HashMap<u64, Event>,
    numbers: u64,
    nodes: Vec<NodeModel>,
    managers: Vec<ManagerModel>,
    key: LockKey,
    promises: Promises,
    stats: Stats,
}

impl World {
    fn new(seed: u64, flaw: Option<Flaw>) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let count = if rng.random_bool(0.7) { 3 } else { 5 };
        let readers = [0.0, 0.3, 0.7][rng.random_range(0..3)];
        let node = |_| NodeModel {
            core: MemoryCore::default(),
            restarts: 0,
            votes_from: 0,
            floor: server_time(0),
        };
        let manager = |index| ManagerModel {
            id: ManagerId::of("h", 1, index as u64),
            state: State::Idle,
            stage: 0,
        };
        let mut world = Self {
            nodes: (0..count).map(node).collect(),
            managers: (0..MANAGERS).map(manager).collect(),
            rng,
            flaw,
            readers,
            now: 0,
            events: BinaryHeap::new(),
            pending: HashMap::new(),
            numbers: 0,
            key: key(),
            promises: Promises::default(),
            stats: Stats::default(),
        };
        for manager in 0..MANAGERS {
            let at = world.rng.random_range(0..20);
            world.after(at, Event::Wake { manager, cycle: None });
        }
        if world.rng.random_bool(0.7) {
            world.plan_restart();
        }
        world
    }

    fn after(&mut self, pause: u64, event: Event) {
        self.numbers += 1;
        self.pending.insert(self.numbers, event);
        self.events.push(Reverse((self.now + pause, self.numbers)));
    }

    /// One node at a time, and the next one only when all votes are back, or nearly so.
    fn plan_restart(&mut self) {
        let (node, pause) = (
            self.rng.random_range(0..self.nodes.len()),
            self.rng.random_range(50..3 * TTL),
        );
        self.after(pause, Event::Restart { node });
    }

    /// How long a message takes; `None` if it is lost.
    fn delay(&mut self) -> Option<u64> {
        match self.rng.random_range(0..100) {
            0..10 => None,
            10..16 => Some(self.rng.random_range(0..3 * TTL)),
            _ => Some(self.rng.random_range(0..8)),
        }
    }

    fn run(mut self) -> Result<Stats, String> {
        while let Some(Reverse((at, number))) = self.events.pop().filter(|Reverse((at, _))| *at < END) {
            self.now = at;
            let event = self.pending.remove(&number).unwrap();
            self.apply(event)?;
        }
        Ok(self.stats)
    }

    fn apply(&mut self, event: Event) -> Result<(), String> {
        match event {
            Event::Arrive {
                node,
                manager,
                stage,
                cycle,
                request,
            } => {
                let reply = self.execute(node, manager, cycle, request);
                let restarts = self.nodes[node].restarts;
                if let Some(delay) = self.delay() {
                    let answer = Event::Answer {
                        node,
                        restarts,
                        manager,
                        stage,
                        reply,
                    };
                    self.after(delay, answer);
                }
            }
            Event::Answer {
                node,
                restarts,
                manager,
                stage,
                reply,
            } => {
                // A restart closes the connection.
                if restarts == self.nodes[node].restarts && stage == self.managers[manager].stage {
                    self.on_answer(node, manager, reply)?;
                }
            }
            Event::GiveUp { manager, stage } => {
                if stage == self.managers[manager].stage {
                    match &mut self.managers[manager].state {
                        State::Holding { renewal, .. } => *renewal = None,
                        State::Idle => {}
                        State::Asking { cycle, .. } | State::Claiming { cycle, .. } => {
                            let cycle = *cycle;
                            self.release(manager, cycle);
                        }
                    }
                }
            }
            Event::Wake { manager, cycle } => self.wake(manager, cycle),
            Event::Restart { node } => {
                let now = self.now;
                let restarted = &mut self.nodes[node];
                restarted.core = MemoryCore::default();
                restarted.restarts += 1;
                restarted.votes_from = now + TTL + 1;
                restarted.floor = server_time(now);
                self.stats.restarts += 1;
                self.plan_restart();
            }
        }
        Ok(())
    }

    /// What a node does with a request.
    fn execute(&mut self, node: usize, manager: usize, cycle: Cycle, request: Request) -> Reply {
        let me = self.managers[manager].id.owner_tag(cycle).to_string();
        let now = Moment::from_nanos(self.now * 1_000_000);
        let node = &mut self.nodes[node];
        let terms = Terms {
            now,
            server_time: server_time(self.now),
            ttl: Duration::from_millis(TTL),
            tokens: TOKENS,
            floor: node.floor,
        };
        match request {
            Request::Acquire => match node.core.acquire(&self.key, &me, true, terms) {
                AcquireReply::Granted { tokens, .. } => Reply::Tokens(tokens),
                _ => Reply::Refused,
            },
            Request::Claim { kind, at_least } => match node.core.claim(&self.key, &me, kind, at_least, terms) {
                Claimed::Ours { counter } => Reply::Counter(counter),
                Claimed::Refused => Reply::Refused,
            },
            Request::Renew => match node.core.renew(&self.key, &me, now, terms.ttl) {
                RenewReply::Extended { .. } => Reply::Renewed,
                RenewReply::NotOurs => Reply::Refused,
            },
            Request::Release => {
                node.core.release(&self.key, &me, None, terms);
                Reply::Refused
            }
        }
    }

    fn send(&mut self, node: usize, manager: usize, stage: u64, cycle: Cycle, request: Request) {
        if let Some(delay) = self.delay() {
            let arrive = Event::Arrive {
                node,
                manager,
                stage,
                cycle,
                request,
            };
            self.after(delay, arrive);
        }
    }

    fn has_vote(&self, node: usize) -> bool {
        self.flaw == Some(Flaw::VotesAfterRestart) || self.nodes[node].votes_from <= self.now
    }
}

/// A server's clock as a token.
fn server_time(now: u64) -> u64 {
    1_000_000_000 + now * 8_000
}

#[test]
fn nobody_has_a_key_beside_a_writer_and_all_tokens_differ() {
    let mut sum = Stats::default();
    for seed in 0..SEEDS {
        let stats = World::new(seed, None)
            .run()
            .unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        sum.writers += stats.writers;
        sum.readers += stats.readers;
        sum.beside += stats.beside;
        sum.choices = [sum.choices[0] + stats.choices[0], sum.choices[1] + stats.choices[1]];
        sum.renewals += stats.renewals;
        sum.lost += stats.lost;
        sum.restarts += stats.restarts;
    }
    println!("{SEEDS} runs: {sum:?}");
    let Stats {
        writers,
        readers,
        beside,
        choices,
        renewals,
        lost,
        restarts,
    } = sum;
    for (count, what) in [
        (writers, "writers"),
        (readers, "readers"),
        (beside, "readers together"),
        (choices[0], "further choices of writers"),
        (choices[1], "further choices of readers"),
        (renewals, "renewals"),
        (lost, "losses"),
        (restarts, "restarts"),
    ] {
        assert!(count > SEEDS / 4, "too few {what}: {count}");
    }
}

#[test]
fn runs_find_each_deliberate_flaw() {
    for flaw in [
        Flaw::VotesAfterRestart,
        Flaw::CountsFromVote,
        Flaw::KeepsTokens,
        Flaw::ChoosesOnce,
    ] {
        let found = (0..20 * SEEDS).find(|&seed| World::new(seed, Some(flaw)).run().is_err());
        assert!(found.is_some(), "no run finds {flaw:?}");
    }
}
