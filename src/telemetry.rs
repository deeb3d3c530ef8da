//! Metrics, through the `metrics` facade: handles are made once per manager, and no label ever holds a key.
//!
//! Install a recorder before connecting: handles that were made without one do nothing for ever. The library never
//! installs one itself.

use std::sync::Arc;
use std::time::Duration;

use dashmap::DashMap;
use metrics::{
    Counter, Gauge, Histogram, Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram,
};

use crate::error::{LockError, LossReason};
use crate::queue::Path;

/// The class that counts everything beyond the limit of `max_classes`.
const OTHER_CLASS: &str = "other";

/// All metrics: name, kind, unit and meaning. Durations are in seconds.
pub const METRICS: &[(&str, MetricKind, &str)] = &[
    (
        ACQUISITIONS,
        MetricKind::Counter,
        "lock requests by class, outcome, and the path by which the lock was had",
    ),
    (
        WAIT,
        MetricKind::Seconds,
        "time from a lock request to its guard, by class",
    ),
    (HOLD, MetricKind::Seconds, "time from a guard to its release, by class"),
    (WAITERS, MetricKind::Gauge, "tasks that wait for a lock, by shard"),
    (LEASES, MetricKind::Gauge, "leases that are held, by shard"),
    (
        HAND_OFFS,
        MetricKind::Counter,
        "locks passed to a waiter, by shard and kind: local (same process) or remote",
    ),
    (
        LOST,
        MetricKind::Counter,
        "leases that were lost while a guard was out, by shard and reason",
    ),
    (
        RENEWALS,
        MetricKind::Counter,
        "renewals of leases, by shard and outcome",
    ),
    (
        RENEWAL_LAG,
        MetricKind::Seconds,
        "how much later than planned a renewal was sent, by shard",
    ),
    (
        CONNECTS,
        MetricKind::Counter,
        "connections opened, the first ones included, by shard and kind: command or subscription",
    ),
    (
        REQUESTS,
        MetricKind::Counter,
        "round trips to the store, by shard, request and outcome",
    ),
    (
        ROUND_TRIP,
        MetricKind::Seconds,
        "time of a round trip to the store, by shard and request",
    ),
    (
        TOKEN_REGRESSIONS,
        MetricKind::Counter,
        "tokens that were not above earlier ones and so refused, by shard",
    ),
    (
        ABANDONED,
        MetricKind::Counter,
        "cycles released in the background after their outcome was unknown or unwanted, by shard",
    ),
    (
        QUORUM_VOTES,
        MetricKind::Counter,
        "answers of a quorum's nodes to claims, by shard, node and outcome: given, refused or unanswered",
    ),
    (
        QUORUM_SUSPECTS,
        MetricKind::Gauge,
        "1 for a node of a quorum that is down or has no vote, otherwise 0, by shard and node",
    ),
];

const ACQUISITIONS: &str = "shardlock_acquisitions_total";
const WAIT: &str = "shardlock_wait_seconds";
const HOLD: &str = "shardlock_hold_seconds";
const WAITERS: &str = "shardlock_waiters";
const LEASES: &str = "shardlock_leases";
const HAND_OFFS: &str = "shardlock_hand_offs_total";
const LOST: &str = "shardlock_lost_total";
const RENEWALS: &str = "shardlock_renewals_total";
const RENEWAL_LAG: &str = "shardlock_renewal_lag_seconds";
const CONNECTS: &str = "shardlock_connects_total";
const REQUESTS: &str = "shardlock_store_requests_total";
const ROUND_TRIP: &str = "shardlock_store_round_trip_seconds";
const TOKEN_REGRESSIONS: &str = "shardlock_token_regressions_total";
const ABANDONED: &str = "shardlock_abandoned_cycles_total";
const QUORUM_VOTES: &str = "shardlock_quorum_votes_total";
const QUORUM_SUSPECTS: &str = "shardlock_quorum_suspects";

/// The kind of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum MetricKind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// A distribution of durations in seconds. Give it buckets from 10 microseconds to a minute.
    Seconds,
}

/// Tells the installed recorder what each metric means.
pub(crate) fn describe() {
    for &(name, kind, meaning) in METRICS {
        match kind {
            MetricKind::Counter => describe_counter!(name, Unit::Count, meaning),
            MetricKind::Gauge => describe_gauge!(name, Unit::Count, meaning),
            MetricKind::Seconds => describe_histogram!(name, Unit::Seconds, meaning),
        }
    }
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    Acquired(Path),
    Busy,
    Timeout,
    QueueFull,
    Unavailable,
    Refused,
    Closed,
    Cancelled,
}

