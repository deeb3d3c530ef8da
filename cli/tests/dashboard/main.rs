//! The Grafana dashboard: it conforms to Grafana's schema, its metrics exist, and each panel has
//! data from a real Prometheus that scrapes a real load. Panels for faults have data while there is
//! a fault.
#![cfg(target_os = "linux")]
// A failing environment ends the test.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

mod command;
mod definition;
mod environment;
mod faults;
mod metrics;
mod model;
mod panel_data;
#[path = "../../../tests/support/mod.rs"]
mod support;
