//! The tests of the library, in one process, so that they are linked once and share their servers.
//! Tests that change the state of their process or load the machine are not here: `alerts` and
//! `telemetry` install a recorder of metrics or a subscriber, `chaos` and `load` use all cores.

// A failing environment ends the test.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

#[cfg(feature = "admin")]
mod admin;
mod basics;
mod cancellation;
#[cfg(target_os = "linux")]
mod clocks;
mod closing;
mod cluster;
mod configuration;
mod connections;
mod credentials;
mod documents;
#[cfg(feature = "etcd")]
mod etcd;
mod fencing_sql;
mod foreign_code;
mod inbox;
mod late_requests;
mod lead;
mod leases;
mod limits;
mod linger;
mod lock_all;
mod min_hold;
mod modes;
mod module_imports;
mod order;
mod other_clients;
mod pauses;
mod pooled_connections;
#[cfg(feature = "admin")]
mod readiness;
mod redlock;
mod refused_connections;
mod replicas;
mod send_sync;
mod sentinel;
mod server_errors;
mod servers;
mod shards;
mod tokens;
#[cfg(feature = "tower")]
mod tower;
mod traffic;

use support::worker;
use support_locks::{LOCKER, run_commands};

/// The processes that tests start.
#[test]
fn worker_entry() {
    let Some(me) = worker::current() else { return };
    match me.name() {
        LOCKER => run_commands(&me),
        #[cfg(target_os = "linux")]
        "asker" => connections::request_new_keys_forever(&me),
        #[cfg(target_os = "linux")]
        "keeper" => linger::keep_new_keys_in_rounds(&me),
        #[cfg(target_os = "linux")]
        "clock" => clocks::report_time(&me),
        "counter" => basics::count(&me),
        "candidate" => lead::campaign(&me),
        "failing log" => foreign_code::lock_with_a_failing_log(&me),
        "holder" => modes::hold(&me),
        "min_holder" => min_hold::hold(&me),
        "echo" => servers::echo(&me),
        #[cfg(feature = "admin")]
        "endpoint" => admin::serve_many_locks(&me),
        "paused" => pauses::watch_guard(&me),
        #[cfg(target_os = "linux")]
        "server" => servers::serve(&me),
        "user_of_many_keys" => closing::use_many_keys(&me),
        "writer" => tokens::write_late(&me),
        name => panic!("no worker is called {name}"),
    }
}
