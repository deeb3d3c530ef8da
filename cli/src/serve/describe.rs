//! Replies that describe the agent, a key, a client or a command.

use std::fmt::Write;

use shardlock::LockKey;
use shardlock::introspect::{Holder, KeyState};
use shardlock::tool::printable;

use super::agent::{Agent, Phase};
use super::clients::{Client, ClientId};
use super::command_table::CommandInfo;
use super::replies::{Protocol, Replies};

/// The version of Redis whose protocol this is. Some client libraries look for one.
const REDIS_VERSION: &str = "7.2.0";

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// A count as an integer of the protocol.
pub(super) fn number(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// The reply to HELLO.
pub(super) fn hello(replies: &mut Replies, id: ClientId) {
    replies.map(7);
    for (name, value) in [("server", "shardlock"), ("version", VERSION)] {
        replies.bulk(name);
        replies.bulk(value);
    }
    replies.bulk("proto");
    replies.integer(replies.protocol.number());
    replies.bulk("id");
    replies.integer(number(id));
    for (name, value) in [("mode", "standalone"), ("role", "master")] {
        replies.bulk(name);
        replies.bulk(value);
    }
    replies.bulk("modules");
    replies.array(0);
}

/// The reply to INFO: lines of `name:value`, in sections.
pub(super) fn info(agent: &Agent) -> String {
    let mut text = String::new();
    let is_draining = u8::from(agent.phase() != Phase::Serving);
    let pid = std::process::id();
    let uptime = agent.started.elapsed().as_secs();
    // Writing to a string can't fail.
    write!(
        text,
        "# Server\r\nredis_version:{REDIS_VERSION}\r\nredis_mode:standalone\r\nrole:master\r\n\
         shardlock_version:{VERSION}\r\nprocess_id:{pid}\r\nuptime_in_seconds:{uptime}\r\n\
         loading:0\r\ndraining:{is_draining}\r\n\r\n"
    )
    .ok();
    let (connected, most) = (agent.clients.len(), agent.limits.max_connections);
    let (held, waiting) = (agent.held.count(), agent.clients.waiting());
    write!(
        text,
        "# Clients\r\nconnected_clients:{connected}\r\nmaxclients:{most}\r\n\
         blocked_clients:{waiting}\r\n\r\n# Locks\r\nheld:{held}\r\nmanager:{}\r\n\r\n# Shards\r\n",
        agent.locks.id()
    )
    .ok();
    for (index, shard) in agent.locks.shard_states().iter().enumerate() {
        let up = u8::from(shard.is_up);
        write!(
            text,
            "shard{index}:name={},kind={},up={up},leases={},waiters={},acquired={},local={},remote={}\r\n",
            printable(&shard.name),
            shard.kind,
            shard.leases,
            shard.waiters,
            shard.acquired,
            shard.local,
            shard.remote
        )
        .ok();
    }
    text
}

/// The reply to INSPECT, with the names of `shardlock inspect --json`.
pub(super) fn key_state(replies: &mut Replies, agent: &Agent, key: &LockKey, state: &KeyState) {
    replies.map(10);
    replies.bulk("key");
    replies.bulk(key.as_str());
    replies.bulk("slot");
    replies.integer(i64::from(key.slot().number()));
    replies.bulk("shard");
    replies.bulk(agent.locks.shard_map().name(key.slot()).unwrap_or_default());
    replies.bulk("holder");
    match &state.holder {
        Some(found) => holder(replies, found),
        None => replies.null(),
    }
    replies.bulk("holders");
    replies.array(state.holders.len());
    for found in &state.holders {
        holder(replies, found);
    }
    replies.bulk("holder_count");
    replies.integer(number(state.holder_count));
    replies.bulk("permits_in_use");
    replies.integer(i64::from(state.permits_in_use));
    replies.bulk("queue_length");
    replies.integer(number(state.queue_length));
    replies.bulk("queue");
    replies.array(state.queue.len());
    for owner in &state.queue {
        replies.bulk(owner);
    }
    replies.bulk("last_token");
    match state.last_token.map(|token| i64::try_from(token.get())) {
        Some(Ok(token)) => replies.integer(token),
        // None was issued, or it is no integer of the protocol.
        _ => replies.null(),
    }
}

fn holder(replies: &mut Replies, holder: &Holder) {
    replies.map(4);
    replies.bulk("owner");
    replies.bulk(&holder.owner);
    replies.bulk("is_manager");
    replies.integer(i64::from(holder.is_manager));
    replies.bulk("mode");
    replies.bulk(holder.mode.to_string());
    replies.bulk("remaining_ms");
    match holder.remaining {
        Some(remaining) => replies.integer(i64::try_from(remaining.as_millis()).unwrap_or(i64::MAX)),
        None => replies.null(),
    }
}

/// The reply to CLIENT INFO.
pub(super) fn client_line(client: &Client, protocol: Protocol) -> String {
    let names = client.names();
    format!(
        "id={} {} name={} age={} db=0 resp={} lib-name={} lib-ver={}\n",
        client.id,
        client.peer,
        names.name,
        client.since.elapsed().as_secs(),
        protocol.number(),
        names.library,
        names.library_version
    )
}

/// A command as COMMAND INFO describes it.
pub(super) fn command(replies: &mut Replies, command: &CommandInfo) {
    replies.array(10);
    replies.bulk(command.name);
    replies.integer(command.arity());
    replies.array(command.flags.len());
    for flag in command.flags {
        replies.simple(flag);
    }
    // The first key, the last, and the step between them.
    for _ in 0..3 {
        replies.integer(i64::from(command.has_key));
    }
    // Categories of ACLs, tips, specifications of keys, subcommands.
    for _ in 0..4 {
        replies.array(0);
    }
}

/// A command as COMMAND DOCS describes it: its name, then the description.
pub(super) fn command_docs(replies: &mut Replies, command: &CommandInfo) {
    replies.bulk(command.name);
    replies.map(3);
    for (name, value) in [("summary", command.summary), ("since", VERSION), ("group", "lock")] {
        replies.bulk(name);
        replies.bulk(value);
    }
}
