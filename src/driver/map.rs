//! The shard map: stored at all shards or at none before the first lock. A shard with another map
//! is lost.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::sync::Mutex;

use super::Shard;
use crate::clock::Moment;
use crate::key::LockKey;
use crate::protocol::{Acquire, AcquireReply, Answer};
use crate::router::shard_index;
use crate::store::{LeaseStore, MapStep, StoreError, StoreFuture};

/// The stores of all shards of a manager by name, and a lock so that one task at a time stores the
/// map.
pub(crate) struct Maps {
    stores: Vec<(Arc<str>, Arc<dyn LeaseStore>)>,
    /// How long one step waits for the other shards, chosen so that all steps fit into the time
    /// limit of a request.
    step_limit: Duration,
    /// The last failure of each shard, in the order of `stores`.
    storing: Mutex<Vec<Option<Failure>>>,
}

/// The map could not be stored for a shard.
#[derive(Clone)]
struct Failure {
    at: Moment,
    error: StoreError,
}

impl Maps {
    pub(crate) fn new(stores: Vec<(Arc<str>, Arc<dyn LeaseStore>)>, timeout: Duration) -> Self {
        Self {
            storing: Mutex::new(vec![None; stores.len()]),
            stores,
            step_limit: timeout / 4,
        }
    }

    /// Ensures that this shard has the map. No shard that replies may have another one. A shard
    /// that does not reply is checked when it is first used.
    ///
    /// # Errors
    ///
    /// A shard has another map, or this shard did not reply.
    async fn store_for(&self, own: &Arc<dyn LeaseStore>) -> Result<(), StoreError> {
        let began = Moment::now();
        let mut failures = self.storing.lock().await;
        let shard = self.stores.iter().position(|(_, store)| Arc::ptr_eq(store, own));
        let mut last = shard.and_then(|shard| failures.get_mut(shard));
        // Otherwise requests that wait here would fail one after the other.
        let failed = last.as_ref().and_then(|last| last.as_ref());
        if let Some(failed) = failed.filter(|failed| failed.at >= began) {
            return Err(failed.error.clone());
        }
        let stored = self.store_alone(own).await;
        if let (Some(last), Err(error)) = (&mut last, &stored) {
            **last = Some(Failure {
                at: Moment::now(),
                error: error.clone(),
            });
        }
        stored
    }

    /// The same for one task at a time.
    async fn store_alone(&self, own: &Arc<dyn LeaseStore>) -> Result<(), StoreError> {
        // A map stored in a single place cannot be stored partially.
        let is_atomic = self.stores.len() == 1 && own.has_one_map();
        let steps = [MapStep::Read, MapStep::Reserve, MapStep::Confirm];
        let mut answering: Vec<_> = self.stores.iter().collect();
        for step in steps.into_iter().filter(|&step| step != MapStep::Reserve || !is_atomic) {
            if own.has_map() {
                return Ok(());
            }
            let asked = answering.iter().map(|(_, store)| async {
                let answer = store.map(step);
                if Arc::ptr_eq(store, own) {
                    return answer.await;
                }
                let answer = tokio::time::timeout(self.step_limit, answer).await;
                answer.unwrap_or_else(|_| Err(StoreError::Unavailable("no answer".into())))
            });
            let answers = join_all(asked).await;
            let mut answered = Vec::with_capacity(answering.len());
            for (&(name, store), answer) in answering.iter().zip(answers) {
                let is_own = Arc::ptr_eq(store, own);
                match answer {
                    Ok(_) => answered.push((name, store)),
                    Err(error) if is_own => return Err(error),
                    Err(error @ StoreError::MapMismatch { .. }) => return Err(error.at_shard(name)),
                    Err(error) => {
                        crate::log::debug!(shard = %name, ?error, "a shard did not answer about its shard map")
                    }
                }
            }
            answering.retain(|(_, store)| answered.iter().any(|(_, answered)| Arc::ptr_eq(store, answered)));
        }
        match own.has_map() {
            true => Ok(()),
            false => Err(StoreError::Unavailable(
                "the shard map changed while it was being stored; try again".into(),
            )),
        }
    }
}

impl fmt::Debug for Maps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Maps")
            .field("shards", &self.stores.len())
            .finish_non_exhaustive()
    }
}

impl Shard {
    /// Whether the key belongs to this shard.
    pub(super) fn owns(&self, key: &LockKey) -> bool {
        let stores = &self.maps.stores;
        let owner = stores.get(shard_index(key.slot(), stores.len()));
        owner.is_some_and(|(_, store)| Arc::ptr_eq(store, &self.store))
    }

    /// Sends an acquire to the store, once the shard is known to have this manager's map.
    pub(super) fn acquire(&self, request: Acquire) -> StoreFuture<Answer<AcquireReply>> {
        if self.store.has_map() {
            return self.store.acquire(request);
        }
        let (maps, store) = (Arc::clone(&self.maps), Arc::clone(&self.store));
        let runtimes = Arc::clone(&self.manager.runtimes);
        Box::pin(async move {
            let own = Arc::clone(&store);
            // Spawned on the background thread: a request that is no longer polled must not block
            // all others.
            let storing = runtimes.spawn(async move { maps.store_for(&own).await });
            storing.await.unwrap_or_else(|error| {
                let reason = format!("the shard map was not stored: {error}");
                Err(StoreError::Unavailable(reason.into()))
            })?;
            store.acquire(request).await
        })
    }

    /// Checks the store's answer for a shard map mismatch. If the shard has another map, every
    /// lease on it is lost at once, because managers with that map may lock the same keys
    /// elsewhere. Returns whether that is the case.
    pub(crate) fn note_map<T>(&self, answer: &Result<T, StoreError>) -> bool {
        let error = match answer {
            Ok(_) => {
                // Rarely true, so threads do not contend for the cache line.
                if self.has_other_map.load(Ordering::Relaxed) && self.store.has_map() {
                    self.has_other_map.store(false, Ordering::Relaxed);
                }
                return false;
            }
            Err(error @ StoreError::MapMismatch { shard: None, .. }) => error,
            Err(_) => return false,
        };
        if !self.has_other_map.swap(true, Ordering::Relaxed) {
            let error = error.clone().with_context(&self.name, "probe", None, Duration::ZERO);
            crate::log::error!(%error, "all locks on the shard are lost");
            self.disown();
        }
        true
    }

    /// Ends all leases, and makes all waiting keys ask again.
    pub(crate) fn disown(&self) {
        for entry in self.entries() {
            entry.apply_in_background(|queue, cx| queue.disown(cx));
        }
    }
}
