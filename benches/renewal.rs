//! Many leases held at once: how punctually they are renewed, and what that costs the server,
//! compared with a pipeline of bare PEXPIREs on the same number of keys; and what happens to them
//! if one of three servers stops.
//!
//! `cargo bench --bench renewal -- --long` holds only the largest number, and for five minutes; one
//! of three servers stops in this run as well.

// A failure ends the run.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::time::{Duration, Instant};

use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use shardlock::{LockGuard, LockManager};
use tokio::runtime::Runtime;
use tokio::task::JoinSet;

#[path = "beside/mod.rs"]
mod beside;

use beside::{Raw, TIMEOUT};
use support::RedisServer;

const LEASES: [usize; 3] = [1_000, 10_000, 100_000];

/// The default. A lease is renewed each second.
const TTL: Duration = Duration::from_secs(10);

/// How long the leases are held, by default and in the long run.
const HELD_FOR: Duration = Duration::from_secs(6);
const HELD_FOR_LONG: Duration = Duration::from_secs(300);

/// How long one of three servers is stopped.
const STOPPED_FOR: Duration = Duration::from_secs(20);

/// How many keys are locked at a time.
const AT_ONCE: usize = 256;

/// How many PEXPIREs one pipeline contains.
const PIPELINE: usize = 1000;

/// The upper bounds of the lag's buckets, in seconds.
const LAGS: [f64; 12] = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0];

fn main() {
    let exporter = PrometheusBuilder::new()
        .set_buckets(&LAGS)
        .expect("buckets")
        .install_recorder()
        .expect("no recorder before");
    let runtime = Runtime::new().expect("a runtime");
    let is_long = std::env::args().any(|argument| argument == "--long");
    let (counts, held_for) = match is_long {
        true => (&LEASES[2..], HELD_FOR_LONG),
        false => (&LEASES[..], HELD_FOR),
    };
    println!("leases of {TTL:?} that are held for {held_for:?}:");
    println!(
        "  {:>8}{:>12}{:>8}{:>16}{:>16}{:>22}{:>22}",
        "leases", "renewals", "lost", "lag p99, up to", "server's core", "server us / renewal", "server us / PEXPIRE"
    );
    for &count in counts {
        runtime.block_on(measure(count, held_for, &exporter));
    }
    runtime.block_on(stop_one_of_three(LEASES[2]));
}

async fn measure(count: usize, held_for: Duration, exporter: &PrometheusHandle) {
    let server = RedisServer::start();
    let shard = format!("of{count}");
    let locks = LockManager::builder()
        .named_shard(&shard, server.url())
        .ttl(TTL)
        .store_timeout(TIMEOUT)
        .connect();
    let locks = locks.await.expect("a manager");
    let guards = hold(&locks, count).await;

    let seen = || Seen::read(&exporter.render(), &shard);
    let (before, cpu_before, began) = (seen(), cpu_us(&server), Instant::now());
    tokio::time::sleep(held_for).await;
    let (took, cpu) = (began.elapsed(), cpu_us(&server) - cpu_before);
    // Counts reach the recorder ten times a second.
    let renewals = seen().renewals - before.renewals;
    let lost = guards.iter().filter(|guard| !guard.is_valid()).count();
    let lag = seen().lag_since(&before);
    drop(guards);
    locks.shutdown().await.ok();

    let raw = pexpire_us(&server, count).await;
    println!(
        "  {count:>8}{renewals:>12}{lost:>8}{:>16}{:>16}{:>22}{:>22}",
        lag.map_or_else(|| "-".to_owned(), |lag| format!("{:.0} ms", lag * 1e3)),
        format!("{:.1} %", 100.0 * cpu as f64 / took.as_micros() as f64),
        format!("{:.2}", cpu as f64 / renewals.max(1.0)),
        format!("{raw:.2}"),
    );
}

