//! What a lock costs, beside the limit that the same machine sets in the same run: `tokio::sync::Mutex` for waiting inside
//! a process, plain Redis commands on one multiplexed connection for everything else.
//!
//! `cargo bench --bench locks` starts a Redis server of its own and ends with the ratios.

// What fails here ends the run.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group};
use parking_lot::Mutex;
use redis::aio::MultiplexedConnection;
use shardlock::LockManager;
use tokio::runtime::Runtime;

#[path = "../tests/support/mod.rs"]
mod support;

use support::RedisServer;

/// Time and operations of every measurement, for the ratios at the end.
static TALLY: Mutex<BTreeMap<&str, (Duration, u64)>> = Mutex::new(BTreeMap::new());

fn tally(name: &'static str, took: Duration, operations: u64) -> Duration {
    let mut tally = TALLY.lock();
    let (time, count) = tally.entry(name).or_default();
    (*time, *count) = (*time + took, *count + operations);
    took
}

fn per_second(name: &str) -> f64 {
    let (time, count) = TALLY.lock().get(name).copied().unwrap_or_default();
    count as f64 / time.as_secs_f64()
}

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

/// Many tasks on one key in one process, nothing done under the lock.
fn fan_in(criterion: &mut Criterion) {
    let runtime = Runtime::new().expect("a runtime");
    let server = RedisServer::start();
    let locks = runtime
        .block_on(LockManager::connect(&server.url()))
        .expect("a manager");
    let mutex = Arc::new(tokio::sync::Mutex::new(0_u64));
    let last = Arc::new(AtomicU64::new(0));

    let mut group = criterion.benchmark_group("fan-in, 1000 tasks, 1 key");
    group
        .throughput(Throughput::Elements(1))
        .measurement_time(Duration::from_secs(5));
    group.bench_function("tokio::sync::Mutex", |bencher| {
        bencher.to_async(&runtime).iter_custom(|operations| {
            let mutex = Arc::clone(&mutex);
            async move {
                let took = share(1000, operations, |_, count| {
                    let mutex = Arc::clone(&mutex);
                    async move {
                        for _ in 0..count {
                            *mutex.lock().await += 1;
                        }
                    }
                });
                tally("mutex", took.await, operations)
            }
        });
    });
    group.bench_function("shardlock", |bencher| {
        bencher.to_async(&runtime).iter_custom(|operations| {
            let (locks, last) = (locks.clone(), Arc::clone(&last));
            async move {
                let took = share(1000, operations, |_, count| {
                    let (locks, last) = (locks.clone(), Arc::clone(&last));
                    async move {
                        for _ in 0..count {
                            let guard = locks.lock("hot").await.expect("a lock");
                            let token = guard.token().get();
                            assert!(last.swap(token, Ordering::Relaxed) < token, "tokens must grow");
                            guard.release().await.expect("a release");
                        }
                    }
                });
                tally("fan-in", took.await, operations)
            }
        });
    });
    group.finish();
    runtime.block_on(locks.shutdown());
}

/// Many tasks, each with a key of its own.
fn own_keys(criterion: &mut Criterion) {
    let runtime = Runtime::new().expect("a runtime");
    let server = RedisServer::start();
    let locks = runtime
        .block_on(LockManager::connect(&server.url()))
        .expect("a manager");
    let client = redis::Client::open(server.url()).expect("a client");
    let connection = runtime
        .block_on(client.get_multiplexed_async_connection())
        .expect("a connection");
    let script = Arc::new(redis::Script::new(COMPARE_AND_DELETE));

    let mut group = criterion.benchmark_group("64 tasks, 64 keys");
    group
        .throughput(Throughput::Elements(1))
        .measurement_time(Duration::from_secs(5));
    group.bench_function("raw SET NX PX + compare-and-delete", |bencher| {
        bencher.to_async(&runtime).iter_custom(|operations| {
            let (connection, script) = (connection.clone(), Arc::clone(&script));
            async move {
                let took = share(64, operations, |number, count| {
                    let (mut connection, script) = (connection.clone(), Arc::clone(&script));
                    async move {
                        let key = format!("raw:{number}");
                        for _ in 0..count {
                            assert!(raw_acquire(&mut connection, &key).await);
                            raw_release(&mut connection, &script, &key).await;
                        }
                    }
                });
                tally("raw cycles", took.await, operations)
            }
        });
    });
    group.bench_function("shardlock", |bencher| {
        bencher.to_async(&runtime).iter_custom(|operations| {
            let locks = locks.clone();
            async move {
                let took = share(64, operations, |number, count| {
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
                });
                tally("own keys", took.await, operations)
            }
        });
    });
    group.finish();
    runtime.block_on(locks.shutdown());
}

/// One task, a free key: only the acquiring is timed.
fn one_task(criterion: &mut Criterion) {
    let runtime = Runtime::new().expect("a runtime");
    let server = RedisServer::start();
    let locks = runtime
        .block_on(LockManager::connect(&server.url()))
        .expect("a manager");
    let client = redis::Client::open(server.url()).expect("a client");
    let connection = runtime
        .block_on(client.get_multiplexed_async_connection())
        .expect("a connection");
    let script = Arc::new(redis::Script::new(COMPARE_AND_DELETE));

    let mut group = criterion.benchmark_group("1 task, free key, acquire only");
    group.measurement_time(Duration::from_secs(5));
    group.bench_function("raw SET NX PX", |bencher| {
        bencher.to_async(&runtime).iter_custom(|operations| {
            let (mut connection, script) = (connection.clone(), Arc::clone(&script));
            async move {
                let mut took = Duration::ZERO;
                for _ in 0..operations {
                    let start = Instant::now();
                    assert!(raw_acquire(&mut connection, "raw:one").await);
                    took += start.elapsed();
                    raw_release(&mut connection, &script, "raw:one").await;
                }
                tally("raw acquire", took, operations)
            }
        });
    });
    group.bench_function("shardlock", |bencher| {
        bencher.to_async(&runtime).iter_custom(|operations| {
            let locks = locks.clone();
            async move {
                let mut took = Duration::ZERO;
                for _ in 0..operations {
                    let start = Instant::now();
                    let guard = locks.lock("one").await.expect("a lock");
                    took += start.elapsed();
                    guard.release().await.expect("a release");
                }
                tally("acquire", took, operations)
            }
        });
    });
    group.finish();
    runtime.block_on(locks.shutdown());
}

criterion_group!(benches, fan_in, own_keys, one_task);

fn main() {
    benches();
    Criterion::default().configure_from_args().final_summary();
    let ratio = |name: &str, limit: &str| per_second(name) / per_second(limit);
    println!("\nratios of this run");
    println!(
        "  fan-in, 1000 tasks, 1 key: {:.0} locks/s, {:.2} of tokio::sync::Mutex ({:.0}/s)",
        per_second("fan-in"),
        ratio("fan-in", "mutex"),
        per_second("mutex")
    );
    println!(
        "  64 tasks, 64 keys: {:.0} locks/s, {:.2} of raw SET NX PX + compare-and-delete ({:.0}/s)",
        per_second("own keys"),
        ratio("own keys", "raw cycles"),
        per_second("raw cycles")
    );
    println!(
        "  1 task, free key: acquiring takes {:.2} times a raw SET NX PX ({:.1} and {:.1} us)",
        1.0 / ratio("acquire", "raw acquire"),
        1e6 / per_second("acquire"),
        1e6 / per_second("raw acquire")
    );
}
