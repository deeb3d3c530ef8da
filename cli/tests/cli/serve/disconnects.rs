//! A lock ends with the connection that took it, and so does a wait. A loss is reported.

use std::time::Instant;

use redis::{PushKind, Value};
use support::resp::encoded;
use support::{RedisServer, RespClient, worker};

use super::{Agent, TTL};
use crate::tool::{Holder, Run, is_held, tool, wait_until_waiting};

/// A worker process with a connection to the agent.
fn client_process(agent: &Agent) -> worker::Worker {
    let socket = agent.socket.to_str().expect("UTF-8");
    worker::spawn("agent client", &[("SHARDLOCK_TEST_SOCKET", socket)])
}

#[test]
fn lock_of_a_killed_process_goes_to_the_next_waiter_at_once() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    let mut process = client_process(&agent);
    process.send("LOCK k");
    let token: i64 = process.line().parse().expect("a token");
    let mut next = agent.connect();
    next.send(&["LOCK", "k"]);
    agent.wait_until_waiting(1);

    let killed = Instant::now();
    process.kill();
    let reply = next.reply();
    let took = killed.elapsed();
    assert!(matches!(reply, Value::Int(next) if next > token), "{reply:?}");
    assert!(took < TTL / 4, "{took:?}");
    println!("the next one entered {took:?} after the kill");
}

#[test]
fn a_lock_whose_holder_is_killed_goes_to_another_host_at_once() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    let mut process = client_process(&agent);
    process.send("LOCK k");
    process.line();
    let mut other = Run::start(tool(&server, &["exec", "k", "true"]));
    wait_until_waiting(&server, "k", 1);

    let killed = Instant::now();
    process.kill();
    assert_eq!(other.end().code, 0);
    assert!(killed.elapsed() < TTL / 2, "{:?}", killed.elapsed());
}

#[test]
fn all_locks_of_a_connection_end_with_it_and_those_of_others_stay() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    let (mut one, mut other) = (agent.connect(), agent.connect());
    for key in ["a", "b", "c"] {
        one.integer(&["LOCK", key]);
    }
    other.integer(&["LOCK", "d"]);
    drop(one);
    agent.wait_until_info("held", "1");
    // The lock of each key is free for this process at once.
    for key in ["a", "b", "c"] {
        other.integer(&["LOCK", key, "TIMEOUT", "5000"]);
    }
    assert!(is_held(&server, "d"));
}

#[test]
fn a_waiter_that_disconnects_leaves_the_queue() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    let holder = Holder::of(&server, "k");
    let mut waiting = agent.connect();
    waiting.send(&["LOCK", "k"]);
    wait_until_waiting(&server, "k", 1);
    drop(waiting);
    wait_until_waiting(&server, "k", 0);
    let mut client = agent.connect();
    let inspected = format!("{:?}", client.call(&["INSPECT", "k"]));
    assert!(inspected.contains("queue_length"), "{inspected}");
    agent.wait_until_waiting(0);
    holder.go();
    // Nobody got it.
    client.integer(&["LOCK", "k", "NOWAIT"]);
}

/// The agent cannot see the end of a connection behind unread bytes by reading.
#[test]
fn a_waiter_that_disconnects_behind_many_commands_leaves_the_queue() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    let mut holder = agent.connect();
    holder.integer(&["LOCK", "k"]);
    let mut waiting = agent.connect();
    waiting.send(&["LOCK", "k"]);
    agent.wait_until_waiting(1);
    // More than the agent reads ahead.
    waiting.send_bytes(&encoded(&["PING"]).repeat(3_000)).unwrap();
    drop(waiting);
    agent.wait_until_waiting(0);
}

#[test]
fn commands_before_the_end_of_input_are_answered_without_waiting() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    let mut client = agent.connect();
    let mut holder = agent.connect();
    holder.integer(&["LOCK", "k"]);
    client
        .send_bytes(b"PING\r\nPING two\r\nLOCK k\r\nPING never\r\n")
        .unwrap();
    client.close_sending();
    assert_eq!(client.rest(), "+PONG\r\n$3\r\ntwo\r\n");
}

