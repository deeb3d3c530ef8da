//! Tokens increase in the order of the grants.
//!
//! The exact time of a grant is only known to lie between the request and the guard. Two
//! acquisitions are therefore compared if one had its guard before the other was requested, or if
//! both were valid, one after the other.

use std::collections::HashMap;

use super::Finding;
use super::acquisitions::{Acquisition, Hold, Outcome};

pub(super) fn check(of_key: &[&Acquisition], findings: &mut Vec<Finding>) {
    let granted: Vec<(&Acquisition, &Hold)> = of_key.iter().filter_map(|one| Some((*one, one.hold()?))).collect();
    check_unique(&granted, findings);
    check_asked_after(&granted, findings);
    check_valid(&granted, findings);
    for acquisition in of_key {
        if let Some(Outcome::Failed { at, why }) = &acquisition.outcome
            && why == "token-regression"
        {
            findings.push(Finding {
                violation: "token-order",
                at: *at,
                since: acquisition.asked,
                key: Some(acquisition.key.clone()),
                words: format!("{} was issued a smaller token", acquisition.name()),
            });
        }
    }
}

fn check_unique(granted: &[(&Acquisition, &Hold)], findings: &mut Vec<Finding>) {
    let mut seen: HashMap<u64, (&Acquisition, &Hold)> = HashMap::new();
    for &(acquisition, hold) in granted {
        if let Some((other, others)) = seen.insert(hold.token, (acquisition, hold)) {
            findings.push(Finding {
                violation: "same-token",
                at: hold.at.max(others.at),
                since: hold.at.min(others.at),
                key: Some(acquisition.key.clone()),
                words: format!("{} and {} have token {}", other.name(), acquisition.name(), hold.token),
            });
        }
    }
}

/// An acquisition whose guard came before another was requested has the smaller token.
fn check_asked_after(granted: &[(&Acquisition, &Hold)], findings: &mut Vec<Finding>) {
    let mut by_grant = granted.to_vec();
    by_grant.sort_by_key(|(_, hold)| hold.at);
    let mut by_asking = granted.to_vec();
    by_asking.sort_by_key(|(acquisition, _)| acquisition.asked);
    let mut before = by_grant.into_iter().peekable();
    let mut largest: Option<(&Acquisition, &Hold)> = None;
    for (acquisition, hold) in by_asking {
        while let Some(earlier) = before.next_if(|(_, hold)| hold.at < acquisition.asked) {
            if largest.is_none_or(|(_, hold)| earlier.1.token > hold.token) {
                largest = Some(earlier);
            }
        }
        if let Some(earlier) = largest {
            compare(earlier, (acquisition, hold), findings);
        }
    }
}

/// An acquisition that was valid until another became valid has the smaller token.
fn check_valid(granted: &[(&Acquisition, &Hold)], findings: &mut Vec<Finding>) {
    let mut valid: Vec<_> = granted.iter().filter(|(_, hold)| hold.was_valid()).copied().collect();
    valid.sort_by_key(|(_, hold)| hold.at);
    let mut largest: Option<(&Acquisition, &Hold)> = None;
    for later in valid {
        if let Some(earlier) = largest
            && earlier.1.until() <= later.1.at
            // Otherwise `check_asked_after` has compared them.
            && earlier.1.at >= later.0.asked
        {
            compare(earlier, later, findings);
        }
        if largest.is_none_or(|(_, hold)| later.1.token > hold.token) {
            largest = Some(later);
        }
    }
}

fn compare(earlier: (&Acquisition, &Hold), later: (&Acquisition, &Hold), findings: &mut Vec<Finding>) {
    if earlier.1.token > later.1.token {
        findings.push(Finding {
            violation: "token-order",
            at: later.1.at,
            since: earlier.1.at,
            key: Some(later.0.key.clone()),
            words: format!(
                "{} has token {}, and the later {} has {}",
                earlier.0.name(),
                earlier.1.token,
                later.0.name(),
                later.1.token
            ),
        });
    }
}
