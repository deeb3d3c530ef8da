//! The driver of one shard: it owns the table of keys and turns what their queues want into requests.
//!
//! # Implementation details
//!
//! A task that wants a key, or gives one back, carries its own request out where it can (`request`), so that the shortest way
//! costs no hop between tasks. Pushes come through `inbox`. Everything else is a [`Job`] for the background thread (`background`): renewals, releases of
//! dropped guards, requests whose task went away. All let events happen to the same queue under the entry's mutex.
//!
//! An entry leaves the table in the moment in which nothing is wanted, held or on its way for its key. It is marked under its
//! mutex first, so that a task that found it just before looks again.

mod abandon;
mod background;
mod backlog;
mod drive;
mod entry;
mod inbox;
mod map;
mod places;
pub(crate) mod pulse;
mod reach;
mod rivals;
mod room;
mod server_clock;
mod table;
#[cfg(test)]
mod tests;
mod watch;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::task::Waker;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::mpsc;

use abandon::Abandoned;
pub(crate) use background::Background;
pub(crate) use backlog::{Backlog, Due, STRAIN_MIN};
pub(crate) use drive::Driven;
pub(crate) use entry::{Asked, Entry, Settled, Wanted};
pub(crate) use inbox::Unheard;
pub(crate) use map::Maps;

use crate::backoff::Backoff;
use crate::clock::Moment;
use crate::error::LockError;
use crate::heat::HotKeys;
use crate::identity::ManagerId;
use crate::key::LockKey;
use crate::notice::{Notices, Seldom};
use crate::program::Runtimes;
use crate::protocol::{Cycle, Cycles};
use crate::queue::{Outage, Request, Room, Rules, Want};
use crate::store::{Inspection, LeaseStore, StoreError};
use crate::telemetry::{ClassMetrics, ManagerMetrics, ShardMetrics};
use crate::time_limit::within;
use reach::Reach;
use rivals::Rivals;
use table::Table;
use watch::Watch;

/// The first and the longest delay before a key's request that could not be answered is sent again.
const RETRY_MIN: Duration = Duration::from_millis(10);
const RETRY_MAX: Duration = Duration::from_millis(500);
/// By how much each key lengthens the longest one: a hundred thousand keys must not ask a server that is down all at the same time. A server that is
/// back is known by the inbox as well, and then all ask at once.
const RETRY_PER_KEY: Duration = Duration::from_micros(200);

/// How many keys may wait for a shard that is down.
const WAIT_IN_OUTAGE_MAX: usize = 10_000;

/// See the module.
pub(crate) struct Shard {
    pub(crate) name: Arc<str>,
    /// The scheme of its URL.
    pub(crate) kind: Arc<str>,
    pub(crate) store: Arc<dyn LeaseStore>,
    pub(crate) maps: Arc<Maps>,
    pub(crate) id: ManagerId,
    pub(crate) rules: Rules,
    pub(crate) cycles: Arc<Cycles>,
    pub(crate) limits: Limits,
    /// The time limit of a request.
    pub(crate) timeout: Duration,
    /// How long after a connection was given up a request on it may be executed.
    late_max: Duration,
    /// When a connection was last given up, and the largest number of a cycle then.
    newest_at_cut: Mutex<(Moment, u64)>,
    /// The lifetime of a lease that is granted on while a cycle is abandoned.
    pub(crate) default_ttl: Duration,
    /// The longest lifetime that was asked for, or the default one, in microseconds: no lease lasts longer.
    longest_ttl: AtomicU64,
    pub(crate) metrics: Arc<ShardMetrics>,
    /// The metrics of requests that name no class.
    pub(crate) class: Arc<ClassMetrics>,
    /// Shared by all shards of a manager, as all below.
    pub(crate) load: Arc<Load>,
    pub(crate) manager: Arc<ManagerMetrics>,
    pub(crate) hot: Arc<HotKeys>,
    pub(crate) notices: Arc<Notices>,
    pub(crate) runtimes: Arc<Runtimes>,
    table: Table,
    /// Whether it was found to have another shard map.
    has_other_map: AtomicBool,
    rivals: Rivals,
    reach: Reach,
    /// Failed renewals that were logged, and those that were not.
    pub(crate) failed_renewals: Seldom,
    pub(crate) watch: Watch,
    /// Whether it holds more leases than it can renew in time.
    is_strained: AtomicBool,
    jobs: mpsc::UnboundedSender<Job>,
}

