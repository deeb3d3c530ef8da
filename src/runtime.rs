//! The runtimes that execute a manager's work: the application's and its own.
//!
//! # Implementation details
//!
//! A task that waits for a task on another runtime also waits for a hop between threads. So the
//! work that serves the application's tasks (connection drivers, the inbox) runs on the runtime on
//! which the manager was connected, the *application's runtime*. It makes no progress once it has
//! shut down, while all its workers are blocked, or, if it has no workers of its own, while no
//! thread is inside its `block_on`. But tasks on other runtimes may request locks at any time. So
//! while any task waits, the background thread probes whether it makes progress
//! ([`Runtimes::watch`]). If not, the work moves to the background thread's runtime, which lives as
//! long as the manager, and stays there. Connections opened after the application's runtime has
//! recovered belong to it again.

use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::sync::Notify;
use tokio::task::{JoinHandle, JoinSet};

/// See the module documentation.
#[derive(Debug)]
pub(crate) struct Runtimes {
    app_runtime: Option<Handle>,
    /// Set when the background thread is running. Before that, all work happens within the call
    /// that connects the manager.
    background: OnceLock<Handle>,
    /// Whether a probe of the application's runtime timed out and has not completed since.
    is_stuck: AtomicBool,
    /// How often the application's runtime was found stuck.
    moves: AtomicU64,
    moved: Notify,
}

/// How often the background thread probes the application's runtime. More often if `store_timeout`
/// is short.
const PROBE_EVERY: Duration = Duration::from_millis(100);
/// How many naps of the background thread a probe of the application's runtime may take. There are
/// several short ones because a pause of the whole process uses up only one of them, and so is not
/// mistaken for a stuck runtime. A multi-threaded runtime executes everything eventually, and is
/// only abandoned when it is blocked for long.
const NAPS_MAX: u32 = 3;
const NAPS_MAX_OF_WORKERS: u32 = 10;

impl Runtimes {
    /// Uses the current runtime as the application's.
    pub(crate) fn here() -> Arc<Self> {
        Self::with_app_runtime(Handle::try_current().ok())
    }

    fn with_app_runtime(app_runtime: Option<Handle>) -> Arc<Self> {
        Arc::new(Self {
            app_runtime,
            background: OnceLock::new(),
            is_stuck: AtomicBool::new(false),
            moves: AtomicU64::new(0),
            moved: Notify::new(),
        })
    }

    /// Sets the runtime of the background thread.
    pub(crate) fn set_background(&self, background: Handle) {
        // There is one background thread per manager.
        self.background.set(background).ok();
    }

    /// The application's runtime, unless it is stuck.
    fn app_runtime(&self) -> Option<&Handle> {
        self.app_runtime
            .as_ref()
            .filter(|_| !self.is_stuck.load(Ordering::Acquire))
    }

    /// How often work has moved away from the application's runtime.
    pub(crate) fn moves(&self) -> u64 {
        self.moves.load(Ordering::Acquire)
    }

    /// Waits until work has moved away from the application's runtime more than `moves` times.
    pub(crate) async fn moved_since(&self, moves: u64) {
        loop {
            let mut moved = pin!(self.moved.notified());
            // Registered before the check, so that a move between the check and the wait is not
            // missed.
            moved.as_mut().enable();
            if self.moves() > moves {
                return;
            }
            moved.await;
        }
    }

    /// Runs a future on the application's runtime. If there is none, or it shuts down or gets
    /// stuck, a fresh future is created and polled in place. Dropping the returned future cancels
    /// the work wherever it runs.
    ///
    /// # Panics
    ///
    /// Panics if the future does, wherever it runs.
    pub(crate) async fn run<F, T>(&self, make: impl Fn() -> F) -> T
    where
        F: Future<Output = T> + Send + 'static,
        T: Send + 'static,
    {
        let moves = self.moves();
        if let Some(app_runtime) = self.app_runtime() {
            tokio::select! {
                done = run_on(app_runtime, make()) => match done {
                    Some(done) => return done,
                    None => crate::log::debug!("the application's runtime has shut down; its work continues elsewhere"),
                },
                () = self.moved_since(moves) => crate::log::debug!("the application's runtime is stuck; its work continues elsewhere"),
            }
        }
        make().await
    }

