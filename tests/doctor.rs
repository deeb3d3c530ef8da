//! `shardlock doctor` on real servers, each of which is wrong in one way.

// A test is over when its surroundings fail.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

mod support;
mod tool;

use std::collections::BTreeMap;
use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::process::Command;

use serde_json::Value;

use support::{PATIENCE, RedisServer, wait_until};
use tool::{Holder, bare, run};

/// A server that is as it should be.
const GOOD: [&str; 2] = ["--appendonly", "yes"];

fn good_and(more: &[&str]) -> RedisServer {
    RedisServer::start_with(&[&GOOD, more].concat())
}

/// What the doctor says.
struct Said {
    code: i32,
    json: Value,
}

/// Runs the doctor with these shards and arguments.
#[track_caller]
fn doctor(shards: &[&str], args: &[&str]) -> Said {
    let ended = run(command(shards, &[&["--json"], args].concat()));
    let json: Value = serde_json::from_str(&ended.stdout).unwrap_or_else(|error| panic!("{error}: {ended:?}"));
    assert_eq!(json["exit_code"], ended.code, "{ended:?}");
    Said { code: ended.code, json }
}

fn command(shards: &[&str], args: &[&str]) -> Command {
    let mut command = bare(&["doctor"]);
    command.args(args).env("SHARDLOCK_SHARDS", shards.join(" "));
    command
}

impl Said {
    /// All findings, as where, check and the finding itself.
    fn all(&self) -> Vec<(&str, &str, &Value)> {
        let mut lists = vec![("settings", &self.json["settings"])];
        for shard in self.json["shards"].as_array().unwrap() {
            lists.push((shard["name"].as_str().unwrap(), &shard["findings"]));
            for server in shard["servers"].as_array().unwrap() {
                lists.push((server["server"].as_str().unwrap(), &server["findings"]));
            }
        }
        lists
            .into_iter()
            .flat_map(|(place, findings)| findings.as_array().unwrap().iter().map(move |finding| (place, finding)))
            .map(|(place, finding)| (place, finding["check"].as_str().unwrap(), finding))
            .collect()
    }

    /// The one finding of this check.
    #[track_caller]
    fn one(&self, check: &str) -> &Value {
        self.at(None, check)
    }

    /// The one finding of this check at this place.
    #[track_caller]
    fn at(&self, place: Option<&str>, check: &str) -> &Value {
        let found: Vec<_> = self
            .all()
            .into_iter()
            .filter(|(at, name, _)| *name == check && place.is_none_or(|place| place == *at))
            .collect();
        let [(_, _, finding)] = &found[..] else {
            panic!("{} findings of {check}: {:#}", found.len(), self.json)
        };
        finding
    }

    /// What is worse than a note, as check and level.
    fn complaints(&self) -> BTreeMap<String, String> {
        self.all()
            .into_iter()
            .filter(|(_, _, finding)| finding["level"] == "warning" || finding["level"] == "error")
            .map(|(_, check, finding)| (check.to_owned(), finding["level"].as_str().unwrap().to_owned()))
            .collect()
    }

    /// That this is all there is to complain of, with these words on why or how to mend it.
    #[track_caller]
    fn complains_only(&self, check: &str, level: &str, words: &[&str]) {
        let expected = BTreeMap::from([(check.to_owned(), level.to_owned())]);
        assert_eq!(self.complaints(), expected, "{:#}", self.json);
        assert_eq!(self.code, if level == "error" { 2 } else { 1 });
        let text = self.one(check).to_string();
        for word in words {
            assert!(text.contains(word), "no {word:?} in {text}");
        }
    }
}

