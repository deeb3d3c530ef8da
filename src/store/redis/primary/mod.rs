//! A Redis (or Valkey) primary as a lease store, at a fixed address or as reported by sentinels.
//!
//! # Implementation details
//!
//! Connections: `connections` command connections run on the application's runtime. A key always
//! uses the same one, so its requests keep their order. One connection on the background thread
//! carries renewals, and one only subscribes to the manager's inbox. A connection that carries
//! commands never subscribes: an unsolicited push would be taken for a reply. If sentinels watch
//! the primary, there is also one connection to each of them, used for subscriptions only
//! (`failover`). Requests that are not on the path of a lock borrow a connection from a small pool
//! (`checked`), which is empty in a manager that sends none.
//!
//! Each new connection asks `discovery` for the primary's address and is then greeted: the server
//! must be a primary, and its time becomes the floor of all counters before the first request is
//! sent. A promoted replica with old counters therefore never issues an old token. A connection
//! ends when it breaks, when its server replies that it is not a primary, or when a sentinel
//! reports a switch (`failover`). The request that noticed is resent on a new connection, which is
//! safe because it is idempotent for its cycle. The inbox moves along, and all waiters retry.
//!
//! A server writes the replies of one turn of its event loop in the reverse of the order in which
//! their clients had their first pending reply. A release that hands the lock over follows another
//! command, so its own client is first in that order and the grant is written before its reply.
//! Otherwise the releasing process, which often asks for the lock again, would run before the new
//! holder.
//!
//! Replication is asynchronous, so a failover may lose a recent lease. Its holder learns of the
//! loss at its next renewal, which is sent once the inbox is subscribed on the new primary. Until
//! then two holders may exist; their tokens differ. `replica_ack` offers a stronger guarantee.
//! Whenever a connection ends, the epoch changes, and no lease is passed on before it was confirmed
//! in the new epoch.

mod attempts;
mod background;
mod checked;
mod dial;
mod discovery;
mod failover;
#[cfg(any(test, fuzzing))]
pub(super) mod fuzzing;
mod health;
mod known_inbox;
mod link;
mod quorum_node;
mod renewals;
mod send;
mod sentinels;
mod subscriber;
#[cfg(test)]
mod test_access;
mod vote;

use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use deadpool_redis::redis::{RedisError, Value};
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc};

use super::client::Purpose;
use super::commands::{Commands, erase};
use super::connection::Cuts;
use super::map;
use super::replica_ack::ReplicaAck;
use super::reply::{no_answer, released};
use super::script::Scripts;
use super::token_floor::TokenFloor;
use crate::clock::Moment;
use crate::endpoint::{Access, ServerUrl};
use crate::error::InvalidSetting;
use crate::key::{LockKey, Slot};
use crate::mode::LockMode;
use crate::protocol::{Acquire, AcquireKind, AcquireReply, Answer, Push, Release, ReleaseReply, RenewReply, Renewal};
use crate::rate_limit::RateLimit;
use crate::runtime::Runtimes;
use crate::store::login::Login;
use crate::store::map::StoredMap;
use crate::store::{
    Health, KeyState, LeaseStore, MapState, MapStep, Priority, StoreError, StoreFuture, StoreOptions, TlsFiles,
};
use crate::telemetry::ShardMetrics;
use crate::time_limit::within;
use attempts::{Attempts, RECONNECTS_PER_REQUEST};
use background::BackgroundLinks;
use checked::{Borrowed, Checked, PrimaryOpener, PrimaryPool};
use discovery::Discovery;
use failover::FailoverEvents;
use known_inbox::InboxState;
use link::{Link, Live};
use renewals::CallShape;
use send::ReleaseBy;
use sentinels::Sentinels;
use vote::VoteEligibility;

/// See the module.
pub(crate) struct RedisStore {
    callers: Vec<Arc<Link>>,
    background: Arc<Link>,
    pool: Arc<PrimaryPool>,
    shared: Arc<Shared>,
}

