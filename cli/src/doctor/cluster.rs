//! Checks a Redis Cluster.

use std::collections::{BTreeMap, BTreeSet};

use deadpool_redis::redis::cmd;
use futures_util::future::join_all;
use shardlock::config::Endpoint;
use shardlock::introspect::SLOTS;
use shardlock::tool::{self, ServerUrl};

use super::facts::Info;
use super::finding::{Finding, Level};
use super::probe::probe;
use super::report::ShardReport;
use super::server::{Expectations, check_server, unreachable_server};
use super::{ShardKind, clock};
use crate::servers::{ClusterNode, Connector, ProbeError, cluster_nodes, query};

/// The cluster as one node sees it.
#[derive(Debug, Clone, Default)]
struct NodeView {
    info: Info,
    nodes: Vec<ClusterNode>,
    settings: BTreeMap<String, String>,
    /// The error, if `CLUSTER NODES` was refused.
    refused: Option<String>,
}

/// How many nodes are examined at most.
const NODES_MAX: usize = 256;

pub(super) async fn examine(
    endpoint: &Endpoint,
    connector: &Connector<'_>,
    fingerprint: &str,
    report: &mut ShardReport,
) {
    let seeds = tool::servers(endpoint);
    let views = join_all(seeds.iter().map(|seed| view(seed, connector))).await;
    let found = views.iter().flatten().find(|view| !view.nodes.is_empty()).cloned();
    let level = if found.is_some() { Level::Warning } else { Level::Error };
    for (seed, view) in seeds.iter().zip(&views) {
        if let Err(error) = view {
            report
                .servers
                .push(unreachable_server(seed, "node of the URL", error, level));
        }
    }
    let Some(first) = found else {
        report.findings.extend(refused(views.iter().flatten()));
        // The seeds that answer are not cluster nodes, which the `mode` check reports, or refuse
        // `CLUSTER NODES`.
        let expected = Expectations::member_of(ShardKind::Cluster, connector.config, fingerprint, None);
        for (seed, _) in seeds.iter().zip(&views).filter(|(_, view)| view.is_ok()) {
            let server = probe(seed, ShardKind::Cluster, connector).await;
            report.servers.push(check_server(&server, &expected));
        }
        return;
    };
    let known: Vec<&ClusterNode> = first
        .nodes
        .iter()
        .filter(|node| !["noaddr", "handshake"].iter().any(|flag| node.has_flag(flag)))
        .take(NODES_MAX)
        .collect();
    let probes = known.iter().filter_map(|node| {
        let server = tool::server_at(endpoint, &node.address)?;
        Some(async move {
            (
                probe(&server, ShardKind::Cluster, connector).await,
                view(&server, connector).await,
            )
        })
    });
    let probed = join_all(probes).await;
    let views: Vec<(&str, &NodeView)> = probed
        .iter()
        .filter_map(|(server, view)| Some((server.address.as_str(), view.as_ref().ok()?)))
        .collect();
    report.findings.extend(state(&views));
    report.findings.push(coverage(&first));
    report.findings.extend(agreement(&views));
    report.findings.extend(failing(&first));
    report.findings.push(replicas(&first));
    report.findings.extend(full_coverage(&views));
    report
        .findings
        .extend(clock::compare_servers(probed.iter().map(|(server, _)| server)));
    for ((server, _), node) in probed.iter().zip(&known) {
        let primary = node.primary.as_ref().map(|id| {
            let primary = first.nodes.iter().find(|node| node.id == *id);
            primary.map_or_else(|| id.clone(), |primary| primary.address.clone())
        });
        let mut expected = Expectations::member_of(ShardKind::Cluster, connector.config, fingerprint, primary);
        expected.announced = seeds.iter().all(|seed| seed.place() != server.address);
        report.servers.push(check_server(server, &expected));
    }
}

async fn view(server: &ServerUrl, connector: &Connector<'_>) -> Result<NodeView, ProbeError> {
    let mut connection = connector.connect(server).await?;
    // A server that is not a cluster node refuses these commands. The `mode` check reports that.
    let info: String = query(&mut connection, cmd("CLUSTER").arg("INFO"))
        .await
        .unwrap_or_default();
    let nodes = cluster_nodes(&mut connection, server).await;
    let mut settings = BTreeMap::new();
    let setting = "cluster-require-full-coverage";
    if let Ok(pair) = query::<BTreeMap<String, String>>(&mut connection, cmd("CONFIG").arg("GET").arg(setting)).await {
        settings.extend(pair);
    }
    Ok(NodeView {
        info: Info::parse(&info),
        refused: nodes.as_ref().err().cloned(),
        nodes: nodes.unwrap_or_default(),
        settings,
    })
}