#[test]
fn a_loss_is_pushed_in_resp3_and_answered_later_in_resp2() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    let (mut old, mut new) = (agent.connect(), agent.connect_resp3());
    let old_token = old.integer(&["LOCK", "one", "MAXHOLD", "50"]).to_string();
    let token = new.integer(&["LOCK", "other", "MAXHOLD", "50"]);
    let Value::Push { kind, data } = new.reply() else {
        panic!("no push")
    };
    assert_eq!(kind, PushKind::Other("lost".to_owned()));
    let bulk = |text: &str| Value::BulkString(text.as_bytes().to_vec());
    assert_eq!(data, [bulk("other"), Value::Int(token), bulk("max_hold")]);
    assert_eq!(new.integer(&["HELD", "other", &token.to_string()]), 0);

    agent.wait_until_free();
    assert_eq!(old.integer(&["HELD", "one", &old_token]), 0);
    assert_eq!(old.integer(&["UNLOCK", "one", &old_token]), 0);
    // Nothing else was sent on the old connection.
    assert_eq!(old.text(&["PING"]), "PONG");
    old.integer(&["LOCK", "one", "TIMEOUT", "5000"]);
}

#[test]
fn a_loss_is_pushed_while_the_connection_waits_for_another_lock() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    let mut holder = agent.connect();
    holder.integer(&["LOCK", "busy"]);
    let mut client = agent.connect_resp3();
    client.integer(&["LOCK", "short", "MAXHOLD", "50"]);
    client.send(&["LOCK", "busy"]);
    let push = client.reply();
    assert!(matches!(&push, Value::Push { data, .. } if data.len() == 3), "{push:?}");
    agent.wait_until_waiting(1);
}

/// The leases last longer than the test, and so does the wait for the server.
const SLOW: [&str; 4] = ["--set", "ttl=5m", "--set", "store_timeout=60s"];

/// Sends a command for which the agent needs the server. The connection holds `k` and `l`.
#[track_caller]
fn send_command(client: &mut RespClient, name: &str, token_of_l: i64) {
    match name {
        "UNLOCK" => client.send(&["UNLOCK", "l", &token_of_l.to_string()]),
        name => client.send(&[name, "k"]),
    }
}

#[test]
fn locks_of_a_client_that_disconnects_end_while_its_command_waits_for_the_server() {
    for name in ["INSPECT", "UNLOCK"] {
        let server = RedisServer::start();
        let agent = Agent::with(&server, &SLOW);
        let (mut holder, mut next) = (agent.connect(), agent.connect());
        holder.integer(&["LOCK", "k"]);
        let token = holder.integer(&["LOCK", "l"]);
        next.send(&["LOCK", "k"]);
        agent.wait_until_waiting(1);

        server.stop();
        send_command(&mut holder, name, token);
        drop(holder);
        // In the agent, the locks end although the server does not answer.
        agent.wait_until_free();
        server.cont();
        let reply = next.reply();
        assert!(matches!(reply, Value::Int(_)), "{name}: {reply:?}");
    }
}

#[test]
fn a_loss_is_pushed_while_a_command_waits_for_the_server() {
    for name in ["INSPECT", "UNLOCK"] {
        let server = RedisServer::start();
        let agent = Agent::with(&server, &SLOW);
        let mut client = agent.connect_resp3();
        let token = client.integer(&["LOCK", "l"]);
        client.integer(&["LOCK", "k", "MAXHOLD", "500"]);

        server.stop();
        send_command(&mut client, name, token);
        let push = client.reply();
        assert!(
            matches!(&push, Value::Push { data, .. } if data.len() == 3),
            "{name}: {push:?}"
        );
        server.cont();
    }
}

#[test]
fn a_client_that_has_closed_its_sending_side_gets_the_reply_of_the_server() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    let mut client = agent.connect();
    let token = client.integer(&["LOCK", "l"]).to_string();
    client.integer(&["LOCK", "k"]);
    server.stop();
    client.send(&["UNLOCK", "l", &token]);
    client.close_sending();
    // The other one ends with the input.
    agent.wait_until_free();
    server.cont();
    assert_eq!(client.rest(), ":1\r\n");
}
