//! The tool as a process, on real servers. A test that changes the state of its process runs as a
//! worker.

// A failing environment ends the test.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

mod alerts;
mod bench;
mod break_lease;
mod clients;
#[cfg(target_os = "linux")]
mod dashboard;
mod demo;
mod doctor;
mod exec;
mod guides;
mod inspect;
mod kinds;
mod ls;
mod security;
mod serve;
#[cfg(target_os = "linux")]
mod slow_lookup;
mod tool;
mod top;

use support::worker;

/// The processes that tests start.
#[test]
fn worker_entry() {
    let Some(me) = worker::current() else { return };
    match me.name() {
        "chooser" => security::tls::choose_and_lock(&me),
        "load" => top::load::run(&me),
        "agent client" => serve::client::run(&me),
        serve::chaos::client::NAME => serve::chaos::client::fight(&me),
        support_chaos::worker::NAME => support_chaos::worker::fight(&me),
        "recorded" => security::secrets::record(&me),
        name => panic!("no worker is called {name}"),
    }
}
