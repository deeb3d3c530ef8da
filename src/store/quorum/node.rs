//! One node of a quorum: a primary and its known state.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use crate::clock::Moment;
use crate::late_requests::{LateRequests, SecondReleases};
use crate::protocol::{Cycle, Release};
use crate::store::redis::primary::RedisStore;
use crate::store::{LATE_MAX, LeaseStore};
use crate::telemetry::NodeMetrics;

/// See the module documentation.
pub(super) struct Node {
    pub(super) store: RedisStore,
    /// `host:port`
    pub(super) place: String,
    pub(super) metrics: NodeMetrics,
    /// When it was marked down, in nanoseconds; zero while it is up.
    down_since: AtomicU64,
    down_reason: Mutex<String>,
    /// How many times it was found down. A probe during which this changes proves nothing.
    downs: AtomicU64,
    /// Whether it has a different shard map, as far as is known.
    foreign: AtomicBool,
    /// The pending releases by cycle, each with the time at which the leases have run out anyway.
    pending_releases: Mutex<BTreeMap<Cycle, (Moment, Release)>>,
    late_claims: Mutex<LateClaims>,
}

/// Claims that may still be executed here although no task waits for them any more, and the
/// releases that are repeated because of them.
struct LateClaims {
    requests: LateRequests,
    second_releases: SecondReleases<LateRelease>,
}

/// A release that is sent a second time, when no claim of its cycle can arrive any more.
#[derive(Clone)]
pub(super) struct LateRelease {
    /// When its lease has run out anyway.
    pub(super) end: Moment,
    pub(super) release: Release,
}

/// The most pending releases that are kept per node. The oldest beyond that expire with their TTL.
pub(super) const PENDING_RELEASES_MAX: usize = 10_000;

impl Node {
    pub(super) fn new(store: RedisStore, place: &str, metrics: NodeMetrics) -> Self {
        Self {
            store,
            place: place.to_owned(),
            metrics,
            down_since: AtomicU64::new(0),
            down_reason: Mutex::new(String::new()),
            downs: AtomicU64::new(0),
            foreign: AtomicBool::new(false),
            pending_releases: Mutex::new(BTreeMap::new()),
            late_claims: Mutex::new(LateClaims {
                requests: LateRequests::default(),
                second_releases: SecondReleases::new(LATE_MAX),
            }),
        }
    }

    pub(super) fn is_up(&self) -> bool {
        self.down_since.load(Ordering::Acquire) == 0
    }

    /// Whether it has a different shard map, as far as is known.
    pub(super) fn is_foreign(&self) -> bool {
        self.foreign.load(Ordering::Acquire)
    }

    pub(super) fn set_foreign(&self, foreign: bool) {
        self.foreign.store(foreign, Ordering::Release);
    }

    /// Whether it may be the sequencer.
    pub(super) fn is_usable(&self) -> bool {
        self.is_up() && self.store.has_vote()
    }

    /// No request waits for it until a probe has found it alive. Returns whether it was up.
    pub(super) fn mark_down(&self, why: &str) -> bool {
        let now = Moment::now().as_nanos().max(1);
        let mut reason = self.down_reason.lock();
        self.downs.fetch_add(1, Ordering::AcqRel);
        let was_up = self
            .down_since
            .compare_exchange(0, now, Ordering::AcqRel, Ordering::Acquire)
            .is_ok();
        if was_up {
            why.clone_into(&mut reason);
            self.metrics.suspect.set(1.0);
        }
        was_up
    }

    /// How many times it was found down, for [`mark_up`](Self::mark_up).
    pub(super) fn downs(&self) -> u64 {
        self.downs.load(Ordering::Acquire)
    }

    /// It answered a probe that began when it had been found down `downs` times. Changes nothing if
    /// it was found down again meanwhile.
    pub(super) fn mark_up(&self, downs: u64) {
        let _reason = self.down_reason.lock();
        if self.downs() != downs {
            return;
        }
        self.down_since.store(0, Ordering::Release);
        self.metrics.suspect.set(if self.store.has_vote() { 0.0 } else { 1.0 });
    }

