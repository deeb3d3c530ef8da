//! Independent Redis servers that serve as the nodes of a quorum.

use std::time::Duration;

use crate::server::RedisServer;
use crate::wait::{PATIENCE, wait_until};

/// The longest TTL of the managers that use these nodes, and thus the time that a node must have
/// been running before it may vote.
pub const MAX_TTL: Duration = Duration::from_secs(3);

/// The nodes of a quorum. Each can be stopped, killed and restarted like any [`RedisServer`].
pub struct Quorum {
    nodes: Vec<RedisServer>,
}

impl Quorum {
    /// Starts `count` nodes and waits until each may vote.
    #[track_caller]
    pub fn start(count: usize) -> Self {
        Self::start_in(count, &[])
    }

    /// [`start`](Self::start) with extra environment variables for each node.
    #[track_caller]
    pub fn start_in(count: usize, vars: &[(&'static str, String)]) -> Self {
        let start = |_| {
            let vars = vars.to_vec();
            std::thread::spawn(move || RedisServer::start_in(&vars, &[]))
        };
        let starting: Vec<_> = (0..count).map(start).collect();
        let nodes = starting
            .into_iter()
            .map(|node| node.join().expect("start a node"))
            .collect();
        let quorum = Self { nodes };
        (0..count).for_each(|node| quorum.wait_for_vote(node));
        quorum
    }

    /// `redlock://127.0.0.1:<port>,...`
    pub fn url(&self) -> String {
        let places: Vec<_> = self.nodes.iter().map(RedisServer::address).collect();
        format!("redlock://{}", places.join(","))
    }

    /// The nodes, in URL order.
    pub fn nodes(&self) -> &[RedisServer] {
        &self.nodes
    }

    /// Waits until the node has been running long enough to vote.
    #[track_caller]
    pub fn wait_for_vote(&self, node: usize) {
        let has_vote = || {
            let info: String = self.nodes[node].query(&["INFO", "server"]);
            let uptime = info.lines().find_map(|line| line.strip_prefix("uptime_in_seconds:"));
            let uptime: u64 = uptime.expect("an uptime").trim().parse().expect("a number");
            // Managers compute the start of the vote from a truncated uptime, which may put it up
            // to a second later.
            Duration::from_secs(uptime) > MAX_TTL + Duration::from_secs(1)
        };
        wait_until("the node may vote", PATIENCE, has_vote);
    }
}
