//! `shardlock break` on one server. For other kinds of shards see kinds/.

use serde_json::Value;
use support::{PATIENCE, RedisServer, wait_until};

use crate::tool::{Ended, Holder, PATIENT, Run, is_held, patient, run, wait_until_waiting};

#[track_caller]
fn broken(server: &RedisServer, key: &str, owner: &str) -> Ended {
    run(patient(server, &["break", key, "--owner", owner]))
}

/// The owners that `inspect` shows.
fn holders(server: &RedisServer, key: &str) -> Vec<String> {
    let shown = run(patient(server, &["inspect", "--json", key])).stdout;
    let shown: Value = serde_json::from_str(&shown).expect("JSON");
    let all = shown["holders"].as_array().expect("holders").iter();
    let owners = all
        .chain([&shown["holder"]])
        .filter_map(|holder| holder["owner"].as_str());
    owners.map(str::to_owned).collect()
}

#[test]
fn break_requires_the_current_owner() {
    let server = RedisServer::start();
    let holder = Holder::with(&server, &PATIENT, "k");
    let waiter = Run::start(patient(&server, &["exec", "k", "true"]));
    wait_until_waiting(&server, "k", 1);
    let owner: String = server.query(&["GET", "lock:k"]);
    let waiting: Vec<String> = server.query(&["ZRANGE", "{lock:k}:q", "0", "-1"]);
    let manager = owner.split_once(':').unwrap().0;
    let repeat = format!("repeat the command with --owner {owner}");
    let ended = run(patient(&server, &["break", "k"]));
    assert!(ended.code == 64 && ended.stderr.contains(&repeat), "{ended:?}");
    for other in [manager, "", &format!("{manager}:2"), &waiting[0]] {
        let ended = broken(&server, "k", other);
        assert!(
            ended.code == 1 && ended.stderr.contains(&repeat),
            "{other:?}: {ended:?}"
        );
        assert!(ended.stderr.contains("nothing was changed"), "{ended:?}");
    }
    assert_eq!(server.query::<String>(&["GET", "lock:k"]), owner);
    assert_eq!(
        server.query::<Vec<String>>(&["ZRANGE", "{lock:k}:q", "0", "-1"]),
        waiting
    );
    let ended = run(patient(&server, &["break", "free"]));
    assert!(
        ended.code == 1 && ended.stderr.contains("nobody holds free"),
        "{ended:?}"
    );
    holder.go();
    assert_eq!({ waiter }.end().code, 0);
}

#[test]
fn command_with_a_broken_lease_ends_at_its_next_renewal() {
    let server = RedisServer::start();
    let mut holder = Run::start(patient(&server, &["exec", "--ttl", "3s", "k", "sleep", "600"]));
    wait_until("the command has the lock", PATIENCE, || is_held(&server, "k"));
    let owner: String = server.query(&["GET", "lock:k"]);
    let ended = broken(&server, "k", &owner);
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(
        ended
            .stdout
            .starts_with(&format!("ended    the lease of {owner}, which had ")),
        "{ended:?}"
    );
    assert!(ended.stdout.ends_with("holder   nobody\nwaiting  0\n"), "{ended:?}");
    assert!(!is_held(&server, "k"));
    let lost = holder.end();
    assert!(lost.code == 117 && lost.stderr.contains("k"), "{lost:?}");
    assert_eq!(broken(&server, "k", &owner).code, 1);
}

#[test]
fn holders_of_a_key_are_broken_one_at_a_time() {
    let server = RedisServer::start();
    let _readers = [1, 2].map(|_| Holder::with(&server, &[&PATIENT[..], &["--shared"]].concat(), "prices"));
    let mut writer = Run::start(patient(&server, &["exec", "prices", "true"]));
    wait_until_waiting(&server, "prices", 1);
    let both = holders(&server, "prices");
    assert_eq!(both.len(), 2);
    assert_eq!(broken(&server, "prices", &both[0]).code, 0);
    assert_eq!(holders(&server, "prices"), both[1..]);
    assert!(writer.is_running());
    assert_eq!(broken(&server, "prices", &both[1]).code, 0);
    assert_eq!(writer.end().code, 0);

    let _callers = [1, 2].map(|_| Holder::with(&server, &[&PATIENT[..], &["--permits", "1/2"]].concat(), "calls"));
    let mut third = Run::start(patient(&server, &["exec", "--permits", "1/2", "calls", "true"]));
    wait_until_waiting(&server, "calls", 1);
    let ended = broken(&server, "calls", &holders(&server, "calls")[1]);
    assert_eq!(ended.code, 0, "{ended:?}");
    assert_eq!(third.end().code, 0);
}

/// The message shows what does not do anything to a terminal, and the owner is named like that.
#[test]
fn unprintable_owner_is_accepted_in_its_escaped_form() {
    let server = RedisServer::start();
    server.command(&["SET", "lock:k", "\u{1}\u{1b}[31mred"]);
    let ended = run(patient(&server, &["break", "k"]));
    let shown = r"\u{1}\u{1b}[31mred";
    assert!(ended.code == 64 && ended.stderr.contains(shown), "{ended:?}");
    let ended = broken(&server, "k", shown);
    assert!(ended.code == 0 && ended.stdout.contains(shown), "{ended:?}");
    assert!(!is_held(&server, "k"));
}

#[test]
fn the_value_of_another_library_is_broken_if_it_is_named_exactly() {
    let server = RedisServer::start();
    server.command(&["SET", "lock:k", "it's theirs"]);
    let mut waiter = Run::start(patient(&server, &["exec", "k", "true"]));
    wait_until_waiting(&server, "k", 1);
    let ended = broken(&server, "k", "it's their");
    assert!(
        ended.code == 1 && ended.stderr.contains(r"--owner 'it'\''s theirs'"),
        "{ended:?}"
    );
    let ended = run(patient(&server, &["break", "k", "--json", "--owner", "it's theirs"]));
    assert_eq!(ended.code, 0, "{ended:?}");
    let shown: Value = serde_json::from_str(&ended.stdout).expect("JSON");
    assert_eq!((&shown["key"], &shown["broken"]), (&"k".into(), &"it's theirs".into()));
    assert_eq!(shown["remaining_ms"], Value::Null);
    assert_eq!(waiter.end().code, 0);
}
