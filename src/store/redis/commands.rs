//! The commands sent to a server: their keys and arguments, for one manager.

use std::io::Write;
use std::pin::pin;
use std::time::Duration;

use deadpool_redis::redis::aio::ConnectionLike;
use deadpool_redis::redis::{Cmd, Pipeline, RedisError, RedisWrite, cmd, pipe};

use super::batch::may_concern_some_keys;
use super::claim::{Claim, ClaimKind};
use super::names::Names;
use super::permission::Permissions;
use super::reply::no_answer;
use super::script::MARKER;
use crate::clock::Moment;
use crate::identity::{ManagerId, OwnerTag};
use crate::key::{LockKey, Slot};
use crate::protocol::{Acquire, AcquireKind, Cycle, Release, Renewal};
use crate::store::INSPECTED_MAX;
use crate::time_limit::within;

/// Builds the commands of one manager in one namespace.
#[derive(Debug)]
pub(super) struct Commands {
    pub(super) names: Names,
    pub(super) manager: ManagerId,
    pub(super) permissions: Permissions,
    inboxes: Inboxes,
}

/// Whether the script checks that the server counts the subscription of this manager's inbox. Only
/// the acquire of an exclusive lock at a primary, the most frequent request of a busy key, ever
/// skips that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum InboxCheck {
    Done,
    /// The server counted it a moment ago.
    Skipped,
}

/// Where managers receive notifications.
#[derive(Debug)]
enum Inboxes {
    /// One inbox per manager; holds the prefix of its name.
    One(String),
    /// One inbox per manager in each slot.
    PerSlot,
}

impl Commands {
    /// A write to a key that never exists, so it changes nothing. The server refuses it if it would
    /// refuse a lock: it is out of memory, can't persist, has too few replicas, is a replica, or
    /// the user may not write.
    pub(super) fn write_nothing(&self, slot: Slot) -> Cmd {
        let mut command = cmd("SET");
        self.names.scratch_in(slot).write(&mut command);
        command.arg("").arg("XX");
        command
    }

    pub(super) fn new(namespace: &str, manager: ManagerId) -> Self {
        let names = Names::new(namespace);
        Self {
            inboxes: Inboxes::One(names.inbox_prefix()),
            names,
            manager,
            permissions: Permissions::new(namespace),
        }
    }

    /// For a cluster, where channels belong to slots.
    pub(super) fn for_a_cluster(namespace: &str, manager: ManagerId) -> Self {
        Self {
            inboxes: Inboxes::PerSlot,
            names: Names::new(namespace),
            manager,
            permissions: Permissions::new(namespace),
        }
    }

    /// The two commands of the fast path, for a key in this slot.
    pub(super) fn acquire_fast_commands(&self, request: &Acquire, slot: Slot) -> Pipeline {
        let names = self.names.of(&request.key);
        let mut set = Cmd::with_capacity(6, 128);
        set.arg("SET");
        names.lease().write(&mut set);
        self.write_owner_tag(&mut set, request.cycle);
        set.arg("NX").arg("PX").arg(millis(request.ttl));
        let mut count = Cmd::with_capacity(3, 64);
        count.arg("INCRBY");
        self.names.counter_of(slot).write(&mut count);
        count.arg(request.tokens);
        let mut commands = Pipeline::with_capacity(2);
        commands.add_command(set).add_command(count);
        commands
    }

    /// The keys and arguments of acquire_fast.lua.
    pub(super) fn fill_acquire_fast(&self, command: &mut Cmd, request: &Acquire, floor: u64) {
        self.write_keys(command, &request.key);
        self.write_owner_tag(command, request.cycle);
        command.arg(millis(request.ttl)).arg(request.tokens).arg(floor);
    }

    /// The keys and arguments of acquire.lua.
    pub(super) fn fill_acquire(&self, command: &mut Cmd, request: &Acquire, floor: u64, inbox: InboxCheck) {
        self.write_keys(command, &request.key);
        self.write_acquire(command, request, floor, inbox);
    }

    /// The keys and arguments of acquire_modes.lua.
    pub(super) fn fill_acquire_modes(&self, command: &mut Cmd, request: &Acquire, floor: u64) {
        self.write_keys_and_holders(command, &request.key);
        self.write_acquire(command, request, floor, InboxCheck::Done);
    }

    fn write_acquire(&self, command: &mut Cmd, request: &Acquire, floor: u64, inbox: InboxCheck) {
        let &Acquire {
            ref key,
            cycle,
            kind,
            ttl,
            tokens,
        } = request;
        self.write_owner_tag(command, cycle);
        command.arg(millis(ttl)).arg(tokens).arg(floor);
        command.arg(match kind {
            AcquireKind::Enqueue if inbox == InboxCheck::Skipped => "known",
            AcquireKind::Enqueue => "join",
            AcquireKind::Fast | AcquireKind::Try => "try",
            AcquireKind::Extend => "extend",
        });
        self.write_inbox_prefix(command, key);
        command.arg(key.as_str());
    }

