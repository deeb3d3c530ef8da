//! Drives one shard: owns the table of keys and turns the effects of their queues into requests.
//!
//! # Implementation details
//!
//! A task that acquires or releases a key executes its own request where possible (`request`), so
//! the common path needs no hop between tasks. Pushes arrive through `subscriber`. Everything else
//! is done by the background thread (`background`): releases of dropped guards and requests whose
//! task was cancelled are [`Job`]s, renewals and probes are services. All of them apply events to
//! the same queue under the mutex of the entry.
//!
//! An entry leaves the table as soon as its key has no waiter, no lease and no request in flight.
//! It is first marked as removed under its mutex, so a task that found it just before looks it up
//! again.

mod admission;
mod background;
mod contention_hints;
mod context;
mod deadline;
mod entry;
mod evict;
mod execute;
mod health;
mod map;
mod orphans;
mod queue_check;
mod reach;
pub(crate) mod reporter;
mod server_clock;
mod subscriber;
mod table;
#[cfg(test)]
mod tests;
mod watchdog;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::Waker;
use std::time::Duration;

use parking_lot::Mutex;

pub(crate) use background::BackgroundThread;
pub(crate) use context::{ManagerContext, Usage};
pub(crate) use entry::{Enqueued, Entry, RequestOrigin, Settled};
pub(crate) use execute::Completed;
pub(crate) use map::Maps;
use orphans::Abandoned;
pub(crate) use reach::Down;
pub(crate) use subscriber::SubscribeError;

use crate::backoff::Backoff;
use crate::clock::Moment;
use crate::engine::{Request, StoreOutage, WaiterOptions};
use crate::error::{Failure, LockError, LockErrorKind};
use crate::key::LockKey;
use crate::late_requests::LateRequests;
use crate::protocol::Cycle;
use crate::rate_limit::RateLimit;
use crate::store::{KeyState, LeaseStore, StoreError, StoreFuture};
use crate::telemetry::{RequestKind, ShardMetrics};
use crate::time_limit::within;
use contention_hints::ContentionHints;
use deadline::NextDeadline;
use reach::Reach;
use table::Table;

/// The first and the longest delay before a key retries a request that got no reply.
const RETRY_MIN: Duration = Duration::from_millis(10);
const RETRY_MAX: Duration = Duration::from_millis(500);
/// How much each key adds to the longest delay: a hundred thousand keys must not all query a server
/// that is down at the same time. The subscriber also notices when a server is back, and then all
/// keys retry at once.
const RETRY_PER_KEY: Duration = Duration::from_micros(200);

/// See the module documentation.
pub(crate) struct Shard {
    pub(crate) manager: Arc<ManagerContext>,
    pub(crate) name: Arc<str>,
    /// The scheme of the shard's URL.
    pub(crate) kind: Arc<str>,
    pub(crate) store: Arc<dyn LeaseStore>,
    pub(crate) metrics: Arc<ShardMetrics>,
    maps: Arc<Maps>,
    late: Mutex<LateRequests>,
    /// The longest TTL requested so far, at least the default one, in microseconds. No lease lasts
    /// longer.
    longest_ttl: AtomicU64,
    table: Table,
    /// Whether the shard was found to have another shard map.
    has_other_map: AtomicBool,
    hints: ContentionHints,
    reach: Reach,
    /// Rate limiter for log lines about failed renewals.
    failed_renewals: RateLimit,
    next_deadline: NextDeadline,
    /// Whether the shard holds more leases than it can renew in time.
    is_strained: AtomicBool,
}

impl fmt::Debug for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shard")
            .field("name", &self.name)
            .field("keys", &self.table.len())
            .finish_non_exhaustive()
    }
}

/// Work for the background thread.
#[derive(Debug)]
pub(crate) enum Job {
    /// Execute a request of a queue.
    Request { entry: Arc<Entry>, request: Request },
    /// Release a cycle that is over until the store confirms.
    Release(Abandoned),
    /// Release a cycle once it is over and no request of it can arrive late.
    ReleaseAgain { key: LockKey, cycle: Cycle },
    /// Release everything, refuse new requests, and signal when that is done.
    Close { done: tokio::sync::oneshot::Sender<()> },
    /// The last handle of the manager was dropped. Exit when no work is left.
    LastHandleDropped,
    /// There are more keys than the limit, and some of their leases linger. Evict those.
    Evict,
    /// A task of the application released a key. Check whether it was the last one.
    CheckIdle,
}

/// A TTL in microseconds. TTLs are at most one day, so this does not overflow.
const fn in_micros(ttl: Duration) -> u64 {
    ttl.as_micros() as u64
}

impl Shard {
    pub(crate) fn new(
        manager: &Arc<ManagerContext>,
        name: Arc<str>,
        kind: Arc<str>,
        store: Arc<dyn LeaseStore>,
        maps: &Arc<Maps>,
        metrics: Arc<ShardMetrics>,
    ) -> Arc<Self> {
        Arc::new(Self {
            longest_ttl: AtomicU64::new(in_micros(manager.default_ttl)),
            manager: Arc::clone(manager),
            name,
            kind,
            store,
            metrics,
            maps: Arc::clone(maps),
            late: Mutex::default(),
            table: Table::default(),
            has_other_map: AtomicBool::new(false),
            hints: ContentionHints::default(),
            reach: Reach::default(),
            failed_renewals: RateLimit::default(),
            next_deadline: NextDeadline::default(),
            is_strained: AtomicBool::new(false),
        })
    }

