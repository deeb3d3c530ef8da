//! The pulse of the background thread: tells the recorder what was counted, looks at what is oldest, and notices when the thread
//! itself stood still.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use super::Shard;
use crate::clock::Moment;
use crate::telemetry::ManagerMetrics;

/// How often the recorder is told what is new.
const BEAT: Duration = Duration::from_millis(100);
/// How late the timer may fire before that is a stall.
const STALL_MIN: Duration = Duration::from_millis(100);
/// How often all keys are looked at; more seldom where a look takes more than a hundredth of that.
const LOOK_EVERY_MIN: Duration = Duration::from_secs(1);

/// Beats for as long as the thread lives.
pub(super) async fn pulse(shards: Rc<[Arc<Shard>]>, metrics: Arc<ManagerMetrics>) {
    let mut last = Moment::now();
    let mut look_at = last;
    loop {
        tokio::time::sleep(BEAT).await;
        let now = Moment::now();
        let elapsed = now.since(last);
        let late = elapsed.saturating_sub(BEAT);
        if late > STALL_MIN {
            metrics.stalled(late);
            tracing::warn!(
                ?late,
                "the background thread stood still; if that lasts for a TTL, locks are lost"
            );
        }
        metrics.classes.adjust(elapsed);
        shards.iter().for_each(|shard| shard.metrics.adjust(elapsed));
        tell(&shards, &metrics);
        if now >= look_at {
            shards.iter().for_each(look);
            if let Some(shard) = shards.first() {
                shard.hot.age(now);
            }
            look_at = now + LOOK_EVERY_MIN.max(Moment::now().since(now) * 100);
        }
        // What the beat itself took is no stall of anybody else.
        last = Moment::now();
    }
}

/// Tells the recorder what is new.
pub(crate) fn tell(shards: &[Arc<Shard>], metrics: &ManagerMetrics) {
    metrics.classes.tell();
    shards.iter().for_each(|shard| shard.metrics.tell());
}

/// Finds what is held and waited for the longest, and tells of guards that are held for too long.
fn look(shard: &Arc<Shard>) {
    let now = Moment::now();
    let (mut oldest_lease, mut oldest_waiter) = (Duration::ZERO, Duration::ZERO);
    let slow_wait = shard.notices.slow_wait_bound();
    let (mut slow, mut slowest) = (0, None);
    for entry in shard.entries() {
        let seen = entry.look(now);
        if let Some(held) = &seen.held {
            oldest_lease = oldest_lease.max(held.age);
            let bound = shard.notices.long_hold();
            if let Some(caller) = held.caller
                && bound.is_some_and(|bound| held.age >= bound)
            {
                shard.notices.held_long(held.age, &entry.key, &shard.name, caller);
            }
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
            .notices
            .waits_long(oldest_waiter, &entry.key, &shard.name, waiting, slow);
    }
    shard.metrics.oldest_lease.set(oldest_lease.as_secs_f64());
    shard.metrics.oldest_waiter.set(oldest_waiter.as_secs_f64());
}