impl fmt::Debug for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shard")
            .field("name", &self.name)
            .field("keys", &self.table.len())
            .finish_non_exhaustive()
    }
}

/// How much a manager takes on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) waiters_per_key: usize,
    pub(crate) waiters: usize,
    pub(crate) keys: usize,
}

/// How much a manager has taken on, and whether it takes on more.
#[derive(Debug)]
pub(crate) struct Load {
    pub(crate) waiters: AtomicUsize,
    /// How many requests to a store have not been answered for a while.
    pub(crate) slow: AtomicUsize,
    /// How many entries the tables of all shards have.
    keys: AtomicUsize,
    /// How many cycles are over and not released yet.
    owed: AtomicUsize,
    /// Whether it was told that there are too many of them.
    owes_too_many: AtomicBool,
    /// What each shard counts.
    shards: Box<[Arc<ShardMetrics>]>,
    /// Whether the background thread was told that there is too little room.
    makes_room: AtomicBool,
    pub(crate) closed: AtomicBool,
    /// Whether the background thread waits for the last key to be given back.
    pub(crate) ending: AtomicBool,
}

impl Load {
    /// Nothing yet, of the shards that count by these.
    pub(crate) fn new(shards: Box<[Arc<ShardMetrics>]>) -> Self {
        Self {
            waiters: AtomicUsize::new(0),
            slow: AtomicUsize::new(0),
            keys: AtomicUsize::new(0),
            owed: AtomicUsize::new(0),
            owes_too_many: AtomicBool::new(false),
            shards,
            makes_room: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            ending: AtomicBool::new(false),
        }
    }

    /// Whether anybody waits for anything.
    pub(crate) fn waits(&self) -> bool {
        self.waiters.load(Ordering::Relaxed) > 0 || self.slow.load(Ordering::Relaxed) > 0
    }

    /// Whether no cycle waits for its release.
    fn owes_nothing(&self) -> bool {
        self.owed.load(Ordering::Acquire) == 0
    }

    /// How many keys have nothing but a lease that is kept idle, or was until just now.
    fn spare(&self) -> usize {
        self.shards.iter().map(|shard| shard.lingering()).sum()
    }
}

/// Work for the background thread.
#[derive(Debug)]
pub(crate) enum Job {
    /// Carry out what a queue asks for.
    Request { entry: Arc<Entry>, request: Request },
    /// Release a cycle that is over until the store has answered.
    Release(Abandoned),
    /// Release a cycle once it is over and nothing of it can arrive late any more.
    Doubt { key: LockKey, cycle: Cycle },
    /// Give everything back and refuse everything new; tell when it is done.
    Close { done: tokio::sync::oneshot::Sender<()> },
    /// No handle of the manager is left: end when nothing is left to do.
    Leave,
    /// There are more keys than the limit allows, among them some that are kept idle: give those back.
    MakeRoom,
    /// A key was given back by a task of the program: look whether that was the last.
    Look,
}

/// What a shard is made of.
pub(crate) struct Parts {
    pub(crate) name: Arc<str>,
    pub(crate) kind: Arc<str>,
    pub(crate) store: Arc<dyn LeaseStore>,
    pub(crate) maps: Arc<Maps>,
    pub(crate) id: ManagerId,
    pub(crate) rules: Rules,
    pub(crate) cycles: Arc<Cycles>,
    pub(crate) limits: Limits,
    pub(crate) timeout: Duration,
    pub(crate) late_max: Duration,
    pub(crate) default_ttl: Duration,
    pub(crate) metrics: Arc<ShardMetrics>,
    pub(crate) class: Arc<ClassMetrics>,
    pub(crate) load: Arc<Load>,
    pub(crate) manager: Arc<ManagerMetrics>,
    pub(crate) hot: Arc<HotKeys>,
    pub(crate) notices: Arc<Notices>,
    pub(crate) runtimes: Arc<Runtimes>,
    pub(crate) jobs: mpsc::UnboundedSender<Job>,
}

