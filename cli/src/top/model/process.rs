//! A source: its last sample, and whether it is unavailable.

use std::time::{Duration, Instant};

use super::rates::Rates;
use crate::top::source::Look;

#[derive(Debug, Default)]
pub(in crate::top) struct Process {
    pub(in crate::top) label: String,
    /// The last sample, and when it was taken.
    pub(super) said: Option<(Look, Instant)>,
    pub(super) rates: Rates,
    /// Why the source is unavailable, and since when.
    away: Option<(String, Instant)>,
}

impl Process {
    pub(super) fn new(label: String) -> Self {
        Self {
            label,
            ..Self::default()
        }
    }

    pub(super) fn take(&mut self, look: Result<Look, String>, at: Instant) {
        match look {
            Ok(look) => {
                let before = self.said.as_ref().map(|(look, at)| (look, *at));
                self.rates.follow(before, (&look, at));
                self.said = Some((look, at));
                self.away = None;
            }
            Err(reason) => {
                let since = self.away.take().map_or(at, |(_, since)| since);
                self.away = Some((reason, since));
            }
        }
    }

    pub(in crate::top) fn look(&self) -> Option<&Look> {
        self.said.as_ref().map(|(look, _)| look)
    }

    /// Whether the last sample is outdated because the source is unavailable.
    pub(in crate::top) const fn is_stale(&self) -> bool {
        self.away.is_some()
    }

    pub(super) fn away(&self, now: Instant) -> Option<Away<'_>> {
        let (reason, since) = self.away.as_ref()?;
        Some(Away {
            label: &self.label,
            reason,
            silent: now.saturating_duration_since(*since),
            said: self.said.as_ref().map(|(_, at)| now.saturating_duration_since(*at)),
        })
    }
}

/// A source that is unavailable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::top) struct Away<'a> {
    pub(in crate::top) label: &'a str,
    pub(in crate::top) reason: &'a str,
    /// How long the source has been unavailable.
    pub(in crate::top) silent: Duration,
    /// The age of its last sample, if there is one.
    pub(in crate::top) said: Option<Duration>,
}
