//! `shardlock doctor` on real servers, each with one fault.

#[cfg(target_os = "linux")]
mod clocks;
#[cfg(feature = "etcd")]
mod etcd;
mod nodes;
mod report;
mod sentinel;

use std::collections::BTreeMap;
use std::fs;

use serde_json::Value;

use report::{Report, command, doctor};
use support::filter::{Filter, Verdict, is_of_several_slots};
use support::{PATIENCE, RedisServer, wait_until};

use crate::tool::{Holder, bare, run};

/// The arguments of a server without faults.
const GOOD: [&str; 2] = ["--appendonly", "yes"];

fn good_and(more: &[&str]) -> RedisServer {
    RedisServer::start_with(&[&GOOD, more].concat())
}

#[test]
fn healthy_server_has_no_problems_and_is_left_unchanged() {
    let server = good_and(&[]);
    let report = doctor(&[&server.url()], &[]);
    assert_eq!(report.problems(), BTreeMap::new(), "{:#}", report.json);
    assert_eq!(report.code, 0);
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
        let finding = report.one(check);
        assert_eq!(
            (&finding["level"], &finding["why"], &finding["fix"]),
            (&"ok".into(), &Value::Null, &Value::Null)
        );
    }
    assert_eq!(report.one("access")["level"], "note");
    assert_eq!(report.json["counts"]["error"], 0);
    assert_eq!(report.json["shards"][0]["servers"][0]["part"], "primary");
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
    let report = doctor(&[&server.url()], &[]);
    assert_eq!(report.code, 0, "{:#}", report.json);
    assert!(
        report.one("shard-map")["found"]
            .as_str()
            .unwrap()
            .contains("as configured: v2 shard-0:0-16383")
    );
    assert_eq!(server.keys(), before);
    holder.go();
}

#[test]
fn a_server_that_may_evict_locks_is_an_error() {
    let server = good_and(&["--maxmemory-policy", "allkeys-lru", "--maxmemory", "100mb"]);
    let report = doctor(&[&server.url()], &[]);
    report.has_only_problem(
        "maxmemory-policy",
        "error",
        &[
            "allkeys-lru, with maxmemory 100.0 MB",
            "CONFIG SET maxmemory-policy noeviction",
        ],
    );
    server.command(&["CONFIG", "SET", "maxmemory", "0"]);
    let report = doctor(&[&server.url()], &[]);
    assert_eq!(
        (report.code, &report.one("maxmemory-policy")["level"]),
        (0, &"note".into())
    );
    // The doctor's advice fixes the fault.
    server.command(&["CONFIG", "SET", "maxmemory-policy", "noeviction"]);
    assert_eq!(doctor(&[&server.url()], &[]).one("maxmemory-policy")["level"], "ok");
}

#[test]
fn server_without_persistence_is_a_warning() {
    let server = RedisServer::start();
    let report = doctor(&[&server.url()], &[]);
    report.has_only_problem(
        "persistence",
        "warning",
        &[
            "no snapshots",
            "a restart forgets all locks",
            "CONFIG SET appendonly yes",
        ],
    );
    assert_eq!(report.json["level"], "warning");

    server.command(&["CONFIG", "SET", "save", "3600 1"]);
    let found = |report: &Report| report.one("persistence")["found"].clone();
    let report = doctor(&[&server.url()], &[]);
    assert_eq!(found(&report), "appendonly no, snapshots (save 3600 1)");
    server.command(&["ACL", "SETUSER", "default", "-config"]);
    let report = doctor(&[&server.url()], &[]);
    assert_eq!(found(&report), "appendonly no, snapshots unknown", "{:#}", report.json);
}

#[test]
fn settings_that_slow_hand_offs_down_are_reported() {
    let server = good_and(&[
        "--client-output-buffer-limit",
        "pubsub 1mb 1mb 60",
        "--timeout",
        "30",
        "--tcp-keepalive",
        "0",
    ]);
    let report = doctor(&[&server.url()], &[]);
    report.has_only_problem("pubsub-limits", "warning", &["CONFIG SET client-output-buffer-limit"]);
    assert_eq!(report.one("timeout")["level"], "note");
    assert_eq!(report.one("tcp-keepalive")["level"], "note");
}

