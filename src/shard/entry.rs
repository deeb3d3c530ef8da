//! One key of a shard: its queue, and what carries out what the queue wants.

use std::fmt;
use std::panic::Location;
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::Duration;

use parking_lot::Mutex;

use super::{Job, Shard};
use crate::clock::Moment;
use crate::error::LockError;
use crate::fence::FencingToken;
use crate::foreign::WAKERS;
use crate::heat::Heat;
use crate::key::{LockKey, Slot};
use crate::protocol::Cycle;
use crate::queue::{Context, Effects, Granted, Outcome, Path, Queue, Rare, Request, WaiterId, Wake, Want};

/// See the module. The mutex is never held across an `await`, nor while a waker is called or dropped: a waker is foreign
/// code, which may ask this very manager something.
pub(crate) struct Entry {
    pub(crate) key: LockKey,
    pub(crate) shard: Arc<Shard>,
    /// Where it belongs inside of the store.
    slot: Slot,
    state: Mutex<State>,
}

struct State {
    queue: Queue<Waker>,
    /// Taken out of the table, since nothing was left to do. Whoever still has it looks for the new one.
    removed: bool,
    /// What was noted of contention since it was last handed over to the manager.
    heat: Option<Box<Heat>>,
    /// Who collected the last guard. Whether it is still out says the queue.
    holding: Option<Holding>,
}

/// What of a queue is counted.
#[derive(Debug, Clone, Copy)]
struct Standing {
    holds: bool,
    is_spare: bool,
}

impl Standing {
    const fn of(queue: &Queue<Waker>) -> Self {
        Self {
            holds: queue.holds(),
            is_spare: queue.is_spare(),
        }
    }
}

/// Who asked for a lock, and when.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Asked {
    pub(crate) at: Moment,
    pub(crate) caller: &'static Location<'static>,
}

#[derive(Debug, Clone, Copy)]
struct Holding {
    token: FencingToken,
    since: Moment,
    caller: &'static Location<'static>,
}

/// What a look at a key shows.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) held: Option<SeenHeld>,
    pub(crate) waiting: usize,
    /// For how long the first who waits has waited; zero if nobody does.
    pub(crate) longest_wait: Duration,
}

/// A task's place in line.
#[derive(Debug)]
pub(crate) struct Wanted {
    pub(crate) id: WaiterId,
    /// To be carried out by whoever asked.
    pub(crate) request: Option<Request>,
    /// The outcome is there already. Nobody will be woken for it.
    pub(crate) is_settled: bool,
}

/// A guard that is out.
#[derive(Debug)]
pub(crate) struct SeenHeld {
    pub(crate) cycle: Cycle,
    pub(crate) token: FencingToken,
    pub(crate) age: Duration,
    pub(crate) remaining: Duration,
    /// Who asked for it; nothing while it is on its way to the task.
    pub(crate) caller: Option<&'static Location<'static>>,
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

impl State {
    /// Notes who has the lock from now on, and what contention there was. Gives what is to be handed over, when it is much.
    fn note(&mut self, outcome: &Outcome, asked: Asked) -> Option<Box<Heat>> {
        match outcome {
            Outcome::Granted(granted) => {
                self.holding = Some(Holding {
                    token: granted.token,
                    since: granted.at,
                    caller: asked.caller,
                });
                if matches!(granted.path, Path::Uncontended | Path::Lingering) {
                    return None;
                }
                let heat = self.heat.get_or_insert_default();
                heat.waited(granted.at.since(asked.at));
            }
            Outcome::Busy => self.heat.get_or_insert_default().in_vain(),
            Outcome::Failed(_) | Outcome::TooLate | Outcome::Regressed { .. } => return None,
        }
        self.heat.take_if(|heat| heat.is_much())
    }
}

impl Entry {
    pub(super) fn new(key: LockKey, shard: &Arc<Shard>) -> Arc<Self> {
        let state = Mutex::new(State {
            queue: Queue::new(),
            removed: false,
            heat: None,
            holding: None,
        });
        Arc::new(Self {
            slot: shard.store.slot_of(&key),
            key,
            shard: Arc::clone(shard),
            state,
        })
    }

