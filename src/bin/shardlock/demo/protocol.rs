//! What the demo and its workers say to each other.

use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The first line that a worker gets. It comes by its input and not by its arguments, which others could read: a URL
/// may hold a password.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Setup {
    pub(super) shards: Vec<String>,
    /// The servers for the data: one for each shard, or one for all.
    pub(super) data: Vec<String>,
    /// What all of the demo's keys begin with.
    pub(super) prefix: String,
    pub(super) tasks: u32,
    pub(super) think: Duration,
    pub(super) keys: u32,
    /// Where to serve metrics, if not at a free port of 127.0.0.1.
    pub(super) metrics: Option<SocketAddr>,
    /// Whether the worker is hired for the load alone.
    pub(super) load: Option<Load>,
}

/// How a worker is set up that is hired for the load alone.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Load {
    /// Whether the demo has started the servers, and so decides on the TTL.
    pub(super) are_servers_ours: bool,
}

/// What a worker is told to do. The answer to [`Order::Work`] is a [`Worked`], the others have nothing to tell.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Order {
    Claim {
        locked: bool,
    },
    Work {
        seconds: Duration,
    },
    /// Has no answer: it ends with the worker.
    Load,
    Leave,
}

/// What a worker counted during the jobs.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Worked {
    pub(super) completed: u64,
    pub(super) token_regressions: u64,
    /// How many locks were had by each path.
    pub(super) uncontended: u64,
    pub(super) local: u64,
    pub(super) remote: u64,
    /// Round trips to the stores, renewals included.
    pub(super) store_requests: u64,
    /// A histogram of the waits: microseconds, and how many waits lasted so long.
    pub(super) waits: Vec<(u64, u64)>,
}

/// What the demo's own data are called.
#[derive(Debug, Clone)]
pub(super) struct Names {
    prefix: String,
}

/// The lock that the customers take.
pub(super) const COUPON_LOCK: &str = "coupon:promotion";

impl Names {
    pub(super) fn new(prefix: &str) -> Self {
        Self {
            prefix: prefix.to_owned(),
        }
    }

    /// The namespace of the locks: within the prefix, and apart from the data.
    pub(super) fn namespace(&self) -> String {
        format!("{}lock:", self.prefix)
    }

    /// How many coupons are left: a number.
    pub(super) fn coupons_left(&self) -> String {
        format!("{}data:coupons", self.prefix)
    }

    /// Who got a coupon: a list of fencing tokens, 0 for a claim without the lock.
    pub(super) fn ledger(&self) -> String {
        format!("{}data:ledger", self.prefix)
    }

    /// How many jobs were done on a key, and the token of the last: a hash.
    pub(super) fn job(&self, rank: usize) -> String {
        format!("{}data:job:{rank}", self.prefix)
    }
}
