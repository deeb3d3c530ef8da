//! Metrics, through the `metrics` facade: handles are made once per manager, and no label ever holds a key, unless a setting asks for the hottest ones.
//!
//! Install a recorder before connecting: handles that were made without one do nothing for ever. The library never
//! installs one itself, but for the admin endpoint, which is asked for.

mod class;
mod manager;
mod node;
mod recorder;
mod shard;
mod table;
mod tally;

use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};

pub(crate) use class::{ClassMetrics, Classes, Ending};
pub(crate) use manager::{Limit, ManagerMetrics};
pub(crate) use node::NodeMetrics;
pub(crate) use shard::{RequestKind, ShardMetrics};
#[cfg(feature = "admin")]
pub(crate) use table::HOT_KEY;
pub use table::{METRICS, Metric, MetricKind, MetricUnit};

/// Tells the installed recorder what each metric means.
pub(crate) fn describe() {
    for metric in METRICS {
        let unit = match metric.unit {
            MetricUnit::Count | MetricUnit::Ratio => Unit::Count,
            MetricUnit::Seconds => Unit::Seconds,
        };
        match metric.kind {
            MetricKind::Counter => describe_counter!(metric.name, unit, metric.meaning),
            MetricKind::Gauge => describe_gauge!(metric.name, unit, metric.meaning),
            MetricKind::Histogram => describe_histogram!(metric.name, unit, metric.meaning),
        }
    }
}
