//! Real workers use real servers under many faults, and an independent checker judges the histories
//! that they write.
//!
//! `tests/support_chaos` has the rounds, the workers and the checker. Here are what they run on:
//! servers of each kind with their faults (`scene/`), and the workers on them (`crew.rs`).
//!
//! `make chaos` runs rounds for a given time.

// A failing environment ends the test.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]
// A test binary exports nothing.
#![allow(unreachable_pub)]

mod cluster_load;
mod crew;
mod scene;

use std::path::Path;

use parking_lot::Mutex;
use support_chaos::campaign::{Campaign, withstands_each_fault};
use support_chaos::worker;

use crew::Crew;

/// Where the histories of rounds with findings are kept.
const KEEP_IN: &str = env!("CARGO_TARGET_TMPDIR");

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
    withstands_each_fault(kind, seed, granted_min, Path::new(KEEP_IN), &Crew::start);
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
fn chaos_for_the_requested_time() {
    let Some(campaign) = Campaign::from_env() else { return };
    let _alone = LANES.each_ref().map(Mutex::lock);
    campaign.run(scene::KINDS, Path::new(KEEP_IN), &Crew::start);
}
