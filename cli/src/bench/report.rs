//! The result: as a table, and whether it is correct.

use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::time::Duration;

use hdrhistogram::Histogram;
use indicatif::HumanCount;

use super::Args;
use super::figures::{Figures, HandOffs, Wait};
use super::mode::ModeChoice;
use super::protocol::{ErrorCount, Measurements};
use super::wait_histogram::{corrected, histogram};
use crate::load::server_stats::ServerStats;

/// The result of a run.
#[derive(Debug)]
pub(super) struct Report {
    pub(super) figures: Figures,
    /// Corrected for coordinated omission.
    pub(super) waits: Histogram<u64>,
    /// As measured.
    measured_waits: Histogram<u64>,
    shards: String,
    token_regressions: u64,
    overlaps: u64,
    errors: Vec<ErrorCount>,
}

impl Report {
    /// `used` is what all servers did during the window, if they report it. `handoffs` are those
    /// of the agent, if there is one.
    pub(super) fn new(
        args: &Args,
        shards: String,
        processes: Vec<Measurements>,
        used: Option<ServerStats>,
        handoffs: Option<HandOffs>,
    ) -> anyhow::Result<Self> {
        let measured_waits = merged(processes.iter().map(|process| &process.waits))?;
        let writer_waits = match args.mode().is_mixed() {
            true => Some(merged(processes.iter().map(|process| &process.writer_waits))?),
            false => None,
        };
        let sum = |of: fn(&Measurements) -> u64| processes.iter().map(of).sum::<u64>();
        let locks = sum(|process| process.locks.locks());
        let seconds = processes.iter().map(|process| process.seconds).sum::<f64>() / processes.len().max(1) as f64;
        let interval = Duration::try_from_secs_f64(seconds * args.total_tasks() as f64 / locks.max(1) as f64)?;
        let waits = corrected(&measured_waits, interval);
        let mut figures = Figures::new(&processes, (locks, seconds), &waits, writer_waits.as_ref(), used);
        figures.handoffs = handoffs.unwrap_or(figures.handoffs);
        Ok(Self {
            figures,
            waits,
            measured_waits,
            shards,
            token_regressions: sum(|process| process.token_regressions),
            overlaps: sum(|process| process.overlaps),
            errors: merge_errors(processes),
        })
    }

    /// Everything that is wrong with the result.
    pub(super) fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        for errors in &self.errors {
            problems.push(format!(
                "{} locks failed ({}), such as: {}",
                HumanCount(errors.count),
                errors.kind,
                errors.first
            ));
        }
        if self.token_regressions != 0 {
            problems.push(format!(
                "{} fencing tokens were not larger than the previous one on their key",
                self.token_regressions
            ));
        }
        if self.overlaps != 0 {
            problems.push(format!(
                "a key had holders at once that exclude each other {} times",
                self.overlaps
            ));
        }
        if self.figures.locks == 0 {
            problems.push("no lock was acquired; use a longer --duration".to_owned());
        }
        problems
    }

    pub(super) fn as_text(&self, args: &Args) -> String {
        let mut text = String::new();
        // Writing to a `String` can't fail.
        self.write(&mut text, args).ok();
        text
    }

    fn write(&self, out: &mut String, args: &Args) -> fmt::Result {
        let figures = &self.figures;
        writeln!(out, "{}", args.title())?;
        writeln!(out, "on {}\n", self.shards)?;
        let mut row = |name: &str, value: String| writeln!(out, "  {name:<34}{value:>18}");
        let count = |count: u64| HumanCount(count).to_string();
        row("locks", count(figures.locks))?;
        row("seconds", format!("{:.3}", figures.seconds))?;
        row("locks per second", count(figures.locks_per_s.round() as u64))?;
        let (processes, tasks) = (figures.per_process, figures.per_task);
        row("fewest per process", count(processes.min))?;
        row("most per process", count(processes.max))?;
        row("fairness of processes (Jain)", format!("{:.4}", processes.jain))?;
        row("fewest per task", count(tasks.min))?;
        row("most per task", count(tasks.max))?;
        let share = |count: u64| format!("{:.1} %", 100.0 * count as f64 / figures.locks.max(1) as f64);
        row("uncontended", share(figures.handoffs.uncontended))?;
        row("handed over locally", share(figures.handoffs.local))?;
        row("handed over remotely", share(figures.handoffs.remote))?;
        let (wait, as_measured) = (figures.wait_ms, Wait::of(&self.measured_waits));
        row("wait, median", format!("{:.3} ms", wait.p50))?;
        row("wait, 99th percentile", format!("{:.3} ms", wait.p99))?;
        row("  without the correction", format!("{:.3} ms", as_measured.p99))?;
        row("wait, longest", format!("{:.3} ms", wait.max))?;
        if let Some(writers) = figures.writers {
            row("wait of writers, median", format!("{:.3} ms", writers.wait_ms.p50))?;
            row("wait of writers, longest", format!("{:.3} ms", writers.wait_ms.max))?;
        }
        if let Some(mean) = figures.hold_ms.mean {
            row("hold, mean", format!("{mean:.3} ms"))?;
        }
        let server = figures.server;
        for (name, value, unit) in [
            ("script calls per lock", server.scripts_per_lock, ""),
            ("messages per lock", server.publishes_per_lock, ""),
            ("server CPU per lock", server.cpu_us_per_lock, " us"),
        ] {
            row(
                name,
                value.map_or_else(|| "-".to_owned(), |value| format!("{value:.3}{unit}")),
            )?;
        }
        row(
            "locks that failed",
            count(self.errors.iter().map(|errors| errors.count).sum()),
        )
    }
}

