//! The Lua scripts, and how one is called.

use deadpool_redis::redis::aio::MultiplexedConnection;
use deadpool_redis::redis::{Cmd, ErrorKind, RedisResult, Script, ServerErrorKind, Value};

/// A script whose hash was computed once.
#[derive(Debug)]
pub(super) struct LuaScript {
    code: &'static str,
    hash: String,
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
    fn new(code: &'static str) -> Self {
        Self {
            code,
            hash: Script::new(code).get_hash().to_owned(),
        }
    }

    /// The command that calls it by its hash, or by its text.
    pub(super) fn command(&self, by: Named, fill: impl Fn(&mut Cmd)) -> Cmd {
        match by {
            Named::ByHash => command("EVALSHA", &self.hash, fill),
            Named::ByText => command("EVAL", self.code, fill),
        }
    }

    /// Calls it by its hash, and by its text where the server does not know it (any more). Being idempotent for a cycle,
    /// it could even run twice. `fill` writes the number of keys, the keys and the arguments.
    pub(super) async fn call(
        &self,
        connection: &mut MultiplexedConnection,
        fill: impl Fn(&mut Cmd),
    ) -> RedisResult<Value> {
        let by_hash = self.command(Named::ByHash, &fill);
        match connection
            .send_packed_command(&by_hash)
            .await
            .and_then(Value::extract_error)
        {
            Err(error) if error.kind() == ErrorKind::Server(ServerErrorKind::NoScript) => {
                let by_text = self.command(Named::ByText, &fill);
                // Rare, so it should not make every call larger.
                Box::pin(connection.send_packed_command(&by_text))
                    .await
                    .and_then(Value::extract_error)
            }
            reply => reply,
        }
    }
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
    /// For a lease whose slot is being moved.
    pub(super) renew_alone: LuaScript,
}

/// The text of a script that begins with what is particular to a kind of server.
macro_rules! script {
    ($kind:literal, $name:literal) => {
        LuaScript::new(concat!(
            include_str!(concat!("scripts/", $kind, ".lua")),
            include_str!("scripts/common.lua"),
            include_str!(concat!("scripts/", $name, ".lua"))
        ))
    };
}

impl Scripts {
    pub(super) fn for_a_primary() -> Self {
        Self::of(script!("single", "acquire"), script!("single", "release"))
    }

    pub(super) fn for_a_cluster() -> Self {
        Self::of(script!("cluster", "acquire"), script!("cluster", "release"))
    }

    fn of(acquire: LuaScript, release: LuaScript) -> Self {
        Self {
            acquire,
            release_free: LuaScript::new(include_str!("scripts/release_free.lua")),
            release,
            renew: LuaScript::new(include_str!("scripts/renew.lua")),
            renew_alone: LuaScript::new(include_str!("scripts/renew_alone.lua")),
        }
    }
}
