//! A worker process: executes the commands on its standard input.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail};
use shardlock::LockManager;
use shardlock::admin::AdminServer;
use shardlock::config::{Builder, Config};
use shardlock::tool;
use tokio::task::JoinSet;

use super::context::TaskContext;
use super::keys::Keys;
use super::locker::Source;
use super::protocol::{Command, Measurements, WorkerSettings};
use super::task::run_task;
use super::wait_histogram::WaitHistograms;
use crate::exit::Failure;
use crate::load::commands::{Commands, Reply, run_worker, send_reply};
use crate::load::counters::Counters;

/// Executes commands until the one to shut down. Failures are reported to the parent as well.
pub(crate) fn run() -> Result<u8, Failure> {
    let failed = |error: anyhow::Error| Failure::new(1, error);
    // The number of threads is in the first line of input, and reading it is not worth a runtime.
    crate::on_this_thread(async { run_worker(serve).await.map_err(failed) })
}

async fn serve(commands: &mut Commands) -> anyhow::Result<()> {
    let settings: WorkerSettings = commands.next().await?;
    if settings.threads <= 1 {
        return execute_commands(commands, &settings, None).await;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(settings.threads)
        .enable_all()
        .build()
        .context("the asynchronous runtime could not be started")?;
    let result = execute_commands(commands, &settings, Some(runtime.handle().clone())).await;
    // A runtime must not be dropped in an asynchronous context; all its tasks have ended.
    runtime.shutdown_background();
    result
}

/// Executes the commands; tasks run on `runtime` if given, otherwise on this thread.
async fn execute_commands(
    commands: &mut Commands,
    settings: &WorkerSettings,
    runtime: Option<tokio::runtime::Handle>,
) -> anyhow::Result<()> {
    let mut worker = Worker::connect(settings, runtime.as_ref()).await?;
    send_reply(&Reply::Done(()))?;
    loop {
        let command: Command = commands.next().await?;
        let mut measured = None;
        match command {
            Command::Start => worker.start(runtime.as_ref()),
            Command::Open => worker.open_window(),
            Command::Close => measured = Some(worker.close_window().await?),
            Command::Shutdown => {
                if let Some(manager) = &worker.manager {
                    // What was left is logged.
                    manager.locks.shutdown().await.ok();
                }
            }
        }
        send_reply(&Reply::Done(measured))?;
        if matches!(command, Command::Shutdown) {
            return Ok(());
        }
    }
}

struct Worker {
    context: Arc<TaskContext>,
    tasks: u32,
    running: JoinSet<()>,
    /// `None` if the locks are an agent's.
    manager: Option<Manager>,
    /// When the window was opened, and the counters at that time.
    opened: Option<(Instant, Counters)>,
}

/// The manager of this process, and what counts its locks.
struct Manager {
    locks: LockManager,
    /// Renders the page of metrics.
    metrics: Box<dyn Fn(&LockManager) -> String + Send + Sync>,
    class: String,
    /// Serves until the worker ends.
    _admin_server: AdminServer,
}

impl Worker {
    async fn connect(settings: &WorkerSettings, runtime: Option<&tokio::runtime::Handle>) -> anyhow::Result<Self> {
        let (manager, locks) = match &settings.agent {
            Some(socket) => (None, Source::Agent(socket.clone())),
            None => {
                let manager = Manager::connect(settings, runtime).await?;
                let locks = Source::Manager(manager.locks.clone());
                (Some(manager), locks)
            }
        };
        Ok(Self {
            context: Arc::new(TaskContext::new(
                locks,
                Keys::new(settings.key_choice, settings.tasks)?,
                settings.mode,
                WaitHistograms::new(settings.threads)?,
                // They are large, so there are none where they have no use.
                settings
                    .mode
                    .is_mixed()
                    .then(|| WaitHistograms::new(settings.threads))
                    .transpose()?,
                settings.hold,
            )),
            tasks: settings.tasks,
            running: JoinSet::new(),
            manager,
            opened: None,
        })
    }

    fn start(&mut self, runtime: Option<&tokio::runtime::Handle>) {
        for number in 0..self.tasks as usize {
            let task = run_task(Arc::clone(&self.context), number);
            match runtime {
                Some(runtime) => self.running.spawn_on(task, runtime),
                None => self.running.spawn(task),
            };
        }
    }

    /// The counters of the manager. There are none of an agent's in this process.
    fn counters(&self) -> Counters {
        let manager = self.manager.as_ref();
        manager.map_or_else(Counters::default, |manager| {
            Counters::parse(&(manager.metrics)(&manager.locks), &manager.class)
        })
    }

    // On a single thread no task runs between the two lines that open or close the window, so that
    // tasks and manager count the same locks.
    fn open_window(&mut self) {
        self.context.open();
        self.opened = Some((Instant::now(), self.counters()));
    }

    async fn close_window(&mut self) -> anyhow::Result<Measurements> {
        let Some((opened_at, before)) = self.opened.take() else {
            bail!("the window was closed without being opened");
        };
        self.context.close();
        let (seconds, after) = (opened_at.elapsed().as_secs_f64(), self.counters());
        self.running.abort_all();
        while let Some(joined) = self.running.join_next().await {
            match joined {
                Err(error) if error.is_panic() => return Err(error).context("a task ended in a panic"),
                _ => {}
            }
        }
        let (context, finished) = (&self.context, self.context.finished());
        let mut locks = after.since(before);
        if self.manager.is_none() {
            // The agent knows their paths.
            locks.uncontended = finished.iter().map(|task| task.locks).sum();
        }
        Ok(Measurements {
            seconds,
            locks,
            task_min: finished.iter().map(|task| task.locks).min().unwrap_or(0),
            task_max: finished.iter().map(|task| task.locks).max().unwrap_or(0),
            waits: context.waits.counts()?,
            writer_waits: match &context.writer_waits {
                Some(waits) => waits.counts()?,
                None => Vec::new(),
            },
            holds: finished.iter().map(|task| task.holds).sum(),
            held: finished.iter().map(|task| task.held).sum(),
            token_regressions: context.token_regressions(),
            overlaps: context.overlaps(),
            errors: context.errors(),
        })
    }
}

impl Manager {
    /// Connects the manager on the runtime that runs the tasks.
    async fn connect(settings: &WorkerSettings, runtime: Option<&tokio::runtime::Handle>) -> anyhow::Result<Self> {
        // Before the manager: metrics created without a recorder count nothing.
        let admin = crate::metrics::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
        let metrics = Box::new(admin.renderer());
        let config = config(settings)?;
        let class = config.class.clone();
        let connecting = Builder::new().config(config).connect();
        let locks = match runtime {
            Some(runtime) => runtime
                .spawn(connecting)
                .await
                .context("connecting ended in a panic")??,
            None => connecting.await?,
        };
        Ok(Self {
            _admin_server: admin.serve(&locks)?,
            locks,
            metrics,
            class,
        })
    }
}

fn config(settings: &WorkerSettings) -> anyhow::Result<Config> {
    let mut config = settings.shards.load().map_err(|failure| failure.error)?;
    // The servers that the bench started have no password.
    tool::put_login_into_urls(&mut config)?;
    if !settings.started.is_empty() {
        tool::set(&mut config, "shards", &settings.started.join(" "))?;
    }
    config.namespace.clone_from(&settings.namespace);
    config.linger = settings.linger.unwrap_or(config.linger);
    Ok(config)
}
