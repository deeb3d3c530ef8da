//! Quorums of independent servers.

use super::server::RedisServer;
use super::wait::{PATIENCE, eventually};

/// Servers that know nothing of each other, each with a vote, for managers whose `redlock_max_ttl` is one second.
pub struct Quorum {
    pub nodes: Vec<RedisServer>,
}

impl Quorum {
    /// Starts the servers and waits until all have a vote.
    pub async fn start(count: usize) -> Self {
        let nodes = (0..count).map(|_| RedisServer::start()).collect();
        let quorum = Self { nodes };
        for node in &quorum.nodes {
            has_vote(node).await;
        }
        quorum
    }

    /// `redlock://host:port,…`
    pub fn url(&self) -> String {
        let places: Vec<String> = self.nodes.iter().map(RedisServer::address).collect();
        format!("redlock://{}", places.join(","))
    }

    /// What is on those nodes besides counters and the shard map, sorted.
    pub fn left_on(&self, nodes: impl IntoIterator<Item = usize>) -> Vec<String> {
        let keys = nodes.into_iter().flat_map(|node| {
            let keys = self.nodes[node].keys();
            keys.into_iter()
                .filter(|key| !key.contains('%'))
                .map(move |key| format!("{node}: {key}"))
        });
        keys.collect()
    }

    /// Waits until nothing of any lock is on those nodes.
    pub async fn is_empty_on(&self, nodes: std::ops::Range<usize>) {
        let what = "nothing is left on the nodes";
        eventually(what, PATIENCE, || self.left_on(nodes.clone()).is_empty()).await;
    }
}

/// Waits until the server runs for so long that it has a vote: its age is in whole seconds and may be one less.
pub async fn has_vote(server: &RedisServer) {
    eventually("the node has a vote", PATIENCE, || uptime(server) >= 2).await;
}

/// Waits until every manager knows that a server which was restarted has a vote: those that connected first add what they could not know
/// of its age.
pub async fn all_know_its_vote(server: &RedisServer) {
    eventually("all know that the node has a vote", PATIENCE, || uptime(server) >= 4).await;
}

fn uptime(server: &RedisServer) -> u64 {
    let info: String = server.query(&["INFO", "server"]);
    let line = info.lines().find_map(|line| line.strip_prefix("uptime_in_seconds:"));
    line.and_then(|line| line.trim().parse().ok())
        .unwrap_or_else(|| panic!("no uptime: {info}"))
}