    /// The keys and arguments of release.lua.
    pub(super) fn fill_release(&self, command: &mut Cmd, request: &Release, floor: u64) {
        self.write_keys(command, &request.key);
        self.write_release(command, request, floor);
    }

    /// The keys and arguments of release_modes.lua.
    pub(super) fn fill_release_modes(&self, command: &mut Cmd, request: &Release, floor: u64) {
        self.write_keys_and_holders(command, &request.key);
        self.write_release(command, request, floor);
    }

    fn write_release(&self, command: &mut Cmd, request: &Release, floor: u64) {
        let &Release {
            ref key,
            cycle,
            requeue,
            tokens,
            ..
        } = request;
        self.write_owner_tag(command, cycle);
        command.arg(tokens).arg(floor);
        self.write_inbox_prefix(command, key);
        command.arg(key.as_str());
        match requeue {
            Some(next) => self.write_owner_tag(command, next),
            None => command.write_arg(b""),
        }
    }

    /// The keys and arguments of release.lua, for the lease of any owner.
    pub(super) fn fill_break(&self, command: &mut Cmd, key: &LockKey, owner: &str, tokens: u32, floor: u64) {
        self.write_keys(command, key);
        self.write_break(command, key, owner, tokens, floor);
    }

    /// The keys and arguments of release_modes.lua, for the lease of any owner.
    pub(super) fn fill_break_modes(&self, command: &mut Cmd, key: &LockKey, owner: &str, tokens: u32, floor: u64) {
        self.write_keys_and_holders(command, key);
        self.write_break(command, key, owner, tokens, floor);
    }

    fn write_break(&self, command: &mut Cmd, key: &LockKey, owner: &str, tokens: u32, floor: u64) {
        command.arg(owner).arg(tokens).arg(floor);
        self.write_inbox_prefix(command, key);
        command.arg(key.as_str()).write_arg(b"");
    }

    /// The keys and arguments of release_fast.lua.
    pub(super) fn fill_release_fast(&self, command: &mut Cmd, key: &LockKey, cycle: Cycle) {
        let names = self.names.of(key);
        command.arg(2);
        names.lease().write(command);
        names.queue().write(command);
        self.write_owner_tag(command, cycle);
    }

    /// The keys and arguments of retire.lua.
    pub(super) fn fill_retire(&self, command: &mut Cmd, request: &Release, rest: Duration) {
        self.write_keys(command, &request.key);
        self.write_owner_tag(command, request.cycle);
        self.write_owner_tag(command, request.cycle.retired());
        command.arg(millis_up(rest));
        self.write_inbox_prefix(command, &request.key);
        command.arg(request.key.as_str());
    }

