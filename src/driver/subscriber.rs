//! Receives what a store pushes.
//!
//! # Implementation details
//!
//! Pushes are dispatched on the runtime on which the manager was connected. Where the store
//! supports it, they are also received there. A grant then wakes only the thread of the task it is
//! for: a hop between threads costs about as much as the trip from the server. Once that runtime is
//! gone, or makes no progress while a task waits, the background thread does both
//! ([`runtime`](crate::runtime)). Other work of a store (following a failover, keeping its places
//! in queues) always runs on that thread.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::mpsc;

use super::Shard;
use crate::backoff::Backoff;
use crate::engine::StoreEvent;
use crate::key::Slot;
use crate::protocol::Push;
use crate::store::StoreError;
use crate::text::printable;

/// The longest delay between losing the inbox and asking again. The delay is at least half of this.
const CUT_OFF_MAX: Duration = Duration::from_millis(200);

/// Reports the result of the first subscription.
pub(super) type Subscribed = mpsc::UnboundedSender<Result<(), SubscribeError>>;

/// A server refuses the subscription, or the connection for renewals.
#[derive(Debug)]
pub(crate) struct SubscribeError {
    /// The shard that was refused.
    pub(crate) shard: Arc<Shard>,
    pub(crate) step: &'static str,
    pub(crate) error: StoreError,
}

/// Receives pushes of the shard's store for as long as it is polled, on the application's runtime
/// if there is one.
pub(super) async fn subscribe(shard: Arc<Shard>, subscribed: Option<Subscribed>) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let pushes = Arc::new(Pushes::new(receiver));
    if let Some(outcome) = &subscribed {
        connect(&shard, outcome).await;
    }
    let receive = || receive(Arc::clone(&shard), Arc::clone(&pushes), subscribed.clone());
    tokio::join!(shard.store.run_subscriber(sender), shard.manager.runtimes.run(receive));
}

/// Opens the connections needed for renewals. Without them the manager must not take locks.
async fn connect(shard: &Arc<Shard>, outcome: &Subscribed) {
    let connected = tokio::time::timeout(shard.manager.timeout, shard.store.connect_background()).await;
    if let Err(error) = connected.unwrap_or_else(|_| Err(shard.no_answer())) {
        let error = SubscribeError {
            shard: Arc::clone(shard),
            step: "connect",
            error,
        };
        // The manager may have given up connecting.
        outcome.send(Err(error)).ok();
    }
}

/// The pushes of a store, received by the task that began last.
///
/// If the application's runtime is blocked, its task is ended and another one takes over. The first
/// task may be in the middle of a poll at that moment. If its waker were registered last, the other
/// task would sleep forever.
struct Pushes(Mutex<Receiving>);

struct Receiving {
    receiver: mpsc::UnboundedReceiver<Push>,
    begun: u64,
}

impl Pushes {
    fn new(receiver: mpsc::UnboundedReceiver<Push>) -> Self {
        Self(Mutex::new(Receiving { receiver, begun: 0 }))
    }

    /// Begins receiving in place of the previous task. Returns the number of the new one.
    fn begin(&self) -> u64 {
        let mut receiving = self.0.lock();
        receiving.begun += 1;
        receiving.begun
    }

    /// The next push for the task with this number. The lock is held for one poll at a time,
    /// because another task may take over.
    async fn next(&self, task: u64) -> Option<Push> {
        poll_fn(|cx| {
            let mut receiving = self.0.lock();
            if receiving.begun != task {
                return Poll::Pending;
            }
            // Replacing a waker here is safe: both belong to these tasks, which run no foreign
            // code.
            receiving.receiver.poll_recv(cx)
        })
        .await
    }
}

