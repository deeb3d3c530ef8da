//! The Lua scripts, and how to call them.

use std::time::Duration;

use deadpool_redis::redis::aio::MultiplexedConnection;
use deadpool_redis::redis::{Cmd, ErrorKind, Pipeline, RedisError, RedisResult, Script, ServerErrorKind, Value, cmd};

use super::permission::Permissions;

#[cfg(test)]
pub(super) mod tests;

/// A script with its precomputed hash.
#[derive(Debug)]
pub(super) struct LuaScript {
    code: &'static str,
    hash: String,
    permissions: Permissions,
}

/// How a call identifies its script.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Named {
    /// The usual way.
    ByHash,
    /// If the server does not know the script, or no longer does.
    ByText,
}

impl LuaScript {
    fn new(code: &'static str, permissions: &Permissions) -> Self {
        Self {
            code,
            hash: Script::new(code).get_hash().to_owned(),
            permissions: permissions.clone(),
        }
    }

    /// Builds the command that calls the script by its hash or its source.
    pub(super) fn command(&self, by: Named, fill: impl Fn(&mut Cmd)) -> Cmd {
        match by {
            Named::ByHash => command("EVALSHA", &self.hash, fill),
            Named::ByText => command("EVAL", self.code, fill),
        }
    }

    pub(super) const fn text(&self) -> &'static str {
        self.code
    }

    /// Calls the script by its hash, or by its source if the server does not know it. The script is
    /// idempotent for its cycle, so it could even run twice. `fill` writes the number of keys, the
    /// keys and the arguments.
    pub(super) async fn call(
        &self,
        connection: &mut MultiplexedConnection,
        fill: impl Fn(&mut Cmd),
    ) -> RedisResult<Value> {
        let by_hash = self.command(Named::ByHash, &fill);
        let reply = connection.send_packed_command(&by_hash).await;
        match reply.and_then(Value::extract_error) {
            Err(error) => Box::pin(self.failed(error, by_hash, connection, fill)).await,
            reply => reply,
        }
    }

    /// The same, but clients that the script notifies receive their message before the caller
    /// receives its reply. This holds if the server keeps the order of Redis'
    /// `putClientInPendingWriteQueue` (networking.c): it writes to clients in the reverse of the
    /// order in which they first had a pending reply. The caller therefore first gets the reply to
    /// another command; every user who can connect may send `TIME`.
    pub(super) async fn call_after_time(
        &self,
        connection: &mut MultiplexedConnection,
        fill: impl Fn(&mut Cmd),
    ) -> RedisResult<Value> {
        let by_hash = self.command(Named::ByHash, &fill);
        let (_, reply) = call_both(&cmd("TIME"), &by_hash, connection).await?;
        match reply.extract_error() {
            Err(error) => Box::pin(self.failed(error, by_hash, connection, fill)).await,
            reply => reply,
        }
    }

    /// Rare, so its state must not enlarge the future of every call.
    async fn failed(
        &self,
        error: RedisError,
        by_hash: Cmd,
        connection: &mut MultiplexedConnection,
        fill: impl Fn(&mut Cmd),
    ) -> RedisResult<Value> {
        let (error, call) = if error.kind() == ErrorKind::Server(ServerErrorKind::NoScript) {
            let by_text = self.command(Named::ByText, &fill);
            let reply = connection.send_packed_command(&by_text).await;
            match reply.and_then(Value::extract_error) {
                Err(error) => (error, by_text),
                reply => return reply,
            }
        } else {
            (error, by_hash)
        };
        Err(self.permissions.of_script(error, self.code, &call, connection).await)
    }

    /// Like [`call`](Self::call), with another command sent right behind the script. Returns both
    /// replies, in one round trip.
    pub(super) async fn call_before(
        &self,
        after: &Cmd,
        connection: &mut MultiplexedConnection,
        fill: impl Fn(&mut Cmd),
    ) -> RedisResult<(Value, Value)> {
        let by_hash = self.command(Named::ByHash, &fill);
        let (reply, behind) = call_both(&by_hash, after, connection).await?;
        let (error, call) = match reply.extract_error() {
            Err(error) if error.kind() == ErrorKind::Server(ServerErrorKind::NoScript) => {
                // The script did not run, so the command behind it came too early.
                let by_text = self.command(Named::ByText, &fill);
                let (reply, behind) = call_both(&by_text, after, connection).await?;
                match reply.extract_error() {
                    Err(error) => (error, by_text),
                    Ok(reply) => return Ok((reply, behind)),
                }
            }
            Err(error) => (error, by_hash),
            Ok(reply) => return Ok((reply, behind)),
        };
        Err(self.permissions.of_script(error, self.code, &call, connection).await)
    }
}

async fn call_both(call: &Cmd, after: &Cmd, connection: &mut MultiplexedConnection) -> RedisResult<(Value, Value)> {
    let mut both = Pipeline::with_capacity(2);
    both.add_command(call.clone()).add_command(after.clone());
    let mut replies = connection.send_packed_commands(&both, 0, 2).await?.into_iter();
    let mut next = || replies.next().unwrap_or(Value::Nil);
    Ok((next(), next()))
}

