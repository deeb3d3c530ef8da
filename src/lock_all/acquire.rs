//! Locking the keys of a request.
//!
//! # Implementation details
//!
//! The keys are locked one after the other, in the order of their slots and then of their names.
//! Every process has the same order whatever its shards, so no two requests can wait for each other
//! in a circle. Each key is an ordinary [`LockRequest`](crate::LockRequest); while it waits, the
//! request also watches the locks it holds already.
//!
//! If one of these is lost, the keys from there on are released and requested again. Requesting
//! only the lost key while later ones are held would break the order.

use tokio::time::Instant;

use super::guard::first_loss;
use super::{LockAllGuard, LockAllRequest};
use crate::error::{Failure, LockError, LossReason};
use crate::guard::LockGuard;
use crate::request::TryLockRequest;

/// Whether a request waits for a key that is not free.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Patience {
    Wait,
    Try,
}

/// How many losses of earlier keys a request tolerates while it waits for later ones.
const LOSSES_MAX: u32 = 16;

impl LockAllRequest {
    /// Locks one key after the other. `None` if this is a try and one of them is not free.
    pub(super) async fn acquire(self, patience: Patience) -> Result<Option<LockAllGuard>, LockError> {
        let started = Instant::now();
        let limit = self.template.limit();
        if self.keys.is_empty() {
            // The template has the reason.
            return self.template.await.map(|_| None);
        }
        let mut acquired = Acquired(Vec::with_capacity(self.keys.len()));
        let mut losses = 0;
        loop {
            let next = async {
                let Some(key) = self.keys.get(acquired.0.len()) else {
                    return Ok(None);
                };
                let left = limit.map(|limit| limit.saturating_sub(started.elapsed()));
                let request = self.template.for_key(key.clone()).timeout(left);
                match patience {
                    Patience::Try => TryLockRequest::new(request).await.map(Some),
                    Patience::Wait => request.await.map(|guard| Some(Some(guard))),
                }
            };
            let lost = tokio::select! {
                biased;
                lost = first_loss(&acquired.0) => Some(lost),
                next = next => match next.map_err(|error| error.of_several(started.elapsed(), limit))? {
                    Some(Some(guard)) => {
                        acquired.0.push(guard);
                        None
                    }
                    Some(None) => return Ok(None),
                    // All keys are held. A lock that expired during a pause may not have been
                    // reported as lost yet.
                    None => match acquired.0.iter().position(|guard| !guard.is_valid()) {
                        Some(index) => Some((index, acquired.0[index].lost().await)),
                        None => return Ok(Some(acquired.complete())),
                    },
                },
            };
            if let Some((index, reason)) = lost {
                losses += 1;
                match reason {
                    LossReason::Closed => return Err(Failure::Closed.into()),
                    LossReason::Expired | LossReason::Taken if losses <= LOSSES_MAX => acquired.keep_first(index),
                    _ => return Err(acquired.0[index].lost_error(reason)),
                }
            }
        }
    }
}

/// Locks that wait for the others. If they are given up, nothing has happened under them, so their
/// keys are free at once, whatever their `min_hold`.
struct Acquired(Vec<LockGuard>);

impl Acquired {
    /// Gives up all but the first ones.
    fn keep_first(&mut self, count: usize) {
        for guard in self.0.drain(count..) {
            guard.forgo_min_hold();
        }
    }

    fn complete(mut self) -> LockAllGuard {
        LockAllGuard::new(std::mem::take(&mut self.0))
    }
}

impl Drop for Acquired {
    fn drop(&mut self) {
        self.keep_first(0);
    }
}
