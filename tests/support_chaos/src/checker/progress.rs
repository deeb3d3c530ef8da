//! No request or key is stuck.

use std::collections::{HashMap, HashSet};

use super::acquisitions::Acquisition;
use super::faults::Faults;
use super::{Finding, Terms};
use crate::clock::Nanos;
use crate::history::{Event, Line};

/// Checks that requests and releases end.
pub(super) fn check(acquisitions: &[Acquisition], lines: &[Line], faults: &Faults, findings: &mut Vec<Finding>) {
    let mut last_seen: HashMap<&str, Nanos> = HashMap::new();
    let mut has_ended: HashSet<&str> = HashSet::new();
    let end = lines.last().map_or(0, |line| line.at);
    for line in lines {
        last_seen.insert(&line.who, line.at);
        if line.event == Event::Down {
            has_ended.insert(&line.who);
        }
    }
    for acquisition in acquisitions {
        let who = acquisition.who.as_str();
        // A killed process was last seen at its last line. In a process that has ended, nothing may
        // still be running.
        let seen = match has_ended.contains(who) {
            true => end,
            false => last_seen[who],
        };
        let mut overdue = |violation, from: Nanos, to: Option<Nanos>, limit: Nanos| {
            let to = to.unwrap_or(seen);
            let lasted = to.saturating_sub(from);
            let still = faults.still(who, from, to);
            if lasted > limit + Terms::SLACK + still {
                findings.push(Finding {
                    violation,
                    at: to,
                    since: from,
                    key: Some(acquisition.key.clone()),
                    words: format!(
                        "{} took {} ms, {} ms of which its process was stopped; its limit is {} ms",
                        acquisition.name(),
                        lasted / 1_000_000,
                        still / 1_000_000,
                        limit / 1_000_000
                    ),
                });
            }
        };
        overdue(
            "ask-overdue",
            acquisition.asked,
            acquisition.answered(),
            acquisition.limit,
        );
        if let Some(hold) = acquisition.hold()
            && let Some(ending) = hold.ending
        {
            overdue("release-overdue", ending, hold.ended.as_ref().map(|(at, _)| *at), 0);
        }
    }
}

/// The maximum number of grants to others before a waiter is served: processes take turns, and each
/// passes the lock on 64 times locally.
const BEFORE_MAX: usize = 500;

/// Checks that a key with waiters is granted, and not always to others.
pub(super) fn check_key(of_key: &[&Acquisition], faults: &Faults, terms: Terms, findings: &mut Vec<Finding>) {
    let mut grants: Vec<Nanos> = of_key.iter().filter_map(|one| Some(one.hold()?.at)).collect();
    grants.sort_unstable();
    for acquisition in of_key {
        let Some(answered) = acquisition.answered() else {
            continue;
        };
        let before = |time: Nanos| grants.partition_point(|&at| at < time);
        let others = before(answered) - before(acquisition.asked);
        if others > BEFORE_MAX && faults.none_between(acquisition.asked, answered, terms.settled()) {
            findings.push(Finding {
                violation: "starved",
                at: answered,
                since: acquisition.asked,
                key: Some(acquisition.key.clone()),
                words: format!("{others} requests were served before {}", acquisition.name()),
            });
        }
    }
    // Changes in the number of waiters and of holders.
    let mut changes: Vec<(Nanos, i64, i64)> = Vec::new();
    for acquisition in of_key {
        // Tries do not wait.
        if acquisition.limit > 0
            && let Some(answered) = acquisition.answered()
        {
            changes.push((acquisition.asked, 1, 0));
            changes.push((answered, -1, 0));
        }
        if let Some(hold) = acquisition.hold() {
            changes.push((hold.at, 0, 1));
            changes.push((hold.ending.unwrap_or(hold.until()).max(hold.until()), 0, -1));
        }
    }
    changes.sort_by_key(|(at, ..)| *at);
    let (mut waiting, mut holding, mut idle_since) = (0, 0, None);
    for (at, waits, holds) in changes {
        let was_idle = waiting > 0 && holding == 0;
        (waiting, holding) = (waiting + waits, holding + holds);
        let is_idle = waiting > 0 && holding == 0;
        match (was_idle, is_idle) {
            (false, true) => idle_since = Some(at),
            (true, false) => {
                let since = idle_since.take().unwrap_or(at);
                // An abandoned lease may have to expire first.
                let within = terms.ttl + Terms::SLACK;
                if at - since > within && faults.none_between(at - within, at, terms.settled()) {
                    findings.push(Finding {
                        violation: "key-stuck",
                        at,
                        since,
                        key: Some(of_key[0].key.clone()),
                        words: format!("had waiters and no holder for {} ms", (at - since) / 1_000_000),
                    });
                }
            }
            _ => {}
        }
    }
}
