//! A process with an admin endpoint whose tasks contend for a few keys.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use shardlock::LockManager;
use shardlock::admin::Admin;

use support::worker::{self, Current, Worker};
use support::{PATIENCE, RedisServer, wait_until};

/// The key that the first process holds, and for which other tasks wait.
pub(crate) const STUCK: &str = "nightly-report";
/// Held for as long, without waiters.
pub(crate) const QUIET: &str = "migrate:orders";
/// The key with the most contending tasks, each with a short hold.
pub(crate) const HOT: &str = "coupon:black-friday";
/// Too long for 80 columns.
pub(crate) const LONG: &str = "tenant:7f3c9a51-0b1d-4f0e-9a77-d1c2b3a49586:invoice:2026-11:settlement";

/// Keys, the number of tasks that contend for each, and the hold time in milliseconds.
const WANTED: [(&str, u32, u64); 8] = [
    (HOT, 8, 2),
    ("coupon:cyber-monday", 4, 4),
    (LONG, 3, 12),
    ("cart:{u4211}:checkout", 3, 20),
    ("inventory:sku-88121", 4, 6),
    ("inventory:sku-10442", 2, 9),
    ("search-index:rebuild", 2, 150),
    ("mail:digest", 2, 40),
];

/// The number of tasks in each process that wait for [`STUCK`].
pub(crate) const WAITING: usize = 3;

pub(crate) struct Load {
    pub(crate) worker: Worker,
    /// `host:port` of the endpoint.
    pub(crate) address: String,
}

impl Load {
    /// Starts the process and waits until its tasks contend. The first process holds [`STUCK`] and
    /// [`QUIET`].
    #[track_caller]
    pub(crate) fn start(server: &RedisServer, is_first: bool) -> Self {
        Self::start_at(server, is_first, "127.0.0.1:0")
    }

    #[track_caller]
    pub(crate) fn start_at(server: &RedisServer, is_first: bool, address: &str) -> Self {
        let vars = [
            ("SHARDLOCK_TEST_URL", server.url()),
            ("SHARDLOCK_TEST_ADDRESS", address.to_owned()),
            ("SHARDLOCK_TEST_FIRST", is_first.to_string()),
        ];
        let worker = worker::spawn("load", &vars.each_ref().map(|(name, value)| (*name, value.as_str())));
        let address = worker.line();
        Self { worker, address }
    }

    /// The process as the view names it.
    pub(crate) fn process(&self) -> String {
        format!(
            "{}-{}",
            rustix::system::uname().nodename().to_string_lossy(),
            self.worker.pid()
        )
    }

    /// Waits until the tasks have acquired some more locks.
    #[track_caller]
    pub(crate) fn wait_for_progress(&mut self) {
        self.worker.send("continue");
        assert_eq!(self.worker.line(), "continued");
    }
}

pub(crate) fn run(me: &Current) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let address = me.var("SHARDLOCK_TEST_ADDRESS").parse().unwrap();
        let admin = Admin::bind_with(address, String::new).unwrap();
        let builder = LockManager::builder().named_shard("eu-1", me.var("SHARDLOCK_TEST_URL"));
        // A busy machine may stall the server, this process or both for a second.
        let builder = builder
            .ttl(Duration::from_secs(3))
            .store_timeout(Duration::from_millis(2_500));
        let locks = builder.connect().await.unwrap();
        let server = admin.serve(&locks).unwrap();
        let turns = Arc::new(AtomicU64::new(0));
        for (key, tasks, hold) in WANTED {
            for _ in 0..tasks {
                tokio::spawn(fight(
                    locks.clone(),
                    key,
                    Duration::from_millis(hold),
                    Arc::clone(&turns),
                ));
            }
        }
        me.send(server.address().to_string());
        let held = if me.var("SHARDLOCK_TEST_FIRST") == "true" {
            let stuck = locks.lock(STUCK).await.unwrap();
            Some((stuck, locks.lock(QUIET).await.unwrap()))
        } else {
            None
        };
        for _ in 0..WAITING {
            tokio::spawn(locks.lock(STUCK).into_future());
        }
        let me = me.clone();
        let hearing = tokio::task::spawn_blocking(move || {
            while me.recv().is_some() {
                let before = turns.load(Ordering::Relaxed);
                wait_until("locks are acquired", PATIENCE, || {
                    turns.load(Ordering::Relaxed) > before + 50
                });
                me.send("continued");
            }
        });
        hearing.await.unwrap();
        drop(held);
    });
    // Some tasks are still waiting, so exit without joining them.
    std::process::exit(0);
}

async fn fight(locks: LockManager, key: &'static str, hold: Duration, turns: Arc<AtomicU64>) {
    loop {
        let began = Instant::now();
        let Ok(guard) = locks.lock(key).await else {
            continue;
        };
        turns.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(hold).await;
        drop(guard);
        // Work without the lock, so that not every lock is contended.
        tokio::time::sleep(began.elapsed().min(hold)).await;
    }
}
