//! What TERM and HUP do.

use std::fs;
use std::time::Instant;

use redis::Value;
use rustix::process::Signal;
use support::{RedisServer, RespClient};

use super::{Agent, TTL};
use crate::tool::{Holder, is_held, wait_until_waiting};

#[test]
fn an_agent_without_locks_ends_at_once() {
    let server = RedisServer::start();
    for signal in [Signal::TERM, Signal::INT] {
        let mut agent = Agent::start(&server);
        let mut idle = agent.connect();
        idle.text(&["PING"]);
        agent.signal(signal);
        let ended = agent.end();
        assert_eq!(ended.code, 0, "{ended:?}");
        assert_eq!(idle.rest(), "");
        assert!(!agent.socket.exists());
    }
}

#[test]
fn a_draining_agent_grants_nothing_and_waits_for_its_holders() {
    let server = RedisServer::start();
    let mut agent = Agent::with(&server, &["--drain", "1h"]);
    let mut client = agent.connect();
    let token = client.integer(&["LOCK", "k"]).to_string();
    let mut waiting = agent.connect();
    waiting.send(&["LOCK", "k"]);
    agent.wait_until_waiting(1);
    let mut other = agent.connect();
    other.text(&["PING"]);

    agent.signal(Signal::TERM);
    let refused = "UNAVAILABLE the agent is shutting down";
    assert!(waiting.next_error().starts_with(refused));
    let error = other.error(&["LOCK", "free", "NOWAIT"]);
    assert!(error.starts_with(refused), "{error}");
    assert!(RespClient::unix(&agent.socket).is_err());
    // Everything else works, on any connection.
    assert!(other.integer(&["HELD", "k", &token]) > 0);
    assert!(other.text(&["INFO"]).contains("draining:1"));
    assert!(is_held(&server, "k") && agent.run.is_running());
    other.send(&["UNLOCK", "k", &token]);
    assert_eq!(other.reply(), Value::Int(1));
    let ended = agent.end();
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(!is_held(&server, "k"));
}

#[test]
fn a_draining_agent_ends_when_its_last_holder_disconnects() {
    let server = RedisServer::start();
    let mut agent = Agent::with(&server, &["--drain", "1h"]);
    let mut client = agent.connect();
    client.integer(&["LOCK", "k"]);
    agent.signal(Signal::TERM);
    agent.wait_until_it_prints("shutting down");
    drop(client);
    assert_eq!(agent.end().code, 0);
}

#[test]
fn locks_that_are_still_held_at_the_limit_are_released_and_reported_as_lost() {
    let server = RedisServer::start();
    let mut agent = Agent::with(&server, &["--drain", "100ms"]);
    let mut client = agent.connect_resp3();
    let token = client.integer(&["LOCK", "k"]);
    agent.signal(Signal::TERM);
    let push = client.reply();
    let bulk = |text: &str| Value::BulkString(text.as_bytes().to_vec());
    let expected = [bulk("k"), Value::Int(token), bulk("closed")];
    assert!(
        matches!(&push, Value::Push { data, .. } if *data == expected),
        "{push:?}"
    );
    assert_eq!(client.rest(), "");
    let ended = agent.end();
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(ended.stderr.contains("releasing 1 lock still held"), "{ended:?}");
    assert!(!is_held(&server, "k"));
}

#[test]
fn a_second_signal_ends_the_drain() {
    let server = RedisServer::start();
    let mut agent = Agent::with(&server, &["--drain", "1h"]);
    let mut client = agent.connect();
    client.integer(&["LOCK", "k"]);
    agent.signal(Signal::TERM);
    agent.wait_until_it_prints("shutting down");
    agent.signal(Signal::INT);
    assert_eq!(agent.end().code, 0);
    assert!(!is_held(&server, "k"));
}

/// A client that is stopped does not read, so the agent cannot send.
#[test]
fn a_client_that_reads_nothing_does_not_keep_the_agent_from_ending() {
    let server = RedisServer::start();
    let mut agent = Agent::with(&server, &["--drain", "0s"]);
    let mut client = agent.connect();
    // Each reply is much longer than its request, so replies fill the socket first.
    let request = support::resp::encoded(&["COMMAND"]);
    let sending = std::thread::spawn(move || {
        // Fails when the agent ends.
        while client.send_bytes(&request).is_ok() {}
    });
    agent.wait_until_info("connected_clients", "2");
    let started = Instant::now();
    agent.signal(Signal::TERM);
    assert_eq!(agent.end().code, 0);
    assert!(started.elapsed() < TTL);
    sending.join().unwrap();
}

