//! What a node of a quorum does beyond a lease store: it is claimed, and says whether it has a vote.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use deadpool_redis::redis::{Cmd, Value, cmd};

use super::super::reply::{ints, unexpected};
use super::link::{Link, Live};
use super::{Attempts, RedisStore, Shared};
use crate::clock::Moment;
use crate::key::{LockKey, Slot};
use crate::protocol::Cycle;
use crate::store::{Lane, StoreError, StoreFuture};

/// A request for the lease of a cycle that has it at the door.
#[derive(Debug, Clone)]
pub(crate) struct Claim {
    pub(crate) key: LockKey,
    pub(crate) cycle: Cycle,
    pub(crate) ttl: Duration,
    /// What the counter becomes if it is smaller.
    pub(crate) at_least: u64,
    pub(crate) kind: ClaimKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ClaimKind {
    /// Takes the lease if it is free.
    Take,
    /// Extends the lease, and does nothing where it is not the cycle's already.
    Extend,
}

/// What a node says to a claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Claimed {
    /// The lease is ours there; the counter was this before the claim raised it.
    Ours { counter: u64 },
    /// Another owner has it, or nobody has what was to be extended.
    Refused,
}

/// For how long a server has been running. It may have forgotten leases when it started, so it has no vote until the
/// longest of them has run out.
#[derive(Debug)]
pub(super) struct Tenure {
    max_ttl: Duration,
    /// The moment from which it has a vote, in nanoseconds; never goes back, since a connection made later knows of later starts.
    vote_from: AtomicU64,
    known: std::sync::atomic::AtomicBool,
}

impl Tenure {
    pub(super) const fn new(max_ttl: Duration) -> Self {
        Self {
            max_ttl,
            vote_from: AtomicU64::new(0),
            known: std::sync::atomic::AtomicBool::new(false),
        }
    }

    /// Reads `INFO server`, which was asked for at that moment on a new connection.
    pub(super) fn learn(&self, asked_at: Moment, info: Option<&str>) -> Result<(), StoreError> {
        let uptime = info.and_then(|info| {
            let line = info.lines().find_map(|line| line.strip_prefix("uptime_in_seconds:"));
            line?.trim().parse().ok().map(Duration::from_secs)
        });
        let Some(uptime) = uptime else {
            return Err(StoreError::Refused(
                "INFO server says no uptime_in_seconds, without which it is not known whether the node has a vote"
                    .into(),
            ));
        };
        // It is a difference of the server's wall clock: whoever sets that forward makes the server look older than it is.
        // Whole seconds of a difference of whole seconds: it may be one less.
        let missing = (self.max_ttl + Duration::from_secs(1)).saturating_sub(uptime);
        // A server that has run for long enough says nothing new of when votes began.
        if !missing.is_zero() {
            self.vote_from
                .fetch_max((asked_at + missing).as_nanos(), Ordering::AcqRel);
        }
        self.known.store(true, Ordering::Release);
        Ok(())
    }

    pub(super) fn has_vote(&self) -> bool {
        self.known.load(Ordering::Acquire) && Moment::now().as_nanos() >= self.vote_from.load(Ordering::Acquire)
    }
}

impl RedisStore {
    /// The other nodes have the shard map, so this one is to have it as well, unless it has another one.
    pub(crate) fn expect_map(&self) {
        self.shared.map.expect();
    }

    /// Whether the node runs for so long that it can't have forgotten a lease. Ask after a reply: the connection that it came on
    /// was greeted before, so a start that the reply comes after is known.
    pub(crate) fn has_vote(&self) -> bool {
        self.shared.tenure.as_ref().is_none_or(Tenure::has_vote)
    }

    /// Every token of that slot from now on is above this, which was issued somewhere in the quorum.
    pub(crate) fn saw_token(&self, slot: Slot, token: u64) {
        self.shared.seen[usize::from(slot.number())].fetch_max(token, Ordering::AcqRel);
    }

    /// Claims the lease. It is sent again only where its connection broke: once it is dropped, whatever was sent is before a later release on
    /// the connection.
    pub(crate) fn claim(&self, claim: Claim) -> StoreFuture<Claimed> {
        let shared = Arc::clone(&self.shared);
        let slot = shared.commands.names.of(&claim.key).slot();
        let link = self.link(Lane::Caller, slot);
        Box::pin(async move {
            let mut attempts = Attempts::default();
            loop {
                let mut live = link.get().await?;
                // Below what was seen before, a counter was lost.
                let floor = shared.floor(slot);
                let claimed = {
                    let fill = |command: &mut Cmd| shared.commands.fill_claim(command, &claim, floor);
                    let cut = live.cut();
                    let call = pin!(shared.scripts.claim.call(&mut live.connection, fill));
                    Live::unless_cut(cut, call).await
                };
                match claimed {
                    Ok(value) => {
                        return match ints(&value).as_deref() {
                            Some([0, _]) => Ok(Claimed::Refused),
                            Some(&[1, counter]) => Ok(Claimed::Ours {
                                counter: counter.try_into().unwrap_or_default(),
                            }),
                            _ => Err(unexpected("a claim", &value)),
                        };
                    }
                    Err(error) => attempts.failed(&shared, &link, &live, &error)?,
                }
            }
        })
    }

    /// Whether it answers on the connection of the background.
    pub(crate) fn ping(&self) -> StoreFuture<()> {
        let (shared, background) = (Arc::clone(&self.shared), self.background());
        Box::pin(async move {
            // Another connection takes the place of the background's where that can't be opened.
            let (link, _) = background.get(shared.timeout / 3).await?;
            answers(&shared, &link).await
        })
    }

    /// Whether it answers on all connections of the callers.
    pub(crate) fn ping_callers(&self) -> StoreFuture<()> {
        let (shared, links) = (Arc::clone(&self.shared), self.callers.clone());
        Box::pin(async move {
            for link in &links {
                answers(&shared, link).await?;
            }
            Ok(())
        })
    }

    /// Nothing more is sent on the connection of the background: the next request makes a new one.
    pub(crate) fn leave_background(&self) {
        self.background.leave();
    }

    /// Nothing more is sent on the connections of the callers: their next requests make new ones. What was sent on the old ones may be
    /// executed later than that.
    pub(crate) fn leave_callers(&self) {
        self.callers.iter().for_each(|link| link.leave());
    }
}

#[cfg(test)]
impl RedisStore {
    /// Gives or takes its vote, until a new connection tells of the server's age.
    pub(crate) fn set_vote(&self, has: bool) {
        let tenure = self.shared.tenure.as_ref().unwrap();
        let from = if has { 0 } else { u64::MAX };
        tenure.vote_from.store(from, Ordering::Release);
        tenure.known.store(true, Ordering::Release);
    }

    pub(crate) fn queue_name(&self, key: &LockKey) -> String {
        self.shared.commands.names.of(key).queue().to_string()
    }

    pub(crate) fn counter_name(&self, key: &LockKey) -> String {
        self.shared.commands.names.of(key).counter().to_string()
    }
}

async fn answers(shared: &Shared, link: &Arc<Link>) -> Result<(), StoreError> {
    let mut attempts = Attempts::default();
    loop {
        let mut live = link.get().await?;
        let (cut, ping) = (live.cut(), cmd("PING"));
        let pong = Live::unless_cut(cut, pin!(live.connection.send_packed_command(&ping))).await;
        match pong.and_then(Value::extract_error) {
            Ok(_) => return Ok(()),
            Err(error) => attempts.failed(shared, link, &live, &error)?,
        }
    }
}
