//! The Lua scripts, and how one is called.

use deadpool_redis::redis::aio::MultiplexedConnection;
use deadpool_redis::redis::{Cmd, ErrorKind, RedisResult, Script, ServerErrorKind, Value};

/// A script whose hash was computed once.
#[derive(Debug)]
pub(super) struct LuaScript {
    code: &'static str,
    hash: String,
}

impl LuaScript {
    fn new(code: &'static str) -> Self {
        Self {
            code,
            hash: Script::new(code).get_hash().to_owned(),
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
        let by_hash = command("EVALSHA", &self.hash, &fill);
        match connection
            .send_packed_command(&by_hash)
            .await
            .and_then(Value::extract_error)
        {
            Err(error) if error.kind() == ErrorKind::Server(ServerErrorKind::NoScript) => {
                let by_text = command("EVAL", self.code, &fill);
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
    /// Takes another node of a quorum than the door.
    pub(super) claim: LuaScript,
}

impl Scripts {
    pub(super) fn new() -> Self {
        Self {
            acquire: LuaScript::new(concat!(
                include_str!("scripts/common.lua"),
                include_str!("scripts/acquire.lua")
            )),
            release_free: LuaScript::new(include_str!("scripts/release_free.lua")),
            release: LuaScript::new(concat!(
                include_str!("scripts/common.lua"),
                include_str!("scripts/release.lua")
            )),
            renew: LuaScript::new(include_str!("scripts/renew.lua")),
            claim: LuaScript::new(include_str!("scripts/claim.lua")),
        }
    }
}
