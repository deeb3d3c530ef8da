//! The tool on each kind of shard that other processes can reach.

mod cluster;
#[cfg(feature = "etcd")]
mod etcd;
mod sentinel;

use std::process::Command;

use serde_json::Value;
use shardlock::LossReason;
use shardlock::config::Config;
use support::RedisServer;
use support_locks::{TestStore, lock, on_each_store, soon, until, until_queued};

use crate::tool::{Run, bare, run};

/// The settings of a manager of this store, as environment variables of the tool.
fn with_settings(store: &TestStore, args: &[&str]) -> Command {
    let (mut command, settings) = (bare(args), store.builder().build_config().expect("good settings"));
    let millis = |time: std::time::Duration| format!("{}ms", time.as_millis());
    let defaults = Config::default();
    if settings.redlock_max_ttl != defaults.redlock_max_ttl {
        command.env("SHARDLOCK_REDLOCK_MAX_TTL", millis(settings.redlock_max_ttl));
    }
    // A tool on a busy machine may take longer than the default to connect.
    if settings.store_timeout != defaults.store_timeout {
        command.env("SHARDLOCK_STORE_TIMEOUT", millis(settings.store_timeout));
    }
    if settings.ttl != defaults.ttl {
        command.env("SHARDLOCK_TTL", millis(settings.ttl));
    }
    command.env("SHARDLOCK_NAMESPACE", store.namespace());
    command.env("SHARDLOCK_SHARDS", store.urls().join(" "));
    command
}

