//! Metrics by shard.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use super::class_gauges::{ClassGauges, ClassSnapshot};
use super::recorder::{Counter, Gauge, Histogram, counter, gauge, histogram};

use super::stripes::Counts;
use super::table::{
    ABANDONED, BATCH, BYPASS, CLOCK_DRIFT, CLOCK_JUMPS, CONNECTS, HAND_OFFS, LEASES, LINGERING_LEASES, LOST,
    RECONNECTS, RENEWAL_LAG, RENEWALS, REQUESTS, ROUND_TRIP, SHARD_UP, STALE_GRANTS, TOKEN_REGRESSIONS, VALIDITY_LEFT,
    WAITERS,
};
use super::tally::{Flushed, Measured};
use crate::contention::AtomicHistogram;
use crate::engine::{Bound, Path};
use crate::error::LossReason;
use crate::mode::LockMode;

/// The kinds of requests to a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RequestKind {
    AcquireFast,
    Acquire,
    Try,
    Release,
    Requeue,
    Renew,
}

impl RequestKind {
    const ALL: [(Self, &'static str); 6] = [
        (Self::AcquireFast, "acquire_fast"),
        (Self::Acquire, "acquire"),
        (Self::Try, "try"),
        (Self::Release, "release"),
        (Self::Requeue, "requeue"),
        (Self::Renew, "renew"),
    ];

    /// The name of the step in errors.
    pub(crate) const fn step(self) -> &'static str {
        match self {
            Self::AcquireFast | Self::Acquire | Self::Try => "acquire",
            Self::Release | Self::Requeue => "release",
            Self::Renew => "renew",
        }
    }
}

/// The metrics of one shard.
#[derive(Debug)]
pub(crate) struct ShardMetrics {
    pub(crate) renewed: Counter,
    pub(crate) renewed_not_ours: Counter,
    pub(crate) renewal_failed: Counter,
    pub(crate) renewal_lag: Histogram,
    pub(crate) connects: Counter,
    pub(crate) subscriptions: Counter,
    pub(crate) reconnects: Counter,
    pub(crate) token_regressions: Counter,
    pub(crate) stale_grants: Counter,
    pub(crate) abandoned: Counter,
    batches: Measured,
    pub(crate) validity_left: Histogram,
    pub(crate) clock_jumps: Counter,
    pub(crate) clock_drift: Gauge,
    by_class: ClassGauges,
    /// By the kind of mode.
    waiting: [AtomicUsize; LockMode::KINDS],
    waiters: [Gauge; LockMode::KINDS],
    held: AtomicUsize,
    leases: Gauge,
    lingering: AtomicUsize,
    lingering_leases: Gauge,
    /// By [`Path`].
    acquired: Counts<{ Path::COUNT }>,
    local: Flushed,
    remote: Flushed,
    bypass: [Counter; Bound::ALL.len()],
    lost: [Counter; LossReason::EACH.len()],
    requests: [RequestMetrics; RequestKind::ALL.len()],
    /// Round trips of all requests, as reported by the manager itself.
    round_trips: AtomicHistogram,
    is_up: AtomicBool,
    up: Gauge,
}

#[derive(Debug)]
struct RequestMetrics {
    answered: Measured,
    failed: Counter,
}

impl ShardMetrics {
    pub(crate) fn new(shard: &str, default_class: &str) -> Self {
        let by_class = ClassGauges::new(shard, default_class);
        let shard = || shard.to_owned();
        let lost = |reason: LossReason| counter!(LOST, "shard" => shard(), "reason" => reason.as_str());
        Self {
            by_class,
            waiting: [const { AtomicUsize::new(0) }; LockMode::KINDS],
            waiters: LockMode::ONE_OF_EACH.map(|mode| gauge!(WAITERS, "shard" => shard(), "mode" => mode.as_str())),
            held: AtomicUsize::new(0),
            leases: gauge!(LEASES, "shard" => shard()),
            lingering: AtomicUsize::new(0),
            lingering_leases: gauge!(LINGERING_LEASES, "shard" => shard()),
            acquired: Counts::default(),
            local: Flushed::new(counter!(HAND_OFFS, "shard" => shard(), "kind" => "local")),
            remote: Flushed::new(counter!(HAND_OFFS, "shard" => shard(), "kind" => "remote")),
            // This counter is only needed for sampling.
            batches: Measured::new(Counter::noop(), histogram!(BATCH, "shard" => shard())),
            bypass: Bound::ALL.map(|bound| counter!(BYPASS, "shard" => shard(), "limit" => bound.as_str())),
            lost: LossReason::EACH.map(lost),
            validity_left: histogram!(VALIDITY_LEFT, "shard" => shard()),
            renewed: counter!(RENEWALS, "shard" => shard(), "outcome" => "extended"),
            renewed_not_ours: counter!(RENEWALS, "shard" => shard(), "outcome" => "not_ours"),
            renewal_failed: counter!(RENEWALS, "shard" => shard(), "outcome" => "failed"),
            renewal_lag: histogram!(RENEWAL_LAG, "shard" => shard()),
            connects: counter!(CONNECTS, "shard" => shard(), "kind" => "command"),
            subscriptions: counter!(CONNECTS, "shard" => shard(), "kind" => "subscription"),
            reconnects: counter!(RECONNECTS, "shard" => shard()),
            token_regressions: counter!(TOKEN_REGRESSIONS, "shard" => shard()),
            stale_grants: counter!(STALE_GRANTS, "shard" => shard()),
            abandoned: counter!(ABANDONED, "shard" => shard()),
            clock_jumps: counter!(CLOCK_JUMPS, "shard" => shard()),
            clock_drift: gauge!(CLOCK_DRIFT, "shard" => shard()),
            requests: RequestKind::ALL.map(|(_, request)| {
                let requests =
                    |outcome| counter!(REQUESTS, "shard" => shard(), "request" => request, "outcome" => outcome);
                let round_trip = histogram!(ROUND_TRIP, "shard" => shard(), "request" => request);
                RequestMetrics {
                    answered: Measured::new(requests("answered"), round_trip),
                    failed: requests("failed"),
                }
            }),
            round_trips: AtomicHistogram::default(),
            is_up: AtomicBool::new(false),
            up: gauge!(SHARD_UP, "shard" => shard()),
        }
    }