/// What the connections of a store share.
pub(super) struct Shared {
    shard: Arc<str>,
    discovery: Discovery,
    tls: TlsFiles,
    login: Login,
    failovers: FailoverEvents,
    /// If several addresses of the server's name were tried, the only one that led to a primary.
    address: Mutex<Option<SocketAddr>>,
    /// How often the server at a fixed address turned out not to be a primary any more. Connections
    /// opened before the last time are not reused, since the address leads elsewhere now.
    era: AtomicU64,
    /// Wakes the listener to check that the server that executes commands knows the inbox.
    inbox_check: Notify,
    inbox_state: InboxState,
    commands: Commands,
    map: StoredMap,
    timeout: Duration,
    scripts: Scripts,
    metrics: Arc<ShardMetrics>,
    runtimes: Arc<Runtimes>,
    cuts: Cuts,
    /// Set if replicas must acknowledge a lease before it counts.
    replica_ack: Option<ReplicaAck>,
    call_shape: CallShape,
    /// Whether servers are asked for their role.
    check_role: bool,
    token_floor: TokenFloor,
    /// Whether the server may vote; only if it is a node of a quorum.
    vote: Option<VoteEligibility>,
    /// See [`LeaseStore::epoch`].
    epoch: AtomicU32,
    /// Limits log lines about renewals that were refused or not confirmed.
    failed_renewals: RateLimit,
}

impl RedisStore {
    /// Creates a store for the server at this address. Sends nothing yet.
    pub(crate) fn new(server: &ServerUrl, options: StoreOptions) -> Result<Self, InvalidSetting> {
        Self::from_source(Discovery::Fixed(server.clone()), options, None)
    }

    /// Creates a store for one node of a quorum.
    pub(crate) fn node(server: &ServerUrl, options: StoreOptions) -> Result<Self, InvalidSetting> {
        let vote = VoteEligibility::new(options.redlock_max_ttl);
        Self::from_source(Discovery::Fixed(server.clone()), options, Some(vote))
    }

    /// Creates a store for the primary that sentinels know by this name. Sends nothing yet.
    pub(crate) fn watched(
        sentinels: &[ServerUrl],
        primary: &str,
        access: &Access,
        options: StoreOptions,
    ) -> Result<Self, InvalidSetting> {
        let (servers, name) = (sentinels.to_vec(), primary.to_owned());
        let sentinels = Sentinels::new(servers, name, access.clone(), options.tls.clone(), options.timeout);
        Self::from_source(Discovery::Sentinels(sentinels), options, None)
    }

    fn from_source(
        discovery: Discovery,
        options: StoreOptions,
        vote: Option<VoteEligibility>,
    ) -> Result<Self, InvalidSetting> {
        discovery.check(&options.tls)?;
        options.login.check()?;
        let commands = Commands::new(&options.namespace, options.manager);
        let shared = Arc::new(Shared {
            shard: options.shard,
            discovery,
            tls: options.tls,
            login: options.login,
            failovers: FailoverEvents::new(),
            address: Mutex::new(None),
            map: StoredMap::new(options.map, commands.names.map()),
            commands,
            era: AtomicU64::new(0),
            inbox_check: Notify::new(),
            inbox_state: InboxState::default(),
            timeout: options.timeout,
            scripts: Scripts::for_a_primary(&options.namespace),
            metrics: options.metrics,
            runtimes: options.runtimes,
            cuts: Cuts::default(),
            replica_ack: ReplicaAck::new(options.min_replicas_acked, options.timeout),
            call_shape: CallShape::default(),
            check_role: options.check_role,
            token_floor: TokenFloor::new(),
            vote,
            epoch: AtomicU32::new(0),
            failed_renewals: RateLimit::default(),
        });
        let callers = (0..options.connections.max(1)).map(|_| Link::new(&shared, Purpose::Requests));
        Ok(Self {
            callers: callers.map(Arc::new).collect(),
            background: Arc::new(Link::new(&shared, Purpose::Renewals)),
            pool: Arc::new(PrimaryOpener::pool(&shared)),
            shared,
        })
    }