#[test]
fn new_agent_starts_after_the_previous_one_was_killed() {
    let server = RedisServer::start();
    let mut agent = Agent::start(&server);
    let mut client = agent.connect();
    client.integer(&["LOCK", "k"]);
    agent.run.kill();
    assert_eq!(client.rest(), "");
    assert!(agent.socket.exists());
    let Agent { dir, .. } = agent;
    let next = Agent::started_in(dir, &server, &[]);
    // The lease of the former one lasts for its TTL.
    assert_eq!(next.connect().call(&["LOCK", "k", "NOWAIT"]), Value::Nil);
    next.connect().integer(&["LOCK", "other"]);
}

#[test]
fn defaults_and_the_password_are_read_again_on_hup() {
    let server = RedisServer::start();
    let dir = tempfile::tempdir().unwrap();
    let (config, password) = (dir.path().join("shardlock.toml"), dir.path().join("password"));
    fs::write(&config, "ttl = \"10s\"\n").unwrap();
    fs::write(&password, "one").unwrap();
    let options = [
        "--config",
        config.to_str().unwrap(),
        "--password-file",
        password.to_str().unwrap(),
    ];
    let mut agent = Agent::with(&server, &options);
    let mut client = agent.connect();
    assert_eq!(client.text(&["AUTH", "one"]), "OK");
    client.integer(&["LOCK", "before"]);

    fs::write(&config, "ttl = \"90s\"\ntimeout = \"20ms\"\nmax_keys = 7\n").unwrap();
    fs::write(&password, "two").unwrap();
    agent.signal(Signal::HUP);
    agent.wait_until_it_prints("the settings were read again");
    agent.wait_until_it_prints("restart the agent to apply the rest");
    client.integer(&["LOCK", "after"]);
    let left: i64 = server.query(&["PTTL", "lock:after"]);
    assert!(left > 60_000, "{left}");
    let left: i64 = server.query(&["PTTL", "lock:before"]);
    assert!(left <= 10_000, "{left}");
    let mut other = agent.connect();
    assert!(other.error(&["AUTH", "one"]).starts_with("WRONGPASS"));
    assert_eq!(other.text(&["AUTH", "two"]), "OK");
    // The new default limit.
    assert_eq!(other.call(&["LOCK", "after"]), Value::Nil);

    fs::write(&config, "ttl = 5").unwrap();
    agent.signal(Signal::HUP);
    agent.wait_until_it_prints("the settings were not changed");
    other.integer(&["LOCK", "still"]);
    let left: i64 = server.query(&["PTTL", "lock:still"]);
    assert!(left > 60_000, "{left}");
}

#[test]
fn an_agent_stays_in_the_queue_of_a_key_for_its_other_clients() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    let holder = Holder::of(&server, "k");
    let (mut one, mut other) = (agent.connect(), agent.connect());
    one.send(&["LOCK", "k"]);
    agent.wait_until_waiting(1);
    other.send(&["LOCK", "k"]);
    agent.wait_until_waiting(2);
    wait_until_waiting(&server, "k", 1);
    drop(one);
    agent.wait_until_waiting(1);
    holder.go();
    assert!(matches!(other.reply(), Value::Int(_)));
}

#[test]
fn an_agent_ends_although_its_shard_is_down() {
    let server = RedisServer::start();
    let mut agent = Agent::with(&server, &["--set", "store_timeout=1s"]);
    let mut client = agent.connect();
    client.integer(&["LOCK", "k"]);
    server.kill();
    assert!(
        client
            .error(&["LOCK", "other"])
            .starts_with("UNAVAILABLE shard shard-0")
    );
    agent.signal(Signal::TERM);
    drop(client);
    let ended = agent.end();
    // The lease could not be released.
    assert_eq!(ended.code, 69, "{ended:?}");
}
