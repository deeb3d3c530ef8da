//! A Redis Cluster as a lease store.
//!
//! # Implementation details
//!
//! Connections: for each of the two lanes its own to every node that is asked something (`lane`), for commands alone; and, on the background
//! thread, one more to each node on which something is waited for (`listener`), for subscriptions alone. All share one map of the slots
//! (`topology`), which every redirection corrects. The look that is taken every few seconds (`look`) asks each primary on the background's
//! lane.
//!
//! The nodes are addressed here and not through the client library's cluster connection: that one never reads the map anew because a node is
//! silent, so that a primary which hangs is asked for ever after its replica took over; while it reads the map, it waits for every node and
//! sends nothing to any; and a request that it repeats by itself can't be told from one that was sent once.
//!
//! What differs from a single primary: a free key costs one script call in place of two plain commands, for which no inbox is needed; before
//! a request may begin to wait, the inbox of its slot is subscribed and confirmed. The script reads the server's time for every
//! token, since a replica that takes over may not have the last ones. A renewal that meets a slot on the move goes on lease by lease, without looking at
//! the queues, so that a long move costs no lease.
//!
//! `min_replicas_acked` > 0 sends a `WAIT` with everything that makes a lease or makes it last longer; a grant that is pushed is only a reason to
//! ask then.

mod call;
#[cfg(any(test, fuzzing))]
pub(super) mod fuzzing;
mod inbox;
mod lane;
mod listener;
mod look;
mod node;
mod renewals;
#[cfg(test)]
pub(super) mod tests;
mod topology;

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use deadpool_redis::redis::{Cmd, ConnectionInfo, Value, cmd};
use tokio::sync::mpsc;

use super::client::{Purpose, connection_info};
use super::commands::{Commands, erase};
use super::map;
use super::reply::{acquired, error_in_words, inspected, released};
use super::script::{LuaScript, Named, Scripts};
use crate::clock::Moment;
use crate::endpoint::ServerUrl;
use crate::error::Invalid;
use crate::key::{LockKey, SLOTS, Slot};
use crate::notice::Seldom;
use crate::protocol::{Acquire, AcquireReply, Answer, Ask, Push, Release, ReleaseReply, RenewReply, Renewal};
use crate::store::map::StoredMap;
use crate::store::{self, Inspection, LeaseStore, Look, MapState, MapStep, StoreError, StoreFuture, StoreOptions};
use crate::telemetry::ShardMetrics;
use call::{Call, Said, Unsaid};
use inbox::Inbox;
use lane::{Lane, at_place};
use topology::{Place, Topology};

/// After how long without anybody who begins to wait an inbox is given up.
const INBOX_IDLE_SECONDS: u32 = 60;
/// The longest that one node is waited for before the request is sent again, to whoever owns the slot by then.
const PATIENCE_MAX: Duration = Duration::from_secs(1);

/// The longest that replicas are waited for in one go, and the pause before they are again.
const REPLICAS_WAIT_MAX: Duration = Duration::from_millis(100);
const REPLICAS_PAUSE: Duration = Duration::from_millis(50);

/// See the module.
pub(crate) struct ClusterStore {
    caller: Arc<Lane>,
    background: Arc<Lane>,
    inbox: Arc<Inbox>,
    shared: Arc<Shared>,
}

/// What the connections of a store share.
struct Shared {
    commands: Commands,
    scripts: Scripts,
    topology: Arc<Topology>,
    seeds: Vec<Place>,
    /// How to log in, and whether to encrypt; the same at every node.
    info: ConnectionInfo,
    shard: Arc<str>,
    map: StoredMap,
    timeout: Duration,
    /// How long one node is waited for.
    patience: Duration,
    /// Set by a renewal without an answer, to have the map read.
    map_is_doubted: AtomicBool,
    metrics: Arc<ShardMetrics>,
    min_replicas_acked: u32,
    inbox_idle_seconds: u32,
    /// Lines about renewals that failed, and about inboxes that were refused.
    failed_renewals: Seldom,
    refused_inboxes: Seldom,
    /// The largest token seen in each slot.
    seen: Box<[AtomicU64]>,
}

impl ClusterStore {
    /// Prepares a store; nothing is sent yet.
    pub(crate) fn new(seeds: &[ServerUrl], options: StoreOptions) -> Result<Self, Invalid> {
        Self::with_idle_limit(seeds, options, INBOX_IDLE_SECONDS)
    }