    /// Opens a connection: runs a future on the application's runtime, where the tasks it spawns
    /// then belong. If this takes longer than `patience`, or if that runtime is gone or stuck, a
    /// fresh future is also run on the background thread, and the first to complete wins.
    ///
    /// # Panics
    ///
    /// Panics if the future does, wherever it runs.
    pub(crate) async fn open<F, T>(&self, patience: Duration, make: impl Fn() -> F) -> T
    where
        F: Future<Output = T> + Send + 'static,
        T: Send + 'static,
    {
        let moves = self.moves();
        let elsewhere = async {
            if let Some(background) = self.background.get()
                && let Some(done) = run_on(background, make()).await
            {
                return done;
            }
            make().await
        };
        let Some(app_runtime) = self.app_runtime() else {
            return elsewhere.await;
        };
        let mut there = pin!(run_on(app_runtime, make()));
        tokio::select! {
            done = &mut there => match done {
                Some(done) => return done,
                None => return elsewhere.await,
            },
            () = tokio::time::sleep(patience) => {}
            () = self.moved_since(moves) => {}
        }
        let mut elsewhere = pin!(elsewhere);
        tokio::select! {
            Some(done) = there => done,
            done = &mut elsewhere => done,
        }
    }

    /// Runs a future to completion even if the task that requested it is cancelled. It runs on the
    /// background thread, or on the current runtime before that has started.
    pub(crate) fn spawn<T>(&self, future: impl Future<Output = T> + Send + 'static) -> JoinHandle<T>
    where
        T: Send + 'static,
    {
        match self.background.get() {
            Some(background) => background.spawn(future),
            None => tokio::spawn(future),
        }
    }

    /// Runs a future on the background thread, or in place before that has started. Returns `None`
    /// if the thread ends first. Dropping the returned future cancels the work wherever it runs.
    ///
    /// # Panics
    ///
    /// Panics if the future does, wherever it runs.
    pub(crate) async fn run_in_background<T>(&self, future: impl Future<Output = T> + Send + 'static) -> Option<T>
    where
        T: Send + 'static,
    {
        match self.background.get() {
            Some(background) => run_on(background, future).await,
            None => Some(future.await),
        }
    }

    /// Probes whether the application's runtime makes progress, for as long as it exists, whenever
    /// `waits` returns true. `timeout` is the time limit of requests. Calls `leave` each time it is
    /// found stuck, before waiting tasks are notified.
    pub(crate) async fn watch(&self, timeout: Duration, waits: impl Fn() -> bool, leave: impl Fn()) {
        let Some(app_runtime) = &self.app_runtime else { return };
        let nap = PROBE_EVERY.min(timeout / 8);
        let naps_max = match app_runtime.runtime_flavor() {
            RuntimeFlavor::CurrentThread => NAPS_MAX,
            _ => NAPS_MAX_OF_WORKERS,
        };
        loop {
            tokio::time::sleep(nap).await;
            if !waits() {
                continue;
            }
            let mut probe = pin!(run_on(app_runtime, async {}));
            let mut naps = 0;
            let ran = loop {
                tokio::select! {
                    ran = &mut probe => break ran,
                    () = tokio::time::sleep(nap) => {}
                }
                naps += 1;
                if naps == naps_max {
                    // On an overloaded machine, this also happens to a runtime that only waits to
                    // be scheduled.
                    crate::log::info!(
                        "the runtime that the manager was connected on makes no progress; the manager's background thread does its work"
                    );
                    self.is_stuck.store(true, Ordering::Release);
                    leave();
                    self.moves.fetch_add(1, Ordering::AcqRel);
                    self.moved.notify_waiters();
                }
            };
            if ran.is_none() {
                // The runtime has shut down, and its connections and tasks with it.
                return;
            }
            self.is_stuck.store(false, Ordering::Release);
        }
    }
}

/// Runs a future on a runtime. Returns `None` if the runtime shuts down first.
async fn run_on<T: Send + 'static>(runtime: &Handle, future: impl Future<Output = T> + Send + 'static) -> Option<T> {
    // Dropping the set aborts its task.
    let mut set = JoinSet::new();
    set.spawn_on(future, runtime);
    match set.join_next().await? {
        Ok(done) => Some(done),
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => None,
        },
    }
}

