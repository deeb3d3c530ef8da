//! Background work on etcd leases: those of waiting cycles are kept alive, those of finished cycles
//! are revoked.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use parking_lot::Mutex;
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::{Notify, futures::Notified};

use super::Shared;
use super::acquire::keep;
use super::cycles::EtcdLease;
use super::error::EtcdError;
use crate::backoff::Backoff;
use crate::clock::Moment;
use crate::key::LockKey;
use crate::protocol::{Cycle, Push};

/// How many requests of each kind are in flight at a time.
pub(super) const AT_A_TIME: usize = 64;
/// The first and the longest pause before a failed revocation is tried again.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// How many leases may wait to be revoked. Any beyond expire by themselves.
const REVOKES_MAX: usize = 100_000;
/// The longest sleep of the keeper, so that a clock that was moved or a machine that slept delays
/// nothing for long.
const WAKE_EVERY_MAX: Duration = Duration::from_secs(60);

/// Keeps the leases of waiting cycles alive.
pub(super) async fn keep_waiting(shared: Arc<Shared>, pushes: UnboundedSender<Push>) {
    loop {
        let added = shared.waits.added.notified();
        let now = Moment::now();
        let (due, next) = shared.waits.due(now);
        if due.is_empty() {
            match next {
                Some(next) => {
                    let pause = next.since(now).min(WAKE_EVERY_MAX);
                    tokio::select! {
                        () = added => {}
                        () = tokio::time::sleep(pause) => {}
                    }
                }
                None => added.await,
            }
            continue;
        }
        let started = Moment::now();
        let answered: Vec<bool> = futures_util::stream::iter(due)
            .map(|(cycle, key, lease)| keep_one(&shared, &pushes, cycle, key, lease))
            .buffer_unordered(AT_A_TIME)
            .collect()
            .await;
        if !answered.contains(&true) {
            // The server hangs or is cut off. Send the next request to another, before the leases
            // end.
            shared.background.give_up_since(started);
        }
    }
}

/// Keeps the lease of a waiting cycle alive. Returns whether there was an answer.
async fn keep_one(
    shared: &Shared,
    pushes: &UnboundedSender<Push>,
    cycle: Cycle,
    key: LockKey,
    lease: EtcdLease,
) -> bool {
    let limit = shared.timeout.min(Duration::from_secs(lease.secs) / 4);
    match tokio::time::timeout(limit, keep(shared, &shared.background, cycle, lease)).await {
        Err(_) => return false,
        Ok(Ok(())) => {}
        Ok(Err(EtcdError::LeaseGone)) => {
            shared.cycles.unleased(cycle, lease);
            // The cycle has lost its place and asks for another. A receiver that is gone needs no
            // pushes.
            pushes.send(Push::YourTurn { key, cycle }).ok();
        }
        // Tried again when it is next due, before the lease ends.
        Ok(Err(error)) => crate::log::debug!(shard = %shared.shard, ?error, "a waiting lease was not renewed"),
    }
    true
}

/// Leases that are no longer needed. One that is not revoked expires by itself, so nothing depends
/// on this, and the list is bounded.
#[derive(Debug, Default)]
pub(super) struct Revokes {
    waiting: Mutex<VecDeque<(EtcdLease, Moment)>>,
    added: Notify,
    /// How many revocations are in flight.
    running: std::sync::atomic::AtomicUsize,
    done: Notify,
}

use std::sync::atomic::Ordering;

impl Revokes {
    pub(super) fn add(&self, leases: Vec<EtcdLease>) {
        if leases.is_empty() {
            return;
        }
        let now = Moment::now();
        let mut waiting = self.waiting.lock();
        for lease in leases {
            if waiting.len() < REVOKES_MAX {
                waiting.push_back((lease, now + Duration::from_secs(lease.secs)));
            }
        }
        drop(waiting);
        self.added.notify_one();
    }

    fn next(&self) -> Option<(EtcdLease, Moment)> {
        let mut waiting = self.waiting.lock();
        let next = waiting.pop_front()?;
        // Under the lock, so that every lease is always either in the list or counted here.
        self.running.fetch_add(1, Ordering::SeqCst);
        Some(next)
    }

    fn is_idle(&self) -> bool {
        let waiting = self.waiting.lock();
        waiting.is_empty() && self.running.load(Ordering::SeqCst) == 0
    }

    /// Waits until nothing is left to revoke.
    pub(super) async fn drain(&self) {
        loop {
            let done: Notified<'_> = self.done.notified();
            if self.is_idle() {
                return;
            }
            done.await;
        }
    }
}

/// Revokes the listed leases.
pub(super) async fn revoke_all(shared: Arc<Shared>) {
    let revokes = &shared.revokes;
    let mut running = FuturesUnordered::new();
    loop {
        while running.len() < AT_A_TIME
            && let Some((lease, until)) = revokes.next()
        {
            running.push(revoke(&shared, lease, until));
        }
        tokio::select! {
            () = revokes.added.notified() => {}
            Some(()) = running.next(), if !running.is_empty() => {
                revokes.running.fetch_sub(1, Ordering::SeqCst);
                revokes.done.notify_one();
            }
        }
    }
}

async fn revoke(shared: &Shared, lease: EtcdLease, until: Moment) {
    let mut backoff = Backoff::new(PAUSE_MIN, PAUSE_MAX);
    loop {
        let send = async |mut client: etcd_client::Client| client.lease_revoke(lease.id).await;
        let revoked = tokio::time::timeout(shared.timeout, shared.background.request(send)).await;
        match revoked {
            Ok(Ok(_) | Err(EtcdError::LeaseGone)) => return,
            // It has expired by itself.
            _ if Moment::now() >= until => return,
            Ok(Err(error)) if !error.is_passing() => {
                if let Some(suppressed) = shared.failed_revokes.admit(Moment::now()) {
                    let error = error.into_store_error();
                    crate::log::warn!(shard = %shared.shard, %error, suppressed, "an etcd lease could not be revoked; its lock may stay taken until the lease expires");
                }
                return;
            }
            _ => backoff.wait().await,
        }
    }
}
