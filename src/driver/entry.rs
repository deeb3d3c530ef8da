//! One key of a shard: its queue, and the code that carries out the queue's effects.

use std::fmt;
use std::panic::Location;
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::Duration;

use parking_lot::Mutex;

use super::{Job, Shard};
use crate::clock::Moment;
use crate::contention::KeyContention;
use crate::engine::{
    Contender, Context, Effects, Granted, Outcome, Path, Rare, Request, StoreEvent, WaiterId, WaiterOptions, Wake,
};
use crate::error::{Failure, LockError};
use crate::fence::FencingToken;
use crate::foreign::WAKERS;
use crate::key::{LockKey, Slot};
use crate::mode::LockMode;
use crate::protocol::Cycle;
use crate::telemetry::DEFAULT_CLASS;

/// See the module documentation. The mutex is never held across an `await`, nor while a waker is
/// called or dropped: wakers are foreign code that may call back into this manager.
pub(crate) struct Entry {
    pub(crate) key: LockKey,
    /// A mode of the kind in which this entry holds the key.
    pub(crate) mode: LockMode,
    pub(crate) shard: Arc<Shard>,
    /// The slot of the key within the store.
    slot: Slot,
    state: Mutex<State>,
}

struct State {
    queue: Contender<Waker>,
    /// Removed from the table because it had no work left. A task that still has this entry looks
    /// up the new one.
    removed: bool,
    /// Contention recorded since the last flush to the manager.
    contention: Option<Box<KeyContention>>,
    /// Who collected the last guard of an exclusive lock. The queue knows whether it is still out.
    holding: Option<HolderInfo>,
    /// Who collected the guards of another mode that are still out.
    holding_together: Vec<HolderInfo>,
}

/// The counted properties of a queue.
#[derive(Debug, Clone, Copy)]
struct Counted {
    leases: usize,
    is_evictable: bool,
}

impl Counted {
    fn of(queue: &Contender<Waker>) -> Self {
        Self {
            leases: queue.leases(),
            is_evictable: queue.is_evictable(),
        }
    }
}

/// Who requested a lock, and when.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RequestOrigin {
    pub(crate) at: Moment,
    pub(crate) caller: &'static Location<'static>,
    /// The number of the class.
    pub(crate) class: u16,
}

#[derive(Debug, Clone, Copy)]
struct HolderInfo {
    token: FencingToken,
    since: Moment,
    caller: &'static Location<'static>,
    class: u16,
}

/// A snapshot of a key.
#[derive(Debug)]
pub(crate) struct KeySnapshot {
    pub(crate) held: Vec<HeldSnapshot>,
    pub(crate) waiting: usize,
    /// How long the first waiter has been waiting; zero if there is none.
    pub(crate) longest_wait: Duration,
}

/// The result of enqueueing a waiter.
#[derive(Debug)]
pub(crate) struct Enqueued {
    pub(crate) id: WaiterId,
    /// A request that the caller has to execute.
    pub(crate) request: Option<Request>,
    /// The outcome is already available. The waker will not be called for it.
    pub(crate) is_settled: bool,
}

/// A guard that is out.
#[derive(Debug)]
pub(crate) struct HeldSnapshot {
    pub(crate) cycle: Cycle,
    pub(crate) token: FencingToken,
    pub(crate) age: Duration,
    pub(crate) remaining: Duration,
    /// Who requested the guard; `None` until the task collects it.
    pub(crate) caller: Option<&'static Location<'static>>,
    /// The number of its class; that of the default class until the task collects it.
    pub(crate) class: u16,
}

/// The outcome of a lock request, as far as this process is concerned.
#[derive(Debug)]
pub(crate) enum Settled {
    Granted(Granted),
    Busy,
    Failed(LockError),
}

