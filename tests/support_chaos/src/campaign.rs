//! Rounds for a test, and for as long as somebody asks.

use std::env;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::clock::{SECOND, now};
use crate::machine::{STALLED, STALLS};
use crate::report::Report;
use crate::round::{Plan, Start};

/// Runs a round in which each fault occurs once. It must see at least `granted_min` acquisitions.
pub fn withstands_each_fault(kind: &str, seed: u64, granted_min: u64, keep_in: &Path, start: Start<'_>) {
    let plan = Plan {
        kind,
        seed,
        lasts: None,
        pause: Duration::from_millis(700),
        calm: Duration::from_secs(4),
        only: &[],
        keep_in,
    };
    let outcome = plan.run(start);
    let (least, granted) = (outcome.faults.values().min().copied(), outcome.verdict.granted);
    let mut report = Report::default();
    report.add(kind, outcome);
    println!("seed {seed}\n{report}");
    assert_eq!(report.violations(), 0, "{}", report.stories());
    assert!(least >= Some(1), "some fault never occurred");
    assert!(granted >= granted_min, "only {granted} acquisitions");
}

/// Rounds for a number of minutes, as the environment asks for them.
pub struct Campaign {
    time: Duration,
    /// The seed of the first round; each further one has the next.
    first: u64,
    kinds: Vec<String>,
    only: Vec<String>,
}

impl Campaign {
    /// `None` unless `SHARDLOCK_TEST_CHAOS_MINUTES` is set.
    pub fn from_env() -> Option<Self> {
        let minutes: f64 = env::var("SHARDLOCK_TEST_CHAOS_MINUTES")
            .ok()?
            .parse()
            .expect("MINUTES is a number");
        let words = |name: &str| -> Vec<String> {
            let value = env::var(name).unwrap_or_default();
            let words = value.split([' ', ',']).filter(|word| !word.is_empty());
            words.map(str::to_owned).collect()
        };
        let first = match env::var("SHARDLOCK_TEST_CHAOS_SEED") {
            Ok(seed) if !seed.is_empty() => seed.parse().expect("SEED is a number"),
            _ => now() % 1_000_000,
        };
        Some(Self {
            time: Duration::from_secs_f64(minutes * 60.0),
            first,
            kinds: words("SHARDLOCK_TEST_CHAOS_KINDS"),
            only: words("SHARDLOCK_TEST_CHAOS_FAULTS"),
        })
    }

    /// Runs rounds of these kinds in turn, or of those that were asked for, and prints a report.
    pub fn run(&self, kinds: &[&str], keep_in: &Path, start: Start<'_>) {
        let kinds: Vec<&str> = if self.kinds.is_empty() {
            kinds.to_vec()
        } else {
            self.kinds.iter().map(String::as_str).collect()
        };
        let until = Instant::now() + self.time;
        let (mut report, mut broken_off) = (Report::default(), 0);
        for (seed, kind) in (self.first..).zip(kinds.iter().copied().cycle()) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let plan = Plan {
                kind,
                seed,
                lasts: Some(left.min(Duration::from_secs(75))),
                pause: Duration::from_secs(2),
                calm: Duration::from_secs(11),
                only: &self.only,
                keep_in,
            };
            let stalled = STALLED.load(Ordering::Relaxed);
            let Ok(outcome) = catch_unwind(AssertUnwindSafe(|| plan.run(start))) else {
                println!("{kind}, seed {seed}: aborted, the reason is above");
                // Waits for a server have a time limit, which a stalled machine can use up.
                let is_excused = STALLED.load(Ordering::Relaxed) - stalled > 5 * SECOND;
                broken_off += u32::from(!is_excused);
                continue;
            };
            let verdict = &outcome.verdict;
            println!(
                "{kind}, seed {seed}: {} faults, {} acquisitions, {} violations",
                outcome.faults.values().sum::<u64>(),
                verdict.granted,
                verdict.violations.len()
            );
            for violation in verdict.violations.iter().chain(&verdict.worth_a_look) {
                println!("{kind}, seed {seed}: {}", violation.story);
            }
            report.add(kind, outcome);
        }
        println!("\nseeds from {} on\n{report}", self.first);
        println!(
            "the machine itself stalled {} times, for {:.1} s in total",
            STALLS.load(Ordering::Relaxed),
            STALLED.load(Ordering::Relaxed) as f64 / 1e9
        );
        assert_eq!(broken_off, 0, "rounds were aborted");
        assert_eq!(
            report.violations(),
            0,
            "violations that the documents do not exclude; their stories are above"
        );
    }
}
