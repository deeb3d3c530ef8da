//! Whether a node of a quorum may vote.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crate::clock::Moment;
use crate::store::StoreError;

/// Voting rights of a server after a restart. A restarted server may have forgotten leases, so it
/// may not vote until the longest of them has expired.
#[derive(Debug)]
pub(super) struct VoteEligibility {
    max_ttl: Duration,
    /// The moment from which the server may vote, in nanoseconds. Never decreases, since a later
    /// connection can only reveal later restarts.
    vote_from: AtomicU64,
    known: AtomicBool,
}

impl VoteEligibility {
    pub(super) const fn new(max_ttl: Duration) -> Self {
        Self {
            max_ttl,
            vote_from: AtomicU64::new(0),
            known: AtomicBool::new(false),
        }
    }

    /// Parses the reply to `INFO server`, which was requested at `asked_at` on a new connection.
    pub(super) fn learn(&self, asked_at: Moment, info: Option<&str>) -> Result<(), StoreError> {
        let uptime = info.and_then(|info| {
            let line = info.lines().find_map(|line| line.strip_prefix("uptime_in_seconds:"));
            line?.trim().parse().ok().map(Duration::from_secs)
        });
        let Some(uptime) = uptime else {
            return Err(StoreError::Refused(
                "INFO server reports no uptime_in_seconds, which is required to decide whether the node may vote"
                    .into(),
            ));
        };
        // The uptime is a difference of the server's wall clock: setting that clock forward makes
        // the server look older than it is. Both times are truncated to seconds, so the real uptime
        // may be a second less.
        let missing = (self.max_ttl + Duration::from_secs(1)).saturating_sub(uptime);
        // If the server has run long enough, its uptime does not postpone the vote.
        if !missing.is_zero() {
            self.vote_from
                .fetch_max((asked_at + missing).as_nanos(), Ordering::AcqRel);
        }
        self.known.store(true, Ordering::Release);
        Ok(())
    }

    pub(super) fn has_vote(&self) -> bool {
        self.known.load(Ordering::Acquire) && Moment::now().as_nanos() >= self.vote_from.load(Ordering::Acquire)
    }

    /// Grants or revokes the right to vote, until a new connection reports the server's uptime.
    #[cfg(test)]
    pub(super) fn set(&self, has: bool) {
        let from = if has { 0 } else { u64::MAX };
        self.vote_from.store(from, Ordering::Release);
        self.known.store(true, Ordering::Release);
    }
}
