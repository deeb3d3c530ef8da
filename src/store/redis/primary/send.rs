//! Sending a request once, on one connection.

use std::time::Duration;

use deadpool_redis::redis::{Cmd, RedisResult, Value};

use super::Shared;
use super::checked::Borrowed;
use super::link::{Link, Live};
use crate::clock::Moment;
use crate::key::{LockKey, Slot};
use crate::protocol::{Acquire, AcquireKind, AcquireReply, Release};
use crate::store::redis::commands::InboxCheck;
use crate::store::redis::replica_ack::ReplicaAck;
use crate::store::redis::reply::{acquired, acquired_fast, concerns_modes, inspected};
use crate::store::{KeyState, StoreError};

/// Which script releases a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ReleaseBy {
    /// The lease stays for this long, for the rest of its `min_hold`.
    Retire(Duration),
    /// The short one: no cycle is known to wait.
    Free,
    /// The lease goes to the next cycle.
    PassingOn,
}

impl Shared {
    /// Acquires once, on this connection.
    pub(super) async fn send_acquire(
        &self,
        live: &mut Live,
        request: &Acquire,
        slot: Slot,
        floor: u64,
    ) -> RedisResult<Result<AcquireReply, StoreError>> {
        if let Some(ack) = &self.replica_ack {
            // Boxed, so that it does not enlarge the future of every request.
            return Box::pin(self.send_acquire_confirmed(ack, live, request, slot, floor)).await;
        }
        let is_exclusive = request.cycle.mode().is_exclusive();
        if is_exclusive && request.kind == AcquireKind::Fast {
            let commands = self.commands.acquire_fast_commands(request, slot);
            let replies = live.connection.send_packed_commands(&commands, 0, 2).await?;
            let replies = self.commands.permissions.without_errors(&commands, replies)?;
            return Ok(acquired_fast(&replies, request.tokens));
        }
        if is_exclusive {
            let (subscription, now) = (self.inbox_state.subscription(), Moment::now());
            let inbox = if live.known_inbox.is_known(subscription, now) {
                InboxCheck::Skipped
            } else {
                InboxCheck::Done
            };
            let fill = |command: &mut Cmd| self.commands.fill_acquire(command, request, floor, inbox);
            let value = self.scripts.acquire.call(&mut live.connection, fill).await?;
            if !concerns_modes(&value) {
                let reply = acquired(&value, request.tokens);
                if inbox == InboxCheck::Done
                    && let Ok(AcquireReply::Queued(position)) = &reply
                    && position.is_subscribed
                    && let Some(subscription) = subscription
                {
                    live.known_inbox.seen(subscription, now);
                }
                return Ok(reply);
            }
        }
        let fill = |command: &mut Cmd| self.commands.fill_acquire_modes(command, request, floor);
        let value = Box::pin(self.scripts.modes.acquire.call(&mut live.connection, fill)).await?;
        Ok(acquired(&value, request.tokens))
    }

    /// The same, followed at once by a wait for replicas. Fails if they do not confirm the lease.
    async fn send_acquire_confirmed(
        &self,
        ack: &ReplicaAck,
        live: &mut Live,
        request: &Acquire,
        slot: Slot,
        floor: u64,
    ) -> RedisResult<Result<AcquireReply, StoreError>> {
        let wait = ack.next();
        let is_exclusive = request.cycle.mode().is_exclusive();
        let (reply, acked) = if is_exclusive && request.kind == AcquireKind::Fast {
            let mut commands = self.commands.acquire_fast_commands(request, slot);
            commands.add_command(wait.command());
            let mut replies = live.connection.send_packed_commands(&commands, 0, 3).await?;
            let acked = replies.pop().unwrap_or(Value::Nil);
            let replies = self.commands.permissions.without_errors(&commands, replies)?;
            (acquired_fast(&replies, request.tokens), acked)
        } else {
            let (connection, scripts, wait) = (&mut live.connection, &self.scripts, wait.command());
            let exclusive = |command: &mut Cmd| self.commands.fill_acquire(command, request, floor, InboxCheck::Done);
            let all_modes = |command: &mut Cmd| self.commands.fill_acquire_modes(command, request, floor);
            let mut call = None;
            if is_exclusive {
                let answer = scripts.acquire.call_before(&wait, connection, exclusive).await?;
                call = Some(answer).filter(|(value, _)| !concerns_modes(value));
            }
            let (value, acked) = match call {
                Some(call) => call,
                None => scripts.modes.acquire.call_before(&wait, connection, all_modes).await?,
            };
            (acquired(&value, request.tokens), acked)
        };
        let reply = match reply {
            Ok(reply) => reply,
            Err(error) => return Ok(Err(error)),
        };
        if !matches!(reply, AcquireReply::Granted { .. }) {
            return Ok(Ok(reply));
        }
        // Its tokens were issued, whatever happens to the lease.
        self.note_reply(live, slot, &reply);
        // An error of `WAIT` itself may mean that the server is no longer a primary.
        let acked = acked.extract_error()?;
        Ok(ack.check(wait, &acked).map(|()| reply))
    }

