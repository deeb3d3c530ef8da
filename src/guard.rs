//! What a task holds while it has a lock.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::clock::Moment;
use crate::error::{LockError, LossReason};
use crate::fence::FencingToken;
use crate::lease::Lease;
use crate::queue::{Granted, Request};
use crate::shard::{Entry, Job};
use crate::span::DebugSpan;
use crate::store::Lane;
use crate::telemetry::ClassMetrics;

/// A lock that is held. Dropping it gives the lock back in the background; [`release`](Self::release) gives it back and
/// says whether it was still held.
///
/// The lease behind it is renewed for as long as the guard lives, or until `max_hold`. It may still be lost: the process is paused
/// for longer than the lease lasts, the server is gone, an administrator deletes the key. [`lost`](Self::lost) tells that in time,
/// before anybody else can have the lock; and where a pause makes even that too late, the [`token`](Self::token) lets the resource refuse
/// the old holder.
///
/// A guard can be moved to another task or thread and released there.
///
/// # At the end of the program
///
/// Dropping a guard does not wait: a thread of the manager sends the release afterwards. If the process ends right after the drop, because
/// `main` returns or `std::process::exit` is called, the release is often not sent, and the key stays locked until its TTL has passed.
/// Await [`release`](Self::release), or [`LockManager::shutdown`](crate::LockManager::shutdown), which also waits for the releases of
/// guards that were dropped before.
#[must_use = "the lock is given back as soon as the guard is dropped"]
pub struct LockGuard {
    entry: Arc<Entry>,
    lease: Arc<Lease>,
    token: FencingToken,
    /// `None` for the default class.
    class: Option<Arc<ClassMetrics>>,
    since: Moment,
    /// Whether its times are among those that are recorded.
    is_recorded: bool,
    /// As long as the guard.
    span: DebugSpan,
    /// Whether it was given back already.
    released: bool,
}

impl LockGuard {
    pub(crate) fn new(
        entry: Arc<Entry>,
        granted: Granted,
        class: Option<Arc<ClassMetrics>>,
        is_recorded: bool,
    ) -> Self {
        let Granted { at, lease, token, .. } = granted;
        Self {
            entry,
            lease,
            token,
            class,
            since: at,
            is_recorded,
            span: DebugSpan::default(),
            released: false,
        }
    }

    /// Opens the span that lasts as long as the guard, under the current one. Where nobody listens at that level, nothing is formatted.
    pub(crate) fn open_span(&mut self) {
        self.span = DebugSpan::open(
            || tracing::debug_span!("hold", key = %self.entry.key, shard = %self.entry.shard.name, token = %self.token),
        );
    }

    /// The key.
    #[must_use]
    pub fn key(&self) -> &str {
        self.entry.key.as_str()
    }

    /// The fencing token of this acquisition: larger than that of every earlier one of this key. Send it along with every write that the
    /// lock protects.
    #[must_use]
    pub const fn token(&self) -> FencingToken {
        self.token
    }

    /// The name of the shard that the key belongs to.
    #[must_use]
    pub fn shard(&self) -> &str {
        &self.entry.shard.name
    }

    /// Who holds the lease, as it stands in the store: `manager:cycle`.
    #[must_use]
    pub fn owner(&self) -> String {
        self.entry.shard.sign(self.lease.cycle)
    }

    /// Whether the lock is certainly still held, by the local clock, with an allowance for drift. Reads the clock itself, so that it is right in
    /// the very first instruction after a pause.
    #[must_use]
    pub fn is_valid(&self) -> bool {
        self.lease.loss_at(Moment::now()).is_none()
    }

    /// How long the lock is certainly held if no further renewal succeeds; zero after a loss.
    #[must_use]
    pub fn remaining(&self) -> Duration {
        self.lease.remaining(Moment::now())
    }

    /// Waits until the lock is lost, and says why. Never returns while the lock is held; answers at once where it is lost
    /// already.
    ///
    /// # Cancel safety
    ///
    /// Nothing is lost if it is dropped; it can be called again.
    pub async fn lost(&self) -> LossReason {
        self.lease.lost().await
    }

    /// Gives the lock back: to the next task of this process, to the next process, or to nobody. Returns when the server has said that it is done; where
    /// the lock goes to another task of this process, or the lease stays with this process for a while ([`LockRequest::linger`](crate::LockRequest::linger)), no
    /// message is waited for and it returns at once: then it does not know of a loss that the next renewal would have told. So it does if its connection
    /// turns out to belong to a runtime that runs nothing; the lock is then given back in the background.
    ///
    /// # Errors
    ///
    /// [`LockError::Lost`] if it was not held any more; nothing of a later holder's is touched then.
    /// [`LockError::Unavailable`] if there was no answer in time: the lock is not held any more as far as this process is concerned, and the release is
    /// repeated in the background.
    ///
    /// # Cancel safety
    ///
    /// The lock is given back even if the future is dropped before it is done.
    pub async fn release(mut self) -> Result<(), LockError> {
        let (held, request) = self.give_back();
        if !held {
            self.hand_to_background(request);
            return Err(self.lost_error(self.lease.loss().unwrap_or(LossReason::Expired)));
        }
        let Some(request @ Request::Release { .. }) = request else {
            self.hand_to_background(request);
            return Ok(());
        };
        // Boxed to keep this future small: it is moved several times, and most releases send nothing.
        let driven = Box::pin(self.entry.drive(request, Lane::Caller)).await;
        self.hand_to_background(driven.next);
        match driven.released {
            Some(Ok(false)) => Err(self.lost_error(LossReason::Taken)),
            Some(Err(error)) => Err(error),
            Some(Ok(true)) | None => Ok(()),
        }
    }

    /// The error of a holder that has lost its lock.
    pub(crate) fn lost_error(&self, reason: LossReason) -> LockError {
        LockError::Lost {
            key: self.key().to_owned(),
            token: self.token,
            reason,
        }
    }

    fn give_back(&mut self) -> (bool, Option<Request>) {
        self.span = DebugSpan::default();
        self.released = true;
        let now = Moment::now();
        if self.is_recorded {
            let class = self.class.as_ref().unwrap_or(&self.entry.shard.class);
            class.held(now.since(self.since));
            self.entry.shard.metrics.validity_left.record(self.lease.part_left(now));
        }
        self.entry.released(self.lease.cycle, self.token, now)
    }

    fn hand_to_background(&self, request: Option<Request>) {
        if let Some(request) = request {
            self.entry.shard.send(Job::Request {
                entry: Arc::clone(&self.entry),
                request,
            });
        }
    }
}

impl Drop for LockGuard {
    fn drop(&mut self) {
        if !self.released {
            let (_, request) = self.give_back();
            self.hand_to_background(request);
        }
    }
}

impl fmt::Debug for LockGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockGuard")
            .field("key", &self.key())
            .field("token", &self.token)
            .field("shard", &self.shard())
            .field("remaining", &self.remaining())
            .finish_non_exhaustive()
    }
}
