//! The background thread of a manager: renewals, and whatever no task of the program waits for.
//!
//! It has a runtime of its own with one thread, so that leases are renewed and losses are told even if every worker of the
//! program's runtime is blocked. It ends when no handle of the manager is left and every key has been given back.
//!
//! After a panic of a service or a job the manager is closed, as by a shutdown: leases that nobody renews any more must not look
//! held, and nothing is known of a key whose event was left half done. Panics of foreign code end before they get here
//! ([`foreign`](crate::foreign)).

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::{mpsc, oneshot};
use tokio::task::{JoinSet, LocalSet};

use super::abandon::{Work, clean};
use super::inbox::{Unheard, hear};
use super::{Entry, Job, Shard, pulse, room, server_clock};
use crate::foreign::SUBSCRIBER;
use crate::key::LockKey;
use crate::queue::Request;
use crate::store::Lane;
use crate::watchdog::keep_alive;

/// The thread, and how to reach it.
#[derive(Debug)]
pub(crate) struct Background {
    /// Resolves when the inbox of every connected shard has been subscribed for the first time, or one of them was refused.
    pub(crate) listening: oneshot::Receiver<Result<(), Unheard>>,
}

impl Background {
    /// Starts the thread. Only the inboxes of shards that are `connected` are waited for.
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
        // The runtime is made on its thread: it must not be dropped on one of the program's.
        std::thread::Builder::new().name("shardlock".into()).spawn(move || {
            let shards: Rc<[Arc<Shard>]> = shards.into();
            let work = || match tokio::runtime::Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => {
                    shards
                        .iter()
                        .for_each(|shard| shard.runtimes.set_background(runtime.handle().clone()));
                    LocalSet::new().block_on(&runtime, run(Rc::clone(&shards), connected, jobs, tell));
                }
                Err(error) => tracing::error!(%error, "the background thread could not start its runtime"),
            };
            if let Err(panic) = catch_unwind(AssertUnwindSafe(work)) {
                end_after(&shards, &*panic);
            }
        })?;
        Ok(Self { listening })
    }
}

async fn run(
    shards: Rc<[Arc<Shard>]>,
    connected: Vec<bool>,
    mut jobs: mpsc::UnboundedReceiver<Job>,
    listening: oneshot::Sender<Result<(), Unheard>>,
) {
    let mut services = JoinSet::new();
    let (tell, mut told) = mpsc::unbounded_channel();
    let mut cleaners = Vec::with_capacity(shards.len());
    for (shard, &is_connected) in shards.iter().zip(&connected) {
        let tell = is_connected.then(|| tell.clone());
        services.spawn_local(hear(Arc::clone(shard), tell));
        services.spawn_local(keep_alive(Arc::clone(shard)));
        services.spawn_local(server_clock::watch(Arc::clone(shard)));
        let (cleaner, work) = mpsc::unbounded_channel();
        services.spawn_local(clean(Arc::clone(shard), work));
        cleaners.push(cleaner);
    }
    let metrics = shards.first().map(|shard| Arc::clone(&shard.manager));
    if let Some(metrics) = &metrics {
        services.spawn_local(pulse::pulse(Rc::clone(&shards), Arc::clone(metrics)));
    }
    services.spawn_local(look_after_home(Rc::clone(&shards)));
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
        let owes_nothing = || shards.iter().all(|shard| shard.load.owes_nothing() && shard.is_idle());
        if ending && work.is_empty() && jobs.is_empty() && owes_nothing() {
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
                Some(Job::Release(abandoned)) => {
                    let index = index_of(&shards, &abandoned.key);
                    if let Some(shard) = shards.get(index) {
                        shard.metrics.abandoned.increment(1);
                    }
                    hand_over(&cleaners, index, Work::Release(abandoned));
                }
                Some(Job::Doubt { key, cycle }) => {
                    hand_over(&cleaners, index_of(&shards, &key), Work::Doubt { key, cycle });
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
            Some(ended) = work.join_next(), if !work.is_empty() => check(ended, &shards),
            Some(ended) = services.join_next(), if !services.is_empty() => check(ended, &shards),
        }
    }
}

/// Looks whether the program's runtime runs, and leaves it if it does not.
async fn look_after_home(shards: Rc<[Arc<Shard>]>) {
    let Some(first) = shards.first() else { return };
    let leave = || shards.iter().for_each(|shard| shard.store.leave_home());
    first.runtimes.watch(first.timeout, || first.load.waits(), leave).await;
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

/// A task of this thread ends by itself, or it panics. What it was there for, such as renewals, is not done any more then, and what
/// it left half done is not known: the manager ends, and its users learn of it.
fn check(ended: Result<(), tokio::task::JoinError>, shards: &[Arc<Shard>]) {
    if let Err(error) = ended
        && let Ok(panic) = error.try_into_panic()
    {
        end_after(shards, &*panic);
    }
}

/// Ends the manager after a panic: guards are lost, waiters and later requests are refused.
fn end_after(shards: &[Arc<Shard>], panic: &(dyn Any + Send)) {
    let message = panic.downcast_ref::<&str>().copied();
    let message = message.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    SUBSCRIBER.call(|| {
        tracing::error!(
            panic = message.unwrap_or("without a message"),
            "the background thread panicked, so the manager ends: its locks are lost and all requests are refused; \
             connect a new one, and please report this"
        );
    });
    close(shards);
}

fn index_of(shards: &[Arc<Shard>], key: &LockKey) -> usize {
    crate::router::shard_index(key.slot(), shards.len())
}

fn hand_over(cleaners: &[mpsc::UnboundedSender<Work>], shard: usize, work: Work) {
    let done = cleaners.get(shard).map(|cleaner| cleaner.send(work));
    if !matches!(done, Some(Ok(()))) {
        // Its panic was reported.
        tracing::warn!("a lease can't be given back; it ends with its ttl");
    }
}

/// Carries out a request and all that follow from it.
async fn carry_out(entry: Arc<Entry>, request: Request) {
    let mut next = Some(request);
    while let Some(request) = next {
        next = entry.drive(request, Lane::Background).await.next;
    }
}

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
            // A panic at one key leaves no other one open.
            let close = || entry.in_background(|queue, cx| queue.close(cx));
            if catch_unwind(AssertUnwindSafe(close)).is_err() {
                SUBSCRIBER.call(|| {
                    tracing::error!(shard = %shard.name, "closing a key panicked; its lease is left to run out");
                });
            }
        }
    }
}
