//! Checks a quorum of independent primaries.

use std::collections::BTreeMap;
use std::time::Duration;

use futures_util::future::join_all;
use shardlock::config::Endpoint;
use shardlock::tool;

use super::facts::{Facts, ProbedServer};
use super::finding::{Finding, Level};
use super::probe::probe;
use super::report::ShardReport;
use super::server::{Expectations, check_server};
use super::{ShardKind, clock};
use crate::servers::Connector;

/// `fingerprints` has one entry for each node of the URL.
pub(super) async fn examine(
    endpoint: &Endpoint,
    connector: &Connector<'_>,
    fingerprints: &[String],
    report: &mut ShardReport,
) {
    let nodes = tool::servers(endpoint);
    let nodes = join_all(nodes.iter().map(|node| probe(node, ShardKind::Redlock, connector))).await;
    report.findings.push(majority(&nodes));
    report.findings.extend(node_count(nodes.len()));
    report.findings.push(independence(&nodes));
    report.findings.extend(clock::compare_servers(&nodes));
    for (node, fingerprint) in nodes.iter().zip(fingerprints) {
        let expected = Expectations {
            kind: ShardKind::Redlock,
            config: connector.config,
            fingerprint,
            replica_of: None,
            unreachable: Level::Warning,
            announced: false,
        };
        let mut node_report = check_server(node, &expected);
        if let Ok(facts) = &node.facts {
            node_report
                .findings
                .extend(vote(facts, connector.config.redlock_max_ttl));
        }
        report.servers.push(node_report);
    }
}

/// Checks whether enough nodes answer.
fn majority(nodes: &[ProbedServer]) -> Finding {
    const CHECK: &str = "majority";
    let reached = nodes.iter().filter(|node| node.facts.is_ok()).count();
    let majority = nodes.len() / 2 + 1;
    let found = format!("{reached} of {} nodes answer, {majority} are needed", nodes.len());
    if reached < majority {
        return Finding::error(
            CHECK,
            found,
            "without a majority, no lock of this shard can be acquired",
            "bring back the nodes below that can't be reached",
        );
    }
    match reached - majority {
        0 if reached < nodes.len() => Finding::warning(
            CHECK,
            found,
            "if one more node fails, no lock of this shard can be acquired",
            "bring back the nodes below that can't be reached",
        ),
        _ => Finding::ok(CHECK, found),
    }
}

fn node_count(count: usize) -> Option<Finding> {
    count.is_multiple_of(2).then(|| {
        Finding::note(
            "node-count",
            format!("{count} nodes"),
            format!(
                "they tolerate as many failures as {} nodes: the last one only adds cost",
                count - 1
            ),
            "use an odd number of nodes",
        )
    })
}

/// Checks that the nodes are different servers and none is a replica.
fn independence(nodes: &[ProbedServer]) -> Finding {
    const CHECK: &str = "independent";
    let mut by_run: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for node in nodes {
        if let Some(run) = node.facts.as_ref().ok().and_then(|facts| facts.info("run_id")) {
            by_run.entry(run).or_default().push(&node.address);
        }
    }
    let fix = "name a different, independent primary at each position of the URL, in every process";
    if let Some(same) = by_run.values().find(|addresses| addresses.len() > 1) {
        return Finding::error(
            CHECK,
            format!("{} are the same server", same.join(" and ")),
            "one server has several votes, so a single server that fails or loses its data can decide",
            fix,
        );
    }
    let replica = nodes.iter().find_map(|node| {
        let primary = node.facts.as_ref().ok()?.primary()?;
        Some((node, primary))
    });
    match replica {
        Some((node, primary)) => Finding::error(
            CHECK,
            format!("{} is a replica of {primary}", node.address),
            "the nodes of a quorum must be independent: a replica refuses writes and fails with its primary",
            fix,
        ),
        None => Finding::ok(CHECK, "all nodes are different servers, none is a replica"),
    }
}

/// Checks whether the node may vote yet.
fn vote(facts: &Facts, longest_ttl: Duration) -> Option<Finding> {
    const CHECK: &str = "vote";
    let uptime = Duration::from_secs(facts.number("uptime_in_seconds")?);
    let found = format!("up for {}", humantime::format_duration(uptime));
    // The server rounds its uptime down.
    Some(match longest_ttl.checked_sub(uptime) {
        Some(left) if left > Duration::ZERO => Finding::warning(
            CHECK,
            format!("{found}, less than redlock_max_ttl ({longest_ttl:?}): it has no vote yet"),
            "it may have lost leases when it restarted; until it has a vote, one fewer node may fail",
            format!("wait {left:?}; if the restart was not intended, find out why it happened"),
        ),
        _ => Finding::ok(CHECK, found),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::servers::{ProbeError, ProbeErrorKind};

    fn node(address: &str, info: &str) -> ProbedServer {
        ProbedServer {
            address: address.to_owned(),
            has_login: false,
            encrypted: false,
            facts: Ok(Facts::healthy(&format!("run_id:{address}\n{info}"), &[])),
        }
    }

    fn dead(address: &str) -> ProbedServer {
        let error = ProbeError {
            kind: ProbeErrorKind::Unreachable,
            reason: String::new(),
        };
        ProbedServer {
            facts: Err(error),
            ..node(address, "")
        }
    }

    #[test]
    fn a_majority_is_needed_and_one_more_is_better() {
        let level = |alive: usize, of: usize| {
            let nodes: Vec<_> = (0..of)
                .map(|index| if index < alive { node("a", "") } else { dead("b") })
                .collect();
            majority(&nodes).level
        };
        assert_eq!(level(3, 3), Level::Ok);
        assert_eq!(level(2, 3), Level::Warning);
        assert_eq!(level(1, 3), Level::Error);
        assert_eq!(level(4, 5), Level::Ok);
        assert_eq!(node_count(4).unwrap().level, Level::Note);
        assert_eq!(node_count(5), None);
    }

    #[test]
    fn nodes_must_be_servers_of_their_own() {
        assert_eq!(independence(&[node("a", ""), node("b", "")]).level, Level::Ok);
        let twice = independence(&[node("a", ""), node("b", "run_id:a\n")]);
        assert_eq!(
            (twice.level, twice.found.as_str()),
            (Level::Error, "a and b are the same server")
        );
        let replica = "role:slave\nmaster_host:a\nmaster_port:1\n";
        let replica = independence(&[node("a:1", ""), node("b:1", replica)]);
        assert_eq!(
            (replica.level, replica.found.as_str()),
            (Level::Error, "b:1 is a replica of a:1")
        );
    }

    #[test]
    fn a_node_that_just_started_has_no_vote() {
        let facts = |seconds: u64| Facts::healthy(&format!("uptime_in_seconds:{seconds}\n"), &[]);
        let finding = vote(&facts(3), Duration::from_secs(10)).unwrap();
        assert!(finding.level == Level::Warning && finding.fix.unwrap().starts_with("wait 7s"));
        assert_eq!(vote(&facts(10), Duration::from_secs(10)).unwrap().level, Level::Ok);
    }
}
