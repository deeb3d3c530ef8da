//! The load for dashboards and for `shardlock top`: several classes of work that want locks in different ways, for as long as it is let.
//!
//! Every way a lock can be had, and most in which it is not, happens now and then. Nothing that goes wrong ends the load: an operator tries out
//! on it what a fault looks like.

use std::sync::Arc;
use std::time::Duration;

use rand::Rng;
use rand::distr::uniform::SampleRange;
use shardlock::{Config, LockError, LockGuard};
use tokio::time::sleep;

use super::worker::Workplace;

/// How many keys the customers of the sale fight over.
const SALE_KEYS: u32 = 2;
/// How many reports there are to be written.
const REPORTS: u32 = 8;
/// How many jobs start by the clock, in every process at once.
const CRON_JOBS: u32 = 4;
/// How many users there are, each with a key that hardly anybody else wants.
const USERS: u32 = 100_000;
/// A user who was there a moment ago may well come again, and to the same process.
const USER_LINGERS: Duration = Duration::from_secs(1);

/// How patient a customer is, in milliseconds: some give up before it is their turn.
const PATIENCE_MS: std::ops::RangeInclusive<u64> = 1..=200;
/// How long a piece of work takes, in microseconds.
const WORK_US: std::ops::Range<u64> = 500..4_000;
/// How long a task rests after each piece of work, in microseconds: the machine is not to be full of the load alone.
const REST_US: std::ops::Range<u64> = 5_000..40_000;
/// How long a task rests after a failure, in microseconds.
const REST_AFTER_FAILURE_US: std::ops::Range<u64> = 20_000..80_000;

/// One in so many tasks of a process may wait for one key; more are refused.
const WAITERS_PER_KEY_PART: u32 = 8;

/// The TTL where the load has its own servers: short, so that what a fault does shows soon, and so that the nodes of its quorum,
/// which have just been started, soon have a vote.
pub(super) const TTL: Duration = Duration::from_secs(3);

/// How many waiters a key may have in a process with so many tasks.
pub(super) fn waiters_per_key_max(tasks: u32) -> usize {
    (tasks / WAITERS_PER_KEY_PART).max(1) as usize
}

/// What a task does, again and again.
#[derive(Debug, Clone, Copy)]
enum Work {
    /// A few customers fight over a few keys, and give up after a while.
    Sale,
    /// A key of many, a few of which are much wanted.
    Job,
    /// A lock that is held for longer than its TTL, and so renewed.
    Report,
    /// A single try at what others may do as well.
    Cron,
    /// A key that nobody else wants, without a class.
    User,
}

impl Work {
    /// Every process has some of each kind if it has eight tasks.
    const fn of(task: u32) -> Self {
        match task % 8 {
            0 => Self::Report,
            1 => Self::Cron,
            2 | 3 => Self::Sale,
            4 => Self::User,
            _ => Self::Job,
        }
    }
}

/// Works for ever. The number says what.
pub(super) async fn run(place: Arc<Workplace>, task: u32) {
    let work = Work::of(task);
    loop {
        match once(&place, work).await {
            Ok(()) => {
                place.count();
                rest(REST_US).await;
            }
            // The metrics count it, and that is what the load is for.
            Err(error) => {
                tracing::debug!(%error, ?work, "a lock was not had or not given back");
                rest(REST_AFTER_FAILURE_US).await;
            }
        }
    }
}

async fn once(place: &Workplace, work: Work) -> Result<(), LockError> {
    let locks = &place.locks;
    match work {
        Work::Sale => {
            let key = format!("sale:{}", random(1..=SALE_KEYS));
            let patience = Duration::from_millis(random(PATIENCE_MS));
            let guard = locks.lock(&key).class("sale").timeout(patience).await?;
            hold(guard, micros(WORK_US)).await
        }
        Work::Job => {
            let key = format!("job:{}", place.mix.next_rank());
            let guard = locks.lock(&key).class("jobs").timeout(place.ttl).await?;
            hold(guard, micros(WORK_US)).await
        }
        Work::Report => {
            let key = format!("report:{}", random(1..=REPORTS));
            let guard = locks.lock(&key).class("reports").timeout(place.ttl).await?;
            hold(guard, place.ttl.mul_f64(random(0.2..1.2))).await
        }
        Work::Cron => {
            let key = format!("cron:{}", random(1..=CRON_JOBS));
            match locks.try_lock(&key).class("cron").await? {
                Some(guard) => hold(guard, 10 * micros(WORK_US)).await,
                None => Ok(()),
            }
        }
        Work::User => {
            let key = format!("user:{}", random(1..=USERS));
            let guard = locks.lock(&key).timeout(place.ttl).linger(USER_LINGERS).await?;
            hold(guard, micros(WORK_US)).await
        }
    }
}

/// Works under the lock for so long, or until the lock is lost.
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

fn micros(range: std::ops::Range<u64>) -> Duration {
    Duration::from_micros(random(range))
}

async fn rest(range: std::ops::Range<u64>) {
    sleep(micros(range)).await;
}

/// The settings of the load's managers that are not those of the environment.
pub(super) fn settings(config: &mut Config, tasks: u32, are_servers_ours: bool) {
    config.hot_key_metrics = true;
    config.max_waiters_per_key = waiters_per_key_max(tasks);
    if are_servers_ours {
        config.ttl = TTL;
        config.redlock_max_ttl = TTL;
    }
}
