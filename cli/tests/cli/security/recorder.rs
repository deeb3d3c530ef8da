//! Records everything that is logged, traced or measured in this process, as an application that
//! uses the library could.

use std::fmt::{Debug, Write};
use std::sync::{Arc, OnceLock};

use metrics::{Counter, Gauge, Histogram, Key, KeyName, Metadata, Recorder, SharedString, Unit};
use parking_lot::Mutex;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Subscriber};

/// Everything recorded so far.
#[derive(Clone, Default)]
pub(crate) struct LogRecorder(Arc<Mutex<String>>);

impl LogRecorder {
    /// Starts recording, once for the whole process. From then on all tests of the process are
    /// recorded.
    pub(crate) fn install() -> Self {
        static RECORDER: OnceLock<LogRecorder> = OnceLock::new();
        let recorder = RECORDER.get_or_init(|| {
            let recorder = Self::default();
            tracing::subscriber::set_global_default(recorder.clone()).expect("there is no other subscriber");
            metrics::set_global_recorder(recorder.clone()).expect("there is no other recorder");
            log::set_boxed_logger(Box::new(recorder.clone())).expect("there is no other logger");
            log::set_max_level(log::LevelFilter::Trace);
            recorder
        });
        recorder.clone()
    }

    pub(crate) fn recorded(&self) -> String {
        self.0.lock().clone()
    }

    pub(crate) fn note(&self, what: &impl Debug) {
        // Writing to a string can't fail.
        writeln!(self.0.lock(), "{what:?}").ok();
    }
}

impl Visit for LogRecorder {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.note(&(field.name(), value));
    }
}

impl Subscriber for LogRecorder {
    fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, span: &Attributes<'_>) -> Id {
        span.record(&mut self.clone());
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, values: &Record<'_>) {
        values.record(&mut self.clone());
    }

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        self.note(event.metadata());
        event.record(&mut self.clone());
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

impl log::Log for LogRecorder {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        self.note(record);
    }

    fn flush(&self) {}
}

impl Recorder for LogRecorder {
    fn describe_counter(&self, key: KeyName, _: Option<Unit>, description: SharedString) {
        self.note(&(key, description));
    }

    fn describe_gauge(&self, key: KeyName, _: Option<Unit>, description: SharedString) {
        self.note(&(key, description));
    }

    fn describe_histogram(&self, key: KeyName, _: Option<Unit>, description: SharedString) {
        self.note(&(key, description));
    }

    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        self.note(key);
        Counter::noop()
    }

    fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
        self.note(key);
        Gauge::noop()
    }

    fn register_histogram(&self, key: &Key, _: &Metadata<'_>) -> Histogram {
        self.note(key);
        Histogram::noop()
    }
}
