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
                // What was left is logged.
                worker.context.locks.shutdown().await.ok();
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
    /// Renders the page of metrics.
    metrics: Box<dyn Fn(&LockManager) -> String + Send + Sync>,
    class: String,
    /// When the window was opened, and the counters at that time.
    opened: Option<(Instant, Counters)>,
    /// Serves until the worker ends.
    _admin_server: AdminServer,
}

impl Worker {
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
            metrics,
            class,
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

    fn counters(&self) -> Counters {
        Counters::parse(&(self.metrics)(&self.context.locks), &self.class)
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
        Ok(Measurements {
            seconds,
            locks: after.since(before),
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
