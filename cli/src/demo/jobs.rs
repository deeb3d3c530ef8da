//! The jobs: each takes the lock of its key, reads the key's counter, and writes it back plus one.
//!
//! The read and the write are separate requests, so two holders at a time would sooner or later
//! lose an update.

use deadpool_redis::redis::cmd;
use hdrhistogram::Histogram;
use tokio::time::Instant;

use super::protocol::Worked;
use super::worker::Workplace;

/// The class of the jobs in the metrics.
pub(super) const CLASS: &str = "jobs";

/// The exponent of the keys' Zipf distribution.
pub(super) const ZIPF_EXPONENT: f64 = 1.1;

/// The precision of the histograms of waits.
pub(super) const SIGNIFICANT_DIGITS: u8 = 3;

/// The result of one task.
pub(super) struct Tally {
    completed: u64,
    token_regressions: u64,
    waits: Histogram<u64>,
}

/// Runs jobs until `until`.
pub(super) async fn work(place: &Workplace, until: Instant) -> anyhow::Result<Tally> {
    let mut tally = Tally {
        completed: 0,
        token_regressions: 0,
        waits: Histogram::new(SIGNIFICANT_DIGITS)?,
    };
    while Instant::now() < until {
        let rank = place.mix.next_rank();
        let key = format!("job:{rank}");
        let asked_at = Instant::now();
        let guard = place.locks.lock(&key).class(CLASS).await?;
        let waited = asked_at.elapsed().as_micros();
        // Not `saturating_record`, which never widens the histogram.
        tally.waits.record(u64::try_from(waited)?)?;

        // The lock never uses these commands, so the server counts the two separately.
        let mut data = place.data_of(&key)?;
        let counter = place.names.job(rank);
        let mut read = cmd("HMGET");
        read.arg(&counter).arg("done").arg("token");
        let (done, last_token): (Option<u64>, Option<u64>) = read.query_async(&mut data).await?;
        let token = guard.token().get();
        if last_token.is_some_and(|last_token| token <= last_token) {
            tally.token_regressions += 1;
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

        tally.completed += 1;
        place.count();
        guard.release().await?;
    }
    Ok(tally)
}

/// The sum over all tasks of a worker.
pub(super) fn sum(tallies: Vec<Tally>) -> anyhow::Result<Worked> {
    let mut waits = Histogram::<u64>::new(SIGNIFICANT_DIGITS)?;
    let mut worked = Worked::default();
    for tally in tallies {
        worked.completed += tally.completed;
        worked.token_regressions += tally.token_regressions;
        waits.add(tally.waits)?;
    }
    let recorded = waits.iter_recorded();
    worked.waits = recorded
        .map(|step| (step.value_iterated_to(), step.count_at_value()))
        .collect();
    Ok(worked)
}
