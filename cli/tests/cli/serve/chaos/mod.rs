//! An agent under many faults: its clients and managers of their own contend for the same keys, and
//! the checker of `tests/support_chaos` judges the histories that they write.
//!
//! The workers with a manager of their own are from there, too. A client (`client.rs`) holds its
//! locks as docs/agent.md describes: it relies on the time that `HELD` has replied, counted from
//! when it asked, and no longer.
//!
//! `make chaos-agent` runs rounds for a given time.

mod agent;
pub(crate) mod client;
mod connection;
mod crew;

use std::path::Path;

use support_chaos::campaign::{Campaign, withstands_each_fault};

use crew::Crew;

/// Where the histories of rounds with findings are kept.
const KEEP_IN: &str = env!("CARGO_TARGET_TMPDIR");

#[test]
fn agent_withstands_each_fault() {
    withstands_each_fault("agent", 1, 2_000, Path::new(KEEP_IN), &Crew::start);
}

/// `make chaos-agent`: runs rounds for the given number of minutes and prints a report. Does
/// nothing unless `SHARDLOCK_TEST_CHAOS_MINUTES` is set.
#[test]
fn chaos_for_the_requested_time() {
    let Some(campaign) = Campaign::from_env() else { return };
    campaign.run(&["agent"], Path::new(KEEP_IN), &Crew::start);
}
