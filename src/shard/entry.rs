//! One key of a shard: its queue, and what carries out what the queue wants.

use std::fmt;
use std::sync::Arc;
use std::task::{Poll, Waker};

use parking_lot::Mutex;

use super::{Job, Shard};
use crate::clock::Moment;
use crate::error::LockError;
use crate::fence::FencingToken;
use crate::key::LockKey;
use crate::protocol::Cycle;
use crate::queue::{Context, Effects, Granted, Outcome, Queue, Request, WaiterId, Wake, Want};

/// See the module. The mutex is never held across an `await`, nor while a waiter is woken.
pub(crate) struct Entry {
    pub(crate) key: LockKey,
    pub(crate) shard: Arc<Shard>,
    state: Mutex<State>,
}

struct State {
    queue: Queue<Waker>,
    /// Taken out of the table, since nothing was left to do. Whoever still has it looks for the new one.
    removed: bool,
}

/// What a request for a lock came to, as far as this process is concerned.
#[derive(Debug)]
pub(crate) enum Settled {
    Granted(Granted),
    Busy,
    Failed(Box<LockError>),
}

impl Settled {
    fn failed(error: LockError) -> Self {
        Self::Failed(Box::new(error))
    }
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry")
            .field("key", &self.key)
            .field("shard", &self.shard.name)
            .finish_non_exhaustive()
    }
}

impl Entry {
    pub(super) fn new(key: LockKey, shard: &Arc<Shard>) -> Arc<Self> {
        let state = Mutex::new(State {
            queue: Queue::new(),
            removed: false,
        });
        Arc::new(Self {
            key,
            shard: Arc::clone(shard),
            state,
        })
    }

    /// A task wants the key. `None` if this entry is not in the table any more. The request that comes back is the caller's
    /// to carry out.
    pub(super) fn want(
        self: &Arc<Self>,
        want: Want,
        waker: Waker,
        now: Moment,
    ) -> Option<Result<(WaiterId, Option<Request>), LockError>> {
        let cx = self.context(now);
        let mut state = self.state.lock();
        if state.removed {
            return None;
        }
        let waiting = state.queue.waiting();
        // A try waits behind nobody, so it needs no room: where others wait, it is told that the key is busy.
        if waiting >= self.shard.limits.waiters_per_key && !want.only_try {
            let (key, limit) = (self.key.to_string(), self.shard.limits.waiters_per_key);
            return Some(Err(LockError::QueueFull { key, waiting, limit }));
        }
        let (id, effects) = state.queue.want(want, Some(waker), cx);
        drop(state);
        Some(Ok((id, self.carry_out(effects))))
    }

    /// Takes the outcome if it is there; otherwise the waker is told when it is.
    pub(crate) fn poll(self: &Arc<Self>, id: WaiterId, waker: &Waker) -> Poll<Settled> {
        let mut state = self.state.lock();
        let Some(outcome) = state.queue.collect(id) else {
            if !state.queue.waker(id).is_some_and(|known| known.will_wake(waker)) {
                state.queue.set_waker(id, waker.clone());
            }
            return Poll::Pending;
        };
        self.remove_if_unused(state);
        Poll::Ready(self.settle(outcome))
    }

    /// Whether the outcome is there.
    pub(crate) fn is_settled(&self, id: WaiterId) -> bool {
        self.state.lock().queue.is_settled(id)
    }

    /// A waiter goes away.
    pub(crate) fn give_up(self: &Arc<Self>, id: WaiterId) {
        self.in_background(|queue, cx| queue.give_up(id, cx));
    }

    /// A guard is given back. Says whether it was still the holder's, and what is to be sent.
    pub(crate) fn released(
        self: &Arc<Self>,
        cycle: Cycle,
        token: FencingToken,
        now: Moment,
    ) -> (bool, Option<Request>) {
        self.at(now, |queue, cx| queue.released(cycle, token, cx))
    }

