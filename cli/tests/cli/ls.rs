//! `shardlock ls` on one server. For other kinds of shards see kinds/.

use serde_json::{Value, json};
use support::{Quorum, RedisServer};

use crate::tool::{Holder, PATIENT, Run, patient, run, tool, wait_until_waiting};

#[track_caller]
fn list(server: &RedisServer, args: &[&str]) -> Value {
    let ended = run(patient(server, &[&["ls", "--json"], args].concat()));
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    serde_json::from_str(&ended.stdout).unwrap_or_else(|error| panic!("{error}: {ended:?}"))
}

#[test]
fn held_keys_are_listed_with_their_modes_holders_and_queues() {
    let server = RedisServer::start();
    let _alone = Holder::with(&server, &PATIENT, "alone");
    let _readers = [1, 2].map(|_| Holder::with(&server, &[&PATIENT[..], &["--shared"]].concat(), "prices"));
    let _callers = ["2/10", "1/8"].map(|permits| {
        let options = [&PATIENT[..], &["--permits", permits]].concat();
        Holder::with(&server, &options, "calls")
    });
    let _waiter = Run::start(patient(&server, &["exec", "alone", "true"]));
    wait_until_waiting(&server, "alone", 1);
    server.command(&["SET", "lock:foreign", "another library"]);
    // Neither of these is a lease of the namespace.
    server.command(&["RPUSH", "lock:list", "no lease"]);
    server.command(&["SET", "other:k", "another namespace"]);

    let listed = list(&server, &[]);
    assert_eq!(
        (&listed["more"], &listed["errors"]),
        (&json!(false), &json!([])),
        "{listed}"
    );
    let rows = listed["keys"].as_array().unwrap();
    let column = |name: &str| rows.iter().map(|row| row[name].clone()).collect::<Vec<_>>();
    assert_eq!(column("key"), ["alone", "calls", "foreign", "prices"]);
    assert_eq!(column("mode"), ["exclusive", "permits", "exclusive", "shared"]);
    assert_eq!(column("holder_count"), [1, 2, 1, 2]);
    assert_eq!(column("queue_length"), [1, 0, 0, 0]);
    assert_eq!(
        (&rows[1]["permits_in_use"], &rows[1]["permits_limit"]),
        (&json!(3), &json!(8))
    );
    assert_eq!(rows[3]["holders"].as_array().map(Vec::len), Some(2));
    assert_eq!(rows[2]["holders"][0]["owner"], "another library");
    let owner: String = server.query(&["GET", "lock:alone"]);
    assert_eq!(rows[0]["holders"][0]["owner"], owner.as_str());

    let ended = run(patient(&server, &["ls"]));
    let lines: Vec<&str> = ended.stdout.lines().collect();
    assert_eq!(lines.len(), 5, "{ended:?}");
    assert!(
        lines[0].starts_with("KEY ") && lines[0].ends_with("WAITING  HOLDER"),
        "{ended:?}"
    );
    let alone: Vec<_> = lines[1].split_whitespace().collect();
    assert_eq!(
        (alone[0], alone[2], alone[4], alone[5]),
        ("alone", "exclusive", "1", owner.as_str())
    );
    assert!(
        lines[2].contains("3/8 permits") && lines[3].contains("no end"),
        "{ended:?}"
    );
}

