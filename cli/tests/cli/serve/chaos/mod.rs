//! An agent under many faults: its clients and managers of their own contend for the same keys, and
//! the checker of `tests/chaos` judges the histories that they write.
//!
//! The checker, the histories and the worker with a manager of its own are those of `tests/chaos`.
//! A client (`client.rs`) holds its locks as docs/agent.md describes: it relies on the time that
//! `HELD` has replied, counted from when it asked, and no longer.
//!
//! `make chaos-agent` runs rounds for a given time.

// The shared files export what `tests/chaos` needs.
#![allow(unreachable_pub, dead_code, reason = "shared with tests/chaos")]

#[path = "../../../../../tests/chaos/checker/mod.rs"]
mod checker;
pub(crate) mod client;
#[path = "../../../../../tests/chaos/clock.rs"]
mod clock;
mod connection;
mod crew;
#[path = "../../../../../tests/chaos/faults.rs"]
mod faults;
#[path = "../../../../../tests/chaos/history.rs"]
mod history;
#[path = "../../../../../tests/chaos/machine.rs"]
mod machine;
#[path = "../../../../../tests/chaos/report.rs"]
mod report;
mod round;
#[path = "../../../../../tests/chaos/worker.rs"]
pub(crate) mod worker;

use std::env;
use std::time::{Duration, Instant};

use report::Report;
use round::Plan;

/// The processes of a round, by the names of their entries.
pub(crate) const CLIENT: &str = client::NAME;
pub(crate) const WORKER: &str = worker::NAME;

#[test]
fn agent_withstands_each_fault() {
    let seed = 1;
    let plan = Plan {
        seed,
        lasts: None,
        pause: Duration::from_millis(700),
        calm: Duration::from_secs(3),
        only: &[],
    };
    let outcome = plan.run();
    let (least, granted) = (outcome.faults.values().min().copied(), outcome.verdict.granted);
    let mut report = Report::default();
    report.add("agent", outcome);
    println!("seed {seed}\n{report}");
    assert_eq!(report.violations(), 0, "{}", report.stories());
    assert!(least >= Some(1), "some fault never occurred");
    assert!(granted >= 2_000, "only {granted} acquisitions");
}

/// `make chaos-agent`: runs rounds for the given number of minutes and prints a report. Does
/// nothing unless `SHARDLOCK_TEST_CHAOS_MINUTES` is set.
#[test]
fn chaos_for_as_long_as_asked() {
    let Ok(minutes) = env::var("SHARDLOCK_TEST_CHAOS_MINUTES") else {
        return;
    };
    let minutes: f64 = minutes.parse().expect("MINUTES is a number");
    let only = env::var("SHARDLOCK_TEST_CHAOS_FAULTS").unwrap_or_default();
    let only: Vec<String> = only.split_whitespace().map(str::to_owned).collect();
    let first = match env::var("SHARDLOCK_TEST_CHAOS_SEED") {
        Ok(seed) if !seed.is_empty() => seed.parse().expect("SEED is a number"),
        _ => clock::now() % 1_000_000,
    };
    let until = Instant::now() + Duration::from_secs_f64(minutes * 60.0);
    let mut report = Report::default();
    for seed in first.. {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        let plan = Plan {
            seed,
            lasts: Some(left.min(Duration::from_secs(75))),
            pause: Duration::from_secs(2),
            calm: Duration::from_secs(11),
            only: &only,
        };
        let outcome = plan.run();
        let verdict = &outcome.verdict;
        println!(
            "seed {seed}: {} faults, {} acquisitions, {} violations",
            outcome.faults.values().sum::<u64>(),
            verdict.granted,
            verdict.violations.len()
        );
        for violation in verdict.violations.iter().chain(&verdict.worth_a_look) {
            println!("seed {seed}: {}", violation.story);
        }
        report.add("agent", outcome);
    }
    println!("\nseeds from {first} on\n{report}");
    assert_eq!(report.violations(), 0, "violations; their stories are above");
}