#[cfg(test)]
mod tests {
    use tokio::runtime::{Builder, Runtime};

    use super::*;

    /// Longer than anything here takes.
    const LONG: Duration = Duration::from_secs(3600);

    fn named(name: &str) -> Runtime {
        let mut builder = Builder::new_multi_thread();
        builder
            .worker_threads(1)
            .thread_name(name)
            .enable_all()
            .build()
            .unwrap()
    }

    fn current_thread() -> Runtime {
        Builder::new_current_thread().enable_all().build().unwrap()
    }

    async fn where_am_i() -> Option<String> {
        std::thread::current().name().map(str::to_owned)
    }

    #[test]
    fn connection_is_opened_on_the_application_runtime_while_that_runs() {
        let app = named("app");
        let here = current_thread();
        let our_name = here.block_on(where_am_i());
        let runtimes = Runtimes::with_app_runtime(Some(app.handle().clone()));
        let done = |patience| here.block_on(runtimes.open(patience, where_am_i));
        assert_eq!(done(LONG).as_deref(), Some("app"));
        // The only worker is blocked until `end` is dropped.
        let (end, until) = std::sync::mpsc::channel::<()>();
        app.spawn(async move { until.recv().ok() });
        assert_eq!(done(Duration::from_millis(20)), our_name);
        let background = named("background");
        runtimes.set_background(background.handle().clone());
        assert_eq!(done(Duration::from_millis(20)).as_deref(), Some("background"));
        drop(end);
        assert_eq!(done(LONG).as_deref(), Some("app"));
        drop(app);
        assert_eq!(done(LONG).as_deref(), Some("background"));
        drop(background);
        assert_eq!(done(LONG), our_name);
        assert_eq!(
            here.block_on(Runtimes::with_app_runtime(None).open(LONG, where_am_i)),
            our_name
        );
    }

    /// A server that takes long to reply has as much time as before.
    #[test]
    fn slow_open_on_the_application_runtime_is_not_cancelled() {
        let app = named("app");
        let here = current_thread();
        let runtimes = Runtimes::with_app_runtime(Some(app.handle().clone()));
        let begun = Arc::new(Notify::new());
        let make = || {
            let begun = Arc::clone(&begun);
            async move {
                let name = where_am_i().await;
                if name.as_deref() == Some("app") {
                    begun.notified().await;
                } else {
                    begun.notify_one();
                    std::future::pending::<()>().await;
                }
                name
            }
        };
        let done = here.block_on(runtimes.open(Duration::from_millis(1), make));
        assert_eq!(done.as_deref(), Some("app"));
    }

    /// A current-thread runtime runs nothing between two calls of `block_on`.
    #[test]
    fn work_leaves_an_idle_application_runtime_only_while_a_task_waits() {
        let (idle, here) = (current_thread(), current_thread());
        let our_name = here.block_on(where_am_i());
        let runtimes = Runtimes::with_app_runtime(Some(idle.handle().clone()));
        let (waits, left) = (AtomicBool::new(false), AtomicU64::new(0));
        let watching = || {
            runtimes.watch(
                LONG,
                || waits.load(Ordering::SeqCst),
                || {
                    left.fetch_add(1, Ordering::SeqCst);
                },
            )
        };
        let unneeded = async { tokio::time::timeout(10 * PROBE_EVERY, watching()).await };
        assert!(here.block_on(unneeded).is_err());
        assert_eq!((runtimes.moves(), left.load(Ordering::SeqCst)), (0, 0));
        waits.store(true, Ordering::SeqCst);
        let moved = async {
            tokio::select! {
                () = watching() => None,
                name = runtimes.run(where_am_i) => name,
            }
        };
        assert_eq!(here.block_on(moved), our_name);
        assert_eq!((runtimes.moves(), left.load(Ordering::SeqCst)), (1, 1));
    }
}
