//! Carrying out one request of a queue and telling the queue how it ended.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{Entry, Load, Shard};
use crate::clock::Moment;
use crate::protocol::{Acquire, Ask, Cycle, Release};
use crate::queue::Request;
use crate::store::{Lane, StoreError, StoreFuture};
use crate::telemetry::RequestKind;
use crate::time_limit::{Elapsed, within};

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
                let sent = self.send(cycle, kind, Some(cycle), self.shard.acquire(acquire)).await;
                let Some((answer, started, now)) = sent else {
                    return Driven::ELSEWHERE;
                };
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
                let sent = self
                    .send(cycle, kind, requeue, self.shard.store.release(lane, release))
                    .await;
                let Some((answer, started, now)) = sent else {
                    return Driven::ELSEWHERE;
                };
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

    /// The answer, when it was asked for and when it came. Nothing if the request was given up since the runtime that carried it runs nothing: the queue
    /// sees to it, as if it had been dropped, and sends another one.
    ///
    /// It may be the answer to the second of two attempts, and the first be executed later than what follows: then the cycle that `takes` something is released
    /// once more when it is over.
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
        let (mut request, moves) = (request, shard.runtimes.moves());
        let reply = match tokio::time::timeout(QUICK.min(shard.timeout / 4), &mut request).await {
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
            shard.doubt(&self.key, cycle);
        }
        let answer = reply.map_err(|error| shard.error(error, kind.step(), Some(&self.key), started));
        Some((answer, started, now))
    }
}

/// Most requests are answered in this time, also where hundreds are under way at a time.
const QUICK: Duration = Duration::from_millis(50);
/// After this time without an answer, at the latest, it is looked whether the program's runtime runs.
const SLOW: Duration = Duration::from_millis(250);

/// Waits on for a request that is not answered quickly. Nothing if work has moved away from the program's runtime meanwhile, and with it the request's
/// connection.
async fn wait_longer<T>(
    shard: &Shard,
    started: Moment,
    moves: u64,
    mut request: StoreFuture<T>,
) -> Option<Result<Result<T, StoreError>, Elapsed>> {
    let moved = async {
        tokio::time::sleep(SLOW.min(shard.timeout / 4)).await;
        let _slow = Slow::count(&shard.load);
        shard.runtimes.moved_since(moves).await;
    };
    tokio::select! {
        biased;
        reply = within(started, shard.timeout, request.as_mut()) => Some(reply),
        () = moved => None,
    }
}

/// A request that has not been answered for a while, until it is dropped.
struct Slow<'a>(&'a Load);

impl<'a> Slow<'a> {
    fn count(load: &'a Load) -> Self {
        load.slow.fetch_add(1, Ordering::Relaxed);
        Self(load)
    }
}

impl Drop for Slow<'_> {
    fn drop(&mut self) {
        self.0.slow.fetch_sub(1, Ordering::Relaxed);
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

impl Driven {
    /// The request was given up, and the background sees to what follows.
    const ELSEWHERE: Self = Self {
        next: None,
        released: None,
    };
}
