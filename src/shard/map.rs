//! The shard map and the shard: it is stored before the first lock, at all shards or at none; and a shard that has another one is lost.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::sync::Mutex;

use super::Shard;
use crate::key::LockKey;
use crate::protocol::{Acquire, AcquireReply, Answer};
use crate::router::shard_index;
use crate::store::{LeaseStore, MapStep, StoreError, StoreFuture};

/// The stores of all shards of a manager, by their names, and the one task at a time that stores their map.
pub(crate) struct Maps {
    stores: Vec<(Arc<str>, Arc<dyn LeaseStore>)>,
    /// How long one step waits for the other shards, so that all steps fit into the time limit of a request.
    step_limit: Duration,
    storing: Mutex<()>,
}

impl Maps {
    pub(crate) fn new(stores: Vec<(Arc<str>, Arc<dyn LeaseStore>)>, timeout: Duration) -> Self {
        Self {
            stores,
            step_limit: timeout / 4,
            storing: Mutex::new(()),
        }
    }

    /// Sees to it that this shard has the map. No shard that answers may have another one then; a shard that does not answer is asked when
    /// it is first used.
    ///
    /// # Errors
    ///
    /// A shard has another map, or this one did not answer.
    async fn store_for(&self, own: &Arc<dyn LeaseStore>) -> Result<(), StoreError> {
        let _only_one = self.storing.lock().await;
        // One that is stored at one place can't be stored in part.
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
                    Err(error) => tracing::debug!(shard = %name, ?error, "a shard was not asked for its shard map"),
                }
            }
            answering.retain(|(_, store)| answered.iter().any(|(_, answered)| Arc::ptr_eq(store, answered)));
        }
        match own.has_map() {
            true => Ok(()),
            false => Err(StoreError::Unavailable(
                "the shard map was changed while it was stored; try again".into(),
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
    /// Whether keys of that slot belong to this shard.
    pub(super) fn owns(&self, key: &LockKey) -> bool {
        let stores = &self.maps.stores;
        let owner = stores.get(shard_index(key.slot(), stores.len()));
        owner.is_some_and(|(_, store)| Arc::ptr_eq(store, &self.store))
    }

    /// Asks the store for a lease, once the shard is known to have this manager's map.
    pub(super) fn acquire(&self, request: Acquire) -> StoreFuture<Answer<AcquireReply>> {
        if self.store.has_map() {
            return self.store.acquire(request);
        }
        let (maps, store) = (Arc::clone(&self.maps), Arc::clone(&self.store));
        let runtimes = Arc::clone(&self.runtimes);
        Box::pin(async move {
            let own = Arc::clone(&store);
            // On a task of its own, on the background thread: a request that is polled no more must not keep all others from it.
            let storing = runtimes.spawn(async move { maps.store_for(&own).await });
            storing.await.unwrap_or_else(|error| {
                let reason = format!("the shard map was not stored: {error}");
                Err(StoreError::Unavailable(reason.into()))
            })?;
            store.acquire(request).await
        })
    }

    /// What the store answered says whether the shard has this manager's map. If it has another one, every lease on it is lost at once: managers
    /// with that map may lock the same keys elsewhere. Returns whether that is so.
    pub(crate) fn note_map<T>(&self, answer: &Result<T, StoreError>) -> bool {
        let error = match answer {
            Ok(_) => {
                // Seldom true, so that tasks of several threads do not write to one place.
                if self.has_other_map.load(Ordering::Relaxed) && self.store.has_map() {
                    self.has_other_map.store(false, Ordering::Relaxed);
                }
                return false;
            }
            Err(error @ StoreError::MapMismatch { shard: None, .. }) => error,
            Err(_) => return false,
        };
        if !self.has_other_map.swap(true, Ordering::Relaxed) {
            let error = error.clone().with_context(&self.name, "look", None, Duration::ZERO);
            tracing::error!(%error, "all locks on the shard are lost");
            self.disown();
        }
        true
    }

    /// Ends all that is held, and asks again for all that is waited for.
    pub(crate) fn disown(&self) {
        for entry in self.entries() {
            entry.in_background(|queue, cx| queue.disown(cx));
        }
    }
}
