//! A worker process: executes the orders on its standard input.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail};
use shardlock::admin::AdminServer;
use shardlock::{Builder, Config, LockManager};
use tokio::task::JoinSet;

use super::keys::Keys;
use super::protocol::{Measured, Order, Setup};
use super::task::{Load, work};
use super::waits::Waits;
use crate::exit::Failure;
use crate::load::counters::Counters;
use crate::load::orders::{Answer, Orders, obey, tell};

/// Executes orders until the one to leave. Failures are reported to the parent as well.
pub(crate) fn run() -> Result<u8, Failure> {
    let failed = |error: anyhow::Error| Failure::new(1, error);
    // The number of threads is in the first line of input, and reading it is not worth a runtime.
    crate::on_this_thread(async { obey(serve).await.map_err(failed) })
}

async fn serve(orders: &mut Orders) -> anyhow::Result<()> {
    let setup: Setup = orders.next().await?;
    if setup.threads <= 1 {
        return follow(orders, &setup, None).await;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(setup.threads)
        .enable_all()
        .build()
        .context("the asynchronous runtime could not be started")?;
    let followed = follow(orders, &setup, Some(runtime.handle().clone())).await;
    // A runtime must not be dropped in an asynchronous context; all its tasks have ended.
    runtime.shutdown_background();
    followed
}

/// Follows the orders; tasks run on `others` if given, otherwise on this thread.
async fn follow(orders: &mut Orders, setup: &Setup, others: Option<tokio::runtime::Handle>) -> anyhow::Result<()> {
    let mut worker = Worker::open(setup, others.as_ref()).await?;
    tell(&Answer::Done(()))?;
    loop {
        let order: Order = orders.next().await?;
        let mut measured = None;
        match order {
            Order::Start => worker.start(others.as_ref()),
            Order::Open => worker.open_window(),
            Order::Close => measured = Some(worker.close_window().await?),
            Order::Leave => worker.load.locks.shutdown().await,
        }
        tell(&Answer::Done(measured))?;
        if matches!(order, Order::Leave) {
            return Ok(());
        }
    }
}

struct Worker {
    load: Arc<Load>,
    tasks: u32,
    running: JoinSet<()>,
    /// Renders the page of metrics.
    metrics: Box<dyn Fn(&LockManager) -> String + Send + Sync>,
    class: String,
    /// When the window was opened, and the counters at that time.
    opened: Option<(Instant, Counters)>,
    /// Serves until the worker leaves.
    _serving: AdminServer,
}

impl Worker {
    /// Connects the manager on the runtime that runs the tasks.
    async fn open(setup: &Setup, others: Option<&tokio::runtime::Handle>) -> anyhow::Result<Self> {
        // Before the manager: metrics created without a recorder count nothing.
        let admin = crate::metrics::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
        let metrics = Box::new(admin.renderer());
        let config = config(setup)?;
        let class = config.class.clone();
        let connecting = Builder::new().config(config).connect();
        let locks = match others {
            Some(others) => others
                .spawn(connecting)
                .await
                .context("connecting ended in a panic")??,
            None => connecting.await?,
        };
        Ok(Self {
            _serving: admin.serve(&locks)?,
            load: Arc::new(Load::new(
                locks,
                Keys::new(setup.wanted, setup.tasks)?,
                Waits::new(setup.threads)?,
                setup.hold,
            )),
            tasks: setup.tasks,
            running: JoinSet::new(),
            metrics,
            class,
            opened: None,
        })
    }

    fn start(&mut self, others: Option<&tokio::runtime::Handle>) {
        for number in 0..self.tasks as usize {
            let task = work(Arc::clone(&self.load), number);
            match others {
                Some(others) => self.running.spawn_on(task, others),
                None => self.running.spawn(task),
            };
        }
    }

    fn counters(&self) -> Counters {
        Counters::read(&(self.metrics)(&self.load.locks), &self.class)
    }

    // On a single thread no task runs between the two lines that open or close the window, so that
    // tasks and manager count the same locks.
    fn open_window(&mut self) {
        self.load.open();
        self.opened = Some((Instant::now(), self.counters()));
    }

    async fn close_window(&mut self) -> anyhow::Result<Measured> {
        let Some((opened_at, before)) = self.opened.take() else {
            bail!("the window was closed without being opened");
        };
        self.load.close();
        let (seconds, after) = (opened_at.elapsed().as_secs_f64(), self.counters());
        self.running.abort_all();
        while let Some(joined) = self.running.join_next().await {
            match joined {
                Err(error) if error.is_panic() => return Err(error).context("a task ended in a panic"),
                _ => {}
            }
        }
        let (load, ended) = (&self.load, self.load.ended());
        Ok(Measured {
            seconds,
            locks: after.since(before),
            task_min: ended.iter().map(|task| task.locks).min().unwrap_or(0),
            task_max: ended.iter().map(|task| task.locks).max().unwrap_or(0),
            waits: load.waits.counts()?,
            holds: ended.iter().map(|task| task.holds).sum(),
            held: ended.iter().map(|task| task.held).sum(),
            token_regressions: load.token_regressions(),
            overlaps: load.overlaps(),
            errors: load.errors(),
        })
    }
}

fn config(setup: &Setup) -> anyhow::Result<Config> {
    let mut config = setup.shards.load().map_err(|failure| failure.error)?;
    if !setup.started.is_empty() {
        config.set("shards", &setup.started.join(" "))?;
    }
    config.namespace.clone_from(&setup.namespace);
    config.linger = setup.linger.unwrap_or(config.linger);
    Ok(config)
}
