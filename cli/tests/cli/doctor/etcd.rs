//! The doctor on etcd.

use std::collections::BTreeMap;

use etcd_client::{AlarmAction, AlarmType, Permission};
use support::etcd::Etcd;
use support::{PATIENCE, wait_until};
use support_locks::{connect, lock};

use super::report::{Report, command, doctor};
use crate::tool::run;

/// Runs the doctor while the test's runtime keeps running.
fn examine(url: &str, args: &[&str]) -> Report {
    tokio::task::block_in_place(|| doctor(&[url], args))
}

/// Runs the doctor until it ends with this exit code: if the leader is killed, or a busy machine
/// stalls it, the members elect a new one first.
fn examine_until(what: &str, url: &str, code: i32) -> Report {
    let mut report = examine(url, &[]);
    tokio::task::block_in_place(|| {
        wait_until(what, PATIENCE, || {
            if report.code != code {
                report = doctor(&[url], &[]);
            }
            report.code == code
        });
    });
    report
}

async fn revision(etcd: &Etcd) -> i64 {
    let found = etcd.client().await.get("k", None).await.unwrap();
    found.header().unwrap().revision()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn healthy_cluster_has_no_problems_and_is_left_unchanged() {
    let etcd = Etcd::start_members(3).await;
    let (keys, before) = (etcd.keys().await, revision(&etcd).await);
    let report = examine_until("all is well", &etcd.url(), 0);
    assert_eq!(report.problems(), BTreeMap::new(), "{:#}", report.json);
    for check in ["majority", "leader", "shard-map", "lease-ttl"] {
        assert_eq!(report.one(check)["level"], "ok", "{:#}", report.json);
    }
    for member in 0..3 {
        for check in ["reachable", "ttl-round-trip", "version", "acl", "alarms"] {
            assert_eq!(
                report.at(Some(&etcd.place(member)), check)["level"],
                "ok",
                "{:#}",
                report.json
            );
        }
    }
    assert_eq!(
        (etcd.keys().await, revision(&etcd).await, etcd.leases().await),
        (keys, before, 0)
    );

    // The same with managers.
    let locks = connect(&etcd.url()).await;
    let guard = lock(&locks, "k").await;
    let report = examine_until("all is well with managers", &etcd.url(), 0);
    assert_eq!(
        report.one("shard-map")["found"],
        "as configured: v2 shard-0:0-16383 here=shard-0"
    );
    assert!(guard.is_valid());
    guard.release().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_that_are_down_are_a_warning_and_without_a_majority_an_error() {
    let etcd = Etcd::start_members(3).await;
    etcd.kill(2);
    let report = examine_until("one of three is missing, and the others keep running", &etcd.url(), 1);
    assert_eq!(
        report.one("majority")["found"],
        "2 of the URL's 3 members answer, 3 are in the cluster"
    );
    assert_eq!(report.at(Some(&etcd.place(2)), "reachable")["level"], "warning");

    etcd.kill(1);
    // The time limit of several questions to a member that a busy machine may delay.
    let report = examine(&etcd.url(), &["--set", "store_timeout=1200ms"]);
    assert_eq!(
        (report.code, &report.one("majority")["level"]),
        (2, &"error".into()),
        "{:#}",
        report.json
    );
    assert!(
        report.one("majority")["found"]
            .as_str()
            .unwrap()
            .contains("none of them has a majority behind it")
    );
    assert_eq!(report.at(Some(&etcd.place(0)), "reachable")["level"], "ok");

    etcd.kill(0);
    let report = examine(&etcd.url(), &[]);
    assert_eq!(report.code, 2);
    for member in 0..3 {
        let finding = report.at(Some(&etcd.place(member)), "reachable");
        assert_eq!(finding["level"], "error", "{finding}");
        assert!(
            finding["fix"].as_str().unwrap().contains("endpoint health"),
            "{finding}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hung_member_is_reported_within_the_time_limit() {
    let etcd = Etcd::start().await;
    etcd.stop(0);
    let report = examine(&etcd.url(), &["--set", "store_timeout=500ms"]);
    etcd.cont(0);
    assert_eq!(report.code, 2);
    assert!(
        report.one("reachable")["fix"]
            .as_str()
            .unwrap()
            .contains("hangs or is overloaded"),
        "{:#}",
        report.json
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_alarm_is_an_error() {
    let etcd = Etcd::start().await;
    let alarm = etcd
        .client()
        .await
        .alarm(AlarmAction::Activate, AlarmType::Nospace, None)
        .await;
    alarm.unwrap();
    let report = examine(&etcd.url(), &[]);
    report.has_only_problem("alarms", "error", &["Nospace", "etcdctl alarm disarm"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_shard_map_is_an_error_that_shows_both() {
    let etcd = Etcd::start().await;
    let map = "v2 a:0-8191,b:8192-16383 here=a";
    etcd.client().await.put("lock:%map", map, None).await.unwrap();
    let report = examine(&etcd.url(), &[]);
    report.has_only_problem(
        "shard-map",
        "error",
        &[
            "shard-0:0-16383",
            "shardlock map set --expect 'v2 a:0-8191,b:8192-16383'",
        ],
    );
    assert_eq!(examine(&etcd.url(), &["--set", "namespace=other:"]).code, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ttl_that_etcd_can_not_grant_is_a_warning() {
    let etcd = Etcd::start().await;
    let report = examine(&etcd.url(), &["--set", "ttl=1900ms", "--set", "store_timeout=1800ms"]);
    report.has_only_problem("lease-ttl", "warning", &["ttl 1.9s", "set ttl to 2s or more"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_logins_and_permissions_are_distinguished() {
    let etcd = Etcd::start().await;
    let with = |user: &str| etcd.url().replacen("://", &format!("://{user}@"), 1);
    let report = examine(&with("u:s3cret"), &[]);
    assert_eq!(report.code, 2);
    assert!(
        report.one("reachable")["fix"]
            .as_str()
            .unwrap()
            .contains("leave the user and the password out")
    );

    let mut client = etcd.client().await;
    for user in ["root", "locker", "reader"] {
        client.user_add(user, "s3cret", None).await.unwrap();
    }
    for role in ["root", "locks", "reads"] {
        client.role_add(role).await.unwrap();
    }
    let all = |permission: Permission| permission.with_prefix();
    client
        .role_grant_permission("locks", all(Permission::read_write("lock:")))
        .await
        .unwrap();
    client
        .role_grant_permission("reads", all(Permission::read("lock:")))
        .await
        .unwrap();
    for (user, role) in [("root", "root"), ("locker", "locks"), ("reader", "reads")] {
        client.user_grant_role(user, role).await.unwrap();
    }
    client.auth_enable().await.unwrap();

    let report = examine(&with("locker:s3cret"), &[]);
    assert_eq!(
        (report.code, report.problems()),
        (0, BTreeMap::new()),
        "{:#}",
        report.json
    );
    assert_eq!(report.one("access")["level"], "ok");

    let ended = tokio::task::block_in_place(|| run(command(&[&with("locker:wr0ng")], &[])));
    assert_eq!(ended.code, 2, "{ended:?}");
    assert!(ended.stdout.contains("correct the user and the password"), "{ended:?}");
    assert!(!format!("{ended:?}").contains("wr0ng"), "{ended:?}");

    let report = examine(&with("reader:s3cret"), &[]);
    report.has_only_problem(
        "acl",
        "error",
        &["user reader may not read and write", "readwrite lock:"],
    );
    let report = examine(&etcd.url(), &[]);
    report.has_only_problem("acl", "error", &["put a user and its password into the shard's URL"]);
    // A namespace that the user may not read.
    let report = examine(&with("locker:s3cret"), &["--set", "namespace=other:"]);
    report.has_only_problem("acl", "error", &["readwrite other:"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failed_encryption_is_an_error_that_names_the_settings() {
    let etcd = Etcd::start_with_tls().await;
    let files = etcd.tls();
    let set = |name: &str, path: &std::path::Path| format!("{name}={}", path.display());
    let (ca, cert, key) = (
        set("tls_ca", &files.ca),
        set("tls_cert", &files.cert),
        set("tls_key", &files.key),
    );
    let report = examine(&etcd.url(), &["--set", &ca, "--set", &cert, "--set", &key]);
    assert_eq!(
        (report.code, report.problems()),
        (0, BTreeMap::new()),
        "{:#}",
        report.json
    );
    assert_eq!(report.one("access")["found"], "with a certificate");
    for args in [&["--set", &cert, "--set", &key][..], &["--set", &ca]] {
        let report = examine(&etcd.url(), args);
        let finding = report.one("reachable");
        assert_eq!((report.code, &finding["level"]), (2, &"error".into()), "{finding}");
        let fix = finding["fix"].as_str().unwrap();
        assert!(fix.contains("tls_ca") && fix.contains("tls_cert"), "{finding}");
    }
}
