//! Losses must be reported in time, and not without a cause.

use super::acquisitions::{Acquisition, Hold};
use super::faults::Faults;
use super::{Finding, Terms};

pub(super) fn check(acquisitions: &[Acquisition], faults: &Faults, terms: Terms, findings: &mut Vec<Finding>) {
    for acquisition in acquisitions {
        let Some(hold) = acquisition.hold() else { continue };
        let mut find = |violation, at, words: String| {
            findings.push(Finding {
                violation,
                at,
                since: hold.at,
                key: Some(acquisition.key.clone()),
                words: format!("{} {words}", acquisition.name()),
            });
        };
        if let Some(at) = reported_late(acquisition, hold, faults) {
            find(
                "late-loss",
                at,
                format!("was valid until {}, loss not reported by {at}", hold.claimed_until()),
            );
        }
        let Some((at, reason)) = &hold.loss_reported else {
            continue;
        };
        match reason.as_str() {
            "taken" => find(
                "vanished",
                *at,
                "was notified that its lease was deleted or taken".to_owned(),
            ),
            reason if faults.none_between(hold.at, *at, terms.settled()) => {
                find("lost-in-health", *at, format!("was notified of {reason}"));
            }
            _ => {}
        }
    }
}

/// The time at which the loss was known, or still unknown, if that was too late.
fn reported_late(acquisition: &Acquisition, hold: &Hold, faults: &Faults) -> Option<u64> {
    let end = hold.claimed_until();
    // A task that is releasing its guard no longer waits for the loss.
    let known = hold.loss_reported.as_ref().map(|(at, _)| *at).or_else(|| {
        let mut readings = hold.readings.iter().filter(|(at, _)| Some(*at) != hold.ending);
        readings.rfind(|(at, left)| *at > end && *left == 0).map(|(at, _)| *at)
    })?;
    let late = known.saturating_sub(end);
    (late > Terms::LOSS_SLACK + faults.still(&acquisition.who, end, known)).then_some(known)
}