on_each_store! { on(servers);
    async fn command_runs_under_a_lock_visible_to_other_managers(store: &TestStore) {
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

    async fn top_shows_held_keys_without_an_admin_endpoint(store: &TestStore) {
        let locks = store.manager().await;
        let (taken, other) = (lock(&locks, "taken").await, lock(&locks, "{tag} 100%").await);
        let searched = run(with_settings(store, &["top", "--once", "--interval", "100ms"]));
        let named = run(with_settings(store, &["top", "--once", "--interval", "100ms", "--key", "taken", "--key", "{tag} 100%"]));
        let holder = locks.id().rsplit_once('-').expect("host-pid-random").0;
        for ended in [searched, named] {
            assert_eq!(ended.code, 0, "{ended:?}");
            for key in ["taken ", "{tag} 100% "] {
                let line = ended.stdout.lines().find(|line| line.starts_with(key));
                assert!(line.is_some_and(|line| line.contains(holder)), "{ended:?}");
            }
        }
        taken.release().await.expect("release");
        other.release().await.expect("release");
    }

    async fn held_keys_of_all_shards_are_listed(store: &TestStore) {
        let locks = store.manager().await;
        let (taken, other) = (lock(&locks, "taken").await, lock(&locks, "{tag} 100%").await);
        lock(&locks, "free").await.release().await.expect("release");
        let list = |args: &[&str]| {
            let mut command = with_settings(store, &[&["ls", "--json"], args].concat());
            let ended = run({
                command.env("SHARDLOCK_STORE_TIMEOUT", "20s");
                command
            });
            assert_eq!(ended.code, 0, "{ended:?}");
            serde_json::from_str::<Value>(&ended.stdout).expect("JSON")
        };
        let listed = list(&[]);
        let keys: Vec<_> = listed["keys"].as_array().expect("keys").iter().map(|row| &row["key"]).collect();
        assert_eq!(keys, ["taken", "{tag} 100%"], "{listed}");
        assert_eq!(listed["more"], false, "{listed}");
        for (row, guard) in [(&listed["keys"][0], &taken), (&listed["keys"][1], &other)] {
            assert_eq!((&row["mode"], &row["holder_count"]), (&"exclusive".into(), &1.into()), "{listed}");
            assert_eq!(row["holders"][0]["owner"], guard.owner().as_str(), "{listed}");
            assert!(row["holders"][0]["remaining_ms"].is_u64(), "{listed}");
        }
        let tagged = list(&["{tag}"]);
        assert_eq!(tagged["keys"].as_array().map(Vec::len), Some(1), "{tagged}");
        assert_eq!(tagged["keys"][0]["key"], "{tag} 100%");
        let limited = list(&["--limit", "1"]);
        assert_eq!((limited["keys"].as_array().map(Vec::len), &limited["more"]), (Some(1), &Value::Bool(true)));
        taken.release().await.expect("release");
        other.release().await.expect("release");
    }

    async fn a_broken_lease_passes_to_the_next_waiter_and_its_guard_is_lost(store: &TestStore) {
        let locks = store.manager().await;
        let guard = lock(&locks, "k").await;
        let mut waiter = Run::start(with_settings(store, &["exec", "k", "sh", "-c", "echo $LOCK_TOKEN"]));
        until_queued(&locks, "k", 1).await;
        let ended = run(with_settings(store, &["break", "k", "--owner", &guard.owner()]));
        if store.urls().iter().any(|url| url.starts_with("redlock") || url.starts_with("etcd")) {
            assert!(ended.code == 69 && ended.stderr.contains("end that process"), "{ended:?}");
            guard.release().await.expect("the lease is still the guard's");
            assert_eq!(waiter.end().code, 0);
            return;
        }
        assert_eq!(ended.code, 0, "{ended:?}");
        let next = waiter.end();
        assert_eq!(next.code, 0, "{next:?}");
        let theirs: u64 = next.stdout.trim().parse().expect("a token");
        assert!(theirs > guard.token().get(), "{theirs} after {}", guard.token());
        // A renewal has found it: a lease that is not renewed would have expired.
        assert_eq!(soon("the loss", guard.lost()).await, LossReason::Taken);
        drop(guard);
        store.is_clean().await;
    }

    async fn demo_completes_and_leaves_nothing(store: &TestStore) {
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

    async fn bench_reports_server_statistics_and_leaves_nothing(store: &TestStore) {
        let ended = run(with_settings(store, &["bench", "--json", "--processes", "2", "--tasks", "2", "--keys", "20", "--duration", "2s"]));
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

    async fn read_only_commands_store_no_map(store: &TestStore) {
        let commands: [&[&str]; 8] = [
            &["inspect", "k"],
            &["ls"],
            &["break", "k", "--owner", "nobody"],
            &["map", "show"],
            &["doctor"],
            &["top", "--once", "--interval", "100ms"],
            &["top", "--once", "--interval", "100ms", "--key", "k"],
            &["slot", "k"],
        ];
        for args in commands {
            let ended = run(with_settings(store, args));
            assert!(ended.code <= 2, "{args:?}: {ended:?}");
            assert!(store.servers().maps(store.namespace()).is_empty(), "{args:?}");
        }
        let ended = run(with_settings(store, &["exec", "k", "true"]));
        assert_eq!(ended.code, 0, "{ended:?}");
        assert!(!store.servers().maps(store.namespace()).is_empty());
    }

    async fn shard_map_is_replaced_only_while_unused(store: &TestStore) {
        let locks = store.manager().await;
        lock(&locks, "k").await.release().await.expect("release");
        let old = store.servers().maps(store.namespace());
        let shown = run(with_settings(store, &["map", "show", "--json"]));
        let shown: Value = serde_json::from_str(&shown.stdout).expect("JSON");
        assert_eq!(shown["agrees"], true, "{shown}");
        assert_eq!(shown["shards"].as_array().expect("shards").len(), old.len(), "{shown}");

        // A shard is added.
        let more = RedisServer::start();
        let grown = |args: &[&str]| {
            let mut command = with_settings(store, args);
            command.env("SHARDLOCK_SHARDS", format!("{} {}", store.urls().join(" "), more.url()));
            run(command)
        };
        let expected = "--expect 'v2 shard-0:0-16383'";
        let shown = grown(&["map", "show"]);
        assert_eq!(shown.code, 0, "{shown:?}");
        assert!(shown.stdout.contains(expected) && shown.stdout.contains("stored      none"), "{shown:?}");
        let set = ["map", "set", "--expect", "v2 shard-0:0-16383"];
        let guard = lock(&locks, "k").await;
        let refused = [
            (grown(&["exec", "k", "true"]), 78, "`shardlock map set`"),
            (grown(&["map", "set", "--expect", "v2 other:0-8191"]), 78, "which is not expected; nothing was written"),
            (grown(&set), 69, "nothing was written"),
        ];
        for (ended, code, words) in refused {
            assert!(ended.code == code && ended.stderr.contains(words), "{ended:?}");
        }
        assert_eq!(store.servers().maps(store.namespace()), old);
        assert_eq!(more.keys(), [""; 0]);

        guard.release().await.expect("the lock was held throughout");
        locks.shutdown().await.ok();
        drop(locks);
        until("no inbox is left", async || grown(&set).code == 0).await;
        let new = store.servers().maps(store.namespace());
        assert!(new.len() == old.len() && new.iter().all(|map| map.starts_with("v2 shard-0:0-8191,shard-1:8192-16383 here=shard-0")), "{new:?}");
        let again = grown(&set);
        assert!(again.code == 0 && again.stdout.contains("nothing was written"), "{again:?}");
        assert_eq!(grown(&["exec", "k", "true"]).code, 0);
        assert_eq!(run(with_settings(store, &["exec", "k", "true"])).code, 78);
    }

    async fn forced_shard_map_ends_locks_of_running_managers(store: &TestStore) {
        let locks = store.manager().await;
        let guard = lock(&locks, "k").await;
        let more = RedisServer::start();
        let mut command = with_settings(store, &["map", "set", "--force", "--expect", "v2 shard-0:0-16383"]);
        command.env("SHARDLOCK_SHARDS", format!("{} {}", store.urls().join(" "), more.url()));
        let ended = run(command);
        assert_eq!(ended.code, 0, "{ended:?}");
        assert_eq!(soon("the loss", guard.lost()).await, LossReason::ShardMap);
    }

    async fn erased_namespace_keeps_only_its_token_counters(store: &TestStore) {
        let locks = store.manager().await;
        let guard = lock(&locks, "k").await;
        let token = guard.token();
        guard.release().await.expect("release");
        let erase = async || {
            let mut erased = 0;
            // A node of a quorum that a busy machine keeps from answering counts as down for a
            // moment, and nothing is erased there.
            until("all servers are erased", async || match shardlock::namespace::erase(&locks).await {
                Ok(count) => {
                    erased = count;
                    true
                }
                Err(error) => {
                    assert!(error.is_retryable(), "{error}");
                    false
                }
            })
            .await;
            erased
        };
        assert!(erase().await > 0);
        assert_eq!(erase().await, 0);
        let ours = |name: &String| name.starts_with(store.namespace()) && !name.contains("in:") && !name.contains("%in/");
        let left: Vec<_> = store.servers().names().into_iter().filter(ours).collect();
        assert_eq!(left, [""; 0]);
        let again = store.manager().await;
        let guard = lock(&again, "k").await;
        assert!(guard.token() > token, "{} after {token}", guard.token());
        guard.release().await.expect("release");
    }
}

on_each_store! { on(permits_of_servers);
    // A killed manager no longer listens, but its lease lasts until its TTL.
    async fn shard_map_is_kept_while_leases_of_dead_managers_last(store: &TestStore) {
        let more = RedisServer::start();
        for mode in [&[][..], &["--shared"], &["--permits", "2/3"]] {
            let namespace = format!("{}{}:", store.namespace(), mode.join(""));
            let in_namespace = |args: &[&str]| {
                let mut command = with_settings(store, args);
                command.env("SHARDLOCK_NAMESPACE", &namespace).env("SHARDLOCK_TTL", "60s");
                command
            };
            let hold = [&["exec"], mode, &["k", "sh", "-c", "echo held; exec sleep 600"]].concat();
            let mut holder = Run::start(in_namespace(&hold));
            holder.wait_until_it_prints("held");
            holder.kill_keeper();
            let inbox = format!("{namespace}in:");
            let is_inbox = |name: &String| name.starts_with(&inbox);
            until("the holder no longer listens", async || !store.servers().names().iter().any(is_inbox)).await;
            let old = store.servers().maps(&namespace);
            let mut set = in_namespace(&["map", "set", "--expect", "v2 shard-0:0-16383"]);
            set.env("SHARDLOCK_SHARDS", format!("{} {}", store.urls().join(" "), more.url()));
            let refused = run(set);
            assert_eq!(refused.code, 69, "{mode:?}: {refused:?}");
            assert!(refused.stderr.contains("is held or waited for by"), "{mode:?}: {refused:?}");
            assert_eq!(store.servers().maps(&namespace), old, "{mode:?}");
        }
    }
}
