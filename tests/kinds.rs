//! The tool on shards of each kind that other processes can reach.

// A test is over when its surroundings fail.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

mod support;
mod support_locks;
mod tool;

use std::process::Command;

use serde_json::Value;
use shardlock::Config;
use support::worker;
use support_locks::{TestStore, lock, on_each_store};
use tool::{bare, run};

/// The settings of a manager of that store, as environment variables of the tool.
fn with_settings(store: &TestStore, args: &[&str]) -> Command {
    let (mut command, settings) = (bare(args), store.builder().build_config().expect("good settings"));
    let millis = |time: std::time::Duration| format!("{}ms", time.as_millis());
    let defaults = Config::default();
    if settings.redlock_max_ttl != defaults.redlock_max_ttl {
        command.env("SHARDLOCK_REDLOCK_MAX_TTL", millis(settings.redlock_max_ttl));
    }
    if settings.ttl != defaults.ttl {
        command.env("SHARDLOCK_TTL", millis(settings.ttl));
    }
    command.env("SHARDLOCK_NAMESPACE", store.namespace());
    command.env("SHARDLOCK_SHARDS", store.urls().join(" "));
    command
}

#[test]
fn worker_entry() {
    if let Some(me) = worker::current() {
        panic!("no worker is called {}", me.name());
    }
}

on_each_store! { on(servers);
    async fn a_command_runs_under_a_lock_that_others_see(store: &TestStore) {
        let locks = store.manager().await;
        let guard = lock(&locks, "taken").await;
        let ended = run(with_settings(store, &["exec", "-n", "taken", "true"]));
        assert_ne!(ended.code, 0, "{ended:?}");
        let inspected = run(with_settings(store, &["inspect", "--json", "taken"]));
        assert!(inspected.stdout.contains(locks.id()), "{inspected:?}");
        guard.release().await.expect("release");

        let ended = run(with_settings(store, &["exec", "free", "--", "sh", "-c", "echo $LOCK_KEY $LOCK_TOKEN; exit 7"]));
        assert_eq!(ended.code, 7, "{ended:?}");
        let mut words = ended.stdout.split_whitespace();
        assert_eq!(words.next(), Some("free"), "{ended:?}");
        let token: u64 = words.next().expect("a token").parse().expect("a number");
        let guard = lock(&locks, "free").await;
        assert!(guard.token().get() > token, "{} after {token}", guard.token());
        guard.release().await.expect("release");
        store.is_clean().await;
    }

    async fn what_is_held_in_the_shards_is_seen_without_an_endpoint(store: &TestStore) {
        let locks = store.manager().await;
        let (taken, other) = (lock(&locks, "taken").await, lock(&locks, "{tag} 100%").await);
        let is_etcd = store.urls().iter().any(|url| url.starts_with("etcd"));
        let searched = run(with_settings(store, &["top", "--once", "--interval", "100ms"]));
        let named = run(with_settings(store, &["top", "--once", "--interval", "100ms", "--key", "taken", "--key", "{tag} 100%"]));
        let holder = locks.id().rsplit_once('-').expect("host-pid-random").0;
        for (ended, is_seen) in [(searched, !is_etcd), (named, true)] {
            assert_eq!(ended.code, 0, "{ended:?}");
            for key in ["taken ", "{tag} 100% "] {
                let line = ended.stdout.lines().find(|line| line.starts_with(key));
                assert_eq!(line.is_some_and(|line| line.contains(holder)), is_seen, "{ended:?}");
            }
            let says_why = ended.stdout.contains("keys of etcd:// can't be searched; name them with --key");
            assert_eq!(says_why, !is_seen, "{ended:?}");
        }
        taken.release().await.expect("release");
        other.release().await.expect("release");
    }

    async fn the_demo_comes_to_its_result_and_leaves_nothing(store: &TestStore) {
        let small = ["demo", "--json", "--processes", "2", "--tasks", "8", "--keys", "20", "--seconds", "0.5"];
        let shards = store.urls().iter().flat_map(|url| ["--shard", url]);
        let args: Vec<&str> = small.into_iter().chain(shards).collect();
        let ended = run(with_settings(store, &args));
        assert_eq!(ended.code, 0, "{}{}", ended.stdout, ended.stderr);
        let figures: Value = serde_json::from_str(ended.stdout.lines().last().expect("a line")).expect("JSON");
        let number = |pointer: &str| figures.pointer(pointer).and_then(Value::as_f64).expect("a number");
        assert_eq!(number("/locked/claimed"), 10.0, "{figures}");
        assert_eq!(number("/locked/token_regressions"), 0.0, "{figures}");
        assert!(number("/jobs/completed") > 0.0, "{figures}");
        assert_eq!(number("/jobs/lost_updates"), 0.0, "{figures}");
        assert_eq!(number("/jobs/token_regressions"), 0.0, "{figures}");
        let left: Vec<_> = store.servers().names().into_iter().filter(|name| name.contains("demo:")).collect();
        assert_eq!(left, [""; 0]);
    }

    async fn the_bench_asks_the_servers_for_what_they_did_and_leaves_nothing(store: &TestStore) {
        let ended = run(with_settings(store, &["bench", "--json", "--processes", "2", "--tasks", "2", "--keys", "20", "--duration", "500ms"]));
        assert_eq!(ended.code, 0, "{}{}", ended.stdout, ended.stderr);
        let figures: Value = serde_json::from_str(&ended.stdout).expect("JSON");
        let number = |pointer: &str| figures.pointer(pointer).and_then(Value::as_f64).expect("a number");
        assert!(number("/locks") > 0.0, "{figures}");
        if store.urls().iter().any(|url| url.starts_with("etcd")) {
            assert!(figures["server"]["scripts_per_lock"].is_null(), "{figures}");
        } else {
            assert!(number("/server/scripts_per_lock") > 0.5, "{figures}");
        }
        let left: Vec<_> = store.servers().names().into_iter().filter(|name| name.contains("bench:")).collect();
        assert_eq!(left, [""; 0]);
    }

    async fn an_erased_namespace_is_as_new_but_for_its_tokens(store: &TestStore) {
        let locks = store.manager().await;
        let guard = lock(&locks, "k").await;
        let token = guard.token();
        guard.release().await.expect("release");
        assert!(locks.erase_namespace().await.expect("erase") > 0);
        assert_eq!(locks.erase_namespace().await.expect("erase"), 0);
        let ours = |name: &String| name.starts_with(store.namespace()) && !name.contains("in:") && !name.contains("%in/");
        let left: Vec<_> = store.servers().names().into_iter().filter(ours).collect();
        assert_eq!(left, [""; 0]);
        let again = store.manager().await;
        let guard = lock(&again, "k").await;
        assert!(guard.token() > token, "{} after {token}", guard.token());
        guard.release().await.expect("release");
    }
}
