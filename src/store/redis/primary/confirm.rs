//! Waiting until replicas have a lease (`min_replicas_acked`).
//!
//! # Implementation details
//!
//! `WAIT n ms` is sent behind the request that takes a lease, on the same connection, so that it costs no round trip more than the one
//! to the replicas. It answers how many of them have everything that the server had written by then. With fewer than `n` the reply
//! is an error: the queue abandons the cycle, which is released in the background.
//!
//! What is promised: when a lock is entered, `n` replicas know its lease; and for as long as it is held and valid, they know of an end
//! that does not lie before the one that the holder counts on. So renewals are confirmed, too: a lock that was held for longer than a
//! TTL while nothing was replicated would have run out on a replica that is promoted then, and somebody else would get it beside the
//! holder. A renewal that is not confirmed counts as one without an answer: it is repeated, and if that goes on for the rest of the TTL,
//! the lock is lost in time.
//! A lease that was granted by somebody else's release was confirmed by nobody: the inbox makes a turn of such a grant, so that this manager asks,
//! and confirms, itself. Releases are not confirmed: one that is not replicated only makes others wait for the end of the lease.
//!
//! The promise is worth as much as the choice of the replica that is promoted: one of those that confirmed. Where `n` is less than the number of replicas,
//! it may be another one, even if none has failed: from the moment in which a replica is promoted to that in which the others are made to follow it, which
//! may take a second, those still confirm what the old primary takes. With all of them that is not possible, since the promoted one has left.
//! Whatever was forgotten: from the moment in which a manager knows of the switch, its leases are passed on when the new primary has confirmed them
//! ([`LeaseStore::epoch`](crate::store::LeaseStore::epoch)). And the end of a lease is replicated as a
//! time of day, so the clocks of the servers have to agree; one that is ahead ends leases earlier once it is the primary.
//!
//! On a connection that many tasks share, `WAIT` holds back whatever comes behind it. Where replicas answer, that is the time of one
//! round trip to them, which a task that only learns that a key is held has to wait for as well. Where they do not, it is the whole
//! limit; so once a wait was in vain, the next ones are short, but for one in each time limit, which finds out whether the replicas are
//! merely slow.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use deadpool_redis::redis::{Cmd, Value, cmd};

use super::super::reply::as_int;
use crate::clock::Moment;
use crate::store::StoreError;

/// See the module.
pub(super) struct Confirm {
    replicas: u32,
    /// The time limit of a request.
    timeout: Duration,
    /// When waits may be long again, on the local clock; zero while nothing is wrong.
    short_until: AtomicU64,
}

/// A wait that was sent: for its words if it is in vain.
#[derive(Clone, Copy)]
pub(super) struct Wait {
    replicas: u32,
    limit: Duration,
}

impl Confirm {
    /// None where nothing is to be confirmed.
    pub(super) fn new(replicas: u32, timeout: Duration) -> Option<Self> {
        (replicas > 0).then(|| Self {
            replicas,
            timeout,
            short_until: AtomicU64::new(0),
        })
    }

    /// The wait behind the next request.
    pub(super) fn next(&self) -> Wait {
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

    /// The wait behind requests that have that time limit.
    pub(super) fn within(&self, limit: Duration) -> Wait {
        self.wait(within(limit))
    }

    const fn wait(&self, limit: Duration) -> Wait {
        Wait {
            replicas: self.replicas,
            limit,
        }
    }

    /// Whether enough replicas have confirmed.
    pub(super) fn judge(&self, wait: Wait, reply: &Value) -> Result<(), StoreError> {
        let acked = as_int(reply).unwrap_or_default();
        if acked >= i64::from(wait.replicas) {
            self.short_until.store(0, Ordering::Relaxed);
            return Ok(());
        }
        let until = (Moment::now() + self.timeout).as_nanos();
        // One that is set already is the business of the wait that is long.
        self.short_until
            .compare_exchange(0, until, Ordering::Relaxed, Ordering::Relaxed)
            .ok();
        Err(StoreError::Unavailable(
            format!(
                "only {acked} of {needed} replicas confirmed the lease within {limit:?} (min_replicas_acked = {needed}); \
                 it was given up; look after the replicas",
                needed = wait.replicas,
                limit = wait.limit,
            )
            .into(),
        ))
    }
}

impl Wait {
    pub(super) fn command(self) -> Cmd {
        let mut wait = cmd("WAIT");
        // Zero would mean for ever.
        wait.arg(self.replicas).arg((self.limit.as_millis() as u64).max(1));
        wait
    }
}

/// How much shorter waits are while replicas do not answer.
const SHORTER: u32 = 8;

/// Less than the limit, so that the answer is there before it.
fn within(limit: Duration) -> Duration {
    limit * 4 / 5
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_few_replicas_are_an_error_with_the_numbers_and_the_limit() {
        let confirm = Confirm::new(2, Duration::from_secs(1)).unwrap();
        let wait = confirm.next();
        assert!(confirm.judge(wait, &Value::Int(2)).is_ok());
        let Err(StoreError::Unavailable(words)) = confirm.judge(wait, &Value::Int(1)) else {
            panic!("it is too few")
        };
        assert!(
            words.starts_with("only 1 of 2 replicas confirmed the lease within 800ms (min_replicas_acked = 2)"),
            "{words}"
        );
        assert!(Confirm::new(0, Duration::from_secs(1)).is_none());
    }

    #[test]
    fn waits_are_short_after_one_in_vain_and_long_again_after_one_that_was_not() {
        let confirm = Confirm::new(1, Duration::from_secs(3600)).unwrap();
        let long = confirm.next().limit;
        assert!(confirm.judge(confirm.next(), &Value::Int(0)).is_err());
        assert_eq!(confirm.next().limit, long / SHORTER);
        assert!(confirm.judge(confirm.next(), &Value::Int(1)).is_ok());
        assert_eq!(confirm.next().limit, long);
        // One wait in each time limit is long.
        let confirm = Confirm::new(1, Duration::from_nanos(1)).unwrap();
        assert!(confirm.judge(confirm.next(), &Value::Int(0)).is_err());
        while Moment::now().as_nanos() < confirm.short_until.load(Ordering::Relaxed) {}
        assert_eq!(confirm.next().limit, within(Duration::from_nanos(1)));
    }
}
