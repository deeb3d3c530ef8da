//! The list of all metrics. They go through the [`metrics`](https://docs.rs/metrics) facade.

pub use crate::telemetry::{Histograms, METRICS, Metric, MetricKind, MetricUnit};