impl Ending {
    const ALL: [Self; 10] = [
        Self::Acquired(Path::Uncontended),
        Self::Acquired(Path::LocalHandOff),
        Self::Acquired(Path::RemoteGrant),
        Self::Busy,
        Self::Timeout,
        Self::QueueFull,
        Self::Unavailable,
        Self::Refused,
        Self::Closed,
        Self::Cancelled,
    ];

    pub(crate) const fn of(error: &LockError) -> Self {
        match error {
            LockError::Timeout { .. } => Self::Timeout,
            LockError::QueueFull { .. } | LockError::TooManyWaiters { .. } | LockError::TooManyKeys { .. } => {
                Self::QueueFull
            }
            LockError::Unavailable { .. } => Self::Unavailable,
            LockError::Closed => Self::Closed,
            LockError::Invalid(_)
            | LockError::Refused { .. }
            | LockError::ShardMapMismatch { .. }
            | LockError::Lost { .. }
            | LockError::TokenRegression { .. } => Self::Refused,
        }
    }

    const fn labels(self) -> (&'static str, &'static str) {
        match self {
            Self::Acquired(Path::Uncontended) => ("acquired", "uncontended"),
            Self::Acquired(Path::LocalHandOff) => ("acquired", "local"),
            Self::Acquired(Path::RemoteGrant) => ("acquired", "remote"),
            Self::Busy => ("busy", "none"),
            Self::Timeout => ("timeout", "none"),
            Self::QueueFull => ("queue_full", "none"),
            Self::Unavailable => ("unavailable", "none"),
            Self::Refused => ("refused", "none"),
            Self::Closed => ("closed", "none"),
            Self::Cancelled => ("cancelled", "none"),
        }
    }
}

/// The metrics of one class of locks.
#[derive(Debug)]
pub(crate) struct ClassMetrics {
    endings: [Counter; Ending::ALL.len()],
    pub(crate) wait: Histogram,
    pub(crate) hold: Histogram,
}

impl ClassMetrics {
    pub(crate) fn new(class: &str) -> Self {
        let class = class.to_owned();
        Self {
            endings: Ending::ALL.map(|ending| {
                let (outcome, path) = ending.labels();
                counter!(ACQUISITIONS, "class" => class.clone(), "outcome" => outcome, "path" => path)
            }),
            wait: histogram!(WAIT, "class" => class.clone()),
            hold: histogram!(HOLD, "class" => class),
        }
    }

    pub(crate) fn ended(&self, ending: Ending) {
        if let Some(index) = Ending::ALL.iter().position(|&known| known == ending) {
            self.endings[index].increment(1);
        }
    }
}

/// The classes of a manager; beyond the limit all share one.
#[derive(Debug)]
pub(crate) struct Classes {
    known: DashMap<String, Arc<ClassMetrics>>,
    max: usize,
    default_name: String,
    other: Arc<ClassMetrics>,
}

impl Classes {
    pub(crate) fn new(default: &str, max: usize) -> Self {
        Self {
            known: DashMap::new(),
            max,
            default_name: default.to_owned(),
            other: Arc::new(ClassMetrics::new(OTHER_CLASS)),
        }
    }

    /// `None` for the default class, whose metrics every shard has.
    pub(crate) fn get(&self, class: Option<&str>) -> Option<Arc<ClassMetrics>> {
        let class = class.filter(|&class| class != self.default_name)?;
        if let Some(known) = self.known.get(class) {
            return Some(Arc::clone(&known));
        }
        if self.known.len() >= self.max {
            return Some(Arc::clone(&self.other));
        }
        let entry = self
            .known
            .entry(class.to_owned())
            .or_insert_with(|| Arc::new(ClassMetrics::new(class)));
        Some(Arc::clone(&entry))
    }
}

/// The kinds of requests to a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RequestKind {
    AcquireFreely,
    Acquire,
    Try,
    Release,
    Requeue,
    Renew,
}

impl RequestKind {
    const ALL: [(Self, &'static str); 6] = [
        (Self::AcquireFreely, "acquire_free"),
        (Self::Acquire, "acquire"),
        (Self::Try, "try"),
        (Self::Release, "release"),
        (Self::Requeue, "requeue"),
        (Self::Renew, "renew"),
    ];

    /// The word for it in errors.
    pub(crate) const fn step(self) -> &'static str {
        match self {
            Self::AcquireFreely | Self::Acquire | Self::Try => "acquire",
            Self::Release | Self::Requeue => "release",
            Self::Renew => "renew",
        }
    }
}

