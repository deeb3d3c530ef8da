//! A Redis Cluster as a lease store.
//!
//! # Implementation details
//!
//! Connections: each of the two kept pools (`caller`, `background`) has its own command connections
//! to every node that it sends requests to (`pool`). On the background thread, there is one more
//! connection to each node on which a cycle waits, for subscriptions only (`subscriber`). All share
//! one slot map (`topology`), which every redirection corrects. Requests that are not on the path
//! of a lock borrow connections from small pools (`checked`), which are empty in a manager that
//! sends none. The health probe that runs every few seconds (`health`) asks each primary on the
//! background pool.
//!
//! The client library's cluster connection is not used. It never reads the map again because a node
//! is silent, so a primary that hangs is asked forever, even after its replica took over. While it
//! reads the map, it waits for every node and sends nothing to any of them. And a request that it
//! repeats by itself can't be distinguished from one that was sent once.
//!
//! Differences from a single primary: a free key needs no inbox. Before a request may enqueue, the
//! inbox of its slot must be subscribed and confirmed. Every token is above the time of the server,
//! since a promoted replica may lack the latest ones: a free key costs a short script, or two plain
//! commands if a script has raised the counter of its slot a moment ago (`raised`). If a slot is
//! being moved, its leases are renewed one by one, without accessing their queues, so a long move
//! costs no lease.
//!
//! If `min_replicas_acked` > 0, a `WAIT` follows every request that creates or extends a lease. A
//! pushed grant then only causes the cycle to ask.

mod checked;
mod dispatch;
#[cfg(any(test, fuzzing))]
pub(super) mod fuzzing;
mod health;
mod inbox;
mod node;
mod pool;
mod raised;
mod renewals;
mod send;
mod subscriber;
#[cfg(test)]
pub(super) mod tests;
mod topology;

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use deadpool_redis::redis::{Cmd, Value};
use tokio::sync::mpsc;

use super::client::{Purpose, Target};
use super::commands::{Commands, erase};
use super::replica_ack::{ReplicaAck, ReplicaWait};
use super::reply::{inspected, released, to_store_error};
use super::script::Scripts;
use super::token_floor::TokenFloor;
use crate::backoff::Backoff;
use crate::clock::Moment;
use crate::endpoint::ServerUrl;
use crate::error::InvalidSetting;
use crate::key::{LockKey, Slot};
use crate::mode::LockMode;
use crate::protocol::{Acquire, AcquireKind, AcquireReply, Answer, Push, Release, ReleaseReply, RenewReply, Renewal};
use crate::rate_limit::RateLimit;
use crate::store::map::StoredMap;
use crate::store::{self, Health, KeyState, LeaseStore, MapState, MapStep, StoreError, StoreFuture, StoreOptions};
use crate::telemetry::ShardMetrics;
use dispatch::NodeReply;
use inbox::Inbox;
use pool::{NodePool, at_place};
use raised::RaisedCounters;
use topology::{NodeAddress, Topology};

/// An inbox is unsubscribed after no cycle has begun to wait for this long.
const INBOX_IDLE_SECONDS: u32 = 60;
/// The longest wait for one node before the request is resent to the current owner of the slot.
const PATIENCE_MAX: Duration = Duration::from_secs(1);
/// The shortest and the longest pause before a manager that connects asks silent nodes again.
const ASK_AGAIN_MIN: Duration = Duration::from_millis(50);
const ASK_AGAIN_MAX: Duration = Duration::from_millis(500);

/// The longest single wait for replicas, and the pause before the next one.
const REPLICAS_WAIT_MAX: Duration = Duration::from_millis(100);
const REPLICAS_PAUSE: Duration = Duration::from_millis(50);

/// See the module.
pub(crate) struct ClusterStore {
    caller: Arc<NodePool>,
    background: Arc<NodePool>,
    /// For requests that are not on the path of a lock.
    checked: Arc<NodePool>,
    inbox: Arc<Inbox>,
    shared: Arc<Shared>,
}