/// The same number of leases on three servers, one of which is stopped for two TTLs.
async fn stop_one_of_three(count: usize) {
    let servers = [RedisServer::start(), RedisServer::start(), RedisServer::start()];
    let connecting = servers
        .iter()
        .enumerate()
        .fold(LockManager::builder().ttl(TTL), |builder, (number, server)| {
            builder.named_shard(format!("server{number}"), server.url())
        });
    let locks = connecting.connect().await.expect("a manager");
    let guards = hold(&locks, count).await;
    servers[0].stop();
    tokio::time::sleep(STOPPED_FOR).await;
    let lost = |stopped: bool| {
        let there = guards.iter().filter(|guard| (guard.shard() == "server0") == stopped);
        let (lost, held): (Vec<_>, Vec<_>) = there.partition(|guard| !guard.is_valid());
        format!("{} of {}", lost.len(), lost.len() + held.len())
    };
    println!(
        "{count} leases on three servers, one of which is stopped for {STOPPED_FOR:?}: leases lost on it {}, on the other two {}",
        lost(true),
        lost(false)
    );
    servers[0].cont();
    drop(guards);
    locks.shutdown().await.ok();
}

async fn hold(locks: &LockManager, count: usize) -> Vec<LockGuard> {
    let mut tasks: JoinSet<Vec<LockGuard>> = (0..AT_ONCE)
        .map(|task| {
            let locks = locks.clone();
            async move {
                let mut guards = vec![];
                for key in (task..count).step_by(AT_ONCE) {
                    guards.push(locks.lock(format!("held:{key}")).await.expect("a lock"));
                }
                guards
            }
        })
        .collect();
    let mut guards = Vec::with_capacity(count);
    while let Some(some) = tasks.join_next().await {
        guards.extend(some.expect("a task of the bench"));
    }
    guards
}

/// The server's CPU time for one PEXPIRE, among as many as there were leases.
async fn pexpire_us(server: &RedisServer, count: usize) -> f64 {
    let mut connection = Raw::connect(server).await.connection;
    let keys: Vec<String> = (0..count).map(|key| format!("raw:{key}")).collect();
    for some in keys.chunks(PIPELINE) {
        let mut set = redis::pipe();
        for key in some {
            set.set(key, "owner").ignore();
        }
        set.exec_async(&mut connection).await.expect("SET");
    }
    let before = cpu_us(server);
    for some in keys.chunks(PIPELINE) {
        let mut expire = redis::pipe();
        for key in some {
            expire.pexpire(key, TTL.as_millis() as i64).ignore();
        }
        expire.exec_async(&mut connection).await.expect("PEXPIRE");
    }
    (cpu_us(server) - before) as f64 / count as f64
}

fn cpu_us(server: &RedisServer) -> u64 {
    let info: String = server.query(&["INFO", "cpu"]);
    let seconds = |name: &str| -> f64 {
        let line = info.lines().find_map(|line| line.strip_prefix(name)).expect("a figure");
        line.trim().parse().expect("a number")
    };
    ((seconds("used_cpu_user:") + seconds("used_cpu_sys:")) * 1e6) as u64
}

/// The metrics of a shard.
struct Seen {
    renewals: f64,
    /// How many renewals were late by at most each of [`LAGS`], and how many there were.
    lags: Vec<f64>,
}

impl Seen {
    fn read(page: &str, shard: &str) -> Self {
        let shard = format!("shard=\"{shard}\"");
        let of = |labels: &[&str]| -> f64 {
            let lines = page.lines().filter(|line| {
                !line.starts_with('#') && line.contains(&shard) && labels.iter().all(|label| line.contains(label))
            });
            let values = lines.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok());
            values.sum()
        };
        let lags = LAGS.iter().map(f64::to_string).chain(["+Inf".to_owned()]);
        Self {
            renewals: of(&["shardlock_renewals_total{", "outcome=\"extended\""]),
            lags: lags
                .map(|lag| of(&["shardlock_renewal_lag_seconds_bucket{", &format!("le=\"{lag}\"")]))
                .collect(),
        }
    }

    /// The bound that 99 of 100 renewals since then did not exceed.
    fn lag_since(&self, before: &Self) -> Option<f64> {
        let since: Vec<f64> = self
            .lags
            .iter()
            .zip(&before.lags)
            .map(|(now, then)| now - then)
            .collect();
        let all = *since.last()?;
        let bound = since.iter().position(|&count| count >= 0.99 * all)?;
        LAGS.get(bound).copied().filter(|_| all > 0.0)
    }
}
