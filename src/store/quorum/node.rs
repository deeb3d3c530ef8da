//! One node of a quorum: a primary, and what is known of its state.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use crate::clock::Moment;
use crate::key::LockKey;
use crate::protocol::{Cycle, Release};
use crate::store::redis::primary::RedisStore;
use crate::telemetry::NodeMetrics;

/// See the module.
pub(super) struct Node {
    pub(super) store: RedisStore,
    /// `host:port`
    pub(super) place: String,
    pub(super) metrics: NodeMetrics,
    /// Since when it is marked down, in nanoseconds; zero while it is not.
    down_since: AtomicU64,
    why: Mutex<String>,
    /// Releases that had no answer, and when the leases have run out anyway.
    owed: Mutex<VecDeque<(Moment, Release)>>,
}

/// The most releases that are kept for a node that does not answer; what is beyond runs out by its TTL.
const OWED_MAX: usize = 10_000;

impl Node {
    pub(super) fn new(store: RedisStore, place: &str, metrics: NodeMetrics) -> Self {
        Self {
            store,
            place: place.to_owned(),
            metrics,
            down_since: AtomicU64::new(0),
            why: Mutex::new(String::new()),
            owed: Mutex::new(VecDeque::new()),
        }
    }

    pub(super) fn is_up(&self) -> bool {
        self.down_since.load(Ordering::Acquire) == 0
    }

    /// Whether it may be the door.
    pub(super) fn is_usable(&self) -> bool {
        self.is_up() && self.store.has_vote()
    }

    /// Nobody waits for it until a probe has found it alive. Returns whether it was up.
    pub(super) fn mark_down(&self, why: &str) -> bool {
        let now = Moment::now().as_nanos().max(1);
        let was_up = self
            .down_since
            .compare_exchange(0, now, Ordering::AcqRel, Ordering::Acquire)
            .is_ok();
        if was_up {
            why.clone_into(&mut self.why.lock());
            self.metrics.suspect.set(1.0);
        }
        was_up
    }

    pub(super) fn down_since(&self) -> u64 {
        self.down_since.load(Ordering::Acquire)
    }

    /// It was found alive, unless it was marked down anew after that moment.
    pub(super) fn mark_up(&self, down_since: u64) {
        let marked = self
            .down_since
            .compare_exchange(down_since, 0, Ordering::AcqRel, Ordering::Acquire);
        if marked.is_err() {
            return;
        }
        self.metrics.suspect.set(if self.store.has_vote() { 0.0 } else { 1.0 });
    }

    /// For errors: what is wrong with it, if anything is.
    pub(super) fn trouble(&self) -> Option<String> {
        if !self.is_up() {
            Some(format!("{}: {}", self.place, self.why.lock()))
        } else if !self.store.has_vote() {
            Some(format!(
                "{}: no vote yet, since it has not been running for redlock_max_ttl",
                self.place
            ))
        } else {
            None
        }
    }

    /// Remembers a release that had no answer. A node that was down for longer than any lease lives has none of the cycle.
    pub(super) fn owe(&self, release: Release, longest: Duration) {
        let now = Moment::now();
        let down = self.down_since.load(Ordering::Acquire);
        if down != 0 && now.since(Moment::from_nanos(down)) > longest {
            return;
        }
        let release = Release {
            requeue: None,
            nobody_waits: false,
            ..release
        };
        let mut owed = self.owed.lock();
        while owed
            .front()
            .is_some_and(|(end, _)| *end < now || owed.len() >= OWED_MAX)
        {
            owed.pop_front();
        }
        owed.push_back((now + longest, release));
    }

    /// What it is owed, which stays owed until it is `paid`.
    pub(super) fn owed(&self) -> Vec<(Moment, Release)> {
        self.owed.lock().iter().cloned().collect()
    }

    /// That release was answered, or the lease has run out.
    pub(super) fn paid(&self, release: &Release) {
        let is_it = |other: &Release| other.cycle == release.cycle && other.key == release.key;
        self.owed.lock().retain(|(_, other)| !is_it(other));
    }

    /// Whether a release of that cycle is still to come: what the node says of the cycle until then does not count.
    pub(super) fn owes(&self, key: &LockKey, cycle: Cycle) -> bool {
        let owed = self.owed.lock();
        owed.iter().any(|(_, other)| other.cycle == cycle && other.key == *key)
    }
}