#[test]
fn a_list_is_limited_and_reports_that_there_is_more() {
    let server = RedisServer::start();
    assert_eq!(run(patient(&server, &["ls"])).stdout, "no key is held\n");
    let script = "for i = 1, 5000 do redis.call('SET', 'lock:job:' .. i, 'another library') end";
    server.command(&["EVAL", script, "0"]);
    server.command(&["SET", "lock:one", "another library"]);
    server.command(&["CONFIG", "RESETSTAT"]);
    let limited = list(&server, &["--limit", "50"]);
    assert_eq!(
        (limited["keys"].as_array().map(Vec::len), &limited["more"]),
        (Some(50), &json!(true))
    );
    // The search has ended with the limit.
    assert!(server.calls("scan") <= 2, "{}", server.calls("scan"));
    let ended = run(patient(&server, &["ls", "--limit", "2"]));
    assert!(ended.stdout.contains("the list may be incomplete: "), "{ended:?}");
    assert_eq!((ended.code, ended.stdout.lines().count()), (0, 4), "{ended:?}");
    let ended = run(patient(&server, &["ls", "--scan", "200", "one"]));
    assert!(ended.stdout.contains("a larger --limit or --scan"), "{ended:?}");

    let one = list(&server, &["o"]);
    assert_eq!(
        (one["keys"].as_array().map(Vec::len), &one["more"]),
        (Some(1), &json!(false))
    );
    let all = list(&server, &["--limit", "10000"]);
    assert_eq!(
        (all["keys"].as_array().map(Vec::len), &all["more"]),
        (Some(5001), &json!(false))
    );
    assert_eq!(server.calls("keys"), 0);
}

#[test]
fn missing_permission_to_scan_is_named_and_is_no_limit() {
    let server = RedisServer::start();
    server.command(&["ACL", "SETUSER", "default", "-scan"]);
    let ended = run(patient(&server, &["ls"]));
    assert_eq!(
        (ended.code, ended.stdout.as_str()),
        (69, "no held key was found\n"),
        "{ended:?}"
    );
    assert!(ended.stderr.contains("grant it with +scan"), "{ended:?}");
}

#[test]
fn keys_of_the_other_shards_are_listed_if_one_can_not_be_read() {
    let (server, gone) = (RedisServer::start(), RedisServer::start());
    let urls = format!("{} {}", server.url(), gone.url());
    let command = |args: &[&str]| {
        let mut command = tool(&server, args);
        command
            .env("SHARDLOCK_SHARDS", &urls)
            .env("SHARDLOCK_STORE_TIMEOUT", "3s");
        command
    };
    // Slots 12182 and 5061 are on different shards.
    server.command(&["SET", "lock:bar", "another library"]);
    gone.command(&["SET", "lock:foo", "another library"]);
    let ended = run(command(&["ls", "--json"]));
    let both: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(both["keys"].as_array().map(Vec::len), Some(2), "{ended:?}");
    assert_eq!(both["keys"][1]["shard"], "shard-1");
    gone.kill();
    let ended = run(command(&["ls"]));
    assert_eq!(ended.code, 69, "{ended:?}");
    assert!(
        ended.stdout.contains("bar ") && !ended.stdout.contains("foo "),
        "{ended:?}"
    );
    assert!(ended.stderr.contains("shard shard-1: "), "{ended:?}");
    // What is on the other shard is not known.
    let ended = run(command(&["ls", "no-such-prefix"]));
    assert_eq!(
        (ended.code, ended.stdout.as_str()),
        (69, "no held key that begins with \"no-such-prefix\" was found\n"),
        "{ended:?}"
    );
}

#[test]
fn a_key_of_a_minority_of_a_quorum_is_not_listed() {
    let quorum = Quorum::start(3);
    for (count, key) in [(3, "lock:all"), (1, "lock:lone")] {
        for node in &quorum.nodes()[..count] {
            node.command(&["SET", key, "another library"]);
        }
    }
    let mut command = patient(&quorum.nodes()[0], &["ls", "--json"]);
    command
        .env("SHARDLOCK_SHARDS", quorum.url())
        .env("SHARDLOCK_TTL", "3s")
        .env("SHARDLOCK_REDLOCK_MAX_TTL", "3s");
    let ended = run(command);
    let listed: Value = serde_json::from_str(&ended.stdout).unwrap_or_else(|error| panic!("{error}: {ended:?}"));
    let rows = listed["keys"].as_array().unwrap();
    assert_eq!((ended.code, rows.len()), (0, 1), "{ended:?}");
    assert_eq!(rows[0]["key"], "all");
}
