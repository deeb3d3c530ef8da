//! The dashboard for Grafana: as its schema wants it, of metrics that there are, and each panel with data from a real Prometheus that scrapes a
//! real load; those that show faults, while there is one.
#![cfg(target_os = "linux")]
// A test is over when its surroundings fail.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

mod board;
mod command;
mod faults;
mod metrics;
mod model;
mod running;
mod scene;
#[path = "../support/mod.rs"]
mod support;
