//! The background thread of a manager: renewals, and all work that no task of the application waits
//! for.
//!
//! The thread has its own single-threaded runtime, so leases are renewed and losses reported even
//! if every worker of the application's runtime is blocked. It exits when no handle of the manager
//! is left and every key has been released.
//!
//! If a service or a job panics, the manager is closed as in a shutdown: leases that are no longer
//! renewed must not look held, and the state of a key whose event was interrupted is unknown.
//! Panics in foreign code are caught before they get here ([`foreign`](crate::foreign)).

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::{mpsc, oneshot};
use tokio::task::{JoinSet, LocalSet};

use super::orphans::{Work, clean};
use super::subscriber::{SubscribeError, subscribe};
use super::watchdog::keep_alive;
use super::{Entry, Job, ManagerContext, Shard, evict, health, reporter};
use crate::engine::Request;
use crate::key::LockKey;
use crate::store::Priority;

/// A handle to the background thread.
#[derive(Debug)]
pub(crate) struct BackgroundThread {
    /// Resolves when the inbox of every connected shard has been subscribed for the first time, or
    /// when one was refused.
    pub(crate) listening: oneshot::Receiver<Result<(), SubscribeError>>,
}

impl BackgroundThread {
    /// Starts the thread. Only waits for the inboxes of shards that are `connected`.
    ///
    /// # Errors
    ///
    /// The system could not create a thread.
    pub(crate) fn start(
        manager: Arc<ManagerContext>,
        shards: Vec<Arc<Shard>>,
        connected: &[bool],
        jobs: mpsc::UnboundedReceiver<Job>,
    ) -> std::io::Result<Self> {
        let (sender, listening) = oneshot::channel();
        let connected = connected.to_vec();
        // The runtime is created on its own thread, because it must not be dropped on one of the
        // application's.
        std::thread::Builder::new().name("shardlock".into()).spawn(move || {
            let shards: Rc<[Arc<Shard>]> = shards.into();
            let work = || match tokio::runtime::Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => {
                    manager.runtimes.set_background(runtime.handle().clone());
                    LocalSet::new().block_on(
                        &runtime,
                        run(Arc::clone(&manager), Rc::clone(&shards), connected, jobs, sender),
                    );
                }
                Err(error) => crate::log::error!(%error, "the background thread could not start its runtime"),
            };
            if let Err(panic) = catch_unwind(AssertUnwindSafe(work)) {
                end_after(&manager, &shards, &*panic);
            }
        })?;
        Ok(Self { listening })
    }
}

async fn run(
    manager: Arc<ManagerContext>,
    shards: Rc<[Arc<Shard>]>,
    connected: Vec<bool>,
    mut jobs: mpsc::UnboundedReceiver<Job>,
    listening: oneshot::Sender<Result<(), SubscribeError>>,
) {
    let mut services = JoinSet::new();
    let (sender, mut subscriptions) = mpsc::unbounded_channel();
    let mut cleaners = Vec::with_capacity(shards.len());
    for (shard, &is_connected) in shards.iter().zip(&connected) {
        let sender = is_connected.then(|| sender.clone());
        services.spawn_local(subscribe(Arc::clone(shard), sender));
        services.spawn_local(keep_alive(Arc::clone(shard)));
        services.spawn_local(health::watch(Arc::clone(shard)));
        let (cleaner, work) = mpsc::unbounded_channel();
        services.spawn_local(clean(Arc::clone(shard), work));
        cleaners.push(cleaner);
    }
    services.spawn_local(reporter::report(Arc::clone(&manager), Rc::clone(&shards)));
    services.spawn_local(watch_app_runtime(Arc::clone(&manager), Rc::clone(&shards)));
    drop(sender);
    let count = connected.iter().filter(|&&connected| connected).count();
    services.spawn_local(async move {
        let mut subscribed = Ok(());
        for _ in 0..count {
            subscribed = subscriptions.recv().await.unwrap_or(Ok(()));
            if subscribed.is_err() {
                break;
            }
        }
        // The receiver is gone if the manager gave up connecting.
        listening.send(subscribed).ok();
    });

    let mut work = JoinSet::new();
    let mut closing: Vec<oneshot::Sender<()>> = Vec::new();
    let mut leaving = false;
    loop {
        let ending = leaving || !closing.is_empty();
        if ending && work.is_empty() && is_idle(&manager, &shards, &jobs) {
            settle(&shards).await;
            // There may be no further flush.
            reporter::flush(&manager.metrics, &shards);
            for done in closing.drain(..) {
                // The caller may have stopped waiting.
                done.send(()).ok();
            }
            if leaving {
                return;
            }
        }
        tokio::select! {
            job = jobs.recv() => match job {
                Some(Job::Request { entry, request }) => { work.spawn_local(execute_all(entry, request)); }
                Some(Job::Release(abandoned)) => {
                    let index = index_of(&shards, &abandoned.key);
                    if let Some(shard) = shards.get(index) {
                        shard.metrics.abandoned.increment(1);
                    }
                    send_work(&cleaners, index, Work::Release(abandoned));
                }
                Some(Job::ReleaseAgain { key, cycle }) => {
                    send_work(&cleaners, index_of(&shards, &key), Work::ReleaseAgain { key, cycle });
                }
                Some(Job::Close { done }) => {
                    close(&manager, &shards);
                    closing.push(done);
                }
                Some(Job::Evict) => evict::evict(&manager, &shards),
                Some(Job::LastHandleDropped) | None => {
                    leave(&manager, &shards);
                    leaving = true;
                }
                Some(Job::CheckIdle) => {}
            },
            Some(ended) = work.join_next(), if !work.is_empty() => check(ended, &manager, &shards),
            Some(ended) = services.join_next(), if !services.is_empty() => check(ended, &manager, &shards),
        }
    }
}

