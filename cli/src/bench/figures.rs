//! The numbers of the result, as JSON.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

use super::protocol::Measurements;
use crate::load::counters::Counters;
use crate::load::server_stats::ServerStats;

/// The field names and their order are those of the JSON.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Figures {
    pub(super) locks: u64,
    pub(super) seconds: f64,
    pub(super) locks_per_s: f64,
    pub(super) per_process: PerProcess,
    pub(super) per_task: PerTask,
    pub(super) wait_ms: Wait,
    /// `None` unless some of the locks are shared.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) writers: Option<Writers>,
    pub(super) hold_ms: Hold,
    pub(super) handoffs: HandOffs,
    pub(super) server: Server,
}

#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct PerProcess {
    pub(super) min: u64,
    pub(super) max: u64,
    pub(super) jain: f64,
}

#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct PerTask {
    pub(super) min: u64,
    pub(super) max: u64,
}

#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Wait {
    pub(super) p50: f64,
    pub(super) p99: f64,
    pub(super) max: f64,
}

/// The waits for exclusive locks beside shared ones, as measured: the question is how much longer
/// the longest is than another.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Writers {
    pub(super) waits: u64,
    pub(super) wait_ms: Wait,
}

#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Hold {
    /// `None` if no hold ended in the window.
    pub(super) mean: Option<f64>,
}

#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct HandOffs {
    pub(super) local: u64,
    pub(super) remote: u64,
    pub(super) uncontended: u64,
}

/// `None` if a shard does not report it.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Server {
    pub(super) scripts_per_lock: Option<f64>,
    pub(super) publishes_per_lock: Option<f64>,
    pub(super) cpu_us_per_lock: Option<f64>,
}

impl Figures {
    /// `used` is what all servers did during the window, if they report it.
    pub(super) fn new(
        processes: &[Measurements],
        (locks, seconds): (u64, f64),
        waits: &Histogram<u64>,
        writer_waits: Option<&Histogram<u64>>,
        used: Option<ServerStats>,
    ) -> Self {
        Self {
            locks,
            seconds: rounded(seconds, 6),
            locks_per_s: rounded(locks as f64 / seconds.max(f64::EPSILON), 1),
            per_process: PerProcess::of(processes),
            per_task: PerTask {
                min: processes.iter().map(|process| process.task_min).min().unwrap_or(0),
                max: processes.iter().map(|process| process.task_max).max().unwrap_or(0),
            },
            wait_ms: Wait::of(waits),
            writers: writer_waits.map(|waits| Writers {
                waits: waits.len(),
                wait_ms: Wait::of(waits),
            }),
            hold_ms: Hold::of(processes),
            handoffs: HandOffs::of(processes.iter().map(|process| process.locks)),
            server: Server::of(used, locks),
        }
    }

    pub(super) fn as_json(&self) -> String {
        // This can't fail: the fields are numbers, and the keys are strings.
        serde_json::to_string(self).unwrap_or_default()
    }
}

impl PerProcess {
    fn of(processes: &[Measurements]) -> Self {
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
    pub(super) fn of(waits: &Histogram<u64>) -> Self {
        let ms = |wait_ns: u64| rounded(wait_ns as f64 / 1e6, 6);
        Self {
            p50: ms(waits.value_at_quantile(0.5)),
            p99: ms(waits.value_at_quantile(0.99)),
            max: ms(waits.max()),
        }
    }
}

impl Hold {
    fn of(processes: &[Measurements]) -> Self {
        let holds: u64 = processes.iter().map(|process| process.holds).sum();
        let held: Duration = processes.iter().map(|process| process.held).sum();
        Self {
            mean: (holds > 0).then(|| rounded(held.as_secs_f64() * 1e3 / holds as f64, 6)),
        }
    }
}

impl HandOffs {
    pub(super) const fn since(self, earlier: Self) -> Self {
        Self {
            local: self.local.saturating_sub(earlier.local),
            remote: self.remote.saturating_sub(earlier.remote),
            uncontended: self.uncontended.saturating_sub(earlier.uncontended),
        }
    }

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
    fn of(used: Option<ServerStats>, locks: u64) -> Self {
        let per_lock = |of: fn(ServerStats) -> u64| {
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

/// Rounds to this many decimal places.
fn rounded(number: f64, digits: i32) -> f64 {
    let scale = 10_f64.powi(digits);
    (number * scale).round() / scale
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jains_index_is_1_if_all_are_equal_and_1_of_n_if_one_has_all() {
        assert!((jain([7, 7, 7].into_iter()) - 1.0).abs() < 1e-9);
        assert!((jain([9, 0, 0].into_iter()) - 1.0 / 3.0).abs() < 1e-9);
        assert!(jain([0, 0].into_iter()).abs() < 1e-9);
    }

    #[test]
    fn missing_statistics_and_missing_locks_are_null() {
        let used = ServerStats {
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
