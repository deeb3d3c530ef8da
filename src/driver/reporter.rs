//! Periodic work of the background thread: flushes metrics to the recorder, finds the oldest leases
//! and waiters, and detects stalls of the thread itself.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use super::{ManagerContext, Shard};
use crate::clock::Moment;
use crate::telemetry::{ManagerMetrics, Oldest};

/// How often new values are flushed to the recorder.
const FLUSH_EVERY: Duration = Duration::from_millis(100);
/// How late the timer must fire to count as a stall.
const STALL_MIN: Duration = Duration::from_millis(100);
/// How often all keys are inspected. Less often if one pass takes more than a hundredth of this.
const LOOK_EVERY_MIN: Duration = Duration::from_secs(1);

/// Runs for as long as the thread lives.
pub(super) async fn report(manager: Arc<ManagerContext>, shards: Rc<[Arc<Shard>]>) {
    let metrics = &manager.metrics;
    let mut last = Moment::now();
    let mut look_at = last;
    loop {
        tokio::time::sleep(FLUSH_EVERY).await;
        let now = Moment::now();
        let elapsed = now.since(last);
        let late = elapsed.saturating_sub(FLUSH_EVERY);
        if late > STALL_MIN {
            metrics.stalled(late);
            tracing::warn!(
                ?late,
                "the background thread stalled; if that lasts for a TTL, locks are lost"
            );
        }
        metrics.classes.adjust(elapsed);
        shards.iter().for_each(|shard| shard.metrics.adjust(elapsed));
        flush(metrics, &shards);
        if now >= look_at {
            shards.iter().for_each(look);
            manager.hot.decay(now);
            look_at = now + LOOK_EVERY_MIN.max(Moment::now().since(now) * 100);
        }
        // Do not count the time of this pass as a stall.
        last = Moment::now();
    }
}

/// Flushes new values to the recorder.
pub(crate) fn flush(metrics: &ManagerMetrics, shards: &[Arc<Shard>]) {
    metrics.classes.tell();
    shards.iter().for_each(|shard| shard.metrics.tell());
}

/// Finds the oldest lease and waiter, and logs guards that are held for too long.
fn look(shard: &Arc<Shard>) {
    let now = Moment::now();
    let mut oldest_waiter = Duration::ZERO;
    let mut by_class: Vec<Oldest> = Vec::new();
    let slow_wait = shard.manager.slow_log.slow_wait_bound();
    let (mut slow, mut slowest) = (0, None);
    for entry in shard.entries() {
        let seen = entry.look(now);
        for held in &seen.held {
            let oldest = of_class(&mut by_class, held.class);
            oldest.lease = oldest.lease.max(held.age);
            let bound = shard.manager.slow_log.long_hold();
            if let Some(caller) = held.caller
                && bound.is_some_and(|bound| held.age >= bound)
            {
                shard
                    .manager
                    .slow_log
                    .held_long(held.age, &entry.key, &shard.name, caller);
            }
        }
        if seen.waiting > 0 {
            entry.each_wait(now, |class, wait| {
                let oldest = of_class(&mut by_class, class);
                oldest.waiter = oldest.waiter.max(wait);
            });
        }
        if slow_wait.is_some_and(|bound| seen.longest_wait >= bound) {
            slow += 1;
            if seen.longest_wait > oldest_waiter {
                slowest = Some((entry, seen.waiting));
            }
        }
        oldest_waiter = oldest_waiter.max(seen.longest_wait);
    }
    if let Some((entry, waiting)) = slowest {
        shard
            .manager
            .slow_log
            .still_waits(oldest_waiter, &entry.key, &shard.name, waiting, slow);
    }
    // Later than the look, so that it has the names of all classes that were seen.
    let classes = shard.manager.metrics.classes.names();
    shard.metrics.set_oldest(&by_class, &classes);
}

/// The values of a class, by its number.
fn of_class(by_class: &mut Vec<Oldest>, class: u16) -> &mut Oldest {
    let number = usize::from(class);
    if by_class.len() <= number {
        by_class.resize(number + 1, Oldest::default());
    }
    &mut by_class[number]
}
