//! Aggregated results of many rounds.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use crate::checker::{EXCUSES, Verdict};
use crate::round::Outcome;

#[derive(Default)]
pub(crate) struct Report {
    kinds: BTreeMap<String, OfKind>,
}

#[derive(Default)]
struct OfKind {
    rounds: u64,
    lasted: Duration,
    faults: BTreeMap<&'static str, u64>,
    verdict: Verdict,
}

impl Report {
    pub(crate) fn add(&mut self, kind: &str, outcome: Outcome) {
        let of_kind = self.kinds.entry(kind.to_owned()).or_default();
        of_kind.rounds += 1;
        of_kind.lasted += outcome.lasted;
        of_kind.verdict.add(outcome.verdict);
        for (fault, count) in outcome.faults {
            *of_kind.faults.entry(fault).or_default() += count;
        }
    }

    /// The stories of all violations.
    pub(crate) fn stories(&self) -> String {
        let mut stories = String::new();
        for (kind, of_kind) in &self.kinds {
            for violation in &of_kind.verdict.violations {
                stories += &format!("{kind}: {}\n", violation.story);
            }
        }
        stories
    }

    pub(crate) fn violations(&self) -> usize {
        self.kinds
            .values()
            .map(|of_kind| of_kind.verdict.violations.len())
            .sum()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<10}{:>7}{:>9}{:>8}{:>14}{:>8}{:>14}{:>14}{:>9}{:>12}",
            "kind",
            "rounds",
            "seconds",
            "faults",
            "acquisitions",
            "losses",
            "longest wait",
            "overlaps",
            "excused",
            "violations"
        )?;
        let mut all = OfKind::default();
        let mut faults: BTreeMap<&str, u64> = BTreeMap::new();
        let mut excused: BTreeMap<(&str, &str), u64> = BTreeMap::new();
        for (kind, of_kind) in &self.kinds {
            line(f, kind, of_kind)?;
            all.rounds += of_kind.rounds;
            all.lasted += of_kind.lasted;
            all.verdict.add(of_kind.verdict.clone());
            for (fault, count) in &of_kind.faults {
                *faults.entry(fault).or_default() += count;
                *all.faults.entry(fault).or_default() += count;
            }
            for (what, count) in &of_kind.verdict.excused {
                *excused.entry(*what).or_default() += count;
            }
        }
        line(f, "all", &all)?;
        writeln!(f, "\nfaults")?;
        for (fault, count) in faults {
            writeln!(f, "  {fault:<24}{count:>8}")?;
        }
        writeln!(f, "\nfailed requests")?;
        for (why, count) in &all.verdict.failed {
            writeln!(f, "  {why:<24}{count:>8}")?;
        }
        writeln!(f, "\nreported losses")?;
        for (reason, count) in &all.verdict.losses {
            writeln!(f, "  {reason:<24}{count:>8}")?;
        }
        let unexplained = all.verdict.worth_a_look.len();
        writeln!(
            f,
            "  of these, not close to any fault (overloaded machine) {unexplained}"
        )?;
        writeln!(f, "\nexcluded by the documents")?;
        for ((violation, excuse), count) in excused {
            writeln!(f, "  {violation:<14}{excuse:<34}{count:>8}")?;
        }
        for excuse in EXCUSES {
            writeln!(f, "  {}: {}", excuse.name, excuse.source)?;
        }
        Ok(())
    }
}

fn line(f: &mut fmt::Formatter<'_>, kind: &str, of_kind: &OfKind) -> fmt::Result {
    let verdict = &of_kind.verdict;
    let overlaps = verdict
        .violations
        .iter()
        .filter(|one| one.finding.violation == "overlap")
        .count();
    writeln!(
        f,
        "{kind:<10}{:>7}{:>9}{:>8}{:>14}{:>8}{:>12} s{:>14}{:>9}{:>12}",
        of_kind.rounds,
        of_kind.lasted.as_secs(),
        of_kind.faults.values().sum::<u64>(),
        verdict.granted,
        verdict.losses.values().sum::<u64>(),
        format!("{:.1}", verdict.longest_wait as f64 / 1e9),
        overlaps as u64 + verdict.count_excused("overlap"),
        verdict.excused.values().sum::<u64>(),
        verdict.violations.len(),
    )
}