/// Dispatches pushes to their queues.
async fn receive(shard: Arc<Shard>, pushes: Arc<Pushes>, mut subscribed: Option<Subscribed>) {
    let me = pushes.begin();
    let mut refused: Option<Arc<str>> = None;
    let mut cut_off: Option<tokio::task::AbortHandle> = None;
    let mut is_cut_off = false;
    let mut is_forgery_reported = false;
    while let Some(push) = pushes.next(me).await {
        if push
            .cycle()
            .is_some_and(|cycle| !shard.manager.cycles.has_opened(cycle))
        {
            if !std::mem::replace(&mut is_forgery_reported, true) {
                crate::log::error!(
                    shard = %shard.name,
                    "a message in the inbox of this manager was not sent by another manager and is ignored, as \
                     others like it will be: another client of the server publishes to the channels of locks; \
                     revoke that permission (see the ACL in config/acl.conf)"
                );
            }
            continue;
        }
        match push {
            // Channels have no database, so a shard on another database of the same server receives
            // this too. The shard of the key acts on it.
            Push::Granted { ref key, .. } | Push::YourTurn { ref key, .. } | Push::RemoteWaiter { ref key, .. }
                if !shard.owns(key) => {}
            Push::Granted { key, grant } => match shard.table.get(&key, grant.cycle.mode()) {
                Some(entry) => entry.receive(grant.cycle, StoreEvent::Grant(grant)),
                // No task wants the key any more.
                None => {
                    shard.metrics.stale_grants.increment(1);
                    shard.abandon(&key, grant.cycle);
                }
            },
            Push::YourTurn { key, cycle } => match shard.table.get(&key, cycle.mode()) {
                Some(entry) => entry.receive(cycle, StoreEvent::YourTurn),
                None => shard.abandon(&key, cycle),
            },
            Push::RemoteWaiter { key, cycle } => match shard.table.get(&key, cycle.mode()) {
                Some(entry) => entry.receive(cycle, StoreEvent::RemoteWaiter),
                // The cycle is over.
                None => shard.abandon(&key, cycle),
            },
            Push::Resubscribed { slot } => {
                if let Some(timer) = cut_off.take() {
                    timer.abort();
                }
                if std::mem::take(&mut is_cut_off) {
                    shard.metrics.reconnects.increment(1);
                }
                if let Some(outcome) = subscribed.take() {
                    // The manager may have given up connecting.
                    outcome.send(Ok(())).ok();
                }
                refused = None;
                ask_again(&shard, slot);
            }
            // If the server is gone, no pushes arrive, so waiters ask again and get the error. If
            // the inbox comes back first, `Resubscribed` does the same.
            Push::Disconnected => {
                is_cut_off = true;
                let shard = Arc::clone(&shard);
                let runtimes = Arc::clone(&shard.manager.runtimes);
                let task = runtimes.spawn(async move {
                    tokio::time::sleep(Backoff::delay_after(0, CUT_OFF_MAX, CUT_OFF_MAX)).await;
                    ask_again(&shard, None);
                });
                cut_off = Some(task.abort_handle());
            }
            Push::Refused { reason } => {
                if let Some(outcome) = subscribed.take() {
                    let error = SubscribeError {
                        shard: Arc::clone(&shard),
                        step: "subscribe",
                        error: StoreError::Refused((&*reason).into()),
                    };
                    // The manager may have given up connecting.
                    outcome.send(Err(error)).ok();
                }
                // The store retries every second. Log each reason once.
                if refused.as_ref() != Some(&reason) {
                    crate::log::error!(
                        shard = %shard.name,
                        reason = %printable(&reason),
                        "the inbox is refused, so locks are handed over only when their leases expire"
                    );
                    refused = Some(reason);
                }
            }
        }
    }
}

/// Makes all waiting keys, or those of one slot, ask again at once. The connection pipelines them.
pub(super) fn ask_again(shard: &Arc<Shard>, slot: Option<Slot>) {
    for entry in shard.table.all() {
        if slot.is_none_or(|slot| shard.store.slot_of(&entry.key) == slot) {
            entry.apply_in_background(|queue, cx| queue.on_resubscribed(cx));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::task::{Context, Wake, Waker};

    use super::*;

    #[derive(Default)]
    struct Woken(AtomicBool);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.store(true, Ordering::SeqCst);
        }
    }

    /// The task on the application's runtime was polling for a push while the background task
    /// began. The inbox kept the waker of the former, which was then dropped, and no grant was
    /// received any more.
    #[test]
    fn task_that_takes_over_is_woken_even_if_the_previous_one_still_polls() {
        let (sender, receiver) = mpsc::unbounded_channel();
        let pushes = Pushes::new(receiver);
        let [first, second] = [(); 2].map(|()| pushes.begin());
        let [mut late, mut next] = [first, second].map(|task| Box::pin(pushes.next(task)));
        let [of_first, of_second] = [(); 2].map(|()| Arc::<Woken>::default());
        let wakers = [&of_first, &of_second].map(|woken| Waker::from(Arc::clone(woken)));
        assert!(next.as_mut().poll(&mut Context::from_waker(&wakers[1])).is_pending());
        assert!(late.as_mut().poll(&mut Context::from_waker(&wakers[0])).is_pending());
        drop(late);
        sender.send(Push::Disconnected).unwrap();
        let woken = [&of_first, &of_second].map(|woken| woken.0.load(Ordering::SeqCst));
        assert_eq!(woken, [false, true]);
        let polled = next.as_mut().poll(&mut Context::from_waker(&wakers[1]));
        assert!(matches!(polled, Poll::Ready(Some(Push::Disconnected))));
    }
}