/// The metrics of one node of a quorum.
#[derive(Debug)]
pub(crate) struct NodeMetrics {
    pub(crate) given: Counter,
    pub(crate) refused: Counter,
    pub(crate) unanswered: Counter,
    pub(crate) suspect: Gauge,
}

impl NodeMetrics {
    /// Nodes are counted from 1, in the order of the URL.
    pub(crate) fn new(shard: &str, node: usize) -> Self {
        let (shard, node) = (|| shard.to_owned(), || node.to_string());
        let votes =
            |outcome: &'static str| counter!(QUORUM_VOTES, "shard" => shard(), "node" => node(), "outcome" => outcome);
        Self {
            given: votes("given"),
            refused: votes("refused"),
            unanswered: votes("unanswered"),
            suspect: gauge!(QUORUM_SUSPECTS, "shard" => shard(), "node" => node()),
        }
    }
}

/// The metrics of one shard.
#[derive(Debug)]
pub(crate) struct ShardMetrics {
    pub(crate) waiters: Gauge,
    pub(crate) leases: Gauge,
    pub(crate) hand_offs_local: Counter,
    pub(crate) hand_offs_remote: Counter,
    pub(crate) renewed: Counter,
    pub(crate) renewed_not_ours: Counter,
    pub(crate) renewal_failed: Counter,
    pub(crate) renewal_lag: Histogram,
    pub(crate) connects: Counter,
    pub(crate) subscriptions: Counter,
    pub(crate) token_regressions: Counter,
    pub(crate) abandoned: Counter,
    lost: [Counter; LossReason::ALL.len()],
    requests: [RequestMetrics; RequestKind::ALL.len()],
}

#[derive(Debug)]
struct RequestMetrics {
    answered: Counter,
    failed: Counter,
    round_trip: Histogram,
}

impl ShardMetrics {
    pub(crate) fn new(shard: &str) -> Self {
        let shard = || shard.to_owned();
        Self {
            waiters: gauge!(WAITERS, "shard" => shard()),
            leases: gauge!(LEASES, "shard" => shard()),
            hand_offs_local: counter!(HAND_OFFS, "shard" => shard(), "kind" => "local"),
            hand_offs_remote: counter!(HAND_OFFS, "shard" => shard(), "kind" => "remote"),
            renewed: counter!(RENEWALS, "shard" => shard(), "outcome" => "extended"),
            renewed_not_ours: counter!(RENEWALS, "shard" => shard(), "outcome" => "not_ours"),
            renewal_failed: counter!(RENEWALS, "shard" => shard(), "outcome" => "failed"),
            renewal_lag: histogram!(RENEWAL_LAG, "shard" => shard()),
            connects: counter!(CONNECTS, "shard" => shard(), "kind" => "command"),
            subscriptions: counter!(CONNECTS, "shard" => shard(), "kind" => "subscription"),
            token_regressions: counter!(TOKEN_REGRESSIONS, "shard" => shard()),
            abandoned: counter!(ABANDONED, "shard" => shard()),
            lost: LossReason::ALL.map(|reason| counter!(LOST, "shard" => shard(), "reason" => reason.as_str())),
            requests: RequestKind::ALL.map(|(_, request)| RequestMetrics {
                answered: counter!(REQUESTS, "shard" => shard(), "request" => request, "outcome" => "answered"),
                failed: counter!(REQUESTS, "shard" => shard(), "request" => request, "outcome" => "failed"),
                round_trip: histogram!(ROUND_TRIP, "shard" => shard(), "request" => request),
            }),
        }
    }

    pub(crate) fn lost(&self, reason: LossReason) {
        if let Some(index) = LossReason::ALL.iter().position(|&known| known == reason) {
            self.lost[index].increment(1);
        }
    }

    pub(crate) fn request(&self, kind: RequestKind, took: Duration, answered: bool) {
        let Some(index) = RequestKind::ALL.iter().position(|&(known, _)| known == kind) else {
            return;
        };
        let request = &self.requests[index];
        if answered {
            request.answered.increment(1);
            request.round_trip.record(took.as_secs_f64());
        } else {
            request.failed.increment(1);
        }
    }

    pub(crate) fn handed_off(&self, path: Path) {
        match path {
            Path::Uncontended => {}
            Path::LocalHandOff => self.hand_offs_local.increment(1),
            Path::RemoteGrant => self.hand_offs_remote.increment(1),
        }
    }
}
