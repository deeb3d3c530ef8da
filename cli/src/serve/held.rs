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
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::{AbortHandle, Abortable};
use futures_util::stream::FuturesUnordered;
use parking_lot::Mutex;
use shardlock::{LockGuard, LossReason};
use tokio::sync::Notify;

use super::clients::ClientId;
use super::command::LockId;

/// The locks of all connections.
#[derive(Debug, Default)]
pub(super) struct HeldLocks {
    table: Mutex<Table>,
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
    /// Ends the watch for its loss.
    watch: AbortHandle,
}

impl HeldLocks {
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
        let held = Held { guard, client, watch };
        let mut table = self.table.lock();
        table.of_client.entry(client).or_default().insert(id.clone());
        let before = table.locks.insert(id, held);
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