impl Settled {
    fn failed(failure: Failure) -> Self {
        Self::Failed(failure.into())
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
    /// Records the new holder, and contention. Returns the contention to flush when enough has
    /// accumulated.
    fn note(&mut self, outcome: &Outcome, asked: RequestOrigin) -> Option<Box<KeyContention>> {
        match outcome {
            Outcome::Granted(granted) => {
                let holder = HolderInfo {
                    token: granted.token,
                    since: granted.at,
                    caller: asked.caller,
                    class: asked.class,
                };
                if self.queue.is_exclusive() {
                    self.holding = Some(holder);
                } else {
                    self.holding_together.push(holder);
                }
                if matches!(granted.path, Path::Uncontended | Path::Lingering | Path::Joined) {
                    return None;
                }
                let contention = self.contention.get_or_insert_default();
                contention.record_acquired(granted.at.since(asked.at));
            }
            Outcome::Busy => self.contention.get_or_insert_default().record_failure(),
            Outcome::Failed(_) | Outcome::TooLate | Outcome::Regressed { .. } => return None,
        }
        self.contention.take_if(|contention| contention.should_flush())
    }
}

impl Entry {
    pub(super) fn new(key: LockKey, mode: LockMode, shard: &Arc<Shard>) -> Arc<Self> {
        let state = Mutex::new(State {
            queue: Contender::new(mode),
            removed: false,
            contention: None,
            holding: None,
            holding_together: Vec::new(),
        });
        Arc::new(Self {
            mode,
            slot: shard.store.slot_of(&key),
            key,
            shard: Arc::clone(shard),
            state,
        })
    }

    /// Enqueues a waiter. Returns `None` if this entry has been removed from the table. The caller
    /// has to execute the returned request.
    pub(super) fn enqueue(
        self: &Arc<Self>,
        options: WaiterOptions,
        waker: Waker,
        now: Moment,
    ) -> Option<Result<Enqueued, LockError>> {
        let cx = self.context(now);
        let mut state = self.state.lock();
        if state.removed {
            return None;
        }
        let waiting = state.queue.waiting();
        if let Err(full) = self.shard.admit_waiter_of_key(&self.key, waiting, options.try_only) {
            return Some(Err(full));
        }
        let before = Counted::of(&state.queue);
        let (id, mut effects) = state.queue.enqueue(options, Some(waker), cx);
        let is_settled = state.queue.is_settled(id);
        // Without a lingering lease or an outage, a new waiter for an exclusive lock changes no
        // deadline. One that joins other guards may have a `max_hold` of its own.
        let is_due = !state.queue.is_exclusive() || before.is_evictable || state.queue.outage().is_some();
        let deadline = is_due.then(|| state.queue.next_deadline()).flatten();
        let after = Counted::of(&state.queue);
        self.count(before, after);
        let is_exclusive = state.queue.is_exclusive();
        drop(state);
        self.count_evictable(before, after);
        if let Some(deadline) = deadline {
            self.shard.next_deadline.wake_at(deadline);
        }
        if is_settled && is_exclusive {
            // The calling task collects immediately. A group returns only the wakers of others.
            effects.wake = Wake::None;
        }
        let request = self.carry_out(effects);
        Some(Ok(Enqueued {
            id,
            request,
            is_settled,
        }))
    }

    /// Takes the outcome if it is available. Otherwise registers the waker.
    pub(crate) fn poll(self: &Arc<Self>, id: WaiterId, waker: &Waker, asked: RequestOrigin) -> Poll<Settled> {
        let mut state = self.state.lock();
        let Some(outcome) = state.queue.collect(id) else {
            let replaced = match state.queue.waker(id) {
                Some(known) if known.will_wake(waker) => None,
                _ => state.queue.set_waker(id, waker.clone()),
            };
            drop(state);
            // Not under the mutex: dropping a waker may run code of the caller's executor.
            drop(replaced);
            return Poll::Pending;
        };
        let to_flush = state.note(&outcome, asked);
        self.remove_if_unused(state);
        if let Some(contention) = to_flush {
            self.shard.manager.hot.add(&self.shard.name, &self.key, &contention);
        }
        Poll::Ready(self.settle(outcome, asked))
    }

    /// Why the store is unreachable, if the last request for this key failed.
    pub(crate) fn outage(&self) -> Option<LockError> {
        self.state.lock().queue.outage().cloned()
    }

    /// Whether the outcome is available.
    pub(crate) fn is_settled(&self, id: WaiterId) -> bool {
        self.state.lock().queue.is_settled(id)
    }

    /// Whether a request is in flight whose reply determines what happens next.
    pub(crate) fn awaits_store(&self) -> bool {
        self.state.lock().queue.awaits_store()
    }

