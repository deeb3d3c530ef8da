//! The inboxes as seen by requests: whether the inbox of a slot is subscribed, and how to ask for
//! it.

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};

use super::topology::NodeAddress;
use crate::clock::Moment;
use crate::key::{SLOTS, Slot};
use crate::store::StoreError;

/// The request side of the inboxes; the subscriber has the other side.
pub(super) struct Inbox {
    /// For each slot, a hash of the node on which its inbox is subscribed and confirmed; zero if it
    /// is not.
    places: Box<[AtomicU64]>,
    /// For each slot, when its inbox was last asked for, or until when a lease in it lasts, in
    /// seconds since `born`.
    used: Box<[AtomicU32]>,
    born: Moment,
    /// Hashes a node's address. A collision is less likely than a flipped bit, and would only delay
    /// a correction.
    hasher: RandomState,
    requests: mpsc::UnboundedSender<SubscribeRequest>,
    /// Taken by the subscriber.
    receiver: Mutex<Option<mpsc::UnboundedReceiver<SubscribeRequest>>>,
}

/// A request's message to the subscriber.
#[derive(Debug)]
pub(super) enum SubscribeRequest {
    /// Notify `done` when the inbox of the slot is subscribed.
    Subscribe { slot: Slot, done: oneshot::Sender<()> },
    /// The slot's owner is not the node on which its inbox is subscribed.
    Elsewhere { slot: Slot },
}

impl Inbox {
    pub(super) fn new() -> Self {
        let (requests, receiver) = mpsc::unbounded_channel();
        Self {
            places: (0..SLOTS).map(|_| AtomicU64::new(0)).collect(),
            used: (0..SLOTS).map(|_| AtomicU32::new(0)).collect(),
            born: Moment::now(),
            hasher: RandomState::new(),
            requests,
            receiver: Mutex::new(Some(receiver)),
        }
    }

    /// Waits until the inbox of the slot is subscribed and the node has confirmed it.
    ///
    /// # Errors
    ///
    /// The subscriber has stopped because the manager is shutting down.
    pub(super) async fn ready(&self, slot: Slot) -> Result<(), StoreError> {
        self.used[usize::from(slot.number())].fetch_max(self.now(), Ordering::AcqRel);
        if self.is_subscribed(slot) {
            return Ok(());
        }
        let gone = || StoreError::Unavailable("the inbox subscriber has stopped".into());
        let (done, subscribed) = oneshot::channel();
        let request = SubscribeRequest::Subscribe { slot, done };
        self.requests.send(request).map_err(|_| gone())?;
        subscribed.await.map_err(|_| gone())
    }

    /// A lease of this slot lasts for `ttl`: if its inbox is subscribed, it does not count as idle
    /// before then.
    pub(super) fn keep_for(&self, slot: Slot, ttl: Duration) {
        if self.is_subscribed(slot) {
            let until = self
                .now()
                .saturating_add(u32::try_from(ttl.as_secs()).unwrap_or(u32::MAX));
            self.used[usize::from(slot.number())].fetch_max(until, Ordering::AcqRel);
        }
    }

    /// A cycle was queued by the slot's owner at this address, so the inbox must be subscribed
    /// there.
    pub(super) fn waits_at(&self, slot: Slot, place: &NodeAddress) {
        let subscribed = self.places[usize::from(slot.number())].load(Ordering::Acquire);
        if subscribed != 0 && subscribed != self.number(place) {
            // If the subscriber has stopped, the manager is shutting down.
            self.requests.send(SubscribeRequest::Elsewhere { slot }).ok();
        }
    }

    pub(super) fn is_subscribed(&self, slot: Slot) -> bool {
        self.places[usize::from(slot.number())].load(Ordering::Acquire) != 0
    }

    pub(super) fn set_place(&self, slot: Slot, place: Option<&NodeAddress>) {
        let number = place.map_or(0, |place| self.number(place));
        self.places[usize::from(slot.number())].store(number, Ordering::Release);
    }

    /// For how many seconds no request has asked for the slot's inbox.
    pub(super) fn idle_seconds(&self, slot: Slot) -> u32 {
        let used = self.used[usize::from(slot.number())].load(Ordering::Acquire);
        self.now().saturating_sub(used)
    }

    pub(super) fn take_receiver(&self) -> Option<mpsc::UnboundedReceiver<SubscribeRequest>> {
        self.receiver.lock().take()
    }

    fn number(&self, place: &NodeAddress) -> u64 {
        self.hasher.hash_one(&**place) | 1
    }

    fn now(&self) -> u32 {
        let elapsed = Moment::now().since(self.born).as_secs();
        u32::try_from(elapsed).unwrap_or(u32::MAX)
    }
}
