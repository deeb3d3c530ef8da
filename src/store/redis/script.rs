//! The Lua scripts, and how one is called.

use deadpool_redis::redis::aio::MultiplexedConnection;
use deadpool_redis::redis::{Cmd, ErrorKind, RedisResult, Script, ServerErrorKind, ToRedisArgs, Value, cmd};

/// A script whose hash was computed once.
#[derive(Debug)]
pub(crate) struct LuaScript {
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
    /// it could even run twice.
    pub(crate) async fn call(&self, connection: &mut MultiplexedConnection, call: ScriptCall) -> RedisResult<Value> {
        let by_hash = call.command("EVALSHA", &self.hash);
        match connection
            .send_packed_command(&by_hash)
            .await
            .and_then(Value::extract_error)
        {
            Err(error) if error.kind() == ErrorKind::Server(ServerErrorKind::NoScript) => {
                let by_text = call.command("EVAL", self.code);
                connection
                    .send_packed_command(&by_text)
                    .await
                    .and_then(Value::extract_error)
            }
            reply => reply,
        }
    }
}

/// The keys and arguments of a call.
#[derive(Debug, Default)]
pub(crate) struct ScriptCall {
    keys: Vec<String>,
    arguments: Vec<Vec<u8>>,
}

impl ScriptCall {
    pub(crate) fn new(keys: Vec<String>) -> Self {
        Self {
            keys,
            arguments: Vec::with_capacity(8),
        }
    }

    pub(crate) fn with_keys(mut self, keys: Vec<String>) -> Self {
        self.keys = keys;
        self
    }

    pub(crate) fn arg(mut self, argument: impl ToRedisArgs) -> Self {
        self.arguments.append(&mut argument.to_redis_args());
        self
    }

    fn command(&self, verb: &'static str, script: &str) -> Cmd {
        let mut command = cmd(verb);
        command
            .arg(script)
            .arg(self.keys.len())
            .arg(&self.keys)
            .arg(&self.arguments);
        command
    }
}

/// The scripts of a store.
#[derive(Debug)]
pub(crate) struct Scripts {
    pub(crate) acquire: LuaScript,
    pub(crate) release: LuaScript,
    pub(crate) renew: LuaScript,
}

impl Scripts {
    pub(crate) fn new() -> Self {
        Self {
            acquire: LuaScript::new(concat!(
                include_str!("scripts/common.lua"),
                include_str!("scripts/acquire.lua")
            )),
            release: LuaScript::new(concat!(
                include_str!("scripts/release_fast.lua"),
                include_str!("scripts/common.lua"),
                include_str!("scripts/release.lua")
            )),
            renew: LuaScript::new(include_str!("scripts/renew.lua")),
        }
    }
}