/// What the connections of a store share.
struct Shared {
    commands: Commands,
    scripts: Scripts,
    topology: Arc<Topology>,
    seeds: Vec<NodeAddress>,
    /// Login and encryption, the same for every node.
    target: Target,
    shard: Arc<str>,
    map: StoredMap,
    timeout: Duration,
    /// How long to wait for one node.
    patience: Duration,
    /// Set by an unanswered renewal, to have the map read.
    slots_are_stale: AtomicBool,
    metrics: Arc<ShardMetrics>,
    /// Set if replicas must acknowledge a lease before it counts.
    replica_ack: Option<ReplicaAck>,
    inbox_idle_seconds: u32,
    /// Limit log lines about renewals that failed, and about inboxes that were refused.
    failed_renewals: RateLimit,
    refused_inboxes: RateLimit,
    token_floor: TokenFloor,
    raised: RaisedCounters,
}

impl ClusterStore {
    /// Creates a store. Sends nothing yet.
    pub(crate) fn new(seeds: &[ServerUrl], options: StoreOptions) -> Result<Self, InvalidSetting> {
        Self::with_idle_limit(seeds, options, INBOX_IDLE_SECONDS)
    }

    fn with_idle_limit(
        seeds: &[ServerUrl],
        options: StoreOptions,
        inbox_idle_seconds: u32,
    ) -> Result<Self, InvalidSetting> {
        let unusable = || InvalidSetting::new("url", "without a host", "of servers that the client library can use");
        options.login.check()?;
        let target = Target::new(seeds.first().ok_or_else(unusable)?, &options.tls)?.with_login(&options.login);
        let commands = Commands::for_a_cluster(&options.namespace, options.manager);
        let shared = Arc::new(Shared {
            map: StoredMap::new(options.map, commands.names.map()),
            commands,
            scripts: Scripts::for_a_cluster(&options.namespace),
            topology: Arc::new(Topology::new()),
            seeds: seeds.iter().map(|seed| seed.place().into()).collect(),
            target,
            shard: options.shard,
            timeout: options.timeout,
            patience: (options.timeout / 2).min(PATIENCE_MAX),
            slots_are_stale: AtomicBool::new(false),
            metrics: options.metrics,
            replica_ack: ReplicaAck::new(options.min_replicas_acked, options.timeout),
            inbox_idle_seconds,
            failed_renewals: RateLimit::default(),
            refused_inboxes: RateLimit::default(),
            token_floor: TokenFloor::new(),
            raised: RaisedCounters::default(),
        });
        let runtimes = options.runtimes;
        let home = Some(Arc::clone(&runtimes));
        let caller = Arc::new(NodePool::new(&shared, options.connections, Purpose::Requests, home));
        Ok(Self {
            checked: Arc::new(NodePool::checked(&caller, &runtimes)),
            background: Arc::new(NodePool::new(&shared, 1, Purpose::Renewals, None).with_substitute(&caller)),
            caller,
            inbox: Arc::new(Inbox::new()),
            shared,
        })
    }

    fn pool(&self, priority: store::Priority) -> Arc<NodePool> {
        match priority {
            store::Priority::Foreground => Arc::clone(&self.caller),
            store::Priority::Background => Arc::clone(&self.background),
        }
    }
}

impl Shared {
    /// When a request that is sent now has to end, so that its sender still gets the reason.
    fn deadline(&self) -> Moment {
        Moment::now() + (self.timeout - self.timeout / 20)
    }

    /// How long to wait for replicas at a time. Meanwhile the connection answers nothing else.
    fn replicas_wait(&self) -> Duration {
        (self.patience / 4).min(REPLICAS_WAIT_MAX)
    }

    /// The wait to send behind a request that creates or extends a lease.
    fn wait_for_replicas(&self) -> Option<ReplicaWait> {
        let ack = self.replica_ack.as_ref()?;
        Some(ack.wait(self.replicas_wait()))
    }

    /// Whether as many replicas as required have acknowledged.
    fn has_acks<T>(&self, node_reply: &NodeReply<T>) -> bool {
        self.replica_ack
            .as_ref()
            .is_none_or(|ack| ack.is_enough(node_reply.acked))
    }

