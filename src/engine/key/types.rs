//! Types that enter and leave the queue of a key: settings, options of a waiter, outcomes.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::clock::Moment;
use crate::engine::min_holds::MinHolds;
use crate::error::LockError;
use crate::fence::FencingToken;
use crate::lease::Lease;
use crate::mode::LockMode;
use crate::protocol::{Cycle, Cycles};

/// The settings of the queue.
#[derive(Debug, Clone)]
pub(crate) struct Rules {
    /// How many guards a turn may serve; `u32::MAX` is no limit.
    pub(crate) max_burst: u32,
    /// For how long a turn may serve further guards.
    pub(crate) max_slice: Duration,
    /// The interval between renewals, as a fraction of the TTL.
    pub(crate) renew_fraction: f64,
    /// Deliberate bugs, to verify that the simulation finds them.
    #[cfg(test)]
    pub(crate) flaw: Option<Flaw>,
}

/// A deliberate bug.
#[cfg(test)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flaw {
    /// Accepts old grants that have expired.
    IgnoresMarks,
    /// Counts the validity of a lease from the receipt of the grant.
    CountsFromReceipt,
    /// Reuses the same cycle.
    ReusesCycles,
    /// Passes on a lease confirmed by a server that has since been replaced.
    BelievesOldServers,
    /// The store passes a granted lease to the next waiter if it counts no receivers of the grant.
    CountsReceivers,
    /// Never repeats the release of a cycle whose release got a reply.
    TrustsReleases,
    /// The store admits shared holders although others wait.
    LetsReadersPass,
    /// The store ends shared leases and permits by the clock of the client that sends a request.
    EndsByClientsClock,
    /// The store never ends shared leases and permits.
    NeverEndsHolders,
    /// The store keeps the marker of shared holders and permits after the last of them has left.
    KeepsMarker,
    /// Releases a cycle in the background although its `min_hold` has not passed.
    ForgetsMinHolds,
    /// A turn also serves tasks that came after it began.
    ServesNewcomers,
}

impl Rules {
    pub(crate) fn renew_every(&self, ttl: Duration) -> Duration {
        ttl.mul_f64(self.renew_fraction)
    }

    /// How long after a confirmation by the store the lease may be passed on without another one:
    /// until a renewal is overdue.
    pub(crate) fn confirmed_for(&self, ttl: Duration) -> Duration {
        self.renew_every(ttl) * 3 / 2
    }

    #[cfg(test)]
    pub(crate) fn has(&self, flaw: Flaw) -> bool {
        self.flaw == Some(flaw)
    }
}

/// Data that accompanies every event.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Context<'a> {
    pub(crate) now: Moment,
    pub(crate) rules: &'a Rules,
    pub(crate) cycles: &'a Cycles,
    pub(crate) capacity: &'a dyn Capacity,
    pub(crate) min_holds: &'a MinHolds,
    /// See [`LeaseStore::epoch`](crate::store::LeaseStore::epoch).
    pub(crate) epoch: u32,
}

/// The capacity for leases without a guard.
pub(crate) trait Capacity: fmt::Debug {
    /// Whether a lease may linger. Only asked when one is about to.
    fn has_room(&self) -> bool;
}

/// For queues that are on their own.
#[cfg(test)]
#[derive(Debug)]
pub(crate) struct Unlimited;

#[cfg(test)]
impl Capacity for Unlimited {
    fn has_room(&self) -> bool {
        true
    }
}

impl Context<'_> {
    /// Starts a new cycle for leases with that TTL.
    pub(super) fn open_cycle(&self, mode: LockMode, expects_remote_waiters: bool, ttl: Duration) -> Cycle {
        #[cfg(test)]
        if self.rules.has(Flaw::ReusesCycles) {
            return Cycle::of(1);
        }
        self.cycles.open(mode, expects_remote_waiters, ttl)
    }
}

