//! The doctor on a primary watched by sentinels.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, TcpListener};
use std::time::Duration;

use support::sentinel::{NAME, Watched};
use support::{PATIENCE, RedisServer, wait_until};

use super::good_and;
use super::report::{Report, doctor};

#[test]
fn sentinels_that_do_not_answer_are_an_error() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let place = listener.local_addr().unwrap();
    drop(listener);
    let report = doctor(&[&format!("redis+sentinel://{place}/m")], &[]);
    report.has_only_problem("reachable", "error", &[&format!("-p {} ping", place.port())]);

    // A server that is not a sentinel.
    let server = good_and(&[]);
    let report = doctor(&[&format!("redis+sentinel://{}/m", server.address())], &[]);
    report.has_only_problem("primary", "error", &["if this is not a sentinel"]);
}

/// A healthy primary with replicas and sentinels.
fn good(replicas: usize) -> Watched {
    let watched = Watched::start(replicas);
    for server in watched.servers() {
        server.command(&["CONFIG", "SET", "appendonly", "yes"]);
    }
    watched.has_replicas(replicas);
    watched
}

/// Waits until the doctor's report satisfies the condition.
#[track_caller]
fn wait_for_report(watched: &Watched, what: &str, mut condition: impl FnMut(&Report) -> bool) -> Report {
    let mut report = None;
    wait_until(what, PATIENCE, || {
        let now = doctor(&[&watched.url()], &[]);
        let met = condition(&now);
        report = Some(now);
        met
    });
    report.unwrap()
}

#[test]
fn healthy_primary_replica_and_sentinels_have_no_problems() {
    let watched = good(1);
    // A busy machine must not cause a failover. It is less than the TTL, or the doctor has a note.
    watched.consider_down_after(Duration::from_secs(5));
    let before = watched.primary().dbsize();
    let report = wait_for_report(&watched, "all is well", |report| report.code == 0);
    assert_eq!(report.problems(), BTreeMap::new(), "{:#}", report.json);
    let (primary, replica) = (watched.primary().address(), watched.replicas()[0].address());
    for (place, check) in [
        (&primary, "role"),
        (&primary, "replicas"),
        (&primary, "persistence"),
        (&primary, "acl"),
        (&primary, "shard-map"),
        (&primary, "ttl-round-trip"),
        (&replica, "role"),
        (&watched.sentinels()[2].address(), "primary"),
        (&watched.sentinels()[2].address(), "quorum"),
        (&watched.sentinels()[2].address(), "sentinels"),
    ] {
        assert_eq!(
            report.at(Some(place), check)["level"],
            "ok",
            "{place} {check}: {:#}",
            report.json
        );
    }
    for check in ["sentinels-agree", "down-after", "clocks"] {
        assert_eq!(report.one(check)["level"], "ok", "{:#}", report.json);
    }
    let parts: Vec<_> = report.json["shards"][0]["servers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|server| &server["part"])
        .collect();
    assert_eq!(parts, ["sentinel", "sentinel", "sentinel", "primary", "replica"]);
    assert_eq!(watched.primary().dbsize(), before);
}

#[test]
fn a_name_that_no_sentinel_knows_is_an_error() {
    let watched = good(1);
    let url = watched.url().replace(NAME, "nobody");
    let report = doctor(&[&url], &[]);
    assert_eq!(
        (report.code, report.problems()),
        (2, BTreeMap::from([("primary".to_owned(), "error".to_owned())]))
    );
    for sentinel in watched.sentinels() {
        let text = report.at(Some(&sentinel.address()), "primary").to_string();
        assert!(
            text.contains("nobody") && text.contains("correct the name in the URL"),
            "{text}"
        );
    }
}

#[test]
fn too_few_sentinels_for_a_failover_are_an_error() {
    let watched = good(1);
    for sentinel in &watched.sentinels()[1..] {
        sentinel.kill();
    }
    // The remaining sentinel has to notice the loss first.
    let left = watched.sentinels()[0].address();
    let report = wait_for_report(&watched, "a majority is missing", |report| {
        report.at(Some(&left), "quorum")["level"] == "error"
    });
    assert_eq!(report.code, 2);
    let text = report.at(Some(&left), "quorum").to_string();
    assert!(
        text.contains("NOQUORUM") && text.contains("start the sentinels that are missing"),
        "{text}"
    );
    for sentinel in &watched.sentinels()[1..] {
        assert_eq!(report.at(Some(&sentinel.address()), "reachable")["level"], "warning");
    }
    // The primary itself is healthy.
    assert_eq!(
        report.at(Some(&watched.primary().address()), "reachable")["level"],
        "ok"
    );
}

#[test]
fn primary_without_replicas_is_a_warning() {
    let watched = good(1);
    // A busy machine must not cause a failover.
    watched.consider_down_after(PATIENCE);
    let (primary, replica) = (watched.primary().address(), watched.replicas()[0].address());
    watched.replicas()[0].kill();
    let report = wait_for_report(&watched, "the replica is missing", |report| {
        report.at(Some(&primary), "replicas")["level"] == "warning"
    });
    assert_eq!(report.code, 1, "{:#}", report.json);
    let text = report.at(Some(&primary), "replicas").to_string();
    assert!(text.contains("none connected") && text.contains("REPLICAOF"), "{text}");
    assert_eq!(report.at(Some(&replica), "reachable")["level"], "warning");

    // If every lock needs a confirmation from a replica, every lock fails.
    let report = doctor(&[&watched.url()], &["--set", "min_replicas_acked=1"]);
    assert_eq!(
        (report.code, &report.at(Some(&primary), "min_replicas_acked")["level"]),
        (2, &"error".into())
    );
}

#[test]
fn primary_that_is_down_without_a_replica_to_promote_is_an_error() {
    let watched = good(1);
    let primary = watched.primary().address();
    watched.servers().iter().for_each(RedisServer::kill);
    let sentinel = watched.sentinels()[0].address();
    let report = wait_for_report(&watched, "the sentinel considers the primary down", |report| {
        report.at(Some(&sentinel), "primary")["level"] == "error"
    });
    assert_eq!(report.code, 2);
    let text = report.at(Some(&sentinel), "primary").to_string();
    assert!(text.contains("which this sentinel considers down"), "{text}");
    assert_eq!(report.at(Some(&primary), "reachable")["level"], "error");
}