#[test]
fn a_good_server_has_nothing_to_complain_of_and_is_left_as_it_is() {
    let server = good_and(&[]);
    let said = doctor(&[&server.url()], &[]);
    assert_eq!(said.complaints(), BTreeMap::new(), "{:#}", said.json);
    assert_eq!(said.code, 0);
    for check in [
        "reachable",
        "version",
        "role",
        "acl",
        "maxmemory-policy",
        "persistence",
        "clock",
        "shard-map",
        "ttl",
    ] {
        let finding = said.one(check);
        assert_eq!(
            (&finding["level"], &finding["why"], &finding["mend"]),
            (&"ok".into(), &Value::Null, &Value::Null)
        );
    }
    assert_eq!(said.one("access")["level"], "note");
    assert_eq!(said.json["counts"]["error"], 0);
    assert_eq!(said.json["shards"][0]["servers"][0]["part"], "primary");
    assert_eq!((server.dbsize(), server.publishes(), server.calls("set")), (0, 0, 0));
    assert_eq!(server.channels(), Vec::<String>::new());

    let ended = run(command(&[&server.url()], &[]));
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(ended.stdout.contains("ok      maxmemory-policy"), "{ended:?}");
    assert!(
        ended.stdout.contains("0 errors, 0 warnings") && !ended.stdout.contains('\x1b'),
        "{ended:?}"
    );
}

#[test]
fn locks_that_are_in_use_are_left_alone() {
    let server = good_and(&[]);
    let holder = Holder::of(&server, "k");
    let before = server.keys();
    let said = doctor(&[&server.url()], &[]);
    assert_eq!(said.code, 0, "{:#}", said.json);
    assert!(
        said.one("shard-map")["found"]
            .as_str()
            .unwrap()
            .contains("as configured: v1 shard-0:0-16383")
    );
    assert_eq!(server.keys(), before);
    holder.go();
}

#[test]
fn a_server_that_may_evict_locks_is_an_error() {
    let server = good_and(&["--maxmemory-policy", "allkeys-lru", "--maxmemory", "100mb"]);
    let said = doctor(&[&server.url()], &[]);
    said.complains_only(
        "maxmemory-policy",
        "error",
        &[
            "allkeys-lru, with maxmemory 100.0 MB",
            "CONFIG SET maxmemory-policy noeviction",
        ],
    );
    server.command(&["CONFIG", "SET", "maxmemory", "0"]);
    let said = doctor(&[&server.url()], &[]);
    assert_eq!((said.code, &said.one("maxmemory-policy")["level"]), (0, &"note".into()));
    // What the doctor says mends it.
    server.command(&["CONFIG", "SET", "maxmemory-policy", "noeviction"]);
    assert_eq!(doctor(&[&server.url()], &[]).one("maxmemory-policy")["level"], "ok");
}

#[test]
fn a_server_that_forgets_on_restart_is_warned_of() {
    let server = RedisServer::start();
    let said = doctor(&[&server.url()], &[]);
    said.complains_only(
        "persistence",
        "warning",
        &["a restart forgets all locks", "CONFIG SET appendonly yes"],
    );
    assert_eq!(said.json["level"], "warning");
}

#[test]
fn settings_that_make_hand_offs_slow_are_told() {
    let server = good_and(&[
        "--client-output-buffer-limit",
        "pubsub 1mb 1mb 60",
        "--timeout",
        "30",
        "--tcp-keepalive",
        "0",
    ]);
    let said = doctor(&[&server.url()], &[]);
    said.complains_only("pubsub-limits", "warning", &["CONFIG SET client-output-buffer-limit"]);
    assert_eq!(said.one("timeout")["level"], "note");
    assert_eq!(said.one("tcp-keepalive")["level"], "note");
}

#[test]
fn a_password_that_is_missing_or_wrong_is_an_error_that_does_not_show_it() {
    let server = good_and(&["--requirepass", "s3cret"]);
    let said = doctor(&[&server.url()], &[]);
    said.complains_only("reachable", "error", &["asks for a password", "redis://:password@host"]);

    let wrong = format!("redis://:wr0ng@{}", server.address());
    let ended = run(command(&[&wrong], &[]));
    assert_eq!(ended.code, 2, "{ended:?}");
    assert!(ended.stdout.contains("the login was refused"), "{ended:?}");
    assert!(!format!("{ended:?}").contains("wr0ng"), "{ended:?}");

    let right = format!("redis://:s3cret@{}", server.address());
    let said = doctor(&[&right], &[]);
    assert_eq!(
        (said.code, &said.one("access")["level"]),
        (0, &"ok".into()),
        "{:#}",
        said.json
    );
    assert!(!said.json.to_string().contains("s3cret"));
}

