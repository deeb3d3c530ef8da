//! A single frame of plain text.

use serde_json::{Value, json};
use support::server::free_port;
use support::{PATIENCE, RedisServer, wait_until};

use super::has;
use super::load::{HOT, LONG, Load, QUIET, STUCK};
use crate::tool::{bare, run};

fn lines(text: &str) -> Vec<String> {
    text.lines().map(str::to_owned).collect()
}

fn unused_address() -> String {
    format!("127.0.0.1:{}", free_port())
}

#[test]
fn all_views_are_printed_with_rates_and_whole_keys() {
    let server = RedisServer::start();
    let mut load = Load::start(&server, true);
    wait_until("all keys are contended", PATIENCE, || {
        load.wait_for_progress();
        let seen = run(bare(&["top", "--view", "hot", "--interval", "100ms", &load.address]));
        [HOT, LONG, STUCK].iter().all(|key| seen.stdout.contains(key))
    });
    // Even without `--once` only one frame is printed, since the output is not a terminal.
    for args in [
        &["top", "--once", "--interval", "300ms"][..],
        &["top", "--interval", "300ms"],
    ] {
        let ended = run(bare(&[args, &[load.address.as_str()]].concat()));
        assert_eq!((ended.code, ended.stderr.as_str()), (0, ""), "{ended:?}");
        let printed = lines(&ended.stdout);
        assert!(
            printed[0].starts_with(&format!("{} {}-", load.address, load.process())),
            "{printed:#?}"
        );
        assert!(printed[1].ends_with("1/1 shards up"), "{printed:#?}");
        let tables: Vec<_> = printed.split(String::is_empty).collect();
        assert_eq!(tables.len(), 4, "{printed:#?}");
        assert!(
            tables[1][0].starts_with("KEY ") && tables[1][0].ends_with("CONT/S▼"),
            "{printed:#?}"
        );
        assert!(has(tables[1], LONG) && has(tables[1], STUCK), "{printed:#?}");
        let hot = tables[1].iter().find(|line| line.starts_with(HOT)).unwrap();
        assert!(hot.split_whitespace().last().unwrap().parse::<f64>().is_ok(), "{hot}");
        let place = |key: &str| tables[2].iter().position(|line| line.starts_with(key));
        assert!(place(STUCK).is_some() && place(STUCK) < place(QUIET), "{printed:#?}");
        assert!(tables[2][1].contains("tests/cli/top/load.rs:"), "{printed:#?}");
        assert!(tables[3][1].starts_with("eu-1 "), "{printed:#?}");
        assert!(!ended.stdout.contains('\x1b'), "{printed:#?}");
    }
    let ended = run(bare(&[
        "top",
        "--view",
        "held",
        "--once",
        "--interval",
        "100ms",
        &load.address,
    ]));
    assert_eq!(lines(&ended.stdout).split(String::is_empty).count(), 2, "{ended:?}");
}

