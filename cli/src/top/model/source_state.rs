//! A source: its last sample, and whether it is unavailable.

use std::time::{Duration, Instant};

use super::rates::Rates;
use crate::top::source::Sample;

#[derive(Debug, Default)]
pub(in crate::top) struct SourceState {
    pub(in crate::top) label: String,
    /// The last sample, and when it was taken.
    pub(super) last_sample: Option<(Sample, Instant)>,
    pub(super) rates: Rates,
    /// Why the source is unavailable, and since when.
    unavailable: Option<(String, Instant)>,
}

impl SourceState {
    pub(super) fn new(label: String) -> Self {
        Self {
            label,
            ..Self::default()
        }
    }

    pub(super) fn update(&mut self, sample: Result<Sample, String>, at: Instant) {
        match sample {
            Ok(sample) => {
                let before = self.last_sample.as_ref().map(|(sample, at)| (sample, *at));
                self.rates.update(before, (&sample, at));
                self.last_sample = Some((sample, at));
                self.unavailable = None;
            }
            Err(reason) => {
                let since = self.unavailable.take().map_or(at, |(_, since)| since);
                self.unavailable = Some((reason, since));
            }
        }
    }

    pub(in crate::top) fn sample(&self) -> Option<&Sample> {
        self.last_sample.as_ref().map(|(sample, _)| sample)
    }

    /// Whether the last sample is outdated because the source is unavailable.
    pub(in crate::top) const fn is_stale(&self) -> bool {
        self.unavailable.is_some()
    }

    pub(super) fn unavailable(&self, now: Instant) -> Option<Unavailable<'_>> {
        let (reason, since) = self.unavailable.as_ref()?;
        Some(Unavailable {
            label: &self.label,
            reason,
            unavailable_for: now.saturating_duration_since(*since),
            last_sample: self
                .last_sample
                .as_ref()
                .map(|(_, at)| now.saturating_duration_since(*at)),
        })
    }
}

/// A source that is unavailable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::top) struct Unavailable<'a> {
    pub(in crate::top) label: &'a str,
    pub(in crate::top) reason: &'a str,
    /// How long the source has been unavailable.
    pub(in crate::top) unavailable_for: Duration,
    /// The age of its last sample, if there is one.
    pub(in crate::top) last_sample: Option<Duration>,
}
