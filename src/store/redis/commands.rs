//! What is said to a server: the keys and arguments of each command, for one manager.

use std::io::Write;
use std::time::Duration;

use deadpool_redis::redis::aio::ConnectionLike;
use deadpool_redis::redis::{Cmd, Pipeline, RedisError, RedisWrite, cmd, pipe};

use super::batch::may_concern_some_keys;
use super::names::Names;
use super::permission::Permissions;
use super::primary::{Claim, ClaimKind};
use crate::identity::{ManagerId, Signature};
use crate::key::{LockKey, Slot};
use crate::protocol::{Acquire, Ask, Cycle, Release, Renewal};
use crate::store::INSPECTED_QUEUE_MAX;

/// Writes the commands of one manager in one namespace.
#[derive(Debug)]
pub(super) struct Commands {
    pub(super) names: Names,
    pub(super) manager: ManagerId,
    pub(super) permissions: Permissions,
    inboxes: Inboxes,
}

/// Where managers are told.
#[derive(Debug)]
enum Inboxes {
    /// Each has one inbox; this comes before its name.
    One(String),
    /// Each has one in every slot.
    PerSlot,
}

impl Commands {
    /// A command that writes if a key is there that never is. So it changes nothing, and is refused if the server would refuse a lock: it is out of memory, can't
    /// persist, has too few replicas, is a replica, or the user may not write there.
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

    /// For a cluster, where channels have slots.
    pub(super) fn for_a_cluster(namespace: &str, manager: ManagerId) -> Self {
        Self {
            inboxes: Inboxes::PerSlot,
            names: Names::new(namespace),
            manager,
            permissions: Permissions::new(namespace),
        }
    }

    /// The two commands of the free path, for a key of that slot.
    pub(super) fn take_freely(&self, request: &Acquire, slot: Slot) -> Pipeline {
        let names = self.names.of(&request.key);
        let mut set = Cmd::with_capacity(6, 128);
        set.arg("SET");
        names.lease().write(&mut set);
        self.write_signature(&mut set, request.cycle);
        set.arg("NX").arg("PX").arg(millis(request.ttl));
        let mut count = Cmd::with_capacity(3, 64);
        count.arg("INCRBY");
        self.names.counter_of(slot).write(&mut count);
        count.arg(request.tokens);
        let mut commands = Pipeline::with_capacity(2);
        commands.add_command(set).add_command(count);
        commands
    }

    /// The keys and arguments of acquire.lua.
    pub(super) fn fill_acquire(&self, command: &mut Cmd, request: &Acquire, floor: u64) {
        let &Acquire {
            ref key,
            cycle,
            ask,
            ttl,
            tokens,
        } = request;
        self.write_keys(command, key, cycle);
        command.arg(millis(ttl)).arg(tokens).arg(floor);
        command.arg(match ask {
            Ask::Join => "join",
            Ask::Free | Ask::Try => "try",
            Ask::Extend => "extend",
        });
        self.write_inbox_prefix(command, key);
        command.arg(key.as_str());
    }

    /// The keys and arguments of release.lua.
    pub(super) fn fill_release(&self, command: &mut Cmd, request: &Release, floor: u64) {
        let &Release {
            ref key,
            cycle,
            requeue,
            tokens,
            ..
        } = request;
        self.write_keys(command, key, cycle);
        command.arg(tokens).arg(floor);
        self.write_inbox_prefix(command, key);
        command.arg(key.as_str());
        match requeue {
            Some(next) => self.write_signature(command, next),
            None => command.write_arg(b""),
        }
    }

