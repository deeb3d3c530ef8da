//! A single Redis (or Valkey) primary as a lease store.
//!
//! # Implementation details
//!
//! Connections: `connections` command connections on the program's runtime, among which a key always uses the same one, so that the
//! requests for a key keep their order; one on the watchdog's thread for renewals; one that only listens to the manager's inbox. A connection that
//! carries commands never subscribes: an unsolicited push would be taken for a reply.

mod inbox;
mod link;
#[cfg(test)]
mod probe;

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use deadpool_redis::redis::aio::ConnectionLike;
use deadpool_redis::redis::io::tcp::TcpSettings;
use deadpool_redis::redis::{Client, Cmd, ConnectionInfo, IntoConnectionInfo, RedisError, Value, cmd};
use tokio::sync::mpsc;

use super::commands::{Commands, without_errors};
use super::reply::{acquired, acquired_freely, error_in_words, inspected, released, renewed, server_time};
use super::script::Scripts;
use crate::clock::Moment;
use crate::endpoint::ServerUrl;
use crate::error::Invalid;
use crate::key::{LockKey, SLOTS, Slot};
use crate::protocol::{Acquire, AcquireReply, Answer, Ask, Push, Release, ReleaseReply, RenewReply, Renewal};
use crate::store::{Inspection, Lane, LeaseStore, ServerTime, StoreError, StoreFuture, StoreOptions};
use crate::telemetry::ShardMetrics;
use link::Link;

/// See the module.
pub(crate) struct RedisStore {
    callers: Vec<Arc<Link>>,
    background: Arc<Link>,
    client: Client,
    shared: Arc<Shared>,
}

/// What the connections of a store share.
pub(super) struct Shared {
    commands: Commands,
    map: String,
    timeout: Duration,
    scripts: Scripts,
    metrics: Arc<ShardMetrics>,
    /// The server's time at the last connect, as a token: counters below it were lost.
    floor: AtomicU64,
    /// The largest token seen in each slot.
    seen: Box<[AtomicU64]>,
}

/// How many leases one call of the renewal script covers: few enough that others get a turn in between.
const RENEWALS_PER_CALL: usize = 128;
/// How often a request is sent again on a new connection when the old one turned out to be broken.
const RECONNECTS_PER_REQUEST: usize = 2;

impl RedisStore {
    /// Prepares a store; nothing is sent yet.
    pub(crate) fn new(server: &ServerUrl, options: StoreOptions) -> Result<Self, Invalid> {
        // The error of the client library may quote the URL, and with it the password.
        let unusable = || Invalid::new("url", server.place(), "a server that the client library can use");
        let info = server.as_str().into_connection_info().map_err(|_| unusable())?;
        let info: ConnectionInfo = info.set_tcp_settings(TcpSettings::default().set_nodelay(true));
        let shared = Arc::new(Shared {
            commands: Commands::new(&options.namespace, options.manager),
            map: options.map,
            timeout: options.timeout,
            scripts: Scripts::new(),
            metrics: options.metrics,
            floor: AtomicU64::new(0),
            seen: (0..SLOTS).map(|_| AtomicU64::new(0)).collect(),
        });
        let link = || Link::new(&info, &shared).map(Arc::new).map_err(|_| unusable());
        Ok(Self {
            callers: (0..options.connections.max(1))
                .map(|_| link())
                .collect::<Result<_, _>>()?,
            background: link()?,
            client: Client::open(info.clone()).map_err(|_| unusable())?,
            shared,
        })
    }

    /// A key's requests share a connection, which keeps their order.
    fn link(&self, lane: Lane, slot: Slot) -> Arc<Link> {
        match lane {
            Lane::Caller => Arc::clone(&self.callers[usize::from(slot.number()) % self.callers.len()]),
            Lane::Background => Arc::clone(&self.background),
        }
    }
}

impl Shared {
    /// Every token of that slot issued from now on is above this.
    fn floor(&self, slot: Slot) -> u64 {
        let seen = self.seen[usize::from(slot.number())].load(Ordering::Acquire);
        seen.max(self.floor.load(Ordering::Acquire))
    }

