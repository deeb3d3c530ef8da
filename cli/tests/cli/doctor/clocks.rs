//! Wrong clocks and distant servers.

use std::time::Duration;

use support::RedisServer;
use support::other_clock::{self, OtherClock};
use support::proxy::Proxy;

use super::GOOD;
use super::good_and;
use super::report::doctor;

#[test]
fn wrong_clock_is_a_warning() {
    let clock = OtherClock::build();
    let server = RedisServer::start_in(&clock.settable(), &GOOD);
    let report = doctor(&[&server.url()], &[]);
    assert_eq!(
        (report.code, &report.one("clock")["level"]),
        (0, &"ok".into()),
        "{:#}",
        report.json
    );
    for (seconds, words) in [(30, " ms ahead of this machine's"), (-30, " ms behind this machine's")] {
        other_clock::set(server.dir(), seconds);
        let report = doctor(&[&server.url()], &[]);
        report.has_only_problem("clock", "warning", &[words, "chrony"]);
    }
}

#[test]
fn nodes_whose_clocks_differ_are_named() {
    let clock = OtherClock::build();
    let nodes: Vec<_> = (0..3)
        .map(|_| RedisServer::start_in(&clock.settable(), &GOOD))
        .collect();
    let places: Vec<_> = nodes.iter().map(RedisServer::address).collect();
    other_clock::set(nodes[2].dir(), 20);
    let report = doctor(&[&format!("redlock://{}", places.join(","))], &[]);
    let apart = report.one("clocks");
    assert_eq!(apart["level"], "warning", "{:#}", report.json);
    assert!(
        apart["found"]
            .as_str()
            .unwrap()
            .starts_with(&format!("{} is ", places[2])),
        "{apart}"
    );
    assert_eq!(report.at(Some(&places[2]), "clock")["level"], "warning");
    assert_eq!(report.at(Some(&places[0]), "clock")["level"], "ok");
}

#[test]
fn measured_round_trip_is_compared_with_the_ttl() {
    let server = good_and(&[]);
    let proxy = Proxy::start(server.address());
    proxy.slow_down(Duration::from_millis(60));
    let ttl = |ttl: &str| doctor(&[&proxy.url()], &["--set", ttl, "--set", "store_timeout=5s"]);
    let report = ttl("ttl=200ms");
    let finding = report.one("ttl-round-trip");
    assert_eq!((report.code, &finding["level"]), (2, &"error".into()), "{finding}");
    // Twenty round trips, each of which may take half as long again on a busy machine.
    let fix = finding["fix"].as_str().unwrap();
    let advises = |seconds| fix.contains(&format!("set ttl to {seconds}."));
    assert!(advises(1) || advises(2), "{finding}");
    assert_eq!(ttl("ttl=1s").one("ttl-round-trip")["level"], "warning");
    assert_eq!(ttl("ttl=30s").one("ttl-round-trip")["level"], "ok");
}
