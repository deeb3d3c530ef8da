//! What contends for a key in one kind of mode: a queue for exclusive locks, a group for the
//! others.

use std::time::Duration;

use super::group::Group;
use super::{Context, Effects, Outcome, Queue, StoreEvent, WaiterId, WaiterOptions};
use crate::clock::Moment;
use crate::error::LockError;
use crate::fence::FencingToken;
use crate::lease::Lease;
use crate::mode::LockMode;
use crate::protocol::Cycle;

/// See the module documentation. The methods are those of [`Queue`], which documents them.
#[derive(Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "the exclusive variant is the hot path, and a box would cost it an allocation for each key"
)]
pub(crate) enum Contender<W> {
    /// One guard at a time.
    Exclusive(Queue<W>),
    /// Several guards at a time.
    Group(Box<Group<W>>),
}

/// Calls a method of whichever it is.
macro_rules! either {
    ($self:ident, $it:ident => $call:expr) => {
        match $self {
            Self::Exclusive($it) => $call,
            Self::Group($it) => $call,
        }
    };
}

impl<W> Contender<W> {
    pub(crate) fn new(mode: LockMode) -> Self {
        match mode {
            LockMode::Exclusive => Self::Exclusive(Queue::new()),
            LockMode::Shared | LockMode::Permits { .. } => Self::Group(Box::new(Group::new())),
        }
    }

    pub(crate) const fn is_exclusive(&self) -> bool {
        matches!(self, Self::Exclusive(_))
    }

    pub(crate) fn is_unused(&self) -> bool {
        either!(self, it => it.is_unused())
    }

    pub(crate) fn is_over(&self) -> bool {
        either!(self, it => it.is_over())
    }

    /// The number of leases that are ours.
    pub(crate) fn leases(&self) -> usize {
        match self {
            Self::Exclusive(queue) => usize::from(queue.holds()),
            Self::Group(group) => group.leases(),
        }
    }

    pub(crate) fn awaits_store(&self) -> bool {
        either!(self, it => it.awaits_store())
    }

    /// The shortest TTL of the leases that are ours.
    pub(crate) fn ttl(&self) -> Option<Duration> {
        match self {
            Self::Exclusive(queue) => queue.holds().then(|| queue.ttl()),
            Self::Group(group) => group.ttl(),
        }
    }

    pub(crate) fn is_current(&self, cycle: Cycle) -> bool {
        either!(self, it => it.is_current(cycle))
    }

    /// Whether the lease of that cycle is ours.
    pub(crate) fn has_lease_of(&self, cycle: Cycle) -> bool {
        match self {
            Self::Exclusive(queue) => queue.lease().is_some_and(|(lease, _)| lease.cycle == cycle),
            Self::Group(group) => group.has_lease_of(cycle),
        }
    }

    pub(crate) fn queued_cycle(&self) -> Option<Cycle> {
        either!(self, it => it.queued_cycle())
    }

    pub(crate) const fn waiting(&self) -> usize {
        either!(self, it => it.waiting())
    }

    /// See [`Queue::each_wait`].
    pub(crate) fn each_wait(&self, see: impl FnMut(&WaiterOptions, Moment)) {
        either!(self, it => it.each_wait(see));
    }

    pub(crate) fn waiting_since(&self) -> Option<Moment> {
        either!(self, it => it.waiting_since())
    }

    pub(crate) fn lingers_until(&self) -> Option<Moment> {
        either!(self, it => it.lingers_until())
    }

    pub(crate) fn is_evictable(&self) -> bool {
        either!(self, it => it.is_evictable())
    }

    /// Whether a task that arrives now has to wait for another one.
    pub(crate) fn is_contended(&self) -> bool {
        match self {
            Self::Exclusive(queue) => queue.is_contended(),
            Self::Group(group) => group.waiting() > 0,
        }
    }

    /// The leases of the guards that are out, with their tokens.
    pub(crate) fn guards(&self) -> impl Iterator<Item = (&Lease, FencingToken)> {
        let (queue, group) = match self {
            Self::Exclusive(queue) => (Some(queue), None),
            Self::Group(group) => (None, Some(group)),
        };
        let exclusive = queue
            .and_then(Queue::lease)
            .and_then(|(lease, token)| Some((lease, token?)));
        exclusive
            .into_iter()
            .chain(group.into_iter().flat_map(|group| group.guards()))
    }