/// Whether nothing is left to do.
///
/// A lease whose key leaves the table is first counted as a pending release, and the job that
/// releases it is sent in between. So they are checked in the opposite order: what leaves one place
/// during the check is found in the next.
fn is_idle(manager: &ManagerContext, shards: &[Arc<Shard>], jobs: &mpsc::UnboundedReceiver<Job>) -> bool {
    shards.iter().all(|shard| shard.is_idle()) && manager.usage.has_no_pending_releases() && jobs.is_empty()
}

/// Checks whether the application's runtime is making progress, and moves work away from it if not.
async fn watch_app_runtime(manager: Arc<ManagerContext>, shards: Rc<[Arc<Shard>]>) {
    let leave = || shards.iter().for_each(|shard| shard.store.leave_app_runtime());
    let waits = || manager.usage.waits();
    manager.runtimes.watch(manager.timeout, waits, leave).await;
}

/// Lets every store finish its cleanup, within the time limit of a request.
async fn settle(shards: &[Arc<Shard>]) {
    let settling = shards.iter().map(|shard| async move {
        if tokio::time::timeout(shard.manager.timeout, shard.store.drain()).await.is_err() {
            crate::log::warn!(shard = %shard.name, "the store did not finish its cleanup in time; what is left expires by itself");
        }
    });
    futures_util::future::join_all(settling).await;
}

/// A task of this thread has ended. If it panicked, its work, such as renewals, is no longer done,
/// and its state is unknown. The manager is closed, so that its users notice.
fn check(ended: Result<(), tokio::task::JoinError>, manager: &ManagerContext, shards: &[Arc<Shard>]) {
    if let Err(error) = ended
        && let Ok(panic) = error.try_into_panic()
    {
        end_after(manager, shards, &*panic);
    }
}

/// Closes the manager after a panic: guards are lost, waiters and later requests are refused.
fn end_after(manager: &ManagerContext, shards: &[Arc<Shard>], panic: &(dyn Any + Send)) {
    let message = panic.downcast_ref::<&str>().copied();
    let message = message.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    crate::log::error!(
        panic = message.unwrap_or("without a message"),
        "the background thread panicked, so the manager is closed: its locks are lost and all requests are \
         refused; connect a new manager, and please report this"
    );
    close(manager, shards);
}

fn index_of(shards: &[Arc<Shard>], key: &LockKey) -> usize {
    crate::router::shard_index(key.slot(), shards.len())
}

fn send_work(cleaners: &[mpsc::UnboundedSender<Work>], shard: usize, work: Work) {
    let done = cleaners.get(shard).map(|cleaner| cleaner.send(work));
    if !matches!(done, Some(Ok(()))) {
        // The panic of the cleaner has been reported.
        crate::log::warn!("a lease cannot be released; it expires with its ttl");
    }
}

/// Executes a request and all that follow from it.
async fn execute_all(entry: Arc<Entry>, request: Request) {
    let mut next = Some(request);
    while let Some(request) = next {
        next = entry.execute(request, Priority::Background).await.next;
    }
}

/// No task can want a key any more: lingering leases are released, and held ones will not linger.
fn leave(manager: &ManagerContext, shards: &[Arc<Shard>]) {
    manager.usage.ending.store(true, Ordering::SeqCst);
    for shard in shards {
        for entry in shard.table.all() {
            entry.apply_in_background(|queue, cx| queue.stop_lingering(cx));
        }
    }
}

fn close(manager: &ManagerContext, shards: &[Arc<Shard>]) {
    manager.usage.closed.store(true, Ordering::SeqCst);
    manager.usage.ending.store(true, Ordering::SeqCst);
    for shard in shards {
        for entry in shard.table.all() {
            // A panic at one key must not leave others open.
            let close = || entry.apply_in_background(|queue, cx| queue.close(cx));
            if catch_unwind(AssertUnwindSafe(close)).is_err() {
                crate::log::error!(shard = %shard.name, "closing a key panicked; its lease is left to expire");
            }
        }
    }
}
