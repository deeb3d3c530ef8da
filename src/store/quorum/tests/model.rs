//! The protocol of a quorum in virtual time: nodes that restart, messages that are late, overtake
//! each other or get lost, and managers that disagree about the sequencer. The nodes are the
//! reference of the scripts; votes are counted and tokens chosen by production code. The managers
//! are written anew, and have no queue: a request is a single try.
//!
//! Deliberate flaws show that the runs are able to find mistakes.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::super::tally::{Tally, Vote, VoteState};
use super::super::tokens::TokenChoice;
use super::*;
use crate::store::memory::{MemoryCore, Terms};
use crate::store::redis::claim::{ClaimKind, Claimed};

/// All times are in milliseconds.
const TTL: u64 = 100;
const VALID_FOR: u64 = TTL - TTL / 100 - 2;
/// How long a manager waits for nodes.
const PATIENCE: u64 = 40;
const RENEW_EVERY: u64 = 45;
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

enum State {
    Idle,
    Asking {
        cycle: Cycle,
        sent_at: u64,
    },
    Claiming {
        cycle: Cycle,
        sent_at: u64,
        tally: Tally,
        choice: TokenChoice,
    },
    Holding {
        cycle: Cycle,
        until: u64,
        ends: u64,
        renewal: Option<(u64, Tally)>,
    },
}

struct ManagerModel {
    id: ManagerId,
    state: State,
    /// Answers to earlier requests are ignored.
    stage: u64,
}

/// A guard that was given out.
struct Given {
    cycle: Cycle,
    until: u64,
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
    held: Vec<Given>,
    last_written: u64,
    largest: u64,
    blocks: Vec<TokenBlock>,
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
            held: Vec::new(),
            last_written: 0,
            largest: 0,
            blocks: Vec::new(),
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

