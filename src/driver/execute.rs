//! Executes one request of a queue and reports the result to the queue.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{Entry, Shard, Usage};
use crate::clock::Moment;
use crate::engine::{Request, StoreEvent};
use crate::protocol::{Acquire, AcquireKind, Cycle, Release};
use crate::store::{Priority, StoreError, StoreFuture};
use crate::telemetry::RequestKind;
use crate::time_limit::{Elapsed, within};

/// Notifies the queue if the request is dropped before its reply arrives.
struct Unanswered<'a> {
    entry: &'a Arc<Entry>,
    cycle: Cycle,
    armed: bool,
}

impl Drop for Unanswered<'_> {
    fn drop(&mut self) {
        if self.armed {
            self.entry.receive(self.cycle, StoreEvent::RequestCancelled);
        }
    }
}

impl Entry {
    /// Sends a request and waits for its reply, at most for the store's time limit. Returns the
    /// follow-up request, which the caller has to execute, and, for a release that was sent,
    /// whether the lease was still ours.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future notifies the queue, which retries or cleans up in the background.
    pub(crate) async fn execute(self: &Arc<Self>, request: Request, priority: Priority) -> Completed {
        match request {
            Request::Acquire {
                cycle,
                kind,
                ttl,
                tokens,
            } => {
                let acquire = Acquire {
                    key: self.key.clone(),
                    cycle,
                    kind,
                    ttl,
                    tokens,
                };
                let kind = match kind {
                    AcquireKind::Fast => RequestKind::AcquireFast,
                    AcquireKind::Enqueue | AcquireKind::Extend => RequestKind::Acquire,
                    AcquireKind::Try => RequestKind::Try,
                };
                let sent = self.send(cycle, kind, Some(cycle), self.shard.acquire(acquire)).await;
                let Some((answer, started, now)) = sent else {
                    return Completed::ELSEWHERE;
                };
                let ((), next) = self.apply(now, |queue, cx| match answer {
                    Ok(answer) => ((), queue.on_event(cycle, StoreEvent::AcquireReply(answer), cx)),
                    Err(error) => {
                        let outage = self.shard.outage(&error, started, now, queue.failed_attempts());
                        let failed = StoreEvent::RequestFailed { error: &error, outage };
                        ((), queue.on_event(cycle, failed, cx))
                    }
                });
                Completed { next, released: None }
            }
            Request::Release {
                cycle,
                requeue,
                nobody_waits,
                tokens,
            } => {
                let release = Release {
                    key: self.key.clone(),
                    cycle,
                    requeue,
                    nobody_waits,
                    tokens,
                    retire_until: self.shard.manager.min_holds.until(cycle, Moment::now()),
                };
                let kind = if requeue.is_some() {
                    RequestKind::Requeue
                } else {
                    RequestKind::Release
                };
                // A request that acquires something stays on a foreground connection, which keeps
                // it in order.
                let priority = if requeue.is_some() {
                    Priority::Foreground
                } else {
                    priority
                };
                let sent = self
                    .send(cycle, kind, requeue, self.shard.store.release(priority, release))
                    .await;
                let Some((answer, started, now)) = sent else {
                    return Completed::ELSEWHERE;
                };
                if answer.is_ok() {
                    self.shard.manager.min_holds.forget(cycle);
                }
                let (released, next) = self.apply(now, |queue, cx| match answer {
                    Ok(answer) => {
                        let replied = StoreEvent::ReleaseReply(answer);
                        (Ok(answer.reply.held), queue.on_event(cycle, replied, cx))
                    }
                    Err(error) => {
                        let outage = self.shard.outage(&error, started, now, queue.failed_attempts());
                        let failed = StoreEvent::RequestFailed { error: &error, outage };
                        let effects = queue.on_event(cycle, failed, cx);
                        (Err(error), effects)
                    }
                });
                Completed {
                    next,
                    released: Some(released),
                }
            }
        }
    }

    /// Sends a request. Returns the reply, and when the request was sent and the reply arrived.
    /// Returns `None` if the request was given up because the runtime executing it is blocked. The
    /// queue then behaves as if the request had been dropped, and sends another one.
    ///
    /// The reply may be to the second of two attempts, and the first may execute later than what
    /// follows. In that case the cycle in `takes`, which acquires something, is released once more
    /// when it is over.
    async fn send<T>(
        self: &Arc<Self>,
        cycle: Cycle,
        kind: RequestKind,
        takes: Option<Cycle>,
        request: StoreFuture<T>,
    ) -> Option<(Result<T, crate::LockError>, Moment, Moment)> {
        let shard = &self.shard;
        let mut unanswered = Unanswered {
            entry: self,
            cycle,
            armed: true,
        };
        let started = Moment::now();
        let (mut request, moves) = (request, shard.manager.runtimes.moves());
        let reply = match tokio::time::timeout(QUICK.min(shard.manager.timeout / 4), &mut request).await {
            Ok(reply) => Ok(reply),
            Err(_) => Box::pin(wait_longer(shard, started, moves, request)).await?,
        };
        unanswered.armed = false;
        let reply = reply.unwrap_or_else(|_| Err(shard.no_answer()));
        let now = Moment::now();
        shard.metrics.request(kind, now.since(started), reply.is_ok());
        shard.note_reach(&reply);
        shard.note_map(&reply);
        if let Some(cycle) = takes
            && reply.is_ok()
            && shard.may_arrive_late(cycle, now)
        {
            shard.release_again_later(&self.key, cycle);
        }
        let answer = reply.map_err(|error| shard.error(error, kind.step(), Some(&self.key), started));
        Some((answer, started, now))
    }
}

/// Most requests get their reply in this time, even with hundreds in flight.
const QUICK: Duration = Duration::from_millis(50);
/// How long after [`QUICK`] a request without a reply counts as slow, at most. The application's
/// runtime is then checked for progress.
const SLOW: Duration = Duration::from_millis(250);

/// Keeps waiting for a slow request. Returns `None` if work has moved away from the application's
/// runtime in the meantime, and with it the connection of the request.
async fn wait_longer<T>(
    shard: &Shard,
    started: Moment,
    moves: u64,
    mut request: StoreFuture<T>,
) -> Option<Result<Result<T, StoreError>, Elapsed>> {
    let moved = async {
        tokio::time::sleep(SLOW.min(shard.manager.timeout / 4)).await;
        let _slow = Slow::count(&shard.manager.usage);
        shard.manager.runtimes.moved_since(moves).await;
    };
    tokio::select! {
        biased;
        reply = within(started, shard.manager.timeout, request.as_mut()) => Some(reply),
        () = moved => None,
    }
}

/// Counts a request as slow until dropped.
struct Slow<'a>(&'a Usage);

impl<'a> Slow<'a> {
    fn count(usage: &'a Usage) -> Self {
        usage.slow.fetch_add(1, Ordering::Relaxed);
        Self(usage)
    }
}

impl Drop for Slow<'_> {
    fn drop(&mut self) {
        self.0.slow.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The result of a request.
#[derive(Debug)]
pub(crate) struct Completed {
    /// The follow-up request.
    pub(crate) next: Option<Request>,
    /// For a release: whether the lease was still ours, or why that is unknown.
    pub(crate) released: Option<Result<bool, crate::LockError>>,
}

impl Completed {
    /// The request was given up, and the background thread handles what follows.
    const ELSEWHERE: Self = Self {
        next: None,
        released: None,
    };
}
