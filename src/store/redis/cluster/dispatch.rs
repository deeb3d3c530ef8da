//! Sends one request to the node that owns a slot, following the slot if it moves.
//!
//! # Implementation details
//!
//! A request goes to the owner that the map names. `MOVED` corrects the map; `ASK` redirects once.
//! If a node can't answer now (`TRYAGAIN` while a slot moves, `CLUSTERDOWN`, `LOADING`, `READONLY`
//! after a failover, a broken connection, silence), the request is retried after a growing pause,
//! and the map is read again if it may be wrong. A request is thus retried until the store's time
//! limit, across a failover if the limit is long enough. All requests are idempotent for their
//! cycle, and a reply says whether an earlier attempt may have been executed.
//!
//! A connection that does not answer an attempt in time is replaced. The server may be fine while
//! the connection is not: a proxy that has forgotten it still acknowledges data, so it never
//! breaks.
//!
//! Requests for a key keep their order: they use one connection to a node, and a cancelled request
//! on it executes before later ones. Only a change of the slot's owner can separate them, and then
//! the old owner has refused or executed its requests before the new owner answers. A request to a
//! dead primary may have been executed and then lost. Its outcome is not mistaken for a lease,
//! since its reply never arrived.

use std::pin::pin;
use std::time::Duration;

use deadpool_redis::redis::aio::MultiplexedConnection;
use deadpool_redis::redis::{Cmd, ErrorKind, Pipeline, RedisError, ServerErrorKind, Value, pipe};

use super::super::connection::SILENCE_MIN;
use super::super::replica_ack::{ReplicaWait, acked};
use super::super::reply::to_store_error;
use super::super::script::Named;
use super::pool::{NodePool, Sender, at_place};
use super::topology::{NodeAddress, redirected};
use crate::backoff::Backoff;
use crate::clock::Moment;
use crate::key::Slot;
use crate::store::StoreError;

/// The first and the longest pause before a retry.
const PAUSE_MIN: Duration = Duration::from_millis(2);
const PAUSE_MAX: Duration = Duration::from_millis(100);
/// How many redirections in a row are followed without a pause: two nodes may redirect to each
/// other until they agree.
const REDIRECTIONS_AT_ONCE: usize = 4;

/// A request and the slot whose owner must answer it.
pub(super) struct Call<'a> {
    pub(super) slot: Slot,
    /// Builds the command.
    pub(super) command: &'a (dyn Fn(Named) -> Cmd + Send + Sync),
    /// Sent behind the command, if replicas should have executed it before the reply counts.
    pub(super) wait: Option<ReplicaWait>,
    /// Whether `TRYAGAIN` is returned instead of retried.
    pub(super) stops_at_try_again: bool,
    /// When to give up, if before the store's time limit.
    pub(super) deadline: Option<Moment>,
}

/// The reply to a call, or what was read from it.
pub(super) struct NodeReply<T = Value> {
    pub(super) value: T,
    /// When the answered attempt was about to be sent.
    pub(super) sent_at: Moment,
    /// Whether an earlier attempt may have been executed.
    pub(super) repeated: bool,
    /// How many replicas acknowledged, if that was requested.
    pub(super) acked: u32,
    /// The node that replied; `None` while the slot is being moved.
    pub(super) place: Option<NodeAddress>,
    /// The generation of the connection; `None` if it is pooled.
    pub(super) generation: Option<u64>,
}

impl<T> NodeReply<T> {
    pub(super) fn map<U>(self, read: impl FnOnce(T) -> U) -> NodeReply<U> {
        NodeReply {
            value: read(self.value),
            sent_at: self.sent_at,
            repeated: self.repeated,
            acked: self.acked,
            place: self.place,
            generation: self.generation,
        }
    }
}

/// The reply to several commands that were sent at once.
pub(super) enum BatchReply {
    Values(Vec<Value>),
    /// One of them failed. The others may have been executed.
    Failed(RedisError),
    /// The connection broke, or there was no answer in time.
    Broken,
}

/// Why a call failed.
pub(super) enum CallError {
    Failed(StoreError),
    /// The slot is being moved, and so far only some of the keys were.
    TryAgain,
}

impl From<CallError> for StoreError {
    fn from(error: CallError) -> Self {
        match error {
            CallError::Failed(error) => error,
            CallError::TryAgain => Self::Unavailable("the slot is being moved".into()),
        }
    }
}

/// The outcome of one attempt.
enum AttemptOutcome {
    Reply {
        value: Value,
        acked: u32,
        generation: Option<u64>,
    },
    Failed {
        error: RedisError,
        /// Whether the command was executed, and only the wait for replicas failed.
        executed: bool,
    },
    /// The command was not sent.
    NotSent(StoreError),
    Silent,
}

