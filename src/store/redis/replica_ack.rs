//! Waits until replicas acknowledge a lease (`min_replicas_acked`).
//!
//! # Implementation details
//!
//! `WAIT n ms` is sent right behind the request that takes a lease, on the same connection, so the
//! only extra round trip is the one to the replicas. Its reply is the number of replicas that have
//! everything the server had written by then. With fewer than `n`, the request fails: the queue
//! abandons the cycle, which is released in the background.
//!
//! The guarantee: when a lock is entered, `n` replicas know its lease, and while the lock is held
//! and valid, they know an expiry that is not before the one the holder relies on. Renewals are
//! therefore confirmed, too. Otherwise a lock could be held for longer than a TTL while nothing is
//! replicated; its lease would have expired on a replica that is then promoted, and another process
//! could acquire it beside the holder. A renewal that is not confirmed counts as unanswered: it is
//! repeated, and if that fails for the rest of the TTL, the lock is lost in time.
//!
//! A grant made by another manager's release is not confirmed. The subscriber converts such a grant
//! to `Push::YourTurn`, so this manager asks for the lease and confirms it itself. Releases are not
//! confirmed: if one is not replicated, other processes only wait until the lease expires.
//!
//! The guarantee depends on which replica is promoted: it must be one that confirmed. If `n` is
//! less than the number of replicas, it may be another one even if none has failed. Between the
//! promotion of a replica and the moment at which the others are reconfigured to follow it, which
//! may take a second, the others still confirm writes of the old primary. If all replicas must
//! confirm, this can't happen, since the promoted one has left.
//!
//! Whatever was lost, once a manager knows of the switch, it passes its leases on only after the
//! new primary has confirmed them ([`LeaseStore::epoch`](crate::store::LeaseStore::epoch)). The
//! expiry of a lease is replicated as wall-clock time, so the servers' clocks must agree: a server
//! whose clock is ahead expires leases early after its promotion.
//!
//! On a connection shared by many tasks, `WAIT` delays all requests behind it. If the replicas
//! answer, the delay is one round trip to them, even for a task that only learns that its key is
//! held. If they do not, it is the whole limit. After a failed wait, the next ones are therefore
//! short, except for one per time limit, which detects whether the replicas are merely slow. In a
//! cluster, every wait is short, and the request is repeated instead: it may be the replica of a
//! promoted node that is missing, for a moment only.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use deadpool_redis::redis::{Cmd, Value, cmd};

use super::reply::as_int;
use crate::clock::Moment;
use crate::store::StoreError;

/// See the module documentation.
pub(super) struct ReplicaAck {
    replicas: u32,
    /// The time limit of a request.
    timeout: Duration,
    /// When a wait may be long again, on the local clock; zero while nothing is wrong.
    short_until: AtomicU64,
}

/// A wait that was sent, for the error message if it fails.
#[derive(Clone, Copy)]
pub(super) struct ReplicaWait {
    replicas: u32,
    limit: Duration,
}

impl ReplicaAck {
    /// `timeout` is the time limit of a request. Returns `None` if no confirmation is required.
    pub(super) fn new(replicas: u32, timeout: Duration) -> Option<Self> {
        (replicas > 0).then(|| Self {
            replicas,
            timeout,
            short_until: AtomicU64::new(0),
        })
    }

    /// The wait to send behind the next request.
    pub(super) fn next(&self) -> ReplicaWait {
        let (now, until) = (Moment::now(), self.short_until.load(Ordering::Relaxed));
        let long = within(self.timeout);
        if until == 0 {
            return self.wait(long);
        }
        let again = (now + self.timeout).as_nanos();
        let may_be_long = now.as_nanos() >= until
            && self
                .short_until
                .compare_exchange(until, again, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok();
        self.wait(if may_be_long { long } else { long / SHORTER })
    }

    /// The wait to send behind requests with this time limit.
    pub(super) fn within(&self, limit: Duration) -> ReplicaWait {
        self.wait(within(limit))
    }

    /// A wait of exactly this long.
    pub(super) const fn wait(&self, limit: Duration) -> ReplicaWait {
        ReplicaWait {
            replicas: self.replicas,
            limit,
        }
    }

    /// Whether this many replicas are enough.
    pub(super) fn is_enough(&self, acked: u32) -> bool {
        acked >= self.replicas
    }

    /// Fails unless enough replicas have confirmed, and adapts the next waits.
    pub(super) fn check(&self, wait: ReplicaWait, reply: &Value) -> Result<(), StoreError> {
        let acked = acked(reply);
        if self.is_enough(acked) {
            self.short_until.store(0, Ordering::Relaxed);
            return Ok(());
        }
        let until = (Moment::now() + self.timeout).as_nanos();
        // If a time is set already, only the long wait may change it.
        self.short_until
            .compare_exchange(0, until, Ordering::Relaxed, Ordering::Relaxed)
            .ok();
        Err(self.too_few(acked, wait.limit))
    }

    /// The error if only this many replicas confirmed a lease within `limit`.
    pub(super) fn too_few(&self, acked: u32, limit: Duration) -> StoreError {
        StoreError::Unavailable(
            format!(
                "only {acked} of {needed} replicas confirmed the lease within {limit:?} (min_replicas_acked = {needed}); \
                 the lease was abandoned; check the replicas",
                needed = self.replicas,
            )
            .into(),
        )
    }
}

impl ReplicaWait {
    pub(super) fn command(self) -> Cmd {
        let mut wait = cmd("WAIT");
        // Zero would mean no limit.
        wait.arg(self.replicas).arg((self.limit.as_millis() as u64).max(1));
        wait
    }
}

/// The number in the reply to a wait.
pub(super) fn acked(reply: &Value) -> u32 {
    as_int(reply)
        .and_then(|acked| acked.try_into().ok())
        .unwrap_or_default()
}

/// By what factor waits are shortened while the replicas do not answer.
const SHORTER: u32 = 8;

/// Less than the limit, so the reply arrives in time.
fn within(limit: Duration) -> Duration {
    limit * 4 / 5
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_few_replicas_are_an_error_with_the_numbers_and_the_limit() {
        let ack = ReplicaAck::new(2, Duration::from_secs(1)).unwrap();
        let wait = ack.next();
        assert!(ack.check(wait, &Value::Int(2)).is_ok());
        let Err(StoreError::Unavailable(words)) = ack.check(wait, &Value::Int(1)) else {
            panic!("one replica is too few")
        };
        assert!(
            words.starts_with("only 1 of 2 replicas confirmed the lease within 800ms (min_replicas_acked = 2)"),
            "{words}"
        );
        assert!(ReplicaAck::new(0, Duration::from_secs(1)).is_none());
    }

    #[test]
    fn replica_wait_is_short_after_a_failed_one_and_long_after_a_successful_one() {
        let ack = ReplicaAck::new(1, Duration::from_secs(3600)).unwrap();
        let long = ack.next().limit;
        assert!(ack.check(ack.next(), &Value::Int(0)).is_err());
        assert_eq!(ack.next().limit, long / SHORTER);
        assert!(ack.check(ack.next(), &Value::Int(1)).is_ok());
        assert_eq!(ack.next().limit, long);
        // One wait per time limit is long.
        let ack = ReplicaAck::new(1, Duration::from_nanos(1)).unwrap();
        assert!(ack.check(ack.next(), &Value::Int(0)).is_err());
        while Moment::now().as_nanos() < ack.short_until.load(Ordering::Relaxed) {}
        assert_eq!(ack.next().limit, within(Duration::from_nanos(1)));
    }
}
