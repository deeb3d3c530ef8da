//! Each limit has an error of its own.

use std::fs;
use std::time::Duration;

use redis::Value;
use support::{PATIENCE, RedisServer, RespClient, wait_until};

use super::Agent;
use super::access::password;

#[test]
fn connections_are_limited() {
    let server = RedisServer::start();
    let agent = Agent::with(&server, &["--max-connections", "2"]);
    let (mut one, mut other) = (agent.connect(), agent.connect());
    one.text(&["PING"]);
    other.text(&["PING"]);
    let mut refused = agent.connect();
    assert_eq!(
        refused.rest(),
        "-LIMIT the agent has 2 connections, the most that it accepts (--max-connections)\r\n"
    );
    drop(one);
    wait_until("there is room again", PATIENCE, || {
        let mut client = agent.connect();
        let sent = client.send_bytes(b"QUIT\r\n");
        sent.is_ok() && client.rest() == "+OK\r\n"
    });
}

#[test]
fn locks_of_a_connection_are_limited() {
    let server = RedisServer::start();
    let agent = Agent::with(&server, &["--max-locks", "2"]);
    let mut client = agent.connect();
    let token = client.integer(&["LOCK", "a"]).to_string();
    client.integer(&["LOCK", "b"]);
    let error = client.error(&["LOCK", "c"]);
    assert!(
        error.starts_with("LIMIT this connection holds 2 locks") && error.contains("--max-locks"),
        "{error}"
    );
    agent.connect().integer(&["LOCK", "c"]);
    assert_eq!(client.integer(&["UNLOCK", "a", &token]), 1);
    client.integer(&["LOCK", "d"]);
}

#[test]
fn waiters_and_keys_are_limited_by_the_manager() {
    let server = RedisServer::start();
    let agent = Agent::with(&server, &["--set", "max_waiters_per_key=1", "--set", "max_keys=2"]);
    let (mut one, mut other, mut third) = (agent.connect(), agent.connect(), agent.connect());
    one.integer(&["LOCK", "k"]);
    other.send(&["LOCK", "k"]);
    agent.wait_until_waiting(1);
    let error = third.error(&["LOCK", "k"]);
    assert!(
        error.starts_with("LIMIT ") && error.contains("max_waiters_per_key = 1"),
        "{error}"
    );
    third.integer(&["LOCK", "l"]);
    let error = third.error(&["LOCK", "m"]);
    assert!(error.starts_with("LIMIT ") && error.contains("max_keys = 2"), "{error}");
}

#[test]
fn request_bytes_are_limited() {
    let server = RedisServer::start();
    let agent = Agent::with(&server, &["--max-request-bytes", "1024"]);
    let expected = "-LIMIT the request is longer than 1024 bytes, the most that the agent accepts; shorten it, or \
                    raise --max-request-bytes\r\n";
    for request in [
        "*1\r\n$1025\r\n".to_owned(),
        "x".repeat(1024),
        "*2\r\n$4\r\nPING\r\n$1015\r\nx".to_owned(),
    ] {
        let mut client = agent.connect();
        client.send_bytes(request.as_bytes()).unwrap();
        assert_eq!(client.rest(), expected, "{request}");
    }
    let longest = format!("PING {}\n", "x".repeat(1018));
    let mut client = agent.connect();
    client.send_bytes(longest.as_bytes()).unwrap();
    assert!(matches!(client.reply(), Value::BulkString(text) if text.len() == 1018));
}

/// An agent with a password and a short `--auth-timeout`, and a client that has authenticated.
#[track_caller]
fn with_auth_timeout(server: &RedisServer) -> (Agent, RespClient) {
    let (_dir, file) = password("secret");
    let file = file.to_str().expect("UTF-8");
    let agent = Agent::with(server, &["--password-file", file, "--auth-timeout", "300ms"]);
    let mut client = agent.connect();
    assert_eq!(client.text(&["AUTH", "secret"]), "OK");
    (agent, client)
}

#[test]
fn the_time_until_a_client_authenticates_is_limited() {
    let server = RedisServer::start();
    let (agent, mut client) = with_auth_timeout(&server);
    let mut idle = agent.connect();
    assert_eq!(
        idle.rest(),
        "-LIMIT the connection did not authenticate within 300ms (--auth-timeout)\r\n"
    );
    // The one that did may be idle.
    assert_eq!(client.text(&["PING"]), "PONG");
}

#[test]
fn a_client_that_reads_no_replies_must_authenticate_in_time_too() {
    let server = RedisServer::start();
    let (agent, mut client) = with_auth_timeout(&server);
    let mut deaf = agent.connect();
    // The agent sends more than the system buffers for a connection.
    deaf.send_bytes_within(&b"PING\r\n".repeat(100_000), Duration::from_millis(100));
    wait_until("its connection is closed", PATIENCE, || {
        client.text(&["INFO"]).contains("connected_clients:1\r\n")
    });
}

/// As many as the default allows, while the test itself may open enough files.
#[test]
fn many_idle_connections_cost_little_memory() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    // Below the limit of the agent: the connection that found it ready may not have ended yet.
    let count = raise_open_files().min(9_990);
    let before = memory_of(&agent);
    let mut clients = Vec::with_capacity(count);
    for _ in 0..count {
        let mut client = agent.connect();
        client.send(&["PING"]);
        clients.push(client);
    }
    for client in &mut clients {
        assert_eq!(client.reply(), Value::SimpleString("PONG".to_owned()));
    }
    let each = (memory_of(&agent) - before) / count;
    println!("{count} idle connections cost {each} bytes each");
    assert!(each <= 32 * 1024, "{each} bytes");
    // The last one is served like the first.
    clients[count - 1].integer(&["LOCK", "k"]);
    assert_eq!(clients[0].call(&["LOCK", "k", "NOWAIT"]), Value::Nil);
    drop(clients);
    agent.wait_until_free();
}

/// The number of connections that this process may open, with room for other tests.
fn raise_open_files() -> usize {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).expect("raise the limit on open files");
    let limit = limit.current.map_or(usize::MAX, |limit| limit as usize);
    limit.saturating_sub(2_000).max(500)
}

/// The resident memory of the agent, in bytes.
pub(super) fn memory_of(agent: &Agent) -> usize {
    let status = fs::read_to_string(format!("/proc/{}/status", agent.run.pid())).expect("read its status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kilobytes = line.and_then(|line| line.trim().strip_suffix(" kB"));
    kilobytes.and_then(|text| text.parse::<usize>().ok()).expect("a number") * 1024
}