/// Reports that the cluster as a whole could not be checked.
fn refused<'a>(mut views: impl Iterator<Item = &'a NodeView>) -> Option<Finding> {
    let reason = views.find_map(|view| view.refused.as_ref())?;
    Some(Finding::note(
        "cluster",
        format!("CLUSTER NODES is refused: {reason}"),
        "the slots, the other nodes and their replicas were not checked",
        "ACL SETUSER <user> +cluster|nodes +cluster|info on each node, or check by hand: redis-cli --cluster check <node>",
    ))
}

fn state(views: &[(&str, &NodeView)]) -> Option<Finding> {
    const CHECK: &str = "cluster_state";
    let bad: Vec<&str> = views
        .iter()
        .filter(|(_, view)| view.info.get(CHECK).is_some_and(|state| state != "ok"))
        .map(|(address, _)| *address)
        .collect();
    if views.is_empty() {
        return None;
    }
    Some(if bad.is_empty() {
        Finding::ok(CHECK, "ok on all nodes that answer")
    } else {
        Finding::error(
            CHECK,
            format!("fail, according to {}", bad.join(", ")),
            "nodes in this state refuse requests (CLUSTERDOWN), so locks fail",
            "redis-cli --cluster check <node> shows what is missing; redis-cli --cluster fix <node> assigns slots without an owner to a node",
        )
    })
}

fn coverage(view: &NodeView) -> Finding {
    const CHECK: &str = "slots";
    let owned: u32 = view
        .nodes
        .iter()
        .filter(|node| node.primary.is_none() && !node.has_flag("fail"))
        .map(|node| node.slots)
        .sum();
    let found = format!("{owned} of {SLOTS} are owned by a working primary");
    if owned >= u32::from(SLOTS) {
        Finding::ok(CHECK, found)
    } else {
        Finding::error(
            CHECK,
            found,
            "keys whose slot has no owner can't be locked",
            "bring back the primaries that failed, or assign their slots to another one: redis-cli --cluster fix <node>",
        )
    }
}

/// Checks that all nodes agree on the owners of the slots.
fn agreement(views: &[(&str, &NodeView)]) -> Option<Finding> {
    const CHECK: &str = "nodes-agree";
    let mut by_owners: BTreeMap<Vec<(&str, &[String])>, Vec<&str>> = BTreeMap::new();
    for (address, view) in views {
        let mut owners: Vec<_> = view
            .nodes
            .iter()
            .filter(|node| node.slots > 0)
            .map(|node| (node.id.as_str(), &node.ranges[..]))
            .collect();
        owners.sort_unstable();
        by_owners.entry(owners).or_default().push(address);
    }
    if views.is_empty() {
        return None;
    }
    Some(if by_owners.len() == 1 {
        Finding::ok(CHECK, "all nodes that answer agree on the owners of the slots")
    } else {
        let sides: Vec<_> = by_owners.values().map(|addresses| addresses.join(", ")).collect();
        Finding::warning(
            CHECK,
            format!(
                "the nodes disagree on the owners of the slots: {}",
                sides.join(" versus ")
            ),
            "while slots are moved, this lasts only moments; a cluster that stays split locks one key on two servers",
            "if this persists: redis-cli --cluster check <node>, and make sure that the nodes can reach each other's cluster bus (port + 10000)",
        )
    })
}

fn failing(view: &NodeView) -> Option<Finding> {
    let failing: Vec<_> = view
        .nodes
        .iter()
        .filter(|node| node.has_flag("fail") || node.has_flag("fail?"))
        .map(|node| format!("{} ({})", node.address, node.flags))
        .collect();
    (!failing.is_empty()).then(|| {
        Finding::warning(
            "nodes",
            format!("failed, or possibly failed: {}", failing.join(", ")),
            "its slots have no owner, or had none until a replica took over, and the cluster has one node less",
            "start the node again, or run CLUSTER FORGET <id> on each node if it is gone for good",
        )
    })
}