    fn saw(&self, slot: Slot, reply: &AcquireReply) {
        let token = match reply {
            AcquireReply::Granted { tokens, .. } => tokens.last(),
            AcquireReply::Queued(place) => place.mark,
            AcquireReply::Taken | AcquireReply::Busy => return,
        };
        self.seen[usize::from(slot.number())].fetch_max(token, Ordering::AcqRel);
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

    fn acquire(&self, request: Acquire) -> StoreFuture<Answer<AcquireReply>> {
        let shared = Arc::clone(&self.shared);
        let slot = shared.commands.names.of(&request.key).slot;
        let link = self.link(Lane::Caller, slot);
        Box::pin(async move {
            let Acquire { cycle, ttl, tokens, .. } = request;
            let mut request = request;
            let mut attempt = 0;
            loop {
                let mut live = link.get().await?;
                let floor = shared.floor(slot);
                let sent_at = Moment::now();
                let reply = if request.ask == Ask::Free {
                    let commands = shared.commands.take_freely(&request.key, cycle, ttl, tokens);
                    let replies = live.connection.send_packed_commands(&commands, 0, 2).await;
                    replies
                        .and_then(without_errors)
                        .map(|replies| acquired_freely(&replies, tokens))
                } else {
                    let fill = |command: &mut Cmd| shared.commands.fill_acquire(command, &request, floor);
                    let call = shared.scripts.acquire.call(&mut live.connection, fill).await;
                    call.map(|value| acquired(&value, tokens))
                };
                match reply {
                    Ok(reply) => {
                        let reply = reply?;
                        shared.saw(slot, &reply);
                        return Ok(Answer {
                            sent_at,
                            ttl,
                            floor,
                            reply,
                        });
                    }
                    Err(error) => {
                        retry_on_a_new_connection(&link, &live, &error, &mut attempt)?;
                        if request.ask == Ask::Free {
                            // The first attempt may have taken the lease: only the script knows its own.
                            request.ask = Ask::Join;
                        }
                    }
                }
            }
        })
    }

    fn release(&self, lane: Lane, request: Release) -> StoreFuture<Answer<ReleaseReply>> {
        let shared = Arc::clone(&self.shared);
        let slot = shared.commands.names.of(&request.key).slot;
        let link = self.link(lane, slot);
        Box::pin(async move {
            let Release { ttl, tokens, .. } = request;
            let mut attempt = 0;
            let mut free = request.nobody_waits;
            loop {
                let mut live = link.get().await?;
                let floor = shared.floor(slot);
                let sent_at = Moment::now();
                if free {
                    free = false;
                    let fill =
                        |command: &mut Cmd| shared.commands.fill_release_free(command, &request.key, request.cycle);
                    match shared.scripts.release_free.call(&mut live.connection, fill).await {
                        Ok(Value::Int(1)) => {
                            let reply = ReleaseReply {
                                held: true,
                                requeued: None,
                            };
                            return Ok(Answer {
                                sent_at,
                                ttl,
                                floor,
                                reply,
                            });
                        }
                        // Somebody waits after all, or it is not ours any more.
                        Ok(_) => {}
                        Err(error) => {
                            retry_on_a_new_connection(&link, &live, &error, &mut attempt)?;
                            continue;
                        }
                    }
                }
                let fill = |command: &mut Cmd| shared.commands.fill_release(command, &request, floor);
                match shared.scripts.release.call(&mut live.connection, fill).await {
                    Ok(value) => {
                        let mut reply = released(&value, request.requeue.is_some(), tokens)?;
                        // An earlier attempt, whose reply was lost with its connection, may have done it: that it is not
                        // ours any more is no loss then.
                        reply.held |= attempt > 0;
                        if let Some(reply) = &reply.requeued {
                            shared.saw(slot, reply);
                        }
                        return Ok(Answer {
                            sent_at,
                            ttl,
                            floor,
                            reply,
                        });
                    }
                    Err(error) => retry_on_a_new_connection(&link, &live, &error, &mut attempt)?,
                }
            }
        })
    }

    fn renew(&self, batch: Vec<Renewal>, _limit: Duration) -> StoreFuture<Vec<Option<RenewReply>>> {
        let shared = Arc::clone(&self.shared);
        let link = Arc::clone(&self.background);
        Box::pin(async move {
            let live = link.get().await?;
            let calls = batch.chunks(RENEWALS_PER_CALL).map(|part| {
                let (mut connection, shared) = (live.connection.clone(), &shared);
                async move {
                    let fill = |command: &mut Cmd| shared.commands.fill_renew(command, part);
                    let call = shared.scripts.renew.call(&mut connection, fill).await;
                    call.map(|value| renewed(&value, part.len()))
                }
            });
            let mut replies = Vec::with_capacity(batch.len());
            for part in futures_util::future::join_all(calls).await {
                match part {
                    Ok(part) => replies.extend(part?.into_iter().map(Some)),
                    Err(error) => {
                        if error.is_unrecoverable_error() {
                            link.broken(&live);
                        }
                        return Err(error_in_words(&error));
                    }
                }
            }
            Ok(replies)
        })
    }

    fn inspect(&self, key: LockKey) -> StoreFuture<Inspection> {
        let shared = Arc::clone(&self.shared);
        let link = self.link(Lane::Caller, shared.commands.names.of(&key).slot);
        Box::pin(async move {
            let mut live = link.get().await?;
            let replies = live
                .connection
                .send_packed_commands(&shared.commands.inspect(&key), 0, 5)
                .await;
            let replies = replies.and_then(without_errors).map_err(|error| {
                if error.is_unrecoverable_error() {
                    link.broken(&live);
                }
                error_in_words(&error)
            })?;
            inspected(&replies)
        })
    }

    fn erase(&self) -> StoreFuture<u64> {
        let shared = Arc::clone(&self.shared);
        let link = Arc::clone(&self.callers[0]);
        Box::pin(async move {
            let live = link.get().await?;
            let erased = erase(live.connection, &shared.commands).await;
            erased.map_err(|error| error_in_words(&error))
        })
    }

    fn server_time(&self) -> StoreFuture<Option<ServerTime>> {
        let link = Arc::clone(&self.background);
        Box::pin(async move {
            let mut live = link.get().await?;
            let reply = cmd("TIME").query_async::<Value>(&mut live.connection).await;
            let reply = reply.map_err(|error| {
                if error.is_unrecoverable_error() {
                    link.broken(&live);
                }
                error_in_words(&error)
            })?;
            let (seconds, micros) = server_time(&reply)
                .ok_or_else(|| StoreError::Refused(format!("unexpected reply to TIME: {reply:?}").into()))?;
            Ok(Some(ServerTime {
                since_epoch: Duration::from_secs(seconds) + Duration::from_micros(micros),
                connection: live.generation,
            }))
        })
    }

    fn slot_of(&self, key: &LockKey) -> Slot {
        self.shared.commands.names.of(key).slot
    }

    fn listen(&self, pushes: mpsc::UnboundedSender<Push>) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(inbox::listen(self.client.clone(), Arc::clone(&self.shared), pushes))
    }
}

/// Removes all keys of the namespace from one server.
pub(in crate::store::redis) async fn erase(
    mut connection: impl ConnectionLike,
    commands: &Commands,
) -> Result<u64, RedisError> {
    let (mut cursor, mut count) = (0, 0);
    loop {
        let (next, found): (u64, Vec<Vec<u8>>) = commands.scan(cursor).query_async(&mut connection).await?;
        for key in found.iter().filter(|key| commands.names.is_ours(key)) {
            // One by one: in a cluster they need not share a slot.
            count += cmd("DEL").arg(key).query_async::<u64>(&mut connection).await?;
        }
        if next == 0 {
            return Ok(count);
        }
        cursor = next;
    }
}

/// A connection that broke is replaced, and the request sent again: the store takes two requests of one cycle for one.
fn retry_on_a_new_connection(
    link: &Link,
    live: &link::Live,
    error: &RedisError,
    attempt: &mut usize,
) -> Result<(), StoreError> {
    if error.is_unrecoverable_error() {
        link.broken(live);
        *attempt += 1;
        if *attempt <= RECONNECTS_PER_REQUEST {
            return Ok(());
        }
    }
    Err(error_in_words(error))
}
