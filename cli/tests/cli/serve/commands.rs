//! What each command replies.

use std::collections::HashMap;

use redis::Value;
use support::resp::encoded;
use support::{RedisServer, RespClient};

use super::Agent;
use crate::tool::{Holder, is_held, wait_until_waiting};

/// The entries of a map, which RESP2 writes as an array.
#[track_caller]
fn entries(reply: Value) -> HashMap<String, Value> {
    let text = |value: Value| match value {
        Value::BulkString(bytes) => String::from_utf8(bytes).unwrap(),
        other => panic!("{other:?}"),
    };
    match reply {
        Value::Map(entries) => entries.into_iter().map(|(name, value)| (text(name), value)).collect(),
        Value::Array(flat) => {
            let mut flat = flat.into_iter();
            let mut found = HashMap::new();
            while let (Some(name), Some(value)) = (flat.next(), flat.next()) {
                found.insert(text(name), value);
            }
            found
        }
        other => panic!("{other:?}"),
    }
}

fn bulk(text: &str) -> Value {
    Value::BulkString(text.as_bytes().to_vec())
}

#[test]
fn a_lock_is_held_until_it_is_released_by_its_token() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    let mut client = agent.connect();
    let token = client.integer(&["LOCK", "k"]);
    assert!(is_held(&server, "k"));
    let token_text = token.to_string();
    let left = client.integer(&["HELD", "k", &token_text]);
    assert!((1..=10_000).contains(&left), "{left}");

    assert_eq!(client.integer(&["UNLOCK", "k", &token_text]), 1);
    assert!(!is_held(&server, "k"));
    assert_eq!(client.integer(&["UNLOCK", "k", &token_text]), 0);
    assert_eq!(client.integer(&["HELD", "k", &token_text]), 0);
    assert!(client.integer(&["LOCK", "k"]) > token);
}

#[test]
fn a_lock_is_released_from_another_connection() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    let (mut one, mut other) = (agent.connect(), agent.connect());
    let token = one.integer(&["LOCK", "k"]).to_string();
    assert!(other.integer(&["HELD", "k", &token]) > 0);
    // The token alone is not enough.
    assert_eq!(other.integer(&["UNLOCK", "other", &token]), 0);
    assert_eq!(other.integer(&["UNLOCK", "k", "7"]), 0);
    assert_eq!(other.integer(&["UNLOCK", "k", &token]), 1);
    assert_eq!(one.integer(&["HELD", "k", &token]), 0);
    // The end of the connection that took the lock does not concern the next holder.
    let next = other.integer(&["LOCK", "k"]).to_string();
    drop(one);
    agent.wait_until_info("connected_clients", "2");
    assert!(other.integer(&["HELD", "k", &next]) > 0);
}

#[test]
fn lock_of_a_held_key_replies_nil_after_the_timeout() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    let (mut one, mut other) = (agent.connect(), agent.connect());
    one.integer(&["LOCK", "k"]);
    for wait in [&["NOWAIT"][..], &["TIMEOUT", "0"], &["TIMEOUT", "20"]] {
        assert_eq!(other.call(&[&["LOCK", "k"], wait].concat()), Value::Nil, "{wait:?}");
    }
    let mut third = agent.connect_resp3();
    assert_eq!(third.call(&["LOCK", "k", "NOWAIT"]), Value::Nil);
    assert!(matches!(third.call(&["LOCK", "free", "NOWAIT"]), Value::Int(_)));
}

#[test]
fn next_waiter_gets_the_lock_when_it_is_released() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    let (mut one, mut other) = (agent.connect(), agent.connect());
    let token = one.integer(&["LOCK", "k"]);
    other.send(&["LOCK", "k", "TIMEOUT", "20000"]);
    agent.wait_until_waiting(1);
    assert_eq!(one.integer(&["UNLOCK", "k", &token.to_string()]), 1);
    assert!(matches!(other.reply(), Value::Int(next) if next > token));
}

/// Nobody works until the next holder knows. If the agent replied to the UNLOCK first, the process
/// that sent it would take the processor from the one that has to enter.
#[test]
fn next_holder_is_notified_before_the_releasing_client() {
    let server = RedisServer::start();
    let agent = Agent::with(&server, &["--threads", "1"]);
    let (mut holder, mut next) = (agent.connect(), agent.connect());
    let mut token = holder.integer(&["LOCK", "k"]);
    for round in 0..20 {
        next.send(&["LOCK", "k"]);
        agent.wait_until_waiting(1);
        assert_eq!(holder.integer(&["UNLOCK", "k", &token.to_string()]), 1);
        // The first hand-over may have to wait for tokens from the server.
        assert!(next.has_reply() || round == 0, "{round}");
        let Value::Int(granted) = next.reply() else {
            panic!("no token")
        };
        token = granted;
        std::mem::swap(&mut holder, &mut next);
    }
}