    /// A waiter gives up.
    pub(crate) fn give_up(self: &Arc<Self>, id: WaiterId) {
        let mut state = self.state.lock();
        if state.queue.is_contended() && !state.queue.is_settled(id) {
            state.contention.get_or_insert_default().record_failure();
        }
        drop(state);
        self.apply_in_background(|queue, cx| queue.give_up(id, cx));
    }

    /// A snapshot of the holders and the waiters.
    pub(crate) fn snapshot(&self, now: Moment) -> KeySnapshot {
        let state = self.state.lock();
        let held = state.queue.guards().map(|(lease, token)| {
            let all = state.holding.iter().chain(&state.holding_together);
            let holding = all.into_iter().find(|holding| holding.token == token);
            HeldSnapshot {
                cycle: lease.cycle,
                token,
                age: holding.map_or(Duration::ZERO, |holding| now.since(holding.since)),
                remaining: lease.remaining(now),
                caller: holding.map(|holding| holding.caller),
                class: holding.map_or(DEFAULT_CLASS, |holding| holding.class),
            }
        });
        KeySnapshot {
            held: held.collect(),
            waiting: state.queue.waiting(),
            longest_wait: state
                .queue
                .waiting_since()
                .map_or(Duration::ZERO, |since| now.since(since)),
        }
    }

    /// The number of guards whose holders are known.
    #[cfg(test)]
    pub(crate) fn known_holders(&self) -> usize {
        let state = self.state.lock();
        state.holding.iter().len() + state.holding_together.len()
    }

    /// Calls `see` with the options and the wait so far of the waiters; see [`Queue::each_wait`].
    pub(crate) fn each_wait(&self, now: Moment, mut see: impl FnMut(&WaiterOptions, Duration)) {
        let state = self.state.lock();
        state.queue.each_wait(|options, since| see(options, now.since(since)));
    }

    /// Whether the lease of that cycle is still ours, as far as is known locally.
    pub(crate) fn holds(&self, cycle: Cycle) -> bool {
        let state = self.state.lock();
        state.queue.has_lease_of(cycle)
    }

    /// Whether that cycle is in use here.
    pub(super) fn is_current(&self, cycle: Cycle) -> bool {
        self.state.lock().queue.is_current(cycle)
    }

    /// The cycle that waits in the store's queue, if any.
    pub(super) fn queued_cycle(&self) -> Option<Cycle> {
        self.state.lock().queue.queued_cycle()
    }

    /// When the linger period ends, if the lease is lingering.
    pub(super) fn lingers_until(&self) -> Option<Moment> {
        self.state.lock().queue.lingers_until()
    }

    /// Flushes the recorded contention to the manager.
    pub(crate) fn flush_contention(&self) {
        let contention = self.state.lock().contention.take();
        if let Some(contention) = contention {
            self.shard.manager.hot.add(&self.shard.name, &self.key, &contention);
        }
    }

    /// Releases a guard. Returns whether it still had the lock, and the request to send.
    pub(crate) fn released(
        self: &Arc<Self>,
        cycle: Cycle,
        token: FencingToken,
        now: Moment,
    ) -> (bool, Option<Request>) {
        if !self.mode.is_exclusive() {
            let mut state = self.state.lock();
            let holders = &mut state.holding_together;
            if let Some(index) = holders.iter().position(|holder| holder.token == token) {
                holders.swap_remove(index);
            }
        }
        self.apply(now, |queue, cx| queue.released(cycle, token, cx))
    }

