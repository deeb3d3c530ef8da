//! The result: as JSON, as a table, and whether it is correct.

use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::time::Duration;

use hdrhistogram::Histogram;
use indicatif::HumanCount;
use serde::Serialize;

use super::Args;
use super::protocol::{Errors, Measured};
use super::waits::{corrected, histogram};
use crate::load::counters::Counters;
use crate::load::usage::Usage;

/// The result of a run.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) figures: Figures,
    /// Corrected for coordinated omission.
    pub(super) waits: Histogram<u64>,
    /// As measured.
    measured_waits: Histogram<u64>,
    shards: String,
    token_regressions: u64,
    overlaps: u64,
    errors: Vec<Errors>,
}

/// The field names and their order are those of the JSON.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Figures {
    locks: u64,
    seconds: f64,
    locks_per_s: f64,
    per_process: PerProcess,
    per_task: PerTask,
    wait_ms: Wait,
    hold_ms: Hold,
    handoffs: HandOffs,
    server: Server,
}

#[derive(Debug, Clone, Copy, Serialize)]
struct PerProcess {
    min: u64,
    max: u64,
    jain: f64,
}

#[derive(Debug, Clone, Copy, Serialize)]
struct PerTask {
    min: u64,
    max: u64,
}

#[derive(Debug, Clone, Copy, Serialize)]
struct Wait {
    p50: f64,
    p99: f64,
    max: f64,
}

#[derive(Debug, Clone, Copy, Serialize)]
struct Hold {
    /// `None` if no hold ended in the window.
    mean: Option<f64>,
}

#[derive(Debug, Clone, Copy, Serialize)]
struct HandOffs {
    local: u64,
    remote: u64,
    uncontended: u64,
}

/// `None` if a shard does not report it.
#[derive(Debug, Clone, Copy, Serialize)]
struct Server {
    scripts_per_lock: Option<f64>,
    publishes_per_lock: Option<f64>,
    cpu_us_per_lock: Option<f64>,
}

impl Outcome {
    /// `used` is what all servers did during the window, if they report it.
    pub(super) fn new(
        args: &Args,
        shards: String,
        processes: Vec<Measured>,
        used: Option<Usage>,
    ) -> anyhow::Result<Self> {
        let mut measured_waits = histogram()?;
        for &(wait_ns, count) in processes.iter().flat_map(|process| &process.waits) {
            measured_waits.saturating_record_n(wait_ns, count);
        }
        let sum = |of: fn(&Measured) -> u64| processes.iter().map(of).sum::<u64>();
        let locks = sum(|process| process.locks.locks());
        let seconds = processes.iter().map(|process| process.seconds).sum::<f64>() / processes.len().max(1) as f64;
        let cycle = Duration::try_from_secs_f64(seconds * args.tasks_in_all() as f64 / locks.max(1) as f64)?;
        let waits = corrected(&measured_waits, cycle);
        let figures = Figures {
            locks,
            seconds: rounded(seconds, 6),
            locks_per_s: rounded(locks as f64 / seconds.max(f64::EPSILON), 1),
            per_process: PerProcess::of(&processes),
            per_task: PerTask {
                min: processes.iter().map(|process| process.task_min).min().unwrap_or(0),
                max: processes.iter().map(|process| process.task_max).max().unwrap_or(0),
            },
            wait_ms: Wait::of(&waits),
            hold_ms: Hold::of(&processes),
            handoffs: HandOffs::of(processes.iter().map(|process| process.locks)),
            server: Server::of(used, locks),
        };
        Ok(Self {
            figures,
            waits,
            measured_waits,
            shards,
            token_regressions: sum(|process| process.token_regressions),
            overlaps: sum(|process| process.overlaps),
            errors: together(processes),
        })
    }

    /// Everything that is wrong with the result.
    pub(super) fn wrong(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        for errors in &self.errors {
            wrong.push(format!(
                "{} locks failed ({}), such as: {}",
                HumanCount(errors.count),
                errors.kind,
                errors.first
            ));
        }
        if self.token_regressions != 0 {
            wrong.push(format!(
                "{} fencing tokens were not larger than the previous one on their key",
                self.token_regressions
            ));
        }
        if self.overlaps != 0 {
            wrong.push(format!("a key had two holders at once {} times", self.overlaps));
        }
        if self.figures.locks == 0 {
            wrong.push("no lock was acquired; use a longer --duration".to_owned());
        }
        wrong
    }

    pub(super) fn as_text(&self, args: &Args) -> String {
        let mut text = String::new();
        // Writing to a `String` can't fail.
        self.write(&mut text, args).ok();
        text
    }