impl NodePool {
    /// Retries until there is a reply, or the time limit is nearly over.
    pub(super) async fn call(&self, call: Call<'_>) -> Result<NodeReply, CallError> {
        let shared = &*self.shared;
        let deadline = call.deadline.unwrap_or_else(|| shared.deadline());
        let mut named = Named::ByHash;
        let mut asking: Option<NodeAddress> = None;
        let mut backoff = Backoff::new(PAUSE_MIN, PAUSE_MAX);
        let (mut redirections, mut repeated) = (0, false);
        let mut failed: Option<StoreError> = None;
        loop {
            let version = shared.topology.version();
            let place = asking.clone().or_else(|| shared.topology.owner(call.slot));
            let last_error: StoreError = match place {
                None => match self.refresh(version).await {
                    Ok(()) if shared.topology.owner(call.slot).is_some() => continue,
                    Ok(()) => StoreError::Unavailable(format!("slot {} has no owner", call.slot).into()),
                    Err(error @ StoreError::Unavailable(_)) => error,
                    Err(error) => return Err(CallError::Failed(error)),
                },
                Some(place) => {
                    let was_asking = asking.take().is_some();
                    let sent_at = Moment::now();
                    if sent_at >= deadline {
                        let limit = shared.timeout;
                        let unsent =
                            format!("{place}: store_timeout ({limit:?}) passed before this step could be sent");
                        let error = failed.map_or(StoreError::Unavailable(unsent.into()), |error| timed_out(&error));
                        return Err(CallError::Failed(error));
                    }
                    let patience = match call.deadline {
                        Some(_) => shared.patience.min(deadline.since(sent_at)),
                        None => shared.patience,
                    };
                    match self.attempt(&place, &call, named, was_asking, patience).await {
                        AttemptOutcome::Reply {
                            value,
                            acked,
                            generation,
                        } => {
                            return Ok(NodeReply {
                                value,
                                sent_at,
                                repeated,
                                acked,
                                place: (!was_asking).then_some(place),
                                generation,
                            });
                        }
                        AttemptOutcome::NotSent(error @ StoreError::Unavailable(_)) => {
                            self.try_refresh(version).await;
                            error
                        }
                        AttemptOutcome::NotSent(error) => return Err(CallError::Failed(error)),
                        AttemptOutcome::Silent => {
                            repeated = true;
                            self.try_refresh(version).await;
                            StoreError::Unavailable(format!("{place} gave no answer within {patience:?}").into())
                        }
                        AttemptOutcome::Failed { error, executed } => {
                            repeated |= executed;
                            let leads_to = error.redirect_node().and_then(|(to, _)| redirected(to, &place));
                            match (error.kind(), leads_to) {
                                (ErrorKind::Server(ServerErrorKind::NoScript), _) if named == Named::ByHash => {
                                    named = Named::ByText;
                                    asking = was_asking.then_some(place);
                                    continue;
                                }
                                (ErrorKind::Server(ServerErrorKind::Moved), Some(to)) => {
                                    shared.topology.moved(call.slot, to);
                                    redirections += 1;
                                }
                                (ErrorKind::Server(ServerErrorKind::Ask), Some(to)) => {
                                    asking = Some(to);
                                    redirections += 1;
                                }
                                (ErrorKind::Server(ServerErrorKind::TryAgain), _) => {
                                    if call.stops_at_try_again {
                                        return Err(CallError::TryAgain);
                                    }
                                    redirections = REDIRECTIONS_AT_ONCE + 1;
                                }
                                _ => {
                                    redirections = REDIRECTIONS_AT_ONCE + 1;
                                    let is_cut_short = is_cut_short(&error);
                                    if !is_cut_short && !passes(&error) {
                                        return Err(CallError::Failed(at_place(to_store_error(&error), &place)));
                                    }
                                    repeated |= is_cut_short || error.is_unrecoverable_error();
                                    self.try_refresh(version).await;
                                }
                            }
                            if redirections <= REDIRECTIONS_AT_ONCE {
                                continue;
                            }
                            redirections = 0;
                            StoreError::Unavailable(format!("{place}: {error}").into())
                        }
                    }
                }
            };
            let pause = backoff.next_delay();
            if Moment::now() + pause >= deadline {
                return Err(CallError::Failed(timed_out(&last_error)));
            }
            failed = Some(last_error);
            tokio::time::sleep(pause).await;
        }
    }

