//! One request to the node that owns a slot, wherever that is by now.
//!
//! # Implementation details
//!
//! A request goes to the owner that the map names. `MOVED` corrects the map, `ASK` leads elsewhere once; what says that a node can't answer
//! now (`TRYAGAIN` while a slot moves, `CLUSTERDOWN`, `LOADING`, `READONLY` after a failover, a connection that breaks, silence) is asked
//! again after a pause that grows, with the map read anew where it may be wrong. So a request goes on until the store's time limit, across a failover
//! if that is long enough. Everything that is sent is idempotent for its cycle, so asking again does no harm.
//!
//! A connection that gave no answer for that long is replaced. The server may be fine and the connection not: a proxy that has forgotten it still
//! acknowledges what is sent on it, so it never breaks.
//!
//! The requests of a key keep their order: they use one connection to a node, on which a request that nobody waits for any more is executed
//! before those after it. Only a slot that changes its owner in between can part them, and then the old owner has
//! refused, or executed, what it got before the new one answers. A request of a dead primary may have been executed and forgotten;
//! nobody takes its outcome for a lease then, since its reply did not come.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use deadpool_redis::redis::{Cmd, ErrorKind, RedisError, ServerErrorKind, Value, pipe};

use super::super::reply::{as_int, error_in_words};
use super::super::script::Named;
use super::lane::{Lane, at_place};
use super::topology::{Place, redirected};
use crate::backoff::Backoff;
use crate::clock::Moment;
use crate::key::Slot;
use crate::store::StoreError;

/// The first and the longest pause before the same is asked again.
const PAUSE_MIN: Duration = Duration::from_millis(2);
const PAUSE_MAX: Duration = Duration::from_millis(100);
/// How many redirections in a row are followed without a pause: two nodes may send one to each other until they agree.
const REDIRECTIONS_AT_ONCE: usize = 4;
/// A connection is not replaced for a shorter silence, also if the sender has no more time: a server that is busy for a moment is none to leave.
const SILENCE_MIN: Duration = Duration::from_millis(250);

/// What is asked, and of which slot's owner.
pub(super) struct Call<'a> {
    pub(super) slot: Slot,
    /// Writes the command.
    pub(super) command: &'a (dyn Fn(Named) -> Cmd + Send + Sync),
    /// How many replicas should have it before the answer counts.
    pub(super) acks: u32,
    /// Whether `TRYAGAIN` is an answer.
    pub(super) stops_at_try_again: bool,
    /// How long the sender waits, if that is shorter than the store's time limit.
    pub(super) limit: Option<Duration>,
}

/// The answer.
pub(super) struct Said {
    pub(super) value: Value,
    /// When the attempt that was answered was about to be sent.
    pub(super) sent_at: Moment,
    /// Whether an earlier attempt may have been executed.
    pub(super) repeated: bool,
    /// How many replicas had it, where that was asked.
    pub(super) acked: u32,
    /// Who said it; nothing while the slot moves.
    pub(super) place: Option<Place>,
}

/// Why there is no answer.
pub(super) enum Unsaid {
    Failed(StoreError),
    /// The slot is being moved and some of the keys have.
    TryAgain,
}

impl From<Unsaid> for StoreError {
    fn from(unsaid: Unsaid) -> Self {
        match unsaid {
            Unsaid::Failed(error) => error,
            Unsaid::TryAgain => Self::Unavailable("the slot is being moved".into()),
        }
    }
}

/// How one attempt ended.
enum Attempt {
    Said(Value, u32),
    Failed(RedisError),
    /// Without having been sent.
    NotSent(StoreError),
    Silent,
}

