//! Real workers use real servers under many faults, and an independent checker judges the histories
//! that they write.
//!
//! Several processes contend for a few keys and write a history (`worker.rs`, `history.rs`). A
//! round draws faults from a seed and injects them (`round.rs`, `faults.rs`, `scene/`). Finally the
//! checker reads the histories (`checker/`). It knows the documented guarantees and exclusions, and
//! nothing about the implementation.
//!
//! `make chaos` runs rounds for a given time.

// A failing environment ends the test.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]
// A test binary exports nothing.
#![allow(unreachable_pub)]

mod checker;
mod clock;
mod cluster_load;
mod crew;
mod faults;
mod history;
mod machine;
mod report;
mod round;
mod scene;
mod worker;

use std::env;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use report::Report;
use round::Plan;

#[test]
fn worker_entry() {
    let Some(me) = support::worker::current() else { return };
    match me.name() {
        worker::NAME => worker::fight(&me),
        name => panic!("no worker is called {name}"),
    }
}

/// Two rounds or loads run at a time: each generates its own load, but mostly waits.
static LANES: [Mutex<()>; 2] = [Mutex::new(()), Mutex::new(())];

/// Runs a round of this kind in which each of its faults occurs once, after the other rounds of its
/// lane. The round must see at least `granted_min` acquisitions.
fn withstands(kind: &str, lane: usize, seed: u64, granted_min: u64) {
    let _alone = LANES[lane].lock();
    let plan = Plan {
        kind,
        seed,
        lasts: None,
        pause: Duration::from_millis(700),
        calm: Duration::from_secs(4),
        only: &[],
    };
    let outcome = plan.run();
    let (least, granted) = (outcome.faults.values().min().copied(), outcome.verdict.granted);
    let mut report = Report::default();
    report.add(kind, outcome);
    println!("seed {seed}\n{report}");
    assert_eq!(report.violations(), 0, "{}", report.stories());
    assert!(least >= Some(1), "some fault never occurred");
    assert!(granted >= granted_min, "only {granted} acquisitions");
}

#[test]
fn one_address_with_a_replica_withstands_each_fault() {
    withstands("redis", 0, 6, 2_000);
}

#[test]
fn sentinel_with_confirmed_leases_withstands_each_fault() {
    withstands("sentinel", 0, 1, 2_000);
}

#[test]
fn cluster_with_confirmed_leases_withstands_each_fault() {
    withstands("cluster", 1, 2, 2_000);
}

#[test]
fn redlock_withstands_each_fault() {
    withstands("redlock", 1, 3, 1_000);
}

#[cfg(feature = "etcd")]
#[test]
fn etcd_withstands_each_fault() {
    withstands("etcd", 0, 1, 300);
}

/// `make chaos`: runs rounds of each kind in turn for the given number of minutes and prints a
/// report. Does nothing unless `SHARDLOCK_TEST_CHAOS_MINUTES` is set.
#[test]
fn chaos_for_as_long_as_asked() {
    let Ok(minutes) = env::var("SHARDLOCK_TEST_CHAOS_MINUTES") else {
        return;
    };
    let _alone = LANES.each_ref().map(Mutex::lock);
    let words = |name: &str| -> Vec<String> {
        let value = env::var(name).unwrap_or_default();
        value
            .split([' ', ','])
            .filter(|word| !word.is_empty())
            .map(str::to_owned)
            .collect()
    };
    let (mut kinds, only) = (
        words("SHARDLOCK_TEST_CHAOS_KINDS"),
        words("SHARDLOCK_TEST_CHAOS_FAULTS"),
    );
    if kinds.is_empty() {
        kinds = scene::KINDS.iter().map(|kind| (*kind).to_owned()).collect();
    }
    let minutes: f64 = minutes.parse().expect("MINUTES is a number");
    let first = match env::var("SHARDLOCK_TEST_CHAOS_SEED") {
        Ok(seed) if !seed.is_empty() => seed.parse().expect("SEED is a number"),
        _ => clock::now() % 1_000_000,
    };
    let until = Instant::now() + Duration::from_secs_f64(minutes * 60.0);
    let (mut report, mut broken_off) = (Report::default(), 0);
    for number in 0.. {
        let kind = &kinds[number as usize % kinds.len()];
        let seed = first + number;
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
            only: &only,
        };
        let stalled = machine::STALLED.load(Ordering::Relaxed);
        let Ok(outcome) = catch_unwind(AssertUnwindSafe(|| plan.run())) else {
            println!("{kind}, seed {seed}: aborted, the reason is above");
            // Waits for a server have a time limit, which a stalled machine can use up.
            let is_excused = machine::STALLED.load(Ordering::Relaxed) - stalled > 5 * clock::SECOND;
            broken_off += u32::from(!is_excused);
            continue;
        };
        println!(
            "{kind}, seed {seed}: {} faults, {} acquisitions, {} violations",
            outcome.faults.values().sum::<u64>(),
            outcome.verdict.granted,
            outcome.verdict.violations.len()
        );
        for violation in outcome.verdict.violations.iter().chain(&outcome.verdict.worth_a_look) {
            println!("{kind}, seed {seed}: {}", violation.story);
        }
        report.add(kind, outcome);
    }
    println!("\nseeds from {first} on\n{report}");
    println!(
        "the machine itself stalled {} times, for {:.1} s in total",
        machine::STALLS.load(Ordering::Relaxed),
        machine::STALLED.load(Ordering::Relaxed) as f64 / 1e9
    );
    assert_eq!(broken_off, 0, "rounds were aborted");
    assert_eq!(
        report.violations(),
        0,
        "violations that the documents do not exclude; their stories are above"
    );
}
