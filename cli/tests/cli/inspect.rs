//! `shardlock inspect` and `shardlock slot`, and the sources of their settings.

use std::fs;

use serde_json::{Value, json};
use support::RedisServer;

use crate::tool::{Ended, Holder, Notes, Run, bare, run, tool, wait_until_waiting};

#[track_caller]
fn json(command: std::process::Command) -> Value {
    let ended = run(command);
    assert_eq!(ended.code, 0, "{ended:?}");
    serde_json::from_str(&ended.stdout).unwrap_or_else(|error| panic!("{error}: {ended:?}"))
}

#[test]
fn a_free_key_has_no_holder() {
    let server = RedisServer::start();
    let seen = json(tool(&server, &["inspect", "foo", "--json"]));
    assert_eq!(seen["key"], "foo");
    assert_eq!(seen["slot"], 12182);
    assert_eq!(seen["shard"], "shard-0");
    assert_eq!(seen["holder"], Value::Null);
    assert_eq!((&seen["queue_length"], &seen["queue"]), (&json!(0), &json!([])));
    let ended = run(tool(&server, &["inspect", "foo"]));
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(ended.stdout.contains("nobody"), "{ended:?}");
}

#[test]
fn held_key_has_a_holder_a_token_and_its_waiters_in_order() {
    let server = RedisServer::start();
    let holder = Holder::of(&server, "k");
    let mut waiters = Vec::new();
    let mut order = Vec::new();
    for count in 1..=2 {
        waiters.push(Run::start(tool(&server, &["exec", "k", "true"])));
        wait_until_waiting(&server, "k", count);
        let queue: Vec<String> = server.query(&["ZRANGE", "{lock:k}:q", "0", "-1"]);
        order.push(queue.last().unwrap().clone());
    }
    let seen = json(tool(&server, &["inspect", "--json", "k"]));
    assert_eq!(
        seen["holder"]["owner"],
        server.query::<String>(&["GET", "lock:k"]).as_str()
    );
    assert_eq!(seen["holder"]["is_manager"], true);
    let remaining = seen["holder"]["remaining_ms"].as_u64().unwrap();
    assert!((1..=10_000).contains(&remaining), "{remaining}");
    assert_eq!((&seen["queue_length"], &seen["queue"]), (&json!(2), &json!(order)));
    assert!(seen["last_token"].as_u64().unwrap() > 0);

    let text = run(tool(&server, &["inspect", "k"])).stdout;
    assert!(text.contains("a shardlock manager"), "{text}");
    let places: Vec<usize> = order.iter().map(|owner| text.find(owner).unwrap()).collect();
    assert!(places.is_sorted(), "{text}");

    holder.go();
    for waiter in &mut waiters {
        assert_eq!(waiter.end().code, 0);
    }
}

#[test]
fn holder_of_another_library_is_shown_as_such() {
    let server = RedisServer::start();
    server.command(&["SET", "lock:k", "their-own-value"]);
    let seen = json(tool(&server, &["inspect", "k", "--json"]));
    let expected = json!({ "owner": "their-own-value", "is_manager": false, "remaining_ms": null });
    assert_eq!(seen["holder"], expected);
    let text = run(tool(&server, &["inspect", "k"])).stdout;
    assert!(text.contains("never expires"), "{text}");
}

/// A value that a hostile client might store. Printed raw, it would clear the screen, change its
/// title and forge lines.
const HOSTILE: &str = "x\u{1b}[2J\u{1b}]0;owned\u{7}\nforged   line\r\u{9b}31m\u{202e}y";

/// Both outputs consist of printable characters and line ends, and no line starts with the forged
/// text.
#[track_caller]
fn assert_printable(ended: &Ended) {
    for text in [&ended.stdout, &ended.stderr] {
        let is_bad = |char: char| (char.is_control() && char != '\n') || char == '\u{202e}';
        assert!(!text.contains(is_bad), "{ended:?}");
        let mut lines = text.lines();
        assert!(!lines.any(|line| line.starts_with("forged   line")), "{ended:?}");
    }
    let all = format!("{}{}", ended.stdout, ended.stderr);
    assert!(all.contains("owned"), "the value is shown: {ended:?}");
}

#[test]
fn values_of_a_server_can_not_reach_the_terminal_raw() {
    let server = RedisServer::start();
    server.command(&["SET", "lock:k", HOSTILE]);
    server.command(&["ZADD", "{lock:k}:q", "1", HOSTILE]);
    assert_printable(&run(tool(&server, &["inspect", "k"])));
    let ended = run(tool(&server, &["inspect", "k", "--json"]));
    assert_printable(&ended);
    let seen: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(
        (&seen["holder"]["owner"], &seen["queue"][0]),
        (&json!(HOSTILE), &json!(HOSTILE))
    );
    let commands: [&[&str]; 6] = [
        &["top", "--once", "--interval", "100ms", "--key", "k"],
        &["top", "--once", "--json", "--interval", "100ms", "--key", "k"],
        &["ls"],
        &["ls", "--json"],
        &["break", "k"],
        &["break", "k", "--owner", "owned by another"],
    ];
    for args in commands {
        assert_printable(&run(tool(&server, args)));
    }
    assert_printable(&run(tool(&server, &["inspect", &format!("{HOSTILE}!")])));

    server.command(&["SET", "lock:%map", HOSTILE]);
    let set = ["map", "set", "--expect", "none"];
    let commands: [&[&str]; 6] = [
        &["exec", "k", "true"],
        &["inspect", "k"],
        &["doctor"],
        &["map", "show"],
        &["map", "show", "--json"],
        &set,
    ];
    for args in commands {
        assert_printable(&run(tool(&server, args)));
    }
}

