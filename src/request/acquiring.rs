//! The future of a request.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::Sleep;

use super::LockRequest;
use crate::clock::Moment;
use crate::driver::{Completed, Entry, RequestOrigin, Settled};
use crate::engine::WaiterId;
use crate::error::{Failure, LockError, LossReason};
use crate::guard::LockGuard;
use crate::key::LockKey;
use crate::slow_log::WaitOutcome;
use crate::span::DebugSpan;
use crate::store::Priority;
use crate::telemetry::{ClassMetrics, DEFAULT_CLASS, Limit, RequestOutcome};

/// The future of a request. It enqueues a waiter when it is first polled and removes the waiter
/// when it is dropped.
///
/// It is moved a few times before the first poll and is kept small for that: the effective options
/// are computed when it enqueues.
pub(super) struct AcquireFuture {
    request: LockRequest,
    try_only: bool,
    requested_at: Moment,
    /// `None` for the default class.
    class: Option<Arc<ClassMetrics>>,
    span: DebugSpan,
    waiter: Option<QueuedWaiter>,
    /// Created when there is something to wait for; most requests finish before that.
    timer: Option<Pin<Box<Sleep>>>,
    ended: bool,
}

/// A waiter in the queue, and the store request that this task drives for all waiters of the key,
/// if any.
///
/// Dropping it removes the waiter first and drops the request second, so that the queue knows
/// whether any waiter still wants the reply.
struct QueuedWaiter {
    entry: Arc<Entry>,
    id: WaiterId,
    in_flight: Option<Pin<Box<dyn Future<Output = Completed> + Send>>>,
    collected: bool,
}

impl AcquireFuture {
    #[inline]
    pub(super) fn new(request: LockRequest, try_only: bool) -> Self {
        Self {
            request,
            try_only,
            requested_at: Moment::default(),
            class: None,
            span: DebugSpan::default(),
            waiter: None,
            timer: None,
            ended: false,
        }
    }

    fn key(&self) -> Option<&LockKey> {
        self.request.key.as_ref().ok()
    }

    fn asked(&self) -> RequestOrigin {
        RequestOrigin {
            at: self.requested_at,
            caller: self.request.caller,
            class: self.class_number(),
        }
    }

    /// Whether to return instead of waiting. A timeout of zero is a try.
    fn is_try(&self) -> bool {
        self.try_only || self.request.limit().is_some_and(|limit| limit.is_zero())
    }

    /// Enqueues a waiter. The flag is true if its outcome is already known.
    fn enqueue(&self, cx: &Context<'_>) -> Result<(QueuedWaiter, bool), LockError> {
        let key = match &self.request.key {
            Ok(key) => key,
            Err(invalid) => return Err((**invalid).clone().into()),
        };
        let mut options = self.request.waiter_options(self.is_try())?;
        options.class = self.class_number();
        let shard = self.request.manager.shard(key);
        let (entry, enqueued) = shard.enqueue(key, options, cx.waker(), self.requested_at)?;
        let mut in_flight = None;
        match enqueued.request {
            // This waiter will not wait for the reply: it is for those that come later.
            Some(request) if enqueued.is_settled => entry.execute_in_background(request),
            Some(request) => in_flight = Some(drive(&entry, request)),
            None => {}
        }
        let waiter = QueuedWaiter {
            entry,
            id: enqueued.id,
            in_flight,
            collected: false,
        };
        Ok((waiter, enqueued.is_settled))
    }

