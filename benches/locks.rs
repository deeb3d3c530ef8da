//! What a lock costs, beside the limit that the same machine sets in the same run: `tokio::sync::Mutex` for waiting inside
//! a process, plain Redis commands on one multiplexed connection for everything else.
//!
//! `cargo bench --bench locks` starts a Redis server of its own and ends with the ratios.

// What fails here ends the run.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput};
use metrics_exporter_prometheus::PrometheusBuilder;
use redis::IntoConnectionInfo;
use redis::aio::MultiplexedConnection;
use redis::io::tcp::TcpSettings;
use shardlock::LockManager;
use tokio::runtime::Runtime;

#[path = "../tests/support/mod.rs"]
mod support;

use support::RedisServer;

const COMPARE_AND_DELETE: &str =
    "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) else return 0 end";

async fn raw_acquire(connection: &mut MultiplexedConnection, key: &str) -> bool {
    let mut set = redis::cmd("SET");
    set.arg(key).arg("owner").arg("NX").arg("PX").arg(10_000);
    let reply: Option<String> = set.query_async(connection).await.expect("SET NX PX");
    reply.is_some()
}

async fn raw_release(connection: &mut MultiplexedConnection, script: &redis::Script, key: &str) {
    let freed: i64 = script
        .key(key)
        .arg("owner")
        .invoke_async(connection)
        .await
        .expect("compare and delete");
    assert_eq!(freed, 1, "{key} was not ours");
}

/// Runs `tasks` tasks at once that share `operations` and returns the time until all are done.
async fn share<F, Fut>(tasks: u64, operations: u64, task: F) -> Duration
where
    F: Fn(u64, u64) -> Fut,
    Fut: Future<Output = ()> + Send + 'static,
{
    let start = Instant::now();
    let tasks: Vec<_> = (0..tasks)
        .map(|number| {
            tokio::spawn(task(
                number,
                operations / tasks + u64::from(number < operations % tasks),
            ))
        })
        .collect();
    for task in tasks {
        task.await.expect("a task of the benchmark");
    }
    start.elapsed()
}

/// One of the two sides of a comparison: does so many operations and says how long they took.
type Side = Box<dyn Fn(u64) -> Duration>;

/// Two things that are measured beside each other.
struct Comparison {
    name: &'static str,
    ours: Side,
    limit_name: &'static str,
    limit: Side,
    /// Keeps the server alive.
    _server: RedisServer,
}

impl Comparison {
    fn bench(&self, criterion: &mut Criterion) {
        let mut group = criterion.benchmark_group(self.name);
        group
            .throughput(Throughput::Elements(1))
            .measurement_time(Duration::from_secs(3));
        group.bench_function(self.limit_name, |bencher| bencher.iter_custom(&self.limit));
        group.bench_function("shardlock", |bencher| bencher.iter_custom(&self.ours));
        group.finish();
    }

    /// Both in turn, many times, since the speed of a shared machine drifts: the median of the ratios of neighbours, and of the rates.
    fn ratio(&self, operations: u64) {
        let mut rounds: Vec<(f64, f64)> = (0..ROUNDS)
            .map(|_| {
                let rate = |took: Duration| operations as f64 / took.as_secs_f64();
                (rate((self.limit)(operations)), rate((self.ours)(operations)))
            })
            .collect();
        let mut median = |value: fn(&(f64, f64)) -> f64| {
            rounds.sort_by(|one, other| value(one).total_cmp(&value(other)));
            value(&rounds[rounds.len() / 2])
        };
        let (ratio, ours, limit) = (
            median(|round| round.1 / round.0),
            median(|round| round.1),
            median(|round| round.0),
        );
        println!(
            "  {}: {ours:.0}/s ({:.2} us), {} {limit:.0}/s ({:.2} us): {ratio:.2} of its rate, {:.2} times its time",
            self.name,
            1e6 / ours,
            self.limit_name,
            1e6 / limit,
            1.0 / ratio,
        );
    }
}

const ROUNDS: usize = 31;

/// A runtime, a server, and a manager on it.
fn setting() -> (Arc<Runtime>, RedisServer, LockManager) {
    let runtime = Runtime::new().expect("a runtime");
    let server = RedisServer::start();
    let locks = runtime
        .block_on(LockManager::connect(&server.url()))
        .expect("a manager");
    (Arc::new(runtime), server, locks)
}

fn raw_connection(runtime: &Runtime, server: &RedisServer) -> (MultiplexedConnection, Arc<redis::Script>) {
    // With the same settings of the socket as ours.
    let info = server.url().into_connection_info().expect("a URL");
    let info = info.set_tcp_settings(TcpSettings::default().set_nodelay(true));
    let client = redis::Client::open(info).expect("a client");
    let connection = runtime
        .block_on(client.get_multiplexed_async_connection())
        .expect("a connection");
    (connection, Arc::new(redis::Script::new(COMPARE_AND_DELETE)))
}

