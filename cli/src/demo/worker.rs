//! A worker process: executes the commands on its standard input.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context;
use deadpool_redis::{Connection, Pool};
use futures_util::future::try_join_all;
use shardlock::admin::AdminServer;
use shardlock::config::{Builder, Config};
use shardlock::{LockKey, LockManager};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::jobs::ZIPF_EXPONENT;
use super::protocol::{Command, Counts, KeyNames, WorkerSettings};
use super::setup::builder;
use super::{classes, coupons, jobs, partner};
use crate::exit::Failure;
use crate::load::commands::{Commands, Reply, run_worker, send_reply};
use crate::load::connection;
use crate::load::counters::Counters;
use crate::load::key_distribution::KeyDistribution;

/// How often a worker reports its progress.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// Shared by the tasks of a worker.
pub(super) struct Worker {
    pub(super) locks: LockManager,
    pub(super) names: KeyNames,
    pub(super) think: Duration,
    pub(super) key_distribution: KeyDistribution,
    pub(super) partner_limit: u16,
    /// Pools for the data, whose connections are not those of the lock: one per shard, in order, or
    /// one for all.
    data: Vec<Pool>,
    /// Renders the page of metrics.
    metrics: Box<dyn Fn(&LockManager) -> String + Send + Sync>,
    /// Serves until the worker ends.
    admin_server: AdminServer,
    /// The TTL of the leases.
    pub(super) ttl: Duration,
    tasks: u32,
    /// How many customers, calls or jobs are done.
    done: AtomicU64,
}

/// Executes commands until the one to shut down. Failures are reported to the parent as well.
pub(crate) fn run() -> Result<u8, Failure> {
    crate::on_this_thread(async {
        run_worker(execute_commands)
            .await
            .map_err(|error| Failure::new(1, error))
    })
}

async fn execute_commands(commands: &mut Commands) -> anyhow::Result<()> {
    let settings: WorkerSettings = commands.next().await?;
    let worker = Arc::new(Worker::connect(&settings).await?);
    send_reply(&Reply::Done(worker.admin_server.address()))?;
    loop {
        let command: Command = commands.next().await?;
        worker.done.store(0, Ordering::Relaxed);
        let counts = tokio::select! {
            counts = worker.execute(command) => counts?,
            error = worker.report_progress() => return Err(error),
        };
        send_reply(&Reply::Done(counts))?;
        if matches!(command, Command::Shutdown) {
            return Ok(());
        }
    }
}

impl Worker {
    async fn connect(settings: &WorkerSettings) -> anyhow::Result<Self> {
        // Before the manager: metrics created without a recorder count nothing.
        let address = settings.metrics.unwrap_or(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)));
        let admin = crate::metrics::bind(address)?;
        let metrics = Box::new(admin.renderer());
        let names = KeyNames::new(&settings.prefix);
        let config = config(settings, &names)?;
        let ttl = config.ttl;
        let locks = Builder::new().config(config).connect().await?;
        Ok(Self {
            admin_server: admin.serve(&locks)?,
            ttl,
            locks,
            names,
            think: settings.think,
            key_distribution: KeyDistribution::zipf(settings.keys, ZIPF_EXPONENT)?,
            partner_limit: settings.partner_limit,
            data: try_join_all(settings.data.iter().map(|url| connection::connect(url))).await?,
            metrics,
            tasks: settings.tasks,
            done: AtomicU64::new(0),
        })
    }

    /// A connection for data that does not belong to a particular shard.
    pub(super) async fn data(&self) -> anyhow::Result<Connection> {
        connection::get(&self.data[0]).await
    }

    /// A connection for data on the same shard as this key's lock, or the only one.
    pub(super) async fn data_of(&self, key: &str) -> anyhow::Result<Connection> {
        if let [only] = &self.data[..] {
            return connection::get(only).await;
        }
        let index = self.locks.shard_map().index(LockKey::new(key)?.slot());
        let pool = self.data.get(index).context("there are fewer pools than shards")?;
        connection::get(pool).await
    }

    /// Counts one customer, call or job as done.
    pub(super) fn count_done(&self) {
        self.done.fetch_add(1, Ordering::Relaxed);
    }

    async fn execute(self: &Arc<Self>, command: Command) -> anyhow::Result<Counts> {
        match command {
            Command::Claim { locked } => {
                self.run_all_tasks(|worker| async move { coupons::claim_one(&worker, locked).await })
                    .await?;
                Ok(Counts::None)
            }
            Command::Call { with_permits } => {
                let counts =
                    self.run_all_tasks(move |worker| async move { partner::call(&worker, with_permits).await });
                Ok(Counts::Calls(partner::sum(counts.await?)))
            }
            Command::Work { seconds } => {
                let counters = || Counters::parse(&(self.metrics)(&self.locks), jobs::CLASS);
                let before = counters();
                let until = Instant::now() + seconds;
                let tasks = self
                    .run_all_tasks(|worker| async move { jobs::run_jobs(&worker, until).await })
                    .await?;
                let delta = counters().since(before);
                let mut counts = jobs::sum(tasks)?;
                (counts.uncontended, counts.local, counts.remote) = (delta.uncontended, delta.local, delta.remote);
                counts.store_requests = delta.store_requests;
                Ok(Counts::Jobs(counts))
            }
            Command::Load => {
                let tasks = (0..self.tasks).map(|task| classes::run(Arc::clone(self), task));
                tasks.collect::<JoinSet<_>>().join_all().await;
                Ok(Counts::None)
            }
            Command::Shutdown => {
                // What was left is logged.
                self.locks.shutdown().await.ok();
                Ok(Counts::None)
            }
        }
    }

    /// Runs one task per customer of this worker, all concurrently.
    async fn run_all_tasks<T, F>(self: &Arc<Self>, task: impl Fn(Arc<Self>) -> F) -> anyhow::Result<Vec<T>>
    where
        T: Send + 'static,
        F: Future<Output = anyhow::Result<T>> + Send + 'static,
    {
        let mut running: JoinSet<_> = (0..self.tasks).map(|_| task(Arc::clone(self))).collect();
        let mut results = Vec::new();
        while let Some(joined) = running.join_next().await {
            results.push(joined.context("a task ended in a panic")??);
        }
        Ok(results)
    }

    /// Reports the progress at regular intervals; returns only if the parent no longer reads it.
    async fn report_progress(&self) -> anyhow::Error {
        loop {
            tokio::time::sleep(PROGRESS_EVERY).await;
            if let Err(error) = send_reply(&Reply::<()>::Progress(self.done.load(Ordering::Relaxed))) {
                return error;
            }
        }
    }
}

/// The settings of the worker's manager.
fn config(settings: &WorkerSettings, names: &KeyNames) -> anyhow::Result<Config> {
    let builder = builder(&settings.shards, names)?;
    let Some(load) = settings.load else {
        return Ok(builder.store_timeout(connection::SERVER_TIMEOUT).build_config()?);
    };
    let mut config = builder.build_config()?;
    classes::settings(&mut config, settings.tasks, load.owns_servers);
    Ok(config)
}