const RULES: &str = "on >s3cret ~lock:* ~{lock:* &lock:in:* +@all -@dangerous +role";

#[test]
fn a_permission_that_is_missing_is_named_with_the_command_that_gives_it() {
    let server = good_and(&[]);
    let url = format!("redis://locks:s3cret@{}", server.address());
    let set_user = |rules: &str| {
        let mut words = vec!["ACL", "SETUSER", "locks", "reset"];
        words.extend(rules.split(' '));
        server.command(&words);
    };
    set_user(RULES);
    let said = doctor(&[&url], &[]);
    assert_eq!((said.code, said.complaints()), (0, BTreeMap::new()), "{:#}", said.json);
    // It may not look at the settings either, which is a note.
    assert_eq!(said.one("config")["level"], "note");
    assert!(
        said.one("config")["mend"]
            .as_str()
            .unwrap()
            .contains("ACL SETUSER locks +config|get")
    );
    assert_eq!(said.one("info")["level"], "note");

    for (rules, lacking, rule) in [
        (format!("{RULES} -zpopmin"), "may not run ZPOPMIN", "+zpopmin"),
        (
            format!("{RULES} -@scripting"),
            "may not run EVAL, EVALSHA",
            "+eval +evalsha",
        ),
        (
            format!("{RULES} -subscribe -publish"),
            "may not run PUBLISH, SUBSCRIBE",
            "+publish +subscribe",
        ),
        (
            RULES.replace("~{lock:* ", ""),
            "has no access to keys {lock:*",
            "~{lock:*",
        ),
        (
            RULES.replace("&lock:in:* ", "&other:* "),
            "has no access to channels lock:in:*",
            "&lock:in:*",
        ),
        (
            RULES.replace("~lock:* ", "~other:* "),
            "has no access to keys lock:*",
            "~lock:*",
        ),
    ] {
        // By trying, and by asking the server what it would do.
        for rehearsal in ["", " +acl|dryrun +acl|whoami"] {
            set_user(&format!("{rules}{rehearsal}"));
            let said = doctor(&[&url], &[]);
            let mend = format!("ACL SETUSER locks {rule} ");
            said.complains_only("acl", "error", &[&format!("user locks {lacking}\""), &mend]);
        }
        // What the doctor says mends it.
        let mut mend = vec!["ACL", "SETUSER", "locks"];
        mend.extend(rule.split(' '));
        server.command(&mend);
        assert_eq!(doctor(&[&url], &[]).code, 0, "{rules}");
    }

    // A replica is known even so, and a database that may not be chosen.
    set_user(RULES);
    server.command(&["REPLICAOF", "127.0.0.1", "1"]);
    doctor(&[&url], &[]).complains_only("writes", "error", &["READONLY", "a replica"]);
    server.command(&["REPLICAOF", "NO", "ONE"]);
    set_user(&format!("{RULES} -select"));
    doctor(&[&format!("{url}/1")], &[]).complains_only("reachable", "error", &["ACL SETUSER <user> +select"]);
    assert_eq!(server.dbsize(), 0);
}

