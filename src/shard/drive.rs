//! Carrying out one request of a queue and telling the queue how it ended.

use std::sync::Arc;

use super::Entry;
use crate::clock::Moment;
use crate::protocol::{Acquire, Ask, Cycle, Release};
use crate::queue::Request;
use crate::store::Lane;
use crate::telemetry::RequestKind;
use crate::time_limit::within;

/// Tells the queue that nobody waits for the reply any more, if the request is dropped under way.
struct Unanswered<'a> {
    entry: &'a Arc<Entry>,
    cycle: Cycle,
    armed: bool,
}

impl Drop for Unanswered<'_> {
    fn drop(&mut self) {
        if self.armed {
            let cycle = self.cycle;
            self.entry.in_background(|queue, cx| queue.dropped(cycle, cx));
        }
    }
}

impl Entry {
    /// Sends a request and waits for its reply, for no longer than the store's time limit. Returns whether a release found the lease still
    /// ours, where one was sent and answered, and the request that follows, which is the caller's to carry out.
    ///
    /// # Cancel safety
    ///
    /// Dropping it tells the queue, which asks again or cleans up in the background.
    pub(crate) async fn drive(self: &Arc<Self>, request: Request, lane: Lane) -> Driven {
        match request {
            Request::Acquire {
                cycle,
                ask,
                ttl,
                tokens,
            } => {
                let acquire = Acquire {
                    key: self.key.clone(),
                    cycle,
                    ask,
                    ttl,
                    tokens,
                };
                let kind = match ask {
                    Ask::Free => RequestKind::AcquireFreely,
                    Ask::Join | Ask::Extend => RequestKind::Acquire,
                    Ask::Try => RequestKind::Try,
                };
                let (answer, started, now) = self.send(cycle, kind, self.shard.acquire(acquire)).await;
                let ((), next) = self.at(now, |queue, cx| match answer {
                    Ok(answer) => ((), queue.replied(cycle, answer, cx)),
                    Err(error) => {
                        let outage = self.shard.outage(&error, started, now, queue.failed_attempts());
                        ((), queue.failed(cycle, &error, outage, cx))
                    }
                });
                Driven { next, released: None }
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
                };
                let kind = if requeue.is_some() {
                    RequestKind::Requeue
                } else {
                    RequestKind::Release
                };
                // What takes something keeps to the caller's lane, and so to its order.
                let lane = if requeue.is_some() { Lane::Caller } else { lane };
                let (answer, started, now) = self.send(cycle, kind, self.shard.store.release(lane, release)).await;
                let (released, next) = self.at(now, |queue, cx| match answer {
                    Ok(answer) => (Ok(answer.reply.held), queue.released_remotely(cycle, answer, cx)),
                    Err(error) => {
                        let outage = self.shard.outage(&error, started, now, queue.failed_attempts());
                        let effects = queue.failed(cycle, &error, outage, cx);
                        (Err(error), effects)
                    }
                });
                Driven {
                    next,
                    released: Some(released),
                }
            }
        }
    }

    /// The answer, when it was asked for and when it came.
    async fn send<T>(
        self: &Arc<Self>,
        cycle: Cycle,
        kind: RequestKind,
        request: crate::store::StoreFuture<T>,
    ) -> (Result<T, crate::LockError>, Moment, Moment) {
        let shard = &self.shard;
        let mut unanswered = Unanswered {
            entry: self,
            cycle,
            armed: true,
        };
        let started = Moment::now();
        let reply = within(started, shard.timeout, request).await;
        unanswered.armed = false;
        let reply = reply.unwrap_or_else(|_| Err(shard.no_answer()));
        let now = Moment::now();
        shard.metrics.request(kind, now.since(started), reply.is_ok());
        shard.note_reach(&reply);
        shard.note_map(&reply);
        let answer = reply.map_err(|error| shard.error(error, kind.step(), Some(&self.key), started));
        (answer, started, now)
    }
}

/// How a request ended.
#[derive(Debug)]
pub(crate) struct Driven {
    /// The request that follows.
    pub(crate) next: Option<Request>,
    /// For a release: whether the lease was still ours, or why that is not known.
    pub(crate) released: Option<Result<bool, crate::LockError>>,
}
