//! At no time do two guards of a key consider themselves valid.

use super::Finding;
use super::acquisitions::Acquisition;

/// Checks all acquisitions of one key.
pub(super) fn check(of_key: &[&Acquisition], findings: &mut Vec<Finding>) {
    let mut holds: Vec<_> = of_key
        .iter()
        .filter_map(|acquisition| {
            let hold = acquisition.hold().filter(|hold| hold.was_valid())?;
            (hold.until() > hold.at).then_some((hold.at, hold.until(), *acquisition))
        })
        .collect();
    holds.sort_by_key(|(from, ..)| *from);
    let mut last: Option<(u64, &Acquisition)> = None;
    for (from, until, acquisition) in holds {
        if let Some((held_until, holder)) = last
            && from < held_until
        {
            findings.push(Finding {
                violation: "overlap",
                at: from,
                since: holder.hold().map_or(from, |hold| hold.at),
                key: Some(acquisition.key.clone()),
                words: format!(
                    "{} holds it until {held_until}, and {} from {from} on",
                    holder.name(),
                    acquisition.name()
                ),
            });
        }
        if last.is_none_or(|(held_until, _)| until > held_until) {
            last = Some((until, acquisition));
        }
    }
}