impl Lane {
    /// Asks until there is an answer, or the store's time limit is nearly over.
    pub(super) async fn call(&self, call: Call<'_>) -> Result<Said, Unsaid> {
        let shared = &*self.shared;
        let started = Moment::now();
        let deadline = started + call.limit.unwrap_or(shared.timeout - shared.timeout / 20);
        let mut named = Named::ByHash;
        let mut asking: Option<Place> = None;
        let mut backoff = Backoff::new(PAUSE_MIN, PAUSE_MAX);
        let (mut redirections, mut repeated) = (0, false);
        loop {
            let version = shared.topology.version();
            let place = asking.clone().or_else(|| shared.topology.owner(call.slot));
            let trouble: StoreError = match place {
                None => match self.refresh(version).await {
                    Ok(()) if shared.topology.owner(call.slot).is_some() => continue,
                    Ok(()) => StoreError::Unavailable(format!("slot {} has no owner", call.slot).into()),
                    Err(error @ StoreError::Unavailable(_)) => error,
                    Err(error) => return Err(Unsaid::Failed(error)),
                },
                Some(place) => {
                    let was_asking = asking.take().is_some();
                    let sent_at = Moment::now();
                    let patience = match call.limit {
                        Some(_) => shared.patience.min(deadline.since(sent_at)),
                        None => shared.patience,
                    };
                    match self.attempt(&place, &call, named, was_asking, patience).await {
                        Attempt::Said(value, acked) => {
                            return Ok(Said {
                                value,
                                sent_at,
                                repeated,
                                acked,
                                place: (!was_asking).then_some(place),
                            });
                        }
                        Attempt::NotSent(error @ StoreError::Unavailable(_)) => {
                            self.refresh_in_vain(version).await;
                            error
                        }
                        Attempt::NotSent(error) => return Err(Unsaid::Failed(error)),
                        Attempt::Silent => {
                            repeated = true;
                            self.refresh_in_vain(version).await;
                            StoreError::Unavailable(format!("{place} gave no answer within {patience:?}").into())
                        }
                        Attempt::Failed(error) => {
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
                                        return Err(Unsaid::TryAgain);
                                    }
                                    redirections = REDIRECTIONS_AT_ONCE + 1;
                                }
                                _ => {
                                    redirections = REDIRECTIONS_AT_ONCE + 1;
                                    let is_cut_short = is_cut_short(&error);
                                    if !is_cut_short && !passes(&error) {
                                        return Err(Unsaid::Failed(at_place(error_in_words(&error), &place)));
                                    }
                                    repeated |= is_cut_short || error.is_unrecoverable_error();
                                    self.refresh_in_vain(version).await;
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
                return Err(Unsaid::Failed(in_vain(&trouble, Moment::now().since(started))));
            }
            tokio::time::sleep(pause).await;
        }
    }

    async fn attempt(&self, place: &Place, call: &Call<'_>, named: Named, asking: bool, patience: Duration) -> Attempt {
        let node = match self.node(place, call.slot) {
            Ok(node) => node,
            Err(error) => return Attempt::NotSent(error),
        };
        let connected = match tokio::time::timeout(patience, node.get()).await {
            Ok(Ok(live)) => Ok((node, live)),
            Ok(Err(error)) => Err(self.not_connected(error, place)),
            Err(_) => {
                let error = StoreError::Unavailable(format!("no connection within {patience:?}").into());
                Err(self.not_connected(error, place))
            }
        };
        let connected = connected.or_else(|error| self.substitute(place, call.slot).ok_or(error));
        let (node, mut live) = match connected {
            Ok(connected) => connected,
            Err(error) => return Attempt::NotSent(error),
        };
        let (generation, cut) = (live.generation(), live.cut.clone());
        let command = (call.command)(named);
        let sending = async {
            if !asking && call.acks == 0 {
                let value = live.connection.send_packed_command(&command).await?.extract_error()?;
                return Ok((value, 0));
            }
            let mut commands = pipe();
            if asking {
                commands.cmd("ASKING");
            }
            commands.add_command(command);
            if call.acks > 0 {
                let millis = u64::try_from(self.shared.wait_for_replicas().as_millis())
                    .unwrap_or(u64::MAX)
                    .max(1);
                commands.cmd("WAIT").arg(call.acks).arg(millis);
            }
            let count = commands.len();
            let mut replies = live.connection.send_packed_commands(&commands, 0, count).await?;
            let acked = match replies.pop() {
                Some(acked) if call.acks > 0 => Some(acked),
                Some(other) => {
                    replies.push(other);
                    None
                }
                None => None,
            };
            // What was asked comes first among the errors: that of ASKING or WAIT follows from it.
            let value = replies.pop().unwrap_or(Value::Nil).extract_error()?;
            replies
                .into_iter()
                .try_for_each(|reply| reply.extract_error().map(drop))?;
            let acked = acked.map(Value::extract_error).transpose()?;
            let acked = acked.as_ref().and_then(as_int).and_then(|acked| acked.try_into().ok());
            Ok((value, acked.unwrap_or(0)))
        };
        match tokio::time::timeout(patience, cut.or(pin!(sending))).await {
            Ok(Ok((value, acked))) => Attempt::Said(value, acked),
            Ok(Err(error)) => {
                let error: RedisError = error;
                if error.is_unrecoverable_error() {
                    node.broken(generation);
                }
                Attempt::Failed(error)
            }
            Err(_) => {
                if patience >= SILENCE_MIN.min(self.shared.patience) {
                    node.broken(generation);
                }
                Attempt::Silent
            }
        }
    }

    /// Reads the map anew where it may be wrong. That nobody answers is found out by the next attempt.
    async fn refresh_in_vain(&self, version: u64) {
        if let Err(error) = self.refresh(version).await {
            tracing::debug!(?error, "the map of the cluster's slots could not be read");
        }
    }
}

/// Whether the same may be answered soon, by that node or another.
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
    ) || matches!(error_in_words(error), StoreError::Unavailable(_))
}

/// Whether a script met a key that was gone, in a slot that is being moved: it has done some of its work, and whatever is left is
/// done by the next attempt.
fn is_cut_short(error: &RedisError) -> bool {
    error.to_string().contains("access a non local key")
}

fn in_vain(trouble: &StoreError, waited: Duration) -> StoreError {
    let reason: Arc<str> = match trouble {
        StoreError::Unavailable(reason) | StoreError::Refused(reason) => Arc::clone(reason),
        StoreError::MapMismatch { .. } => return trouble.clone(),
    };
    StoreError::Unavailable(format!("no answer within {waited:.1?}, the last time: {reason}").into())
}