/// A lifetime, which is a day at most.
const fn in_micros(ttl: Duration) -> u64 {
    ttl.as_micros() as u64
}

impl Shard {
    pub(crate) fn new(parts: Parts) -> Arc<Self> {
        let Parts {
            name,
            kind,
            store,
            maps,
            id,
            rules,
            cycles,
            limits,
            timeout,
            late_max,
            default_ttl,
            metrics,
            class,
            load,
            manager,
            hot,
            notices,
            runtimes,
            jobs,
        } = parts;
        Arc::new(Self {
            name,
            kind,
            store,
            maps,
            id,
            rules,
            cycles,
            limits,
            timeout,
            late_max,
            default_ttl,
            longest_ttl: AtomicU64::new(in_micros(default_ttl)),
            metrics,
            class,
            load,
            manager,
            hot,
            notices,
            runtimes,
            newest_at_cut: Mutex::default(),
            table: Table::default(),
            has_other_map: AtomicBool::new(false),
            rivals: Rivals::default(),
            reach: Reach::default(),
            failed_renewals: Seldom::default(),
            watch: Watch::default(),
            is_strained: AtomicBool::new(false),
            jobs,
        })
    }

    /// A task wants a key. The request that comes back is the caller's to carry out.
    ///
    /// # Errors
    ///
    /// One of the limits was reached, or the manager is closed.
    pub(crate) fn want(
        self: &Arc<Self>,
        key: &LockKey,
        mut want: Want,
        waker: &Waker,
        now: Moment,
    ) -> Result<(Arc<Entry>, Wanted), LockError> {
        // Seldom true, so that tasks of several threads do not write to one place.
        if want.ttl > self.longest_ttl() {
            self.longest_ttl.fetch_max(in_micros(want.ttl), Ordering::Relaxed);
        }
        loop {
            let mut is_new = false;
            let entry = self.table.get_or_insert(key, || {
                is_new = true;
                // Before anybody else can find it, and so remove it.
                self.load.keys.fetch_add(1, Ordering::Relaxed);
                Entry::new(key.clone(), self)
            });
            if is_new {
                self.check_keys(&entry)?;
                self.check_strain(&entry)?;
                self.check_outage(&entry)?;
                want.expects_rivals = self.rivals.seen(key);
            }
            // Looked at after the entry is in the table: a shutdown either finds it there or was seen here.
            if self.load.closed.load(Ordering::SeqCst) {
                self.forget_new(&entry, is_new);
                return Err(LockError::Closed);
            }
            match entry.want(want, waker.clone(), now) {
                Some(Ok(wanted)) => return Ok((entry, wanted)),
                Some(Err(error)) => return Err(error),
                // It was on its way out of the table; whoever takes it out may not have come to it yet.
                None => self.remove(&entry),
            }
        }
    }

    /// For how long a lease may last that nobody prolongs.
    fn longest_ttl(&self) -> Duration {
        Duration::from_micros(self.longest_ttl.load(Ordering::Relaxed))
    }