    async fn attempt(
        &self,
        place: &NodeAddress,
        call: &Call<'_>,
        named: Named,
        asking: bool,
        patience: Duration,
    ) -> AttemptOutcome {
        let sender = match self.sender(place, call.slot, patience).await {
            Ok(sender) => sender,
            Err(error) => return AttemptOutcome::NotSent(error),
        };
        let mut connection = sender.connection();
        let _in_flight = sender.enter();
        let command = (call.command)(named);
        let sending = async {
            if asking || call.wait.is_some() {
                // Boxed, so that it does not enlarge the future of every request.
                return Box::pin(send_with(&mut connection, command, asking, call.wait)).await;
            }
            let value = connection.send_packed_command(&command).await?.extract_error()?;
            Ok((value, Ok(0)))
        };
        match tokio::time::timeout(patience, pin!(sending)).await {
            Ok(Ok((value, Ok(acked)))) => AttemptOutcome::Reply {
                value,
                acked,
                generation: sender.generation(),
            },
            Ok(Ok((_, Err(error)))) => AttemptOutcome::Failed { error, executed: true },
            Ok(Err(error)) => {
                let error: RedisError = error;
                if error.is_unrecoverable_error() {
                    sender.broken();
                }
                AttemptOutcome::Failed { error, executed: false }
            }
            Err(_) => {
                if patience >= SILENCE_MIN.min(self.shared.patience) {
                    sender.broken();
                }
                AttemptOutcome::Silent
            }
        }
    }

    /// Sends several commands about one slot to its owner at once. Returns `None` if any of them
    /// failed, for example because some keys have been moved; then they must be sent one by one.
    pub(super) async fn batch(&self, slot: Slot, commands: &Pipeline) -> Option<Vec<Value>> {
        let patience = self.shared.patience;
        let place = self.shared.topology.owner(slot)?;
        let sender = self.sender(&place, slot, patience).await.ok()?;
        match self.batch_on(sender, commands).await {
            BatchReply::Values(values) => Some(values),
            BatchReply::Failed(_) | BatchReply::Broken => None,
        }
    }

    /// The same on this connection, which is that of the slot.
    pub(super) async fn batch_on(&self, sender: Sender, commands: &Pipeline) -> BatchReply {
        let mut connection = sender.connection();
        let _in_flight = sender.enter();
        let asking = connection.send_packed_commands(commands, 0, commands.len());
        let replies = match tokio::time::timeout(self.shared.patience, asking).await {
            Ok(Ok(replies)) => self.shared.commands.permissions.without_errors(commands, replies),
            Ok(Err(error)) if !error.is_unrecoverable_error() => Err(error),
            _ => {
                sender.broken();
                return BatchReply::Broken;
            }
        };
        match replies {
            Ok(values) => BatchReply::Values(values),
            Err(error) => BatchReply::Failed(error),
        }
    }

    /// Reads the map again in case it is wrong. If no node answers, the next attempt reports it.
    pub(super) async fn try_refresh(&self, version: u64) {
        if let Err(error) = self.refresh(version).await {
            crate::log::debug!(?error, "failed to read the cluster's slot map");
        }
    }
}

/// Sends a command behind `ASKING`, or in front of a wait for replicas, or both. Returns its reply,
/// and how many replicas acknowledged.
async fn send_with(
    connection: &mut MultiplexedConnection,
    command: Cmd,
    asking: bool,
    wait: Option<ReplicaWait>,
) -> Result<(Value, Result<u32, RedisError>), RedisError> {
    let mut commands = pipe();
    if asking {
        commands.cmd("ASKING");
    }
    commands.add_command(command);
    if let Some(wait) = wait {
        commands.add_command(wait.command());
    }
    let count = commands.len();
    let mut replies = connection.send_packed_commands(&commands, 0, count).await?;
    let replicas = wait.and_then(|_| replies.pop());
    // Report the command's error first: one of ASKING or WAIT is a consequence of it.
    let value = replies.pop().unwrap_or(Value::Nil).extract_error()?;
    replies
        .into_iter()
        .try_for_each(|reply| reply.extract_error().map(drop))?;
    let replicas = replicas.map(Value::extract_error).transpose();
    Ok((value, replicas.map(|replicas| replicas.as_ref().map_or(0, acked))))
}

/// Whether a retry may soon succeed, on this node or another. A node that becomes a replica ends a
/// wait with `UNBLOCKED`.
fn passes(error: &RedisError) -> bool {
    matches!(
        error.kind(),
        ErrorKind::Server(
            ServerErrorKind::ReadOnly
                | ServerErrorKind::ClusterDown
                | ServerErrorKind::MasterDown
                | ServerErrorKind::BusyLoading
                | ServerErrorKind::TryAgain
                | ServerErrorKind::Moved
                | ServerErrorKind::Ask
        )
    ) || error.code() == Some("UNBLOCKED")
        || matches!(to_store_error(error), StoreError::Unavailable(_))
}

/// Whether a script failed midway because a key was missing in a slot that is being moved. The next
/// attempt does the rest of its work.
fn is_cut_short(error: &RedisError) -> bool {
    error.to_string().contains("access a non local key")
}

fn timed_out(last_error: &StoreError) -> StoreError {
    let (StoreError::Unavailable(reason) | StoreError::Refused(reason)) = last_error else {
        return last_error.clone();
    };
    StoreError::Unavailable(
        reason
            .clone()
            .map(|reason| format!("no answer in time; last error: {reason}")),
    )
}