    /// Waits in the queue until the timeout. `None` if this is a try and the key is held or has
    /// waiters.
    fn poll_waiter(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<LockGuard>, LockError>> {
        let asked = self.asked();
        let settled = match &mut self.waiter {
            Some(waiter) => waiter.poll(cx, asked),
            None => {
                self.requested_at = Moment::now();
                let asked = self.asked();
                let (waiter, is_settled) = self.enqueue(cx)?;
                let waiter = self.waiter.insert(waiter);
                // With neither an outcome nor a request to drive there is nothing to do: the waker
                // is registered, and anything that happened since has woken it.
                if waiter.in_flight.is_some() || is_settled {
                    waiter.poll(cx, asked)
                } else {
                    Poll::Pending
                }
            }
        };
        let now = match (settled, self.request.limit()) {
            (Poll::Ready(settled), _) => return Poll::Ready(self.finish(settled)),
            (Poll::Pending, Some(limit)) if !self.is_try() => {
                let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep(limit)));
                std::task::ready!(timer.as_mut().poll(cx));
                let now = Moment::now();
                // Too early by the machine's clock: tokio's clock is paused and jumped ahead while
                // the store had yet to reply. The reply may have arrived since the waiter was
                // polled.
                let may_be_served =
                    |waiter: &QueuedWaiter| waiter.entry.awaits_store() || waiter.entry.is_settled(waiter.id);
                if now.since(self.requested_at) < limit && self.waiter.as_ref().is_some_and(may_be_served) {
                    self.timer = None;
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                now
            }
            (Poll::Pending, _) => return Poll::Pending,
        };
        Poll::Ready(Err(self.give_up_error(now.since(self.requested_at))))
    }

    fn finish(&mut self, settled: Settled) -> Result<Option<LockGuard>, LockError> {
        match settled {
            Settled::Granted(granted) if granted.lease.loss() == Some(LossReason::Closed) => {
                Err(Failure::Closed.into())
            }
            Settled::Granted(granted) => {
                let Some(waiter) = &self.waiter else {
                    unreachable!("a request without a waiter was served");
                };
                let entry = Arc::clone(&waiter.entry);
                let waited = granted.at.since(self.requested_at);
                let shard = &entry.shard;
                shard.manager.slow_log.waited(
                    waited,
                    &entry.key,
                    &shard.name,
                    self.request.caller,
                    WaitOutcome::Acquired,
                );
                let is_in_sample = self.class().acquired(granted.path, waited);
                Ok(Some(LockGuard::new(entry, granted, self.class.take(), is_in_sample)))
            }
            Settled::Busy if !self.try_only => Err(self.timed_out(Duration::ZERO)),
            Settled::Busy => {
                self.class().ended(RequestOutcome::Busy);
                Ok(None)
            }
            Settled::Failed(error) => Err(error),
        }
    }

    /// Unlike [`class`](Self::class), without reading from the memory of the default class.
    fn class_number(&self) -> u16 {
        self.class.as_ref().map_or(DEFAULT_CLASS, |class| class.number())
    }

    fn class(&self) -> &ClassMetrics {
        self.class
            .as_deref()
            .unwrap_or_else(|| self.request.manager.context.default_class(self.request.mode()))
    }

    #[cold]
    fn report_error(&self, error: &LockError) {
        if let Some(limit) = Limit::of(error) {
            self.request.manager.context.metrics.rejected(limit);
        }
        if let (Failure::Timeout { waited, shard, .. }, Some(key)) = (error.failure(), self.key()) {
            let slow_log = &self.request.manager.context.slow_log;
            slow_log.waited(*waited, key, shard, self.request.caller, WaitOutcome::TimedOut);
        }
    }

    /// The timeout has passed. During an outage the error is that of the shard, since the holder is
    /// not the reason.
    fn give_up_error(&self, waited: Duration) -> LockError {
        let outage = self.waiter.as_ref().and_then(|waiter| waiter.entry.outage());
        outage.map_or_else(|| self.timed_out(waited), |error| error.after(waited))
    }

    fn timed_out(&self, waited: Duration) -> LockError {
        let key = self.key().map(ToString::to_string).unwrap_or_default();
        let shard = self
            .waiter
            .as_ref()
            .map(|waiter| waiter.entry.shard.name.to_string())
            .unwrap_or_default();
        Failure::Timeout {
            key,
            shard,
            waited,
            limit: self.request.limit().unwrap_or_default(),
        }
        .into()
    }
}