    fn write(&self, out: &mut String, args: &Args) -> fmt::Result {
        let figures = &self.figures;
        writeln!(out, "{}", args.in_words())?;
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

impl Figures {
    pub(super) fn as_json(&self) -> String {
        // This can't fail: the fields are numbers, and the keys are strings.
        serde_json::to_string(self).unwrap_or_default()
    }
}

impl PerProcess {
    fn of(processes: &[Measured]) -> Self {
        let counts = || processes.iter().map(|process| process.locks.locks());
        Self {
            min: counts().min().unwrap_or(0),
            max: counts().max().unwrap_or(0),
            jain: rounded(jain(counts()), 5),
        }
    }
}

/// Jain's index: 1 if all counts are equal, 1 / n if one has everything.
fn jain(counts: impl Iterator<Item = u64>) -> f64 {
    let (mut number, mut sum, mut squares) = (0.0, 0.0, 0.0);
    for count in counts.map(|count| count as f64) {
        number += 1.0;
        sum += count;
        squares += count * count;
    }
    if squares == 0.0 {
        0.0
    } else {
        sum * sum / (number * squares)
    }
}

impl Wait {
    fn of(waits: &Histogram<u64>) -> Self {
        let ms = |wait_ns: u64| rounded(wait_ns as f64 / 1e6, 6);
        Self {
            p50: ms(waits.value_at_quantile(0.5)),
            p99: ms(waits.value_at_quantile(0.99)),
            max: ms(waits.max()),
        }
    }
}

impl Hold {
    fn of(processes: &[Measured]) -> Self {
        let holds: u64 = processes.iter().map(|process| process.holds).sum();
        let held: Duration = processes.iter().map(|process| process.held).sum();
        Self {
            mean: (holds > 0).then(|| rounded(held.as_secs_f64() * 1e3 / holds as f64, 6)),
        }
    }
}

impl HandOffs {
    fn of(counters: impl Iterator<Item = Counters>) -> Self {
        let mut sum = Self {
            local: 0,
            remote: 0,
            uncontended: 0,
        };
        for counters in counters {
            sum.local += counters.local;
            sum.remote += counters.remote;
            sum.uncontended += counters.uncontended;
        }
        sum
    }
}

impl Server {
    fn of(used: Option<Usage>, locks: u64) -> Self {
        let per_lock = |of: fn(Usage) -> u64| {
            let used = used.filter(|_| locks > 0)?;
            Some(rounded(of(used) as f64 / locks as f64, 6))
        };
        Self {
            scripts_per_lock: per_lock(|used| used.scripts),
            publishes_per_lock: per_lock(|used| used.publishes),
            cpu_us_per_lock: per_lock(|used| used.cpu_us),
        }
    }
}

/// Merges the errors of all processes by kind.
fn together(processes: Vec<Measured>) -> Vec<Errors> {
    let mut by_kind: BTreeMap<String, Errors> = BTreeMap::new();
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

/// Rounds to this many decimal places.
fn rounded(number: f64, digits: i32) -> f64 {
    let scale = 10_f64.powi(digits);
    (number * scale).round() / scale
}

impl Args {
    /// A title that describes the run.
    pub(super) fn in_words(&self) -> String {
        let counted = |count: u64, one: &str, many: &str| {
            format!("{} {}", HumanCount(count), if count == 1 { one } else { many })
        };
        let keys = match (self.own_keys() && self.keys > 1, self.skew) {
            (true, _) => "a key each".to_owned(),
            (false, None) => counted(self.keys.into(), "key", "keys"),
            (false, Some(skew)) => format!("{}, skewed by {skew}", counted(self.keys.into(), "key", "keys")),
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
            "{} x {}, {keys}, {hold}{linger}",
            counted(self.processes.into(), "process", "processes"),
            counted(self.tasks.into(), "task", "tasks"),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jains_index_is_1_where_all_are_alike_and_1_of_n_where_one_has_all() {
        assert!((jain([7, 7, 7].into_iter()) - 1.0).abs() < 1e-9);
        assert!((jain([9, 0, 0].into_iter()) - 1.0 / 3.0).abs() < 1e-9);
        assert!(jain([0, 0].into_iter()).abs() < 1e-9);
    }

    #[test]
    fn servers_that_do_not_tell_and_locks_that_were_not_had_are_null() {
        let used = Usage {
            scripts: 20,
            publishes: 10,
            cpu_us: 55,
        };
        let json = |used, locks| serde_json::to_string(&Server::of(used, locks)).unwrap();
        assert_eq!(
            json(Some(used), 10),
            r#"{"scripts_per_lock":2.0,"publishes_per_lock":1.0,"cpu_us_per_lock":5.5}"#
        );
        let nothing = r#"{"scripts_per_lock":null,"publishes_per_lock":null,"cpu_us_per_lock":null}"#;
        assert_eq!(json(None, 10), nothing);
        assert_eq!(json(Some(used), 0), nothing);
    }
}
