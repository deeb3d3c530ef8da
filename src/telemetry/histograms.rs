//! The histograms of the library, counted by itself in front of a recorder.
//!
//! # Implementation details
//!
//! A recorder receives histograms value by value. `metrics-exporter-prometheus` reads a clock for
//! each value and keeps it until the next upkeep, which is too much at a million locks a second, so
//! a recorder gets a sample. [`Histograms`] is registered like any recorder. When it is asked for
//! one of the library's histograms it leaves its counts ([`Cells`]) in a variable of the thread,
//! where [`Histograms::found`] finds them, and the library counts there directly.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::sync::Arc;

use metrics::{Counter, Gauge, Histogram, Key, KeyName, Label, Metadata, Recorder, SharedString, Unit};
use parking_lot::Mutex;

use super::cells::{Cells, Totals};
use super::table::{METRICS, Metric, MetricKind};

/// Exact histograms for a process with its own metrics recorder.
///
/// A recorder of the [`metrics`](https://docs.rs/metrics) facade gets every value of a histogram in
/// a call of its own. At a million locks per second this is too expensive, so above 20,000 values
/// per second a recorder gets an even sample, and its `_count`, `_sum` and `_bucket` are too low.
/// `Histograms` counts this crate's histograms itself, every value, and leaves everything else to
/// your recorder: install it in front of it, and append [`render`](Self::render) to your page.
///
/// [`Admin::bind`](https://docs.rs/shardlock/latest/shardlock/admin/struct.Admin.html) does this
/// for you.
///
/// Counting a value takes a few nanoseconds and no lock. Each series takes about 1 KiB, and 200
/// bytes more for each thread that counts. There are as many series as there are combinations of
/// the labels in [`METRICS`]; they stay until the process ends, like those of a recorder.
///
/// # Examples
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use metrics_exporter_prometheus::PrometheusBuilder;
/// use shardlock::metrics::Histograms;
///
/// let recorder = PrometheusBuilder::new().build_recorder();
/// let (handle, histograms) = (recorder.handle(), Histograms::default());
/// // Before a manager connects: a manager that connected earlier records no metrics.
/// metrics::set_global_recorder(histograms.in_front_of(recorder))?;
/// let page = move || handle.render() + &histograms.render();
///
/// let locks = shardlock::LockManager::connect("memory://").await?;
/// locks.lock("k").await?.release().await?;
/// let held = r#"shardlock_hold_seconds_count{class="default",mode="exclusive"} 1"#;
/// assert!(page().contains(held));
/// # Ok(()) }
/// ```
#[derive(Clone, Default)]
pub struct Histograms {
    series: Arc<Mutex<BTreeMap<Key, Arc<Cells>>>>,
}

thread_local! {
    /// Whether the library is registering a histogram, and the counts for it.
    static ASKED: Cell<Asked> = const { Cell::new(Asked::No) };
}

#[derive(Default)]
enum Asked {
    #[default]
    No,
    Yes,
    Found(Arc<Cells>),
}

impl Histograms {
    /// Returns a recorder that keeps this crate's histograms here and passes all other metrics to
    /// `recorder`. Install it with `metrics::set_global_recorder`.
    pub fn in_front_of<R: Recorder>(&self, recorder: R) -> impl Recorder + use<R> {
        Front {
            histograms: self.clone(),
            behind: recorder,
        }
    }

    /// Returns the histograms in the text format of Prometheus, of all managers of the process that
    /// connected after the recorder was installed. Never blocks a lock.
    #[must_use]
    pub fn render(&self) -> String {
        let series = self.series.lock().clone();
        let mut page = String::new();
        for metric in METRICS.iter().filter(|metric| metric.kind == MetricKind::Histogram) {
            let mut series = series.iter().filter(|(key, _)| key.name() == metric.name).peekable();
            if series.peek().is_none() {
                continue;
            }
            // Writing to a string can't fail.
            writeln!(
                page,
                "# HELP {0} {1}\n# TYPE {0} histogram",
                metric.name, metric.meaning
            )
            .ok();
            for (key, cells) in series {
                write_series(&mut page, metric.name, key.labels(), cells).ok();
            }
            page.push('\n');
        }
        page
    }

    /// Calls `register`, which registers a histogram of the library with the installed recorder.
    /// Returns the counts too if one of these recorders was asked.
    pub(super) fn found<R>(register: impl FnOnce() -> R) -> (R, Option<Arc<Cells>>) {
        ASKED.set(Asked::Yes);
        let registered = register();
        let found = match ASKED.take() {
            Asked::Found(cells) => Some(cells),
            Asked::Yes | Asked::No => None,
        };
        (registered, found)
    }

    fn cells(&self, metric: &Metric, key: &Key) -> Arc<Cells> {
        let mut series = self.series.lock();
        let make = || Arc::new(Cells::new(metric.buckets()));
        Arc::clone(series.entry(key.clone()).or_insert_with(make))
    }
}

impl fmt::Debug for Histograms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let series = self.series.lock().len();
        f.debug_struct("Histograms").field("series", &series).finish()
    }
}

