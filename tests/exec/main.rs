//! `shardlock exec`, as real processes with real signals against a real server.

// A test is over when its surroundings fail.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

#[path = "../support/mod.rs"]
mod support;
#[path = "../tool/mod.rs"]
mod tool;

mod conflict;
mod loss;
mod metrics;
mod outcome;
mod signals;
mod terminal;
mod tree;
