//! The managers: what they send, and what the answers lead to.

use super::super::super::tally::{Tally, Vote, VoteState};
use super::super::super::tokens::TokenChoice;
use super::*;

const VALID_FOR: u64 = TTL - TTL / 100 - 2;
const RENEW_EVERY: u64 = 45;

pub(super) enum State {
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

pub(super) struct ManagerModel {
    pub(super) id: ManagerId,
    pub(super) state: State,
    /// Answers to earlier requests are ignored.
    pub(super) stage: u64,
}

impl World {
    /// Sends a request to these nodes, as the manager's next stage.
    fn ask(&mut self, manager: usize, nodes: impl Iterator<Item = usize>, cycle: Cycle, request: Request) {
        self.managers[manager].stage += 1;
        let stage = self.managers[manager].stage;
        for node in nodes {
            self.send(node, manager, stage, cycle, request);
        }
        self.after(PATIENCE, Event::GiveUp { manager, stage });
    }

    pub(super) fn wake(&mut self, manager: usize, due: Option<Cycle>) {
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
    pub(super) fn release(&mut self, manager: usize, cycle: Cycle) {
        self.promises.end(cycle);
        self.managers[manager].state = State::Idle;
        self.managers[manager].stage += 1;
        for node in 0..self.nodes.len() {
            self.send(node, manager, 0, cycle, Request::Release);
        }
        let pause = self.rng.random_range(0..30);
        self.after(pause, Event::Wake { manager, cycle: None });
    }

    pub(super) fn on_answer(&mut self, node: usize, manager: usize, reply: Reply) -> Result<(), String> {
        match self.managers[manager].state {
            State::Idle => {}
            State::Asking { cycle, sent_at } => self.on_try(node, manager, (cycle, sent_at), reply),
            State::Claiming { .. } => self.on_claim(node, manager, reply)?,
            State::Holding { .. } => self.on_renewal(node, manager, reply),
        }
        Ok(())
    }

    /// The sequencer's answer to a try.
    fn on_try(&mut self, node: usize, manager: usize, (cycle, sent_at): (Cycle, u64), reply: Reply) {
        let tokens = match reply {
            Reply::Tokens(tokens) if self.has_vote(node) => tokens,
            _ => return self.release(manager, cycle),
        };
        let count = self.nodes.len();
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

    fn on_claim(&mut self, node: usize, manager: usize, reply: Reply) -> Result<(), String> {
        let (has_vote, count, now) = (self.has_vote(node), self.nodes.len(), self.now);
        let State::Claiming {
            cycle,
            sent_at,
            tally,
            choice,
        } = &mut self.managers[manager].state
        else {
            return Ok(());
        };
        let (cycle, sent_at) = (*cycle, *sent_at);
        let state = tally.count(match reply {
            _ if !has_vote => Vote::Missing,
            Reply::Counter(counter) => Vote::Given { counter },
            _ => Vote::Refused,
        });
        match state {
            VoteState::Open => {}
            VoteState::Won(counter) if choice.is_final(counter) || self.flaw == Some(Flaw::KeepsTokens) => {
                let from = match self.flaw {
                    Some(Flaw::CountsFromVote) => now,
                    _ => sent_at,
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
        Ok(())
    }

    fn on_renewal(&mut self, node: usize, manager: usize, reply: Reply) {
        let (has_vote, now) = (self.has_vote(node), self.now);
        let State::Holding {
            cycle,
            until,
            renewal: Some((sent_at, tally)),
            ..
        } = &mut self.managers[manager].state
        else {
            return;
        };
        let cycle = *cycle;
        let state = tally.count(match reply {
            _ if !has_vote => Vote::Missing,
            Reply::Renewed => Vote::Given { counter: 0 },
            _ => Vote::Refused,
        });
        // A guard that has become invalid never becomes valid again.
        if matches!(state, VoteState::Won(_)) && now < *until {
            *until = (*until).max(*sent_at + VALID_FOR);
            self.promises.extend(cycle, *until);
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

    fn hold(&mut self, manager: usize, cycle: Cycle, tokens: TokenBlock, until: u64) -> Result<(), String> {
        let now = self.now;
        let beside = self.promises.hold(now, cycle, tokens, until)?;
        if cycle.mode().is_exclusive() {
            self.stats.writers += 1;
        } else {
            self.stats.readers += 1;
            self.stats.beside += u64::from(beside > 0);
        }
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
