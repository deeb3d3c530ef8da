//! Whether a shard replies and accepts locks, and the log lines about its outages.
//!
//! # Implementation details
//!
//! There may be hundreds of thousands of replies per second, so while all is well a reply costs
//! only one load of a flag. A shard where some requests succeed and others fail, such as a cluster
//! with one node down, remains in the same outage until nothing has failed for [`QUIET`]. Each
//! outage has one log line when it begins and one when it is over. An outage that begins within
//! [`SELDOM`] of the last such line is only counted, unless it outlasts that time.
//!
//! A server that is out of memory, or rejects writes for another reason, still replies to reads and
//! renewals. So only the health probe reveals whether it accepts locks. The probe runs every few
//! seconds, and soon after a request was refused.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::clock::Moment;
use crate::store::StoreError;
use crate::text::{printable, shortened};

/// How long no request may fail before an outage is over.
const QUIET: Duration = Duration::from_secs(1);
/// The shortest interval between two log lines about the beginning of an outage.
const SELDOM: Duration = Duration::from_secs(10);

/// The most bytes of a server's error that are kept as the reason of an outage.
const REASON_BYTES_MAX: usize = 300;

/// See the module documentation.
#[derive(Debug, Default)]
pub(super) struct Reach {
    /// Whether an outage is in progress.
    is_down: AtomicBool,
    /// Whether the last health probe was refused.
    refuses: AtomicBool,
    /// Triggers a health probe.
    pub(super) probe_now: Notify,
    log: Mutex<Log>,
}

#[derive(Debug, Default)]
struct Log {
    outage: Option<ShardOutage>,
    /// When the beginning of an outage was last logged.
    logged_at: Option<Moment>,
    /// The number of outages not logged since.
    suppressed: u64,
}

#[derive(Debug)]
struct ShardOutage {
    since: Moment,
    /// Why the last request failed.
    reason: String,
    failed_at: Moment,
    /// The first reply since the last failure.
    answered_at: Option<Moment>,
    failures: u64,
    is_logged: bool,
}

/// A shard that does not reply or refuses locks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Down {
    pub(crate) since: Moment,
    /// Why the last request failed, with control characters escaped.
    pub(crate) reason: String,
}

/// A line of the log.
#[derive(Debug, PartialEq)]
enum Line {
    Down { suppressed: u64 },
    Up { down_for: Duration, failures: u64 },
}

impl Log {
    fn failed(&mut self, reason: &str, now: Moment) -> Option<Line> {
        let is_new = self.outage.is_none();
        let reason = shortened(reason, REASON_BYTES_MAX);
        let outage = self.outage.get_or_insert_with(|| ShardOutage {
            since: now,
            reason: reason.to_owned(),
            failed_at: now,
            answered_at: None,
            failures: 0,
            is_logged: false,
        });
        outage.failed_at = now;
        outage.answered_at = None;
        if outage.reason != reason {
            reason.clone_into(&mut outage.reason);
        }
        outage.failures += 1;
        if outage.is_logged {
            return None;
        }
        if self.logged_at.is_some_and(|last| now.since(last) < SELDOM) {
            self.suppressed += u64::from(is_new);
            return None;
        }
        outage.is_logged = true;
        self.logged_at = Some(now);
        // This outage may have been counted as well.
        let suppressed = std::mem::take(&mut self.suppressed) - u64::from(!is_new);
        Some(Line::Down { suppressed })
    }

    /// Returns whether the outage is over or there is none, and the log line if its beginning was
    /// logged.
    fn answered(&mut self, now: Moment) -> (bool, Option<Line>) {
        let Some(outage) = &mut self.outage else {
            return (true, None);
        };
        let answered_at = *outage.answered_at.get_or_insert(now);
        if now.since(outage.failed_at) < QUIET {
            return (false, None);
        }
        let line = outage.is_logged.then(|| Line::Up {
            down_for: answered_at.since(outage.since),
            failures: outage.failures,
        });
        self.outage = None;
        (true, line)
    }
}

