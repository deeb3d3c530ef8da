//! The locks that connections hold.
//!
//! # Implementation details
//!
//! One table has the guards of all connections, because any connection may release a lock by its
//! token. A guard leaves the table exactly once: when it is released, when its loss is noticed, or
//! when its connection ends. It is dropped or released after the mutex was unlocked.
//!
//! The loss of a lock is watched by the task of its connection ([`Losses`]). A lock that another
//! connection releases is no longer watched.

use std::collections::{HashMap, HashSet};
use std::pin::Pin;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::future::{AbortHandle, Abortable};
use futures_util::stream::FuturesUnordered;
use metrics::Gauge;
use parking_lot::Mutex;
use shardlock::{LockGuard, LockMode, LossReason};
use tokio::sync::Notify;

use super::clients::ClientId;
use super::command::LockId;

/// The locks of all connections.
pub(super) struct HeldLocks {
    table: Mutex<Table>,
    /// How many locks there are.
    gauge: Gauge,
    /// Notified when the table becomes empty.
    empty: Notify,
}

#[derive(Debug, Default)]
struct Table {
    locks: HashMap<LockId, Held>,
    /// The locks of each connection that holds some.
    of_client: HashMap<ClientId, HashSet<LockId>>,
}

/// A lock that a connection holds.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) guard: LockGuard,
    client: ClientId,
    since: Instant,
    /// Ends the watch for its loss.
    watch: AbortHandle,
}

/// Some of the locks that are held, and counts of all.
pub(super) struct HeldSnapshot {
    pub(super) total: usize,
    /// The clients that hold some.
    pub(super) of_client: HashMap<ClientId, HeldCount>,
    /// The oldest, oldest first.
    pub(super) oldest: Vec<HeldView>,
}

/// The locks of a client.
pub(super) struct HeldCount {
    pub(super) count: usize,
    pub(super) oldest: Instant,
}

/// A lock as it is now.
pub(super) struct HeldView {
    pub(super) id: LockId,
    pub(super) client: ClientId,
    pub(super) mode: LockMode,
    pub(super) since: Instant,
    pub(super) remaining: Duration,
}

impl HeldLocks {
    pub(super) fn new(gauge: Gauge) -> Self {
        Self {
            table: Mutex::default(),
            gauge,
            empty: Notify::new(),
        }
    }

    /// How many locks a connection holds.
    pub(super) fn count_of(&self, client: ClientId) -> usize {
        self.table.lock().of_client.get(&client).map_or(0, HashSet::len)
    }

    pub(super) fn count(&self) -> usize {
        self.table.lock().locks.len()
    }

    /// Adds a lock of a connection, and watches it.
    pub(super) fn add(&self, client: ClientId, id: LockId, guard: LockGuard, losses: &mut Losses) {
        let watch = losses.watch(id.clone(), &guard);
        let held = Held {
            guard,
            client,
            since: Instant::now(),
            watch,
        };
        let mut table = self.table.lock();
        table.of_client.entry(client).or_default().insert(id.clone());
        let before = table.locks.insert(id, held);
        self.gauge.set(table.locks.len() as f64);
        drop(table);
        // The token of every acquisition is new.
        debug_assert!(before.is_none(), "a token was issued twice");
    }

    /// Removes a lock, if it is still held.
    pub(super) fn remove(&self, id: &LockId) -> Option<Held> {
        let mut table = self.table.lock();
        let held = table.locks.remove(id)?;
        if let Some(ids) = table.of_client.get_mut(&held.client) {
            ids.remove(id);
            if ids.is_empty() {
                table.of_client.remove(&held.client);
            }
        }
        let is_empty = table.locks.is_empty();
        self.gauge.set(table.locks.len() as f64);
        drop(table);
        held.watch.abort();
        if is_empty {
            self.empty.notify_waiters();
        }
        Some(held)
    }

    /// Removes the locks of a connection that has ended.
    pub(super) fn remove_client(&self, client: ClientId) -> Vec<Held> {
        let mut table = self.table.lock();
        let ids = table.of_client.remove(&client).unwrap_or_default();
        let removed: Vec<Held> = ids.iter().filter_map(|id| table.locks.remove(id)).collect();
        let is_empty = table.locks.is_empty();
        self.gauge.set(table.locks.len() as f64);
        drop(table);
        if is_empty && !removed.is_empty() {
            self.empty.notify_waiters();
        }
        removed
    }

    /// How long a lock is certainly held. Zero if it is not held any more.
    pub(super) fn remaining(&self, id: &LockId) -> Duration {
        let table = self.table.lock();
        table
            .locks
            .get(id)
            .map_or(Duration::ZERO, |held| held.guard.remaining())
    }

    /// The oldest `most` locks, and how many each client holds.
    pub(super) fn snapshot(&self, most: usize) -> HeldSnapshot {
        let table = self.table.lock();
        let mut of_client: HashMap<ClientId, HeldCount> = HashMap::with_capacity(table.of_client.len());
        let mut oldest: Vec<(&LockId, &Held)> = table.locks.iter().collect();
        for (_, held) in &oldest {
            let of_client = of_client.entry(held.client).or_insert(HeldCount {
                count: 0,
                oldest: held.since,
            });
            of_client.count += 1;
            of_client.oldest = of_client.oldest.min(held.since);
        }
        if oldest.len() > most {
            oldest.select_nth_unstable_by_key(most, |(_, held)| held.since);
            oldest.truncate(most);
        }
        oldest.sort_unstable_by_key(|(_, held)| held.since);
        let views = oldest.into_iter().map(|(id, held)| HeldView {
            id: id.clone(),
            client: held.client,
            mode: held.guard.mode(),
            since: held.since,
            remaining: held.guard.remaining(),
        });
        HeldSnapshot {
            total: table.locks.len(),
            of_client,
            oldest: views.collect(),
        }
    }

    /// Waits until no lock is held.
    pub(super) async fn wait_until_empty(&self) {
        loop {
            let mut emptied = std::pin::pin!(self.empty.notified());
            // Registered before the check, so that nothing is missed in between.
            emptied.as_mut().enable();
            if self.count() == 0 {
                return;
            }
            emptied.await;
        }
    }
}

type Watch = Pin<Box<dyn Future<Output = (LockId, LossReason)> + Send>>;

/// The locks of a connection whose loss is watched.
#[derive(Default)]
pub(super) struct Losses(FuturesUnordered<Abortable<Watch>>);

impl Losses {
    fn watch(&mut self, id: LockId, guard: &LockGuard) -> AbortHandle {
        let lost = guard.lost();
        let watch: Watch = Box::pin(async move { (id, lost.await) });
        let (abort, registration) = AbortHandle::new_pair();
        self.0.push(Abortable::new(watch, registration));
        abort
    }

    /// Waits for the next loss.
    ///
    /// Cancel safe: no loss is missed if the future is dropped.
    pub(super) async fn next(&mut self) -> (LockId, LossReason) {
        while let Some(lost) = self.0.next().await {
            // Otherwise the lock was released.
            if let Ok(lost) = lost {
                return lost;
            }
        }
        std::future::pending().await
    }
}
