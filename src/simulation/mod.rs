//! A simulation of several managers, a store and the network between them, in virtual time.
//!
//! # Implementation details
//!
//! Queues, leases, cycles and the logic of the store are production code. Tasks, connections,
//! subscriptions and clocks are simulated and wired together as in `driver`. All randomness comes
//! from one seed, so a failing seed can be run again with a trace. Each seed draws some kinds of
//! faults and leaves others out ([`plan`]), so that no kind always hides another.
//!
//! The guarantees are checked after every event ([`ledger`]), and once more when the faults have
//! ended and all tasks are done ([`run`]). Deliberate flaws in the queue show that the checks and
//! the faults are able to find mistakes.

mod background;
mod clock;
mod connections;
mod failover;
mod faults;
mod ledger;
mod network;
mod plan;
mod pushes;
mod run;
mod story;
mod tasks;
mod turns;
mod world;

use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use crate::engine::Flaw;
use plan::Variant;
use run::{Failure, Stats, run};
use story::Case;

/// Runs these seeds on two threads and sums up their statistics. The first failure is returned with
/// its shortest story.
fn run_all(seeds: std::ops::Range<u64>, variant: Variant) -> Result<Stats, String> {
    let sum = Mutex::new(Ok(Stats::default()));
    thread::scope(|scope| {
        for half in 0..2 {
            let (seeds, sum) = (seeds.clone(), &sum);
            scope.spawn(move || {
                for seed in seeds.filter(|seed| seed % 2 == half) {
                    let result = run(&Case::new(seed, variant, None), false);
                    let mut sum = sum.lock().unwrap();
                    let Ok(all) = &mut *sum else { return };
                    match result {
                        Ok(stats) => all.add(&stats),
                        Err(failure) => *sum = Err(failure),
                    }
                }
            });
        }
    });
    sum.into_inner().unwrap().map_err(|failure| describe(&failure))
}

/// The failure, with the shortest story that leads to one of the same kind.
fn describe(failure: &Failure) -> String {
    match story::shortest(failure.case.clone()) {
        Some(shortest) => format!("{failure}\nthe shortest story of this kind:\n{shortest}"),
        None => failure.to_string(),
    }
}

/// The range of seeds to run. The environment can override it, as in
/// `SIMULATION_SEEDS=2000..40000`.
fn seeds(usual: u64) -> std::ops::Range<u64> {
    let asked = std::env::var("SIMULATION_SEEDS").ok();
    let range = asked.as_deref().and_then(|asked| asked.split_once(".."));
    match range.map(|(from, to)| (from.parse(), to.parse())) {
        Some((Ok(from), Ok(to))) => from..to,
        _ => 0..usual,
    }
}

/// Whether the default seeds are run. How often a custom range, which may be small, produces each
/// event is not known.
fn are_usual() -> bool {
    std::env::var_os("SIMULATION_SEEDS").is_none()
}

/// All guarantees hold under every fault that leaves the store's data alone. The faults are also
/// effective: every way to get and to lose a lock occurs many times.
#[test]
fn no_guarantee_is_broken_while_the_store_keeps_its_data() {
    let stats = run_all(seeds(5_000), Variant::Faults).unwrap_or_else(|failure| panic!("{failure}"));
    println!("{stats:?}");
    if are_usual() {
        stats.assert_rich();
    }
}

/// The same with exclusive locks, shared locks and permits of the same keys: never an exclusive
/// holder beside anybody, never more permits than any holder's limit, and every task is served.
#[test]
fn no_guarantee_of_any_mode_is_broken_while_the_store_keeps_its_data() {
    let stats = run_all(seeds(3_000), Variant::Mixed).unwrap_or_else(|failure| panic!("{failure}"));
    println!("{stats:?}");
    if are_usual() {
        stats.assert_rich();
        assert!(stats.joined > 1_000 && stats.in_company > 2_000, "{stats:?}");
    }
}

/// In every mode, a hand-off without faults takes a few messages.
#[test]
fn without_faults_nobody_waits_for_a_ttl_in_any_mode() {
    let stats = run_all(seeds(300), Variant::MixedPrompt).unwrap_or_else(|failure| panic!("{failure}"));
    println!("{stats:?}");
    assert_eq!(
        (stats.lost, stats.failed, stats.left_to_run_out),
        (0, 0, 0),
        "{stats:?}"
    );
}

