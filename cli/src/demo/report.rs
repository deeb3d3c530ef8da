//! The result: whether it is correct, as a table, and as JSON.

use std::io::{self, Write};
use std::time::Duration;

use hdrhistogram::Histogram;
use indicatif::HumanCount;
use serde::Serialize;

use super::jobs::SIGNIFICANT_DIGITS;
use super::protocol::{CallCounts, JobCounts};
use crate::load::server_stats::ServerStats;

/// The result of the demo. The field names are those of the JSON.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) processes: u32,
    pub(super) tasks_per_process: u32,
    pub(super) coupons: u64,
    pub(super) unlocked: Claims,
    pub(super) locked: Claims,
    /// `None` if a shard is a quorum, which has no permits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) partner: Option<Partner>,
    pub(super) jobs: Jobs,
}

/// The result of the calls.
#[derive(Debug, Serialize)]
pub(super) struct Partner {
    /// How many calls at once the partner serves.
    pub(super) limit: u16,
    pub(super) calls: u64,
    pub(super) without_permits: Calls,
    pub(super) with_permits: Calls,
}

/// What became of the calls, and how long they took together.
#[derive(Debug, Serialize)]
pub(super) struct Calls {
    #[serde(flatten)]
    pub(super) counts: CallCounts,
    pub(super) seconds: f64,
}

/// The result of the promotion.
#[derive(Debug, Serialize)]
pub(super) struct Claims {
    pub(super) customers: u64,
    pub(super) claimed: u64,
    /// The coupons left, by the number that the customers read and write.
    pub(super) left: u64,
    /// Claims whose fencing token is not larger than that of the previous claim; `None` without the
    /// lock.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) token_regressions: Option<u64>,
    pub(super) seconds: f64,
}

/// The result of the jobs.
#[derive(Debug, Serialize)]
pub(super) struct Jobs {
    pub(super) shards: usize,
    pub(super) keys: u32,
    pub(super) completed: u64,
    /// Completed jobs that are missing in the counters.
    pub(super) lost_updates: i64,
    /// Jobs that found a token on their key that was not smaller than their own.
    pub(super) token_regressions: u64,
    pub(super) seconds: f64,
    pub(super) jobs_per_s: f64,
    pub(super) paths: Paths,
    pub(super) wait_ms: Wait,
    /// Round trips from the managers to the servers, renewals included, as counted by the managers.
    pub(super) store_requests_per_lock: f64,
    /// Script calls as counted by the servers, so calls of their other clients are included. `None`
    /// if the servers are not queried.
    pub(super) script_calls_per_lock: Option<f64>,
    /// Published messages, mostly hand-offs, as counted by the servers.
    pub(super) publishes_per_lock: Option<f64>,
}

/// Acquired locks by path.
#[derive(Debug, Default, Serialize)]
pub(super) struct Paths {
    pub(super) uncontended: u64,
    pub(super) local: u64,
    pub(super) remote: u64,
}

/// The time from a lock request to its guard, in milliseconds.
#[derive(Debug, Serialize)]
pub(super) struct Wait {
    pub(super) p50: f64,
    pub(super) p99: f64,
    pub(super) max: f64,
}

impl Jobs {
    /// `counted` is the sum of the counters. `calls` is what the servers counted in that time, if
    /// they were queried.
    pub(super) fn new(
        (shards, keys): (usize, u32),
        workers: &[JobCounts],
        counted: u64,
        calls: Option<ServerStats>,
        took: Duration,
    ) -> anyhow::Result<Self> {
        let mut waits = Histogram::<u64>::new(SIGNIFICANT_DIGITS)?;
        for &(micros, count) in workers.iter().flat_map(|worker| &worker.waits) {
            waits.record_n(micros, count)?;
        }
        let sum = |of: fn(&JobCounts) -> u64| workers.iter().map(of).sum::<u64>();
        let completed = sum(|worker| worker.completed);
        let per_lock = |count: u64| rounded(count as f64 / completed.max(1) as f64);
        let millis = |micros: u64| micros as f64 / 1e3;
        Ok(Self {
            shards,
            keys,
            completed,
            lost_updates: completed as i64 - counted as i64,
            token_regressions: sum(|worker| worker.token_regressions),
            seconds: rounded(took.as_secs_f64()),
            jobs_per_s: (completed as f64 / took.as_secs_f64()).round(),
            paths: Paths {
                uncontended: sum(|worker| worker.uncontended),
                local: sum(|worker| worker.local),
                remote: sum(|worker| worker.remote),
            },
            wait_ms: Wait {
                p50: millis(waits.value_at_quantile(0.5)),
                p99: millis(waits.value_at_quantile(0.99)),
                max: millis(waits.max()),
            },
            store_requests_per_lock: per_lock(sum(|worker| worker.store_requests)),
            script_calls_per_lock: calls.map(|calls| per_lock(calls.scripts)),
            publishes_per_lock: calls.map(|calls| per_lock(calls.publishes)),
        })
    }
}

/// Rounds to three decimal places.
pub(super) fn rounded(number: f64) -> f64 {
    (number * 1e3).round() / 1e3
}

impl Partner {
    /// Everything that is wrong with the calls under permits.
    fn problems(&self) -> Vec<String> {
        let counts = self.with_permits.counts;
        let mut problems = Vec::new();
        if counts.most_at_once > u64::from(self.limit) {
            problems.push(format!(
                "{} calls were made at once under {} permits",
                counts.most_at_once, self.limit
            ));
        }
        if counts.served != self.calls {
            problems.push(format!(
                "{} of {} calls were served under permits",
                counts.served, self.calls
            ));
        }
        problems
    }

