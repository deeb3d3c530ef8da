//! Metrics and traces. They have a process of their own, since a process has only one recorder and
//! one subscriber.

// A failing environment ends the test.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

mod metrics;
mod tracing;

use support::worker;

/// The processes that tests start.
#[test]
fn worker_entry() {
    let Some(me) = worker::current() else { return };
    match me.name() {
        "stopped" => metrics::report_stalls(&me),
        name => panic!("no worker is called {name}"),
    }
}
