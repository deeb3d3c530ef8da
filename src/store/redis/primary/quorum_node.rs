//! What a quorum node does beyond a lease store: it accepts claims, and answers whether it is there
//! and may vote.

use std::sync::Arc;

use deadpool_redis::redis::{Cmd, Value, cmd};

use super::super::claim::{Claim, Claimed};
use super::super::reply::{ints, unexpected};
use super::link::Link;
use super::vote::VoteEligibility;
use super::{Attempts, RedisStore, Shared};
use crate::key::Slot;
use crate::store::{Priority, StoreError, StoreFuture};

impl RedisStore {
    /// Records that this node must have the shard map, since the other nodes of the quorum do. The
    /// next connection stores it if it is missing.
    pub(crate) fn expect_map(&self) {
        self.shared.map.expect();
    }

    /// Whether the node has run long enough that it can't have forgotten a lease. Call this after a
    /// reply: the reply's connection was greeted earlier, so any restart before the reply is known.
    pub(crate) fn has_vote(&self) -> bool {
        self.shared.vote.as_ref().is_none_or(VoteEligibility::has_vote)
    }

    /// Records a token that was issued in the quorum: later tokens of this slot are above it.
    pub(crate) fn saw_token(&self, slot: Slot, token: u64) {
        self.shared.token_floor.note_token(slot, token);
    }

    /// Claims the lease. The request is resent only if its connection broke. After the future is
    /// dropped, any claim already sent precedes a later release on the same connection.
    pub(crate) fn claim(&self, claim: Claim) -> StoreFuture<Claimed> {
        let shared = Arc::clone(&self.shared);
        let slot = shared.commands.names.of(&claim.key).slot();
        let link = self.link(Priority::Foreground, slot);
        Box::pin(async move {
            let _in_flight = link.enter();
            let mut attempts = Attempts::default();
            loop {
                let mut live = link.get().await?;
                // A counter below an earlier value was lost.
                let floor = shared.token_floor.of(slot);
                let claimed = {
                    let fill = |command: &mut Cmd| shared.commands.fill_claim(command, &claim, floor);
                    let script = match claim.cycle.mode().is_exclusive() {
                        true => &shared.scripts.claim,
                        false => &shared.scripts.modes.claim,
                    };
                    script.call(&mut live.connection, fill).await
                };
                match claimed {
                    Ok(value) => {
                        return match ints(&value).as_deref() {
                            Some([0]) => Ok(Claimed::Refused),
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

    /// Whether the node answers on the background connection.
    pub(crate) fn ping(&self) -> StoreFuture<()> {
        let (shared, background) = (Arc::clone(&self.shared), self.background());
        Box::pin(async move {
            // The request connection takes over if the background's can't be opened.
            let (link, _) = background.get(shared.timeout / 3).await?;
            answers(&shared, &link).await
        })
    }

    /// Whether the node answers on all request connections.
    pub(crate) fn ping_callers(&self) -> StoreFuture<()> {
        let (shared, links) = (Arc::clone(&self.shared), self.callers.clone());
        Box::pin(async move {
            for link in &links {
                answers(&shared, link).await?;
            }
            Ok(())
        })
    }

    /// Abandons the background connection; the next request opens a new one.
    pub(crate) fn leave_background(&self) {
        self.background.leave();
    }

    /// Abandons the request connections; the next requests open new ones. Requests already sent on
    /// the old connections may still execute afterwards.
    pub(crate) fn leave_callers(&self) {
        self.callers.iter().for_each(|link| link.leave());
    }
}

#[cfg(test)]
impl RedisStore {
    /// Grants or revokes the right to vote, until a new connection reports the server's uptime.
    pub(crate) fn set_vote(&self, has: bool) {
        self.shared.vote.as_ref().unwrap().set(has);
    }

    pub(crate) fn queue_name(&self, key: &crate::key::LockKey) -> String {
        self.shared.commands.names.of(key).queue().to_string()
    }

    pub(crate) fn counter_name(&self, key: &crate::key::LockKey) -> String {
        self.shared.commands.names.of(key).counter().to_string()
    }
}

async fn answers(shared: &Shared, link: &Arc<Link>) -> Result<(), StoreError> {
    let mut attempts = Attempts::default();
    loop {
        let mut live = link.get().await?;
        let pong = live.connection.send_packed_command(&cmd("PING")).await;
        match pong.and_then(Value::extract_error) {
            Ok(_) => return Ok(()),
            Err(error) => attempts.failed(shared, link, &live, &error)?,
        }
    }
}
