//! TLS connections, users with few permissions, and passwords that stay secret.

// A failing environment ends the test.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

#[path = "../../../tests/support/mod.rs"]
mod support;
#[path = "../../../tests/support_locks/mod.rs"]
mod support_locks;
#[path = "../tool/mod.rs"]
mod tool;

mod acl;
mod needs;
mod recorder;
mod secrets;
#[cfg(feature = "tls")]
mod tls;

/// Tests that need a process of their own; see `support::worker`.
#[cfg(feature = "tls")]
#[test]
fn worker_entry() {
    let Some(me) = support::worker::current() else { return };
    match me.name() {
        "chooser" => tls::choose_and_lock(&me),
        name => panic!("no worker is called {name}"),
    }
}
