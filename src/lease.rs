//! The part of a lease that guards see: how long it is certainly ours, and whether it was lost.

use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::time::timeout;

use crate::clock::Moment;
use crate::error::LossReason;
use crate::protocol::Cycle;
use crate::sync::{AtomicU8, AtomicU64, Ordering};

/// One cycle's hold of a key. Shared by the queue, which extends and ends it, and by the guards
/// under it.
///
/// Reads take no lock. `is_valid` compares with the clock itself, so it is correct even if no timer
/// could fire because the process was paused.
#[derive(Debug)]
pub(crate) struct Lease {
    pub(crate) cycle: Cycle,
    valid_until: AtomicU64,
    /// The most recent TTL, in nanoseconds.
    ttl: AtomicU64,
    /// 0, or 1 + the index of the reason in [`LossReason::ALL`].
    lost: AtomicU8,
    /// Notified once, after `lost` is set.
    loss_notify: Notify,
}

/// The safety margin subtracted from a TTL for clock drift and timer granularity: 1 % plus 2 ms, as
/// in the Redlock specification.
pub(crate) fn drift(ttl: Duration) -> Duration {
    ttl / 100 + Duration::from_millis(2)
}

impl Lease {
    pub(crate) fn new(cycle: Cycle, valid_until: Moment, ttl: Duration) -> Self {
        Self {
            cycle,
            valid_until: AtomicU64::new(valid_until.as_nanos()),
            ttl: AtomicU64::new(nanos(ttl)),
            lost: AtomicU8::new(0),
            loss_notify: Notify::new(),
        }
    }

    pub(crate) fn valid_until(&self) -> Moment {
        Moment::from_nanos(self.valid_until.load(Ordering::Acquire))
    }

    /// Extends the validity. Never shortens it, because the reply to an older renewal may arrive
    /// after that to a newer one.
    pub(crate) fn extend(&self, valid_until: Moment, ttl: Duration) {
        self.ttl.store(nanos(ttl), Ordering::Relaxed);
        self.valid_until.fetch_max(valid_until.as_nanos(), Ordering::AcqRel);
    }

    /// Ends the lease: from now on it is invalid. Only the first reason is kept. Wakes no tasks,
    /// because the caller holds the mutex of the key: [`notify_of_loss`](Self::notify_of_loss) must
    /// be called once the mutex is released.
    pub(crate) fn lose(&self, reason: LossReason) {
        let code = LossReason::ALL.iter().position(|&known| known == reason).unwrap_or(0) as u8 + 1;
        // Later reasons are ignored.
        self.lost
            .compare_exchange(0, code, Ordering::AcqRel, Ordering::Acquire)
            .ok();
    }

    /// Wakes the tasks that wait for the loss. Wakers are foreign code, so no lock may be held.
    pub(crate) fn notify_of_loss(&self) {
        self.loss_notify.notify_waiters();
    }

    /// Why the lease ended, if it did.
    pub(crate) fn loss(&self) -> Option<LossReason> {
        match self.lost.load(Ordering::Acquire) {
            0 => None,
            code => LossReason::ALL.get(usize::from(code) - 1).copied(),
        }
    }

    /// Why the lease is invalid at `now`, if it is: it was ended, or it has expired unnoticed.
    pub(crate) fn loss_at(&self, now: Moment) -> Option<LossReason> {
        self.loss()
            .or_else(|| (now >= self.valid_until()).then_some(LossReason::Expired))
    }

    /// The same for the holder, who acts on the answer: an expiry that was reported once stays, and
    /// the answer to a renewal does not make the lease valid again. Wakes the tasks that wait for
    /// the loss, so no lock may be held.
    pub(crate) fn check(&self, now: Moment) -> Option<LossReason> {
        let reason = self.loss_at(now)?;
        if self.loss().is_none() {
            self.lose(reason);
            self.notify_of_loss();
        }
        self.loss()
    }

    /// The remaining validity at `now`; zero after a loss.
    pub(crate) fn remaining(&self, now: Moment) -> Duration {
        if self.loss().is_some() {
            Duration::ZERO
        } else {
            self.valid_until().since(now)
        }
    }

    /// The same for the holder: see [`check`](Self::check).
    pub(crate) fn check_remaining(&self, now: Moment) -> Duration {
        match self.check(now) {
            Some(_) => Duration::ZERO,
            None => self.remaining(now),
        }
    }

    /// The remaining validity at `now` as a fraction of the TTL.
    pub(crate) fn fraction_left(&self, now: Moment) -> f64 {
        let ttl = self.ttl.load(Ordering::Relaxed);
        (nanos(self.remaining(now)) as f64 / ttl as f64).min(1.0)
    }