    /// The connections for requests about the server as a whole, sent by the background thread.
    fn background(&self) -> BackgroundLinks {
        BackgroundLinks {
            own: Arc::clone(&self.background),
            others: self.callers.clone(),
        }
    }

    /// The connections for requests that are not on the path of a lock.
    fn checked(&self) -> Checked {
        Checked {
            shared: Arc::clone(&self.shared),
            pool: Arc::clone(&self.pool),
            kept: self.callers.iter().chain([&self.background]).map(Arc::clone).collect(),
        }
    }

    /// A key's requests share a connection, which keeps their order.
    fn link(&self, priority: Priority, slot: Slot) -> Arc<Link> {
        match priority {
            Priority::Foreground => Arc::clone(&self.callers[usize::from(slot.number()) % self.callers.len()]),
            Priority::Background => Arc::clone(&self.background),
        }
    }
}

impl Shared {
    /// A connection broke or the primary changed: leases must be confirmed before they are passed
    /// on. Call this once nothing more is sent to the affected server.
    fn may_have_forgotten(&self) {
        self.epoch.fetch_add(1, Ordering::AcqRel);
    }

    /// A connection of this era leads to a server that is not a primary: stop using all connections
    /// of the era.
    fn leave_era(&self, era: u64) {
        // Many requests notice this at once; the first one counts.
        let left = self
            .era
            .compare_exchange(era, era + 1, Ordering::AcqRel, Ordering::Relaxed);
        if left.is_ok() {
            crate::log::info!(shard = %self.shard, "the server is no longer a primary; reopening all connections");
        }
    }

    /// The server at this address, found in this era, is not a primary: all connections and the
    /// inbox must leave it.
    fn leave_server(&self, place: &str, era: u64) {
        if self.discovery.follows() {
            self.failovers.on_demotion(place);
        } else {
            self.leave_era(era);
        }
    }

    fn note_reply(&self, live: &Live, slot: Slot, reply: &AcquireReply) {
        if let AcquireReply::Queued(position) = reply
            && !position.is_subscribed
        {
            live.known_inbox.not_seen();
            self.inbox_check.notify_one();
        }
        self.token_floor.note_reply(slot, reply);
    }

    /// How long a release waits for its reply: half of its time limit. A connection that is silent
    /// for longer is considered broken, so the release is resent on another one. The client library
    /// may write a request to a connection that closes at the same moment, and then wait forever.
    /// An acquire is not resent, but it leaves such a connection when its sender gives up
    /// ([`Unanswered`](link::Unanswered)).
    fn patience(&self) -> Duration {
        self.timeout / 2
    }

    /// The error for a connection that did not answer within [`patience`](Self::patience).
    fn no_answer(&self) -> RedisError {
        no_answer(self.patience())
    }

    /// How often the primary has changed; always zero at a fixed address.
    fn switches(&self) -> u64 {
        match self.discovery {
            Discovery::Fixed(_) => 0,
            Discovery::Sentinels(_) => self.failovers.switches(),
        }
    }
}

impl LeaseStore for RedisStore {
    fn connect(&self) -> StoreFuture<()> {
        let callers = self.callers.clone();
        Box::pin(async move {
            for link in &callers {
                link.get().await?;
            }
            Ok(())
        })
    }

    fn connect_background(&self) -> StoreFuture<()> {
        let link = Arc::clone(&self.background);
        Box::pin(async move { link.get().await.map(drop) })
    }

    fn has_map(&self) -> bool {
        self.shared.map.is_set()
    }

    fn map(&self, step: MapStep) -> StoreFuture<MapState> {
        let (shared, link) = (Arc::clone(&self.shared), Arc::clone(&self.callers[0]));
        Box::pin(async move {
            let mut reconnects = 0;
            loop {
                let live = link.get().await?;
                let send = |command| -> map::Reply<'_> { Box::pin(shared.map_command(&link, &live, command)) };
                let done = map::step(&shared.map, step, &send).await;
                let is_broken = link.live().is_none_or(|now| now.generation != live.generation);
                match done {
                    // Each step begins by reading the stored map, so it may be repeated.
                    Err(StoreError::Unavailable(_)) if is_broken && reconnects < RECONNECTS_PER_REQUEST => {
                        reconnects += 1;
                    }
                    done => return done,
                }
            }
        })
    }