    /// The error if too few replicas have a granted lease. A failover may lose that lease, so it
    /// does not count.
    fn too_few_acks<T>(&self, reply: &AcquireReply, node_reply: &NodeReply<T>) -> Option<StoreError> {
        let ack = self.replica_ack.as_ref()?;
        let is_granted = matches!(reply, AcquireReply::Granted { .. });
        (is_granted && !ack.is_enough(node_reply.acked)).then(|| ack.too_few(node_reply.acked, self.timeout))
    }
}

impl LeaseStore for ClusterStore {
    fn connect(&self) -> StoreFuture<()> {
        let pool = Arc::clone(&self.caller);
        Box::pin(async move {
            // All steps share one time limit.
            let deadline = Moment::now() + pool.shared.timeout.mul_f64(0.9);
            let mut backoff = Backoff::new(ASK_AGAIN_MIN, ASK_AGAIN_MAX);
            let mut was_silent = false;
            let mut last = None;
            loop {
                let began = Moment::now();
                let read = tokio::time::timeout(deadline.since(began), pool.refresh(0)).await;
                // A node was silent for about as long as a request waits for one. A busy one may
                // answer later.
                was_silent |= Moment::now().since(began) >= pool.shared.patience / 2;
                let delay = backoff.next_delay();
                match read {
                    Ok(Err(error @ StoreError::Unavailable(_))) if was_silent && Moment::now() + delay < deadline => {
                        last = Some(error);
                        tokio::time::sleep(delay).await;
                    }
                    Ok(read) => break read?,
                    Err(_) => {
                        let silence = || StoreError::Unavailable("no answer while connecting".into());
                        return Err(last.unwrap_or_else(silence));
                    }
                }
            }
            pool.check_map(Some(deadline)).await
        })
    }

    fn connect_background(&self) -> StoreFuture<()> {
        let pool = Arc::clone(&self.background);
        Box::pin(async move {
            let shared = &*pool.shared;
            let opening = shared.topology.places().into_iter().map(|place| {
                let pool = &pool;
                async move {
                    let opened = match pool.node(&place, Slot::of(b"")) {
                        Ok(node) => node.get().await.map(drop),
                        Err(error) => Err(error),
                    };
                    if let Err(error) = opened {
                        // A node may be down. Its slots can't be locked either, and its successor
                        // gets a connection once it is known.
                        crate::log::warn!(shard = %shared.shard, node = %place, ?error, "failed to open a renewal connection to a node; using its request connections until one is open");
                    }
                }
            });
            futures_util::future::join_all(opening).await;
            Ok(())
        })
    }

    fn has_map(&self) -> bool {
        self.shared.map.is_set()
    }

    fn map(&self, step: MapStep) -> StoreFuture<MapState> {
        let pool = Arc::clone(&self.caller);
        Box::pin(async move {
            pool.refresh(0).await?;
            pool.map(step).await
        })
    }

    fn acquire(&self, request: Acquire) -> StoreFuture<Answer<AcquireReply>> {
        let (pool, inbox) = (Arc::clone(&self.caller), Arc::clone(&self.inbox));
        Box::pin(async move {
            let shared = &*pool.shared;
            // All steps share one time limit.
            let (started, deadline) = (Moment::now(), shared.deadline());
            if !shared.map.is_set() {
                // Boxed like other rare steps, which would make the future several times as large.
                Box::pin(pool.check_map(Some(deadline))).await?;
            }
            let slot = shared.commands.names.of(&request.key).slot();
            let Acquire { kind, ttl, tokens, .. } = request;
            // A cycle that takes a free key with a single token asks again before it passes the key
            // on to a second task, and learns of remote waiters then. With more tokens, it must be
            // notified.
            if kind == AcquireKind::Enqueue || tokens > 1 {
                inbox.ready(slot).await?;
            }
            let mut request = request;
            let (node_reply, floor) = loop {
                let floor = shared.token_floor.of(slot);
                let node_reply = pool.send_acquire(&request, slot, floor, deadline).await?;
                if node_reply.value == AcquireReply::Taken && node_reply.repeated {
                    // An attempt whose reply was lost may have taken the lease, or may still do so.
                    request.kind = AcquireKind::Enqueue;
                    inbox.ready(slot).await?;
                    continue;
                }
                shared.token_floor.note_reply(slot, &node_reply.value);
                let Some(error) = shared.too_few_acks(&node_reply.value, &node_reply) else {
                    break (node_reply, floor);
                };
                // A promoted replica has no replica of its own for a moment. The lease is ours
                // meanwhile but does not count. Return the reason before the caller reaches its
                // time limit.
                let waited = Moment::now().since(started) + REPLICAS_PAUSE + shared.replicas_wait();
                if waited >= shared.timeout - shared.timeout / 10 {
                    return Err(error);
                }
                tokio::time::sleep(REPLICAS_PAUSE).await;
                if request.kind == AcquireKind::Fast {
                    // Only the longer script recognizes its own lease.
                    request.kind = AcquireKind::Enqueue;
                    inbox.ready(slot).await?;
                }
            };
            match (&node_reply.value, &node_reply.place) {
                (AcquireReply::Queued(_), Some(place)) => inbox.waits_at(slot, place),
                (AcquireReply::Granted { .. }, _) => inbox.keep_for(slot, ttl),
                _ => {}
            }
            Ok(Answer {
                sent_at: node_reply.sent_at,
                ttl,
                floor,
                reply: node_reply.value,
            })
        })
    }