    /// Waits for the loss. On a runtime, the end of the lease needs no notification: the background
    /// thread may be blocked by foreign code, such as a logger whose output nobody reads.
    pub(crate) async fn lost(&self) -> LossReason {
        let mut has_timers = Handle::try_current().is_ok();
        loop {
            let loss_notify = self.loss_notify.notified();
            tokio::pin!(loss_notify);
            // Registered before the check, so that a loss between the check and the wait is not
            // missed.
            loss_notify.as_mut().enable();
            let (now, end) = (Moment::now(), self.valid_until());
            if let Some(reason) = self.check(now) {
                return reason;
            }
            if !has_timers {
                loss_notify.await;
            } else if timeout(end.since(now), loss_notify).await.is_err() {
                // The clock of a runtime may be paused in tests: it jumps to the next timer.
                has_timers = Moment::now() >= end;
            }
        }
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::task::yield_now;

    const TTL: Duration = Duration::from_secs(1);

    const fn at(millis: u64) -> Moment {
        Moment::from_nanos(millis * 1_000_000)
    }

    fn lease(valid_until: Moment) -> Lease {
        Lease::new(Cycle::of(2), valid_until, TTL)
    }

    #[test]
    fn lease_is_valid_before_its_end_and_expired_from_then_on() {
        let lease = lease(at(1_000));
        assert_eq!((lease.loss_at(at(999)), lease.loss()), (None, None));
        assert_eq!(lease.remaining(at(900)), Duration::from_millis(100));
        for late in [1_000, 1_001] {
            assert_eq!(lease.loss_at(at(late)), Some(LossReason::Expired));
            assert_eq!(lease.remaining(at(late)), Duration::ZERO);
        }
    }

    /// Replies to renewals may arrive in a different order than the renewals were sent.
    #[test]
    fn end_of_a_lease_moves_on_and_never_back() {
        let lease = lease(at(1_000));
        lease.extend(at(1_500), TTL);
        lease.extend(at(1_200), TTL);
        assert_eq!(lease.valid_until(), at(1_500));
    }

    #[test]
    fn first_loss_counts_and_nothing_is_left_after_it() {
        for &reason in LossReason::ALL {
            let lease = lease(at(1_000));
            lease.lose(reason);
            lease.lose(LossReason::Closed);
            lease.extend(at(2_000), TTL);
            assert_eq!((lease.loss(), lease.loss_at(at(500))), (Some(reason), Some(reason)));
            assert_eq!(lease.remaining(at(500)), Duration::ZERO);
        }
    }

    #[test]
    fn expiry_that_its_holder_has_seen_is_not_undone_by_an_extension() {
        let lease = lease(at(1_000));
        assert_eq!(lease.loss_at(at(1_000)), Some(LossReason::Expired));
        lease.extend(at(2_000), TTL);
        assert_eq!(lease.check(at(1_000)), None, "nobody has acted on it");
        assert_eq!(lease.check_remaining(at(2_000)), Duration::ZERO);
        lease.extend(at(3_000), TTL);
        assert_eq!(lease.check(at(2_500)), Some(LossReason::Expired));
        assert_eq!(lease.remaining(at(2_500)), Duration::ZERO);
        lease.lose(LossReason::Taken);
        assert_eq!(lease.check(at(2_500)), Some(LossReason::Expired));
    }

    /// Another task asked whether the lease is valid.
    #[tokio::test]
    async fn expiry_that_was_seen_wakes_those_that_wait_for_it() {
        let lease = lease(Moment::now() + Duration::from_secs(3_600));
        let asking = async {
            yield_now().await;
            let end = lease.valid_until();
            assert_eq!(lease.check(end), Some(LossReason::Expired));
        };
        let both = async { tokio::join!(lease.lost(), asking).0 };
        let lost = tokio::time::timeout(Duration::from_secs(20), both).await;
        assert_eq!(lost, Ok(LossReason::Expired));
    }

    /// Regression: only the background thread reported the end, and it may be blocked.
    #[tokio::test]
    async fn end_of_a_lease_needs_no_notification() {
        let lease = lease(Moment::now() + Duration::from_millis(20));
        let extended = lease.valid_until() + Duration::from_millis(20);
        let extending = async {
            yield_now().await;
            // A busy machine may be too late.
            let is_in_time = lease.loss().is_none();
            lease.extend(extended, TTL);
            is_in_time
        };
        let both = async { tokio::join!(lease.lost(), extending) };
        let ended = tokio::time::timeout(Duration::from_secs(20), both).await;
        let (lost, is_in_time) = ended.unwrap();
        assert_eq!(lost, LossReason::Expired);
        assert!(!is_in_time || Moment::now() >= extended);
    }

    /// The clock of the runtime jumps to the next timer, again and again.
    #[tokio::test(start_paused = true)]
    async fn a_paused_clock_ends_no_lease() {
        let lease = lease(Moment::now() + Duration::from_secs(3_600));
        let lost = tokio::time::timeout(Duration::from_secs(7_200), lease.lost()).await;
        assert!(lost.is_err(), "{lost:?}");
        assert_eq!(lease.loss(), None);
    }

    /// Operators see how close a lease came to its end, as a fraction of its latest TTL.
    #[test]
    fn fraction_left_is_relative_to_the_last_ttl() {
        let lease = lease(at(1_000));
        assert!((lease.fraction_left(at(750)) - 0.25).abs() < 1e-9);
        assert!(lease.fraction_left(at(1_000)).abs() < 1e-9);
        lease.extend(at(4_000), Duration::from_secs(4));
        assert!((lease.fraction_left(at(1_000)) - 0.75).abs() < 1e-9);
        // An extension with a shorter TTL does not shorten the lease.
        lease.extend(at(3_000), TTL);
        assert!((lease.fraction_left(at(1_000)) - 1.0).abs() < 1e-9);
        lease.lose(LossReason::Taken);
        assert!(lease.fraction_left(at(1_000)).abs() < 1e-9);
    }

    #[tokio::test]
    async fn tasks_that_wait_for_a_loss_sleep_until_they_are_notified_of_it() {
        let lease = lease(Moment::now() + Duration::from_secs(3_600));
        let waiting = async {
            let (one, other) = tokio::join!(lease.lost(), lease.lost());
            assert_eq!([one, other], [LossReason::Taken; 2]);
        };
        let losing = async {
            yield_now().await;
            lease.lose(LossReason::Taken);
            lease.notify_of_loss();
        };
        let both = async { tokio::join!(waiting, losing) };
        tokio::time::timeout(Duration::from_secs(20), both).await.unwrap();
        assert_eq!(lease.lost().await, LossReason::Taken, "it is known already");
    }
}

#[cfg(all(test, shardlock_loom))]
mod models {
    use loom::sync::Arc;
    use loom::thread;