#[test]
fn a_password_that_is_missing_or_wrong_is_an_error_that_does_not_show_it() {
    let server = good_and(&["--requirepass", "s3cret"]);
    let report = doctor(&[&server.url()], &[]);
    report.has_only_problem("reachable", "error", &["asks for a password", "redis://:password@host"]);

    let wrong = format!("redis://:wr0ng@{}", server.address());
    let ended = run(command(&[&wrong], &[]));
    assert_eq!(ended.code, 2, "{ended:?}");
    assert!(ended.stdout.contains("the login was refused"), "{ended:?}");
    assert!(!format!("{ended:?}").contains("wr0ng"), "{ended:?}");

    let right = format!("redis://:s3cret@{}", server.address());
    let report = doctor(&[&right], &[]);
    assert_eq!(
        (report.code, &report.one("access")["level"]),
        (0, &"ok".into()),
        "{:#}",
        report.json
    );
    assert!(!report.json.to_string().contains("s3cret"));
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
    let report = doctor(&[&url], &[]);
    assert_eq!(
        (report.code, report.problems()),
        (0, BTreeMap::new()),
        "{:#}",
        report.json
    );
    // The user may not read the configuration either, which is only a note.
    assert_eq!(report.one("config")["level"], "note");
    assert!(
        report.one("config")["fix"]
            .as_str()
            .unwrap()
            .contains("ACL SETUSER locks +config|get")
    );
    assert_eq!(report.one("info")["level"], "note");

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
        // Both by trying and by asking the server with `ACL DRYRUN`.
        for rehearsal in ["", " +acl|dryrun +acl|whoami"] {
            set_user(&format!("{rules}{rehearsal}"));
            let report = doctor(&[&url], &[]);
            let fix = format!("ACL SETUSER locks {rule} ");
            report.has_only_problem("acl", "error", &[&format!("user locks {lacking}\""), &fix]);
        }
        // The doctor's advice fixes the fault.
        let mut fix = vec!["ACL", "SETUSER", "locks"];
        fix.extend(rule.split(' '));
        server.command(&fix);
        assert_eq!(doctor(&[&url], &[]).code, 0, "{rules}");
    }

    // With these rules the doctor still detects a replica, and a database that the user may not
    // select.
    set_user(RULES);
    server.command(&["REPLICAOF", "127.0.0.1", "1"]);
    doctor(&[&url], &[]).has_only_problem("writes", "error", &["READONLY", "a replica"]);
    server.command(&["REPLICAOF", "NO", "ONE"]);
    set_user(&format!("{RULES} -select"));
    doctor(&[&format!("{url}/1")], &[]).has_only_problem("reachable", "error", &["ACL SETUSER <user> +select"]);
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
    let report = doctor(&[&replica.url()], &[]);
    let fix = format!("redis://{}", primary.address());
    report.has_only_problem("role", "error", &["READONLY", &fix]);

    wait_until("the primary counts the replica", PATIENCE, || {
        let report = doctor(&[&primary.url()], &["--set", "min_replicas_acked=1"]);
        report.code == 0
    });
    let report = doctor(&[&primary.url()], &["--set", "min_replicas_acked=2"]);
    report.has_only_problem(
        "min_replicas_acked",
        "error",
        &["2, with 1 replicas online", "min_replicas_acked = 1"],
    );
    assert_eq!(report.one("replicas")["level"], "ok");
    primary.command(&["CONFIG", "SET", "min-replicas-to-write", "2"]);
    let report = doctor(&[&primary.url()], &[]);
    report.has_only_problem(
        "min-replicas-to-write",
        "error",
        &["NOREPLICAS", "CONFIG SET min-replicas-to-write 1"],
    );
}