/// Many tasks on one key in one process, nothing done under the lock.
fn fan_in() -> Comparison {
    let (runtime, server, locks) = setting();
    let (mutex, last) = (Arc::new(tokio::sync::Mutex::new(0_u64)), Arc::new(AtomicU64::new(0)));
    let of_the_limit = Arc::clone(&runtime);
    let limit = move |operations| {
        of_the_limit.block_on(share(1000, operations, |_, count| {
            let mutex = Arc::clone(&mutex);
            async move {
                for _ in 0..count {
                    *mutex.lock().await += 1;
                }
            }
        }))
    };
    let ours = move |operations| {
        runtime.block_on(share(1000, operations, |_, count| {
            let (locks, last) = (locks.clone(), Arc::clone(&last));
            async move {
                for _ in 0..count {
                    let guard = locks.lock("hot").await.expect("a lock");
                    let token = guard.token().get();
                    assert!(last.swap(token, Ordering::Relaxed) < token, "tokens must grow");
                    guard.release().await.expect("a release");
                }
            }
        }))
    };
    Comparison {
        name: "fan-in, 1000 tasks, 1 key",
        ours: Box::new(ours),
        limit_name: "tokio::sync::Mutex",
        limit: Box::new(limit),
        _server: server,
    }
}

/// The fan-in again: what the metrics cost where a recorder takes them.
///
/// Handles that were made without a recorder do nothing for ever, so the manager without goes first.
fn metrics_on_fan_in() -> Comparison {
    let (runtime, server, without) = setting();
    let exporter = PrometheusBuilder::new()
        .set_buckets(&[1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0])
        .expect("buckets")
        .install_recorder()
        .expect("no recorder before");
    let with = runtime
        .block_on(
            LockManager::builder()
                .named_shard("with", server.url())
                .namespace("with:")
                .connect(),
        )
        .expect("a manager");
    runtime.spawn(async move {
        loop {
            tokio::time::sleep(Duration::from_secs(1)).await;
            exporter.run_upkeep();
        }
    });
    let side = |locks: LockManager| -> Side {
        let runtime = Arc::clone(&runtime);
        Box::new(move |operations| {
            runtime.block_on(share(1000, operations, |_, count| {
                let locks = locks.clone();
                async move {
                    for _ in 0..count {
                        let guard = locks.lock("hot").await.expect("a lock");
                        guard.release().await.expect("a release");
                    }
                }
            }))
        })
    };
    Comparison {
        name: "metrics with the exporter, 1000 tasks, 1 key",
        ours: side(with),
        limit_name: "without a recorder",
        limit: side(without),
        _server: server,
    }
}

/// Many tasks, each with a key of its own.
fn own_keys() -> Comparison {
    let (runtime, server, locks) = setting();
    let (connection, script) = raw_connection(&runtime, &server);
    let of_the_limit = Arc::clone(&runtime);
    let limit = move |operations| {
        of_the_limit.block_on(share(64, operations, |number, count| {
            let (mut connection, script) = (connection.clone(), Arc::clone(&script));
            async move {
                let key = format!("raw:{number}");
                for _ in 0..count {
                    assert!(raw_acquire(&mut connection, &key).await);
                    raw_release(&mut connection, &script, &key).await;
                }
            }
        }))
    };
    let ours = move |operations| {
        runtime.block_on(share(64, operations, |number, count| {
            let locks = locks.clone();
            async move {
                let key = format!("own:{number}");
                for _ in 0..count {
                    locks
                        .lock(&key)
                        .await
                        .expect("a lock")
                        .release()
                        .await
                        .expect("a release");
                }
            }
        }))
    };
    Comparison {
        name: "64 tasks, 64 keys",
        ours: Box::new(ours),
        limit_name: "raw SET NX PX + compare-and-delete",
        limit: Box::new(limit),
        _server: server,
    }
}

/// One task, a free key: only the acquiring is timed.
fn one_task() -> Comparison {
    let (runtime, server, locks) = setting();
    let (connection, script) = raw_connection(&runtime, &server);
    let of_the_limit = Arc::clone(&runtime);
    let limit = move |operations| {
        let (mut connection, script) = (connection.clone(), Arc::clone(&script));
        in_a_task(&of_the_limit, async move {
            let mut took = Duration::ZERO;
            for _ in 0..operations {
                let start = Instant::now();
                assert!(raw_acquire(&mut connection, "raw:one").await);
                took += start.elapsed();
                raw_release(&mut connection, &script, "raw:one").await;
            }
            took
        })
    };
    let ours = move |operations| {
        let locks = locks.clone();
        in_a_task(&runtime, async move {
            let mut took = Duration::ZERO;
            for _ in 0..operations {
                let start = Instant::now();
                let guard = locks.lock("one").await.expect("a lock");
                took += start.elapsed();
                guard.release().await.expect("a release");
            }
            took
        })
    };
    Comparison {
        name: "1 task, free key, acquire only",
        ours: Box::new(ours),
        limit_name: "raw SET NX PX",
        limit: Box::new(limit),
        _server: server,
    }
}

/// Where programs lock: in a task, not on the thread that started the runtime.
fn in_a_task(runtime: &Runtime, task: impl Future<Output = Duration> + Send + 'static) -> Duration {
    runtime.block_on(async { tokio::spawn(task).await.expect("a task of the benchmark") })
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    let comparisons = [
        (fan_in(), 200_000),
        (own_keys(), 20_000),
        (one_task(), 1_000),
        // Last: from then on there is a recorder.
        (metrics_on_fan_in(), 200_000),
    ];
    for (comparison, _) in &comparisons {
        comparison.bench(&mut criterion);
    }
    criterion.final_summary();
    println!("\nboth in turn, median of {ROUNDS} rounds:");
    for (comparison, operations) in &comparisons {
        comparison.ratio(*operations);
    }
}
