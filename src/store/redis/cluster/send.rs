//! The requests of a cluster, each sent to the owner of its slot.

use std::borrow::Cow;

use deadpool_redis::redis::{Cmd, Pipeline, Value, cmd};

use super::super::commands::InboxCheck;
use super::super::map;
use super::super::permission::is_about_a_command;
use super::super::replica_ack::ReplicaWait;
use super::super::reply::{acquired, acquired_fast, concerns_modes, inspected};
use super::super::script::{LuaScript, Named};
use super::dispatch::{BatchReply, Call, CallError, NodeReply};
use super::pool::NodePool;
use crate::clock::Moment;
use crate::key::{LockKey, Slot};
use crate::protocol::{Acquire, AcquireKind, AcquireReply, Release};
use crate::store::{KeyState, MapState, MapStep, StoreError};

/// The outcome of an attempt to acquire with plain commands.
enum PlainAcquire {
    Reply(NodeReply<AcquireReply>),
    NotSent,
    /// The lease was taken, and its token may be too small.
    TooSmall,
    /// The lease may have been taken.
    Unknown,
}

impl NodePool {
    /// Calls a script of a lock.
    pub(super) async fn script(
        &self,
        script: &LuaScript,
        slot: Slot,
        wait: Option<ReplicaWait>,
        deadline: Option<Moment>,
        fill: &(dyn Fn(&mut Cmd) + Send + Sync),
    ) -> Result<NodeReply, CallError> {
        let command = |named: Named| script.command(named, fill);
        self.call(Call {
            slot,
            command: &command,
            wait,
            stops_at_try_again: false,
            deadline,
        })
        .await
    }

    /// Acquires once.
    pub(super) async fn send_acquire(
        &self,
        request: &Acquire,
        slot: Slot,
        floor: u64,
        deadline: Moment,
    ) -> Result<NodeReply<AcquireReply>, StoreError> {
        let shared = &*self.shared;
        let is_fast = request.kind == AcquireKind::Fast;
        let mut request = Cow::Borrowed(request);
        let mut was_sent = false;
        if is_fast && request.cycle.mode().is_exclusive() && shared.replica_ack.is_none() {
            match self.acquire_plain(&request, slot).await {
                PlainAcquire::Reply(node_reply) => return Ok(node_reply),
                PlainAcquire::NotSent => {}
                PlainAcquire::TooSmall => request.to_mut().kind = AcquireKind::Extend,
                PlainAcquire::Unknown => was_sent = true,
            }
        }
        let mut node_reply = self.acquire_by_script(&request, slot, floor, deadline).await?;
        node_reply.repeated |= was_sent;
        let reply = match acquired(&node_reply.value, request.tokens)? {
            AcquireReply::Busy if is_fast => AcquireReply::Taken,
            reply => reply,
        };
        if let (AcquireReply::Granted { tokens, .. }, Some(_)) = (&reply, &node_reply.place)
            && let Some(generation) = node_reply.generation
        {
            let now = Moment::now();
            shared.raised.note(slot, generation, node_reply.sent_at, now, *tokens);
        }
        Ok(node_reply.map(|_| reply))
    }

    /// Takes a free lock with plain commands, if a script has just raised the slot's counter.
    async fn acquire_plain(&self, request: &Acquire, slot: Slot) -> PlainAcquire {
        let shared = &*self.shared;
        let sent_at = Moment::now();
        let version = shared.topology.version();
        let prepare = || {
            let raised = shared.raised.recent(slot, sent_at)?;
            let place = shared.topology.owner(slot)?;
            let sender = self.open_sender(&place, slot)?;
            (sender.generation() == Some(raised.generation)).then_some((raised, place, sender))
        };
        let Some((raised, place, sender)) = prepare() else {
            return PlainAcquire::NotSent;
        };
        let commands = shared.commands.acquire_fast_commands(request, slot);
        let replies = match self.batch_on(sender, &commands).await {
            BatchReply::Values(replies) => replies,
            BatchReply::Failed(error) => {
                if is_about_a_command(&error) && shared.raised.give_up() {
                    crate::log::warn!(shard = %shared.shard, %error, "the user may not run SET or INCRBY, so each free lock costs a script call");
                }
                return PlainAcquire::Unknown;
            }
            BatchReply::Broken => {
                self.try_refresh(version).await;
                return PlainAcquire::Unknown;
            }
        };
        match acquired_fast(&replies, request.tokens) {
            Ok(AcquireReply::Granted { tokens, .. }) if !raised.covers(tokens, Moment::now()) => PlainAcquire::TooSmall,
            Ok(reply) => PlainAcquire::Reply(NodeReply {
                value: reply,
                sent_at,
                repeated: false,
                acked: 0,
                place: Some(place),
                generation: Some(raised.generation),
            }),
            Err(_) => PlainAcquire::Unknown,
        }
    }

