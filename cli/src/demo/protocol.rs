//! The messages between the demo and its workers.

use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The first line that a worker receives. It is sent as input rather than as arguments, which other
/// users could read: a URL may contain a password.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct WorkerSettings {
    pub(super) shards: Vec<String>,
    /// The servers for the data: one per shard, or one for all.
    pub(super) data: Vec<String>,
    /// The prefix of all keys of the demo.
    pub(super) prefix: String,
    pub(super) tasks: u32,
    pub(super) think: Duration,
    pub(super) keys: u32,
    /// How many calls at once the partner serves.
    pub(super) partner_limit: u16,
    /// Where to serve metrics; `None` for a free port of 127.0.0.1.
    pub(super) metrics: Option<SocketAddr>,
    /// `Some` if the worker only generates load.
    pub(super) load: Option<LoadSettings>,
}

/// Settings of a worker that only generates load.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct LoadSettings {
    /// Whether the demo has started the servers, and so chooses the TTL.
    pub(super) owns_servers: bool,
}

/// The commands to a worker. Each is answered with the [`Counts`] of its kind.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Command {
    Claim {
        locked: bool,
    },
    Call {
        with_permits: bool,
    },
    Work {
        seconds: Duration,
    },
    /// Has no answer: it runs until the worker ends.
    Load,
    Shutdown,
}

/// The answer to a command.
#[derive(Debug, Clone, Serialize)]
#[serde(untagged)]
pub(super) enum Counts {
    /// The command has none.
    None,
    Calls(CallCounts),
    Jobs(JobCounts),
}

/// The calls of a worker.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(super) struct CallCounts {
    pub(super) served: u64,
    pub(super) refused: u64,
    /// The largest number of calls that the partner saw at once, of all workers, when a call of
    /// this one began.
    pub(super) most_at_once: u64,
}

/// The counts of a worker during the jobs.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct JobCounts {
    pub(super) completed: u64,
    pub(super) token_regressions: u64,
    /// Acquired locks by path.
    pub(super) uncontended: u64,
    pub(super) local: u64,
    pub(super) remote: u64,
    /// Round trips to the stores, renewals included.
    pub(super) store_requests: u64,
    /// A histogram of the waits: microseconds, and the number of waits of that length.
    pub(super) waits: Vec<(u64, u64)>,
}

/// The names of the demo's own data.
#[derive(Debug, Clone)]
pub(super) struct KeyNames {
    prefix: String,
}

/// The lock that the customers take.
pub(super) const COUPON_LOCK: &str = "coupon:promotion";

/// The key of the permits for calls of the partner.
pub(super) const PARTNER_LOCK: &str = "partner-api";

impl KeyNames {
    pub(super) fn new(prefix: &str) -> Self {
        Self {
            prefix: prefix.to_owned(),
        }
    }

    /// The namespace of the locks: inside the prefix, but separate from the data.
    pub(super) fn namespace(&self) -> String {
        format!("{}lock:", self.prefix)
    }

    /// The number of coupons left.
    pub(super) fn coupons_left(&self) -> String {
        format!("{}data:coupons", self.prefix)
    }

    /// The claims: a list of fencing tokens, 0 for a claim without the lock.
    pub(super) fn ledger(&self) -> String {
        format!("{}data:ledger", self.prefix)
    }

    /// The number of calls that the partner works on.
    pub(super) fn calls(&self) -> String {
        format!("{}data:calls", self.prefix)
    }

    /// The number of jobs done on a key, and the token of the last one: a hash.
    pub(super) fn job(&self, rank: usize) -> String {
        format!("{}data:job:{rank}", self.prefix)
    }
}