    /// Sends a request to these nodes, as the manager's next stage.
    fn ask(&mut self, manager: usize, nodes: impl Iterator<Item = usize>, cycle: Cycle, request: Request) {
        self.managers[manager].stage += 1;
        let stage = self.managers[manager].stage;
        for node in nodes {
            self.send(node, manager, stage, cycle, request);
        }
        self.after(PATIENCE, Event::GiveUp { manager, stage });
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

    fn wake(&mut self, manager: usize, due: Option<Cycle>) {
        let now = self.now;
        let count = self.nodes.len();
        match &mut self.managers[manager].state {
            State::Idle if due.is_none() => {
                let number = (self.numbers + 1) * 2;
                let mode = match self.rng.random_bool(self.readers) {
                    true => LockMode::Shared,
                    false => LockMode::Exclusive,
                };
                let cycle = Cycle::parse(&format!("{}{}", Cycle::of(number), mode.suffix())).unwrap();
                self.managers[manager].state = State::Asking { cycle, sent_at: now };
                // Managers disagree.
                let sequencer = self.rng.random_range(0..count);
                self.ask(manager, std::iter::once(sequencer), cycle, Request::Acquire);
            }
            State::Holding {
                cycle,
                until,
                ends,
                renewal,
            } if due == Some(*cycle) => {
                let cycle = *cycle;
                if now >= *ends || now >= *until {
                    self.stats.lost += u64::from(now < *ends);
                    self.release(manager, cycle);
                } else {
                    *renewal = Some((now, Tally::new(count)));
                    let pause = RENEW_EVERY.min(*until - now).min(*ends - now);
                    self.ask(manager, 0..count, cycle, Request::Renew);
                    let cycle = Some(cycle);
                    self.after(pause, Event::Wake { manager, cycle });
                }
            }
            _ => {}
        }
    }

    /// Ends a cycle, whether it held the lease or not.
    fn release(&mut self, manager: usize, cycle: Cycle) {
        self.held.retain(|given| given.cycle != cycle);
        self.managers[manager].state = State::Idle;
        self.managers[manager].stage += 1;
        for node in 0..self.nodes.len() {
            self.send(node, manager, 0, cycle, Request::Release);
        }
        let pause = self.rng.random_range(0..30);
        self.after(pause, Event::Wake { manager, cycle: None });
    }

    fn on_answer(&mut self, node: usize, manager: usize, reply: Reply) -> Result<(), String> {
        let (has_vote, count, now) = (self.has_vote(node), self.nodes.len(), self.now);
        match &mut self.managers[manager].state {
            State::Idle => {}
            State::Asking { cycle, sent_at } => {
                let (cycle, sent_at) = (*cycle, *sent_at);
                let Reply::Tokens(tokens) = reply else {
                    self.release(manager, cycle);
                    return Ok(());
                };
                if !has_vote {
                    self.release(manager, cycle);
                    return Ok(());
                }
                let mode = match self.flaw {
                    Some(Flaw::ChoosesOnce) => LockMode::Exclusive,
                    _ => cycle.mode(),
                };
                let mut tally = Tally::new(count);
                tally.count(Vote::Given { counter: 0 });
                self.managers[manager].state = State::Claiming {
                    cycle,
                    sent_at,
                    tally,
                    choice: TokenChoice::new(mode, tokens, TOKENS),
                };
                let request = Request::Claim {
                    kind: ClaimKind::Take,
                    at_least: tokens.last(),
                };
                self.ask(manager, (0..count).filter(|&other| other != node), cycle, request);
            }
            State::Claiming {
                cycle,
                sent_at,
                tally,
                choice,
            } => {
                let (cycle, sent_at) = (*cycle, *sent_at);
                let state = tally.count(match reply {
                    _ if !has_vote => Vote::Missing,
                    Reply::Counter(counter) => Vote::Given { counter },
                    _ => Vote::Refused,
                });
                match state {
                    VoteState::Open => {}
                    VoteState::Won(counter) if choice.is_final(counter) || self.flaw == Some(Flaw::KeepsTokens) => {
                        let from = if self.flaw == Some(Flaw::CountsFromVote) {
                            now
                        } else {
                            sent_at
                        };
                        let (tokens, until) = (choice.tokens, from + VALID_FOR);
                        if until <= now {
                            self.release(manager, cycle);
                        } else {
                            self.hold(manager, cycle, tokens, until)?;
                        }
                    }
                    VoteState::Won(counter) => {
                        self.stats.choices[usize::from(!cycle.mode().is_exclusive())] += 1;
                        *tally = Tally::new(count);
                        let rng = &mut self.rng;
                        let at_least = choice.next(counter, |range| rng.random_range(range)).last();
                        let kind = ClaimKind::Take;
                        self.ask(manager, 0..count, cycle, Request::Claim { kind, at_least });
                    }
                    VoteState::Lost { .. } => self.release(manager, cycle),
                }
            }
            State::Holding {
                cycle, until, renewal, ..
            } => {
                let cycle = *cycle;
                let Some((sent_at, tally)) = renewal else { return Ok(()) };
                let (sent_at, state) = (
                    *sent_at,
                    tally.count(match reply {
                        _ if !has_vote => Vote::Missing,
                        Reply::Renewed => Vote::Given { counter: 0 },
                        _ => Vote::Refused,
                    }),
                );
                // A guard that has become invalid never becomes valid again.
                if matches!(state, VoteState::Won(_)) && now < *until {
                    *until = (*until).max(sent_at + VALID_FOR);
                    let until = *until;
                    let given = self.held.iter_mut().find(|given| given.cycle == cycle);
                    given.unwrap().until = until;
                    self.stats.renewals += 1;
                }
                // Brings the lease back to a node that lacks it. This may arrive after the release.
                if matches!(reply, Reply::Refused) {
                    let request = Request::Claim {
                        kind: ClaimKind::Take,
                        at_least: 0,
                    };
                    self.send(node, manager, 0, cycle, request);
                }
            }
        }
        Ok(())
    }

    /// The manager has the key: checks all that was promised.
    fn hold(&mut self, manager: usize, cycle: Cycle, tokens: TokenBlock, until: u64) -> Result<(), String> {
        let now = self.now;
        self.held.retain(|given| given.until > now);
        let is_writer = cycle.mode().is_exclusive();
        let beside = self
            .held
            .iter()
            .find(|given| is_writer || given.cycle.mode().is_exclusive());
        if let Some(beside) = beside {
            return Err(format!("at {now}, {cycle} has the key beside {}", beside.cycle));
        }
        let least = if is_writer { self.largest } else { self.last_written };
        if tokens.first() <= least {
            return Err(format!("at {now}, {cycle} has the tokens {tokens:?} after {least}"));
        }
        let overlaps = |block: &&TokenBlock| block.first() <= tokens.last() && tokens.first() <= block.last();
        if let Some(other) = self.blocks.iter().find(overlaps) {
            return Err(format!("at {now}, {cycle} has the tokens {tokens:?} beside {other:?}"));
        }
        self.blocks.push(tokens);
        self.largest = self.largest.max(tokens.last());
        if is_writer {
            self.last_written = tokens.last();
            self.stats.writers += 1;
        } else {
            self.stats.readers += 1;
            self.stats.beside += u64::from(!self.held.is_empty());
        }
        self.held.push(Given { cycle, until });
        let ends = now + self.rng.random_range(0..2 * TTL);
        self.managers[manager].state = State::Holding {
            cycle,
            until,
            ends,
            renewal: None,
        };
        self.managers[manager].stage += 1;
        let pause = RENEW_EVERY.min(until - now).min(ends - now);
        let cycle = Some(cycle);
        self.after(pause, Event::Wake { manager, cycle });
        Ok(())
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