    /// A task wants the key. `None` if this entry is not in the table any more. The request that comes back is the caller's
    /// to carry out.
    pub(super) fn want(self: &Arc<Self>, want: Want, waker: Waker, now: Moment) -> Option<Result<Wanted, LockError>> {
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
        let before = Standing::of(&state.queue);
        let (id, mut effects) = state.queue.want(want, Some(waker), cx);
        let is_settled = state.queue.is_settled(id);
        // Where nothing is kept, and nothing is in trouble, a waiter changes nothing that is due.
        let is_due = before.is_spare || state.queue.trouble().is_some();
        let look_at = is_due.then(|| state.queue.look_at()).flatten();
        let after = Standing::of(&state.queue);
        self.count(before, after);
        drop(state);
        self.count_spare(before, after);
        if let Some(look_at) = look_at {
            self.shard.watch.look_at(look_at);
        }
        if is_settled {
            // The task that asks looks at once.
            effects.wake = Wake::None;
        }
        let request = self.carry_out(effects);
        Some(Ok(Wanted {
            id,
            request,
            is_settled,
        }))
    }

    /// Takes the outcome if it is there; otherwise the waker is told when it is.
    pub(crate) fn poll(self: &Arc<Self>, id: WaiterId, waker: &Waker, asked: Asked) -> Poll<Settled> {
        let mut state = self.state.lock();
        let Some(outcome) = state.queue.collect(id) else {
            let replaced = match state.queue.waker(id) {
                Some(known) if known.will_wake(waker) => None,
                _ => state.queue.set_waker(id, waker.clone()),
            };
            drop(state);
            // Not before the mutex is released: the end of a waker may run code of the caller's executor.
            drop(replaced);
            return Poll::Pending;
        };
        let much = state.note(&outcome, asked);
        self.remove_if_unused(state);
        if let Some(heat) = much {
            self.shard.hot.add(&self.shard.name, &self.key, &heat);
        }
        Poll::Ready(self.settle(outcome, asked))
    }

    /// Why the store can't be reached, if it could not when it was last asked for this key.
    pub(crate) fn trouble(&self) -> Option<LockError> {
        self.state.lock().queue.trouble().cloned()
    }

    /// Whether the outcome is there.
    pub(crate) fn is_settled(&self, id: WaiterId) -> bool {
        self.state.lock().queue.is_settled(id)
    }

    /// Whether the answer to a request decides on what follows.
    pub(crate) fn awaits_store(&self) -> bool {
        self.state.lock().queue.awaits_store()
    }

    /// A waiter goes away.
    pub(crate) fn give_up(self: &Arc<Self>, id: WaiterId) {
        let mut state = self.state.lock();
        if state.queue.is_contended() && !state.queue.is_settled(id) {
            state.heat.get_or_insert_default().in_vain();
        }
        drop(state);
        self.in_background(|queue, cx| queue.give_up(id, cx));
    }

    /// Who holds it and who waits.
    pub(crate) fn look(&self, now: Moment) -> Seen {
        let state = self.state.lock();
        let lease = state.queue.lease();
        let held = lease.and_then(|(lease, token)| {
            let token = token?;
            let holding = state.holding.filter(|holding| holding.token == token);
            Some(SeenHeld {
                cycle: lease.cycle,
                token,
                age: holding.map_or(Duration::ZERO, |holding| now.since(holding.since)),
                remaining: lease.remaining(now),
                caller: holding.map(|holding| holding.caller),
            })
        });
        Seen {
            held,
            waiting: state.queue.waiting(),
            longest_wait: state
                .queue
                .waiting_since()
                .map_or(Duration::ZERO, |since| now.since(since)),
        }
    }

    /// Whether the lease of that cycle is still ours, as far as is known here.
    pub(crate) fn holds(&self, cycle: Cycle) -> bool {
        let state = self.state.lock();
        state.queue.lease().is_some_and(|(lease, _)| lease.cycle == cycle)
    }

    /// Whether that cycle is under way here.
    pub(super) fn is_current(&self, cycle: Cycle) -> bool {
        self.state.lock().queue.is_current(cycle)
    }

    /// The cycle that stands in the store's queue, if one does.
    pub(super) fn queued_cycle(&self) -> Option<Cycle> {
        self.state.lock().queue.queued_cycle()
    }

    /// Until when its lease is kept without a guard, if it is.
    pub(super) fn lingers_until(&self) -> Option<Moment> {
        self.state.lock().queue.lingers_until()
    }

    /// Hands over to the manager what was noted of contention.
    pub(crate) fn tell_heat(&self) {
        let heat = self.state.lock().heat.take();
        if let Some(heat) = heat {
            self.shard.hot.add(&self.shard.name, &self.key, &heat);
        }
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
        let ((), request) = self.at(Moment::now(), |queue, cx| ((), event(queue, cx)));
        if let Some(request) = request {
            self.shard.send(Job::Request {
                entry: Arc::clone(self),
                request,
            });
        }
    }

