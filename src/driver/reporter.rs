//! Periodic work of the background thread: flushes metrics to the recorder, inspects all keys for
//! the gauges by class, and detects stalls of the thread itself.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use super::entry::HeldSnapshot;
use super::{ManagerContext, Shard};
use crate::clock::Moment;
use crate::engine::WaiterOptions;
use crate::mode::LockMode;
use crate::telemetry::{ClassSnapshot, ManagerMetrics};

/// How often new values are flushed to the recorder.
const FLUSH_EVERY: Duration = Duration::from_millis(100);
/// How late the timer must fire to count as a stall.
const STALL_MIN: Duration = Duration::from_millis(100);
/// How often all keys are inspected. Less often if one pass takes more than a hundredth of this.
const INSPECT_EVERY_MIN: Duration = Duration::from_secs(1);

/// Runs for as long as the thread lives.
pub(super) async fn report(manager: Arc<ManagerContext>, shards: Rc<[Arc<Shard>]>) {
    let metrics = &manager.metrics;
    let mut last = Moment::now();
    let mut inspect_at = last;
    loop {
        tokio::time::sleep(FLUSH_EVERY).await;
        let now = Moment::now();
        let elapsed = now.since(last);
        let late = elapsed.saturating_sub(FLUSH_EVERY);
        if late > STALL_MIN {
            metrics.stalled(late);
            crate::log::warn!(
                ?late,
                "the background thread stalled; if that lasts for a TTL, locks are lost"
            );
        }
        metrics.classes.adjust(elapsed);
        shards.iter().for_each(|shard| shard.metrics.adjust(elapsed));
        flush(metrics, &shards);
        if now >= inspect_at {
            shards.iter().for_each(inspect_all_keys);
            manager.slow_log.flush(now);
            manager.hot.decay(now);
            inspect_at = now + INSPECT_EVERY_MIN.max(Moment::now().since(now) * 100);
        }
        // Do not count the time of this pass as a stall.
        last = Moment::now();
    }
}

/// Flushes new values to the recorder.
pub(crate) fn flush(metrics: &ManagerMetrics, shards: &[Arc<Shard>]) {
    metrics.classes.flush();
    shards.iter().for_each(|shard| shard.metrics.flush());
}

/// Inspects all keys: finds the oldest guard and waiter, counts guards and permits by class, and
/// logs guards that are held for too long.
fn inspect_all_keys(shard: &Arc<Shard>) {
    let now = Moment::now();
    let mut oldest_waiter = Duration::ZERO;
    let mut by_class = ByClass::default();
    let slow_wait = shard.manager.slow_log.slow_wait_bound();
    let (mut slow, mut slowest) = (0, None);
    for entry in shard.entries() {
        let seen = entry.snapshot(now);
        for held in &seen.held {
            by_class.add_guard(held);
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
            entry.each_wait(now, |options, wait| by_class.add_waiter(options, wait));
        }
        by_class.end_key();
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
    // Read after the inspection, so that it has the names of all classes that were seen.
    let classes = shard.manager.metrics.classes.names();
    shard.metrics.set_by_class(&by_class.classes, &classes);
}

/// What the keys seen so far show of each class, by its number.
#[derive(Debug, Default)]
struct ByClass {
    classes: Vec<ClassSnapshot>,
    /// For the current key, the smallest limit that each class states for its permits.
    limits: Vec<(u16, u16)>,
}

impl ByClass {
    fn of(&mut self, class: u16) -> &mut ClassSnapshot {
        let number = usize::from(class);
        if self.classes.len() <= number {
            self.classes.resize(number + 1, ClassSnapshot::default());
        }
        &mut self.classes[number]
    }

    fn add_guard(&mut self, held: &HeldSnapshot) {
        let mode = held.cycle.mode();
        let of_class = self.of(held.class);
        of_class.oldest_guard = of_class.oldest_guard.max(held.age);
        // The class of a guard is known once its task has collected it, which is immediately.
        if held.caller.is_some() {
            of_class.guards[mode.kind()] += 1;
            of_class.permits += u64::from(mode.weight());
            self.note_limit(held.class, mode);
        }
    }

    fn add_waiter(&mut self, options: &WaiterOptions, wait: Duration) {
        let of_class = self.of(options.class);
        of_class.oldest_waiter = of_class.oldest_waiter.max(wait);
        self.note_limit(options.class, options.mode);
    }

    fn note_limit(&mut self, class: u16, mode: LockMode) {
        let LockMode::Permits { limit, .. } = mode else { return };
        match self.limits.iter_mut().find(|(known, _)| *known == class) {
            Some((_, known)) => *known = limit.min(*known),
            None => self.limits.push((class, limit)),
        }
    }

    /// Adds the limits of the current key to those of the keys before it.
    fn end_key(&mut self) {
        while let Some((class, limit)) = self.limits.pop() {
            self.of(class).permits_limit += u64::from(limit);
        }
    }
}