    use super::*;

    const TTL: Duration = Duration::from_nanos(1_000);

    fn at(nanos: u64) -> Moment {
        Moment::from_nanos(nanos)
    }

    fn beside(lease: &Arc<Lease>, act: impl FnOnce(&Lease) + 'static) -> thread::JoinHandle<()> {
        let lease = Arc::clone(lease);
        thread::spawn(move || act(&lease))
    }

    /// A late reply to a renewal may be processed while the lease is ended.
    #[test]
    fn loss_that_was_seen_is_not_undone_by_an_extension() {
        loom::model(|| {
            let lease = Arc::new(Lease::new(Cycle::of(2), at(1_000), TTL));
            let losing = beside(&lease, |lease| lease.lose(LossReason::Taken));
            let extending = beside(&lease, |lease| lease.extend(at(2_000), TTL));
            if lease.loss().is_some() {
                assert_eq!(lease.loss_at(at(500)), Some(LossReason::Taken));
                assert_eq!(lease.remaining(at(500)), Duration::ZERO);
            }
            losing.join().unwrap();
            extending.join().unwrap();
            assert_eq!(lease.loss_at(at(500)), Some(LossReason::Taken));
        });
    }

    /// A renewal may be answered while the holder sees that the lease has expired.
    #[test]
    fn expiry_that_its_holder_has_seen_is_not_undone_by_an_extension() {
        loom::model(|| {
            let lease = Arc::new(Lease::new(Cycle::of(2), at(1_000), TTL));
            let extending = beside(&lease, |lease| lease.extend(at(2_000), TTL));
            let seen = lease.check(at(1_000));
            extending.join().unwrap();
            assert_eq!(lease.check(at(1_000)), seen);
        });
    }

    #[test]
    fn of_two_reasons_the_one_that_was_seen_stays() {
        loom::model(|| {
            let lease = Arc::new(Lease::new(Cycle::of(2), at(1_000), TTL));
            let one = beside(&lease, |lease| lease.lose(LossReason::Taken));
            let other = beside(&lease, |lease| lease.lose(LossReason::Closed));
            let seen = lease.loss();
            one.join().unwrap();
            other.join().unwrap();
            assert!(lease.loss().is_some() && (seen.is_none() || lease.loss() == seen));
        });
    }

    /// Two renewals may be answered at the same time.
    #[test]
    fn validity_that_was_seen_never_decreases() {
        loom::model(|| {
            let lease = Arc::new(Lease::new(Cycle::of(2), at(1_000), TTL));
            let one = beside(&lease, |lease| lease.extend(at(3_000), TTL));
            let other = beside(&lease, |lease| lease.extend(at(2_000), TTL));
            let seen = [lease.valid_until(), lease.valid_until()];
            assert!(seen[0] <= seen[1]);
            one.join().unwrap();
            other.join().unwrap();
            assert_eq!(lease.valid_until(), at(3_000));
        });
    }
}
