//! The Lua scripts, and how one is called.

use deadpool_redis::redis::aio::MultiplexedConnection;
use deadpool_redis::redis::{Cmd, ErrorKind, Pipeline, RedisResult, Script, ServerErrorKind, Value};

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

    /// The same with another command right behind it, and both replies; neither costs a round trip of its own.
    pub(super) async fn call_before(
        &self,
        after: &Cmd,
        connection: &mut MultiplexedConnection,
        fill: impl Fn(&mut Cmd),
    ) -> RedisResult<(Value, Value)> {
        let by_hash = call_both(command("EVALSHA", &self.hash, &fill), after, connection).await?;
        match by_hash.0.extract_error() {
            Err(error) if error.kind() == ErrorKind::Server(ServerErrorKind::NoScript) => {
                // What came behind was too early.
                let by_text = command("EVAL", self.code, &fill);
                let (reply, after) = Box::pin(call_both(by_text, after, connection)).await?;
                Ok((reply.extract_error()?, after))
            }
            reply => Ok((reply?, by_hash.1)),
        }
    }
}

async fn call_both(call: Cmd, after: &Cmd, connection: &mut MultiplexedConnection) -> RedisResult<(Value, Value)> {
    let mut both = Pipeline::with_capacity(2);
    both.add_command(call).add_command(after.clone());
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
        }
    }
}
