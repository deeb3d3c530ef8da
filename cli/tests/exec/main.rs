//! `shardlock exec` with real processes, real signals and a real server.

// A failing environment ends the test.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

#[path = "../../../tests/support/mod.rs"]
mod support;
#[path = "../tool/mod.rs"]
mod tool;

mod conflict;
mod loss;
mod metrics;
mod outcome;
mod process_tree;
mod signals;
mod terminal;