    pub(crate) fn waiter_came(&self, mode: LockMode) {
        self.waiting[mode.kind()].fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn waiter_went(&self, mode: LockMode) {
        self.waiting[mode.kind()].fetch_sub(1, Ordering::Relaxed);
    }

    /// The number of leases of a key has changed.
    pub(crate) fn leases_changed(&self, before: usize, after: usize) {
        if after > before {
            self.held.fetch_add(after - before, Ordering::Relaxed);
        } else {
            self.held.fetch_sub(before - after, Ordering::Relaxed);
        }
    }

    /// A lease begins to linger.
    pub(crate) fn lease_lingers(&self) {
        self.lingering.fetch_add(1, Ordering::Relaxed);
    }

    /// A lease no longer lingers: it has a guard, was lost, or was released.
    pub(crate) fn lease_lingers_no_more(&self) {
        // A thread that sees the lower count also sees everything that came before it.
        self.lingering.fetch_sub(1, Ordering::Release);
    }

    pub(crate) fn waiters(&self) -> usize {
        self.waiting.iter().map(|waiting| waiting.load(Ordering::Relaxed)).sum()
    }

    pub(crate) fn leases(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    pub(crate) fn lingering(&self) -> usize {
        self.lingering.load(Ordering::Acquire)
    }

    pub(crate) fn lost(&self, reason: LossReason) {
        if let Some(index) = LossReason::ALL.iter().position(|&known| known == reason) {
            self.lost[index].increment(1);
        }
    }

    /// A lease was released after serving this many guards.
    pub(crate) fn served(&self, guards: u32) {
        self.batches.add(f64::from(guards));
    }

    pub(crate) fn yielded(&self, bound: Bound) {
        self.bypass[bound as usize].increment(1);
    }

    pub(crate) fn request(&self, kind: RequestKind, took: Duration, answered: bool) {
        let request = &self.requests[kind as usize];
        if answered {
            request.answered.add(took.as_secs_f64());
            self.round_trips.add(took);
        } else {
            request.failed.increment(1);
        }
    }

    /// Whether the shard replies and accepts locks, as far as is known.
    pub(crate) fn is_up(&self) -> bool {
        self.is_up.load(Ordering::Relaxed)
    }

    pub(crate) fn set_up(&self, up: bool) {
        // Read first: the value rarely changes, and a write would take the cache line from other
        // threads.
        if self.is_up() != up {
            self.is_up.store(up, Ordering::Relaxed);
            self.up.set(if up { 1.0 } else { 0.0 });
        }
    }

    pub(crate) fn acquired(&self, path: Path) {
        self.acquired.add(path as usize);
    }

    /// The number of locks acquired: in total, by local hand-off, by remote grant.
    pub(crate) fn acquisitions(&self) -> [u64; 3] {
        let by_path = self.acquired.all();
        let of = |path: Path| by_path[path as usize];
        [by_path.iter().sum(), of(Path::LocalHandOff), of(Path::RemoteGrant)]
    }

    /// The median and the 99th percentile of round trips to the store.
    pub(crate) fn round_trips(&self) -> [Duration; 2] {
        [self.round_trips.quantile(0.5), self.round_trips.quantile(0.99)]
    }

    /// Flushes new values to the recorder.
    pub(crate) fn flush(&self) {
        let [_, local, remote] = self.acquisitions();
        self.local.flush(local);
        self.remote.flush(remote);
        self.requests.iter().for_each(|request| request.answered.flush());
        for (gauge, waiting) in self.waiters.iter().zip(&self.waiting) {
            gauge.set(waiting.load(Ordering::Relaxed) as f64);
        }
        self.leases.set(self.leases() as f64);
        self.lingering_leases.set(self.lingering() as f64);
    }

    /// Sets the gauges by class. Both lists are in the order of the classes' numbers.
    pub(crate) fn set_by_class(&self, seen: &[ClassSnapshot], classes: &[Arc<str>]) {
        self.by_class.set(seen, classes);
    }

    /// Adjusts the sampling of durations to the rate during `elapsed`.
    pub(crate) fn adjust(&self, elapsed: Duration) {
        self.requests
            .iter()
            .for_each(|request| request.answered.adjust(elapsed));
        self.batches.adjust(elapsed);
    }
}
