//! A job that tokio-cron-scheduler starts on every host at the same time, and that one host runs.
//!
//! ```sh
//! export SHARDLOCK_SHARDS=redis://127.0.0.1
//! cargo run --package shardlock-examples --bin cron_scheduler
//! ```

use std::env;
use std::time::Duration;

use shardlock::config::Config;
use shardlock::tower::BoxError;
use shardlock::{LockError, LockManager};
use tokio_cron_scheduler::{Job, JobScheduler};

/// The key stays locked for this long after the job was started, even if the job takes 1 ms. Longer
/// than the clocks of the hosts differ, and shorter than the interval of the job.
const MIN_HOLD: Duration = Duration::from_secs(3);

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let locks = LockManager::builder().config(Config::from_env()?).connect().await?;
    // Every five seconds.
    let schedule = env::var("SCHEDULE").unwrap_or_else(|_| "*/5 * * * * *".to_owned());
    let mut scheduler = JobScheduler::new().await?;
    let job_locks = locks.clone();
    let job = Job::new_async(schedule, move |_, _| {
        let locks = job_locks.clone();
        Box::pin(async move {
            match once_per_tick(&locks).await {
                Ok(true) => println!("ran"),
                Ok(false) => println!("skipped"),
                // The job did not run, or not to its end. The next tick is the next attempt.
                Err(error) => eprintln!("the report failed: {error}"),
            }
        })
    })?;
    scheduler.add(job).await?;
    scheduler.start().await?;
    println!("ready");
    tokio::signal::ctrl_c().await?;
    scheduler.shutdown().await?;
    locks.shutdown().await?;
    Ok(())
}

/// Runs the job unless another host runs it, or has run it for this tick.
async fn once_per_tick(locks: &LockManager) -> Result<bool, LockError> {
    let Some(guard) = locks.try_lock("report").min_hold(MIN_HOLD).await? else {
        return Ok(false);
    };
    tokio::select! {
        () = report() => {}
        // The job is cancelled. The release returns the reason.
        _ = guard.lost() => {}
    }
    guard.release().await?;
    Ok(true)
}

/// The job itself.
async fn report() {
    println!("writing the report");
}
