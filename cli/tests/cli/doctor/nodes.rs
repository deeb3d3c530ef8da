//! Shards of several servers that share the keys or the votes.

use std::collections::BTreeMap;

use support::{Cluster, PATIENCE, RedisServer, free_port, wait_until};

use super::good_and;
use super::report::doctor;

#[test]
fn nodes_of_a_quorum_must_be_alive_in_majority_and_independent() {
    let nodes: Vec<RedisServer> = (0..3).map(|_| good_and(&[])).collect();
    let url = |nodes: &[&RedisServer]| {
        let places: Vec<_> = nodes.iter().map(|node| node.address()).collect();
        format!("redlock://{}", places.join(","))
    };
    let all: Vec<&RedisServer> = nodes.iter().collect();
    // The nodes have been running for less than this.
    let report = doctor(&[&url(&all)], &["--set", "redlock_max_ttl=1h"]);
    assert_eq!(
        report.problems(),
        BTreeMap::from([("vote".to_owned(), "warning".to_owned())])
    );
    let vote = report.at(Some(&nodes[0].address()), "vote");
    assert!(vote["found"].as_str().unwrap().contains("it has no vote yet"), "{vote}");
    for check in ["majority", "independent", "clocks"] {
        assert_eq!(report.one(check)["level"], "ok", "{:#}", report.json);
    }
    assert_eq!(report.at(Some(&nodes[2].address()), "persistence")["level"], "ok");

    // One server under two names.
    let twice = format!("{},localhost:{}", url(&all[..2]), nodes[0].port());
    let report = doctor(&[&twice], &[]);
    assert_eq!(report.code, 2);
    assert!(
        report.one("independent")["found"]
            .as_str()
            .unwrap()
            .ends_with("are the same server")
    );

    let port = nodes[0].port().to_string();
    nodes[1].command(&["REPLICAOF", "127.0.0.1", &port]);
    let report = doctor(&[&url(&all)], &[]);
    let expected = format!("{} is a replica of {}", nodes[1].address(), nodes[0].address());
    assert_eq!(report.one("independent")["found"], expected.as_str());
    assert_eq!(report.at(Some(&nodes[1].address()), "role")["level"], "error");
    nodes[1].command(&["REPLICAOF", "NO", "ONE"]);

    nodes[1].kill();
    let report = doctor(&[&url(&all)], &[]);
    assert_eq!(
        (report.code, &report.one("majority")["level"]),
        (1, &"warning".into()),
        "{:#}",
        report.json
    );
    nodes[2].kill();
    let report = doctor(&[&url(&all)], &[]);
    assert_eq!((report.code, &report.one("majority")["level"]), (2, &"error".into()));
    assert_eq!(report.one("majority")["found"], "1 of 3 nodes answer, 2 are needed");
}

#[test]
fn a_cluster_of_which_a_part_is_missing_is_an_error() {
    // The nodes hold out longer than a busy machine may stall one of them.
    let cluster = ["--cluster-enabled", "yes", "--cluster-node-timeout", "15000"];
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
    let report = doctor(&[&url], &[]);
    for check in ["cluster_state", "slots", "nodes-agree"] {
        assert_eq!(report.one(check)["level"], "ok", "{:#}", report.json);
    }
    assert_eq!(report.one("replicas-per-primary")["level"], "warning");
    assert_eq!(report.one("cluster-require-full-coverage")["level"], "note");
    assert_eq!(report.at(Some(&second.address()), "mode")["level"], "ok");
    assert_eq!(report.code, 1, "{:#}", report.json);

    // A cluster node is not a standalone server, and vice versa.
    let alone = doctor(&[&first.url()], &[]);
    alone.has_only_problem("mode", "error", &["redis+cluster://"]);
    let plain = good_and(&[]);
    let report = doctor(&[&format!("redis+cluster://{}", plain.address())], &[]);
    assert_eq!(report.one("mode")["level"], "error", "{:#}", report.json);
    assert!(
        report.one("mode")["fix"]
            .as_str()
            .unwrap()
            .contains("use redis:// for this server")
    );

    second.kill();
    first.command(&["CONFIG", "SET", "cluster-node-timeout", "1000"]);
    wait_until("the cluster is down", PATIENCE, || {
        let info: String = first.query(&["CLUSTER", "INFO"]);
        info.contains("cluster_state:fail")
    });
    let report = doctor(&[&url], &[]);
    assert_eq!(report.code, 2);
    assert_eq!(report.one("cluster_state")["level"], "error");
    assert!(
        report.one("cluster_state")["fix"]
            .as_str()
            .unwrap()
            .contains("redis-cli --cluster check")
    );
    assert_eq!(report.at(Some(&first.address()), "reachable")["level"], "ok");
}