    /// Whether a lease that nobody holds may be kept.
    pub(crate) fn room(&self) -> Room<'_> {
        Room {
            keys: &self.load.keys,
            limit: self.limits.keys,
        }
    }

    /// Refuses one key too many, over all shards. Keys that are kept idle are not too many: they make room. That takes them a moment, in
    /// which none is added to them ([`room`](Self::room)), so that there are never more than twice as many keys.
    fn check_keys(&self, entry: &Arc<Entry>) -> Result<(), LockError> {
        let (used, limit) = (self.load.keys.load(Ordering::Relaxed), self.limits.keys);
        if used <= limit {
            return Ok(());
        }
        // The spare ones first: what leaves the table meanwhile was spare, and would be missing among them.
        let spare = self.load.spare();
        let used = self.load.keys.load(Ordering::Relaxed);
        if used.saturating_sub(spare) <= limit {
            if !self.load.makes_room.swap(true, Ordering::SeqCst) {
                self.send(Job::MakeRoom);
            }
            return Ok(());
        }
        self.forget_new(entry, true);
        Err(LockError::TooManyKeys {
            key: entry.key.to_string(),
            used: used - 1,
            limit,
        })
    }

    /// Refuses a further key while the leases that are held can't be renewed in time: rather no new lock than the loss of old ones.
    fn check_strain(&self, entry: &Arc<Entry>) -> Result<(), LockError> {
        if !self.is_strained.load(Ordering::Relaxed) {
            return Ok(());
        }
        let leases = self.metrics.leases();
        if leases < STRAIN_MIN {
            // Most were given back since, and there may be no renewal that would show it.
            return Ok(());
        }
        self.forget_new(entry, true);
        Err(LockError::TooManyLeases {
            key: entry.key.to_string(),
            shard: self.name.to_string(),
            leases,
        })
    }

    /// Refuses a further key while very many wait for a shard that is down: each costs memory here, and a request to the server when it is back.
    fn check_outage(&self, entry: &Arc<Entry>) -> Result<(), LockError> {
        if !self.is_in_outage() {
            return Ok(());
        }
        let waiting = self.table.len().saturating_sub(self.metrics.leases());
        if waiting <= WAIT_IN_OUTAGE_MAX {
            return Ok(());
        }
        self.forget_new(entry, true);
        Err(LockError::ShardDown {
            key: entry.key.to_string(),
            shard: self.name.to_string(),
            waiting: waiting - 1,
            limit: WAIT_IN_OUTAGE_MAX,
        })
    }

    /// Whether it holds more leases than it can renew in time.
    pub(crate) fn set_strained(&self, is_strained: bool) {
        if self.is_strained.swap(is_strained, Ordering::Relaxed) == is_strained {
            return;
        }
        let (shard, leases) = (&self.name, self.metrics.leases());
        if is_strained {
            tracing::warn!(%shard, leases, "more leases are held than are renewed in time; new keys are refused until renewals keep up");
        } else {
            tracing::info!(%shard, leases, "renewals keep up again; new keys are taken");
        }
    }

    /// Takes an entry that was made for nothing out of the table, unless somebody uses it by now.
    fn forget_new(&self, entry: &Arc<Entry>, is_new: bool) {
        if is_new {
            entry.in_background(|_, _| crate::queue::Effects::none());
        }
    }

    /// An entry has nothing left to do.
    fn forget(&self, entry: &Arc<Entry>, rivals_seen: bool) {
        self.rivals.note(&entry.key, rivals_seen);
        self.remove(entry);
        if self.load.ending.load(Ordering::SeqCst) {
            self.send(Job::Look);
        }
    }

    fn remove(&self, entry: &Arc<Entry>) {
        if self.table.remove(entry) {
            self.load.keys.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// That key, if it is wanted, held or on its way.
    pub(crate) fn entry(&self, key: &LockKey) -> Option<Arc<Entry>> {
        self.table.get(key)
    }

    /// All keys that are wanted, held or on their way.
    pub(crate) fn entries(&self) -> Vec<Arc<Entry>> {
        self.table.all()
    }

    /// What stands in the store for a cycle of this manager.
    pub(crate) fn sign(&self, cycle: Cycle) -> String {
        self.id.sign(cycle).to_string()
    }

    /// Whether no key is wanted, held or on its way.
    pub(crate) fn is_idle(&self) -> bool {
        self.table.len() == 0
    }

    /// Without a time limit: there may be millions of keys.
    pub(crate) async fn erase(&self) -> Result<u64, LockError> {
        let started = Moment::now();
        let erased = self.store.erase().await;
        erased.map_err(|error| self.error(error, "erase", None, started))
    }

    pub(crate) async fn inspect(&self, key: &LockKey) -> Result<Inspection, LockError> {
        let started = Moment::now();
        let mut inspecting = self.store.inspect(key.clone());
        let inspection = within(started, self.timeout, inspecting.as_mut()).await;
        inspection
            .unwrap_or_else(|_| Err(self.no_answer()))
            .map_err(|error| self.error(error, "inspect", Some(key), started))
    }

    /// Has a cycle that is over released in the background.
    fn abandon(&self, key: &LockKey, cycle: Cycle) {
        if let Some(abandoned) = Abandoned::new(&self.load, key, cycle) {
            self.send(Job::Release(abandoned));
        }
    }

    /// Whether a request of that cycle was sent on a connection that was given up so lately that it may be executed yet.
    fn may_arrive_late(&self, cycle: Cycle, now: Moment) -> bool {
        let Some(cut) = self.store.last_cut().filter(|cut| now.since(*cut) < self.late_max) else {
            return false;
        };
        let mut newest = self.newest_at_cut.lock();
        if newest.0 != cut {
            // Those that were opened since are doubted as well, which does no harm.
            *newest = (cut, self.cycles.newest());
        }
        cycle.number() <= newest.1
    }

    /// A request of that cycle may be executed after the cycle is over.
    fn doubt(&self, key: &LockKey, cycle: Cycle) {
        self.send(Job::Doubt {
            key: key.clone(),
            cycle,
        });
    }

    pub(crate) fn send(&self, job: Job) {
        // The background thread outlives every entry; where it is gone, the process is ending, and leases run out by themselves.
        if self.jobs.send(job).is_err() {
            tracing::warn!(shard = %self.name, "the background thread is gone; a lease is left to run out");
        }
    }

    /// Notes whether the store answered.
    pub(crate) fn note_reach<T>(&self, reply: &Result<T, StoreError>) {
        self.metrics.set_up(self.reach.note(&self.name, reply));
    }

    /// Notes whether the store answered a look, and would take a lock.
    fn note_look(&self, reached: &Result<(), StoreError>) {
        self.metrics.set_up(self.reach.looked(&self.name, reached));
    }

    /// Whether the shard is known to be down, which its outage has a line of its own for.
    pub(crate) fn is_in_outage(&self) -> bool {
        self.reach.is_troubled()
    }

    /// What an error of a request means for those who wait for it: an outage, which some of them bear, or `None` if asking again would not help.
    fn outage(&self, error: &LockError, started: Moment, now: Moment, attempts: u32) -> Option<Outage> {
        if !matches!(error, LockError::Unavailable { .. }) {
            return None;
        }
        let keys = u32::try_from(self.load.keys.load(Ordering::Relaxed)).unwrap_or(u32::MAX);
        let longest = RETRY_MAX.max(RETRY_PER_KEY.saturating_mul(keys));
        Some(Outage {
            since: started,
            patience: self.timeout,
            retry_at: now + Backoff::delay_after(attempts.saturating_add(1), RETRY_MIN, longest),
        })
    }

    /// Some leases could not be renewed. The outage of a shard has a line of its own.
    pub(crate) fn renewal_failed(&self, error: &LockError, leases: usize) {
        let suppressed = match self.is_in_outage() {
            true => None,
            false => self.failed_renewals.pass(Moment::now()),
        };
        match suppressed {
            Some(suppressed) => {
                tracing::warn!(shard = %self.name, %error, leases, suppressed, "leases could not be renewed; that is tried again while they last");
            }
            None => tracing::debug!(shard = %self.name, %error, leases, "leases could not be renewed"),
        }
    }

    pub(crate) fn no_answer(&self) -> StoreError {
        StoreError::Unavailable(format!("no answer within store_timeout ({:?})", self.timeout).into())
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