    /// Lets an event happen and carries out what it leads to; requests go to the background.
    pub(crate) fn in_background(
        self: &Arc<Self>,
        event: impl FnOnce(&mut Queue<Waker>, Context<'_>) -> Effects<Waker>,
    ) {
        let ((), request) = self.with(|queue, cx| ((), event(queue, cx)));
        if let Some(request) = request {
            self.shard.send(Job::Request {
                entry: Arc::clone(self),
                request,
            });
        }
    }

    /// Lets an event happen and carries out what it leads to, but for the request, which is the caller's.
    pub(crate) fn with<R>(
        self: &Arc<Self>,
        event: impl FnOnce(&mut Queue<Waker>, Context<'_>) -> (R, Effects<Waker>),
    ) -> (R, Option<Request>) {
        self.at(Moment::now(), event)
    }

    fn at<R>(
        self: &Arc<Self>,
        now: Moment,
        event: impl FnOnce(&mut Queue<Waker>, Context<'_>) -> (R, Effects<Waker>),
    ) -> (R, Option<Request>) {
        let cx = self.context(now);
        let mut state = self.state.lock();
        let held = state.queue.holds();
        let (result, mut effects) = event(&mut state.queue, cx);
        match (held, state.queue.holds()) {
            (false, true) => self.shard.metrics.leases.increment(1),
            (true, false) => self.shard.metrics.leases.decrement(1),
            _ => {}
        }
        let look_at = state.queue.look_at();
        if effects.abandoned.iter().any(Option::is_some) {
            drop(state);
            // Before the entry leaves the table: a shutdown that found neither would be over before the cycle is given back.
            self.abandon(std::mem::take(&mut effects.abandoned));
            state = self.state.lock();
        }
        self.remove_if_unused(state);
        if let Some(look_at) = look_at {
            self.shard.watch.look_at(look_at);
        }
        (result, self.carry_out(effects))
    }

    fn remove_if_unused(self: &Arc<Self>, mut state: parking_lot::MutexGuard<'_, State>) {
        if state.removed || !state.queue.is_unused() {
            return;
        }
        state.removed = true;
        let rivals_seen = state.queue.rivals_seen();
        drop(state);
        self.shard.forget(self, rivals_seen);
    }

    fn carry_out(self: &Arc<Self>, effects: Effects<Waker>) -> Option<Request> {
        let Effects {
            request,
            abandoned,
            wake,
            lost,
        } = effects;
        match wake {
            Wake::None => {}
            Wake::One(waker) => waker.wake(),
            Wake::Many(wakers) => wakers.into_iter().for_each(Waker::wake),
        }
        self.abandon(abandoned);
        if let Some(reason) = lost {
            self.shard.metrics.lost(reason);
            tracing::warn!(shard = %self.shard.name, %reason, "a lock was lost");
        }
        request
    }

    /// Has cycles that are over released in the background.
    fn abandon(&self, abandoned: impl IntoIterator<Item = Option<Cycle>>) {
        for cycle in abandoned.into_iter().flatten() {
            self.shard.send(Job::Release {
                key: self.key.clone(),
                cycle,
            });
        }
    }

    fn settle(&self, outcome: Outcome) -> Settled {
        let (key, shard) = (|| self.key.to_string(), || self.shard.name.to_string());
        match outcome {
            Outcome::Granted(granted) => {
                self.shard.metrics.handed_off(granted.path);
                Settled::Granted(granted)
            }
            Outcome::Busy => Settled::Busy,
            Outcome::Failed(error) => Settled::Failed(error),
            Outcome::TooLate => Settled::failed(LockError::Unavailable {
                shard: shard(),
                step: "acquire",
                key: Some(key()),
                waited: std::time::Duration::ZERO,
                reason: "its replies take longer than the lease lasts; raise the ttl".into(),
            }),
            Outcome::Regressed { token, floor } => {
                self.shard.metrics.token_regressions.increment(1);
                Settled::failed(LockError::TokenRegression {
                    key: key(),
                    shard: shard(),
                    token,
                    floor,
                })
            }
        }
    }

    fn context(&self, now: Moment) -> Context<'_> {
        Context {
            now,
            rules: &self.shard.rules,
            cycles: &self.shard.cycles,
        }
    }
}