fn replicas(view: &NodeView) -> Finding {
    const CHECK: &str = "replicas-per-primary";
    let works = |node: &&ClusterNode| !node.has_flag("fail") && !node.has_flag("noaddr");
    let followed: BTreeSet<&str> = view
        .nodes
        .iter()
        .filter(works)
        .filter_map(|node| node.primary.as_deref())
        .collect();
    let primaries: Vec<&ClusterNode> = view.nodes.iter().filter(works).filter(|node| node.slots > 0).collect();
    let without_replica: Vec<&str> = primaries
        .iter()
        .filter(|node| !followed.contains(node.id.as_str()))
        .map(|node| node.address.as_str())
        .collect();
    if without_replica.is_empty() {
        return Finding::ok(CHECK, format!("each of {} primaries has at least one", primaries.len()));
    }
    Finding::warning(
        CHECK,
        format!("none for {}", without_replica.join(", ")),
        "if such a primary fails, no replica takes over, and its keys can't be locked",
        "redis-cli --cluster add-node <new node> <node> --cluster-slave --cluster-master-id <id>",
    )
}

fn full_coverage(views: &[(&str, &NodeView)]) -> Option<Finding> {
    const CHECK: &str = "cluster-require-full-coverage";
    let strict: Vec<&str> = views
        .iter()
        .filter(|(_, view)| view.settings.get(CHECK).is_some_and(|value| value == "yes"))
        .map(|(address, _)| *address)
        .collect();
    (!strict.is_empty()).then(|| {
        Finding::note(
            CHECK,
            format!("yes on {}", strict.join(", ")),
            "if one part of the cluster is down, locks fail in all other parts as well",
            "CONFIG SET cluster-require-full-coverage no on each node",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(lines: &str) -> NodeView {
        let endpoint = Endpoint::parse("redis+cluster://asked:1").unwrap();
        let asked = tool::servers(&endpoint).remove(0);
        NodeView {
            info: Info::parse("cluster_state:ok\n"),
            nodes: ClusterNode::parse_all(lines, &asked),
            ..NodeView::default()
        }
    }

    const WHOLE: &str = "\
        aa 10.0.0.1:6379@16379 myself,master - 0 0 1 connected 0-8190 8191 [93-<-bb]\n\
        bb 10.0.0.2:6379@16379,host-b master - 0 0 2 connected 8192-16383\n\
        cc 10.0.0.3:6379@16379 slave aa 0 0 1 connected\n\
        dd ::1:6379@16379 slave bb 0 0 2 connected\n";

    #[test]
    fn all_slots_need_an_owner_that_works() {
        assert_eq!(coverage(&view(WHOLE)).level, Level::Ok);
        let failed = WHOLE.replace("host-b master", "host-b master,fail");
        assert_eq!(coverage(&view(&failed)).level, Level::Error);
        assert_eq!(failing(&view(&failed)).unwrap().level, Level::Warning);
        assert_eq!(failing(&view(WHOLE)), None);
    }

    #[test]
    fn each_primary_needs_a_replica() {
        assert_eq!(replicas(&view(WHOLE)).level, Level::Ok);
        let finding = replicas(&view(&WHOLE.replace("slave bb", "slave,fail bb")));
        assert_eq!(
            (finding.level, finding.found.as_str()),
            (Level::Warning, "none for 10.0.0.2:6379")
        );
    }

    #[test]
    fn nodes_must_agree_and_be_in_a_good_state() {
        let (one, mut other) = (view(WHOLE), view(&WHOLE.replace("0-8190 8191", "0-8190")));
        assert_eq!(agreement(&[("a", &one), ("b", &one)]).unwrap().level, Level::Ok);
        assert_eq!(agreement(&[("a", &one), ("b", &other)]).unwrap().level, Level::Warning);
        assert_eq!(state(&[("a", &one)]).unwrap().level, Level::Ok);
        other.info = Info::parse("cluster_state:fail\n");
        assert_eq!(state(&[("a", &one), ("b", &other)]).unwrap().level, Level::Error);
        other
            .settings
            .insert("cluster-require-full-coverage".to_owned(), "yes".to_owned());
        assert_eq!(full_coverage(&[("a", &one), ("b", &other)]).unwrap().found, "yes on b");
    }
}
