//! Judges a history. The checker knows nothing about the library except its documented guarantees
//! and exclusions.
//!
//! | violation | what happened |
//! |---|---|
//! | `overlap` | two guards of a key were valid at the same time, each by its own reading |
//! | `same-token` | two acquisitions of a key had the same token |
//! | `token-order` | a later acquisition had a smaller token |
//! | `late-loss` | a guard was no longer valid, and `lost()` had not returned |
//! | `vanished` | a lease was deleted or taken on the server for no known reason |
//! | `ask-overdue` | a request did not end within its limit |
//! | `release-overdue` | a release did not end |
//! | `key-stuck` | a key without a holder was not granted to any of its waiters |
//! | `starved` | a request waited while hundreds of others were served, without any fault |
//! | `left-behind` | something was still on the servers, or running, after the end |
//!
//! `lost-in-health` is a lease that was not renewed in time, long after the last fault. It deserves
//! a look but is not a violation: on an overloaded machine servers may reply too late.

mod acquisitions;
mod exclusion;
mod excuses;
mod faults;
mod losses;
mod progress;
mod story;
#[cfg(test)]
mod tests;
mod tokens;

use std::collections::BTreeMap;

use acquisitions::{Acquisition, Outcome};
use excuses::Excuse;
use faults::Faults;

use crate::clock::{Nanos, SECOND};
use crate::history::{Event, Line};

pub(crate) use excuses::EXCUSES;
pub(crate) use faults::EVERYBODY;

/// What the checker needs to know about the round.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// The longest time that a lease remains on a server without a renewal.
    pub ttl: Nanos,
    /// Whether every replica must have a lease before the lease counts, so that no failover forgets
    /// it.
    pub is_confirmed: bool,
}

impl Terms {
    /// The time that a machine may take to run a task that is ready.
    const SLACK: Nanos = 4 * SECOND;
    /// The maximum delay of `lost()`.
    const LOSS_SLACK: Nanos = SECOND;

    /// The time after which a fault has no effect any more: the leases of dead holders have
    /// expired, and all waiters have retried.
    pub(crate) const fn settled(&self) -> Nanos {
        self.ttl + 4 * SECOND
    }
}

/// A violation, excused or not.
#[derive(Clone, Debug)]
pub(crate) struct Finding {
    pub(crate) violation: &'static str,
    pub(crate) at: Nanos,
    /// The time since which the problem must have existed.
    pub(crate) since: Nanos,
    pub(crate) key: Option<String>,
    pub(crate) words: String,
}

/// A finding with the surrounding lines of the history.
#[derive(Clone, Debug)]
pub(crate) struct Violation {
    pub(crate) finding: Finding,
    pub(crate) story: String,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Verdict {
    pub(crate) asked: u64,
    pub(crate) granted: u64,
    /// Failed requests, by reason.
    pub(crate) failed: BTreeMap<String, u64>,
    /// Losses, by reason.
    pub(crate) losses: BTreeMap<String, u64>,
    pub(crate) longest_wait: Nanos,
    /// By violation and excuse.
    pub(crate) excused: BTreeMap<(&'static str, &'static str), u64>,
    pub(crate) violations: Vec<Violation>,
    /// Findings that an overloaded machine explains as well as a bug.
    pub(crate) worth_a_look: Vec<Violation>,
}

impl Verdict {
    pub(crate) fn add(&mut self, other: Self) {
        self.asked += other.asked;
        self.granted += other.granted;
        self.longest_wait = self.longest_wait.max(other.longest_wait);
        self.violations.extend(other.violations);
        self.worth_a_look.extend(other.worth_a_look);
        for (why, count) in other.failed {
            *self.failed.entry(why).or_default() += count;
        }
        for (reason, count) in other.losses {
            *self.losses.entry(reason).or_default() += count;
        }
        for (what, count) in other.excused {
            *self.excused.entry(what).or_default() += count;
        }
    }

    pub(crate) fn count_excused(&self, violation: &str) -> u64 {
        let of_it = self.excused.iter().filter(|((found, _), _)| *found == violation);
        of_it.map(|(_, count)| count).sum()
    }
}

/// The lines must be sorted by time.
pub(crate) fn check(lines: &[Line], terms: Terms) -> Verdict {
    let faults = Faults::of(lines);
    let acquisitions = acquisitions::collect(lines);
    let mut verdict = count(&acquisitions);
    let mut findings = Vec::new();
    let mut by_key: BTreeMap<&str, Vec<&Acquisition>> = BTreeMap::new();
    for acquisition in &acquisitions {
        by_key.entry(&acquisition.key).or_default().push(acquisition);
    }
    for of_key in by_key.values() {
        exclusion::check(of_key, &mut findings);
        tokens::check(of_key, &mut findings);
        progress::check_key(of_key, &faults, terms, &mut findings);
    }
    losses::check(&acquisitions, &faults, terms, &mut findings);
    progress::check(&acquisitions, lines, &faults, &mut findings);
    for line in lines {
        if let Event::Left { what } = &line.event {
            findings.push(Finding {
                violation: "left-behind",
                at: line.at,
                since: line.at,
                key: None,
                words: what.clone(),
            });
        }
    }
    findings.sort_by_key(|finding| finding.at);
    for finding in findings {
        match Excuse::of(&finding, &faults, terms) {
            Some(excuse) => *verdict.excused.entry((finding.violation, excuse.name)).or_default() += 1,
            None => {
                let found = match finding.violation {
                    "lost-in-health" => &mut verdict.worth_a_look,
                    _ => &mut verdict.violations,
                };
                found.push(Violation {
                    story: story::render(&finding, lines),
                    finding,
                });
            }
        }
    }
    verdict
}

fn count(acquisitions: &[Acquisition]) -> Verdict {
    let mut verdict = Verdict {
        asked: acquisitions.len() as u64,
        ..Verdict::default()
    };
    for acquisition in acquisitions {
        match &acquisition.outcome {
            Some(Outcome::Granted(hold)) => {
                verdict.granted += 1;
                verdict.longest_wait = verdict.longest_wait.max(hold.at - acquisition.asked);
                if let Some((_, reason)) = &hold.loss_reported {
                    *verdict.losses.entry(reason.clone()).or_default() += 1;
                }
            }
            Some(Outcome::Failed { why, .. }) => *verdict.failed.entry(why.clone()).or_default() += 1,
            None => {}
        }
    }
    verdict
}
