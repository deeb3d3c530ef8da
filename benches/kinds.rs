//! Measures the cost of a lock on each kind of shard, in milliseconds and in round trips to a Redis
//! server on the same machine (a PING in the same run), so that the figures are meaningful
//! elsewhere, too.
//!
//! `cargo bench --all-features --bench kinds` starts the servers of each kind. All of them run on
//! one machine here: between machines, the figures in round trips still hold, and those in
//! milliseconds do not.

// A failure ends the run.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::time::{Duration, Instant};

use redis::IntoConnectionInfo;
use redis::aio::MultiplexedConnection;
use redis::io::tcp::TcpSettings;
use shardlock::LockManager;
use tokio::runtime::Runtime;

use support::RedisServer;
use support_locks::{Kind, TestStore, until_queued};

/// How often each step is measured. Steps alternate, so that a slow moment of the machine affects
/// all of them.
const ROUNDS: usize = 300;
/// The first rounds open connections and load scripts.
const WARM_UP: usize = 20;

/// The times of one step.
#[derive(Default)]
struct Times(Vec<Duration>);

impl Times {
    async fn take<T>(&mut self, what: impl Future<Output = T>) -> T {
        let started = Instant::now();
        let result = what.await;
        self.0.push(started.elapsed());
        result
    }

    fn median(&self) -> Duration {
        let mut times = self.0[WARM_UP..].to_vec();
        times.sort_unstable();
        times[times.len() / 2]
    }
}

fn main() {
    let runtime = Runtime::new().expect("start a runtime");
    let reference = RedisServer::start();
    println!(
        "medians of {} rounds, in ms and in PINGs of a Redis server in the same rounds:",
        ROUNDS - WARM_UP
    );
    println!(
        "  {:<10}{:>18}{:>18}{:>18}{:>18}",
        "", "acquire, free key", "release", "failed try", "hand-off"
    );
    for (name, kind) in Kind::ALL.iter().filter(|(name, _)| *name != "mixed") {
        let store = TestStore::own(*kind);
        println!("  {name:<10}{}", runtime.block_on(measure(&store, &reference)));
    }
}

async fn measure(store: &TestStore, reference: &RedisServer) -> String {
    let (one, other) = (store.manager().await, store.manager().await);
    let mut pinging = ping_connection(reference).await;
    let [mut ping, mut take, mut give_back, mut failed_try, mut hand_off] = [(); 5].map(|()| Times::default());
    for round in 0..ROUNDS {
        let pong: String = ping
            .take(redis::cmd("PING").query_async(&mut pinging))
            .await
            .expect("PING");
        assert_eq!(pong, "PONG");
        let key = format!("key-{}", round % 7);
        let guard = take.take(one.lock(&key).into_future()).await.expect("lock");
        let busy = failed_try.take(other.try_lock(&key).into_future()).await.expect("try");
        assert!(busy.is_none());
        give_back.take(guard.release()).await.expect("release");
        hand_over(&one, &other, &mut hand_off).await;
    }
    let ping = ping.median().as_secs_f64();
    let shown = [take, give_back, failed_try, hand_off].map(|times| {
        let median = times.median().as_secs_f64();
        format!("{:>18}", format!("{:.2} ({:.1})", median * 1e3, median / ping))
    });
    shown.concat()
}

/// From the release in one manager to the guard in the other.
async fn hand_over(one: &LockManager, other: &LockManager, times: &mut Times) {
    let guard = one.lock("handed").await.expect("lock");
    let waiting = tokio::spawn({
        let other = other.clone();
        async move { (other.lock("handed").await.expect("lock"), Instant::now()) }
    });
    until_queued(one, "handed", 1).await;
    let started = Instant::now();
    let releasing = tokio::spawn(guard.release());
    let (guard, had_at) = waiting.await.expect("a task");
    times.0.push(had_at.duration_since(started));
    releasing.await.expect("a task").expect("release");
    guard.release().await.expect("release");
}

async fn ping_connection(server: &RedisServer) -> MultiplexedConnection {
    let info = server.url().into_connection_info().expect("a good address");
    let info = info.set_tcp_settings(TcpSettings::default().set_nodelay(true));
    let client = redis::Client::open(info).expect("a client");
    client.get_multiplexed_async_connection().await.expect("connect")
}