/// Without faults no task ever waits for a lease to expire: every hand-off takes a few messages.
#[test]
fn without_faults_nobody_waits_for_a_ttl() {
    let stats = run_all(seeds(400), Variant::Prompt).unwrap_or_else(|failure| panic!("{failure}"));
    println!("{stats:?}");
    assert_eq!(
        (stats.lost, stats.failed, stats.left_to_run_out),
        (0, 0, 0),
        "{stats:?}"
    );
}

/// A task waits for at most one turn of each other process, besides its own place in line. A turn
/// serves the tasks that waited when it began, however fast others ask.
#[test]
fn without_faults_nobody_waits_for_two_turns_of_another_process() {
    let stats = run_all(seeds(400), Variant::Turns).unwrap_or_else(|failure| panic!("{failure}"));
    println!("{stats:?}");
    assert_eq!(
        (stats.lost, stats.failed, stats.left_to_run_out),
        (0, 0, 0),
        "{stats:?}"
    );
    assert!(
        !are_usual() || stats.gated > 2_000 && stats.in_turns > 10_000,
        "{stats:?}"
    );
}

/// If a manager is not notified that another one waits, its next renewal reports it. No task waits
/// until a linger period ends or a lease expires.
#[test]
fn renewals_make_up_for_lost_messages() {
    let stats = run_all(seeds(400), Variant::Unheard).unwrap_or_else(|failure| panic!("{failure}"));
    println!("{stats:?}");
    assert!(
        !are_usual() || stats.lingering > 300 && stats.pushes_lost > 130,
        "{stats:?}"
    );
    assert_eq!(
        (stats.lost, stats.failed, stats.left_to_run_out),
        (0, 0, 0),
        "{stats:?}"
    );
}

/// If the store forgets, a key may have two holders at once, but tokens still grow in the order in
/// which the store issued them.
#[test]
fn tokens_grow_even_if_the_store_forgets() {
    let stats = run_all(seeds(700), Variant::Forgetting).unwrap_or_else(|failure| panic!("{failure}"));
    println!("{stats:?}");
    assert!(!are_usual() || stats.forgotten > 200, "{stats:?}");
}

/// Regression: an acquire was executed after its connection had been replaced and its release had
/// been answered, and the lease that it took belonged to nobody.
#[test]
fn run_with_a_late_acquire_leaves_nothing_behind() {
    run_all(25_791..25_792, Variant::Forgetting).unwrap_or_else(|failure| panic!("{failure}"));
}

/// After a replica that lacks the last leases was promoted, a manager that could know of the
/// failover grants no lock that the new primary does not know, and no token that is not larger than
/// earlier ones. This holds even though leases linger and are passed on without a message.
#[test]
fn no_lock_unknown_to_the_new_primary_is_granted_after_a_failover() {
    let stats = run_all(seeds(1_000), Variant::Failover).unwrap_or_else(|failure| panic!("{failure}"));
    println!("{stats:?}");
    assert!(
        !are_usual() || stats.forgotten > 400 && stats.lingering > 750,
        "{stats:?}"
    );
}

/// Checks that the flaw is found within this many seeds, as a violation of exclusion or of the
/// order of tokens.
fn assert_caught(flaw: Flaw, variant: Variant, seeds: u64) {
    for seed in 0..seeds {
        if let Err(failure) = run(&Case::new(seed, variant, Some(flaw)), false)
            && failure.is_unsafe()
        {
            println!("{flaw:?} is caught: {failure}");
            return;
        }
    }
    panic!("{flaw:?} is not caught by {seeds} seeds");
}

#[test]
fn believing_old_grants_is_caught() {
    assert_caught(Flaw::IgnoresMarks, Variant::Faults, 2_000);
}

#[test]
fn counting_from_the_receipt_is_caught() {
    assert_caught(Flaw::CountsFromReceipt, Variant::Faults, 2_000);
}

#[test]
fn using_cycles_again_is_caught() {
    assert_caught(Flaw::ReusesCycles, Variant::Faults, 2_000);
}

#[test]
fn believing_confirmations_of_another_server_is_caught() {
    assert_caught(Flaw::BelievesOldServers, Variant::Failover, 1_000);
}

/// The release script once published a grant, and passed the lease on to the next waiter if PUBLISH
/// counted no receiver. However, a message published on a primary also reaches subscribers at
/// replicas, uncounted. After a switch-over behind one address, a manager whose inbox was still at
/// the old primary entered, and so did the next one, with the same tokens.
#[test]
fn counting_the_receivers_of_a_grant_is_caught() {
    assert_caught(Flaw::CountsReceivers, Variant::Faults, 2_000);
}

