//! Wrappers of the recorder's counters, gauges and histograms that catch panics: a faulty recorder
//! must not affect any lock.

use crate::foreign::RECORDER;

/// A counter of the recorder.
#[derive(Debug)]
pub(crate) struct Counter(metrics::Counter);

/// A gauge of the recorder.
#[derive(Debug)]
pub(crate) struct Gauge(metrics::Gauge);

/// A histogram of the recorder.
#[derive(Debug)]
pub(crate) struct Histogram(metrics::Histogram);

impl Counter {
    pub(crate) const fn new(counter: metrics::Counter) -> Self {
        Self(counter)
    }

    /// A counter that records nothing.
    pub(crate) fn noop() -> Self {
        Self(metrics::Counter::noop())
    }

    pub(crate) fn increment(&self, value: u64) {
        RECORDER.call(|| self.0.increment(value));
    }
}

impl Gauge {
    pub(crate) const fn new(gauge: metrics::Gauge) -> Self {
        Self(gauge)
    }

    pub(crate) fn set(&self, value: f64) {
        RECORDER.call(|| self.0.set(value));
    }
}

impl Histogram {
    pub(crate) const fn new(histogram: metrics::Histogram) -> Self {
        Self(histogram)
    }

    pub(crate) fn record(&self, value: f64) {
        RECORDER.call(|| self.0.record(value));
    }
}

/// Like the macro of the same name in `metrics`.
macro_rules! counter {
    ($($metric:tt)*) => { $crate::telemetry::recorder::Counter::new(::metrics::counter!($($metric)*)) };
}

/// Like the macro of the same name in `metrics`.
macro_rules! gauge {
    ($($metric:tt)*) => { $crate::telemetry::recorder::Gauge::new(::metrics::gauge!($($metric)*)) };
}

/// Like the macro of the same name in `metrics`.
macro_rules! histogram {
    ($($metric:tt)*) => { $crate::telemetry::recorder::Histogram::new(::metrics::histogram!($($metric)*)) };
}

pub(super) use {counter, gauge, histogram};
