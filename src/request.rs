//! A request for a lock, from the call to the guard.

use std::future::{Future, IntoFuture};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;

use crate::clock::Moment;
use crate::config::check_overrides;
use crate::error::{Invalid, LockError};
use crate::guard::LockGuard;
use crate::key::LockKey;
use crate::manager::Inner;
use crate::queue::{WaiterId, Want};
use crate::shard::{Driven, Entry, Job, Settled, Shard};
use crate::store::Lane;
use crate::telemetry::{ClassMetrics, Ending};

/// A request for a lock. Set what differs from the manager's configuration, then await it:
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), shardlock::LockError> {
/// # use std::time::Duration;
/// # let locks = shardlock::LockManager::connect("memory://doc-request").await?;
/// let guard = locks.lock("coupon:123").ttl(Duration::from_secs(5)).timeout(Duration::from_secs(2)).class("coupons").await?;
/// # guard.release().await
/// # }
/// ```
///
/// # Errors
///
/// Awaiting gives [`LockError::Invalid`] for a key or a duration outside its bounds, [`LockError::Timeout`] when the wait limit has passed,
/// [`LockError::QueueFull`], [`LockError::TooManyWaiters`] or [`LockError::TooManyKeys`] when a limit was reached, [`LockError::Unavailable`]
/// when the shard can't be reached, [`LockError::Refused`] when it says no, and [`LockError::Closed`] after a shutdown.
///
/// # Cancel safety
///
/// Dropping the future at any point leaves nothing behind: the place in the line is given up, a lock that was just being
/// handed over goes to the next, and what the server may know of it is released in the background.
///
/// A future that has the lock handed to it but is not polled holds up all who come after it, as with `tokio::sync::Mutex`.
#[must_use = "nothing is asked for until the request is awaited"]
#[derive(Debug, Clone)]
pub struct LockRequest {
    manager: Arc<Inner>,
    key: Result<LockKey, Invalid>,
    terms: Terms,
}

/// A request for a lock that comes back with `None` rather than wait. See [`LockManager::try_lock`](crate::LockManager::try_lock).
#[must_use = "nothing is asked for until the request is awaited"]
#[derive(Debug, Clone)]
pub struct TryLockRequest(LockRequest);

/// What a request asks for.
#[derive(Debug, Clone)]
struct Terms {
    ttl: Option<Duration>,
    timeout: Option<Duration>,
    max_hold: Option<Duration>,
    class: Option<Arc<str>>,
}

impl LockRequest {
    pub(crate) fn new(manager: Arc<Inner>, key: &str) -> Self {
        let terms = Terms {
            ttl: None,
            timeout: manager.config.timeout,
            max_hold: manager.config.max_hold,
            class: None,
        };
        Self {
            manager,
            key: LockKey::new(key),
            terms,
        }
    }

    /// How long the lease lasts without renewal: 50 ms to 24 h. After the death of its holder a key stays locked for up to this long.
    pub const fn ttl(mut self, ttl: Duration) -> Self {
        self.terms.ttl = Some(ttl);
        self
    }

    /// How long to wait for the lock. Zero means one try.
    pub const fn timeout(mut self, limit: Duration) -> Self {
        self.terms.timeout = Some(limit);
        self
    }

    /// For how long the lease is renewed: a guard that is held for longer is lost.
    pub const fn max_hold(mut self, longest: Duration) -> Self {
        self.terms.max_hold = Some(longest);
        self
    }

    /// The class under which metrics count this request: few different values, never the key.
    pub fn class(mut self, class: &str) -> Self {
        self.terms.class = Some(class.into());
        self
    }

    /// Runs `body` under the lock and gives the lock back. The body is cancelled, which means dropped, when the lock is lost.
    ///
    /// What the body returns comes back unchanged, be it an error of its own.
    ///
    /// # Errors
    ///
    /// Those of the request, in which case the body has not run; and [`LockError::Lost`] if the lock was lost before the body was
    /// done.
    ///
    /// # Cancel safety
    ///
    /// Dropping it drops the body at its current await point and then gives the lock back.
    pub async fn with<T>(self, body: impl AsyncFnOnce(&LockGuard) -> T) -> Result<T, LockError> {
        let guard = self.await?;
        let result = tokio::select! {
            biased;
            reason = guard.lost() => return Err(guard.lost_error(reason)),
            result = body(&guard) => result,
        };
        match guard.release().await {
            // A release without an answer is repeated in the background; the body ran under the lock.
            Ok(()) | Err(LockError::Unavailable { .. }) => Ok(result),
            Err(error) => Err(error),
        }
    }

    async fn acquire(self, only_try: bool) -> Result<Option<LockGuard>, LockError> {
        let Self { manager, key, terms } = self;
        let class = manager.classes.get(terms.class.as_deref());
        let mut counted = Counted {
            class: &class,
            ended: false,
        };
        let asked_at = Moment::now();
        let result = wait(&manager, key, &terms, only_try).await;
        counted.ended = true;
        match result {
            Ok(Some((entry, granted))) => {
                let now = Moment::now();
                class.ended(Ending::Acquired(granted.path));
                class.wait.record(now.since(asked_at).as_secs_f64());
                Ok(Some(LockGuard::new(entry, granted, Arc::clone(&class), now)))
            }
            Ok(None) => {
                class.ended(Ending::Busy);
                Ok(None)
            }
            Err(error) => {
                class.ended(Ending::of(&error));
                Err(error)
            }
        }
    }
}

/// Waits for the lock within the limit of the request. `None` if it was a try and the key is held or wanted.
async fn wait(
    manager: &Inner,
    key: Result<LockKey, Invalid>,
    terms: &Terms,
    only_try: bool,
) -> Result<Option<(Arc<Entry>, crate::queue::Granted)>, LockError> {
    let key = key?;
    check_overrides(terms.ttl, terms.timeout, terms.max_hold)?;
    let limit = terms.timeout;
    let no_wait = !only_try && limit.is_some_and(|limit| limit.is_zero());
    let want = Want {
        ttl: terms.ttl.unwrap_or(manager.config.ttl),
        max_hold: terms.max_hold,
        only_try: only_try || no_wait,
        expects_rivals: false,
    };
    let shard = manager.shard(&key);
    let started = Moment::now();
    let timed_out = |limit: Duration| LockError::Timeout {
        key: key.to_string(),
        shard: shard.name.to_string(),
        waited: Moment::now().since(started),
        limit,
    };
    let waiting = Waiting::new(shard, &key, want);
    let (entry, settled) = match limit {
        Some(limit) if !want.only_try => tokio::time::timeout(limit, waiting)
            .await
            .map_err(|_| timed_out(limit))??,
        _ => waiting.await?,
    };
    match settled {
        Settled::Granted(granted) => match granted.lease.loss() {
            Some(crate::LossReason::Closed) => Err(LockError::Closed),
            _ => Ok(Some((entry, granted))),
        },
        Settled::Busy if no_wait => Err(timed_out(Duration::ZERO)),
        Settled::Busy => Ok(None),
        Settled::Failed(error) => Err(error),
    }
}

/// Counts a request that is dropped before it ended.
struct Counted<'a> {
    class: &'a ClassMetrics,
    ended: bool,
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        if !self.ended {
            self.class.ended(Ending::Cancelled);
        }
    }
}

