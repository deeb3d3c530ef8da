//! The jobs: each takes the lock of its key, reads the key's counter, and writes it back plus one.
//!
//! The read and the write are separate requests, so two holders at a time would sooner or later
//! lose an update.

use deadpool_redis::redis::cmd;
use hdrhistogram::Histogram;
use tokio::time::Instant;

use super::protocol::JobCounts;
use super::worker::Worker;

/// The class of the jobs in the metrics.
pub(super) const CLASS: &str = "jobs";

/// The exponent of the keys' Zipf distribution.
pub(super) const ZIPF_EXPONENT: f64 = 1.1;

/// The precision of the histograms of waits.
pub(super) const SIGNIFICANT_DIGITS: u8 = 3;

/// The result of one task.
pub(super) struct TaskCounts {
    completed: u64,
    token_regressions: u64,
    waits: Histogram<u64>,
}

/// Runs jobs until `until`.
pub(super) async fn run_jobs(worker: &Worker, until: Instant) -> anyhow::Result<TaskCounts> {
    let mut counts = TaskCounts {
        completed: 0,
        token_regressions: 0,
        waits: Histogram::new(SIGNIFICANT_DIGITS)?,
    };
    while Instant::now() < until {
        let rank = worker.key_distribution.next_rank();
        let key = format!("job:{rank}");
        let requested_at = Instant::now();
        let guard = worker.locks.lock(&key).class(CLASS).await?;
        let waited = requested_at.elapsed().as_micros();
        // Not `saturating_record`, which never widens the histogram.
        counts.waits.record(u64::try_from(waited)?)?;

        // The lock never uses these commands, so the server counts the two separately.
        let mut data = worker.data_of(&key).await?;
        let counter = worker.names.job(rank);
        let mut read = cmd("HMGET");
        read.arg(&counter).arg("done").arg("token");
        let (done, last_token): (Option<u64>, Option<u64>) = read.query_async(&mut data).await?;
        let token = guard.token().get();
        if last_token.is_some_and(|last_token| token <= last_token) {
            counts.token_regressions += 1;
        }
        tokio::task::yield_now().await;
        let mut write = cmd("HSET");
        write
            .arg(&counter)
            .arg("done")
            .arg(done.unwrap_or(0) + 1)
            .arg("token")
            .arg(token);
        write.exec_async(&mut data).await?;

        counts.completed += 1;
        worker.count_done();
        guard.release().await?;
    }
    Ok(counts)
}

/// The sum over all tasks of a worker.
pub(super) fn sum(counts: Vec<TaskCounts>) -> anyhow::Result<JobCounts> {
    let mut waits = Histogram::<u64>::new(SIGNIFICANT_DIGITS)?;
    let mut sum = JobCounts::default();
    for counts in counts {
        sum.completed += counts.completed;
        sum.token_regressions += counts.token_regressions;
        waits.add(counts.waits)?;
    }
    let recorded = waits.iter_recorded();
    sum.waits = recorded
        .map(|step| (step.value_iterated_to(), step.count_at_value()))
        .collect();
    Ok(sum)
}
