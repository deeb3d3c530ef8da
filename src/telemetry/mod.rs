//! Metrics, through the `metrics` facade. Handles are created once per manager. No label ever
//! contains a key, except those of the hottest keys if a setting enables them.
//!
//! Install a recorder before connecting: handles created without one never record anything. The
//! library itself installs a recorder only for the admin endpoint, on request.

pub mod agent_table;
mod cells;
mod class;
mod class_gauges;
mod histograms;
mod manager;
mod node;
mod recorder;
mod shard;
mod stripes;
mod table;
mod tally;

use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};

pub(crate) use class::{ClassMetrics, Classes, DEFAULT_CLASS, RequestOutcome};
pub(crate) use class_gauges::ClassSnapshot;
pub use histograms::Histograms;
#[cfg(feature = "admin")]
pub(crate) use histograms::escaped;
pub(crate) use manager::{Limit, ManagerMetrics};
pub(crate) use node::NodeMetrics;
pub(crate) use shard::{RequestKind, ShardMetrics};
#[cfg(feature = "admin")]
pub(crate) use table::HOT_KEY;
pub use table::{METRICS, Metric, MetricKind, MetricUnit};

use crate::foreign::RECORDER;

/// Registers the description of each metric with the installed recorder.
pub(crate) fn describe(metrics: &[Metric]) {
    for metric in metrics {
        let unit = match metric.unit {
            MetricUnit::Count | MetricUnit::Ratio => Unit::Count,
            MetricUnit::Seconds => Unit::Seconds,
        };
        RECORDER.call(|| match metric.kind {
            MetricKind::Counter => describe_counter!(metric.name, unit, metric.meaning),
            MetricKind::Gauge => describe_gauge!(metric.name, unit, metric.meaning),
            MetricKind::Histogram => describe_histogram!(metric.name, unit, metric.meaning),
        });
    }
}
