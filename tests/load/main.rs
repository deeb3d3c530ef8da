//! Tests that load the machine, one at a time and beside no others.

// A failing environment ends the test.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

mod fairness;
mod overlapping;
mod renewals;
mod semaphore;

use support::worker;

/// Held by the test that runs.
static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// The processes that tests start.
#[test]
fn worker_entry() {
    let Some(me) = worker::current() else { return };
    match me.name() {
        "contender" => fairness::contend(&me),
        "permits" => semaphore::use_permits(&me),
        "user_of_overlapping_keys" => overlapping::contend(&me),
        name => panic!("no worker is called {name}"),
    }
}