    /// Enqueues a task for a key. The caller has to execute the returned request, and to call
    /// [`waiter_left`](Self::waiter_left) when the task no longer waits.
    ///
    /// # Errors
    ///
    /// A limit was reached, or the manager is closed.
    pub(crate) fn enqueue(
        self: &Arc<Self>,
        key: &LockKey,
        options: WaiterOptions,
        waker: &Waker,
        now: Moment,
    ) -> Result<(Arc<Entry>, Enqueued), LockError> {
        let mode = options.mode;
        self.admit_waiter(key, mode)?;
        let enqueued = self.try_enqueue(key, options, waker, now);
        if enqueued.is_err() {
            self.waiter_left(mode);
        }
        enqueued
    }

    fn try_enqueue(
        self: &Arc<Self>,
        key: &LockKey,
        mut options: WaiterOptions,
        waker: &Waker,
        now: Moment,
    ) -> Result<(Arc<Entry>, Enqueued), LockError> {
        if !options.mode.is_exclusive()
            && let Some(reason) = self.store.lacks(options.mode)
        {
            return Err(Failure::Unsupported {
                key: key.to_string(),
                shard: self.name.to_string(),
                mode: options.mode,
                reason,
            }
            .into());
        }
        // Rarely true, so threads do not contend for the cache line.
        if options.lease_ttl() > self.longest_ttl() {
            self.store
                .check_ttl(options.lease_ttl())
                .map_err(|error| self.error(error, RequestKind::Acquire.step(), Some(key), now))?;
            self.longest_ttl
                .fetch_max(in_micros(options.lease_ttl()), Ordering::Relaxed);
        }
        loop {
            let mut is_new = false;
            let entry = self.table.get_or_insert(key, options.mode, || {
                is_new = true;
                // Count the entry before any other task can find and remove it.
                self.manager.usage.keys.fetch_add(1, Ordering::Relaxed);
                Entry::new(key.clone(), options.mode, self)
            });
            if is_new {
                self.admit_key(&entry)?;
                options.contended_hint = self.hints.is_contended(key);
            }
            // Checked after the entry is in the table: a shutdown either finds the entry or is seen
            // here.
            if self.manager.usage.closed.load(Ordering::SeqCst) {
                self.forget_new(&entry, is_new);
                return Err(Failure::Closed.into());
            }
            match entry.enqueue(options, waker.clone(), now) {
                Some(Ok(enqueued)) => return Ok((entry, enqueued)),
                Some(Err(error)) => return Err(error),
                // The entry is marked as removed, but may still be in the table.
                None => self.remove(&entry),
            }
        }
    }

    /// The longest time that a lease can last without a renewal.
    fn longest_ttl(&self) -> Duration {
        Duration::from_micros(self.longest_ttl.load(Ordering::Relaxed))
    }

    /// Removes an entry that is not needed after all from the table, unless another task uses it by
    /// now.
    fn forget_new(&self, entry: &Arc<Entry>, is_new: bool) {
        if is_new {
            entry.apply_in_background(|_, _| crate::engine::Effects::none());
        }
    }

    /// An entry has no work left.
    fn forget(&self, entry: &Arc<Entry>, remote_waiters_seen: bool) {
        self.hints.note(&entry.key, remote_waiters_seen);
        self.remove(entry);
        if self.manager.usage.ending.load(Ordering::SeqCst) {
            self.send(Job::CheckIdle);
        }
    }