impl Future for AcquireFuture {
    type Output = Result<Option<LockGuard>, LockError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if self.waiter.is_none() {
            let class = self
                .request
                .overrides
                .as_ref()
                .and_then(|overrides| overrides.class.as_deref());
            let classes = &self.request.manager.context.metrics.classes;
            let class = classes.get(class, self.request.mode());
            self.class = class;
            if let Some(key) = self.key() {
                let span = DebugSpan::open(|| tracing::debug_span!("acquire", %key, try_only = self.is_try()));
                self.span = span;
            }
        }
        let span = std::mem::take(&mut self.span);
        let polled = span.in_scope(|| self.poll_waiter(cx));
        let Poll::Ready(mut result) = polled else {
            self.span = span;
            return Poll::Pending;
        };
        drop(span);
        if let Ok(Some(guard)) = &mut result {
            guard.open_span();
        }
        self.ended = true;
        if let Err(error) = &result {
            self.class().ended(RequestOutcome::of(error));
            self.report_error(error);
        }
        // Remove the waiter now rather than when the future is dropped.
        self.waiter = None;
        Poll::Ready(result)
    }
}

impl Drop for AcquireFuture {
    fn drop(&mut self) {
        if !self.ended && self.waiter.is_some() {
            self.class().ended(RequestOutcome::Cancelled);
            if let (Some(waiter), Some(key)) = (&self.waiter, self.key()) {
                let waited = Moment::now().since(self.requested_at);
                let shard = &waiter.entry.shard;
                shard
                    .manager
                    .slow_log
                    .waited(waited, key, &shard.name, self.request.caller, WaitOutcome::Cancelled);
            }
        }
    }
}

impl QueuedWaiter {
    fn poll(&mut self, cx: &mut Context<'_>, asked: RequestOrigin) -> Poll<Settled> {
        while let Some(in_flight) = &mut self.in_flight {
            let Poll::Ready(driven) = in_flight.as_mut().poll(cx) else {
                break;
            };
            self.in_flight = None;
            match driven.next {
                // This waiter has its outcome; the next request is for other waiters.
                Some(request) if self.entry.is_settled(self.id) => self.entry.execute_in_background(request),
                Some(request) => self.in_flight = Some(drive(&self.entry, request)),
                None => {}
            }
        }
        let settled = std::task::ready!(self.entry.poll(self.id, cx.waker(), asked));
        self.collected = true;
        Poll::Ready(settled)
    }
}

fn drive(entry: &Arc<Entry>, request: crate::engine::Request) -> Pin<Box<dyn Future<Output = Completed> + Send>> {
    let entry = Arc::clone(entry);
    Box::pin(async move { entry.execute(request, Priority::Foreground).await })
}

impl Drop for QueuedWaiter {
    fn drop(&mut self) {
        self.entry.shard.waiter_left(self.entry.mode);
        if !self.collected {
            self.entry.give_up(self.id);
        }
    }
}

/// The future of a [`LockRequest`].
#[must_use = "futures do nothing unless polled"]
pub struct LockFuture(pub(super) AcquireFuture);

/// The future of a [`TryLockRequest`](super::TryLockRequest).
#[must_use = "futures do nothing unless polled"]
pub struct TryLockFuture(pub(super) AcquireFuture);

impl Future for LockFuture {
    type Output = Result<LockGuard, LockError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(cx).map(|result| match result? {
            Some(guard) => Ok(guard),
            None => unreachable!("a request that waits ended like a try"),
        })
    }
}

impl Future for TryLockFuture {
    type Output = Result<Option<LockGuard>, LockError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(cx)
    }
}

impl fmt::Debug for LockFuture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockFuture")
            .field("key", &self.0.request.key)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for TryLockFuture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TryLockFuture")
            .field("key", &self.0.request.key)
            .finish_non_exhaustive()
    }
}
