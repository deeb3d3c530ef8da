//! The Lua scripts, and how one is called.

use deadpool_redis::redis::aio::MultiplexedConnection;
use deadpool_redis::redis::{Cmd, ErrorKind, Pipeline, RedisError, RedisResult, Script, ServerErrorKind, Value, cmd};

use super::permission::Permissions;

#[cfg(test)]
mod tests;

/// A script whose hash was computed once.
#[derive(Debug)]
pub(super) struct LuaScript {
    code: &'static str,
    hash: String,
    permissions: Permissions,
}

/// How a call says which script it means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Named {
    /// As usual.
    ByHash,
    /// Where the server does not know it (any more).
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

    /// The command that calls it by its hash, or by its text.
    pub(super) fn command(&self, by: Named, fill: impl Fn(&mut Cmd)) -> Cmd {
        match by {
            Named::ByHash => command("EVALSHA", &self.hash, fill),
            Named::ByText => command("EVAL", self.code, fill),
        }
    }

    pub(super) const fn text(&self) -> &'static str {
        self.code
    }

    /// Calls it by its hash, and by its text where the server does not know it (any more). Being idempotent for a cycle,
    /// it could even run twice. `fill` writes the number of keys, the keys and the arguments.
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

    /// The same, so that whomever the script tells something hears of it before the caller does, where the server keeps the order of Redis'
    /// `putClientInPendingWriteQueue` (networking.c): clients are written to in the reverse of the order in which they first had a reply.
    /// So the caller gets one before; `TIME` is what every user may send who may connect.
    pub(super) async fn call_told_last(
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

    /// Rare, so it should not make every call larger.
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

    #[cfg(test)]
    pub(super) fn code(&self) -> &str {
        self.code
    }

    /// The same with another command right behind it, and both replies; neither costs a round trip of its own.
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
                // What came behind was too early.
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

/// Room for the keys and arguments of a usual call, so that writing it does not grow the buffer.
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
    /// The way back of the free path.
    pub(super) release_free: LuaScript,
    pub(super) release: LuaScript,
    pub(super) renew: LuaScript,
    /// Takes another node of a quorum than the door.
    pub(super) claim: LuaScript,
    /// For a lease whose slot is being moved.
    pub(super) renew_alone: LuaScript,
}

/// The text of a script that is made of these files.
#[cfg(not(test))]
macro_rules! script {
    ($($name:literal),+) => {
        concat!($(include_str!(concat!("scripts/", $name, ".lua"))),+)
    };
}

/// The same for tests, which can be run with other scripts than they were built with (`scripts/mutate-lua`).
#[cfg(test)]
macro_rules! script {
    ($($name:literal),+) => {
        tests::text(&[$(($name, include_str!(concat!("scripts/", $name, ".lua")))),+])
    };
}

impl Scripts {
    pub(super) fn for_a_primary(namespace: &str) -> Self {
        let acquire = script!("single", "extend", "acquire_own", "common", "acquire");
        let release = script!("single", "extend", "common", "release");
        Self::of(acquire, release, namespace)
    }

    pub(super) fn for_a_cluster(namespace: &str) -> Self {
        let acquire = script!("cluster", "extend", "acquire_own", "common", "acquire");
        let release = script!("cluster", "extend", "common", "release");
        Self::of(acquire, release, namespace)
    }

    fn of(acquire: &'static str, release: &'static str, namespace: &str) -> Self {
        let permissions = Permissions::new(namespace);
        let script = |code| LuaScript::new(code, &permissions);
        Self {
            acquire: script(acquire),
            release_free: script(script!("release_free")),
            release: script(release),
            renew: script(script!("renew")),
            renew_alone: script(script!("renew_alone")),
            claim: script(script!("claim")),
        }
    }
}
