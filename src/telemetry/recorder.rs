//! Wrappers of the recorder's counters, gauges and histograms that catch panics: a faulty recorder
//! must not affect any lock.

use std::sync::Arc;

use super::cells::Cells;
use super::histograms::Histograms;
use crate::foreign::RECORDER;

/// A counter of the recorder.
#[derive(Debug)]
pub(crate) struct Counter(metrics::Counter);

/// A gauge of the recorder.
#[derive(Debug)]
pub(crate) struct Gauge(metrics::Gauge);

/// A histogram: its exact counts if the installed recorder is that of [`Histograms`], and a
/// histogram of the recorder.
#[derive(Debug)]
pub(crate) struct Histogram {
    exact: Option<Arc<Cells>>,
    recorder: metrics::Histogram,
}

impl Counter {
    /// `register` asks the recorder for it.
    pub(crate) fn new(register: impl FnOnce() -> metrics::Counter) -> Self {
        Self(registered(metrics::Counter::noop(), register))
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
    /// `register` asks the recorder for it.
    pub(crate) fn new(register: impl FnOnce() -> metrics::Gauge) -> Self {
        Self(registered(metrics::Gauge::noop(), register))
    }

    pub(crate) fn set(&self, value: f64) {
        RECORDER.call(|| self.0.set(value));
    }
}

impl Histogram {
    /// `register` asks the recorder for it.
    pub(crate) fn new(register: impl FnOnce() -> metrics::Histogram) -> Self {
        let noop = metrics::Histogram::noop();
        let (recorder, exact) = Histograms::found(|| registered(noop, register));
        Self { exact, recorder }
    }

    /// Whether every value counts, and not only those in the sample.
    pub(crate) const fn is_exact(&self) -> bool {
        self.exact.is_some()
    }

    pub(crate) fn record(&self, value: f64) {
        self.record_sampled(|| value, true);
    }

    /// Records a value in the exact counts, and passes it to the recorder if it is in the sample.
    pub(crate) fn record_sampled(&self, value: impl FnOnce() -> f64, is_in_sample: bool) {
        if self.exact.is_none() && !is_in_sample {
            return;
        }
        let value = value();
        if let Some(exact) = &self.exact {
            exact.add(value);
        }
        if is_in_sample {
            RECORDER.call(|| self.recorder.record(value));
        }
    }
}

/// What the recorder registers, or `noop` if it panics.
fn registered<T>(noop: T, register: impl FnOnce() -> T) -> T {
    let mut registered = noop;
    RECORDER.call(|| registered = register());
    registered
}

/// Like the macro of the same name in `metrics`.
macro_rules! counter {
    ($($metric:tt)*) => { $crate::telemetry::recorder::Counter::new(|| ::metrics::counter!($($metric)*)) };
}

/// Like the macro of the same name in `metrics`.
macro_rules! gauge {
    ($($metric:tt)*) => { $crate::telemetry::recorder::Gauge::new(|| ::metrics::gauge!($($metric)*)) };
}

/// Like the macro of the same name in `metrics`.
macro_rules! histogram {
    ($($metric:tt)*) => { $crate::telemetry::recorder::Histogram::new(|| ::metrics::histogram!($($metric)*)) };
}

pub(super) use {counter, gauge, histogram};
