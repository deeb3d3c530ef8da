//! Nothing that a client sends ends the agent or keeps it from serving others.

use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use redis::Value;
use support::resp::encoded;
use support::{RedisServer, RespClient};

use super::Agent;

/// Sends the bytes and returns what comes back until the agent closes the connection.
fn answer(agent: &Agent, bytes: &[u8]) -> String {
    let mut client = agent.connect();
    // The agent may close the connection before it has read all.
    client.send_bytes(bytes).ok();
    client.rest()
}

#[test]
fn malformed_requests_end_their_connection_only() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    let mut holder = agent.connect();
    let token = holder.integer(&["LOCK", "k"]).to_string();
    for (bytes, expected) in [
        (&b"*x\r\n"[..], "-ERR Protocol error: invalid multibulk length\r\n"),
        (b"*99999999999\r\n", "-ERR Protocol error: invalid multibulk length\r\n"),
        (b"*2147483647\r\n", "-ERR Protocol error: invalid multibulk length\r\n"),
        (b"*1000000\r\n", "-ERR Protocol error: invalid multibulk length\r\n"),
        (b"*1025\r\n", "-ERR Protocol error: invalid multibulk length\r\n"),
        (b"*2\r\n*1000000\r\n", "-ERR Protocol error: expected '$', got '*'\r\n"),
        (
            b"*2\r\n$4\r\nLOCK\r\n%1\r\n",
            "-ERR Protocol error: expected '$', got '%'\r\n",
        ),
        // The first byte decides, however much follows or is missing.
        (
            b"*1\r\n$1000000000000000000000\r\n",
            "-ERR Protocol error: invalid bulk length\r\n",
        ),
        (b"*1\r\n$-5\r\n", "-ERR Protocol error: invalid bulk length\r\n"),
        (b"*1\r\n:5\r\n", "-ERR Protocol error: expected '$', got ':'\r\n"),
        (
            b"*1\r\n$1\r\nabc\r\n",
            "-ERR Protocol error: expected a line break after a string\r\n",
        ),
        (b"PING \"\n", "-ERR Protocol error: unbalanced quotes in request\r\n"),
    ] {
        assert_eq!(answer(&agent, bytes), expected, "{}", bytes.escape_ascii());
    }
    for giant in [
        &b"*1\r\n$9223372036854775807\r\n"[..],
        b"*1\r\n$2147483647\r\nabc",
        b"*2\r\n$4\r\nLOCK\r\n$1000000000\r\n",
    ] {
        assert!(answer(&agent, giant).starts_with("-LIMIT the request is longer"));
    }
    for deep in [&b"*1\r\n"[..], b"*1024\r\n", b"*1\r\n%1\r\n"] {
        let answer = answer(&agent, &deep.repeat(100_000));
        assert!(
            answer.starts_with("-ERR Protocol error: expected '$', got '"),
            "{answer}"
        );
        assert_eq!(answer.matches("\r\n").count(), 1, "{answer}");
    }
    // Other types of RESP3 are lines, whose first word is no command. The connection continues.
    let mut client = agent.connect();
    for line in ["%1000000", "~1", ">2", "$5", "(1", "|1"] {
        client.send_bytes(format!("{line}\r\n").as_bytes()).unwrap();
        let error = client.next_error();
        assert!(error.starts_with("ERR unknown command"), "{line}: {error}");
    }
    assert!(holder.integer(&["HELD", "k", &token]) > 0);
}

/// A page on the web can make a browser send a request to any port, with commands in its body.
#[test]
fn requests_of_browsers_take_no_locks() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    for request in [
        "POST / HTTP/1.1\r\nHost: 127.0.0.1:6400\r\n\r\nLOCK k\r\n",
        "GET /LOCK HTTP/1.1\r\nhost: 127.0.0.1:6400\r\n\r\nLOCK k\r\n",
        "OPTIONS / HTTP/1.1\r\nHost: 127.0.0.1:6400\r\n\r\nLOCK k\r\n",
    ] {
        let answer = answer(&agent, request.as_bytes());
        assert!(
            !answer.contains(':') || answer.starts_with("-ERR unknown command"),
            "{answer}"
        );
        assert_eq!(agent.info("held"), "0");
    }
}