    fn release(&self, priority: store::Priority, request: Release) -> StoreFuture<Answer<ReleaseReply>> {
        let (pool, inbox) = (self.pool(priority), Arc::clone(&self.inbox));
        Box::pin(async move {
            let shared = &*pool.shared;
            let slot = shared.commands.names.of(&request.key).slot();
            let (ttl, tokens) = (request.ttl(), request.tokens);
            let (floor, deadline) = (shared.token_floor.of(slot), shared.deadline());
            let answer = |node_reply: &NodeReply, reply| Answer {
                sent_at: node_reply.sent_at,
                ttl,
                floor,
                reply,
            };
            let mut repeated = false;
            if let Some(rest) = request.rest(Moment::now()) {
                let fill = |command: &mut Cmd| shared.commands.fill_retire(command, &request, rest);
                let node_reply = pool
                    .script(&shared.scripts.retire, slot, None, Some(deadline), &fill)
                    .await?;
                if node_reply.value == Value::Int(1) {
                    return Ok(answer(&node_reply, ReleaseReply::HELD));
                }
                // The lease is no longer ours.
                repeated = node_reply.repeated;
            } else if request.nobody_waits && request.is_exclusive() {
                let fill = |command: &mut Cmd| shared.commands.fill_release_fast(command, &request.key, request.cycle);
                let node_reply = pool
                    .script(&shared.scripts.release_fast, slot, None, Some(deadline), &fill)
                    .await?;
                if node_reply.value == Value::Int(1) {
                    return Ok(answer(&node_reply, ReleaseReply::HELD));
                }
                // A cycle waits after all, or the lease is no longer ours.
                repeated = node_reply.repeated;
            }
            if request.requeue.is_some() {
                inbox.ready(slot).await?;
            }
            let node_reply = pool.send_release(&request, slot, floor, deadline).await?;
            let mut reply = released(&node_reply.value, request.requeue.is_some(), tokens)?;
            // An earlier attempt whose reply was lost may have released the lease. That it is no
            // longer ours is not a loss then.
            reply.held |= repeated || node_reply.repeated;
            if let Some(requeued) = reply.requeued {
                shared.token_floor.note_reply(slot, &requeued);
                if shared.too_few_acks(&requeued, &node_reply).is_some() {
                    // The cycle asks again, and thus waits for the replicas again.
                    reply.requeued = None;
                }
                if let (AcquireReply::Queued(_), Some(place)) = (&requeued, &node_reply.place) {
                    inbox.waits_at(slot, place);
                }
            }
            Ok(answer(&node_reply, reply))
        })
    }

    fn break_lease(&self, key: LockKey, owner: String, tokens: u32) -> StoreFuture<bool> {
        let pool = self.pool(store::Priority::Foreground);
        Box::pin(async move {
            let slot = pool.shared.commands.names.of(&key).slot();
            let floor = pool.shared.token_floor.of(slot);
            let node_reply = pool.send_break(slot, &key, &owner, tokens, floor).await?;
            // An attempt whose reply was lost may have ended it.
            Ok(released(&node_reply.value, false, tokens)?.held || node_reply.repeated)
        })
    }

