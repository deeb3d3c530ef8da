//! The subscriber of a manager in a cluster: one sharded channel in each slot where it waits, on
//! dedicated connections.
//!
//! # Implementation details
//!
//! One task on the background thread owns all subscriptions. A request that may enqueue in a slot
//! first asks for the slot's inbox ([`Inbox::ready`]) and is notified when the slot's owner has
//! *confirmed* the subscription. What counts is the confirmation among the pushes of the
//! connection, not the reply to the command: unsolicited messages may be taken for replies. Pushes
//! arrive in the order in which the node made them, so the last one about a channel is valid. Each
//! unconfirmed slot has exactly one pending attempt, which is repeated until the confirmation
//! arrives.
//!
//! A subscription is *lost* when its connection breaks, when the node ends it because the slot
//! moved, when the map or a reply shows another owner of the slot, or when it is unsubscribed
//! because it was idle for long. **No waiter is lost:** every loss is followed by `Resubscribed`
//! for that slot, after the next confirmation. If resubscribing takes longer than `store_timeout`,
//! `Resubscribed` is sent anyway so that waiters retry and see the error. Waiters in the slot, and
//! requests in flight, then send their acquire again. A request executed before the loss is thus
//! repeated once the subscription is back; the grant for one executed later arrives on the new
//! subscription. In between, the release script finds no subscriber and skips to the next cycle in
//! the queue; the repeated request enqueues again.
//!
//! Neither a node that hangs nor a proxy that has forgotten a connection breaks it. Each connection
//! with subscriptions is therefore checked every few seconds by subscribing again to one of its
//! channels; a connection that does not answer is replaced. While any slot is subscribed, the map
//! is read every few seconds, even if requests also read it. It is also read after a renewal was
//! not answered in time, since a renewal's limit may be too short to find out why.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use deadpool_redis::redis::{PushInfo, PushKind, RedisError, ServerErrorKind, cmd};
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use tokio::sync::{mpsc, oneshot};

use super::super::client::{Purpose, named};
use super::super::{reply, subscriber};
use super::Shared;
use super::inbox::{Inbox, SubscribeRequest};
use super::node::{AskError, NodeLink, ReceivedPush};
use super::pool::NodePool;
use super::topology::{NodeAddress, redirected};
use crate::backoff::Backoff;
use crate::clock::Moment;
use crate::key::Slot;
use crate::protocol::Push;

/// The first and the longest pause between attempts to subscribe.
const PAUSE_MIN: Duration = Duration::from_millis(5);
const PAUSE_MAX: Duration = Duration::from_millis(250);
/// How long after the reply the confirmation must have been read.
const CONFIRMED_WITHIN: Duration = Duration::from_millis(20);
/// How often subscriptions are compared with the map, and after how many comparisons the map is
/// read.
const TICK_EVERY: Duration = Duration::from_millis(500);
const SLOTS_EVERY_TICKS: u32 = 4;
/// After how many comparisons each connection with subscriptions is checked.
const CHECK_EVERY_TICKS: u32 = 4;

/// See the module.
pub(super) struct Subscriber {
    pool: Arc<NodePool>,
    shared: Arc<Shared>,
    inbox: Arc<Inbox>,
    pushes: mpsc::UnboundedSender<Push>,
    subscribers: HashMap<NodeAddress, Arc<NodeLink>>,
    received: mpsc::UnboundedSender<ReceivedPush>,
    subscriptions: HashMap<Slot, Subscription>,
    attempts: FuturesUnordered<BoxFuture<'static, (Slot, u64, Ended)>>,
    next_attempt: u64,
    /// The pending checks of connections. Each yields its connection if that does not answer.
    checks: FuturesUnordered<BoxFuture<'static, Option<(NodeAddress, u64)>>>,
    /// How many connections with subscriptions broke since the last confirmation.
    cut_off: u64,
}

struct Subscription {
    /// The connection on which it is confirmed.
    at: Option<(NodeAddress, u64)>,
    /// Whether a confirmed subscription was lost, so that pushes may have been missed.
    lost: bool,
    /// Notified when it is confirmed.
    waiting: Vec<oneshot::Sender<()>>,
    /// The pending attempt, while it is not confirmed.
    attempt: u64,
    backoff: Backoff,
    /// Since when it is not confirmed, or when that was last reported to waiters.
    since: Moment,
}