    /// Lets an event happen at that moment and carries out what it leads to, but for the request, which is the caller's.
    pub(super) fn at<R>(
        self: &Arc<Self>,
        now: Moment,
        event: impl FnOnce(&mut Queue<Waker>, Context<'_>) -> (R, Effects<Waker>),
    ) -> (R, Option<Request>) {
        let cx = self.context(now);
        let mut state = self.state.lock();
        let before = Standing::of(&state.queue);
        let (result, mut effects) = event(&mut state.queue, cx);
        let after = Standing::of(&state.queue);
        self.count(before, after);
        let look_at = state.queue.look_at();
        if let Some(rare) = &mut effects.rare {
            drop(state);
            // Before the entry leaves the table: a shutdown that found neither would be over before the cycle is given back.
            self.abandon(std::mem::take(&mut rare.abandoned));
            state = self.state.lock();
        }
        self.remove_if_unused(state);
        self.count_spare(before, after);
        if let Some(look_at) = look_at {
            self.shard.watch.look_at(look_at);
        }
        (result, self.carry_out(effects))
    }

    /// Counts what an event has changed, under the mutex of the entry.
    fn count(&self, before: Standing, after: Standing) {
        let metrics = &self.shard.metrics;
        match (before.holds, after.holds) {
            (false, true) => metrics.lease_came(),
            (true, false) => metrics.lease_went(),
            _ => {}
        }
        if !before.is_spare && after.is_spare {
            metrics.lease_lingers();
        }
    }

    /// Counts that the key is not spare any more; once it has left the table if it does, since until then it would seem to be in use where
    /// the limit of keys is checked.
    fn count_spare(&self, before: Standing, after: Standing) {
        if before.is_spare && !after.is_spare {
            self.shard.metrics.lease_lingers_no_more();
        }
    }

    fn remove_if_unused(self: &Arc<Self>, mut state: parking_lot::MutexGuard<'_, State>) {
        if state.removed || !state.queue.is_unused() {
            return;
        }
        state.removed = true;
        let rivals_seen = state.queue.rivals_seen();
        let heat = state.heat.take();
        drop(state);
        if let Some(heat) = heat {
            self.shard.hot.add(&self.shard.name, &self.key, &heat);
        }
        self.shard.forget(self, rivals_seen);
    }

    fn carry_out(self: &Arc<Self>, effects: Effects<Waker>) -> Option<Request> {
        let Effects {
            request,
            wake,
            discarded,
            served,
            yielded,
            rare,
        } = effects;
        match wake {
            Wake::None => {}
            Wake::One(waker) => WAKERS.call(|| waker.wake()),
            Wake::Many(wakers) => wakers.into_iter().for_each(|waker| WAKERS.call(|| waker.wake())),
        }
        if discarded.is_some() {
            WAKERS.call(|| drop(discarded));
        }
        if let Some(rare) = rare {
            self.carry_out_rare(*rare);
        }
        if let Some(guards) = served {
            self.shard.metrics.served(guards);
        }
        if let Some(bound) = yielded {
            self.shard.metrics.yielded(bound);
        }
        request
    }

    #[cold]
    fn carry_out_rare(&self, rare: Rare) {
        let Rare {
            abandoned,
            ended,
            lost,
            stale_grant,
        } = rare;
        if let Some(lease) = ended {
            WAKERS.call(|| lease.notify_of_loss());
        }
        self.abandon(abandoned);
        if stale_grant {
            self.shard.metrics.stale_grants.increment(1);
        }
        if let Some(reason) = lost {
            self.shard.metrics.lost(reason);
            self.shard.notices.lost(&self.key, &self.shard.name, reason);
        }
    }

    /// Has cycles that are over released in the background.
    fn abandon(&self, abandoned: impl IntoIterator<Item = Option<Cycle>>) {
        for cycle in abandoned.into_iter().flatten() {
            self.shard.abandon(&self.key, cycle);
        }
    }

    fn settle(&self, outcome: Outcome, asked: Asked) -> Settled {
        let (key, shard) = (|| self.key.to_string(), || self.shard.name.to_string());
        match outcome {
            Outcome::Granted(granted) => {
                self.shard.metrics.acquired(granted.path);
                Settled::Granted(granted)
            }
            Outcome::Busy => Settled::Busy,
            Outcome::Failed(error) => Settled::Failed(error),
            Outcome::TooLate => Settled::failed(LockError::Unavailable {
                shard: shard(),
                step: "acquire",
                key: Some(key()),
                waited: Moment::now().since(asked.at),
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
            room: self.shard.room(),
            epoch: self.shard.store.epoch(self.slot),
        }
    }
}
