//! Probes a shard every few seconds: whether it accepts locks, whether it still knows its waiters,
//! and whether the clocks of its servers have jumped.

use std::sync::Arc;
use std::time::Duration;

use super::server_clock::Clocks;
use super::{Shard, queue_check};
use crate::store::Health;
use crate::text::printable;

/// The interval between probes.
const PROBE_EVERY: Duration = Duration::from_secs(3);
/// The shortest interval between probes after a refused request.
const PROBE_EVERY_MIN: Duration = Duration::from_millis(500);

/// Probes for as long as the thread lives, even if no locks are taken.
pub(super) async fn watch(shard: Arc<Shard>) {
    let mut clocks = Clocks::default();
    loop {
        tokio::time::sleep(PROBE_EVERY_MIN).await;
        tokio::select! {
            () = tokio::time::sleep(PROBE_EVERY - PROBE_EVERY_MIN) => {}
            () = shard.reach.probe_now.notified() => {}
        }
        let health = tokio::time::timeout(shard.manager.timeout, shard.store.probe()).await;
        let health = health.unwrap_or_else(|_| Health {
            reached: Err(shard.no_answer()),
            times: Vec::new(),
        });
        shard.note_probe(&health.reached);
        shard.note_map(&health.reached);
        if let Err(error) = &health.reached {
            crate::log::debug!(shard = %shard.name, %error, "the health probe of the shard failed");
        }
        for (server, seconds) in clocks.on_probe(&health) {
            shard.metrics.clock_jumps.increment(1);
            crate::log::warn!(shard = %shard.name, server = %printable(&server), seconds, "the server's clock has jumped; leases on it may end early or late");
        }
        if health.reached.is_ok() {
            queue_check::check(&shard).await;
        }
        if let Some(drift) = clocks.largest_drift() {
            shard.metrics.clock_drift.set(drift);
        }
    }
}