    /// The keys and arguments of renew.lua.
    pub(super) fn fill_renew<'a>(
        &self,
        command: &mut Cmd,
        renewals: impl ExactSizeIterator<Item = &'a Renewal> + Clone,
    ) {
        command.arg(renewals.len() * 2);
        for renewal in renewals.clone() {
            let names = self.names.of(&renewal.key);
            names.lease().write(command);
            names.queue().write(command);
        }
        for renewal in renewals {
            self.write_owner_tag(command, renewal.cycle);
            command.arg(millis(renewal.ttl));
        }
    }

    /// The keys and arguments of renew_modes.lua.
    pub(super) fn fill_renew_modes<'a>(
        &self,
        command: &mut Cmd,
        renewals: impl ExactSizeIterator<Item = &'a Renewal> + Clone,
    ) {
        command.arg(renewals.len() * 3);
        for renewal in renewals.clone() {
            let names = self.names.of(&renewal.key);
            names.lease().write(command);
            names.queue().write(command);
            names.holders().write(command);
        }
        for renewal in renewals {
            self.write_owner_tag(command, renewal.cycle);
            command.arg(millis(renewal.ttl));
        }
    }

    /// The keys and arguments of renew_alone.lua for the marker of shared holders and permits.
    pub(super) fn fill_renew_marker_alone(&self, command: &mut Cmd, renewal: &Renewal) {
        command.arg(1);
        self.names.of(&renewal.key).lease().write(command);
        command.arg(MARKER).arg(millis(renewal.ttl));
    }

    /// The keys and arguments of renew_holder_alone.lua.
    pub(super) fn fill_renew_holder_alone(&self, command: &mut Cmd, renewal: &Renewal) {
        command.arg(1);
        self.names.of(&renewal.key).holders().write(command);
        self.write_owner_tag(command, renewal.cycle);
        command.arg(millis(renewal.ttl));
    }

    /// The keys and arguments of renew_alone.lua.
    pub(super) fn fill_renew_alone(&self, command: &mut Cmd, renewal: &Renewal) {
        command.arg(1);
        self.names.of(&renewal.key).lease().write(command);
        self.write_owner_tag(command, renewal.cycle);
        command.arg(millis(renewal.ttl));
    }

    /// The keys and arguments of claim.lua, or for a shared lease those of claim_shared.lua.
    pub(super) fn fill_claim(&self, command: &mut Cmd, claim: &Claim, floor: u64) {
        let names = self.names.of(&claim.key);
        let is_exclusive = claim.cycle.mode().is_exclusive();
        command.arg(if is_exclusive { 3 } else { 4 });
        names.lease().write(command);
        names.counter().write(command);
        names.queue().write(command);
        if !is_exclusive {
            names.holders().write(command);
        }
        self.write_owner_tag(command, claim.cycle);
        command.arg(millis(claim.ttl)).arg(claim.at_least).arg(floor);
        command.arg(match claim.kind {
            ClaimKind::Take => "take",
            ClaimKind::Extend => "extend",
        });
    }

    /// Reads the state of a key: its lease and remaining TTL, the length and head of its queue, the
    /// counter, the shared holders and those of permits, and the clock by which their leases end.
    pub(super) fn inspect(&self, key: &LockKey) -> Pipeline {
        let names = self.names.of(key);
        let (lease, queue) = (names.lease().to_string(), names.queue().to_string());
        let mut commands = pipe();
        commands.cmd("GET").arg(&lease);
        commands.cmd("PTTL").arg(&lease);
        commands.cmd("ZCARD").arg(&queue);
        commands.cmd("ZRANGE").arg(&queue).arg(0).arg(INSPECTED_MAX - 1);
        commands.cmd("GET").arg(names.counter().to_string());
        let holders = names.holders().to_string();
        commands.cmd("ZRANGE").arg(holders).arg(0).arg(-1).arg("WITHSCORES");
        commands.cmd("TIME");
        commands
    }

    /// One step of a scan over all keys of the namespace.
    pub(super) fn scan(&self, cursor: u64) -> Cmd {
        let mut scan = cmd("SCAN");
        scan.arg(cursor).arg("MATCH").arg(self.names.pattern());
        scan.arg("COUNT").arg(SCAN_COUNT);
        scan
    }

    /// Writes the keys that the scripts of exclusive cycles take.
    fn write_keys(&self, command: &mut Cmd, key: &LockKey) {
        let names = self.names.of(key);
        command.arg(3);
        names.lease().write(command);
        names.queue().write(command);
        names.counter().write(command);
    }

    /// Writes the keys that the scripts for all modes take.
    fn write_keys_and_holders(&self, command: &mut Cmd, key: &LockKey) {
        let names = self.names.of(key);
        command.arg(4);
        names.lease().write(command);
        names.queue().write(command);
        names.counter().write(command);
        names.holders().write(command);
    }

    fn write_inbox_prefix(&self, command: &mut Cmd, key: &LockKey) {
        match &self.inboxes {
            Inboxes::One(prefix) => command.write_arg(prefix.as_bytes()),
            Inboxes::PerSlot => self.names.inbox_prefix_in(self.names.of(key).slot()).write(command),
        }
    }

    /// Writes `manager:cycle` as the next argument, without the cost of formatting.
    fn write_owner_tag(&self, command: &mut Cmd, cycle: Cycle) {
        let owner_tag: OwnerTag<'_> = self.manager.owner_tag(cycle);
        let (manager, cycle) = owner_tag.parts();
        let mut writer = command.writer_for_next_arg();
        // Writing to a buffer in memory can't fail.
        writer.write_all(manager.as_bytes()).ok();
        writer.write_all(b":").ok();
        cycle.write_to(&mut writer).ok();
    }
}

/// Removes all keys of the namespace from one server. If the server refuses to remove a key, the
/// others are still removed and the error is returned at the end. Each command has this time limit:
/// there may be any number of them.
pub(super) async fn erase(
    mut connection: impl ConnectionLike,
    commands: &Commands,
    limit: Duration,
) -> Result<u64, RedisError> {
    let (mut cursor, mut count, mut refused) = (0, 0, None);
    loop {
        let scan = commands.scan(cursor);
        let (next, found): (u64, Vec<Vec<u8>>) = answer_within(limit, scan.query_async(&mut connection)).await?;
        for key in found.iter().filter(|key| commands.names.is_ours(key)) {
            // One at a time: in a cluster the keys may be in different slots.
            let mut delete = cmd("DEL");
            delete.arg(key);
            match answer_within(limit, delete.query_async::<u64>(&mut connection)).await {
                Ok(deleted) => count += deleted,
                Err(error) if error.is_unrecoverable_error() || !may_concern_some_keys(&error) => return Err(error),
                Err(error) => refused = refused.or_else(|| Some(commands.permissions.of_command(error, &delete))),
            }
        }
        if next == 0 {
            return refused.map_or(Ok(count), Err);
        }
        cursor = next;
    }
}

async fn answer_within<T>(
    limit: Duration,
    answer: impl Future<Output = Result<T, RedisError>>,
) -> Result<T, RedisError> {
    let answer = within(Moment::now(), limit, pin!(answer)).await;
    answer.unwrap_or_else(|_| Err(no_answer(limit)))
}

/// How many keys one scan step covers.
const SCAN_COUNT: u32 = 1000;

/// Whole milliseconds, as Redis expects, and at least 1.
fn millis(ttl: Duration) -> u64 {
    u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX).max(1)
}

/// The same, rounded up.
fn millis_up(rest: Duration) -> u64 {
    millis(rest + Duration::from_nanos(999_999))
}
