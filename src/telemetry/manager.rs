//! Metrics of a manager as a whole.

use std::time::Duration;

use super::recorder::{Counter, Histogram, counter, histogram};

use super::class::Classes;
use super::table::{REJECTIONS, STALL, STALLS};
use crate::error::{LockError, LockErrorKind};

/// A limit because of which a request was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Limit {
    WaitersPerKey,
    Waiters,
    Keys,
    Renewals,
    Outage,
}

impl Limit {
    const ALL: [(Self, &'static str); 5] = [
        (Self::WaitersPerKey, "max_waiters_per_key"),
        (Self::Waiters, "max_waiters"),
        (Self::Keys, "max_keys"),
        (Self::Renewals, "renewals"),
        (Self::Outage, "outage"),
    ];

    /// The limit that an error reports, if any.
    pub(crate) fn of(error: &LockError) -> Option<Self> {
        match error.kind() {
            LockErrorKind::QueueFull => Some(Self::WaitersPerKey),
            LockErrorKind::TooManyWaiters => Some(Self::Waiters),
            LockErrorKind::TooManyKeys => Some(Self::Keys),
            LockErrorKind::TooManyLeases => Some(Self::Renewals),
            LockErrorKind::ShardDown => Some(Self::Outage),
            _ => None,
        }
    }
}

/// See the module documentation.
#[derive(Debug)]
pub(crate) struct ManagerMetrics {
    pub(crate) classes: Classes,
    rejections: [Counter; Limit::ALL.len()],
    stalls: Counter,
    stall: Histogram,
}

impl ManagerMetrics {
    pub(crate) fn new(classes: Classes) -> Self {
        Self {
            classes,
            rejections: Limit::ALL.map(|(_, limit)| counter!(REJECTIONS, "limit" => limit)),
            stalls: counter!(STALLS),
            stall: histogram!(STALL),
        }
    }

    pub(crate) fn rejected(&self, limit: Limit) {
        self.rejections[limit as usize].increment(1);
    }

    pub(crate) fn stalled(&self, late: Duration) {
        self.stalls.increment(1);
        self.stall.record(late.as_secs_f64());
    }
}
