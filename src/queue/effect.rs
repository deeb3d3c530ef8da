//! What the queue of a key wants done.

use std::sync::Arc;
use std::time::Duration;

use crate::error::LossReason;
use crate::lease::Lease;
use crate::protocol::{Ask, Cycle};

/// What an event led to. The queue has already taken it into account; the shard only has to carry it out.
#[derive(Debug)]
#[must_use = "an effect that is not carried out strands a waiter or a lease"]
pub(crate) struct Effects<W> {
    /// The next request for this key. There is never more than one on its way.
    pub(crate) request: Option<Request>,
    /// The waiters whose outcome is there to be collected.
    pub(crate) wake: Wake<W>,
    /// The waker of a waiter that does not need it, to be dropped. Dropping a waker runs foreign code, as calling it does.
    pub(crate) discarded: Option<W>,
    /// A tenure of the lease ended; it served so many guards.
    pub(crate) served: Option<u32>,
    /// The lease was given up for another process while local waiters were left, since that bound was reached.
    pub(crate) yielded: Option<Bound>,
    /// What few events lead to, so that the effects of the others are small enough to be moved without a call.
    pub(crate) rare: Option<Box<Rare>>,
}

/// The part of [`Effects`] that few events have.
#[derive(Debug, Default)]
pub(crate) struct Rare {
    /// Cycles that are over, of which the store may still know something: release them in the background.
    pub(crate) abandoned: [Option<Cycle>; 2],
    /// A lease that has ended. It is invalid already; the tasks that wait for its loss must be notified.
    pub(crate) ended: Option<Arc<Lease>>,
    /// A guard has lost its lease, and why.
    pub(crate) lost: Option<LossReason>,
    /// A grant was of no use: its cycle was over, or it had run out.
    pub(crate) stale_grant: bool,
}

/// What bounds the bypass of other processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bound {
    Burst,
    Slice,
}

impl Bound {
    /// In the order of their numbers.
    pub(crate) const ALL: [Self; 2] = [Self::Burst, Self::Slice];

    /// The name of its setting.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Burst => "max_burst",
            Self::Slice => "max_slice",
        }
    }
}

/// A request for the key, to be answered by [`Queue::replied`](super::Queue::replied),
/// [`Queue::released_remotely`](super::Queue::released_remotely) or [`Queue::failed`](super::Queue::failed).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Request {
    /// Ask for the lease, or for more time and tokens under it.
    Acquire {
        cycle: Cycle,
        ask: Ask,
        ttl: Duration,
        tokens: u32,
    },
    /// Give the lease or the place in the queue back; where `requeue` is set, join the tail with that cycle first.
    Release {
        cycle: Cycle,
        requeue: Option<Cycle>,
        /// Whether nobody is known to wait in the store.
        nobody_waits: bool,
        tokens: u32,
    },
}

/// None, one or many waiters; one without an allocation.
#[derive(Debug)]
pub(crate) enum Wake<W> {
    None,
    One(W),
    Many(Vec<W>),
}

impl<W> Effects<W> {
    pub(crate) const fn none() -> Self {
        Self {
            request: None,
            wake: Wake::None,
            discarded: None,
            served: None,
            yielded: None,
            rare: None,
        }
    }

    pub(super) fn request(&mut self, request: Request) {
        debug_assert!(
            self.request.is_none(),
            "two requests for one key: {:?} and {request:?}",
            self.request
        );
        self.request = Some(request);
    }

    pub(super) fn rare(&mut self) -> &mut Rare {
        self.rare.get_or_insert_default()
    }

    pub(super) fn abandon(&mut self, cycle: Cycle) {
        let abandoned = &mut self.rare().abandoned;
        if abandoned.contains(&Some(cycle)) {
            return;
        }
        match abandoned {
            [first @ None, _] => *first = Some(cycle),
            [_, second] => {
                debug_assert!(second.is_none(), "more than two cycles abandoned at once");
                *second = Some(cycle);
            }
        }
    }

    pub(super) fn wake(&mut self, waiter: Option<W>) {
        let Some(waiter) = waiter else { return };
        self.wake = match std::mem::replace(&mut self.wake, Wake::None) {
            Wake::None => Wake::One(waiter),
            Wake::One(first) => Wake::Many(vec![first, waiter]),
            Wake::Many(mut all) => {
                all.push(waiter);
                Wake::Many(all)
            }
        };
    }
}

impl<W> IntoIterator for Wake<W> {
    type Item = W;
    type IntoIter = std::iter::Chain<std::option::IntoIter<W>, std::vec::IntoIter<W>>;

    fn into_iter(self) -> Self::IntoIter {
        let (one, many) = match self {
            Self::None => (None, Vec::new()),
            Self::One(waiter) => (Some(waiter), Vec::new()),
            Self::Many(all) => (None, all),
        };
        one.into_iter().chain(many)
    }
}