#[test]
fn all_modes_of_a_lock_are_served() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    let mut client = agent.connect();
    client.integer(&["LOCK", "prices", "SHARED"]);
    client.integer(&["LOCK", "prices", "SHARED", "NOWAIT"]);
    assert_eq!(client.call(&["LOCK", "prices", "NOWAIT"]), Value::Nil);

    let two = client.integer(&["LOCK", "api", "PERMITS", "2", "OF", "3"]).to_string();
    client.integer(&["LOCK", "api", "PERMITS", "1", "OF", "3", "NOWAIT"]);
    assert_eq!(
        client.call(&["LOCK", "api", "PERMITS", "1", "OF", "3", "NOWAIT"]),
        Value::Nil
    );
    let state = entries(client.call(&["INSPECT", "api"]));
    assert_eq!(
        (&state["holder_count"], &state["permits_in_use"]),
        (&Value::Int(2), &Value::Int(3))
    );
    assert_eq!(client.integer(&["UNLOCK", "api", &two]), 1);
    client.integer(&["LOCK", "api", "PERMITS", "2", "OF", "3", "NOWAIT"]);

    let token = client.integer(&["LOCK", "cron", "MINHOLD", "60000"]).to_string();
    assert_eq!(client.integer(&["UNLOCK", "cron", &token]), 1);
    assert_eq!(client.call(&["LOCK", "cron", "NOWAIT"]), Value::Nil);

    client.integer(&["LOCK", "short", "TTL", "60000", "MAXHOLD", "30000", "CLASS", "reports"]);
    let left: i64 = server.query(&["PTTL", "lock:short"]);
    assert!(left > 30_000, "{left}");
}

#[test]
fn settings_outside_of_their_bounds_are_refused_with_the_bound() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    let mut client = agent.connect();
    for (words, expected) in [
        (&["LOCK", "k", "TTL", "1"][..], "ERR ttl is 1ms, but must be"),
        (
            &["LOCK", "k", "PERMITS", "4", "OF", "3"],
            "ERR weight is 4, but must be",
        ),
        (&["LOCK", "k", "PERMITS", "1", "OF", "0"], "ERR limit is 0, but must be"),
        (
            &["LOCK", "k", "SHARED", "MINHOLD", "5"],
            "ERR min_hold is 5ms, but must be",
        ),
        (&["LOCK", "k", "TIMEOUT", "18446744073709551615"], "ERR timeout is"),
        (&["LOCK"], "ERR wrong number of arguments for 'lock' command"),
        (
            &["LOCK", "k", "NOWAIT", "NOW"],
            "ERR syntax error in 'lock': unknown option 'NOW'",
        ),
        (
            &["UNLOCK", "k", "x"],
            "ERR token is 'x', but must be the number that LOCK replied",
        ),
        (
            &["SET", "k", "v"],
            "ERR unknown command 'SET', with args beginning with: 'k' 'v'",
        ),
    ] {
        let error = client.error(words);
        assert!(error.starts_with(expected), "{words:?}: {error}");
    }
    // The connection is as good as before.
    client.integer(&["LOCK", "k"]);
}

#[test]
fn a_key_is_inspected_with_its_holder_and_queue() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    let holder = Holder::of(&server, "k");
    let mut waiting = agent.connect();
    waiting.send(&["LOCK", "k"]);
    wait_until_waiting(&server, "k", 1);
    for mut client in [agent.connect(), agent.connect_resp3()] {
        let state = entries(client.call(&["INSPECT", "k"]));
        assert_eq!((&state["key"], &state["shard"]), (&bulk("k"), &bulk("shard-0")));
        assert_eq!(
            (&state["slot"], &state["queue_length"]),
            (&Value::Int(7629), &Value::Int(1))
        );
        let owner: String = server.query(&["GET", "lock:k"]);
        let seen = entries(state["holder"].clone());
        assert_eq!((&seen["owner"], &seen["is_manager"]), (&bulk(&owner), &Value::Int(1)));
        assert!(matches!(seen["remaining_ms"], Value::Int(1..=10_000)), "{seen:?}");
        assert!(
            matches!(&state["queue"], Value::Array(queue) if queue.len() == 1),
            "{state:?}"
        );
    }
    holder.go();
    assert!(matches!(waiting.reply(), Value::Int(_)));
    let state = entries(agent.connect().call(&["INSPECT", "free"]));
    assert_eq!(
        (&state["holder"], &state["queue_length"]),
        (&Value::Nil, &Value::Int(0))
    );
}