    fn with_idle_limit(seeds: &[ServerUrl], options: StoreOptions, inbox_idle_seconds: u32) -> Result<Self, Invalid> {
        let unusable = || Invalid::new("url", "without a host", "of servers that the client library can use");
        let info = connection_info(seeds.first().ok_or_else(unusable)?, &options.tls)?;
        let commands = Commands::for_a_cluster(&options.namespace, options.manager);
        let shared = Arc::new(Shared {
            map: StoredMap::new(options.map, commands.names.map()),
            commands,
            scripts: Scripts::for_a_cluster(&options.namespace),
            topology: Arc::new(Topology::new()),
            seeds: seeds.iter().map(|seed| seed.place().into()).collect(),
            info,
            shard: options.shard,
            timeout: options.timeout,
            patience: (options.timeout / 2).min(PATIENCE_MAX),
            map_is_doubted: AtomicBool::new(false),
            metrics: options.metrics,
            min_replicas_acked: options.min_replicas_acked,
            inbox_idle_seconds,
            failed_renewals: Seldom::default(),
            refused_inboxes: Seldom::default(),
            seen: (0..SLOTS).map(|_| AtomicU64::new(0)).collect(),
        });
        let runtimes = Some(options.runtimes);
        let caller = Arc::new(Lane::new(&shared, options.connections, Purpose::Requests, runtimes));
        Ok(Self {
            background: Arc::new(Lane::new(&shared, 1, Purpose::Renewals, None).with_substitute(&caller)),
            caller,
            inbox: Arc::new(Inbox::new()),
            shared,
        })
    }

    fn lane(&self, lane: store::Lane) -> Arc<Lane> {
        match lane {
            store::Lane::Caller => Arc::clone(&self.caller),
            store::Lane::Background => Arc::clone(&self.background),
        }
    }
}

impl Shared {
    /// Every token of that slot that is issued from now on is above this.
    fn floor(&self, slot: Slot) -> u64 {
        self.seen[usize::from(slot.number())].load(Ordering::Acquire)
    }

    fn saw(&self, slot: Slot, reply: &AcquireReply) {
        let token = match reply {
            AcquireReply::Granted { tokens, .. } => tokens.last(),
            AcquireReply::Queued(place) => place.mark,
            AcquireReply::Taken | AcquireReply::Busy => return,
        };
        self.seen[usize::from(slot.number())].fetch_max(token, Ordering::AcqRel);
    }

    /// How long replicas are waited for at a time. Meanwhile nothing else is answered on that connection.
    fn wait_for_replicas(&self) -> Duration {
        (self.patience / 4).min(REPLICAS_WAIT_MAX)
    }

    /// Fewer replicas than wanted have a lease that was granted: it may be lost in a failover, and does not count.
    fn too_few_acks(&self, reply: &AcquireReply, said: &Said) -> Option<StoreError> {
        let wanted = self.min_replicas_acked;
        let is_granted = matches!(reply, AcquireReply::Granted { .. });
        (is_granted && said.acked < wanted).then(|| {
            StoreError::Unavailable(
                format!(
                    "only {} of the {wanted} replicas of min_replicas_acked have the lease after {:?}, so it was given back; \
                     check the replicas of that slot's primary, or lower min_replicas_acked",
                    said.acked,
                    self.timeout
                )
                .into(),
            )
        })
    }
}

impl Lane {
    /// Calls a script of a lock.
    async fn script(
        &self,
        script: &LuaScript,
        slot: Slot,
        acks: u32,
        fill: &(dyn Fn(&mut Cmd) + Send + Sync),
    ) -> Result<Said, Unsaid> {
        let command = |named: Named| script.command(named, fill);
        self.call(Call {
            slot,
            command: &command,
            acks,
            stops_at_try_again: false,
            limit: None,
        })
        .await
    }

    /// Sends a command of one key.
    async fn single(&self, slot: Slot, command: &Cmd) -> Result<Value, StoreError> {
        self.single_until(None, slot, command).await
    }

    async fn single_until(&self, deadline: Option<Moment>, slot: Slot, command: &Cmd) -> Result<Value, StoreError> {
        let said = self
            .call(Call {
                slot,
                command: &|_| command.clone(),
                acks: 0,
                stops_at_try_again: false,
                limit: deadline.map(|deadline| deadline.since(Moment::now())),
            })
            .await?;
        Ok(said.value)
    }

    /// Whether the nodes have sharded channels. A script that finds somebody waiting would fail otherwise.
    async fn check_channels(&self, deadline: Option<Moment>, slot: Slot) -> Result<(), StoreError> {
        let mut count = cmd("PUBSUB");
        count.arg("SHARDNUMSUB");
        match self.single_until(deadline, slot, &count).await {
            Err(StoreError::Refused(reason)) if reason.to_lowercase().contains("unknown") => Err(StoreError::Refused(
                format!("the nodes have no sharded channels, without which no lock can be waited for; use Redis 7.0 or later, or Valkey: {reason}").into(),
            )),
            // It would have no answer to the next question either, and less time.
            Err(error @ StoreError::Unavailable(_)) => Err(error),
            // Whatever else it says, it says to a request as well.
            _ => Ok(()),
        }
    }

