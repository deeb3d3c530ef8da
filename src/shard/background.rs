//! The background thread of a manager: renewals, and whatever no task of the program waits for.
//!
//! It has a runtime of its own with one thread, so that leases are renewed and losses are told even if every worker of the
//! program's runtime is blocked. It ends when no handle of the manager is left and every key has been given back.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tokio::task::{JoinSet, LocalSet};

use super::inbox::{Unheard, hear};
use super::{Entry, Job, Load, Shard, pulse, room, server_clock};
use crate::clock::Moment;
use crate::key::LockKey;
use crate::protocol::{Cycle, Release};
use crate::queue::Request;
use crate::store::{Lane, StoreError};
use crate::watchdog::keep_alive;

/// The thread, and how to reach it.
#[derive(Debug)]
pub(crate) struct Background {
    /// Resolves when the inbox of every connected shard has been subscribed for the first time, or one of them was refused.
    pub(crate) listening: oneshot::Receiver<Result<(), Unheard>>,
}

impl Background {
    /// Starts the thread. Only the inboxes of shards that are `connected` are waited for. What runs on the runtime of the program runs
    /// on the one that this is called on.
    ///
    /// # Errors
    ///
    /// The system does not give us a thread.
    pub(crate) fn start(
        shards: Vec<Arc<Shard>>,
        connected: &[bool],
        jobs: mpsc::UnboundedReceiver<Job>,
    ) -> std::io::Result<Self> {
        let (tell, listening) = oneshot::channel();
        let connected = connected.to_vec();
        let program = Handle::try_current().ok();
        // The runtime is made on its thread: it must not be dropped on one of the program's.
        std::thread::Builder::new().name("shardlock".into()).spawn(move || {
            match tokio::runtime::Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => LocalSet::new().block_on(&runtime, run(shards.into(), connected, jobs, program, tell)),
                Err(error) => tracing::error!(%error, "the background thread could not start its runtime"),
            }
        })?;
        Ok(Self { listening })
    }
}

async fn run(
    shards: Rc<[Arc<Shard>]>,
    connected: Vec<bool>,
    mut jobs: mpsc::UnboundedReceiver<Job>,
    program: Option<Handle>,
    listening: oneshot::Sender<Result<(), Unheard>>,
) {
    let mut services = JoinSet::new();
    let (tell, mut told) = mpsc::unbounded_channel();
    for (shard, &is_connected) in shards.iter().zip(&connected) {
        let tell = is_connected.then(|| tell.clone());
        services.spawn_local(hear(Arc::clone(shard), tell, program.clone()));
        services.spawn_local(keep_alive(Arc::clone(shard)));
        services.spawn_local(server_clock::watch(Arc::clone(shard)));
    }
    let metrics = shards.first().map(|shard| Arc::clone(&shard.manager));
    if let Some(metrics) = &metrics {
        services.spawn_local(pulse::pulse(Rc::clone(&shards), Arc::clone(metrics)));
    }
    drop(tell);
    let count = connected.iter().filter(|&&connected| connected).count();
    services.spawn_local(async move {
        let mut heard = Ok(());
        for _ in 0..count {
            heard = told.recv().await.unwrap_or(Ok(()));
            if heard.is_err() {
                break;
            }
        }
        // A manager that gave up connecting does not listen.
        listening.send(heard).ok();
    });

    let mut work = JoinSet::new();
    let mut closing: Vec<oneshot::Sender<()>> = Vec::new();
    let mut leaving = false;
    loop {
        let ending = leaving || !closing.is_empty();
        if ending && work.is_empty() && jobs.is_empty() && shards.iter().all(|shard| shard.is_idle()) {
            settle(&shards).await;
            if let Some(metrics) = &metrics {
                // The next beat may never come.
                pulse::tell(&shards, metrics);
            }
            for done in closing.drain(..) {
                // Whoever asked may have stopped waiting.
                done.send(()).ok();
            }
            if leaving {
                return;
            }
        }
        tokio::select! {
            job = jobs.recv() => match job {
                Some(Job::Request { entry, request }) => { work.spawn_local(carry_out(entry, request)); }
                Some(Job::Release { key, cycle }) => {
                    if let Some(shard) = shard_of(&shards, &key) {
                        shard.metrics.abandoned.increment(1);
                        work.spawn_local(abandon(shard, key, cycle));
                    }
                }
                Some(Job::Close { done }) => {
                    close(&shards);
                    closing.push(done);
                }
                Some(Job::MakeRoom) => room::make(&shards),
                Some(Job::Leave) | None => {
                    leave(&shards);
                    leaving = true;
                }
                Some(Job::Look) => {}
            },
            Some(ended) = work.join_next(), if !work.is_empty() => report_panic(ended),
            Some(ended) = services.join_next(), if !services.is_empty() => report_panic(ended),
        }
    }
}