    fn renew(&self, batch: Vec<Renewal>, limit: Duration) -> StoreFuture<Vec<Option<RenewReply>>> {
        let (pool, inbox) = (Arc::clone(&self.background), Arc::clone(&self.inbox));
        Box::pin(async move { renewals::renew(&pool, &inbox, &batch, limit).await })
    }

    fn inspect(&self, key: LockKey) -> StoreFuture<KeyState> {
        let (pool, caller) = (Arc::clone(&self.checked), Arc::clone(&self.caller));
        Box::pin(async move {
            let shared = &*pool.shared;
            caller.check_map(None).await?;
            let slot = shared.commands.names.of(&key).slot();
            let commands = shared.commands.inspect(&key);
            match pool.batch(slot, &commands).await {
                Some(replies) => inspected(&replies),
                None => pool.inspect_one_by_one(slot, &commands).await,
            }
        })
    }

    fn inspect_again(&self, key: LockKey) -> StoreFuture<KeyState> {
        let pool = Arc::clone(&self.caller);
        Box::pin(async move {
            let shared = &*pool.shared;
            pool.check_map(None).await?;
            let slot = shared.commands.names.of(&key).slot();
            pool.inspect_one_by_one(slot, &shared.commands.inspect(&key)).await
        })
    }

    fn erase(&self) -> StoreFuture<u64> {
        let pool = Arc::clone(&self.checked);
        Box::pin(async move {
            let shared = &*pool.shared;
            let version = shared.topology.version();
            match pool.refresh(version).await {
                // The connections that were silent are replaced now.
                Err(StoreError::Unavailable(_)) => pool.refresh(version).await?,
                read => read?,
            }
            shared.map.forget();
            let (mut count, mut failed) = (0, None);
            for place in shared.topology.places() {
                // The connection of any slot will do.
                let erased = match pool.sender(&place, Slot::of(b""), shared.timeout).await {
                    Ok(sender) => {
                        let erased = erase(sender.connection(), &shared.commands, shared.timeout).await;
                        erased.map_err(|error| {
                            if error.is_unrecoverable_error() {
                                sender.broken();
                            }
                            at_place(to_store_error(&error), &place)
                        })
                    }
                    Err(error) => Err(error),
                };
                match erased {
                    Ok(erased) => count += erased,
                    // Continue with the other nodes.
                    Err(error) => failed = failed.or(Some(error)),
                }
            }
            failed.map_or(Ok(count), Err)
        })
    }

    fn probe(&self) -> Pin<Box<dyn Future<Output = Health> + Send>> {
        let pool = Arc::clone(&self.background);
        if let Some(checked) = &self.checked.checked {
            checked.close_idle();
        }
        Box::pin(async move {
            let (mut health, map) = tokio::join!(health::probe(&pool), pool.map(MapStep::Read));
            match map {
                Err(error @ StoreError::MapMismatch { .. }) if health.reached.is_ok() => health.reached = Err(error),
                // The next lock stores the map again, after checking all shards.
                Ok(MapState::None | MapState::Reserved) => pool.shared.map.forget(),
                Ok(MapState::Ours) | Err(_) => {}
            }
            health
        })
    }

    fn epoch(&self, slot: Slot) -> u32 {
        self.shared.topology.epoch(slot)
    }

    fn slot_of(&self, key: &LockKey) -> Slot {
        self.shared.commands.names.of(key).slot()
    }

    fn lacks(&self, _: LockMode) -> Option<&'static str> {
        None
    }

    fn last_cut(&self) -> Option<Moment> {
        self.shared.topology.cuts.last()
    }

    fn run_subscriber(&self, pushes: mpsc::UnboundedSender<Push>) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        let (pool, shared) = (Arc::clone(&self.background), Arc::clone(&self.shared));
        Box::pin(subscriber::run(pool, shared, Arc::clone(&self.inbox), pushes))
    }

    fn leave_app_runtime(&self) {
        self.caller.leave();
    }
}
