//! The load for dashboards and for `shardlock top`: several classes of work that use locks in
//! different ways, until it is stopped.
//!
//! Every way to acquire a lock, and most ways to fail to, occur now and then. Failures never end
//! the load, so that operators can use it to see what a fault looks like.

use std::sync::Arc;
use std::time::Duration;

use rand::Rng;
use rand::distr::uniform::SampleRange;
use shardlock::config::Config;
use shardlock::{LockError, LockGuard, LockKey, LockManager};
use tokio::time::sleep;

use super::worker::Worker;

/// The number of keys that the customers of the sale compete for.
const SALE_KEYS: u32 = 2;
/// The number of reports.
const REPORTS: u32 = 8;
/// The number of jobs that start at the same time in every process.
const CRON_JOBS: u32 = 4;
/// The number of users, each with a key that is rarely contended.
const USERS: u32 = 100_000;
/// A user who has just been served may return, and to the same process.
const USER_LINGERS: Duration = Duration::from_secs(1);

/// One in this many uses of the price list changes it.
const PRICE_CHANGE_PART: u32 = 20;
/// How many mails may be sent at a time.
const MAIL_PERMITS: u16 = 2;
/// How many keys are tried to find one on a shard that has all modes.
const KEYS_TRIED: u32 = 1_000;

/// How long a customer waits, in milliseconds: some give up before their turn.
const PATIENCE_MS: std::ops::RangeInclusive<u64> = 1..=200;
/// How long a piece of work takes, in microseconds.
const WORK_US: std::ops::Range<u64> = 500..4_000;
/// How long a task rests after each piece of work, in microseconds: the load must not saturate the
/// machine.
const PAUSE_US: std::ops::Range<u64> = 5_000..40_000;
/// How long a task rests after a failure, in microseconds.
const PAUSE_AFTER_FAILURE_US: std::ops::Range<u64> = 20_000..80_000;

/// One in this many tasks of a process may wait for a key; further ones are refused.
const WAITERS_PER_KEY_PART: u32 = 8;

/// The TTL if the load starts its own servers: short, so that the effects of a fault show soon, and
/// so that the quorum's freshly started nodes soon have a vote.
pub(super) const TTL: Duration = Duration::from_secs(3);

/// The maximum number of waiters per key in a process with this many tasks.
pub(super) fn waiters_per_key_max(tasks: u32) -> usize {
    (tasks / WAITERS_PER_KEY_PART).max(1) as usize
}

/// The work that a task repeats.
#[derive(Debug, Clone)]
enum Work {
    /// A few keys with many customers, who give up after a while.
    Sale,
    /// One of many keys, a few of which are hot.
    Job,
    /// A lock that may be held for longer than its TTL, and so is renewed.
    Report,
    /// A single try at a job that any process may run.
    Cron,
    /// A key that is hardly ever contended, without a class.
    User,
    /// The key of a price list with many readers and few writers.
    Prices(String),
    /// The key of a server that takes a few mails at a time.
    Mail(String),
}

impl Work {
    /// A process with eight tasks has each kind of work. If no shard has shared locks and permits,
    /// the tasks that would use them have jobs.
    fn of(task: u32, locks: &LockManager) -> Self {
        match task % 8 {
            0 => Self::Report,
            1 => Self::Cron,
            2 | 3 => Self::Sale,
            4 => Self::User,
            5 => Self::Job,
            6 => key_with_modes(locks, "prices").map_or(Self::Job, Self::Prices),
            _ => key_with_modes(locks, "mail").map_or(Self::Job, Self::Mail),
        }
    }
}

/// A key with this name on a shard that has all modes, if there is one.
fn key_with_modes(locks: &LockManager, name: &str) -> Option<String> {
    let shards = locks.shard_states();
    let has_modes = |key: &String| {
        let index = LockKey::new(key).map(|key| locks.shard_map().index(key.slot()));
        let shard = index.ok().and_then(|index| shards.get(index));
        shard.is_some_and(|shard| !shard.kind.starts_with("redlock"))
    };
    (0..KEYS_TRIED).map(|number| format!("{name}:{number}")).find(has_modes)
}

/// Runs the work of this task forever.
pub(super) async fn run(worker: Arc<Worker>, task: u32) {
    let work = Work::of(task, &worker.locks);
    loop {
        match lock_once(&worker, &work).await {
            Ok(()) => {
                worker.count_done();
                pause(PAUSE_US).await;
            }
            // The metrics count failures, which is the purpose of the load.
            Err(error) => {
                tracing::debug!(%error, ?work, "a lock was not acquired or not released");
                pause(PAUSE_AFTER_FAILURE_US).await;
            }
        }
    }
}

async fn lock_once(worker: &Worker, work: &Work) -> Result<(), LockError> {
    let locks = &worker.locks;
    match work {
        Work::Sale => {
            let key = format!("sale:{}", random(1..=SALE_KEYS));
            let patience = Duration::from_millis(random(PATIENCE_MS));
            let guard = locks.lock(&key).class("sale").timeout(patience).await?;
            hold(guard, random_micros(WORK_US)).await
        }
        Work::Job => {
            let key = format!("job:{}", worker.key_distribution.next_rank());
            let guard = locks.lock(&key).class("jobs").timeout(worker.ttl).await?;
            hold(guard, random_micros(WORK_US)).await
        }
        Work::Report => {
            let key = format!("report:{}", random(1..=REPORTS));
            let guard = locks.lock(&key).class("reports").timeout(worker.ttl).await?;
            hold(guard, worker.ttl.mul_f64(random(0.2..1.2))).await
        }
        Work::Cron => {
            let key = format!("cron:{}", random(1..=CRON_JOBS));
            match locks.try_lock(&key).class("cron").await? {
                Some(guard) => hold(guard, 10 * random_micros(WORK_US)).await,
                None => Ok(()),
            }
        }
        Work::User => {
            let key = format!("user:{}", random(1..=USERS));
            let guard = locks.lock(&key).timeout(worker.ttl).linger(USER_LINGERS).await?;
            hold(guard, random_micros(WORK_US)).await
        }
        Work::Prices(key) => {
            let request = locks.lock(key).class("prices").timeout(worker.ttl);
            let is_change = random(0..PRICE_CHANGE_PART) == 0;
            let guard = if is_change {
                request.await?
            } else {
                request.shared().await?
            };
            hold(guard, 4 * random_micros(WORK_US)).await
        }
        Work::Mail(key) => {
            let guard = locks
                .permits(key, MAIL_PERMITS)
                .class("mail")
                .timeout(worker.ttl)
                .await?;
            hold(guard, 10 * random_micros(WORK_US)).await
        }
    }
}

/// Holds the lock for this long, or until it is lost.
async fn hold(guard: LockGuard, time: Duration) -> Result<(), LockError> {
    tokio::select! {
        () = sleep(time) => {}
        _ = guard.lost() => {}
    }
    guard.release().await
}

fn random<T: rand::distr::uniform::SampleUniform>(range: impl SampleRange<T>) -> T {
    rand::rng().random_range(range)
}

fn random_micros(range: std::ops::Range<u64>) -> Duration {
    Duration::from_micros(random(range))
}

async fn pause(range: std::ops::Range<u64>) {
    sleep(random_micros(range)).await;
}

/// The settings of the load's managers that override the environment.
pub(super) fn settings(config: &mut Config, tasks: u32, owns_servers: bool) {
    config.hot_key_metrics = true;
    config.max_waiters_per_key = waiters_per_key_max(tasks);
    if owns_servers {
        config.ttl = TTL;
        config.redlock_max_ttl = TTL;
    }
}
