//! A Redis (or Valkey) primary as a lease store.
//!
//! # Implementation details
//!
//! Every change of a lock's state is one Lua script, or the two plain commands of the free path, so that it is atomic on
//! the server; `scripts/*.lua` hold the protocol. All are idempotent for a cycle.
//!
//! Connections: `connections` command connections on the program's runtime, among which a key always uses the same one, so that the
//! requests for a key keep their order; one on the watchdog's thread for renewals; one that only listens to the manager's inbox. A connection that
//! carries commands never subscribes: an unsolicited push would be taken for a reply.

mod inbox;
mod link;
mod names;
#[cfg(test)]
mod probe;
mod reply;
mod script;

use std::io::Write;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use deadpool_redis::redis::io::tcp::TcpSettings;
use deadpool_redis::redis::{
    Client, Cmd, ConnectionInfo, IntoConnectionInfo, Pipeline, RedisError, RedisWrite, Value, pipe,
};
use tokio::sync::mpsc;

use crate::clock::Moment;
use crate::error::Invalid;
use crate::fence::FencingToken;
use crate::identity::{ManagerId, Signature, parse_signature};
use crate::key::{LockKey, SLOTS, Slot};
use crate::protocol::{Acquire, AcquireReply, Answer, Ask, Cycle, Push, Release, ReleaseReply, RenewReply, Renewal};
use crate::store::{Holder, INSPECTED_QUEUE_MAX, Inspection, Lane, LeaseStore, StoreError, StoreFuture};
use crate::telemetry::ShardMetrics;
use link::Link;
use names::Names;
use reply::{acquired, acquired_freely, as_int, as_text, error_in_words, released, renewed};
use script::Scripts;

/// What a store needs to know to connect.
#[derive(Debug, Clone)]
pub(crate) struct RedisOptions {
    pub(crate) namespace: String,
    pub(crate) manager: ManagerId,
    /// This shard's part of the map that all managers must share.
    pub(crate) map: String,
    pub(crate) connections: usize,
    /// The longest time that connecting may take.
    pub(crate) timeout: Duration,
    pub(crate) metrics: Arc<ShardMetrics>,
}

/// See the module.
pub(crate) struct RedisStore {
    callers: Vec<Arc<Link>>,
    background: Arc<Link>,
    client: Client,
    shared: Arc<Shared>,
}

/// What the connections of a store share.
pub(super) struct Shared {
    names: Names,
    inbox_prefix: String,
    manager: ManagerId,
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
    pub(crate) fn new(url: &str, options: RedisOptions) -> Result<Self, Invalid> {
        // The error of the client library may quote the URL, and with it the password.
        let info = url.into_connection_info().map_err(|_| {
            Invalid::new(
                "url",
                "a URL that the client can't use",
                "redis://[user[:password]@]host[:port][/db]",
            )
        })?;
        let info: ConnectionInfo = info.set_tcp_settings(TcpSettings::default().set_nodelay(true));
        let shared = Arc::new(Shared {
            inbox_prefix: Names::new(&options.namespace).inbox_prefix(),
            names: Names::new(&options.namespace),
            manager: options.manager,
            map: options.map,
            timeout: options.timeout,
            scripts: Scripts::new(),
            metrics: options.metrics,
            floor: AtomicU64::new(0),
            seen: (0..SLOTS).map(|_| AtomicU64::new(0)).collect(),
        });
        let unusable = |_| {
            Invalid::new(
                "url",
                "a URL that the client can't use",
                "redis://[user[:password]@]host[:port][/db]",
            )
        };
        let link = || Link::new(&info, &shared).map(Arc::new).map_err(|_| unusable(()));
        Ok(Self {
            callers: (0..options.connections.max(1))
                .map(|_| link())
                .collect::<Result<_, _>>()?,
            background: link()?,
            client: Client::open(info.clone()).map_err(|_| unusable(()))?,
            shared,
        })
    }