    fn acquire(&self, request: Acquire) -> StoreFuture<Answer<AcquireReply>> {
        let shared = Arc::clone(&self.shared);
        let slot = shared.commands.names.of(&request.key).slot();
        let link = self.link(Priority::Foreground, slot);
        Box::pin(async move {
            let _in_flight = link.enter();
            let mut request = request;
            let mut attempts = Attempts::default();
            loop {
                let mut live = link.get().await?;
                let floor = shared.token_floor.of(slot);
                let sent_at = Moment::now();
                let mut unanswered = link.unanswered(&live, sent_at);
                let asked = shared.send_acquire(&mut live, &request, slot, floor).await;
                unanswered.answered();
                match asked {
                    // Replies of a server that has been replaced meanwhile must be discarded.
                    Ok(_) if shared.switches() != live.switches => attempts.was_discarded(None)?,
                    Ok(reply) => {
                        let reply = reply?;
                        shared.note_reply(&live, slot, &reply);
                        return Ok(Answer {
                            sent_at,
                            ttl: request.ttl,
                            floor,
                            reply,
                        });
                    }
                    Err(error) => attempts.failed(&shared, &link, &live, &error)?,
                }
                if request.kind == AcquireKind::Fast {
                    // The attempt may have taken the lease: only the script recognizes its own
                    // lease.
                    request.kind = AcquireKind::Enqueue;
                }
            }
        })
    }

    fn release(&self, priority: Priority, request: Release) -> StoreFuture<Answer<ReleaseReply>> {
        let shared = Arc::clone(&self.shared);
        let slot = shared.commands.names.of(&request.key).slot();
        let mut link = self.link(priority, slot);
        // The connection that carries the other requests for this key.
        let other = (priority == Priority::Background).then(|| self.link(Priority::Foreground, slot));
        Box::pin(async move {
            let _in_flight = link.enter();
            let (ttl, tokens) = (request.ttl(), request.tokens);
            let mut attempts = Attempts::default();
            let (mut free, mut may_retire) = (request.nobody_waits && request.is_exclusive(), true);
            loop {
                let mut live = match (link.get().await, &other) {
                    (Ok(live), _) => live,
                    (Err(error), Some(other)) => {
                        let live = other.live().ok_or(error)?;
                        link = Arc::clone(other);
                        live
                    }
                    (Err(error), None) => return Err(error),
                };
                let floor = shared.token_floor.of(slot);
                let sent_at = Moment::now();
                let by = match request.rest(sent_at).filter(|_| may_retire) {
                    Some(rest) => ReleaseBy::Retire(rest),
                    None if free => ReleaseBy::Free,
                    None => ReleaseBy::PassingOn,
                };
                let answer = {
                    let asking = pin!(shared.send_release(&mut live, &request, by, floor));
                    within(sent_at, shared.patience(), asking).await
                };
                let mut reply = match answer.unwrap_or_else(|_| Err(shared.no_answer())) {
                    Ok(Value::Int(1)) if by != ReleaseBy::PassingOn => ReleaseReply::HELD,
                    // A cycle waits after all, or the lease is no longer ours.
                    Ok(_) if by != ReleaseBy::PassingOn => {
                        (free, may_retire) = (false, false);
                        continue;
                    }
                    Ok(value) => released(&value, request.requeue.is_some(), tokens)?,
                    Err(error) => {
                        free = false;
                        attempts.failed(&shared, &link, &live, &error)?;
                        continue;
                    }
                };
                if shared.switches() != live.switches {
                    // The new primary may still have the lease.
                    attempts.was_discarded(Some(reply.held))?;
                    continue;
                }
                // An earlier attempt whose reply was lost may have released the lease. That it is
                // no longer ours is not a loss then.
                reply.held |= attempts.may_have_released;
                if let Some(reply) = &reply.requeued {
                    shared.note_reply(&live, slot, reply);
                }
                reply.requeued = shared.only_confirmed(reply.requeued);
                return Ok(Answer {
                    sent_at,
                    ttl,
                    floor,
                    reply,
                });
            }
        })
    }

