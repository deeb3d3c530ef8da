//! The part of a lease that guards look at: until when it is certainly ours, and whether it was lost.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::Notify;

use crate::clock::Moment;
use crate::error::LossReason;
use crate::protocol::Cycle;

/// One cycle's hold of a key, shared by the queue, which extends and ends it, and by the guards under it.
///
/// Reading takes no lock. `is_valid` compares with the clock itself, so that it is right even where no timer could fire
/// because the process stood still.
#[derive(Debug)]
pub(crate) struct Lease {
    pub(crate) cycle: Cycle,
    valid_until: AtomicU64,
    /// The TTL that it was last given, in nanoseconds.
    ttl: AtomicU64,
    /// 0, or 1 + the index of the reason in [`LossReason::ALL`].
    lost: AtomicU8,
    /// Notified once, after the loss is set.
    told: Notify,
}

impl Lease {
    pub(crate) fn new(cycle: Cycle, valid_until: Moment, ttl: Duration) -> Self {
        Self {
            cycle,
            valid_until: AtomicU64::new(valid_until.as_nanos()),
            ttl: AtomicU64::new(nanos(ttl)),
            lost: AtomicU8::new(0),
            told: Notify::new(),
        }
    }

    pub(crate) fn valid_until(&self) -> Moment {
        Moment::from_nanos(self.valid_until.load(Ordering::Acquire))
    }

    /// Moves the end of the validity on; never back, since an older renewal's reply may come after a newer one's.
    pub(crate) fn extend(&self, valid_until: Moment, ttl: Duration) {
        self.ttl.store(nanos(ttl), Ordering::Relaxed);
        self.valid_until.fetch_max(valid_until.as_nanos(), Ordering::AcqRel);
    }

    /// Ends the lease: from now on it is not valid. Only the first reason counts. Wakes nobody, since the caller holds the
    /// mutex of the key: [`notify_of_loss`](Self::notify_of_loss) must follow once that is released.
    pub(crate) fn lose(&self, reason: LossReason) {
        let code = LossReason::ALL.iter().position(|&known| known == reason).unwrap_or(0) as u8 + 1;
        // A later reason changes nothing.
        self.lost
            .compare_exchange(0, code, Ordering::AcqRel, Ordering::Acquire)
            .ok();
    }

    /// Wakes the tasks that wait for the loss. A waker is foreign code: no lock may be held.
    pub(crate) fn notify_of_loss(&self) {
        self.told.notify_waiters();
    }

    /// Why the lease was ended, if it was.
    pub(crate) fn loss(&self) -> Option<LossReason> {
        match self.lost.load(Ordering::Acquire) {
            0 => None,
            code => LossReason::ALL.get(usize::from(code) - 1).copied(),
        }
    }

    /// Why the lease is of no use at `now`: it was ended, or its time has passed although nobody has noticed yet.
    pub(crate) fn loss_at(&self, now: Moment) -> Option<LossReason> {
        self.loss()
            .or_else(|| (now >= self.valid_until()).then_some(LossReason::Expired))
    }

    /// What is left of the validity at `now`; zero after a loss.
    pub(crate) fn remaining(&self, now: Moment) -> Duration {
        if self.loss().is_some() {
            Duration::ZERO
        } else {
            self.valid_until().since(now)
        }
    }

    /// What is left of the validity at `now`, as a part of the TTL.
    pub(crate) fn part_left(&self, now: Moment) -> f64 {
        let ttl = Duration::from_nanos(self.ttl.load(Ordering::Relaxed));
        (self.remaining(now).as_secs_f64() / ttl.as_secs_f64()).min(1.0)
    }

    /// Waits for the loss.
    pub(crate) async fn lost(&self) -> LossReason {
        loop {
            let told = self.told.notified();
            tokio::pin!(told);
            // Registered before the look, so that a loss between the look and the wait is not missed.
            told.as_mut().enable();
            if let Some(reason) = self.loss_at(Moment::now()) {
                return reason;
            }
            told.await;
        }
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
