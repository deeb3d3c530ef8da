//! One source as it is known: what it said last, and whether it is away.

use std::time::{Duration, Instant};

use super::rates::Rates;
use crate::top::source::Look;

#[derive(Debug, Default)]
pub(in crate::top) struct Process {
    pub(in crate::top) label: String,
    /// What it said last, and when.
    pub(super) said: Option<(Look, Instant)>,
    pub(super) rates: Rates,
    /// Why there is no answer, and since when.
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

    /// Whether what it said last is old, since it says nothing now.
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

/// A source that says nothing now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::top) struct Away<'a> {
    pub(in crate::top) label: &'a str,
    pub(in crate::top) reason: &'a str,
    /// For how long it has said nothing.
    pub(in crate::top) silent: Duration,
    /// How long ago it said something, if it ever did.
    pub(in crate::top) said: Option<Duration>,
}