#[test]
fn commands_that_clients_send_at_connect_are_answered() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    let mut client = agent.connect();
    let hello = entries(client.call(&["HELLO"]));
    assert_eq!(
        (&hello["server"], &hello["proto"]),
        (&bulk("shardlock"), &Value::Int(2))
    );
    assert!(matches!(
        client.call(&["HELLO", "3", "SETNAME", "worker"]),
        Value::Map(_)
    ));
    assert_eq!(client.text(&["CLIENT", "GETNAME"]), "worker");
    assert_eq!(client.text(&["CLIENT", "SETNAME", "other"]), "OK");
    assert_eq!(client.text(&["CLIENT", "SETINFO", "LIB-NAME", "redis-py"]), "OK");
    assert_eq!(client.text(&["CLIENT", "SETINFO", "LIB-VER", "5.0"]), "OK");
    let line = client.text(&["CLIENT", "INFO"]);
    let (id, pid) = (client.integer(&["CLIENT", "ID"]), std::process::id());
    for part in [
        &format!("id={id} pid={pid} uid="),
        "name=other",
        "resp=3",
        "lib-name=redis-py lib-ver=5.0",
    ] {
        assert!(line.contains(part), "{part}: {line}");
    }
    assert_eq!(client.error(&["HELLO", "4"]), "NOPROTO unsupported protocol version");
    assert_eq!(client.text(&["SELECT", "0"]), "OK");
    assert!(
        client
            .error(&["SELECT", "1"])
            .starts_with("ERR DB index is out of range")
    );
    assert_eq!(client.text(&["PING"]), "PONG");
    assert_eq!(client.text(&["PING", "hi"]), "hi");
    assert_eq!(client.text(&["ECHO", "hi"]), "hi");
    assert!(client.text(&["INFO"]).contains("\r\nloading:0\r\n"));
    let Value::Array(commands) = client.call(&["COMMAND"]) else {
        panic!("no list of commands");
    };
    assert_eq!(client.integer(&["COMMAND", "COUNT"]), commands.len() as i64);
    let docs = entries(client.call(&["COMMAND", "DOCS", "lock", "nothing"]));
    assert_eq!(docs.keys().collect::<Vec<_>>(), ["lock"]);
    let info = client.call(&["COMMAND", "INFO", "unlock", "nothing"]);
    assert!(
        matches!(&info, Value::Array(found) if found.len() == 2 && found[1] == Value::Nil),
        "{info:?}"
    );
    assert_eq!(client.text(&["QUIT"]), "OK");
    assert_eq!(client.rest(), "");
}

#[test]
fn lines_typed_by_hand_are_commands() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    let mut client = agent.connect();
    client.send_bytes(b"ping\r\n\r\nlock \"a key\" nowait\nunlock").unwrap();
    assert_eq!(client.reply(), Value::SimpleString("PONG".to_owned()));
    let Value::Int(token) = client.reply() else {
        panic!("no token")
    };
    assert!(is_held(&server, "a key"));
    client.send_bytes(format!(" 'a key' {token}\n").as_bytes()).unwrap();
    assert_eq!(client.reply(), Value::Int(1));
}

/// As behind BLPOP.
#[test]
fn commands_behind_a_lock_that_waits_are_answered_in_their_order() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    let (mut one, mut other) = (agent.connect(), agent.connect());
    let token = one.integer(&["LOCK", "k"]).to_string();
    let pipeline = [&["PING"][..], &["LOCK", "k"], &["PING", "after"]];
    other.send_bytes(&pipeline.map(encoded).concat()).unwrap();
    assert_eq!(other.reply(), Value::SimpleString("PONG".to_owned()));
    agent.wait_until_waiting(1);
    other.send(&["PING", "last"]);
    assert_eq!(one.integer(&["UNLOCK", "k", &token]), 1);
    assert!(matches!(other.reply(), Value::Int(_)));
    assert_eq!([other.reply(), other.reply()], [bulk("after"), bulk("last")]);
}

#[test]
fn an_agent_is_one_contender_and_serves_its_clients_in_their_order() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    let holder = Holder::of(&server, "k");
    let mut clients: Vec<RespClient> = Vec::new();
    for count in 1..=20 {
        let mut client = agent.connect();
        client.send(&["LOCK", "k"]);
        agent.wait_until_waiting(count);
        clients.push(client);
    }
    wait_until_waiting(&server, "k", 1);
    holder.go();
    let mut last = 0;
    // In the order in which they asked.
    for mut client in clients {
        let Value::Int(token) = client.reply() else {
            panic!("no token")
        };
        assert!(token > last);
        last = token;
        assert_eq!(client.integer(&["UNLOCK", "k", &token.to_string()]), 1);
    }
}
