//! Counting votes. Sends nothing, so every case can be tested.

/// The vote of one node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Vote {
    /// The lease is ours; the node's counter was this.
    Given { counter: u64 },
    /// The lease is not ours.
    Refused,
    /// No answer will come, or one that does not count.
    Missing,
}

/// The state of a vote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum VoteState {
    Open,
    /// A majority gave its vote; the largest of their counters.
    Won(u64),
    /// A majority is impossible. If a node refused, others may hold what is missing.
    Lost {
        refused: bool,
    },
}

/// The votes of `nodes` nodes.
#[derive(Debug)]
pub(super) struct Tally {
    nodes: usize,
    given: usize,
    refused: usize,
    missing: usize,
    counter: u64,
}

/// More than half, so that any two majorities share a node.
pub(super) const fn majority(nodes: usize) -> usize {
    nodes / 2 + 1
}

/// Whether the nodes without these `others` are still a majority of all.
pub(super) const fn is_majority_without(others: usize, nodes: usize) -> bool {
    nodes - others >= majority(nodes)
}

impl Tally {
    pub(super) const fn new(nodes: usize) -> Self {
        Self {
            nodes,
            given: 0,
            refused: 0,
            missing: 0,
            counter: 0,
        }
    }

    pub(super) fn count(&mut self, vote: Vote) -> VoteState {
        match vote {
            Vote::Given { counter } => {
                self.given += 1;
                self.counter = self.counter.max(counter);
            }
            Vote::Refused => self.refused += 1,
            Vote::Missing => self.missing += 1,
        }
        self.state()
    }

    /// Whether the refusals alone make a majority impossible.
    pub(super) const fn is_refused(&self) -> bool {
        self.nodes - self.refused < majority(self.nodes)
    }

    pub(super) const fn state(&self) -> VoteState {
        let needed = majority(self.nodes);
        if self.given >= needed {
            VoteState::Won(self.counter)
        } else if self.nodes - self.refused - self.missing < needed {
            VoteState::Lost {
                refused: self.refused > 0,
            }
        } else {
            VoteState::Open
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn majority_stays_one_without_a_minority() {
        let most = |nodes| (0..nodes).rfind(|&others| is_majority_without(others, nodes));
        assert_eq!([3, 4, 5, 15].map(most), [Some(1), Some(1), Some(2), Some(7)]);
        assert!(!is_majority_without(3, 5) && !is_majority_without(5, 5));
    }

    /// A vote is decided as soon as no vote to come can change it.
    fn assert_decided_in_time(tally: &Tally, votes: &[Vote], nodes: usize) {
        let to_come = nodes - votes.len();
        let count = |is_it: fn(&Vote) -> bool| votes.iter().filter(|vote| is_it(vote)).count();
        let given = count(|vote| matches!(vote, Vote::Given { .. }));
        let refused = count(|vote| *vote == Vote::Refused);
        let is_open = given * 2 <= nodes && (given + to_come) * 2 > nodes;
        assert_eq!(tally.state() == VoteState::Open, is_open, "{votes:?}");
        assert_eq!(tally.is_refused(), (nodes - refused) * 2 <= nodes, "{votes:?}");
    }

    /// Every combination of votes for 3 to 7 nodes, in every distinct order.
    #[test]
    fn a_vote_is_won_exactly_if_a_majority_gave_it() {
        for nodes in 3..=7_usize {
            for code in 0..3_usize.pow(u32::try_from(nodes).unwrap()) {
                let votes: Vec<Vote> = (0..nodes)
                    .map(|node| match code / 3_usize.pow(u32::try_from(node).unwrap()) % 3 {
                        0 => Vote::Given { counter: node as u64 },
                        1 => Vote::Refused,
                        _ => Vote::Missing,
                    })
                    .collect();
                let mut tally = Tally::new(nodes);
                let given = votes.iter().filter(|vote| matches!(vote, Vote::Given { .. })).count();
                for (counted, &vote) in votes.iter().enumerate() {
                    tally.count(vote);
                    assert_decided_in_time(&tally, &votes[..=counted], nodes);
                }
                match tally.state() {
                    VoteState::Won(counter) => {
                        assert!(given * 2 > nodes);
                        let largest = votes.iter().filter_map(|vote| match vote {
                            Vote::Given { counter } => Some(*counter),
                            _ => None,
                        });
                        assert_eq!(Some(counter), largest.max());
                    }
                    VoteState::Lost { refused } => {
                        assert!(given * 2 <= nodes);
                        assert_eq!(refused, votes.contains(&Vote::Refused));
                    }
                    VoteState::Open => panic!("all have voted: {votes:?}"),
                }
            }
        }
    }
}