#[test]
fn snapshot_is_printed_as_json() {
    let server = RedisServer::start();
    let mut load = Load::start(&server, true);
    let gone = unused_address();
    let read = |load: &Load| {
        let args = ["top", "--once", "--json", "--interval", "100ms", &load.address, &gone];
        let ended = run(bare(&args));
        assert_eq!(ended.code, 69, "{ended:?}");
        serde_json::from_str::<Value>(&ended.stdout).unwrap_or_else(|error| panic!("{error}: {ended:?}"))
    };
    let find = |read: &Value, view: &str, key: &str| {
        let rows = read[view].as_array().expect("rows").iter();
        rows.into_iter().find(|row| row["key"] == key).cloned()
    };
    let mut seen = Value::Null;
    wait_until("a key is contended", PATIENCE, || {
        load.wait_for_progress();
        seen = read(&load);
        find(&seen, "hot", HOT).is_some_and(|hot| hot["contended_per_second"].is_f64())
            && find(&seen, "held", STUCK).is_some()
    });
    let manager = seen["sources"][0]["manager"].as_str().expect("a manager");
    assert!(manager.starts_with(&format!("{}-", load.process())), "{seen}");
    assert_eq!(seen["sources"][1]["unavailable"], "connection refused", "{seen}");
    let stuck = find(&seen, "held", STUCK).unwrap();
    assert_eq!(
        (&stuck["mode"], &stuck["holders"]),
        (&json!("exclusive"), &json!(1)),
        "{stuck}"
    );
    assert!(stuck["token"].is_u64() && stuck["age_ms"].is_u64(), "{stuck}");
    assert_eq!(
        (&seen["shards"][0]["name"], &seen["shards"][0]["up"]),
        (&json!("eu-1"), &json!(true))
    );
    assert!(seen["totals"]["locks_per_second"].is_f64(), "{seen}");

    let ended = run(bare(&[
        "top",
        "--once",
        "--json",
        "--view",
        "held",
        "--interval",
        "100ms",
        &load.address,
    ]));
    assert_eq!(ended.code, 0, "{ended:?}");
    let held: Value = serde_json::from_str(&ended.stdout).unwrap_or_else(|error| panic!("{error}: {ended:?}"));
    assert!(held["hot"].is_null() && held["held"].is_array(), "{held}");
}

#[test]
fn unavailable_endpoint_is_reported_and_sets_the_exit_code() {
    let server = RedisServer::start();
    let mut load = Load::start(&server, false);
    wait_until("a key is contended", PATIENCE, || {
        load.wait_for_progress();
        let seen = run(bare(&["top", "--view", "hot", "--interval", "100ms", &load.address]));
        seen.stdout.contains(HOT)
    });
    let gone = unused_address();
    // The shards in the environment do not matter if an address is given.
    let mut command = bare(&["top", "--once", &gone]);
    command
        .env("SHARDLOCK_CONFIG", "/nonexistent")
        .env("SHARDLOCK_SHARDS", "memory://x");
    let ended = run(command);
    assert_eq!((ended.code, ended.stdout.as_str()), (69, ""), "{ended:?}");
    assert_eq!(
        ended.stderr,
        format!(
            "shardlock: {gone} is unavailable: connection refused; give the address of a process that serves metrics, or \
             a --shard\n"
        )
    );
    let ended = run(bare(&[
        "top",
        "--once",
        "--interval",
        "100ms",
        "--admin",
        &gone,
        "--admin",
        &load.address,
    ]));
    assert_eq!(ended.code, 69, "{ended:?}");
    assert_eq!(
        ended.stderr,
        format!("shardlock: {gone} is unavailable: connection refused\n")
    );
    assert!(has(&lines(&ended.stdout), HOT), "{ended:?}");
}

#[test]
fn shard_that_is_down_is_reported_and_sets_the_exit_code() {
    let server = RedisServer::start();
    let load = Load::start(&server, false);
    server.kill();
    wait_until("the process has noticed it", PATIENCE, || {
        let ended = run(bare(&["top", "--view", "shards", "--interval", "100ms", &load.address]));
        assert!(
            ended.stdout.contains("0/1 shards up") == (ended.code == 69),
            "{ended:?}"
        );
        ended.code == 69 && ended.stderr == "shardlock: shard eu-1 is down\n"
    });
}

#[test]
fn error_of_a_wrong_command_line_names_the_mistake() {
    for (args, words) in [
        (&["https://a:1"][..], "plain HTTP"),
        (&["a:b"], "is not HOST:PORT"),
        (&["--interval", "1ms"], "from 100ms to 1h"),
        (&["--json", "127.0.0.1:1"], "--once"),
        (&["--view", "hat"], "[possible values: hot, held, shards, clients]"),
        (&["127.0.0.1:1", "--key", "k"], "--key is for looking at shards"),
        (&["127.0.0.1:1", "--shard", "memory://"], "cannot be used with"),
    ] {
        let ended = run(bare(&[&["top"], args].concat()));
        assert_eq!(ended.code, 64, "{ended:?}");
        assert!(ended.stderr.contains(words), "{ended:?}");
    }
}