    fn remove(&self, entry: &Arc<Entry>) {
        if self.table.remove(entry) {
            self.manager.usage.keys.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// The entries of the key, one for each kind of mode in which it has a waiter, a lease or a
    /// request in flight.
    pub(crate) fn entries_of(&self, key: &LockKey) -> Vec<Arc<Entry>> {
        self.table.get_all(key)
    }

    /// All keys that have a waiter, a lease or a request in flight.
    pub(crate) fn entries(&self) -> Vec<Arc<Entry>> {
        self.table.all()
    }

    /// How the store records a cycle of this manager.
    pub(crate) fn owner_tag(&self, cycle: Cycle) -> String {
        self.manager.id.owner_tag(cycle).to_string()
    }

    /// Whether no key has a waiter, a lease or a request in flight.
    pub(crate) fn is_idle(&self) -> bool {
        self.table.len() == 0
    }

    /// Removes all keys of the namespace. Each step has a time limit, but not the whole, because
    /// there may be millions of keys.
    pub(crate) async fn erase(&self) -> Result<u64, LockError> {
        let started = Moment::now();
        let erased = self.store.erase().await;
        erased.map_err(|error| self.error(error, "erase", None, started))
    }

    pub(crate) async fn inspect(&self, key: &LockKey) -> Result<KeyState, LockError> {
        self.inspected(key, self.store.inspect(key.clone())).await
    }

    /// Ends the lease of `owner`, which is not a cycle of this manager, and passes the key on.
    /// Returns whether `owner` had the lease.
    pub(crate) async fn break_lease(&self, key: &LockKey, owner: &str) -> Result<bool, LockError> {
        let started = Moment::now();
        let mut breaking = self
            .store
            .break_lease(key.clone(), owner.to_owned(), crate::engine::BLOCK_OF_GRANT);
        let broken = within(started, self.manager.timeout, breaking.as_mut()).await;
        broken
            .unwrap_or_else(|_| Err(self.no_answer()))
            .map_err(|error| self.error(error, "break", Some(key), started))
    }

    /// Inspects a key in whose queue a task waits.
    async fn inspect_again(&self, key: &LockKey) -> Result<KeyState, LockError> {
        self.inspected(key, self.store.inspect_again(key.clone())).await
    }

    async fn inspected(&self, key: &LockKey, mut inspecting: StoreFuture<KeyState>) -> Result<KeyState, LockError> {
        let started = Moment::now();
        let inspection = within(started, self.manager.timeout, inspecting.as_mut()).await;
        inspection
            .unwrap_or_else(|_| Err(self.no_answer()))
            .map_err(|error| self.error(error, "inspect", Some(key), started))
    }

    /// Schedules a background release of a cycle that is over.
    fn abandon(&self, key: &LockKey, cycle: Cycle) {
        if let Some(abandoned) = Abandoned::new(&self.manager.usage, key, cycle) {
            self.send(Job::Release(abandoned));
        } else {
            self.manager.min_holds.forget(cycle);
        }
    }

    /// Whether a request of the cycle may have been sent on a connection that was given up so
    /// recently that the server may still execute it.
    fn may_arrive_late(&self, cycle: Cycle, now: Moment) -> bool {
        let Some(cut) = self
            .store
            .last_cut()
            .filter(|cut| now.since(*cut) < self.manager.late_max)
        else {
            return false;
        };
        self.late
            .lock()
            .may_include(cycle, cut, || self.manager.cycles.newest())
    }

    /// A request of the cycle may be executed after the cycle is over.
    fn release_again_later(&self, key: &LockKey, cycle: Cycle) {
        self.send(Job::ReleaseAgain {
            key: key.clone(),
            cycle,
        });
    }

    pub(crate) fn send(&self, job: Job) {
        // The background thread outlives every entry. If it is gone, the process is exiting and
        // leases expire by themselves.
        if self.manager.jobs.send(job).is_err() {
            crate::log::warn!(shard = %self.name, "the background thread is gone; a lease is left to expire");
        }
    }

    /// Records whether the store replied.
    pub(crate) fn note_reach<T>(&self, reply: &Result<T, StoreError>) {
        self.metrics.set_up(self.reach.note(&self.name, reply));
    }

    /// Records whether the health probe got a reply and locks can be acquired.
    fn note_probe(&self, reached: &Result<(), StoreError>) {
        self.metrics.set_up(self.reach.on_probe(&self.name, reached));
    }

    /// Since when the shard is down and why; `None` if it is up, as far as is known.
    pub(crate) fn down(&self) -> Option<Down> {
        if self.metrics.is_up() {
            return None;
        }
        self.reach.down()
    }

    /// Whether the shard is known to be down. Outages have their own log lines.
    pub(crate) fn is_in_outage(&self) -> bool {
        self.reach.is_down()
    }

    /// What an error of a request means for its waiters: an outage, which some of them tolerate, or
    /// `None` if a retry would not help.
    fn outage(&self, error: &LockError, started: Moment, now: Moment, attempts: u32) -> Option<StoreOutage> {
        if error.kind() != LockErrorKind::Unavailable {
            return None;
        }
        let keys = u32::try_from(self.manager.usage.keys.load(Ordering::Relaxed)).unwrap_or(u32::MAX);
        let longest = RETRY_MAX.max(RETRY_PER_KEY.saturating_mul(keys));
        Some(StoreOutage {
            since: started,
            patience: self.manager.timeout,
            retry_at: now + Backoff::delay_after(attempts.saturating_add(1), RETRY_MIN, longest),
        })
    }

    /// Logs that leases could not be renewed. During an outage, whose own log line covers this,
    /// only at debug level.
    pub(crate) fn renewal_failed(&self, error: &LockError, leases: usize) {
        let suppressed = match self.is_in_outage() {
            true => None,
            false => self.failed_renewals.admit(Moment::now()),
        };
        match suppressed {
            Some(suppressed) => {
                crate::log::warn!(shard = %self.name, %error, leases, suppressed, "failed to renew leases; retrying until they expire");
            }
            None => crate::log::debug!(shard = %self.name, %error, leases, "failed to renew leases"),
        }
    }

    pub(crate) fn no_answer(&self) -> StoreError {
        StoreError::no_answer_within_store_timeout(self.manager.timeout)
    }

    pub(crate) fn error(
        &self,
        error: StoreError,
        step: &'static str,
        key: Option<&LockKey>,
        since: Moment,
    ) -> LockError {
        error.with_context(&self.name, step, key, Moment::now().since(since))
    }
}