    async fn acquire_by_script(
        &self,
        request: &Acquire,
        slot: Slot,
        floor: u64,
        deadline: Moment,
    ) -> Result<NodeReply, CallError> {
        let (scripts, commands, deadline) = (&self.shared.scripts, &self.shared.commands, Some(deadline));
        let wait = self.shared.wait_for_replicas();
        let is_exclusive = request.cycle.mode().is_exclusive();
        if is_exclusive && request.kind == AcquireKind::Fast {
            let fill = |command: &mut Cmd| commands.fill_acquire_fast(command, request, floor);
            return self.script(&scripts.acquire_fast, slot, wait, deadline, &fill).await;
        }
        if is_exclusive {
            let fill = |command: &mut Cmd| commands.fill_acquire(command, request, floor, InboxCheck::Done);
            let node_reply = self.script(&scripts.acquire, slot, wait, deadline, &fill).await?;
            if !concerns_modes(&node_reply.value) {
                return Ok(node_reply);
            }
        }
        let fill = |command: &mut Cmd| commands.fill_acquire_modes(command, request, floor);
        self.script(&scripts.modes.acquire, slot, wait, deadline, &fill).await
    }

    /// Releases once.
    pub(super) async fn send_release(
        &self,
        request: &Release,
        slot: Slot,
        floor: u64,
        deadline: Moment,
    ) -> Result<NodeReply, CallError> {
        let (scripts, commands, deadline) = (&self.shared.scripts, &self.shared.commands, Some(deadline));
        let wait = request.requeue.and_then(|_| self.shared.wait_for_replicas());
        let mut repeated = false;
        if request.is_exclusive() {
            let fill = |command: &mut Cmd| commands.fill_release(command, request, floor);
            let node_reply = self.script(&scripts.release, slot, wait, deadline, &fill).await?;
            if !concerns_modes(&node_reply.value) {
                return Ok(node_reply);
            }
            repeated = node_reply.repeated;
        }
        let fill = |command: &mut Cmd| commands.fill_release_modes(command, request, floor);
        let mut node_reply = self.script(&scripts.modes.release, slot, wait, deadline, &fill).await?;
        node_reply.repeated |= repeated;
        Ok(node_reply)
    }

    /// Ends the lease of any owner. The scripts are those of a release.
    pub(super) async fn send_break(
        &self,
        slot: Slot,
        key: &LockKey,
        owner: &str,
        tokens: u32,
        floor: u64,
    ) -> Result<NodeReply, CallError> {
        let (scripts, commands) = (&self.shared.scripts, &self.shared.commands);
        let deadline = Some(self.shared.deadline());
        let fill = |command: &mut Cmd| commands.fill_break(command, key, owner, tokens, floor);
        let first = self.script(&scripts.release, slot, None, deadline, &fill).await?;
        if !concerns_modes(&first.value) {
            return Ok(first);
        }
        let fill = |command: &mut Cmd| commands.fill_break_modes(command, key, owner, tokens, floor);
        let mut node_reply = self.script(&scripts.modes.release, slot, None, deadline, &fill).await?;
        node_reply.repeated |= first.repeated;
        Ok(node_reply)
    }

    /// Sends a command with a single key.
    pub(super) async fn single(&self, slot: Slot, command: &Cmd) -> Result<Value, StoreError> {
        self.single_until(None, slot, command).await
    }

    pub(super) async fn single_until(
        &self,
        deadline: Option<Moment>,
        slot: Slot,
        command: &Cmd,
    ) -> Result<Value, StoreError> {
        let node_reply = self
            .call(Call {
                slot,
                command: &|_| command.clone(),
                wait: None,
                stops_at_try_again: false,
                deadline,
            })
            .await?;
        Ok(node_reply.value)
    }

    /// Reads the state of a key. A command with a single key is answered even while its slot is
    /// being moved.
    pub(super) async fn inspect_one_by_one(&self, slot: Slot, commands: &Pipeline) -> Result<KeyState, StoreError> {
        let asking = commands.cmd_iter().map(|command| self.single(slot, command));
        inspected(&futures_util::future::try_join_all(asking).await?)
    }

    /// Checks that the nodes support sharded pub/sub. A script that finds a waiter would fail
    /// otherwise.
    pub(super) async fn check_channels(&self, deadline: Option<Moment>, slot: Slot) -> Result<(), StoreError> {
        let mut count = cmd("PUBSUB");
        count.arg("SHARDNUMSUB");
        match self.single_until(deadline, slot, &count).await {
            Err(StoreError::Refused(reason)) if reason.to_lowercase().contains("unknown") => Err(StoreError::Refused(
                format!("the nodes do not support sharded pub/sub, which is required to wait for locks; use Redis 7.0 or later, or Valkey: {reason}").into(),
            )),
            // The next request would not be answered either, and would have less time.
            Err(error @ StoreError::Unavailable(_)) => Err(error),
            // Requests get any other error as well.
            _ => Ok(()),
        }
    }

    /// Executes one step towards a stored shard map.
    pub(super) async fn map(&self, step: MapStep) -> Result<MapState, StoreError> {
        self.map_until(None, step).await
    }

    pub(super) async fn map_until(&self, deadline: Option<Moment>, step: MapStep) -> Result<MapState, StoreError> {
        let map = &self.shared.map;
        let slot = Slot::of(map.key().as_bytes());
        map::step(map, step, &|command| {
            Box::pin(async move { self.single_until(deadline, slot, &command).await })
        })
        .await
    }

    /// Fails if the shard has another map. Asks the server until it was seen to have ours.
    pub(super) async fn check_map(&self, deadline: Option<Moment>) -> Result<(), StoreError> {
        let map = &self.shared.map;
        if map.is_set() {
            return Ok(());
        }
        self.check_channels(deadline, Slot::of(map.key().as_bytes())).await?;
        self.map_until(deadline, MapStep::Read).await.map(drop)
    }
}