/// How an attempt ended.
enum Ended {
    /// The confirmation has arrived, or is about to be read.
    Sent,
    /// Another node owns the slot.
    Moved,
    /// The attempt must be repeated.
    Failed,
    /// The slot was unsubscribed.
    Left,
}

/// The manager is gone.
struct ShutDown;

/// Runs the subscriber until the receiver is closed.
pub(super) async fn run(
    pool: Arc<NodePool>,
    shared: Arc<Shared>,
    inbox: Arc<Inbox>,
    pushes: mpsc::UnboundedSender<Push>,
) {
    // The subscriber of a store runs only once.
    let Some(mut requests) = inbox.take_receiver() else {
        return;
    };
    let mut backoff = Backoff::new(PAUSE_MIN, PAUSE_MAX);
    while let Err(error) = pool.refresh(shared.topology.version()).await {
        crate::log::debug!(shard = %shared.shard, %error, "failed to read the cluster's slot map");
        tokio::select! {
            () = backoff.wait() => {}
            () = pushes.closed() => return,
        }
    }
    if pushes.send(Push::Resubscribed { slot: None }).is_err() {
        return;
    }
    let (received, mut receiver) = mpsc::unbounded_channel();
    let mut subscriber = Subscriber {
        pool,
        shared,
        inbox,
        pushes: pushes.clone(),
        subscribers: HashMap::new(),
        received,
        subscriptions: HashMap::new(),
        attempts: FuturesUnordered::new(),
        next_attempt: 0,
        checks: FuturesUnordered::new(),
        cut_off: 0,
    };
    let mut ticks = tokio::time::interval(TICK_EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut tick = 0_u32;
    let mut reading: Option<BoxFuture<'static, ()>> = None;
    loop {
        let is_reading = reading.is_some();
        let done = tokio::select! {
            () = pushes.closed() => return,
            Some(received) = receiver.recv() => subscriber.on_push(received),
            Some(request) = requests.recv() => subscriber.on_request(request),
            Some((slot, attempt, ended)) = subscriber.attempts.next(), if !subscriber.attempts.is_empty() => {
                subscriber.ended(slot, attempt, ended)
            }
            Some(silent) = subscriber.checks.next(), if !subscriber.checks.is_empty() => {
                if let Some((place, generation)) = silent {
                    subscriber.cut(&place, generation);
                }
                Ok(())
            }
            () = async { match &mut reading { Some(reading) => reading.await, None => std::future::pending().await } }, if is_reading => {
                reading = None;
                subscriber.compare();
                Ok(())
            }
            _ = ticks.tick() => {
                tick = tick.wrapping_add(1);
                subscriber.compare();
                subscriber.give_up_idle();
                if tick.is_multiple_of(CHECK_EVERY_TICKS) && subscriber.checks.is_empty() {
                    subscriber.check();
                }
                let is_due = tick.is_multiple_of(SLOTS_EVERY_TICKS) && !subscriber.subscriptions.is_empty();
                let is_wanted = subscriber.shared.slots_are_stale.swap(false, Ordering::AcqRel);
                if (is_due || is_wanted) && reading.is_none() {
                    let (pool, version) = (Arc::clone(&subscriber.pool), subscriber.shared.topology.version());
                    reading = Some(Box::pin(async move {
                        if let Err(error) = pool.refresh(version).await {
                            crate::log::debug!(?error, "failed to read the cluster's slot map");
                        }
                    }));
                }
                subscriber.report_overdue()
            }
        };
        if done.is_err() {
            return;
        }
    }
}

impl Subscriber {
    fn push(&self, push: Push) -> Result<(), ShutDown> {
        self.pushes.send(push).map_err(|_| ShutDown)
    }

    fn on_request(&mut self, request: SubscribeRequest) -> Result<(), ShutDown> {
        match request {
            SubscribeRequest::Subscribe { slot, done } => match self.subscriptions.get_mut(&slot) {
                // The request may have been cancelled.
                Some(Subscription { at: Some(_), .. }) => drop(done.send(())),
                Some(subscription) => {
                    subscription.waiting.retain(|waiting| !waiting.is_closed());
                    subscription.waiting.push(done);
                }
                None => {
                    let subscription = Subscription {
                        at: None,
                        lost: false,
                        waiting: vec![done],
                        attempt: 0,
                        backoff: Backoff::new(PAUSE_MIN, PAUSE_MAX),
                        since: Moment::now(),
                    };
                    self.subscriptions.insert(slot, subscription);
                    self.attempt(slot, Duration::ZERO);
                }
            },
            SubscribeRequest::Elsewhere { slot } => {
                let owner = self.shared.topology.owner(slot);
                let at = self
                    .subscriptions
                    .get(&slot)
                    .and_then(|subscription| subscription.at.as_ref());
                if at.is_some_and(|(place, _)| Some(place) != owner.as_ref()) {
                    self.lose(slot);
                }
            }
        }
        Ok(())
    }

    fn on_push(&mut self, received: ReceivedPush) -> Result<(), ShutDown> {
        let ReceivedPush {
            place,
            generation,
            push: PushInfo { kind, data },
        } = received;
        let text = |index: usize| data.get(index).and_then(reply::as_text);
        let slot = || text(0).map(|channel| Slot::of(channel.as_bytes()));
        match kind {
            PushKind::SMessage => {
                let Some(message) = text(1) else { return Ok(()) };
                let replica_ack = self.shared.replica_ack.as_ref();
                match subscriber::read(&message, &self.shared.shard, replica_ack) {
                    Some(push) => self.push(push),
                    None => Ok(()),
                }
            }
            PushKind::SSubscribe => match slot() {
                Some(slot) => self.confirmed(slot, place, generation),
                None => Ok(()),
            },
            PushKind::SUnsubscribe => {
                let is_at = |subscription: &Subscription| subscription.at == Some((Arc::clone(&place), generation));
                if let Some(slot) = slot()
                    && self.subscriptions.get(&slot).is_some_and(is_at)
                {
                    self.lose(slot);
                }
                Ok(())
            }
            PushKind::Disconnection => {
                self.cut(&place, generation);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// This connection is gone or unusable, and so are its subscriptions.
    fn cut(&mut self, place: &NodeAddress, generation: u64) {
        if let Some(subscriber) = self.subscribers.get(place) {
            subscriber.broken(generation);
        }
        let there = Some((Arc::clone(place), generation));
        let lost: Vec<Slot> = self
            .subscriptions
            .iter()
            .filter_map(|(slot, subscription)| (subscription.at == there).then_some(*slot))
            .collect();
        self.cut_off += u64::from(!lost.is_empty());
        lost.into_iter().for_each(|slot| self.lose(slot));
    }

    /// Checks that every connection with subscriptions answers.
    fn check(&mut self) {
        let confirmed = self.subscriptions.iter().filter_map(|(slot, subscription)| {
            let (place, generation) = subscription.at.as_ref()?;
            Some(((Arc::clone(place), *generation), *slot))
        });
        // One slot of each connection will do.
        let asked: HashMap<(NodeAddress, u64), Slot> = confirmed.collect();
        for ((place, generation), slot) in asked {
            let Some(subscriber) = self.subscribers.get(&place).map(Arc::clone) else {
                continue;
            };
            let shared = Arc::clone(&self.shared);
            self.checks.push(Box::pin(async move {
                if subscriber.generation() != Some(generation) {
                    // The connection was replaced meanwhile.
                    return Some((place, generation));
                }
                let answer = send(&shared, &subscriber, "SSUBSCRIBE", slot).await;
                answer
                    .is_err_and(|error| error.is_none())
                    .then_some((place, generation))
            }));
        }
    }

    fn confirmed(&mut self, slot: Slot, place: NodeAddress, generation: u64) -> Result<(), ShutDown> {
        let Some(subscription) = self.subscriptions.get_mut(&slot) else {
            return Ok(());
        };
        // The first confirmation after the loss reports all reconnects.
        let back = std::mem::take(&mut self.cut_off);
        self.shared.metrics.reconnects.increment(back);
        self.inbox.set_place(slot, Some(&place));
        subscription.at = Some((place, generation));
        subscription.backoff.reset();
        for done in subscription.waiting.drain(..) {
            // The request may have been cancelled.
            done.send(()).ok();
        }
        if std::mem::take(&mut subscription.lost) {
            self.push(Push::Resubscribed { slot: Some(slot) })?;
        }
        Ok(())
    }

    /// Marks the subscription of this slot as lost and starts a new attempt.
    fn lose(&mut self, slot: Slot) {
        if let Some(subscription) = self.subscriptions.get_mut(&slot) {
            subscription.at = None;
            subscription.lost = true;
            subscription.since = Moment::now();
            self.inbox.set_place(slot, None);
            self.attempt(slot, Duration::ZERO);
        }
    }

    /// Starts an attempt for a slot; earlier attempts no longer count.
    fn attempt(&mut self, slot: Slot, pause: Duration) {
        self.next_attempt += 1;
        let number = self.next_attempt;
        if let Some(subscription) = self.subscriptions.get_mut(&slot) {
            subscription.attempt = number;
        }
        let owner = self.shared.topology.owner(slot);
        let subscriber = owner.and_then(|place| self.subscriber(&place));
        let (pool, inbox) = (Arc::clone(&self.pool), Arc::clone(&self.inbox));
        self.attempts.push(Box::pin(async move {
            if !pause.is_zero() {
                tokio::time::sleep(pause).await;
            }
            if inbox.is_subscribed(slot) {
                return (slot, number, Ended::Sent);
            }
            (slot, number, subscribe(&pool, subscriber, slot).await)
        }));
    }

    fn ended(&mut self, slot: Slot, attempt: u64, ended: Ended) -> Result<(), ShutDown> {
        let Some(subscription) = self.subscriptions.get_mut(&slot) else {
            return Ok(());
        };
        if subscription.attempt != attempt || subscription.at.is_some() {
            return Ok(());
        }
        match ended {
            Ended::Sent => self.attempt(slot, CONFIRMED_WITHIN),
            Ended::Moved | Ended::Failed => {
                let pause = subscription.backoff.next_delay();
                self.attempt(slot, pause);
            }
            Ended::Left => {
                if subscription.waiting.is_empty() {
                    self.subscriptions.remove(&slot);
                    // A cycle may have begun to wait just before.
                    return self.push(Push::Resubscribed { slot: Some(slot) });
                }
                self.attempt(slot, Duration::ZERO);
            }
        }
        Ok(())
    }

    fn subscriber(&mut self, place: &NodeAddress) -> Option<Arc<NodeLink>> {
        if let Some(subscriber) = self.subscribers.get(place) {
            return Some(Arc::clone(subscriber));
        }
        let shared = &self.shared;
        let received = Some(self.received.clone());
        let name = named(&shared.commands.manager, Purpose::Inbox);
        let subscriber = NodeLink::new(
            place,
            &shared.target,
            shared.patience,
            received,
            name,
            &shared.metrics,
            &shared.topology,
        )?;
        let subscriber = Arc::new(subscriber);
        self.subscribers.insert(Arc::clone(place), Arc::clone(&subscriber));
        Some(subscriber)
    }

    /// Marks subscriptions as lost if their slot has another owner, and drops connections to nodes
    /// that own no slot.
    fn compare(&mut self) {
        let topology = &self.shared.topology;
        let owners = topology.places();
        let moved: Vec<Slot> = self
            .subscriptions
            .iter()
            .filter(
                |(slot, subscription)| match (&subscription.at, topology.owner(**slot)) {
                    (Some((place, _)), Some(owner)) => *place != owner,
                    // Its connection is dropped below, which sends no notification.
                    (Some((place, _)), None) => !owners.contains(place),
                    (None, _) => false,
                },
            )
            .map(|(slot, _)| *slot)
            .collect();
        moved.into_iter().for_each(|slot| self.lose(slot));
        self.subscribers.retain(|place, _| owners.contains(place));
    }

    /// Unsubscribes slots in which no cycle has waited for long, so that a manager of many keys
    /// does not accumulate subscriptions.
    fn give_up_idle(&mut self) {
        let limit = self.shared.inbox_idle_seconds;
        let idle: Vec<(Slot, NodeAddress)> = self
            .subscriptions
            .iter()
            .filter(|(slot, _)| self.inbox.idle_seconds(**slot) >= limit)
            .filter_map(|(slot, subscription)| Some((*slot, Arc::clone(&subscription.at.as_ref()?.0))))
            .collect();
        for (slot, place) in idle {
            let subscriber = self.subscriber(&place);
            self.next_attempt += 1;
            let number = self.next_attempt;
            if let Some(subscription) = self.subscriptions.get_mut(&slot) {
                (subscription.at, subscription.lost, subscription.attempt) = (None, true, number);
                subscription.since = Moment::now();
            }
            self.inbox.set_place(slot, None);
            let shared = Arc::clone(&self.shared);
            self.attempts.push(Box::pin(async move {
                if let Some(subscriber) = subscriber {
                    // If this fails, the connection is about to end, and the subscription with it.
                    send(&shared, &subscriber, "SUNSUBSCRIBE", slot).await.ok();
                }
                (slot, number, Ended::Left)
            }));
        }
    }

    /// If a slot's inbox can't be subscribed within a request's time limit, makes its waiters
    /// retry, so that they see the error.
    fn report_overdue(&mut self) -> Result<(), ShutDown> {
        let (now, limit) = (Moment::now(), self.shared.timeout);
        let mut overdue = Vec::new();
        for (slot, subscription) in &mut self.subscriptions {
            if subscription.at.is_none() && subscription.lost && now.since(subscription.since) >= limit {
                subscription.since = now;
                overdue.push(*slot);
            }
        }
        for slot in overdue {
            self.push(Push::Resubscribed { slot: Some(slot) })?;
        }
        Ok(())
    }
}

/// Subscribes the inbox of a slot on the slot's owner.
async fn subscribe(pool: &NodePool, subscriber: Option<Arc<NodeLink>>, slot: Slot) -> Ended {
    let (shared, version) = (&pool.shared, pool.shared.topology.version());
    let Some(subscriber) = subscriber else {
        pool.refresh(version).await.ok();
        return Ended::Failed;
    };
    match send(shared, &subscriber, "SSUBSCRIBE", slot).await {
        Ok(()) => Ended::Sent,
        Err(error) => {
            let moved = error.as_ref().and_then(RedisError::redirect_node);
            // Use the slot in the error, not ours: it may be the reply to another request.
            if let Some((place, number)) = moved
                && let Some(place) = redirected(place, &subscriber.place)
                && let Some(slot) = Slot::new(number)
            {
                shared.topology.moved(slot, place);
                return Ended::Moved;
            }
            let kind = error.as_ref().map(RedisError::kind);
            if kind == Some(ServerErrorKind::NoPerm.into())
                && let Some(error) = &error
                && let Some(suppressed) = shared.refused_inboxes.admit(Moment::now())
            {
                crate::log::warn!(shard = %shared.shard, %slot, %error, suppressed, "subscribing to the inbox of a slot was refused, so locks in it can't be waited for");
            }
            // The map may be wrong. If it can't be read now, the next attempt reports why.
            pool.refresh(version).await.ok();
            Ended::Failed
        }
    }
}

/// Sends one command about the inbox of a slot. `Err(None)` means that there was no answer in time.
async fn send(shared: &Shared, subscriber: &Arc<NodeLink>, verb: &str, slot: Slot) -> Result<(), Option<RedisError>> {
    let channel = shared.commands.names.inbox_in(slot, &shared.commands.manager);
    match subscriber.ask(cmd(verb).arg(channel), shared.patience).await {
        Ok(reply) => reply.map(drop).map_err(Some),
        // If there is no connection, the requests report why.
        Err(AskError::NotConnected(_) | AskError::Silent) => Err(None),
    }
}
