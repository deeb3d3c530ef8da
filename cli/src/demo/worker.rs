//! A worker process: executes the orders on its standard input.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context;
use deadpool_redis::redis::aio::MultiplexedConnection;
use futures_util::future::try_join_all;
use shardlock::admin::AdminServer;
use shardlock::{Builder, Config, LockKey, LockManager};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::jobs::ZIPF_EXPONENT;
use super::protocol::{Names, Order, Setup, Worked};
use super::stage::builder;
use super::{classes, coupons, jobs};
use crate::exit::Failure;
use crate::load::counters::Counters;
use crate::load::mix::Mix;
use crate::load::orders::{Answer, Orders, obey, tell};
use crate::load::usage;

/// How often a worker reports its progress.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// Shared by the tasks of a worker.
pub(super) struct Workplace {
    pub(super) locks: LockManager,
    pub(super) names: Names,
    pub(super) think: Duration,
    pub(super) mix: Mix,
    /// Connections for the data, separate from those of the lock: one per shard, in order, or one
    /// for all.
    data: Vec<MultiplexedConnection>,
    /// Renders the page of metrics.
    metrics: Box<dyn Fn(&LockManager) -> String + Send + Sync>,
    /// Serves until the worker leaves.
    serving: AdminServer,
    /// The TTL of the leases.
    pub(super) ttl: Duration,
    tasks: u32,
    /// How many customers or jobs are done.
    through: AtomicU64,
}

/// Executes orders until the one to leave. Failures are reported to the parent as well.
pub(crate) fn run() -> Result<u8, Failure> {
    crate::on_this_thread(async { obey(serve).await.map_err(|error| Failure::new(1, error)) })
}

async fn serve(orders: &mut Orders) -> anyhow::Result<()> {
    let setup: Setup = orders.next().await?;
    let place = Arc::new(Workplace::open(&setup).await?);
    tell(&Answer::Done(place.serving.address()))?;
    loop {
        let order: Order = orders.next().await?;
        place.through.store(0, Ordering::Relaxed);
        let answer = tokio::select! {
            answer = place.carry_out(order) => answer?,
            error = place.tell_progress() => return Err(error),
        };
        tell(&Answer::Done(answer))?;
        if matches!(order, Order::Leave) {
            return Ok(());
        }
    }
}

impl Workplace {
    async fn open(setup: &Setup) -> anyhow::Result<Self> {
        // Before the manager: metrics created without a recorder count nothing.
        let address = setup.metrics.unwrap_or(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)));
        let admin = crate::metrics::bind(address)?;
        let metrics = Box::new(admin.renderer());
        let names = Names::new(&setup.prefix);
        let config = config(setup, &names)?;
        let ttl = config.ttl;
        let locks = Builder::new().config(config).connect().await?;
        Ok(Self {
            serving: admin.serve(&locks)?,
            ttl,
            locks,
            names,
            think: setup.think,
            mix: Mix::zipf(setup.keys, ZIPF_EXPONENT)?,
            data: try_join_all(setup.data.iter().map(|url| usage::connect(url))).await?,
            metrics,
            tasks: setup.tasks,
            through: AtomicU64::new(0),
        })
    }

    /// The connection for data that does not belong to a particular shard.
    pub(super) fn data(&self) -> MultiplexedConnection {
        self.data[0].clone()
    }

    /// The connection for data on the same shard as this key's lock, or the only one.
    pub(super) fn data_of(&self, key: &str) -> anyhow::Result<MultiplexedConnection> {
        if let [only] = &self.data[..] {
            return Ok(only.clone());
        }
        let index = self.locks.shard_map().index(LockKey::new(key)?.slot());
        self.data
            .get(index)
            .cloned()
            .context("there are fewer connections than shards")
    }

    /// Counts one customer or job as done.
    pub(super) fn count(&self) {
        self.through.fetch_add(1, Ordering::Relaxed);
    }

    async fn carry_out(self: &Arc<Self>, order: Order) -> anyhow::Result<Option<Worked>> {
        match order {
            Order::Claim { locked } => {
                self.with_all_tasks(|place| async move { coupons::claim(&place, locked).await })
                    .await?;
                Ok(None)
            }
            Order::Work { seconds } => {
                let count = || Counters::read(&(self.metrics)(&self.locks), jobs::CLASS);
                let before = count();
                let until = Instant::now() + seconds;
                let tallies = self
                    .with_all_tasks(|place| async move { jobs::work(&place, until).await })
                    .await?;
                let counted = count().since(before);
                let mut worked = jobs::sum(tallies)?;
                (worked.uncontended, worked.local, worked.remote) =
                    (counted.uncontended, counted.local, counted.remote);
                worked.store_requests = counted.store_requests;
                Ok(Some(worked))
            }
            Order::Load => {
                let tasks = (0..self.tasks).map(|task| classes::run(Arc::clone(self), task));
                tasks.collect::<JoinSet<_>>().join_all().await;
                Ok(None)
            }
            Order::Leave => {
                self.locks.shutdown().await;
                Ok(None)
            }
        }
    }

    /// Runs one task per customer of this worker, all concurrently.
    async fn with_all_tasks<T, F>(self: &Arc<Self>, task: impl Fn(Arc<Self>) -> F) -> anyhow::Result<Vec<T>>
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
    async fn tell_progress(&self) -> anyhow::Error {
        loop {
            tokio::time::sleep(PROGRESS_EVERY).await;
            if let Err(error) = tell(&Answer::<()>::Progress(self.through.load(Ordering::Relaxed))) {
                return error;
            }
        }
    }
}

/// The settings of the worker's manager.
fn config(setup: &Setup, names: &Names) -> anyhow::Result<Config> {
    let builder = builder(&setup.shards, names)?;
    let Some(load) = setup.load else {
        return Ok(builder.store_timeout(usage::SERVER_TIMEOUT).build_config()?);
    };
    let mut config = builder.build_config()?;
    classes::settings(&mut config, setup.tasks, load.are_servers_ours);
    Ok(config)
}
