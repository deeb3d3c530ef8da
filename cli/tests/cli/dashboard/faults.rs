//! Faults and the panels that show them.

use std::time::{Duration, Instant};

use rustix::process::{Signal, kill_process};
use support::{ClientType, PATIENCE, RedisServer, other_clock, quorum, wait_until};

use super::environment::Environment;

/// Panels that may show only zeros while there is no fault.
pub(crate) const QUIET: &[&str] = &[
    "Leases lost",
    "Shards down",
    "Leases lost, by reason",
    "Renewals that fail",
    "Token regressions",
    "Server clock jumps",
    "Stalls",
    "Time stalled",
    "Stale grants",
    "Abandoned cycles",
    "Failed requests",
    "Requests that the store fails, by class",
    "Connections opened",
    "Resubscriptions",
    "Suspect quorum nodes",
];

/// A fault.
pub(crate) struct Fault {
    pub(crate) what: &'static str,
    pub(crate) shown_by: &'static [Sign],
    pub(crate) inject: fn(&Environment),
    /// Whether the fault is injected repeatedly until it shows.
    pub(crate) is_repeated: bool,
    /// Injected again after this time without a sign: a busy machine may miss the time in which a
    /// sign can be seen.
    pub(crate) again_after: Option<Duration>,
    /// Whether nothing else causes the same sign, however busy the machine is.
    pub(crate) is_unmistakable: bool,
    pub(crate) mend: fn(&Environment),
}

/// How a fault shows: in a series of this panel with these labels and such a value.
pub(crate) struct Sign {
    pub(crate) panel: &'static str,
    pub(crate) labels: &'static [(&'static str, &'static str)],
    pub(crate) is_bad: fn(f64) -> bool,
}

const fn above_zero(panel: &'static str, labels: &'static [(&'static str, &'static str)]) -> Sign {
    Sign {
        panel,
        labels,
        is_bad: |value| value > 0.0,
    }
}

const PLAIN: Fault = Fault {
    what: "",
    shown_by: &[],
    inject: |_| {},
    is_repeated: false,
    again_after: None,
    is_unmistakable: false,
    mend: |_| {},
};