    /// One step on the way to a stored shard map.
    async fn map(&self, step: MapStep) -> Result<MapState, StoreError> {
        self.map_until(None, step).await
    }

    async fn map_until(&self, deadline: Option<Moment>, step: MapStep) -> Result<MapState, StoreError> {
        let map = &self.shared.map;
        let slot = Slot::of(map.key().as_bytes());
        map::step(map, step, &|command| {
            Box::pin(async move { self.single_until(deadline, slot, &command).await })
        })
        .await
    }

    /// Whether the shard has no other map; asked until it was seen to have ours.
    async fn check_map(&self, deadline: Option<Moment>) -> Result<(), StoreError> {
        let map = &self.shared.map;
        if map.is_set() {
            return Ok(());
        }
        self.check_channels(deadline, Slot::of(map.key().as_bytes())).await?;
        self.map_until(deadline, MapStep::Read).await.map(drop)
    }
}

impl LeaseStore for ClusterStore {
    fn connect(&self) -> StoreFuture<()> {
        let lane = Arc::clone(&self.caller);
        Box::pin(async move {
            // What comes first takes some of the time that all of it has.
            let deadline = Moment::now() + lane.shared.timeout.mul_f64(0.9);
            lane.refresh(0).await?;
            lane.check_map(Some(deadline)).await
        })
    }