    /// The keys and arguments of release_free.lua.
    pub(super) fn fill_release_free(&self, command: &mut Cmd, key: &LockKey, cycle: Cycle) {
        let names = self.names.of(key);
        command.arg(2);
        names.lease().write(command);
        names.queue().write(command);
        self.write_signature(command, cycle);
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
            self.write_signature(command, renewal.cycle);
            command.arg(millis(renewal.ttl));
        }
    }

    /// The keys and arguments of renew_alone.lua.
    pub(super) fn fill_renew_alone(&self, command: &mut Cmd, renewal: &Renewal) {
        command.arg(1);
        self.names.of(&renewal.key).lease().write(command);
        self.write_signature(command, renewal.cycle);
        command.arg(millis(renewal.ttl));
    }

    /// The keys and arguments of claim.lua.
    pub(super) fn fill_claim(&self, command: &mut Cmd, claim: &Claim, floor: u64) {
        let names = self.names.of(&claim.key);
        command.arg(2);
        names.lease().write(command);
        names.counter().write(command);
        self.write_signature(command, claim.cycle);
        command.arg(millis(claim.ttl)).arg(claim.at_least).arg(floor);
        command.arg(match claim.kind {
            ClaimKind::Take => "take",
            ClaimKind::Extend => "extend",
        });
    }

    /// What is asked to look at a key: its lease, what is left of it, the length and the head of its queue, the counter.
    pub(super) fn inspect(&self, key: &LockKey) -> Pipeline {
        let names = self.names.of(key);
        let (lease, queue) = (names.lease().to_string(), names.queue().to_string());
        let mut commands = pipe();
        commands.cmd("GET").arg(&lease);
        commands.cmd("PTTL").arg(&lease);
        commands.cmd("ZCARD").arg(&queue);
        commands.cmd("ZRANGE").arg(&queue).arg(0).arg(INSPECTED_QUEUE_MAX - 1);
        commands.cmd("GET").arg(names.counter().to_string());
        commands
    }

    /// One step of looking for all keys of the namespace.
    pub(super) fn scan(&self, cursor: u64) -> Cmd {
        let mut scan = cmd("SCAN");
        scan.arg(cursor).arg("MATCH").arg(self.names.pattern());
        scan.arg("COUNT").arg(SCAN_COUNT);
        scan
    }

    /// The keys that the scripts of a lock have, and the first of their arguments: the signature.
    fn write_keys(&self, command: &mut Cmd, key: &LockKey, cycle: Cycle) {
        let names = self.names.of(key);
        command.arg(3);
        names.lease().write(command);
        names.queue().write(command);
        names.counter().write(command);
        self.write_signature(command, cycle);
    }

    fn write_inbox_prefix(&self, command: &mut Cmd, key: &LockKey) {
        match &self.inboxes {
            Inboxes::One(prefix) => command.write_arg(prefix.as_bytes()),
            Inboxes::PerSlot => self.names.inbox_prefix_in(self.names.of(key).slot()).write(command),
        }
    }

    /// Writes `manager:cycle` as the next argument, without the cost of formatting.
    fn write_signature(&self, command: &mut Cmd, cycle: Cycle) {
        let signature: Signature<'_> = self.manager.sign(cycle);
        let (manager, cycle) = signature.parts();
        let mut writer = command.writer_for_next_arg();
        // A buffer in memory takes everything.
        writer.write_all(manager.as_bytes()).ok();
        writer.write_all(b":").ok();
        cycle.write_to(&mut writer).ok();
    }
}

/// Removes all keys of the namespace from one server. A key that the server refuses to remove does not keep the others; its error comes at the end.
pub(super) async fn erase(mut connection: impl ConnectionLike, commands: &Commands) -> Result<u64, RedisError> {
    let (mut cursor, mut count, mut refused) = (0, 0, None);
    loop {
        let (next, found): (u64, Vec<Vec<u8>>) = commands.scan(cursor).query_async(&mut connection).await?;
        for key in found.iter().filter(|key| commands.names.is_ours(key)) {
            // One by one: in a cluster they need not share a slot.
            let mut delete = cmd("DEL");
            delete.arg(key);
            match delete.query_async::<u64>(&mut connection).await {
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

/// How many keys one step of a scan looks at.
const SCAN_COUNT: u32 = 1000;

/// Whole milliseconds, as Redis wants them; never zero.
fn millis(ttl: Duration) -> u64 {
    u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX).max(1)
}
