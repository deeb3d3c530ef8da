//! A caller of a partner's API, which serves a fixed number of calls at once and refuses more.
//!
//! The partner is simulated: it counts the calls in progress with a counter of its own. It protects
//! itself only, so without permits the callers have to deal with its refusals.

use std::time::Duration;

use deadpool_redis::redis::cmd;
use tokio::time::sleep;

use super::protocol::{CallCounts, PARTNER_LOCK};
use super::worker::Worker;

/// How many calls each task makes.
pub(super) const CALLS_PER_TASK: u32 = 4;

/// How long the partner works on a call.
const CALL_TIME: Duration = Duration::from_millis(5);

/// Makes all calls of one task, with or without permits. A refused call is not repeated.
pub(super) async fn call(worker: &Worker, with_permits: bool) -> anyhow::Result<CallCounts> {
    let mut counts = CallCounts::default();
    for _ in 0..CALLS_PER_TASK {
        if with_permits {
            let limit = worker.partner_limit;
            let permit = worker.locks.permits(PARTNER_LOCK, limit).class("calls").await?;
            call_once(worker, &mut counts).await?;
            permit.release().await?;
        } else {
            call_once(worker, &mut counts).await?;
        }
        worker.count_done();
    }
    Ok(counts)
}

/// One call, as the partner sees it.
async fn call_once(worker: &Worker, counts: &mut CallCounts) -> anyhow::Result<()> {
    let calls_key = worker.names.calls();
    let at_once: u64 = {
        let mut data = worker.data().await?;
        cmd("INCR").arg(&calls_key).query_async(&mut data).await?
    };
    counts.most_at_once = counts.most_at_once.max(at_once);
    if at_once <= u64::from(worker.partner_limit) {
        sleep(CALL_TIME).await;
        counts.served += 1;
    } else {
        counts.refused += 1;
    }
    let mut data = worker.data().await?;
    Ok(cmd("DECR").arg(&calls_key).exec_async(&mut data).await?)
}

/// The sum over several tasks or processes.
pub(super) fn sum(counts: impl IntoIterator<Item = CallCounts>) -> CallCounts {
    counts
        .into_iter()
        .fold(CallCounts::default(), |sum, counts| CallCounts {
            served: sum.served + counts.served,
            refused: sum.refused + counts.refused,
            most_at_once: sum.most_at_once.max(counts.most_at_once),
        })
}