#[test]
fn messages_of_a_server_can_not_forge_lines_of_the_log() {
    let server = RedisServer::start();
    let holder = Holder::of(&server, "k");
    let mut command = tool(&server, &["exec", "k", "true"]);
    command.env("SHARDLOCK_LOG", "debug");
    let mut waiter = Run::start(command);
    wait_until_waiting(&server, "k", 1);
    for inbox in server.channels() {
        server.command(&["PUBLISH", &inbox, HOSTILE]);
    }
    holder.go();
    let ended = waiter.end();
    assert!(ended.stderr.contains("not in this version's format"), "{ended:?}");
    assert_printable(&ended);
}

#[test]
fn inspect_fails_if_the_server_is_down() {
    let server = RedisServer::start();
    server.kill();
    let ended = run(tool(&server, &["inspect", "k"]));
    assert_eq!((ended.code, ended.stdout.as_str()), (69, ""), "{ended:?}");
}

#[test]
fn a_slot_is_known_without_any_server() {
    let ended = run(bare(&["slot", "foo"]));
    assert_eq!((ended.code, ended.stdout.as_str()), (0, "slot 12182\n"), "{ended:?}");
    let expected = json!({ "key": "foo", "slot": 12182, "shard": null, "shard_slots": null });
    assert_eq!(json(bare(&["slot", "foo", "--json"])), expected);

    // Nothing listens on port 1.
    let shards = ["--shard", "a=redis://127.0.0.1:1", "--shard", "redis://127.0.0.1:1/1"];
    let mut command = bare(&["slot", "foo", "--json"]);
    command.args(shards);
    let expected = json!({ "key": "foo", "slot": 12182, "shard": "shard-1", "shard_slots": [8192, 16383] });
    assert_eq!(json(command), expected);
    let mut command = bare(&["slot", "foo{}{bar}"]);
    command.args(shards);
    assert_eq!(
        run(command).stdout,
        "slot 8363 on shard shard-1, which owns 8192 to 16383\n"
    );
}

#[test]
fn flags_override_the_environment_and_that_overrides_the_file() {
    let notes = Notes::new();
    let file = notes.path("shardlock.toml");
    fs::write(&file, "shards = ['from-file=redis://127.0.0.1:1']\nttl = '5s'\n").unwrap();
    let shard = |flag: bool, variable: bool, file_by_flag: bool| {
        let mut command = bare(&["slot", "foo", "--json"]);
        if flag {
            command.args(["--shard", "from-flag=redis://127.0.0.1:1"]);
        }
        if variable {
            command.env("SHARDLOCK_SHARDS", "from-env=redis://127.0.0.1:1");
        }
        if file_by_flag {
            command.arg("--config").arg(&file);
        } else {
            command.env("SHARDLOCK_CONFIG", &file);
        }
        json(command)["shard"].clone()
    };
    assert_eq!(shard(false, false, true), "from-file");
    assert_eq!(shard(false, false, false), "from-file");
    assert_eq!(shard(false, true, true), "from-env");
    assert_eq!(shard(true, true, true), "from-flag");

    fs::write(&file, "tll = '5s'\n").unwrap();
    let mut command = bare(&["slot", "foo", "--config"]);
    command.arg(&file);
    let ended = run(command);
    assert_eq!(ended.code, 78, "{ended:?}");
    assert!(
        ended.stderr.contains("tll") && ended.stderr.contains("line 1"),
        "{ended:?}"
    );
}

#[test]
fn unused_argument_is_an_error() {
    let shard = "redis://127.0.0.1:1";
    let wrong: [(&[&str], &str); 7] = [
        (&["slot", "k", "--set", "ttl=1s", "--set", "ttl=2s"], "\"ttl\" twice"),
        (
            &["slot", "k", "--shard", shard, "--set", "shards=memory://"],
            "--shard and by --set shards",
        ),
        (
            &["slot", "k", "--shard", "redis+cluster://127.0.0.1:1/3"],
            "without a database",
        ),
        (&["slot", "k", "--shard", "redis://:@127.0.0.1:1"], "before the @"),
        (&["top", "--once", "http://127.0.0.1:1/other"], "has a path"),
        (
            &["top", "--once", "--scan", "5", "127.0.0.1:1"],
            "--scan is for looking at shards",
        ),
        (
            &["top", "--once", "--key", "k", "127.0.0.1:1"],
            "--key is for looking at shards",
        ),
    ];
    for (args, words) in wrong {
        let ended = run(bare(args));
        assert!(ended.code == 64 && ended.stderr.contains(words), "{args:?}: {ended:?}");
    }
}

#[test]
fn version_is_printed() {
    let ended = run(bare(&["--version"]));
    let expected = format!("shardlock {}\n", env!("CARGO_PKG_VERSION"));
    assert_eq!((ended.code, ended.stdout), (0, expected));
}