impl Reach {
    /// Records the result of a request or health probe. Returns whether the shard is up, as far as
    /// is known.
    pub(super) fn note<T>(&self, shard: &Arc<str>, reply: &Result<T, StoreError>) -> bool {
        match reply {
            Ok(_) if !self.is_down.load(Ordering::Relaxed) => true,
            Ok(_) => {
                self.answered(shard);
                !self.refuses.load(Ordering::Relaxed)
            }
            Err(StoreError::Unavailable(reason)) => {
                self.failed(shard, reason);
                false
            }
            // The refusal may concern a single key; a health probe finds out.
            Err(StoreError::Refused(_) | StoreError::MapMismatch { .. }) => {
                self.probe_now.notify_one();
                !self.refuses.load(Ordering::Relaxed)
            }
        }
    }

    /// Records the result of a health probe, which executes a request that every lock needs.
    pub(super) fn on_probe(&self, shard: &Arc<str>, reached: &Result<(), StoreError>) -> bool {
        let refusal = match reached {
            Err(error @ (StoreError::Refused(_) | StoreError::MapMismatch { .. })) => Some(error.reason()),
            Ok(()) | Err(StoreError::Unavailable(_)) => None,
        };
        self.refuses.store(refusal.is_some(), Ordering::Relaxed);
        match refusal {
            Some(reason) => {
                self.failed(shard, &reason);
                false
            }
            None => self.note(shard, reached),
        }
    }

    /// The outage in progress, if there is one.
    pub(super) fn down(&self) -> Option<Down> {
        if !self.is_down() {
            return None;
        }
        let log = self.log.lock();
        log.outage.as_ref().map(|outage| Down {
            since: outage.since,
            reason: printable(&outage.reason).into_owned(),
        })
    }

    /// Whether the shard does not reply, or refuses locks.
    pub(super) fn is_down(&self) -> bool {
        self.is_down.load(Ordering::Relaxed)
    }

    #[cold]
    fn failed(&self, shard: &Arc<str>, reason: &str) {
        let line = {
            let mut log = self.log.lock();
            self.is_down.store(true, Ordering::Relaxed);
            log.failed(reason, Moment::now())
        };
        if let Some(Line::Down { suppressed }) = line {
            crate::log::warn!(%shard, reason, suppressed, "the shard is down: its locks can't be acquired or renewed until it is back");
        }
    }

    #[cold]
    fn answered(&self, shard: &Arc<str>) {
        // A server that refuses locks keeps replying to other requests.
        if self.refuses.load(Ordering::Relaxed) {
            return;
        }
        let line = {
            let mut log = self.log.lock();
            let (is_over, line) = log.answered(Moment::now());
            self.is_down.store(!is_over, Ordering::Relaxed);
            line
        };
        if let Some(Line::Up { down_for, failures }) = line {
            let down_for = humantime::format_duration(Duration::from_millis(
                u64::try_from(down_for.as_millis()).unwrap_or(u64::MAX),
            ));
            // Same level as the line about the beginning, so that no filter shows only one of them.
            crate::log::warn!(%shard, %down_for, failed_requests = failures, "the shard is back");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> Moment {
        Moment::from_nanos(millis * 1_000_000)
    }

    #[test]
    fn outage_is_logged_once_at_its_start_and_once_at_its_end() {
        let mut log = Log::default();
        assert_eq!(log.answered(at(0)), (true, None));
        assert_eq!(log.failed("away", at(1_000)), Some(Line::Down { suppressed: 0 }));
        for millis in (1_100..4_000).step_by(100) {
            assert_eq!(log.failed("away", at(millis)), None);
            // Another node replies.
            assert_eq!(log.answered(at(millis)), (false, None));
        }
        assert_eq!(log.answered(at(4_000)), (false, None));
        let (down_for, failures) = (Duration::from_millis(2_900), 30);
        assert_eq!(log.answered(at(4_900)), (true, Some(Line::Up { down_for, failures })));
        assert_eq!(log.answered(at(5_000)), (true, None));
    }

    #[test]
    fn outages_that_follow_each_other_quickly_are_counted() {
        let mut log = Log::default();
        assert_eq!(log.failed("away", at(1_000)), Some(Line::Down { suppressed: 0 }));
        for second in [3, 5, 7] {
            assert!(log.answered(at(second * 1_000)).0);
            assert_eq!(log.failed("away", at(second * 1_000 + 500)), None);
        }
        // The last outage outlasts the interval, so it is logged.
        assert_eq!(log.failed("away", at(11_000)), Some(Line::Down { suppressed: 2 }));
        assert!(matches!(log.answered(at(12_000)), (true, Some(Line::Up { .. }))));
    }
}