    /// The leases that linger.
    #[cfg(test)]
    pub(crate) fn lingering(&self) -> impl Iterator<Item = &Lease> {
        let (queue, group) = match self {
            Self::Exclusive(queue) => (Some(queue), None),
            Self::Group(group) => (None, Some(group)),
        };
        let lanes = group.into_iter().flat_map(|group| group.queues());
        let leases = lanes.filter_map(|queue| queue.lingers_until().and_then(|_| queue.lease()));
        let exclusive = queue.and_then(|queue| queue.lingers_until().and_then(|_| queue.lease()));
        exclusive.into_iter().chain(leases).map(|(lease, _)| lease)
    }

    pub(crate) fn remote_waiters_seen(&self) -> bool {
        either!(self, it => it.remote_waiters_seen())
    }

    pub(crate) fn failed_attempts(&self) -> u32 {
        either!(self, it => it.failed_attempts())
    }

    pub(crate) fn outage(&self) -> Option<&LockError> {
        either!(self, it => it.outage())
    }

    pub(crate) fn enqueue(
        &mut self,
        options: WaiterOptions,
        waker: Option<W>,
        cx: Context<'_>,
    ) -> (WaiterId, Effects<W>) {
        either!(self, it => it.enqueue(options, waker, cx))
    }

    pub(crate) fn is_settled(&self, id: WaiterId) -> bool {
        either!(self, it => it.is_settled(id))
    }

    pub(crate) fn collect(&mut self, id: WaiterId) -> Option<Outcome> {
        either!(self, it => it.collect(id))
    }

    #[must_use = "a waker must not be dropped under the mutex of the key"]
    pub(crate) fn set_waker(&mut self, id: WaiterId, waker: W) -> Option<W> {
        either!(self, it => it.set_waker(id, waker))
    }

    pub(crate) fn waker(&self, id: WaiterId) -> Option<&W> {
        either!(self, it => it.waker(id))
    }

    pub(crate) fn give_up(&mut self, id: WaiterId, cx: Context<'_>) -> Effects<W> {
        either!(self, it => it.give_up(id, cx))
    }

    pub(crate) fn released(&mut self, cycle: Cycle, token: FencingToken, cx: Context<'_>) -> (bool, Effects<W>) {
        either!(self, it => it.released(cycle, token, cx))
    }

    pub(crate) fn evict(&mut self, cx: Context<'_>) -> Effects<W> {
        either!(self, it => it.evict(cx))
    }

    pub(crate) fn stop_lingering(&mut self, cx: Context<'_>) -> Effects<W> {
        either!(self, it => it.stop_lingering(cx))
    }

    pub(crate) fn close(&mut self, cx: Context<'_>) -> Effects<W> {
        either!(self, it => it.close(cx))
    }

    pub(crate) fn disown(&mut self, cx: Context<'_>) -> Effects<W> {
        either!(self, it => it.disown(cx))
    }

    pub(crate) fn next_deadline(&self) -> Option<Moment> {
        either!(self, it => it.next_deadline())
    }

    pub(crate) fn tick(&mut self, cx: Context<'_>) -> Effects<W> {
        either!(self, it => it.tick(cx))
    }

    /// The renewal of a lease that is due or will be soon. Ask again until there is none.
    pub(crate) fn renewal(&mut self, cx: Context<'_>) -> Option<(Cycle, Duration, Duration)> {
        either!(self, it => it.renewal(cx))
    }

    /// Something arrived from the store for a cycle.
    pub(crate) fn on_event(&mut self, cycle: Cycle, event: StoreEvent<'_>, cx: Context<'_>) -> Effects<W> {
        either!(self, it => it.on_event(cycle, event, cx))
    }

    pub(crate) fn on_resubscribed(&mut self, cx: Context<'_>) -> Effects<W> {
        either!(self, it => it.on_resubscribed(cx))
    }
}