/// Lengths are compared with the limits before anything is allocated for them: the memory of the
/// agent does not grow with what clients announce.
#[test]
fn announced_lengths_allocate_no_memory() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    agent.connect().text(&["PING"]);
    let before = super::limits::memory_of(&agent);
    // The largest that is allowed, and nothing of it: all of them stay open.
    let clients: Vec<RespClient> = (0..500)
        .map(|number| {
            let mut client = agent.connect();
            let bytes: &[u8] = if number % 2 == 0 {
                b"PING\r\n*1024\r\n$16000\r\n"
            } else {
                b"PING\r\n*1024\r\n$1\r\nx\r\n"
            };
            // They are read together, so the reply to the first means that all were seen.
            client.send_bytes(bytes).unwrap();
            assert_eq!(client.reply(), redis::Value::SimpleString("PONG".to_owned()));
            client
        })
        .collect();
    let each = super::limits::memory_of(&agent).saturating_sub(before) / clients.len();
    assert!(each <= 12 * 1024, "{each} bytes for each connection");
}

#[test]
fn random_bytes_do_not_end_the_agent() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    let mut random = SmallRng::seed_from_u64(7);
    let parts: &[&[u8]] = &[
        b"*",
        b"$",
        b"\r\n",
        b"1",
        b"3",
        b"\0",
        b"\xff",
        b"-",
        b":",
        b"_",
        b"\"",
        b"LOCK",
        b"UNLOCK k",
        b"HELLO 3",
        b"PERMITS 1 OF",
        b"TIMEOUT 0",
        b" ",
        b"\n",
        b"*3\r\n$4\r\nLOCK\r\n$1\r\nk\r\n$6\r\nNOWAIT\r\n",
    ];
    for _ in 0..300 {
        let mut bytes = Vec::new();
        for _ in 0..random.random_range(1..40) {
            bytes.extend_from_slice(parts[random.random_range(0..parts.len())]);
        }
        let mut client = agent.connect();
        client.send_bytes(&bytes).ok();
        client.close_sending();
        client.rest();
    }
    agent.wait_until_free();
    assert_eq!(agent.connect().text(&["PING"]), "PONG");
}

#[test]
fn requests_that_arrive_byte_by_byte_are_answered() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    let mut client = agent.connect();
    for byte in encoded(&["LOCK", "k", "NOWAIT"]) {
        client.send_bytes(&[byte]).unwrap();
    }
    assert!(matches!(client.reply(), Value::Int(_)));
}

#[test]
fn clients_that_flood_do_not_starve_the_others() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    let floods: Vec<_> = (0..4)
        .map(|_| {
            let mut client = agent.connect();
            let requests = encoded(&["PING"]).repeat(1_000);
            std::thread::spawn(move || {
                let until = Instant::now() + Duration::from_secs(2);
                let mut replies = 0;
                while Instant::now() < until {
                    client.send_bytes(&requests).unwrap();
                    for _ in 0..1_000 {
                        client.reply();
                    }
                    replies += 1_000;
                }
                replies
            })
        })
        .collect();
    let mut client = agent.connect();
    let mut rounds = 0;
    while !floods.iter().all(std::thread::JoinHandle::is_finished) {
        let token = client.integer(&["LOCK", "k"]).to_string();
        assert_eq!(client.integer(&["UNLOCK", "k", &token]), 1);
        rounds += 1;
    }
    let flood: u64 = floods.into_iter().map(|flood| flood.join().unwrap()).sum();
    // One that starves gets none in the two seconds.
    assert!(rounds >= 3, "{rounds} locks beside {flood} pings");
}

/// A client that sends requests and reads no reply is not served, and costs no memory.
#[test]
fn client_that_reads_no_replies_is_throttled() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    let mut client = agent.connect();
    let stuck = std::thread::spawn(move || {
        let requests = encoded(&["COMMAND"]).repeat(1_000);
        // Replies are much longer than requests, so the agent must stop reading.
        let sent = (0..100)
            .take_while(|_| client.send_bytes_within(&requests, Duration::from_millis(500)))
            .count();
        (client, sent)
    });
    let (_client, sent) = stuck.join().unwrap();
    assert!(sent < 100, "all requests were accepted");
    let mut other: RespClient = agent.connect();
    assert_eq!(other.text(&["PING"]), "PONG");
}