#[test]
fn a_replica_given_as_shard_is_an_error_that_names_the_primary() {
    let primary = good_and(&[]);
    let port = primary.port().to_string();
    let replica = good_and(&["--replicaof", "127.0.0.1", &port]);
    wait_until("the replica follows", PATIENCE, || {
        let info: String = replica.query(&["INFO", "replication"]);
        info.contains("master_link_status:up")
    });
    let said = doctor(&[&replica.url()], &[]);
    let mend = format!("redis://{}", primary.address());
    said.complains_only("role", "error", &["READONLY", &mend]);

    wait_until("the primary counts it", PATIENCE, || {
        let said = doctor(&[&primary.url()], &["--set", "min_replicas_acked=1"]);
        said.code == 0
    });
    let said = doctor(&[&primary.url()], &["--set", "min_replicas_acked=2"]);
    said.complains_only(
        "min_replicas_acked",
        "error",
        &["2, with 1 replicas online", "min_replicas_acked = 1"],
    );
    assert_eq!(said.one("replicas")["level"], "ok");
    primary.command(&["CONFIG", "SET", "min-replicas-to-write", "2"]);
    let said = doctor(&[&primary.url()], &[]);
    said.complains_only(
        "min-replicas-to-write",
        "error",
        &["NOREPLICAS", "CONFIG SET min-replicas-to-write 1"],
    );
}

#[test]
fn another_shard_map_is_an_error_that_shows_both() {
    let server = good_and(&[]);
    server.command(&["SET", "lock:%map", "v1 a:0-8191,b:8192-16383 here=a"]);
    let said = doctor(&[&server.url()], &[]);
    said.complains_only(
        "shard-map",
        "error",
        &["a:0-8191,b:8192-16383", "shard-0:0-16383", "DEL lock:%map"],
    );
    let said = doctor(&[&server.url()], &["--set", "namespace=other:"]);
    assert_eq!(said.code, 0, "{:#}", said.json);
    server.command(&["SET", "lock:%map", "v2 shard-0:0-16383 here=shard-0"]);
    let said = doctor(&[&server.url()], &[]);
    said.complains_only(
        "shard-map",
        "error",
        &["another version of shardlock", "the setting namespace"],
    );
}

#[test]
fn a_server_that_is_down_or_hangs_is_an_error_within_the_time_limit() {
    let (good, down, hangs) = (good_and(&[]), good_and(&[]), good_and(&[]));
    down.kill();
    hangs.stop();
    let urls = [good.url(), down.url(), hangs.url()];
    let urls: Vec<&str> = urls.iter().map(String::as_str).collect();
    let said = doctor(&urls, &["--set", "store_timeout=1s"]);
    hangs.cont();
    assert_eq!(said.code, 2);
    assert_eq!(said.at(Some(&good.address()), "reachable")["level"], "ok");
    let mend = |server: &RedisServer| said.at(Some(&server.address()), "reachable")["mend"].to_string();
    let ping = format!("redis-cli -h 127.0.0.1 -p {} ping", down.port());
    assert!(mend(&down).contains(&ping), "{:#}", said.json);
    assert!(mend(&hangs).contains("hangs or is overloaded"), "{:#}", said.json);
}

#[test]
fn a_lease_that_is_shorter_than_the_answers_may_take_is_warned_of() {
    let server = good_and(&[]);
    let said = doctor(&[&server.url()], &["--set", "ttl=1s", "--set", "store_timeout=2s"]);
    said.complains_only("ttl", "warning", &["ttl 1s", "set store_timeout to less than the ttl"]);
}