/// How long a lease lingers without a guard: up to an hour, in microseconds, so that it takes
/// little space in each waiter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Linger(u32);

impl Linger {
    pub(crate) const NONE: Self = Self(0);

    /// Saturates at the largest value that fits. The bounds of the settings are below that.
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

/// How long the key stays locked after the lock was granted: up to a day, in milliseconds, so that
/// it takes little space in each waiter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MinHold(u32);

impl MinHold {
    pub(crate) const NONE: Self = Self(0);

    /// Rounds up. Saturates at the largest value that fits, which is above the bounds of the
    /// setting.
    pub(crate) fn new(time: Duration) -> Self {
        Self(u32::try_from(time.as_nanos().div_ceil(1_000_000)).unwrap_or(u32::MAX))
    }

    #[cfg(test)]
    pub(super) const fn of_millis(millis: u32) -> Self {
        Self(millis)
    }

    pub(crate) const fn is_none(self) -> bool {
        self.0 == 0
    }

    pub(crate) const fn time(self) -> Duration {
        Duration::from_millis(self.0 as u64)
    }
}

/// How long a waiter tolerates that the store is unreachable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum InOutage {
    /// Fails on the first failed request.
    Fail,
    /// Waits for `store_timeout`, counted from when it enqueued or when the outage began, whichever
    /// is later.
    UntilStoreTimeout,
    /// Waits until its task gives up.
    UntilOwnLimit,
}

/// The options of a waiter.
#[derive(Debug, Clone, Copy)]
pub(crate) struct WaiterOptions {
    pub(crate) mode: LockMode,
    pub(crate) ttl: Duration,
    pub(crate) max_hold: Option<Duration>,
    /// How long the lease lingers after the guard is dropped, if no task wants the key.
    pub(crate) linger: Linger,
    /// How long the key stays locked after the lock was granted, whenever it is released.
    pub(crate) min_hold: MinHold,
    /// Whether to fail rather than wait.
    pub(crate) try_only: bool,
    pub(crate) in_outage: InOutage,
    /// Whether other managers are likely to want the key, in which case the fast path is skipped.
    pub(crate) contended_hint: bool,
    /// A number by which [`Queue::each_wait`](super::Queue::each_wait) groups the waiters.
    pub(crate) class: u16,
}

impl WaiterOptions {
    /// How long the lease lasts from the grant if it is never renewed. The key stays locked for
    /// `min_hold` even if the process dies.
    pub(crate) fn lease_ttl(&self) -> Duration {
        self.ttl.max(self.min_hold.time())
    }
}

/// How a lock was acquired. As large as its padded place in [`Granted`], so that an outcome is
/// copied in whole words. A single byte followed by padding took several dependent steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(usize)]
pub(crate) enum Path {
    /// The key was free.
    Uncontended,
    /// From another task of this process, without network traffic.
    LocalHandOff,
    /// After waiting in the store's queue.
    RemoteGrant,
    /// From a lease that lingered in this process, without network traffic.
    Lingering,
    /// Beside other shared holders of this process, without network traffic.
    Joined,
}

impl Path {
    /// The number of paths.
    pub(crate) const COUNT: usize = 5;
}

const _: () = assert!(Path::Joined as usize + 1 == Path::COUNT, "the last path counts, too");

/// What a waiter receives.
#[derive(Debug, Clone)]
pub(crate) enum Outcome {
    Granted(Granted),
    /// A try found the key held or wanted.
    Busy,
    Failed(LockError),
    /// Replies arrived after the lease had expired, several times in a row.
    TooLate,
    /// The store's token was not larger than one seen before.
    Regressed {
        token: u64,
        floor: u64,
    },
}

#[derive(Debug, Clone)]
pub(crate) struct Granted {
    /// When the lock was granted. From this moment on it is exclusive.
    pub(crate) at: Moment,
    pub(crate) lease: Arc<Lease>,
    pub(crate) token: FencingToken,
    pub(crate) path: Path,
}