    /// Opens the connections of the caller's lane on the runtime of the caller.
    pub(crate) async fn connect(&self) -> Result<(), StoreError> {
        for link in &self.callers {
            link.get().await?;
        }
        Ok(())
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

impl Shared {
    /// The two commands of the free path.
    fn take_freely(&self, key: &LockKey, cycle: Cycle, ttl: Duration, tokens: u32) -> Pipeline {
        let names = self.names.of(key);
        let mut set = Cmd::with_capacity(6, 128);
        set.arg("SET");
        names.lease().write(&mut set);
        write_signature(&mut set, self.manager.sign(cycle));
        set.arg("NX").arg("PX").arg(millis(ttl));
        let mut count = Cmd::with_capacity(3, 64);
        count.arg("INCRBY");
        names.counter().write(&mut count);
        count.arg(tokens);
        let mut commands = Pipeline::with_capacity(2);
        commands.add_command(set).add_command(count);
        commands
    }

    /// The keys that the scripts of a lock have, and the first of their arguments: signature, TTL, tokens and floor.
    fn write_terms(&self, command: &mut Cmd, key: &LockKey, cycle: Cycle, ttl: Duration, tokens: u32, floor: u64) {
        let names = self.names.of(key);
        command.arg(3);
        names.lease().write(command);
        names.queue().write(command);
        names.counter().write(command);
        write_signature(command, self.manager.sign(cycle));
        command.arg(millis(ttl)).arg(tokens).arg(floor);
    }

    fn write_inbox_prefix(&self, command: &mut Cmd) {
        command.arg(&self.inbox_prefix);
    }
}

/// Writes `manager:cycle` as the next argument, without the cost of formatting.
fn write_signature(command: &mut Cmd, signature: Signature<'_>) {
    let (manager, cycle) = signature.parts();
    let mut writer = command.writer_for_next_arg();
    let parts = [manager.as_bytes(), b":", &cycle.to_string().into_bytes()];
    // A buffer in memory takes everything.
    parts.into_iter().try_for_each(|part| writer.write_all(part)).ok();
}

/// The replies of a pipeline, or the first error among them.
fn without_errors(replies: Vec<Value>) -> Result<Vec<Value>, RedisError> {
    replies.into_iter().map(Value::extract_error).collect()
}

/// Whole milliseconds, as Redis wants them; never zero.
fn millis(ttl: Duration) -> u64 {
    u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX).max(1)
}

impl LeaseStore for RedisStore {
    fn acquire(&self, request: Acquire) -> StoreFuture<Answer<AcquireReply>> {
        let shared = Arc::clone(&self.shared);
        let slot = shared.names.of(&request.key).slot;
        let link = self.link(Lane::Caller, slot);
        Box::pin(async move {
            let Acquire {
                key,
                cycle,
                mut ask,
                ttl,
                tokens,
            } = request;
            let mut attempt = 0;
            loop {
                let mut live = link.get().await?;
                let floor = shared.floor(slot);
                let sent_at = Moment::now();
                let reply = if ask == Ask::Free {
                    let commands = shared.take_freely(&key, cycle, ttl, tokens);
                    let replies = live.connection.send_packed_commands(&commands, 0, 2).await;
                    replies
                        .and_then(without_errors)
                        .map(|replies| acquired_freely(&replies, tokens))
                } else {
                    let fill = |command: &mut Cmd| {
                        shared.write_terms(command, &key, cycle, ttl, tokens, floor);
                        command.arg(if ask == Ask::Try { "try" } else { "join" });
                        shared.write_inbox_prefix(command);
                        command.arg(key.as_str());
                    };
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
                        if ask == Ask::Free {
                            // The first attempt may have taken the lease: only the script knows its own.
                            ask = Ask::Join;
                        }
                    }
                }
            }
        })
    }