#[test]
fn quorum_node_without_persistence_is_a_note_not_a_warning() {
    let nodes: Vec<RedisServer> = (0..3).map(|_| good_and(&[])).collect();
    let places: Vec<_> = nodes.iter().map(RedisServer::address).collect();
    let url = format!("redlock://{}", places.join(","));
    nodes[1].command(&["CONFIG", "SET", "appendfsync", "no"]);
    nodes[2].command(&["CONFIG", "SET", "appendonly", "no"]);
    let report = doctor(&[&url], &["--set", "redlock_max_ttl=1h"]);
    let found = |node: &RedisServer| report.at(Some(&node.address()), "persistence").clone();
    assert_eq!(found(&nodes[0])["level"], "ok");
    for (node, words) in [(&nodes[1], "appendfsync no"), (&nodes[2], "appendonly no")] {
        let finding = found(node);
        assert_eq!(finding["level"], "note", "{finding}");
        assert!(finding["found"].as_str().unwrap().contains(words), "{finding}");
        let why = finding["why"].as_str().unwrap();
        assert!(why.contains("no vote until redlock_max_ttl has passed"), "{finding}");
    }
    // A standalone server has no other nodes to consult.
    let report = doctor(&[&nodes[1].url()], &[]);
    report.has_only_problem("persistence", "warning", &["CONFIG SET appendfsync everysec"]);
}

#[test]
fn nodes_with_another_map_are_reported_individually() {
    let nodes: Vec<RedisServer> = (0..3).map(|_| good_and(&[])).collect();
    let places: Vec<_> = nodes.iter().map(RedisServer::address).collect();
    nodes[1].command(&["SET", "lock:%map", "v2 a:0-8191,b:8192-16383 here=a; node 2 of 3"]);
    let report = doctor(&[&format!("redlock://{}", places.join(","))], &[]);
    assert_eq!(report.code, 2, "{:#}", report.json);
    let level = |node: &RedisServer| report.at(Some(&node.address()), "shard-map")["level"].clone();
    assert_eq!((level(&nodes[0]), level(&nodes[1])), ("ok".into(), "error".into()));
}

#[test]
fn stored_map_of_a_quorum_node_must_match_its_number() {
    let nodes: Vec<RedisServer> = (0..3).map(|_| good_and(&[])).collect();
    let places: Vec<_> = nodes.iter().map(RedisServer::address).collect();
    // A different shard name is accepted, a different node number is not.
    for (node, number) in nodes.iter().zip([1, 2, 1]) {
        let stored = format!("v2 main:0-16383 here=main; node {number} of 3; redlock_max_ttl 10s");
        node.command(&["SET", "lock:%map", &stored]);
    }
    let report = doctor(&[&format!("redlock://{}", places.join(","))], &[]);
    let levels = nodes
        .iter()
        .map(|node| report.at(Some(&node.address()), "shard-map")["level"].clone());
    assert_eq!(levels.collect::<Vec<_>>(), ["ok", "ok", "error"], "{:#}", report.json);
}

/// As in containers, where nodes announce addresses that are only reachable inside.
#[test]
fn unreachable_announced_address_is_reported_as_announced() {
    let cluster = Cluster::start(3, 0);
    let node = &cluster.nodes()[0];
    let port = free_port().to_string();
    node.command(&["CONFIG", "SET", "cluster-announce-port", &port]);
    let announced = format!("127.0.0.1:{port}");
    wait_until("the node announces the port", PATIENCE, || {
        let nodes: String = node.query(&["CLUSTER", "NODES"]);
        nodes.contains(&announced)
    });
    let report = doctor(&[&cluster.url()], &[]);
    let finding = report.at(Some(&announced), "reachable").to_string();
    for words in ["was announced by the nodes of the cluster", "cluster-announce-port"] {
        assert!(finding.contains(words), "{finding}");
    }
}