    fn break_lease(&self, key: LockKey, owner: String, tokens: u32) -> StoreFuture<bool> {
        let shared = Arc::clone(&self.shared);
        let slot = shared.commands.names.of(&key).slot();
        let link = self.link(Priority::Foreground, slot);
        Box::pin(async move {
            let _in_flight = link.enter();
            let mut live = link.get().await?;
            let floor = shared.token_floor.of(slot);
            let mut unanswered = link.unanswered(&live, Moment::now());
            // Not repeated: after a failure the caller reads the key again.
            let sent = shared.send_break(&mut live, &key, &owner, tokens, floor).await;
            unanswered.answered();
            let value = sent.map_err(|error| {
                link.close_if_broken(&error, &live);
                shared.discovery.to_store_error(&error)
            })?;
            if shared.switches() != live.switches {
                let reason = "another server became the primary meanwhile, which may still have the lease";
                return Err(StoreError::Unavailable(reason.into()));
            }
            Ok(released(&value, false, tokens)?.held)
        })
    }

    fn renew(&self, batch: Vec<Renewal>, limit: Duration) -> StoreFuture<Vec<Option<RenewReply>>> {
        let shared = Arc::clone(&self.shared);
        let background = self.background();
        Box::pin(async move {
            let (link, live) = background.get(limit / 3).await?;
            renewals::renew(&shared, &link, &live, &batch, limit).await
        })
    }

    fn inspect(&self, key: LockKey) -> StoreFuture<KeyState> {
        let (shared, checked) = (Arc::clone(&self.shared), self.checked());
        Box::pin(async move {
            let borrowed = checked.get().await?;
            shared.inspect(borrowed, &key).await
        })
    }

    fn inspect_again(&self, key: LockKey) -> StoreFuture<KeyState> {
        let shared = Arc::clone(&self.shared);
        let link = self.link(Priority::Foreground, shared.commands.names.of(&key).slot());
        Box::pin(async move {
            let live = link.get().await?;
            shared.inspect(Borrowed::Kept(link, live), &key).await
        })
    }

    fn erase(&self) -> StoreFuture<u64> {
        let (shared, checked) = (Arc::clone(&self.shared), self.checked());
        Box::pin(async move {
            let borrowed = checked.get().await?;
            shared.map.forget();
            let erased = erase(borrowed.connection(), &shared.commands, shared.timeout).await;
            erased.map_err(|error| borrowed.failed(&shared, &error))
        })
    }

    fn probe(&self) -> Pin<Box<dyn Future<Output = Health> + Send>> {
        self.pool.close_idle();
        Box::pin(health::probe(self.checked(), self.probe_kept()))
    }

    fn epoch(&self, _: Slot) -> u32 {
        self.shared.epoch.load(Ordering::Acquire)
    }

    fn slot_of(&self, key: &LockKey) -> Slot {
        self.shared.commands.names.of(key).slot()
    }

    fn lacks(&self, _: LockMode) -> Option<&'static str> {
        None
    }

    fn last_cut(&self) -> Option<Moment> {
        self.shared.cuts.last()
    }

    fn run_subscriber(&self, pushes: mpsc::UnboundedSender<Push>) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        let shared = Arc::clone(&self.shared);
        let commands = Arc::clone(&self.callers[0]);
        let links = self.callers.iter().chain([&self.background]).map(Arc::clone).collect();
        Box::pin(async move {
            let listening = shared
                .runtimes
                .run(|| subscriber::run(Arc::clone(&shared), Arc::clone(&commands), pushes.clone()));
            if !shared.discovery.follows() {
                return listening.await;
            }
            tokio::select! {
                () = listening => {}
                () = failover::run(Arc::clone(&shared), links) => {}
            }
        })
    }

    fn leave_app_runtime(&self) {
        self.callers.iter().for_each(|link| link.leave());
        self.shared.may_have_forgotten();
    }
}
