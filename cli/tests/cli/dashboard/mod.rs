//! The Grafana dashboard: it conforms to Grafana's schema, its metrics exist, and each panel has
//! data from a real Prometheus that scrapes a real load. Panels for faults have data while there is
//! a fault.

mod agent;
mod command;
mod definition;
mod environment;
mod faults;
mod metrics;
mod model;
mod panel_data;
