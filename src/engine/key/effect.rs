//! What the queue of a key asks its caller to do.

use std::sync::Arc;
use std::time::Duration;

use crate::error::LossReason;
use crate::lease::Lease;
use crate::protocol::{AcquireKind, Cycle};

/// The result of an event. The queue has already updated its own state; the shard has to carry out
/// the rest.
#[derive(Debug)]
#[must_use = "an effect that is not carried out strands a waiter or a lease"]
pub(crate) struct Effects<W> {
    /// The next request for this key. At most one is in flight at a time for each cycle.
    pub(crate) request: Option<Request>,
    /// The waiters whose outcome can be collected.
    pub(crate) wake: Wake<W>,
    /// A waker that is no longer needed and must be dropped outside the mutex. Like calling a
    /// waker, dropping it runs foreign code.
    pub(crate) discarded: Option<W>,
    /// A hold of the lease ended. The value is the number of guards it served.
    pub(crate) served: Option<u32>,
    /// The lease was passed to another process while local waiters were left, because its turn
    /// ended with this bound.
    pub(crate) yielded: Option<Bound>,
    /// Effects of few events, boxed so that `Effects` is small enough to be moved without a call.
    pub(crate) rare: Option<Box<Rare>>,
}

/// The part of [`Effects`] that few events need.
#[derive(Debug, Default)]
pub(crate) struct Rare {
    /// Cycles that are over but that the store may still know. Release them in the background.
    pub(crate) abandoned: Vec<Cycle>,
    /// Leases that ended. They are already invalid; tasks that wait for the loss must be notified.
    pub(crate) ended: Vec<Arc<Lease>>,
    /// The reasons why guards lost their leases.
    pub(crate) lost: Vec<LossReason>,
    /// Further requests, each for another cycle of the key.
    pub(crate) more_requests: Vec<Request>,
    /// Further holds that ended; see [`Effects::served`].
    pub(crate) more_served: Vec<u32>,
    /// A grant was stale: its cycle was over, or the grant had expired.
    pub(crate) stale_grant: bool,
}

/// A bound on the bypass of other processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bound {
    /// All tasks that waited when the turn began were served, and others have come since.
    Gate,
    /// The limit on the guards of a turn.
    Burst,
    /// The limit on the duration of a turn.
    Slice,
}

impl Bound {
    /// Ordered by discriminant.
    pub(crate) const ALL: [Self; 3] = [Self::Gate, Self::Burst, Self::Slice];

    /// The name of the setting, or `gate`.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Gate => "gate",
            Self::Burst => "max_burst",
            Self::Slice => "max_slice",
        }
    }
}

/// A request for the key. Its result is reported as a [`StoreEvent`](super::StoreEvent).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Request {
    /// Acquire the lease, or extend it and reserve more tokens.
    Acquire {
        cycle: Cycle,
        kind: AcquireKind,
        ttl: Duration,
        tokens: u32,
    },
    /// Release the lease or leave the queue. If `requeue` is set, that cycle first joins the tail.
    Release {
        cycle: Cycle,
        requeue: Option<Cycle>,
        /// Whether no waiter is known in the store.
        nobody_waits: bool,
        tokens: u32,
    },
}

impl Request {
    /// The cycle that the reply is reported for.
    pub(crate) const fn cycle(&self) -> Cycle {
        match self {
            Self::Acquire { cycle, .. } | Self::Release { cycle, .. } => *cycle,
        }
    }
}

/// Zero, one or many waiters. One needs no allocation.
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

    /// Adds a request for another cycle of the key.
    pub(super) fn add_request(&mut self, request: Request) {
        match self.request {
            None => self.request = Some(request),
            Some(_) => self.rare().more_requests.push(request),
        }
    }

    /// Adds another hold that ended.
    pub(super) fn add_served(&mut self, guards: u32) {
        match self.served {
            None => self.served = Some(guards),
            Some(_) => self.rare().more_served.push(guards),
        }
    }

    pub(super) fn rare(&mut self) -> &mut Rare {
        self.rare.get_or_insert_default()
    }

    pub(super) fn abandon(&mut self, cycle: Cycle) {
        let abandoned = &mut self.rare().abandoned;
        if !abandoned.contains(&cycle) {
            abandoned.push(cycle);
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