    /// What is wrong with it, if anything. For errors.
    pub(super) fn status(&self) -> Option<String> {
        if !self.is_up() {
            Some(format!("{}: {}", self.place, self.down_reason.lock()))
        } else if !self.store.has_vote() {
            Some(format!(
                "{}: no vote yet, since it has been running for less than redlock_max_ttl",
                self.place
            ))
        } else {
            None
        }
    }

    /// Records a pending release, which the repair worker repeats until the leases have run out.
    pub(super) fn add_pending_release(&self, release: Release, longest: Duration) {
        let now = Moment::now();
        let release = Release {
            requeue: None,
            nobody_waits: false,
            ..release
        };
        let mut pending_releases = self.pending_releases.lock();
        // Cycle numbers grow, so the first is roughly the oldest.
        while pending_releases
            .first_key_value()
            .is_some_and(|(_, (end, _))| *end < now || pending_releases.len() >= PENDING_RELEASES_MAX)
        {
            pending_releases.pop_first();
        }
        pending_releases.insert(release.cycle, (now + longest, release));
    }

    /// The pending releases. Each stays pending until it is removed.
    pub(super) fn pending_releases(&self) -> Vec<(Moment, Release)> {
        self.pending_releases.lock().values().cloned().collect()
    }

    pub(super) fn has_no_pending_releases(&self) -> bool {
        self.pending_releases.lock().is_empty()
    }

    /// That release was answered, or its lease has run out.
    pub(super) fn remove_pending_release(&self, release: &Release) {
        self.pending_releases.lock().remove(&release.cycle);
    }

    /// Whether a release of that cycle is pending, or its second release is due. Until it is
    /// answered, what the node replies about the cycle does not count.
    pub(super) fn has_pending_release(&self, cycle: Cycle) -> bool {
        let is_repeated = || {
            let late = self.late_claims.lock();
            let is_of_cycle = |second: &LateRelease| second.release.cycle == cycle;
            late.requests.has_included(cycle) && late.second_releases.has_due(Moment::now(), is_of_cycle)
        };
        self.pending_releases.lock().contains_key(&cycle) || is_repeated()
    }

    /// The node is about to be asked for a lease of that cycle. A release of the same cycle that
    /// followed an earlier attempt must not be repeated any more: it would end this lease. When the
    /// cycle is over, its release is repeated if that is still necessary.
    pub(super) fn forget_second_releases(&self, cycle: Cycle) {
        let mut late = self.late_claims.lock();
        if late.requests.has_included(cycle) {
            late.second_releases.forget(|second| second.release.cycle == cycle);
        }
    }

    /// That release was answered. If a connection was abandoned recently, a claim of the cycle may
    /// still arrive, so the release is repeated later. `newest` is the largest number of a cycle so
    /// far.
    pub(super) fn released(&self, release: &Release, newest: u64, longest: Duration, now: Moment) {
        let Some(cut) = self.store.last_cut().filter(|cut| now.since(*cut) < LATE_MAX) else {
            return;
        };
        let mut late = self.late_claims.lock();
        if late.requests.may_include(release.cycle, cut, || newest) && late.second_releases.len() < PENDING_RELEASES_MAX
        {
            let second = LateRelease {
                end: now + LATE_MAX + longest,
                release: Release {
                    requeue: None,
                    nobody_waits: false,
                    ..release.clone()
                },
            };
            late.second_releases.add(second, now);
        }
    }

    /// The next second release that is due. It stays due until it is done
    /// ([`second_release_done`](Self::second_release_done)).
    pub(super) fn due_second_release(&self, now: Moment) -> Option<LateRelease> {
        let last_cut = self.store.last_cut();
        let mut late = self.late_claims.lock();
        while late.second_releases.first_due(now).is_some() {
            if !late.second_releases.postpone_first(now, last_cut) {
                return late.second_releases.first_due(now).cloned();
            }
        }
        None
    }

    /// That release is done.
    pub(super) fn second_release_done(&self, done: &LateRelease, now: Moment) {
        let mut late = self.late_claims.lock();
        // The worker and a shutdown may repeat the same one.
        let is_first = |first: &LateRelease| first.release.cycle == done.release.cycle;
        if late.second_releases.first_due(now).is_some_and(is_first) {
            late.second_releases.remove_first();
        }
    }
}
