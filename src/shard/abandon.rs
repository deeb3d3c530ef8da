//! Cycles that are over and that a store may still know of: each is released until the store has done it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{Load, Shard};
use crate::backoff::Backoff;
use crate::clock::Moment;
use crate::key::LockKey;
use crate::protocol::{Cycle, Release};
use crate::store::{Lane, StoreError};

const PAUSE_MIN: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// The longest after a while: a server that is away for hours is not asked every second for each key. The end of the manager waits for it.
const PAUSE_LATER: Duration = Duration::from_secs(4);
/// How many cycles are released again and again at most. More of them would keep the background thread from what it is there for.
const OWED_MAX: usize = 10_000;

/// Releases a cycle until the store has done it, or the lease that it may have has run out. A manager that ends does not wait for the leases that
/// last longest, and of more than [`OWED_MAX`] cycles further ones are not released again.
///
/// First on the caller's lane, where an acquire of that cycle may still be under way: the release arrives after it. Then
/// on the background's, which works even if the program's runtime is gone.
pub(super) async fn abandon(shard: Arc<Shard>, key: LockKey, cycle: Cycle) {
    let started = Moment::now();
    let release = |lane| {
        let release = Release {
            key: key.clone(),
            cycle,
            requeue: None,
            nobody_waits: false,
            tokens: shard.rules.max_burst,
        };
        tokio::time::timeout(shard.timeout, shard.store.release(lane, release))
    };
    // Requests on one lane keep their order, so nothing of this cycle can come after a release that was answered.
    if matches!(release(Lane::Caller).await, Ok(Ok(_))) {
        return;
    }
    let (mut backoff, mut owed) = (Backoff::new(PAUSE_MIN, PAUSE_MAX), None);
    let error = loop {
        let error = match release(Lane::Background).await {
            Ok(Ok(_)) => return,
            Ok(Err(error)) => error,
            Err(_) => shard.no_answer(),
        };
        if matches!(error, StoreError::MapMismatch { .. }) {
            // Nobody of that map asks for the lease here, and this manager holds nothing there any more: it runs out.
            return;
        }
        let is_refused = !matches!(error, StoreError::Unavailable(_));
        let waited = Moment::now().since(started);
        let patience = match (shard.load.ending.load(Ordering::SeqCst), is_refused) {
            (true, true) => Duration::ZERO,
            (true, false) => shard.default_ttl,
            (false, _) => shard.longest_ttl(),
        };
        if waited >= patience {
            break error;
        }
        owed = owed.or_else(|| Owed::note(&shard.load));
        if owed.is_none() {
            return;
        }
        // What was refused may be accepted once replicas are back or a disk has room again, which takes a while.
        let bound = if is_refused { PAUSE_MAX } else { PAUSE_MIN };
        backoff.set_limits(bound, (waited / 16).clamp(PAUSE_MAX, PAUSE_LATER));
        backoff.wait().await;
    };
    let error = shard.error(error, "release", None, started);
    tracing::warn!(%error, "a cycle could not be released; its lease, if it has one, is left to run out");
    tracing::debug!(%key, "the key of the cycle that could not be released");
}

/// One of the cycles that are released again and again, until it is dropped.
struct Owed(Arc<Load>);

impl Owed {
    /// `None` if there are as many as there may be, which is told once until there are few again.
    fn note(load: &Arc<Load>) -> Option<Self> {
        let may = |owed: usize| (owed < OWED_MAX).then_some(owed + 1);
        if load
            .owed
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, may)
            .is_ok()
        {
            return Some(Self(Arc::clone(load)));
        }
        if !load.owes_too_many.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                limit = OWED_MAX,
                "too many cycles wait to be released; the leases that further ones may have are left to run out"
            );
        }
        None
    }
}

impl Drop for Owed {
    fn drop(&mut self) {
        if self.0.owed.fetch_sub(1, Ordering::Relaxed) <= OWED_MAX / 2 {
            self.0.owes_too_many.store(false, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_owed_has_a_limit_and_room_again() {
        let load = Arc::new(Load::new(Box::default()));
        let mut owed: Vec<Owed> = std::iter::from_fn(|| Owed::note(&load)).collect();
        assert_eq!(owed.len(), OWED_MAX);
        assert!(load.owes_too_many.load(Ordering::Relaxed));
        owed.pop();
        owed.extend(Owed::note(&load));
        assert_eq!(owed.len(), OWED_MAX);
        owed.truncate(OWED_MAX / 2 - 1);
        assert!(!load.owes_too_many.load(Ordering::Relaxed));
    }
}
