//! Judges a history. It knows nothing of the library: only what the documents promise, and what they exclude.
//!
//! | violation | what happened |
//! |---|---|
//! | `overlap` | two guards of a key were valid at the same time, each by its own reading |
//! | `same-token` | two acquisitions of a key had one token |
//! | `token-order` | a later acquisition had a smaller token |
//! | `late-loss` | a guard was no longer valid, and `lost()` had not returned |
//! | `vanished` | a lease was deleted or taken on the server, and nothing that happened explains it |
//! | `ask-overdue` | a request did not end within its limit |
//! | `release-overdue` | a release did not end |
//! | `key-stuck` | a key that nobody held was granted to none of those who waited |
//! | `starved` | a request waited while hundreds of others were served, although nothing had happened |
//! | `left-behind` | something was still on the servers, or running, after the end |
//!
//! `lost-in-health`, a lease that was not renewed in time although nothing had happened for long, is worth a look and no
//! violation: servers that get too little of an overloaded machine answer too late.

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

use super::clock::{Nanos, SECOND};
use super::history::{Event, Line};

pub use excuses::EXCUSES;
pub use faults::EVERYBODY;

/// What the checker has to know of the round.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// How long a lease lasts on a server without being renewed, at most.
    pub ttl: Nanos,
    /// Whether every replica has a lease before it counts, so that no failover forgets one.
    pub is_confirmed: bool,
}

impl Terms {
    /// How long a machine may take to run what is ready to run.
    const SLACK: Nanos = 4 * SECOND;
    /// How late `lost()` may return.
    const LOSS_SLACK: Nanos = SECOND;

    /// After this, nothing of a fault has any effect: leases of the dead have ended, everybody who waits has looked again.
    pub const fn settled(&self) -> Nanos {
        self.ttl + 4 * SECOND
    }
}

/// What is wrong, or was found and is excused.
#[derive(Clone, Debug)]
pub struct Finding {
    pub violation: &'static str,
    pub at: Nanos,
    /// Since when it must have been going on.
    pub since: Nanos,
    pub key: Option<String>,
    pub words: String,
}

/// A finding with the lines of the history around it.
#[derive(Clone, Debug)]
pub struct Violation {
    pub finding: Finding,
    pub story: String,
}

#[derive(Clone, Debug, Default)]
pub struct Verdict {
    pub asked: u64,
    pub granted: u64,
    /// Requests without a guard, by the reason.
    pub failed: BTreeMap<String, u64>,
    /// Losses, by the reason.
    pub told: BTreeMap<String, u64>,
    pub longest_wait: Nanos,
    /// By violation and excuse.
    pub excused: BTreeMap<(&'static str, &'static str), u64>,
    pub violations: Vec<Violation>,
    /// What an overloaded machine explains as well as a fault of ours.
    pub worth_a_look: Vec<Violation>,
}

impl Verdict {
    pub fn add(&mut self, other: Self) {
        self.asked += other.asked;
        self.granted += other.granted;
        self.longest_wait = self.longest_wait.max(other.longest_wait);
        self.violations.extend(other.violations);
        self.worth_a_look.extend(other.worth_a_look);
        for (why, count) in other.failed {
            *self.failed.entry(why).or_default() += count;
        }
        for (reason, count) in other.told {
            *self.told.entry(reason).or_default() += count;
        }
        for (what, count) in other.excused {
            *self.excused.entry(what).or_default() += count;
        }
    }

    pub fn count_excused(&self, violation: &str) -> u64 {
        let of_it = self.excused.iter().filter(|((found, _), _)| *found == violation);
        of_it.map(|(_, count)| count).sum()
    }
}

/// The lines have to be in the order of time.
pub fn check(lines: &[Line], terms: Terms) -> Verdict {
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
                    story: story::tell(&finding, lines),
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
                if let Some((_, reason)) = &hold.told {
                    *verdict.told.entry(reason.clone()).or_default() += 1;
                }
            }
            Some(Outcome::Failed { why, .. }) => *verdict.failed.entry(why.clone()).or_default() += 1,
            None => {}
        }
    }
    verdict
}
