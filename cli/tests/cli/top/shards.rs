//! The shards themselves, when no process has an endpoint. For other kinds of shards see
//! tests/kinds.rs.

use support::{RedisServer, Terminal};

use super::{has, keys, row};
use crate::tool::{Holder, Run, run, tool, wait_until_waiting};

/// Stores keys that are not locks, among which the tool must find the locks.
#[track_caller]
fn fill(server: &RedisServer, count: u32) {
    let script = "for i = 1, tonumber(ARGV[1]) do redis.call('SET', 'page:' .. i, i) end";
    server.command(&["EVAL", script, "0", &count.to_string()]);
}

#[track_caller]
fn live(server: &RedisServer, args: &[&str]) -> Terminal {
    Terminal::open(tool(server, &[&["top", "--interval", "100ms"], args].concat()), 24, 80)
}

#[test]
fn held_keys_their_holders_and_queues_are_seen_without_an_endpoint() {
    let server = RedisServer::start();
    let (_one, _two) = (Holder::of(&server, "k"), Holder::of(&server, "odd {key} 100%"));
    let _waiters = [1, 2].map(|count| {
        let waiter = Run::start(tool(&server, &["exec", "k", "true"]));
        wait_until_waiting(&server, "k", count);
        waiter
    });
    server.command(&["SET", "lock:foreign", "another library"]);
    server.command(&["RPUSH", "lock:list", "no lease"]);
    let terminal = live(&server, &[]);
    let lines = terminal.until("the contended key", |lines| row(lines, "k").is_some());
    let k = row(&lines, "k").unwrap();
    assert!(k[2].starts_with('>') && k[3] == "2" && k[6] == "-", "{lines:#?}");
    assert!(lines[0].starts_with(" shardlock top  shard shard-0 "), "{lines:#?}");
    terminal.types("2");
    let lines = terminal.until("all held locks", |lines| keys(lines).len() >= 3);
    assert!(
        has(&lines, "odd {key} 100%") && has(&lines, "another…ibrary"),
        "{lines:#?}"
    );
    assert!(
        row(&lines, "foreign").is_some_and(|row| row[3..5] == ["no", "end"]),
        "{lines:#?}"
    );
    terminal.types("3");
    let lines = terminal.until("the shard", |lines| {
        row(lines, "shard-0").is_some_and(|row| row[3] == "2")
    });
    let shard = row(&lines, "shard-0").unwrap();
    assert_eq!((shard[1], shard[4]), ("up", "-"), "{lines:#?}");
    assert_eq!(shard[7], "-", "nobody has measured a round trip: {lines:#?}");
}

#[test]
fn keys_held_together_are_seen_with_their_mode_and_holders() {
    let server = RedisServer::start();
    let _readers = [1, 2].map(|_| Holder::with(&server, &["--shared"], "prices"));
    let _callers = ["2/10", "1/8"].map(|permits| Holder::with(&server, &["--permits", permits], "calls"));
    let _alone = Holder::of(&server, "alone");
    let terminal = live(&server, &["--view", "held"]);
    let lines = terminal.until("all held keys", |lines| keys(lines).len() >= 3);
    let seen = |key: &str| row(&lines, key).unwrap_or_else(|| panic!("{key} is not on {lines:#?}"));
    assert_eq!(seen("prices")[1..4], ["shared", "2", "several"], "{lines:#?}");
    assert_eq!(seen("calls")[1..5], ["3/8", "permits", "2", "several"], "{lines:#?}");
    assert_eq!(seen("alone")[1..3], ["exclusive", "1"], "{lines:#?}");
    terminal.types("3");
    terminal.until("the leases of all holders", |lines| {
        row(lines, "shard-0").is_some_and(|row| row[2] == "5")
    });
}

#[test]
fn search_reads_a_limited_number_of_keys_and_continues_where_it_ended() {
    let server = RedisServer::start();
    fill(&server, 20_000);
    let _holders = ["a", "b", "c"].map(|key| Holder::of(&server, key));
    server.command(&["CONFIG", "RESETSTAT"]);
    let terminal = live(&server, &["--scan", "1000", "--view", "held"]);
    terminal.shows("not all keys were searched, press n to continue");
    assert_eq!(server.calls("scan"), 5);
    // Refreshes do not scan.
    let inspected = server.calls("eval") + server.calls("evalsha") + server.calls("get");
    terminal.until("the view refreshes repeatedly", |_| {
        terminal.types("r");
        server.calls("ping") > 0 || inspected < server.calls("eval") + server.calls("evalsha") + server.calls("get")
    });
    assert_eq!(server.calls("scan"), 5);
    let mut searches = 1;
    while keys(&terminal.lines()).len() < 3 {
        let before = server.calls("scan");
        terminal.types("n");
        searches += 1;
        terminal.until("the view has searched", |_| server.calls("scan") > before);
        assert!(searches < 1000, "{:#?}", terminal.lines());
    }
    assert!(server.calls("scan") <= 5 * searches, "{}", server.calls("scan"));
    assert_eq!(server.calls("keys"), 0);
}

#[test]
fn named_key_is_shown_even_if_unused_and_without_a_search() {
    let server = RedisServer::start();
    let _holder = Holder::of(&server, "held");
    let ended = run(tool(
        &server,
        &["top", "--once", "--interval", "100ms", "--key", "free", "--key", "held"],
    ));
    assert_eq!(ended.code, 0, "{ended:?}");
    let lines: Vec<String> = ended.stdout.lines().map(str::to_owned).collect();
    assert_eq!(
        row(&lines, "free").unwrap()[2..],
        ["-", "-", "0", "-", "-", "-", "-"],
        "{ended:?}"
    );
    assert!(row(&lines, "held").is_some(), "{ended:?}");
    assert_eq!(server.calls("scan"), 0);
}

#[test]
fn a_shard_that_dies_is_down_and_then_up_again() {
    let server = RedisServer::start();
    let terminal = live(&server, &["--key", "k", "--view", "shards"]);
    terminal.until("the shard is up", |lines| {
        row(lines, "shard-0").is_some_and(|row| row[1] == "up")
    });
    server.kill();
    terminal.until("the shard is down", |lines| {
        row(lines, "shard-0").is_some_and(|row| row[1] == "down") && has(lines, "unavailable")
    });
    server.restart();
    terminal.until("the shard is up again", |lines| {
        row(lines, "shard-0").is_some_and(|row| row[1] == "up") && !has(lines, "unavailable")
    });
}

#[test]
fn a_shard_that_can_not_be_reached_at_first_is_an_error() {
    let server = RedisServer::start();
    server.kill();
    let ended = run(tool(&server, &["top", "--once"]));
    assert_eq!((ended.code, ended.stdout.as_str()), (69, ""), "{ended:?}");
    assert!(ended.stderr.contains("shard-0"), "{ended:?}");
}