/// The sum of the histograms of all processes.
fn merged<'a>(processes: impl Iterator<Item = &'a Vec<(u64, u64)>>) -> anyhow::Result<Histogram<u64>> {
    let mut all = histogram()?;
    for &(wait_ns, count) in processes.flatten() {
        all.saturating_record_n(wait_ns, count);
    }
    Ok(all)
}

/// Merges the errors of all processes by kind.
fn merge_errors(processes: Vec<Measurements>) -> Vec<ErrorCount> {
    let mut by_kind: BTreeMap<String, ErrorCount> = BTreeMap::new();
    for errors in processes.into_iter().flat_map(|process| process.errors) {
        match by_kind.get_mut(&errors.kind) {
            Some(known) => known.count += errors.count,
            None => {
                by_kind.insert(errors.kind.clone(), errors);
            }
        }
    }
    by_kind.into_values().collect()
}

impl Args {
    /// A title that describes the run.
    pub(super) fn title(&self) -> String {
        let counted = |count: u64, one: &str, many: &str| {
            format!("{} {}", HumanCount(count), if count == 1 { one } else { many })
        };
        let keys = match (self.has_own_keys() && self.keys > 1, self.skew) {
            (true, _) => "a key each".to_owned(),
            (false, None) => counted(self.keys.into(), "key", "keys"),
            (false, Some(skew)) => format!("{}, skewed by {skew}", counted(self.keys.into(), "key", "keys")),
        };
        let mode = match self.mode() {
            ModeChoice::Exclusive => String::new(),
            ModeChoice::Mixed { shared } => format!(", {} % shared", (1e4 * shared).round() / 1e2),
            ModeChoice::Permits { limit } => format!(", {}", counted(limit.into(), "permit", "permits")),
        };
        let hold = if self.hold.is_zero() {
            "nothing done under the lock".to_owned()
        } else {
            format!("held for {}", humantime::format_duration(self.hold))
        };
        let linger = match self.linger {
            Some(linger) if !linger.is_zero() => format!(", leases kept for {}", humantime::format_duration(linger)),
            _ => String::new(),
        };
        format!(
            "{} x {}, {keys}{mode}, {hold}{linger}",
            counted(self.processes.into(), "process", "processes"),
            counted(self.tasks.into(), "task", "tasks"),
        )
    }
}