#[test]
fn nodes_of_a_quorum_must_be_alive_in_majority_and_independent() {
    let nodes: Vec<RedisServer> = (0..3).map(|_| good_and(&[])).collect();
    let url = |nodes: &[&RedisServer]| {
        let places: Vec<_> = nodes.iter().map(|node| node.address()).collect();
        format!("redlock://{}", places.join(","))
    };
    let all: Vec<&RedisServer> = nodes.iter().collect();
    // They have been up for less than that.
    let said = doctor(&[&url(&all)], &["--set", "redlock_max_ttl=1h"]);
    assert_eq!(
        said.complaints(),
        BTreeMap::from([("vote".to_owned(), "warning".to_owned())])
    );
    let vote = said.at(Some(&nodes[0].address()), "vote");
    assert!(vote["found"].as_str().unwrap().contains("it has no vote yet"), "{vote}");
    for check in ["majority", "independent", "clocks"] {
        assert_eq!(said.one(check)["level"], "ok", "{:#}", said.json);
    }
    assert_eq!(said.at(Some(&nodes[2].address()), "persistence")["level"], "ok");

    // One server by two names.
    let twice = format!("{},localhost:{}", url(&all[..2]), nodes[0].port());
    let said = doctor(&[&twice], &[]);
    assert_eq!(said.code, 2);
    assert!(
        said.one("independent")["found"]
            .as_str()
            .unwrap()
            .ends_with("are the same server")
    );

    let port = nodes[0].port().to_string();
    nodes[1].command(&["REPLICAOF", "127.0.0.1", &port]);
    let said = doctor(&[&url(&all)], &[]);
    let expected = format!("{} is a replica of {}", nodes[1].address(), nodes[0].address());
    assert_eq!(said.one("independent")["found"], expected.as_str());
    assert_eq!(said.at(Some(&nodes[1].address()), "role")["level"], "error");
    nodes[1].command(&["REPLICAOF", "NO", "ONE"]);

    nodes[1].kill();
    let said = doctor(&[&url(&all)], &[]);
    assert_eq!(
        (said.code, &said.one("majority")["level"]),
        (1, &"warning".into()),
        "{:#}",
        said.json
    );
    nodes[2].kill();
    let said = doctor(&[&url(&all)], &[]);
    assert_eq!((said.code, &said.one("majority")["level"]), (2, &"error".into()));
    assert_eq!(said.one("majority")["found"], "1 of 3 nodes answer, 2 are needed");
}

#[test]
fn a_cluster_of_which_a_part_is_missing_is_an_error() {
    let cluster = ["--cluster-enabled", "yes", "--cluster-node-timeout", "1000"];
    let (first, second) = (good_and(&cluster), good_and(&cluster));
    let url = format!("redis+cluster://{},{}", first.address(), second.address());
    first.command(&["CLUSTER", "ADDSLOTSRANGE", "0", "8191"]);
    second.command(&["CLUSTER", "ADDSLOTSRANGE", "8192", "16383"]);
    second.command(&["CLUSTER", "SET-CONFIG-EPOCH", "2"]);
    first.command(&["CLUSTER", "MEET", "127.0.0.1", &second.port().to_string()]);
    wait_until("both nodes own all slots together", PATIENCE, || {
        [&first, &second].iter().all(|node| {
            let info: String = node.query(&["CLUSTER", "INFO"]);
            info.contains("cluster_state:ok")
        })
    });
    let said = doctor(&[&url], &[]);
    for check in ["cluster_state", "slots", "nodes-agree"] {
        assert_eq!(said.one(check)["level"], "ok", "{:#}", said.json);
    }
    assert_eq!(said.one("replicas-per-primary")["level"], "warning");
    assert_eq!(said.one("cluster-require-full-coverage")["level"], "note");
    assert_eq!(said.at(Some(&second.address()), "mode")["level"], "ok");
    assert_eq!(said.code, 1, "{:#}", said.json);

    // A node of a cluster is no server on its own, and the other way about.
    let alone = doctor(&[&first.url()], &[]);
    alone.complains_only("mode", "error", &["redis+cluster://"]);
    let plain = good_and(&[]);
    let said = doctor(&[&format!("redis+cluster://{}", plain.address())], &[]);
    assert_eq!(said.one("mode")["level"], "error", "{:#}", said.json);
    assert!(
        said.one("mode")["mend"]
            .as_str()
            .unwrap()
            .contains("use redis:// for this server")
    );

    second.kill();
    wait_until("the cluster is down", PATIENCE, || {
        let info: String = first.query(&["CLUSTER", "INFO"]);
        info.contains("cluster_state:fail")
    });
    let said = doctor(&[&url], &[]);
    assert_eq!(said.code, 2);
    assert_eq!(said.one("cluster_state")["level"], "error");
    assert!(
        said.one("cluster_state")["mend"]
            .as_str()
            .unwrap()
            .contains("redis-cli --cluster check")
    );
    assert_eq!(said.at(Some(&first.address()), "reachable")["level"], "ok");
}