    /// Applies an event and carries out its effects. A request goes to the background thread.
    pub(crate) fn apply_in_background(
        self: &Arc<Self>,
        event: impl FnOnce(&mut Contender<Waker>, Context<'_>) -> Effects<Waker>,
    ) {
        let ((), request) = self.apply(Moment::now(), |queue, cx| ((), event(queue, cx)));
        if let Some(request) = request {
            self.execute_in_background(request);
        }
    }

    /// Something arrived from the store for a cycle.
    pub(crate) fn receive(self: &Arc<Self>, cycle: Cycle, event: StoreEvent<'_>) {
        self.apply_in_background(|queue, cx| queue.on_event(cycle, event, cx));
    }

    /// Lets the background thread execute a request.
    pub(crate) fn execute_in_background(self: &Arc<Self>, request: Request) {
        self.shard.send(Job::Request {
            entry: Arc::clone(self),
            request,
        });
    }

    /// Applies an event at the given time and carries out its effects. A request is returned to the
    /// caller.
    pub(super) fn apply<R>(
        self: &Arc<Self>,
        now: Moment,
        event: impl FnOnce(&mut Contender<Waker>, Context<'_>) -> (R, Effects<Waker>),
    ) -> (R, Option<Request>) {
        let cx = self.context(now);
        let mut state = self.state.lock();
        let before = Counted::of(&state.queue);
        let (result, mut effects) = event(&mut state.queue, cx);
        let after = Counted::of(&state.queue);
        self.count(before, after);
        let deadline = state.queue.next_deadline();
        if let Some(rare) = &mut effects.rare {
            drop(state);
            // Before the entry leaves the table. Otherwise a shutdown could find neither the entry
            // nor the pending release, and finish before the cycle is released.
            self.abandon(std::mem::take(&mut rare.abandoned));
            state = self.state.lock();
        }
        self.remove_if_unused(state);
        self.count_evictable(before, after);
        if let Some(deadline) = deadline {
            self.shard.next_deadline.wake_at(deadline);
        }
        (result, self.carry_out(effects))
    }

    /// Counts what an event has changed. Called under the mutex of the entry.
    fn count(&self, before: Counted, after: Counted) {
        let metrics = &self.shard.metrics;
        if before.leases != after.leases {
            metrics.leases_changed(before.leases, after.leases);
        }
        if !before.is_evictable && after.is_evictable {
            metrics.lease_lingers();
        }
    }

    /// Counts that the key is no longer evictable. Called only after the key has left the table, if
    /// it does: otherwise the check of the key limit would briefly count it as in use.
    fn count_evictable(&self, before: Counted, after: Counted) {
        if before.is_evictable && !after.is_evictable {
            self.shard.metrics.lease_lingers_no_more();
        }
    }

    fn remove_if_unused(self: &Arc<Self>, mut state: parking_lot::MutexGuard<'_, State>) {
        if state.removed || !(state.queue.is_unused() || state.queue.is_over()) {
            return;
        }
        state.removed = true;
        let remote_waiters_seen = state.queue.remote_waiters_seen();
        let contention = state.contention.take();
        drop(state);
        if let Some(contention) = contention {
            self.shard.manager.hot.add(&self.shard.name, &self.key, &contention);
        }
        self.shard.forget(self, remote_waiters_seen);
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
    fn carry_out_rare(self: &Arc<Self>, rare: Rare) {
        let Rare {
            abandoned,
            ended,
            lost,
            stale_grant,
            more_requests,
            more_served,
        } = rare;
        for lease in ended {
            WAKERS.call(|| lease.notify_of_loss());
        }
        self.abandon(abandoned);
        if stale_grant {
            self.shard.metrics.stale_grants.increment(1);
        }
        for guards in more_served {
            self.shard.metrics.served(guards);
        }
        for request in more_requests {
            self.execute_in_background(request);
        }
        for reason in lost {
            self.shard.metrics.lost(reason);
            self.shard.manager.slow_log.lost(&self.key, &self.shard.name, reason);
        }
    }

    /// Schedules background releases for cycles that are over.
    fn abandon(&self, abandoned: Vec<Cycle>) {
        for cycle in abandoned {
            self.shard.abandon(&self.key, cycle);
        }
    }

    fn settle(&self, outcome: Outcome, asked: RequestOrigin) -> Settled {
        let (key, shard) = (|| self.key.to_string(), || self.shard.name.to_string());
        match outcome {
            Outcome::Granted(granted) => {
                self.shard.metrics.acquired(granted.path);
                Settled::Granted(granted)
            }
            Outcome::Busy => Settled::Busy,
            Outcome::Failed(error) => Settled::Failed(error),
            Outcome::TooLate => Settled::failed(Failure::Unavailable {
                shard: shard(),
                step: "acquire",
                key: Some(key()),
                waited: Moment::now().since(asked.at),
                reason: "replies take longer than the lease lasts; raise the ttl".into(),
            }),
            Outcome::Regressed { token, floor } => {
                self.shard.metrics.token_regressions.increment(1);
                Settled::failed(Failure::TokenRegression {
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
            rules: &self.shard.manager.rules,
            cycles: &self.shard.manager.cycles,
            capacity: &*self.shard.manager,
            min_holds: &self.shard.manager.min_holds,
            epoch: self.shard.store.epoch(self.slot),
        }
    }
}