    fn write_table(&self, out: &mut impl Write) -> io::Result<()> {
        let (without, with) = (&self.without_permits, &self.with_permits);
        writeln!(
            out,
            "\n{} calls of a partner's API that serves {} at once",
            HumanCount(self.calls),
            self.limit
        )?;
        let mut row = |name: &str, first: String, second: String| writeln!(out, "  {name:<24}{first:>18}{second:>18}");
        row("", "without permits".into(), "with permits".into())?;
        for (name, of) in [
            ("served", (|counts| counts.served) as fn(CallCounts) -> u64),
            ("refused", |counts| counts.refused),
            ("at once, at most", |counts| counts.most_at_once),
        ] {
            let figure = |calls: &Calls| HumanCount(of(calls.counts)).to_string();
            row(name, figure(without), figure(with))?;
        }
        row(
            "seconds",
            format!("{:.3}", without.seconds),
            format!("{:.3}", with.seconds),
        )
    }
}

impl Report {
    /// Everything that is wrong with the result: nothing, if the lock works.
    pub(super) fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let due = self.coupons.min(self.locked.customers);
        if self.locked.claimed != due {
            problems.push(format!(
                "{} coupons were claimed under the lock instead of {due}",
                self.locked.claimed
            ));
        }
        if self.locked.left != self.coupons - due {
            problems.push(format!(
                "{} coupons were left under the lock instead of {}",
                self.locked.left,
                self.coupons - due
            ));
        }
        if let Some(partner) = &self.partner {
            problems.extend(partner.problems());
        }
        if self.jobs.lost_updates != 0 {
            problems.push(format!("{} job updates were lost", self.jobs.lost_updates));
        }
        let regressions = self.jobs.token_regressions + self.locked.token_regressions.unwrap_or(0);
        if regressions != 0 {
            problems.push(format!(
                "{regressions} fencing tokens were not larger than the previous ones"
            ));
        }
        if self.jobs.completed == 0 {
            problems.push("no job was completed".to_owned());
        }
        problems
    }

    /// A problem that is not an error, but makes the demo less convincing.
    pub(super) fn warning(&self) -> Option<String> {
        if self.unlocked.claimed <= self.coupons {
            return Some(format!(
                "only {} of {} coupons were claimed without the lock: use more --tasks or a longer --think \
                 to provoke the race",
                self.unlocked.claimed, self.coupons
            ));
        }
        let partner = self.partner.as_ref()?;
        (partner.without_permits.counts.refused == 0).then(|| {
            format!(
                "the partner refused no call without permits: use more --tasks than its --partner-limit, {}",
                partner.limit
            )
        })
    }

    pub(super) fn write_table(&self, out: &mut impl Write) -> io::Result<()> {
        let (unlocked, locked, jobs) = (&self.unlocked, &self.locked, &self.jobs);
        writeln!(
            out,
            "\n{} customers for {} coupons",
            HumanCount(locked.customers),
            HumanCount(self.coupons)
        )?;
        let mut row = |name: &str, first: String, second: String| writeln!(out, "  {name:<24}{first:>18}{second:>18}");
        let too_many = |claims: &Claims| HumanCount(claims.claimed.saturating_sub(self.coupons)).to_string();
        row("", "without the lock".into(), "with the lock".into())?;
        row(
            "coupons claimed",
            HumanCount(unlocked.claimed).to_string(),
            HumanCount(locked.claimed).to_string(),
        )?;
        row("too many", too_many(unlocked), too_many(locked))?;
        row(
            "left, as written",
            HumanCount(unlocked.left).to_string(),
            HumanCount(locked.left).to_string(),
        )?;
        row(
            "seconds",
            format!("{:.3}", unlocked.seconds),
            format!("{:.3}", locked.seconds),
        )?;

        if let Some(partner) = &self.partner {
            partner.write_table(out)?;
        }

        writeln!(
            out,
            "\njobs on {} keys, a few of them hot, over {} shards",
            HumanCount(jobs.keys.into()),
            jobs.shards
        )?;
        let mut row = |name: &str, value: String| writeln!(out, "  {name:<24}{value:>18}");
        let locks = (jobs.paths.uncontended + jobs.paths.local + jobs.paths.remote).max(1);
        let share = |count: u64| format!("{:.1} %", 100.0 * count as f64 / locks as f64);
        row("jobs done", HumanCount(jobs.completed).to_string())?;
        row("lost updates", jobs.lost_updates.to_string())?;
        row("token regressions", jobs.token_regressions.to_string())?;
        row("jobs per second", HumanCount(jobs.jobs_per_s as u64).to_string())?;
        row("uncontended", share(jobs.paths.uncontended))?;
        row("handed over locally", share(jobs.paths.local))?;
        row("handed over remotely", share(jobs.paths.remote))?;
        row("wait, median", format!("{:.2} ms", jobs.wait_ms.p50))?;
        row("wait, 99th percentile", format!("{:.2} ms", jobs.wait_ms.p99))?;
        row("wait, longest", format!("{:.2} ms", jobs.wait_ms.max))?;
        row(
            "store requests per lock",
            format!("{:.3}", jobs.store_requests_per_lock),
        )?;
        for (name, count) in [
            ("script calls per lock", jobs.script_calls_per_lock),
            ("messages per lock", jobs.publishes_per_lock),
        ] {
            if let Some(count) = count {
                row(name, format!("{count:.3}"))?;
            }
        }
        Ok(())
    }
}