/// Enough for the keys and arguments of a typical call, so that writing it does not grow the
/// buffer.
const COMMAND_BYTES: usize = 384;
const COMMAND_ARGUMENTS: usize = 14;

fn command(verb: &str, script: &str, fill: impl Fn(&mut Cmd)) -> Cmd {
    let mut command = Cmd::with_capacity(COMMAND_ARGUMENTS, COMMAND_BYTES + script.len());
    command.arg(verb).arg(script);
    fill(&mut command);
    command
}

/// The scripts of a store.
#[derive(Debug)]
pub(super) struct Scripts {
    pub(super) acquire: LuaScript,
    /// The acquire of the fast path in a cluster, if it can't use the two plain commands.
    pub(super) acquire_fast: LuaScript,
    /// The release of the fast path.
    pub(super) release_fast: LuaScript,
    pub(super) release: LuaScript,
    /// The release of a lease that stays for the rest of its `min_hold`.
    pub(super) retire: LuaScript,
    pub(super) renew: LuaScript,
    /// Claims a lease on a node of a quorum other than the sequencer.
    pub(super) claim: LuaScript,
    /// For a lease whose slot is being moved.
    pub(super) renew_alone: LuaScript,
    /// The same requests if shared leases or permits are concerned.
    pub(super) modes: ModeScripts,
}

/// The scripts for requests of a cycle that is not exclusive, or that meet such a cycle. They take
/// one key more. The scripts of exclusive cycles do without it, and not only because each key costs
/// time: while a slot is being moved, a script is only executed where all of its keys exist.
#[derive(Debug)]
pub(super) struct ModeScripts {
    pub(super) acquire: LuaScript,
    pub(super) release: LuaScript,
    pub(super) renew: LuaScript,
    /// For a lease whose slot is being moved, after `renew_alone` has renewed the marker.
    pub(super) renew_alone: LuaScript,
    /// Claims a shared lease on a node of a quorum. Permits can't be claimed.
    pub(super) claim: LuaScript,
}

/// The value of a lease while shared holders or holders of permits have the key. No owner tag, so
/// no manager ever writes it as its own; the tilde keeps it apart from the random values, process
/// numbers and dates that other libraries store.
pub(crate) const MARKER: &str = "~shared";

/// How far the scripts of a cluster raise a counter above the server's time. The same in
/// cluster.lua.
pub(super) const COUNTER_AHEAD: Duration = Duration::from_millis(20);

/// The source of a script that consists of these files.
#[cfg(not(test))]
macro_rules! script {
    ($($name:literal),+) => {
        concat!($(include_str!(concat!("scripts/", $name, ".lua"))),+)
    };
}

/// The same for tests, which can run other scripts than those built in (`scripts/mutate-lua`).
#[cfg(test)]
macro_rules! script {
    ($($name:literal),+) => {
        tests::text(&[$(($name, include_str!(concat!("scripts/", $name, ".lua")))),+])
    };
}

/// The scripts that differ between a single primary and a cluster. A script defines first what its
/// most frequent requests need, since defining a function costs time in each call.
macro_rules! scripts_for {
    ($kind:literal) => {
        [
            script!(
                $kind,
                "constants",
                "extend",
                "acquire_own",
                "queue",
                "acquire_behind",
                "pass_on",
                "common",
                "acquire"
            ),
            script!(
                $kind,
                "constants",
                "pass_on",
                "release_own",
                "extend",
                "queue",
                "common",
                "release"
            ),
            script!($kind, "constants", "queue", "modes", "acquire_modes"),
            script!($kind, "constants", "queue", "modes", "release_modes"),
            script!($kind, "retire"),
        ]
    };
}

impl Scripts {
    pub(super) fn for_a_primary(namespace: &str) -> Self {
        Self::of(scripts_for!("single"), namespace)
    }

    pub(super) fn for_a_cluster(namespace: &str) -> Self {
        Self::of(scripts_for!("cluster"), namespace)
    }

    fn of(own: [&'static str; 5], namespace: &str) -> Self {
        let permissions = Permissions::new(namespace);
        let script = |code| LuaScript::new(code, &permissions);
        let [acquire, release, acquire_modes, release_modes, retire] = own;
        Self {
            acquire: script(acquire),
            acquire_fast: script(script!("cluster", "acquire_fast")),
            release_fast: script(script!("release_fast")),
            release: script(release),
            retire: script(retire),
            renew: script(script!("renew")),
            renew_alone: script(script!("renew_alone")),
            claim: script(script!("claim_counter", "claim")),
            modes: ModeScripts {
                acquire: script(acquire_modes),
                release: script(release_modes),
                renew: script(script!("renew_modes")),
                renew_alone: script(script!("renew_holder_alone")),
                claim: script(script!("claim_counter", "claim_shared")),
            },
        }
    }
}