/// Lets every store tidy up, for as long as a request may take.
async fn settle(shards: &[Arc<Shard>]) {
    let settling = shards.iter().map(|shard| async move {
        if tokio::time::timeout(shard.timeout, shard.store.settle()).await.is_err() {
            tracing::warn!(shard = %shard.name, "the store did not tidy up in time; what is left runs out by itself");
        }
    });
    futures_util::future::join_all(settling).await;
}

/// A task of this thread can only end by itself or by a bug.
fn report_panic(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended {
        tracing::error!(%error, "a task of the background thread panicked; please report this");
    }
}

fn shard_of(shards: &[Arc<Shard>], key: &LockKey) -> Option<Arc<Shard>> {
    let index = crate::router::shard_index(key.slot(), shards.len());
    shards.get(index).map(Arc::clone)
}

/// Carries out a request and all that follow from it.
async fn carry_out(entry: Arc<Entry>, request: Request) {
    let mut next = Some(request);
    while let Some(request) = next {
        next = entry.drive(request, Lane::Background).await.next;
    }
}

/// Releases a cycle that is over until the store has answered, or the lease it may have has run out. A manager that ends does not wait for the
/// leases that last longest, and of many that have to be released again some are left to run out.
///
/// First on the caller's lane, where an acquire of that cycle may still be under way: the release arrives after it. Then
/// on the background's, which works even if the program's runtime is gone.
async fn abandon(shard: Arc<Shard>, key: LockKey, cycle: Cycle) {
    let started = Moment::now();
    let (mut refusal, mut owed) = (None, None);
    for lane in [Lane::Caller, Lane::Background] {
        let mut pause = ABANDON_PAUSE_MIN;
        loop {
            let release = Release {
                key: key.clone(),
                cycle,
                requeue: None,
                nobody_waits: false,
                ttl: shard.default_ttl,
                tokens: shard.rules.max_burst,
            };
            let answer = tokio::time::timeout(shard.timeout, shard.store.release(lane, release)).await;
            match answer {
                // Requests on one lane keep their order, so nothing of this cycle can come after it.
                Ok(Ok(_)) => return,
                // Some refusals pass: a server may take no writes while its replicas are away or its disk is full.
                Ok(Err(error)) => refusal = Some(error).filter(|error| !matches!(error, StoreError::Unavailable(_))),
                Err(_) => refusal = None,
            }
            if lane == Lane::Caller {
                break;
            }
            let waited = Moment::now().since(started);
            let is_ending = shard.load.ending.load(Ordering::SeqCst);
            let patience = match (is_ending, &refusal) {
                (true, Some(_)) => Duration::ZERO,
                (true, None) => shard.default_ttl,
                (false, _) => shard.longest_ttl(),
            };
            owed = owed.or_else(|| Owed::note(&shard.load));
            if waited >= patience {
                break;
            }
            if owed.is_none() {
                return;
            }
            if refusal.is_some() {
                pause = pause.max(ABANDON_PAUSE_MAX);
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min((waited / 16).clamp(ABANDON_PAUSE_MAX, ABANDON_PAUSE_LATER));
        }
    }
    let error = refusal.unwrap_or_else(|| shard.no_answer());
    let error = shard.error(error, "release", None, started);
    tracing::warn!(%error, "a cycle could not be released; its lease, if it has one, is left to run out");
    tracing::debug!(%key, "the key of the cycle that could not be released");
}

/// One of the cycles that are released again and again, until it is dropped.
struct Owed(Arc<Load>);

/// How many there are at most. More of them would keep the background thread from what it is there for.
const OWED_MAX: usize = 10_000;

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

const ABANDON_PAUSE_MIN: Duration = Duration::from_millis(20);
const ABANDON_PAUSE_MAX: Duration = Duration::from_secs(1);
/// The longest after a while: a server that is away for hours is not asked every second for each key. The end of the manager waits for it.
const ABANDON_PAUSE_LATER: Duration = Duration::from_secs(4);

/// Nobody can want a key any more: what is kept for that is given back, and what guards still hold is not kept after them.
fn leave(shards: &[Arc<Shard>]) {
    for shard in shards {
        shard.load.ending.store(true, Ordering::SeqCst);
        for entry in shard.table.all() {
            entry.in_background(|queue, cx| queue.keep_nothing(cx));
        }
    }
}

fn close(shards: &[Arc<Shard>]) {
    for shard in shards {
        shard.load.closed.store(true, Ordering::SeqCst);
        shard.load.ending.store(true, Ordering::SeqCst);
        for entry in shard.table.all() {
            entry.in_background(|queue, cx| queue.close(cx));
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