/// An acquire may be executed after the release of its cycle was answered, so that release is
/// repeated. Otherwise leases and places in the queue that no manager knows of would stay behind.
#[test]
fn trusting_every_answered_release_is_caught() {
    let left = |seed| match run(&Case::new(seed, Variant::Faults, Some(Flaw::TrustsReleases)), false) {
        Err(failure) => failure.is_something_left(),
        Ok(_) => false,
    };
    assert!((0..2_000).any(left), "not caught by 2,000 seeds");
}

/// A release in the background may know nothing but the cycle: the store reports that a cycle which
/// is over is wanted, or a release is repeated.
#[test]
fn forgetting_a_min_hold_is_caught() {
    assert_caught(Flaw::ForgetsMinHolds, Variant::Faults, 2_000);
}

#[test]
fn letting_readers_pass_is_caught() {
    assert_caught(Flaw::LetsReadersPass, Variant::Mixed, 2_000);
}

#[test]
fn ending_shared_leases_by_a_clients_clock_is_caught() {
    assert_caught(Flaw::EndsByClientsClock, Variant::Mixed, 2_000);
}

/// A task in another process would wait for as long as tasks of this one ask again.
#[test]
fn serving_newcomers_within_a_turn_is_noticed() {
    for variant in [Variant::Turns, Variant::Prompt, Variant::Mixed] {
        assert_noticed(Flaw::ServesNewcomers, variant);
    }
}

/// Checks that the flaw is found within 2,000 seeds, as a violation of any guarantee.
fn assert_noticed(flaw: Flaw, variant: Variant) {
    let failure = (0..2_000).find_map(|seed| run(&Case::new(seed, variant, Some(flaw)), false).err());
    let failure = failure.unwrap_or_else(|| panic!("{flaw:?} is not noticed by 2,000 seeds"));
    println!("{flaw:?} is noticed: {failure}");
}

/// A holder that died would keep its permits forever.
#[test]
fn permits_that_never_end_are_noticed() {
    assert_noticed(Flaw::NeverEndsHolders, Variant::Mixed);
}

/// An exclusive request would wait for a lease that nobody has any more.
#[test]
fn a_mark_that_outlives_its_holders_is_noticed() {
    assert_noticed(Flaw::KeepsMarker, Variant::MixedPrompt);
}

#[test]
fn a_seed_gives_the_same_run_every_time() {
    let runs = [(); 2].map(|()| run(&Case::new(7, Variant::Faults, None), false).map(|stats| format!("{stats:?}")));
    assert!(matches!(&runs, [Ok(one), Ok(other)] if one == other), "{runs:?}");
}

/// Runs seeds of all kinds of runs in turn, for the time given in the environment:
/// `SIMULATION_SECONDS=3600`, starting at the seed `SIMULATION_FROM=1000000`. `make soak` runs
/// this.
#[test]
fn soak() {
    let number = |name: &str, usual| std::env::var(name).map_or(usual, |value| value.parse().unwrap());
    let (seconds, from) = (number("SIMULATION_SECONDS", 1), number("SIMULATION_FROM", 1_000_000));
    let until = Instant::now() + Duration::from_secs(seconds);
    let mut to = from;
    let mut all = Stats::default();
    while Instant::now() < until {
        let seeds = to..to + 20;
        to = seeds.end;
        for variant in [
            Variant::Faults,
            Variant::Forgetting,
            Variant::Failover,
            Variant::Prompt,
            Variant::Turns,
            Variant::Unheard,
        ] {
            let stats = run_all(seeds.clone(), variant).unwrap_or_else(|failure| panic!("{failure}"));
            all.add(&stats);
        }
    }
    println!("seeds {from}..{to} of each kind hold\n{all:?}");
}

#[test]
fn story_of_a_failure_is_short_and_fails_in_the_same_way() {
    let of = |seed| Case::new(seed, Variant::Faults, Some(Flaw::CountsFromReceipt));
    let failing: Vec<_> = (0..2_000)
        .filter_map(|seed| run(&of(seed), true).err())
        .take(10)
        .collect();
    let lengths = failing.iter().map(|long| {
        let short = story::shortest(long.case.clone()).expect("the failure can be reproduced");
        assert_eq!(short.kind(), long.kind());
        let again = run(&short.case, true).expect_err("it fails each time");
        assert_eq!(again.to_string(), short.to_string());
        (short.length(), long.length())
    });
    let lengths: Vec<_> = lengths.collect();
    // One that needs a rare order of events can hardly be shortened.
    let is_short = |&&(short, long): &&(usize, usize)| short * 2 < long;
    assert!(
        lengths.iter().filter(is_short).count() >= 5,
        "lines of each: {lengths:?}"
    );
}
