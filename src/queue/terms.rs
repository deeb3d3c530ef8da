//! What goes into the queue of a key and what comes out: settings, wishes, outcomes.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::clock::Moment;
use crate::error::LockError;
use crate::fence::FencingToken;
use crate::lease::Lease;
use crate::protocol::{Cycle, Cycles};

/// The settings that the queue acts by.
#[derive(Debug, Clone)]
pub(crate) struct Rules {
    /// How many guards one tenure of the lease may serve once remote waiters are known.
    pub(crate) max_burst: u32,
    /// How long one tenure of the lease may go on once remote waiters are known.
    pub(crate) max_slice: Duration,
    /// How often a lease is renewed, as a part of its TTL.
    pub(crate) renew_fraction: f64,
    /// Deliberate mistakes, to show that the simulation finds them.
    #[cfg(test)]
    pub(crate) flaw: Option<Flaw>,
}

/// A deliberate mistake.
#[cfg(test)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flaw {
    /// Old grants that ran out are believed.
    IgnoresMarks,
    /// The validity of a lease counts from the receipt of the grant.
    CountsFromReceipt,
    /// A manager uses the same cycle again.
    ReusesCycles,
    /// A lease that was confirmed by a server which was replaced since is passed on.
    BelievesOldServers,
    /// The store passes on what it has granted to the next one if it counts no receiver of the grant.
    CountsReceivers,
    /// A cycle whose release was answered is never released again.
    TrustsReleases,
}

impl Rules {
    pub(crate) fn renew_every(&self, ttl: Duration) -> Duration {
        ttl.mul_f64(self.renew_fraction)
    }

    /// For how long after a confirmation by the store a lease is passed on without another one: until a renewal is overdue.
    pub(crate) fn confirmed_for(&self, ttl: Duration) -> Duration {
        self.renew_every(ttl) * 3 / 2
    }

    #[cfg(test)]
    pub(crate) fn has(&self, flaw: Flaw) -> bool {
        self.flaw == Some(flaw)
    }
}

/// What comes with every event.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Context<'a> {
    pub(crate) now: Moment,
    pub(crate) rules: &'a Rules,
    pub(crate) cycles: &'a Cycles,
    pub(crate) room: Room<'a>,
    /// See [`LeaseStore::epoch`](crate::store::LeaseStore::epoch).
    pub(crate) epoch: u32,
}

/// Whether there is room for a lease that nobody holds, looked at only where one is to be kept.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Room<'a> {
    /// How many keys there are in all, which may change at any time, and how many there may be.
    pub(crate) keys: &'a AtomicUsize,
    pub(crate) limit: usize,
}

impl Room<'_> {
    pub(super) fn is_left(self) -> bool {
        self.keys.load(Ordering::Relaxed) <= self.limit
    }
}

#[cfg(test)]
impl Room<'static> {
    /// For queues that are alone.
    pub(crate) const ENDLESS: Self = {
        static NO_KEYS: AtomicUsize = AtomicUsize::new(0);
        Self {
            keys: &NO_KEYS,
            limit: usize::MAX,
        }
    };
}

impl Context<'_> {
    /// A new cycle, for leases of that TTL.
    pub(super) fn open_cycle(&self, expects_rivals: bool, ttl: Duration) -> Cycle {
        #[cfg(test)]
        if self.rules.has(Flaw::ReusesCycles) {
            return Cycle::of(1);
        }
        self.cycles.open(expects_rivals, ttl)
    }
}

/// For how long a lease is kept without a guard: up to an hour, in microseconds, so that it takes little room in each waiter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Linger(u32);

impl Linger {
    pub(crate) const NONE: Self = Self(0);

    /// What is longer than can be said is cut; the settings' bounds are below that.
    pub(crate) fn new(time: Duration) -> Self {
        Self(u32::try_from(time.as_micros()).unwrap_or(u32::MAX))
    }

    #[cfg(test)]
    pub(super) const fn of_millis(millis: u32) -> Self {
        Self(millis * 1_000)
    }

    pub(crate) const fn is_none(self) -> bool {
        self.0 == 0
    }

    pub(super) const fn time(self) -> Duration {
        Duration::from_micros(self.0 as u64)
    }
}

/// For how long a waiter bears that the store can't be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum InOutage {
    /// It fails with the first request that does.
    Fail,
    /// For as long as the shard bears it.
    UntilStoreTimeout,
    /// Until its task gives up.
    UntilOwnLimit,
}

/// What a task wants.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Want {
    pub(crate) ttl: Duration,
    pub(crate) max_hold: Option<Duration>,
    /// For how long the lease is kept when its guard is gone and nobody wants it.
    pub(crate) linger: Linger,
    /// Whether to come back with nothing rather than wait.
    pub(crate) only_try: bool,
    pub(crate) in_outage: InOutage,
    /// Whether there is reason to think that other managers want the key, so that the free path is not worth a try.
    pub(crate) expects_rivals: bool,
}

/// How a lock was had. As large as the place that it has in [`Granted`] in any case: an outcome is copied in whole words then, where a single
/// byte and what lies unused behind it took several steps that wait for each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(usize)]
pub(crate) enum Path {
    /// The key was free.
    Uncontended,
    /// From another task of this process, without the network.
    LocalHandOff,
    /// After waiting in the store's queue.
    RemoteGrant,
    /// Under a lease that this process had kept, without the network.
    Lingering,
}

/// What a waiter got.
#[derive(Debug, Clone)]
pub(crate) enum Outcome {
    Granted(Granted),
    /// A try found the key held or wanted.
    Busy,
    Failed(Box<LockError>),
    /// Replies came later than the lease lasts, several times in a row.
    TooLate,
    /// The store's token was not above what was seen before.
    Regressed {
        token: u64,
        floor: u64,
    },
}

#[derive(Debug, Clone)]
pub(crate) struct Granted {
    /// When: from this moment on nobody else can have the lock.
    pub(crate) at: Moment,
    pub(crate) lease: Arc<Lease>,
    pub(crate) token: FencingToken,
    pub(crate) path: Path,
}