#[test]
fn another_shard_map_is_an_error_that_shows_both() {
    let server = good_and(&[]);
    server.command(&["SET", "lock:%map", "v2 a:0-8191,b:8192-16383 here=a"]);
    let report = doctor(&[&server.url()], &[]);
    report.has_only_problem(
        "shard-map",
        "error",
        &[
            "shard-0:0-16383",
            "shardlock map set --expect 'v2 a:0-8191,b:8192-16383'",
        ],
    );
    let report = doctor(&[&server.url()], &["--set", "namespace=other:"]);
    assert_eq!(report.code, 0, "{:#}", report.json);
    server.command(&["SET", "lock:%map", "v3 shard-0:0-16383 here=shard-0"]);
    let report = doctor(&[&server.url()], &[]);
    report.has_only_problem(
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
    // The good server on a busy machine may need a second for its answer.
    let report = doctor(&urls, &["--set", "store_timeout=3s"]);
    hangs.cont();
    assert_eq!(report.code, 2);
    assert_eq!(report.at(Some(&good.address()), "reachable")["level"], "ok");
    let fix = |server: &RedisServer| report.at(Some(&server.address()), "reachable")["fix"].to_string();
    let ping = format!("redis-cli -h 127.0.0.1 -p {} ping", down.port());
    assert!(fix(&down).contains(&ping), "{:#}", report.json);
    assert!(fix(&hangs).contains("hangs or is overloaded"), "{:#}", report.json);
}

#[test]
fn ttl_shorter_than_the_store_timeout_is_a_warning() {
    let server = good_and(&[]);
    let report = doctor(&[&server.url()], &["--set", "ttl=1s", "--set", "store_timeout=2s"]);
    report.has_only_problem("ttl", "warning", &["ttl 1s", "set store_timeout to less than the ttl"]);
}

#[test]
fn failed_encryption_is_an_error_that_names_the_setting() {
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
    // The port 10,000 higher is the bus of a cluster node, which this server does not have.
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
    let report = doctor(&[&url], &["--set", &format!("tls_ca={certificate}")]);
    assert_eq!(
        (report.code, report.problems()),
        (0, BTreeMap::new()),
        "{:#}",
        report.json
    );
    let report = doctor(&[&url], &[]);
    report.has_only_problem("reachable", "error", &["no encrypted connection", "set tls_ca"]);

    let plain = doctor(&[&format!("redis://127.0.0.1:{port}")], &[]);
    plain.has_only_problem("reachable", "error", &["if the port speaks TLS, use a URL with TLS"]);
    let encrypted = format!("rediss://{}", server.address());
    let report = doctor(&[&encrypted], &["--set", "store_timeout=500ms"]);
    report.has_only_problem(
        "reachable",
        "error",
        &["if the port does not speak TLS, use a URL without TLS"],
    );
}

#[test]
fn two_shards_with_the_same_address_are_an_error() {
    let server = good_and(&[]);
    let report = doctor(&[&server.url(), &format!("{}/0", server.url())], &[]);
    report.has_only_problem("shards", "error", &["shard-0 and shard-1 have the same address"]);
    let report = doctor(&[&server.url(), &format!("{}/1", server.url())], &[]);
    assert_eq!(report.code, 0, "{:#}", report.json);
}

#[test]
fn memory_store_is_noted_as_limited_to_one_process() {
    let report = doctor(&["memory://"], &[]);
    assert_eq!((report.code, &report.one("memory-only")["level"]), (0, &"note".into()));
}

#[test]
fn invalid_arguments_and_settings_have_exit_codes_of_their_own() {
    assert_eq!(run(bare(&["doctor"])).code, 64);
    assert_eq!(run(bare(&["doctor", "--shard", "redis://a", "--other"])).code, 64);
    let mut file_is_gone = command(&["redis://127.0.0.1:1"], &[]);
    file_is_gone.env("SHARDLOCK_TLS_CA", "/does/not/exist.pem");
    let ended = run(file_is_gone);
    assert_eq!(ended.code, 78, "{ended:?}");
    assert!(ended.stderr.contains("tls_ca is /does/not/exist.pem"), "{ended:?}");
    let help = run(bare(&["doctor", "--help"])).stdout;
    assert!(help.contains("Exit codes:") && help.contains("1  warnings"), "{help}");
}

#[test]
fn connection_limit_of_the_server_is_reported() {
    let server = good_and(&["--maxclients", "1"]);
    // If the server's reason is lost with the connection, it has a fifth of a second to say it
    // again, and a busy machine may take longer.
    let mut report = doctor(&[&server.url()], &[]);
    wait_until("the doctor knows the reason", PATIENCE, || {
        let is_known = report.one("reachable").to_string().contains("max number of clients");
        if !is_known {
            report = doctor(&[&server.url()], &[]);
        }
        is_known
    });
    report.has_only_problem(
        "reachable",
        "error",
        &["max number of clients", "CONFIG SET maxclients"],
    );
}

#[test]
fn command_that_the_server_does_not_know_is_an_error() {
    let server = good_and(&["--rename-command", "ZPOPMIN", ""]);
    doctor(&[&server.url()], &[]).has_only_problem("commands", "error", &["does not know ZPOPMIN", "Redis 5.0"]);
    let server = good_and(&["--rename-command", "ROLE", ""]);
    let report = doctor(&[&server.url()], &[]);
    report.has_only_problem("commands", "error", &["does not know ROLE", "check_role = false"]);
    // The doctor's advice fixes the fault.
    assert_eq!(doctor(&[&server.url()], &["--set", "check_role=false"]).code, 0);
}

#[test]
fn proxy_that_refuses_scripts_of_several_slots_is_noted() {
    let server = good_and(&[]);
    let proxy = Filter::start(server.address(), |command| match is_of_several_slots(command) {
        true => Verdict::Refuse("CROSSSLOT Keys in request don't hash to the same slot"),
        false => Verdict::Pass,
    });
    let report = doctor(&[&proxy.url()], &[]);
    let finding = report.one("several-slots");
    assert_eq!((report.code, &finding["level"]), (0, &"note".into()), "{finding}");
    assert!(finding["found"].as_str().unwrap().contains("CrossSlot"), "{finding}");
}
