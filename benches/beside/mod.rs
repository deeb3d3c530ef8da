//! Shared by the benches. Each compares an operation with its limit, measured side by side in the
//! same run, so that the figures are meaningful on another machine, too.

// Each bench uses what it needs.
#![allow(dead_code, unreachable_pub)]
// A failure ends the run.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput};
use redis::aio::MultiplexedConnection;
use redis::io::tcp::TcpSettings;
use redis::{AsyncConnectionConfig, IntoConnectionInfo};
use shardlock::LockManager;
use tokio::runtime::Runtime;

use support::RedisServer;

/// How often both sides are measured alternately, since the speed of a shared machine drifts.
const ROUNDS: usize = 15;

/// The timeout of a server. Long, since the figures are about a machine that answers at all.
pub const TIMEOUT: Duration = Duration::from_secs(5);

/// One of the two sides of a comparison: runs that many operations and returns the time they took.
pub type Side = Box<dyn Fn(u64) -> Duration>;

/// Two operations that are measured side by side.
pub struct Comparison {
    pub name: String,
    pub ours: Side,
    pub limit_name: &'static str,
    pub limit: Side,
    /// The number of operations in a round.
    pub operations: u64,
    /// Keeps the server alive.
    pub server: Option<RedisServer>,
}

impl Comparison {
    /// Measures both sides with criterion and then alternately. The alternating rounds give the
    /// median of the ratios of neighbours, and of the times. Returns the nanoseconds that one of
    /// our operations takes.
    pub fn run(self, criterion: &mut Criterion) -> f64 {
        let mut group = criterion.benchmark_group(&self.name);
        group.throughput(Throughput::Elements(1));
        group.bench_function(self.limit_name, |bencher| bencher.iter_custom(&self.limit));
        group.bench_function("shardlock", |bencher| bencher.iter_custom(&self.ours));
        group.finish();

        let mut rounds: Vec<[f64; 3]> = (0..ROUNDS)
            .map(|_| {
                let nanos = |side: &Side| side(self.operations).as_nanos() as f64 / self.operations as f64;
                let (limit, ours) = (nanos(&self.limit), nanos(&self.ours));
                [ours / limit, ours, limit]
            })
            .collect();
        let [ratio, ours, limit] = [0, 1, 2].map(|of| {
            rounds.sort_by(|one, other| one[of].total_cmp(&other[of]));
            rounds[rounds.len() / 2][of]
        });
        println!(
            "= {}: {} each, {} {}: {ratio:.2} times its time, {:.2} of its rate\n",
            self.name,
            in_words(ours),
            self.limit_name,
            in_words(limit),
            1.0 / ratio,
        );
        ours
    }
}

pub fn in_words(nanos: f64) -> String {
    if nanos < 1e3 {
        format!("{nanos:.1} ns")
    } else if nanos < 1e6 {
        format!("{:.2} us", nanos / 1e3)
    } else {
        format!("{:.2} ms", nanos / 1e6)
    }
}

/// Criterion, configured so that all benches together take minutes.
pub fn criterion() -> Criterion {
    Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .configure_from_args()
}

/// Runs `tasks` concurrent tasks that share `operations`, and returns the time until all are done.
pub async fn share<F, Fut>(tasks: u64, operations: u64, task: F) -> Duration
where
    F: Fn(u64, u64) -> Fut,
    Fut: Future<Output = ()> + Send + 'static,
{
    let start = Instant::now();
    let tasks: Vec<_> = (0..tasks)
        .map(|number| {
            let count = operations / tasks + u64::from(number < operations % tasks);
            tokio::spawn(task(number, count))
        })
        .collect();
    for task in tasks {
        task.await.expect("a task of the bench");
    }
    start.elapsed()
}

/// The time that these operations would have taken if each had taken the median.
pub fn as_the_median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2] * u32::try_from(times.len()).expect("the number fits into a u32")
}

/// Runs `task` as a task, where applications lock, and not on the thread that started the runtime.
pub fn in_a_task(runtime: &Runtime, task: impl Future<Output = Duration> + Send + 'static) -> Duration {
    runtime.block_on(async { tokio::spawn(task).await.expect("a task of the bench") })
}

/// A runtime, a server, and a manager on it.
pub fn setting() -> (Arc<Runtime>, RedisServer, LockManager) {
    let runtime = Runtime::new().expect("a runtime");
    let server = RedisServer::start();
    let locks = runtime
        .block_on(
            LockManager::builder()
                .shard(server.url())
                .store_timeout(TIMEOUT)
                .connect(),
        )
        .expect("a manager");
    (Arc::new(runtime), server, locks)
}

/// A lock made of plain commands on one multiplexed connection.
#[derive(Clone)]
pub struct Raw {
    pub connection: MultiplexedConnection,
    release: Arc<redis::Script>,
}

const COMPARE_AND_DELETE: &str =
    "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) else return 0 end";

pub const RAW_CYCLE: &str = "raw SET NX PX + compare-and-delete";

impl Raw {
    pub async fn connect(server: &RedisServer) -> Self {
        Self::connect_to(&server.url()).await
    }

    pub async fn connect_to(url: &str) -> Self {
        // With the same socket settings as ours.
        let info = url.into_connection_info().expect("a URL");
        let info = info.set_tcp_settings(TcpSettings::default().set_nodelay(true));
        let client = redis::Client::open(info).expect("a client");
        let config = AsyncConnectionConfig::new().set_response_timeout(Some(TIMEOUT));
        let connection = client.get_multiplexed_async_connection_with_config(&config);
        let connection = connection.await.expect("a connection");
        Self {
            connection,
            release: Arc::new(redis::Script::new(COMPARE_AND_DELETE)),
        }
    }

    pub async fn acquire(&mut self, key: &str) {
        let mut set = redis::cmd("SET");
        set.arg(key).arg("owner").arg("NX").arg("PX").arg(10_000);
        let reply: Option<String> = set.query_async(&mut self.connection).await.expect("SET NX PX");
        assert!(reply.is_some(), "{key} is held");
    }

    pub async fn release(&mut self, key: &str) {
        let mut release = self.release.key(key);
        let freed: i64 = release
            .arg("owner")
            .invoke_async(&mut self.connection)
            .await
            .expect("compare and delete");
        assert_eq!(freed, 1, "{key} was not ours");
    }
}