/// A task in line. It joins when it is first polled and leaves when it is dropped.
struct Waiting<'a> {
    shard: &'a Arc<Shard>,
    key: &'a LockKey,
    want: Want,
    place: Option<Place>,
}

/// A place in line, and the request that this task carries out for all in it, if it does.
///
/// Dropping it gives the place up first and only then drops the request, so that the queue knows whether anybody still
/// wants the reply.
struct Place {
    entry: Arc<Entry>,
    id: WaiterId,
    driving: Option<Pin<Box<dyn Future<Output = Driven> + Send>>>,
    collected: bool,
}

impl<'a> Waiting<'a> {
    const fn new(shard: &'a Arc<Shard>, key: &'a LockKey, want: Want) -> Self {
        Self {
            shard,
            key,
            want,
            place: None,
        }
    }

    fn join(&self, cx: &Context<'_>) -> Result<Place, LockError> {
        let load = &self.shard.load;
        let waiting = load.waiters.fetch_add(1, Ordering::Relaxed);
        let limit = self.shard.limits.waiters;
        let joined = if waiting >= limit {
            Err(LockError::TooManyWaiters {
                key: self.key.to_string(),
                waiting,
                limit,
            })
        } else {
            self.shard.want(self.key, self.want, cx.waker())
        };
        match joined {
            Ok((entry, id, request)) => {
                self.shard.metrics.waiters.increment(1);
                let driving = request.map(|request| drive(&entry, request));
                Ok(Place {
                    entry,
                    id,
                    driving,
                    collected: false,
                })
            }
            Err(error) => {
                load.waiters.fetch_sub(1, Ordering::Relaxed);
                Err(error)
            }
        }
    }
}

