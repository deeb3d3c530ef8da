//! Metrics by node of a quorum.

use super::recorder::{Counter, Gauge, counter, gauge};

use super::table::{QUORUM_SUSPECTS, QUORUM_VOTES};

/// The metrics of one node of a quorum.
#[derive(Debug)]
pub(crate) struct NodeMetrics {
    pub(crate) given: Counter,
    pub(crate) refused: Counter,
    pub(crate) unanswered: Counter,
    pub(crate) suspect: Gauge,
}

impl NodeMetrics {
    /// Nodes are numbered from 1 in the order of the URL.
    pub(crate) fn new(shard: &str, node: usize) -> Self {
        let (shard, node) = (|| shard.to_owned(), || node.to_string());
        let votes =
            |outcome: &'static str| counter!(QUORUM_VOTES, "shard" => shard(), "node" => node(), "outcome" => outcome);
        Self {
            given: votes("given"),
            refused: votes("refused"),
            unanswered: votes("unanswered"),
            suspect: gauge!(QUORUM_SUSPECTS, "shard" => shard(), "node" => node()),
        }
    }
}