    /// The reply to a requeued cycle. An unconfirmed grant is dropped, so that the cycle asks
    /// again.
    pub(super) fn only_confirmed(&self, requeued: Option<AcquireReply>) -> Option<AcquireReply> {
        requeued.filter(|reply| self.replica_ack.is_none() || !matches!(reply, AcquireReply::Granted { .. }))
    }

    /// Releases once, on this connection, with one of the scripts.
    pub(super) async fn send_release(
        &self,
        live: &mut Live,
        request: &Release,
        by: ReleaseBy,
        floor: u64,
    ) -> RedisResult<Value> {
        if let ReleaseBy::Retire(rest) = by {
            let fill = |command: &mut Cmd| self.commands.fill_retire(command, request, rest);
            return Box::pin(self.scripts.retire.call(&mut live.connection, fill)).await;
        }
        if by == ReleaseBy::Free {
            let fill = |command: &mut Cmd| self.commands.fill_release_fast(command, &request.key, request.cycle);
            return self.scripts.release_fast.call(&mut live.connection, fill).await;
        }
        if request.is_exclusive() {
            let fill = |command: &mut Cmd| self.commands.fill_release(command, request, floor);
            let value = self.scripts.release.call_after_time(&mut live.connection, fill).await?;
            if !concerns_modes(&value) {
                return Ok(value);
            }
        }
        let fill = |command: &mut Cmd| self.commands.fill_release_modes(command, request, floor);
        let script = &self.scripts.modes.release;
        // Boxed, so that it does not enlarge the future of every request.
        Box::pin(script.call_after_time(&mut live.connection, fill)).await
    }

    /// Ends the lease of any owner once, on this connection. The scripts are those of a release.
    pub(super) async fn send_break(
        &self,
        live: &mut Live,
        key: &LockKey,
        owner: &str,
        tokens: u32,
        floor: u64,
    ) -> RedisResult<Value> {
        let fill = |command: &mut Cmd| self.commands.fill_break(command, key, owner, tokens, floor);
        let value = self.scripts.release.call_after_time(&mut live.connection, fill).await?;
        if !concerns_modes(&value) {
            return Ok(value);
        }
        let fill = |command: &mut Cmd| self.commands.fill_break_modes(command, key, owner, tokens, floor);
        let script = &self.scripts.modes.release;
        script.call_after_time(&mut live.connection, fill).await
    }

    /// Sends a command about the shard map.
    pub(super) async fn map_command(&self, link: &Link, live: &Live, command: Cmd) -> Result<Value, StoreError> {
        let mut connection = live.connection.clone();
        let reply = connection.send_packed_command(&command).await;
        let reply = reply.and_then(Value::extract_error).map_err(|error| {
            link.close_if_broken(&error, live);
            self.commands.permissions.of_command(error, &command)
        });
        reply.map_err(|error| self.discovery.to_store_error(&error))
    }

    /// Reads the state of a key.
    pub(super) async fn inspect(&self, borrowed: Borrowed, key: &LockKey) -> Result<KeyState, StoreError> {
        let commands = self.commands.inspect(key);
        let mut connection = borrowed.connection();
        let asking = connection.send_packed_commands(&commands, 0, commands.len());
        let replies = tokio::time::timeout(self.patience(), asking).await;
        let replies = replies.unwrap_or_else(|_| Err(self.no_answer()));
        match replies.and_then(|replies| self.commands.permissions.without_errors(&commands, replies)) {
            Ok(replies) => inspected(&replies),
            Err(error) => Err(borrowed.failed(self, &error)),
        }
    }
}