fn drive(entry: &Arc<Entry>, request: crate::queue::Request) -> Pin<Box<dyn Future<Output = Driven> + Send>> {
    let entry = Arc::clone(entry);
    Box::pin(async move { entry.drive(request, Lane::Caller).await })
}

impl Future for Waiting<'_> {
    type Output = Result<(Arc<Entry>, Settled), LockError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        let place = match &mut this.place {
            Some(place) => place,
            None => {
                let place = this.place.insert(match this.join(cx) {
                    Ok(place) => place,
                    Err(error) => return Poll::Ready(Err(error)),
                });
                if place.driving.is_none() && !this.want.only_try {
                    // The waker is registered; whatever happened since has woken it.
                    return Poll::Pending;
                }
                place
            }
        };
        while let Some(driving) = &mut place.driving {
            let Poll::Ready(driven) = driving.as_mut().poll(cx) else {
                break;
            };
            place.driving = None;
            match driven.next {
                // What follows is for others.
                Some(request) if place.entry.is_settled(place.id) => {
                    place.entry.shard.send(Job::Request {
                        entry: Arc::clone(&place.entry),
                        request,
                    });
                }
                Some(request) => place.driving = Some(drive(&place.entry, request)),
                None => {}
            }
        }
        match place.entry.poll(place.id, cx.waker()) {
            Poll::Ready(settled) => {
                place.collected = true;
                Poll::Ready(Ok((Arc::clone(&place.entry), settled)))
            }
            Poll::Pending => Poll::Pending,
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let shard = &self.entry.shard;
        shard.load.waiters.fetch_sub(1, Ordering::Relaxed);
        shard.metrics.waiters.decrement(1);
        if !self.collected {
            self.entry.give_up(self.id);
        }
    }
}

impl IntoFuture for LockRequest {
    type Output = Result<LockGuard, LockError>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        // Only a try comes back with nothing.
        Box::pin(async move { self.acquire(false).await?.ok_or(LockError::Closed) })
    }
}

impl TryLockRequest {
    pub(crate) const fn new(request: LockRequest) -> Self {
        Self(request)
    }

    /// See [`LockRequest::ttl`].
    pub const fn ttl(mut self, ttl: Duration) -> Self {
        self.0.terms.ttl = Some(ttl);
        self
    }

    /// See [`LockRequest::max_hold`].
    pub const fn max_hold(mut self, longest: Duration) -> Self {
        self.0.terms.max_hold = Some(longest);
        self
    }

    /// See [`LockRequest::class`].
    pub fn class(mut self, class: &str) -> Self {
        self.0.terms.class = Some(class.into());
        self
    }
}

impl IntoFuture for TryLockRequest {
    type Output = Result<Option<LockGuard>, LockError>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.0.acquire(true))
    }
}