#[test]
fn sentinels_that_do_not_answer_are_an_error() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let place = listener.local_addr().unwrap();
    drop(listener);
    let said = doctor(&[&format!("redis+sentinel://{place}/m")], &[]);
    said.complains_only("reachable", "error", &[&format!("-p {} ping", place.port())]);

    // A server that is no sentinel.
    let server = good_and(&[]);
    let said = doctor(&[&format!("redis+sentinel://{}/m", server.address())], &[]);
    said.complains_only("primary", "error", &["if this is no sentinel, name one"]);
}

#[test]
fn encryption_that_does_not_come_about_is_an_error_that_says_which_setting_to_look_at() {
    let server = good_and(&[]);
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = rcgen::CertificateParams::new(["127.0.0.1".to_owned()])
        .unwrap()
        .self_signed(&key)
        .unwrap();
    let file = |name: &str, text: &str| {
        let path = server.dir().join(name);
        fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let (certificate, key) = (
        file("cert.pem", &certificate.pem()),
        file("key.pem", &key.serialize_pem()),
    );
    // The port above is a cluster's bus, which this server has not.
    let port = (server.port() + 10_000).to_string();
    server.command(&[
        "CONFIG",
        "SET",
        "tls-cert-file",
        &certificate,
        "tls-key-file",
        &key,
        "tls-auth-clients",
        "no",
    ]);
    server.command(&["CONFIG", "SET", "tls-port", &port]);

    let url = format!("rediss://127.0.0.1:{port}");
    let said = doctor(&[&url], &["--set", &format!("tls_ca={certificate}")]);
    assert_eq!((said.code, said.complaints()), (0, BTreeMap::new()), "{:#}", said.json);
    let said = doctor(&[&url], &[]);
    said.complains_only("reachable", "error", &["no encrypted connection", "set tls_ca"]);

    let plain = doctor(&[&format!("redis://127.0.0.1:{port}")], &[]);
    plain.complains_only("reachable", "error", &["if the port speaks TLS, write a URL with it"]);
    let encrypted = format!("rediss://{}", server.address());
    let said = doctor(&[&encrypted], &["--set", "store_timeout=500ms"]);
    said.complains_only(
        "reachable",
        "error",
        &["if the port does not speak TLS, write a URL without it"],
    );
}

#[test]
fn two_shards_at_one_place_are_an_error() {
    let server = good_and(&[]);
    let said = doctor(&[&server.url(), &format!("{}/0", server.url())], &[]);
    said.complains_only("shards", "error", &["shard-0 and shard-1 are the same place"]);
    let said = doctor(&[&server.url(), &format!("{}/1", server.url())], &[]);
    assert_eq!(said.code, 0, "{:#}", said.json);
}

#[test]
fn a_store_in_memory_is_for_one_process() {
    let said = doctor(&["memory://"], &[]);
    assert_eq!((said.code, &said.one("memory-only")["level"]), (0, &"note".into()));
}

#[test]
fn what_is_wrong_with_the_call_or_the_settings_has_exit_codes_of_its_own() {
    assert_eq!(run(bare(&["doctor"])).code, 64);
    assert_eq!(run(bare(&["doctor", "--shard", "redis://a", "--other"])).code, 64);
    let mut file_is_gone = command(&["redis://127.0.0.1:1"], &[]);
    file_is_gone.env("SHARDLOCK_TLS_CA", "/does/not/exist.pem");
    let ended = run(file_is_gone);
    assert_eq!(ended.code, 78, "{ended:?}");
    assert!(ended.stderr.contains("tls_ca is /does/not/exist.pem"), "{ended:?}");
    let help = run(bare(&["doctor", "--help"])).stdout;
    assert!(
        help.contains("Exit code:") && help.contains("there are warnings"),
        "{help}"
    );
}