/// Injected one after the other.
pub(crate) const FAULTS: &[Fault] = &[
    Fault {
        what: "the keys of leases are deleted",
        shown_by: &[
            above_zero("Leases lost, by reason", &[("reason", "taken")]),
            above_zero("Leases lost", &[]),
            above_zero("Locks lost", &[("reason", "taken")]),
            above_zero("Renewals", &[("outcome", "not_ours")]),
        ],
        inject: |environment| {
            remove_reports(&environment.first);
            remove_reports(&environment.second);
        },
        is_repeated: true,
        is_unmistakable: true,
        ..PLAIN
    },
    Fault {
        what: "subscriptions are cut off",
        shown_by: &[
            above_zero("Resubscriptions", &[("shard", "shard-1")]),
            above_zero("Connections opened", &[("shard", "shard-1"), ("kind", "subscription")]),
        ],
        inject: |environment| {
            environment.second.client_kill(ClientType::PubSub);
        },
        again_after: Some(Duration::from_secs(8)),
        ..PLAIN
    },
    Fault {
        what: "a grant arrives for a key without waiters",
        shown_by: &[above_zero("Stale grants", &[("shard", "shard-1")])],
        inject: |environment| {
            // The load has its own namespace, and its inboxes are gone for a moment after they were
            // cut off.
            let keys = environment.second.keys();
            let Some((namespace, _)) = keys.iter().find_map(|key| key.split_once('%')) else {
                return;
            };
            let leases = keys
                .iter()
                .filter(|key| key.starts_with(namespace) && !key.contains('%'));
            for lease in leases {
                let owner: Option<String> = environment.second.query(&["GET", lease]);
                let Some((manager, cycle)) = owner.as_deref().and_then(|owner| owner.rsplit_once(':')) else {
                    continue;
                };
                // A key of the same shard: grants for keys of other shards are ignored.
                let key = format!("nobody-wants-it-{{{}}}", &lease[namespace.len()..]);
                let (inbox, grant) = (format!("{namespace}in:{manager}"), format!("g {cycle} 90 8 0 {key}"));
                let received: u64 = environment.second.query(&["PUBLISH", &inbox, &grant]);
                println!("{received} connections received {grant:?} in {inbox}");
            }
        },
        is_repeated: true,
        ..PLAIN
    },
    Fault {
        what: "the clock of a server jumps",
        shown_by: &[
            above_zero("Server clock jumps", &[("shard", "shard-0")]),
            Sign {
                panel: "Server clock drift",
                labels: &[("shard", "shard-0")],
                is_bad: |seconds| seconds > 0.5,
            },
        ],
        // More than what a late answer to a probe leaves open, and less than a TTL.
        inject: |environment| other_clock::set(environment.first.dir(), 2),
        is_unmistakable: true,
        ..PLAIN
    },
    Fault {
        what: "a process is stopped for longer than its TTL",
        shown_by: &[
            Sign {
                panel: "Time stalled",
                labels: &[],
                is_bad: |part| part > 0.3,
            },
            above_zero("Stalls", &[]),
        ],
        inject: |environment| {
            let worker = environment.worker();
            kill_process(worker, Signal::STOP).expect("stop a worker");
            let (stopped_at, long) = (Instant::now(), quorum::MAX_TTL + Duration::from_millis(500));
            wait_until("the worker was stopped for long enough", PATIENCE, || {
                stopped_at.elapsed() > long
            });
            kill_process(worker, Signal::CONT).expect("resume a worker");
        },
        again_after: Some(Duration::from_secs(8)),
        ..PLAIN
    },
    Fault {
        what: "a server is silent",
        shown_by: &[
            above_zero("Failed requests", &[("shard", "shard-1")]),
            above_zero("Shards down", &[]),
            Sign {
                panel: "Shards up",
                labels: &[("shard", "shard-1")],
                is_bad: |up| up == 0.0,
            },
            above_zero("Shard down", &[("shard", "shard-1")]),
            above_zero("Renewals that fail", &[("shard", "shard-1")]),
            above_zero("Requests without a lock, by outcome", &[("outcome", "unavailable")]),
            above_zero("Requests that the store fails, by class", &[]),
            above_zero("Abandoned cycles", &[("shard", "shard-1")]),
        ],
        inject: |environment| environment.second.stop(),
        mend: |environment| environment.second.cont(),
        ..PLAIN
    },
    Fault {
        what: "a node of a quorum is down",
        shown_by: &[
            above_zero("Suspect quorum nodes", &[("node", "3")]),
            above_zero("Votes of quorum nodes", &[("node", "3"), ("outcome", "unanswered")]),
        ],
        inject: |environment| environment.quorum.nodes()[2].kill(),
        ..PLAIN
    },
    // The last fault, since it can't be mended. The scripts would raise a counter that merely went
    // back.
    Fault {
        what: "counters are beyond what a script can count",
        shown_by: &[above_zero("Token regressions", &[("shard", "shard-0")])],
        inject: |environment| {
            for counter in environment.first.keys().iter().filter(|key| key.contains("%fence:")) {
                environment.first.command(&["SET", counter, BEYOND_COUNTING]);
            }
        },
        is_unmistakable: true,
        ..PLAIN
    },
];

/// Lua numbers are floating-point: adding one to this does not change it.
const BEYOND_COUNTING: &str = "9000000000000000000";

/// Deletes the keys of leases that are held for long.
fn remove_reports(server: &RedisServer) {
    for key in server.keys() {
        if key.contains("lock:report:") && !key.starts_with('{') {
            server.command(&["DEL", &key]);
        }
    }
}