    fn release(&self, lane: Lane, request: Release) -> StoreFuture<Answer<ReleaseReply>> {
        let shared = Arc::clone(&self.shared);
        let slot = shared.names.of(&request.key).slot;
        let link = self.link(lane, slot);
        Box::pin(async move {
            let Release {
                key,
                cycle,
                requeue,
                nobody_waits,
                ttl,
                tokens,
            } = request;
            let mut attempt = 0;
            let mut free = nobody_waits;
            loop {
                let mut live = link.get().await?;
                let floor = shared.floor(slot);
                let sent_at = Moment::now();
                if free {
                    free = false;
                    let fill = |command: &mut Cmd| {
                        let names = shared.names.of(&key);
                        command.arg(2);
                        names.lease().write(command);
                        names.queue().write(command);
                        write_signature(command, shared.manager.sign(cycle));
                    };
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
                let fill = |command: &mut Cmd| {
                    shared.write_terms(command, &key, cycle, ttl, tokens, floor);
                    shared.write_inbox_prefix(command);
                    command.arg(key.as_str());
                    match requeue {
                        Some(next) => write_signature(command, shared.manager.sign(next)),
                        None => command.write_arg(b""),
                    }
                };
                match shared.scripts.release.call(&mut live.connection, fill).await {
                    Ok(value) => {
                        let mut reply = released(&value, requeue.is_some(), tokens)?;
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

    fn renew(&self, batch: Vec<Renewal>) -> StoreFuture<Vec<RenewReply>> {
        let shared = Arc::clone(&self.shared);
        let link = Arc::clone(&self.background);
        Box::pin(async move {
            let live = link.get().await?;
            let calls = batch.chunks(RENEWALS_PER_CALL).map(|part| {
                let (mut connection, shared) = (live.connection.clone(), &shared);
                async move {
                    let fill = |command: &mut Cmd| {
                        command.arg(part.len() * 2);
                        for renewal in part {
                            let names = shared.names.of(&renewal.key);
                            names.lease().write(command);
                            names.queue().write(command);
                        }
                        for renewal in part {
                            write_signature(command, shared.manager.sign(renewal.cycle));
                            command.arg(millis(renewal.ttl));
                        }
                    };
                    let call = shared.scripts.renew.call(&mut connection, fill).await;
                    call.map(|value| renewed(&value, part.len()))
                }
            });
            let mut replies = Vec::with_capacity(batch.len());
            for part in futures_util::future::join_all(calls).await {
                match part {
                    Ok(part) => replies.extend(part?),
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
        let link = self.link(Lane::Caller, shared.names.of(&key).slot);
        Box::pin(async move {
            let mut live = link.get().await?;
            let names = shared.names.of(&key);
            let (lease, queue, counter) = (
                names.lease().to_string(),
                names.queue().to_string(),
                names.counter().to_string(),
            );
            let mut commands = pipe();
            commands.cmd("GET").arg(&lease);
            commands.cmd("PTTL").arg(&lease);
            commands.cmd("ZCARD").arg(&queue);
            commands.cmd("ZRANGE").arg(&queue).arg(0).arg(INSPECTED_QUEUE_MAX - 1);
            commands.cmd("GET").arg(&counter);
            let replies = live.connection.send_packed_commands(&commands, 0, 5).await;
            let replies = replies.and_then(without_errors);
            let replies = replies.map_err(|error| {
                if error.is_unrecoverable_error() {
                    link.broken(&live);
                }
                error_in_words(&error)
            })?;
            let [owner, left, queue_length, queue, counter] = &replies[..] else {
                return Err(StoreError::Refused(
                    format!("unexpected replies to an inspection: {replies:?}").into(),
                ));
            };
            let holder = as_text(owner).map(|owner| Holder {
                is_manager: parse_signature(&owner).is_some(),
                owner,
                remaining: as_int(left)
                    .and_then(|left| u64::try_from(left).ok())
                    .map(Duration::from_millis),
            });
            let queue = match queue {
                Value::Array(members) => members.iter().filter_map(as_text).collect(),
                _ => Vec::new(),
            };
            Ok(Inspection {
                holder,
                queue_length: as_int(queue_length)
                    .and_then(|length| length.try_into().ok())
                    .unwrap_or_default(),
                queue,
                last_token: as_int(counter)
                    .and_then(|token| token.try_into().ok())
                    .and_then(FencingToken::new),
            })
        })
    }

    fn listen(&self, pushes: mpsc::UnboundedSender<Push>) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(inbox::listen(self.client.clone(), Arc::clone(&self.shared), pushes))
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
