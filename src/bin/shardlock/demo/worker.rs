//! A worker process: does what the lines on its standard input say.

use std::io::{BufRead, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, ensure};
use deadpool_redis::redis::aio::MultiplexedConnection;
use futures_util::future::try_join_all;
use serde::de::DeserializeOwned;
use shardlock::admin::AdminServer;
use shardlock::{Builder, Config, LockKey, LockManager};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::jobs::Mix;
use super::probe;
use super::protocol::{Answer, Names, Order, Setup, Worked};
use super::stage::builder;
use super::{coupons, jobs, load};

/// How often a worker tells how far it is.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// What the tasks of a worker share.
pub(super) struct Workplace {
    pub(super) locks: LockManager,
    pub(super) names: Names,
    pub(super) think: Duration,
    pub(super) mix: Mix,
    /// Connections for the data, apart from those of the lock: one for each shard, in their order, or one for all.
    data: Vec<MultiplexedConnection>,
    /// The page of metrics.
    metrics: Box<dyn Fn(&LockManager) -> String + Send + Sync>,
    /// Until the worker leaves.
    serving: AdminServer,
    /// How long leases last.
    pub(super) ttl: Duration,
    tasks: u32,
    /// How many customers or jobs are through.
    through: AtomicU64,
}

/// Does what it is told, until it is told to leave. What fails is told, too.
pub(super) async fn run() -> anyhow::Result<u8> {
    let mut orders = listen()?;
    let served = serve(&mut orders).await;
    if let Err(error) = &served {
        tell(&Answer::Failed(format!("{error:#}")))?;
    }
    Ok(u8::from(served.is_err()))
}

async fn serve(orders: &mut mpsc::UnboundedReceiver<String>) -> anyhow::Result<()> {
    let setup: Setup = hear(orders).await?;
    let place = Arc::new(Workplace::open(&setup).await?);
    tell(&Answer::Ready {
        metrics: place.serving.address(),
    })?;
    loop {
        let order: Order = hear(orders).await?;
        place.through.store(0, Ordering::Relaxed);
        let answer = tokio::select! {
            answer = place.carry_out(order) => answer?,
            error = place.tell_progress() => return Err(error),
        };
        tell(&answer)?;
        if matches!(order, Order::Leave) {
            return Ok(());
        }
    }
}

impl Workplace {
    async fn open(setup: &Setup) -> anyhow::Result<Self> {
        // Before the manager: metrics that were made without a recorder count nothing.
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
            mix: Mix::new(setup.keys)?,
            data: try_join_all(setup.data.iter().map(|url| probe::connect(url))).await?,
            metrics,
            tasks: setup.tasks,
            through: AtomicU64::new(0),
        })
    }

    /// The connection for data that belong to no shard in particular.
    pub(super) fn data(&self) -> MultiplexedConnection {
        self.data[0].clone()
    }

    /// The connection for data that live where the lock of this key does, or where all do.
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

    /// One more customer or job is through.
    pub(super) fn count(&self) {
        self.through.fetch_add(1, Ordering::Relaxed);
    }

    async fn carry_out(self: &Arc<Self>, order: Order) -> anyhow::Result<Answer> {
        match order {
            Order::Claim { locked } => {
                self.with_all_tasks(|place| async move { coupons::claim(&place, locked).await })
                    .await?;
                Ok(Answer::Done)
            }
            Order::Work { seconds } => {
                let before = Counters::read(&(self.metrics)(&self.locks));
                let until = Instant::now() + seconds;
                let tallies = self
                    .with_all_tasks(|place| async move { jobs::work(&place, until).await })
                    .await?;
                let counted = Counters::read(&(self.metrics)(&self.locks));
                let mut worked = jobs::sum(tallies)?;
                counted.since(before).fill(&mut worked);
                Ok(Answer::Worked(Box::new(worked)))
            }
            Order::Load => {
                let tasks = (0..self.tasks).map(|task| load::run(Arc::clone(self), task));
                tasks.collect::<JoinSet<_>>().join_all().await;
                Ok(Answer::Done)
            }
            Order::Leave => {
                self.locks.shutdown().await;
                Ok(Answer::Done)
            }
        }
    }

    /// Runs a task of each of this worker's customers, all at once.
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

    /// Tells it every now and then, for ever; returns only if nobody listens.
    async fn tell_progress(&self) -> anyhow::Error {
        loop {
            tokio::time::sleep(PROGRESS_EVERY).await;
            if let Err(error) = tell(&Answer::Progress(self.through.load(Ordering::Relaxed))) {
                return error;
            }
        }
    }
}

/// The settings of the worker's manager.
fn config(setup: &Setup, names: &Names) -> anyhow::Result<Config> {
    let builder = builder(&setup.shards, names)?;
    let Some(load) = setup.load else {
        return Ok(builder.store_timeout(probe::SERVER_TIMEOUT).build_config()?);
    };
    let mut config = builder.build_config()?;
    load::settings(&mut config, setup.tasks, load.are_servers_ours);
    Ok(config)
}

/// What the lock manager itself counted.
#[derive(Debug, Clone, Copy)]
struct Counters([u64; 4]);

impl Counters {
    fn read(text: &str) -> Self {
        let by_path = |path: &str| {
            let path = format!("path=\"{path}\"");
            sum_of(text, "shardlock_acquisitions_total{", &[r#"class="jobs""#, &path])
        };
        Self([
            by_path("uncontended"),
            by_path("local"),
            by_path("remote"),
            sum_of(text, "shardlock_store_requests_total{", &[]),
        ])
    }

    fn since(self, earlier: Self) -> Self {
        Self(std::array::from_fn(|index| {
            self.0[index].saturating_sub(earlier.0[index])
        }))
    }

    fn fill(self, worked: &mut Worked) {
        let Self([uncontended, local, remote, store_requests]) = self;
        (worked.uncontended, worked.local, worked.remote) = (uncontended, local, remote);
        worked.store_requests = store_requests;
    }
}

/// The sum of a counter's lines with these labels, in the text that Prometheus reads.
fn sum_of(text: &str, name: &str, labels: &[&str]) -> u64 {
    text.lines()
        .filter(|line| line.starts_with(name) && labels.iter().all(|label| line.contains(label)))
        .filter_map(|line| line.rsplit_once(' ')?.1.parse::<u64>().ok())
        .sum()
}

/// Reads the orders on a thread of their own. When they end without the order to leave, the demo is gone, and so is
/// this process, at once: its locks run out.
fn listen() -> anyhow::Result<mpsc::UnboundedReceiver<String>> {
    let (sender, orders) = mpsc::unbounded_channel();
    let read = move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
        std::process::exit(1);
    };
    std::thread::Builder::new().name("orders".to_owned()).spawn(read)?;
    Ok(orders)
}

async fn hear<T: DeserializeOwned>(orders: &mut mpsc::UnboundedReceiver<String>) -> anyhow::Result<T> {
    let line = orders.recv().await.context("there are no more orders")?;
    serde_json::from_str(&line).context("an order can't be read")
}

fn tell(answer: &Answer) -> anyhow::Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    ensure!(!line.contains(&b'\n'), "an answer is one line");
    line.push(b'\n');
    let mut out = std::io::stdout().lock();
    out.write_all(&line)?;
    Ok(out.flush()?)
}