fn write_series<'a>(
    page: &mut String,
    name: &str,
    labels: impl Iterator<Item = &'a Label>,
    cells: &Cells,
) -> fmt::Result {
    let labels: Vec<String> = labels
        .map(|label| format!("{}=\"{}\"", label.key(), escaped(label.value())))
        .collect();
    let labels = labels.join(",");
    let (comma, braced) = if labels.is_empty() {
        ("", String::new())
    } else {
        (",", format!("{{{labels}}}"))
    };
    let Totals { counts, sum } = cells.totals();
    let mut total = 0;
    for (index, count) in counts.iter().enumerate() {
        total += count;
        match cells.bounds().get(index) {
            Some(bound) => writeln!(page, "{name}_bucket{{{labels}{comma}le=\"{bound}\"}} {total}")?,
            None => writeln!(page, "{name}_bucket{{{labels}{comma}le=\"+Inf\"}} {total}")?,
        }
    }
    writeln!(page, "{name}_sum{braced} {sum}\n{name}_count{braced} {total}")
}

/// Escapes the value of a label for the text format of Prometheus.
pub(crate) fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// See [`Histograms::in_front_of`].
struct Front<R> {
    histograms: Histograms,
    behind: R,
}

/// The library's histogram with this name, if there is one.
fn own(name: &str) -> Option<&'static Metric> {
    METRICS
        .iter()
        .find(|metric| metric.kind == MetricKind::Histogram && metric.name == name)
}

impl<R: Recorder> Recorder for Front<R> {
    fn describe_counter(&self, key: KeyName, unit: Option<Unit>, description: SharedString) {
        self.behind.describe_counter(key, unit, description);
    }

    fn describe_gauge(&self, key: KeyName, unit: Option<Unit>, description: SharedString) {
        self.behind.describe_gauge(key, unit, description);
    }

    fn describe_histogram(&self, key: KeyName, unit: Option<Unit>, description: SharedString) {
        if own(key.as_str()).is_none() {
            self.behind.describe_histogram(key, unit, description);
        }
    }

    fn register_counter(&self, key: &Key, metadata: &Metadata<'_>) -> Counter {
        self.behind.register_counter(key, metadata)
    }

    fn register_gauge(&self, key: &Key, metadata: &Metadata<'_>) -> Gauge {
        self.behind.register_gauge(key, metadata)
    }

    fn register_histogram(&self, key: &Key, metadata: &Metadata<'_>) -> Histogram {
        let Some(metric) = own(key.name()) else {
            return self.behind.register_histogram(key, metadata);
        };
        let cells = self.histograms.cells(metric, key);
        match ASKED.take() {
            // The library counts directly, and must not count twice.
            Asked::Yes => {
                ASKED.set(Asked::Found(cells));
                Histogram::noop()
            }
            Asked::No | Asked::Found(_) => Histogram::from_arc(cells),
        }
    }
}

#[cfg(test)]
mod tests {
    use metrics::{NoopRecorder, histogram};

    use super::*;
    use crate::telemetry::table::{HOLD, STALL};

    #[test]
    fn page_has_cumulative_buckets_and_escaped_labels() {
        let histograms = Histograms::default();
        metrics::with_local_recorder(&histograms.in_front_of(NoopRecorder), || {
            for value in [0.000_01, 0.003, 0.003, 90.0] {
                histogram!(HOLD, "class" => "a\"b\\c\nd").record(value);
            }
            histogram!(STALL).record(0.5);
            histogram!("of_the_application").record(1.0);
        });
        let page = histograms.render();
        let lines = |start: &str| page.lines().filter(|line| line.starts_with(start)).collect::<Vec<_>>();
        let label = "class=\"a\\\"b\\\\c\\nd\"";
        let buckets: Vec<u64> = lines("shardlock_hold_seconds_bucket")
            .iter()
            .map(|line| line.rsplit_once(' ').unwrap().1.parse().unwrap())
            .collect();
        assert_eq!(buckets[..9], [1, 1, 1, 1, 1, 1, 1, 1, 3]);
        assert_eq!(buckets[9..], [[3; 12].as_slice(), &[4]].concat());
        for line in [
            format!("shardlock_hold_seconds_bucket{{{label},le=\"0.00001\"}} 1"),
            format!("shardlock_hold_seconds_bucket{{{label},le=\"+Inf\"}} 4"),
            format!("shardlock_hold_seconds_sum{{{label}}} 90.00601"),
            format!("shardlock_hold_seconds_count{{{label}}} 4"),
            "shardlock_runtime_stall_seconds_bucket{le=\"0.25\"} 0".to_owned(),
            "shardlock_runtime_stall_seconds_sum 0.5".to_owned(),
            "shardlock_runtime_stall_seconds_count 1".to_owned(),
            "# TYPE shardlock_runtime_stall_seconds histogram".to_owned(),
        ] {
            assert_eq!(lines(&line), [&line], "{page}");
        }
        assert!(!page.contains("of_the_application"), "{page}");
        assert!(!page.contains("shardlock_wait_seconds"), "{page}");
    }

    #[test]
    fn series_of_two_managers_are_one() {
        let histograms = Histograms::default();
        metrics::with_local_recorder(&histograms.in_front_of(NoopRecorder), || {
            for _ in 0..2 {
                let (_, cells) = Histograms::found(|| histogram!(HOLD, "class" => "a"));
                cells.unwrap().add(1.0);
            }
        });
        assert!(
            histograms
                .render()
                .contains("shardlock_hold_seconds_count{class=\"a\"} 2\n")
        );
        // Without such a recorder there are no counts.
        assert!(Histograms::found(|| histogram!(HOLD, "class" => "a")).1.is_none());
    }
}
