//! The jobs: each takes the lock of its key, reads the key's counter, and writes it back with one more.
//!
//! Nothing here is atomic on the server, so that two holders at the same time would lose an update sooner or later.

use deadpool_redis::redis::cmd;
use hdrhistogram::Histogram;
use tokio::time::Instant;

use super::protocol::Worked;
use super::worker::Workplace;

/// What the metrics count jobs under.
pub(super) const CLASS: &str = "jobs";

/// How skewed the keys are.
pub(super) const ZIPF_EXPONENT: f64 = 1.1;

/// How exact the histograms of the waits are.
pub(super) const SIGNIFICANT_DIGITS: u8 = 3;

/// What one task did.
pub(super) struct Tally {
    completed: u64,
    token_regressions: u64,
    waits: Histogram<u64>,
}

/// Does one job after the other until the time is over.
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
        // Not `saturating_record`: that never makes the histogram wider.
        tally.waits.record(u64::try_from(waited)?)?;

        // Commands that the lock itself never uses, so that the server counts the two apart.
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

/// All tasks of a worker together.
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