    fn connect_background(&self) -> StoreFuture<()> {
        let lane = Arc::clone(&self.background);
        Box::pin(async move {
            let shared = &*lane.shared;
            let opening = shared.topology.places().into_iter().map(|place| {
                let lane = &lane;
                async move {
                    let opened = match lane.node(&place, Slot::of(b"")) {
                        Ok(node) => node.get().await.map(drop),
                        Err(error) => Err(error),
                    };
                    if let Err(error) = opened {
                        // A node may be away; what belongs to it can't be locked either, and its successor gets a connection when it is known.
                        tracing::warn!(shard = %shared.shard, node = %place, ?error, "no connection for renewals to a node; those of the requests are used until there is one");
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
        let lane = Arc::clone(&self.caller);
        Box::pin(async move {
            lane.refresh(0).await?;
            lane.map(step).await
        })
    }

    fn acquire(&self, request: Acquire) -> StoreFuture<Answer<AcquireReply>> {
        let (lane, inbox) = (Arc::clone(&self.caller), Arc::clone(&self.inbox));
        Box::pin(async move {
            let shared = &*lane.shared;
            let started = Moment::now();
            lane.check_map(None).await?;
            let slot = shared.commands.names.of(&request.key).slot();
            let Acquire { ask, ttl, tokens, .. } = request;
            // One who takes a free key with a single token asks again before it passes it on to a second task, and hears then of those
            // who wait. With more, it has to be told.
            if ask == Ask::Join || tokens > 1 {
                inbox.ready(slot).await?;
            }
            let (said, reply, floor) = loop {
                let floor = shared.floor(slot);
                let fill = |command: &mut Cmd| shared.commands.fill_acquire(command, &request, floor);
                let said = lane
                    .script(&shared.scripts.acquire, slot, shared.min_replicas_acked, &fill)
                    .await?;
                let reply = match (acquired(&said.value, tokens)?, ask) {
                    (AcquireReply::Busy, Ask::Free) => AcquireReply::Taken,
                    (reply, _) => reply,
                };
                shared.saw(slot, &reply);
                let Some(error) = shared.too_few_acks(&reply, &said) else {
                    break (said, reply, floor);
                };
                // A replica that took over is without one of its own for a moment. The lease is ours meanwhile, but does not count. Whoever asked
                // gives up at the time limit, and is to hear why before that.
                let waited = Moment::now().since(started) + REPLICAS_PAUSE + shared.wait_for_replicas();
                if waited >= shared.timeout - shared.timeout / 10 {
                    return Err(error);
                }
                tokio::time::sleep(REPLICAS_PAUSE).await;
            };
            match (&reply, &said.place) {
                (AcquireReply::Queued(_), Some(place)) => inbox.waits_at(slot, place),
                (AcquireReply::Granted { .. }, _) => inbox.keep_for(slot, ttl),
                _ => {}
            }
            Ok(Answer {
                sent_at: said.sent_at,
                ttl,
                floor,
                reply,
            })
        })
    }

    fn release(&self, lane: store::Lane, request: Release) -> StoreFuture<Answer<ReleaseReply>> {
        let (lane, inbox) = (self.lane(lane), Arc::clone(&self.inbox));
        Box::pin(async move {
            let shared = &*lane.shared;
            let slot = shared.commands.names.of(&request.key).slot();
            let (ttl, tokens) = (request.ttl(), request.tokens);
            let floor = shared.floor(slot);
            let answer = |said: &Said, reply| Answer {
                sent_at: said.sent_at,
                ttl,
                floor,
                reply,
            };
            let mut repeated = false;
            if request.nobody_waits {
                let fill = |command: &mut Cmd| shared.commands.fill_release_free(command, &request.key, request.cycle);
                let said = lane.script(&shared.scripts.release_free, slot, 0, &fill).await?;
                if said.value == Value::Int(1) {
                    let reply = ReleaseReply {
                        held: true,
                        requeued: None,
                    };
                    return Ok(answer(&said, reply));
                }
                // Somebody waits after all, or it is not ours any more.
                repeated = said.repeated;
            }
            if request.requeue.is_some() {
                inbox.ready(slot).await?;
            }
            let acks = if request.requeue.is_some() {
                shared.min_replicas_acked
            } else {
                0
            };
            let fill = |command: &mut Cmd| shared.commands.fill_release(command, &request, floor);
            let said = lane.script(&shared.scripts.release, slot, acks, &fill).await?;
            let mut reply = released(&said.value, request.requeue.is_some(), tokens)?;
            // An earlier attempt, whose reply did not come, may have done it: that it is not ours any more is no loss then.
            reply.held |= repeated || said.repeated;
            if let Some(requeued) = reply.requeued {
                shared.saw(slot, &requeued);
                if shared.too_few_acks(&requeued, &said).is_some() {
                    // It asks again, and so waits for the replicas again.
                    reply.requeued = None;
                }
                if let (AcquireReply::Queued(_), Some(place)) = (&requeued, &said.place) {
                    inbox.waits_at(slot, place);
                }
            }
            Ok(answer(&said, reply))
        })
    }

    fn renew(&self, batch: Vec<Renewal>, limit: Duration) -> StoreFuture<Vec<Option<RenewReply>>> {
        let (lane, inbox) = (Arc::clone(&self.background), Arc::clone(&self.inbox));
        Box::pin(async move { renewals::renew(&lane, &inbox, &batch, limit).await })
    }

    fn inspect(&self, key: LockKey) -> StoreFuture<Inspection> {
        let lane = Arc::clone(&self.caller);
        Box::pin(async move {
            let shared = &*lane.shared;
            lane.check_map(None).await?;
            let slot = shared.commands.names.of(&key).slot();
            let commands = shared.commands.inspect(&key);
            // Each by itself: a command of one key is answered also while the slot moves.
            let asking = commands.cmd_iter().map(|command| lane.single(slot, command));
            inspected(&futures_util::future::try_join_all(asking).await?)
        })
    }

    fn erase(&self) -> StoreFuture<u64> {
        let lane = Arc::clone(&self.caller);
        Box::pin(async move {
            let shared = &*lane.shared;
            lane.refresh(shared.topology.version()).await?;
            shared.map.forget();
            let (mut count, mut failed) = (0, None);
            for place in shared.topology.places() {
                // Any slot's connection to it will do.
                let node = lane.node(&place, Slot::of(b""))?;
                let erased = async {
                    let erased = erase(node.get().await?.connection, &shared.commands).await;
                    erased.map_err(|error| error_in_words(&error))
                };
                match erased.await {
                    Ok(erased) => count += erased,
                    // The other nodes are erased even so.
                    Err(error) => failed = failed.or_else(|| Some(at_place(error, &place))),
                }
            }
            failed.map_or(Ok(count), Err)
        })
    }

    fn look(&self) -> Pin<Box<dyn Future<Output = Look> + Send>> {
        let lane = Arc::clone(&self.background);
        Box::pin(async move {
            let (mut look, map) = tokio::join!(look::look(&lane), lane.map(MapStep::Read));
            match map {
                Err(error @ StoreError::MapMismatch { .. }) if look.reached.is_ok() => look.reached = Err(error),
                // The next lock stores it again, after a look at all shards.
                Ok(MapState::None | MapState::Reserved) => lane.shared.map.forget(),
                Ok(MapState::Ours) | Err(_) => {}
            }
            look
        })
    }

    fn epoch(&self, slot: Slot) -> u32 {
        self.shared.topology.epoch(slot)
    }

    fn slot_of(&self, key: &LockKey) -> Slot {
        self.shared.commands.names.of(key).slot()
    }

    fn last_cut(&self) -> Option<Moment> {
        self.shared.topology.cuts.last()
    }

    fn listen(&self, pushes: mpsc::UnboundedSender<Push>) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        let (lane, shared) = (Arc::clone(&self.background), Arc::clone(&self.shared));
        Box::pin(listener::listen(lane, shared, Arc::clone(&self.inbox), pushes))
    }

    fn leave_home(&self) {
        self.caller.leave();
    }
}
