//! Faults, and the panels that show them.

use std::time::{Duration, Instant};

use rustix::process::{Signal, kill_process};

use crate::scene::Scene;
use crate::support::{ClientType, PATIENCE, RedisServer, other_clock, quorum, wait_until};

/// Panels that may have nothing but zeros while all is well.
pub(crate) const QUIET: &[&str] = &[
    "Leases lost",
    "Shards down",
    "Leases lost, by reason",
    "Token regressions",
    "Clock jumps of servers",
    "Stalls",
    "Time stood still",
    "Stale grants",
    "Abandoned cycles",
    "Failed requests",
    "Connections opened",
    "Subscriptions made again",
    "Suspects of a quorum",
];

/// Something that goes wrong.
pub(crate) struct Fault {
    pub(crate) what: &'static str,
    pub(crate) shown_by: &'static [Sign],
    pub(crate) inject: fn(&Scene),
    /// Whether it is injected again and again until it shows.
    pub(crate) is_repeated: bool,
    /// Whether nothing else shows like that, however busy the machine is.
    pub(crate) is_unmistakable: bool,
    pub(crate) mend: fn(&Scene),
}

/// How a fault shows: in a series of this panel that has these labels and such a value.
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
    is_unmistakable: false,
    mend: |_| {},
};

/// One after the other.
pub(crate) const FAULTS: &[Fault] = &[
    Fault {
        what: "somebody deletes the keys of leases",
        shown_by: &[
            above_zero("Leases lost, by reason", &[("reason", "taken")]),
            above_zero("Leases lost", &[]),
            above_zero("Renewals", &[("outcome", "not_ours")]),
        ],
        inject: |scene| {
            remove_reports(&scene.first);
            remove_reports(&scene.second);
        },
        is_repeated: true,
        is_unmistakable: true,
        ..PLAIN
    },
    Fault {
        what: "subscriptions are cut off",
        shown_by: &[
            above_zero("Subscriptions made again", &[("shard", "shard-1")]),
            above_zero("Connections opened", &[("shard", "shard-1"), ("kind", "subscription")]),
        ],
        inject: |scene| {
            scene.second.client_kill(ClientType::PubSub);
        },
        ..PLAIN
    },
    Fault {
        what: "a grant comes for nobody",
        shown_by: &[above_zero("Stale grants", &[("shard", "shard-1")])],
        inject: |scene| {
            // The load has a namespace of its own, and its inboxes are gone for a moment after they were cut off.
            let keys = scene.second.keys();
            let Some((namespace, _)) = keys.iter().find_map(|key| key.split_once('%')) else {
                return;
            };
            let leases = keys
                .iter()
                .filter(|key| key.starts_with(namespace) && !key.contains('%'));
            for lease in leases {
                let owner: Option<String> = scene.second.query(&["GET", lease]);
                let Some((manager, cycle)) = owner.as_deref().and_then(|owner| owner.rsplit_once(':')) else {
                    continue;
                };
                // A key of the same shard: what is pushed for another shard's key is not looked at.
                let key = format!("nobody-wants-it-{{{}}}", &lease[namespace.len()..]);
                let (inbox, grant) = (format!("{namespace}in:{manager}"), format!("g {cycle} 90 8 0 {key}"));
                let received: u64 = scene.second.query(&["PUBLISH", &inbox, &grant]);
                println!("{received} connections received {grant:?} in {inbox}");
            }
        },
        is_repeated: true,
        ..PLAIN
    },
    Fault {
        what: "the clock of a server jumps",
        shown_by: &[
            above_zero("Clock jumps of servers", &[("shard", "shard-0")]),
            Sign {
                panel: "Clock drift of servers",
                labels: &[("shard", "shard-0")],
                is_bad: |seconds| seconds > 0.5,
            },
        ],
        inject: |scene| other_clock::set(scene.first.dir(), 1),
        is_unmistakable: true,
        ..PLAIN
    },
    Fault {
        what: "a process stands still for longer than its TTL",
        shown_by: &[
            Sign {
                panel: "Time stood still",
                labels: &[],
                is_bad: |part| part > 0.3,
            },
            above_zero("Stalls", &[]),
        ],
        inject: |scene| {
            let worker = scene.worker();
            kill_process(worker, Signal::STOP).expect("stop a worker");
            let (stopped_at, long) = (Instant::now(), quorum::MAX_TTL + Duration::from_millis(500));
            wait_until("it has stood still", PATIENCE, || stopped_at.elapsed() > long);
            kill_process(worker, Signal::CONT).expect("let a worker go on");
        },
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
            above_zero("Requests without a lock, by outcome", &[("outcome", "unavailable")]),
            above_zero("Abandoned cycles", &[("shard", "shard-1")]),
        ],
        inject: |scene| scene.second.stop(),
        mend: |scene| scene.second.cont(),
        ..PLAIN
    },
    Fault {
        what: "a node of a quorum is down",
        shown_by: &[
            above_zero("Suspects of a quorum", &[("node", "3")]),
            above_zero("Votes of a quorum's nodes", &[("node", "3"), ("outcome", "unanswered")]),
        ],
        inject: |scene| scene.quorum.nodes()[2].kill(),
        ..PLAIN
    },
    // The last, since it can't be mended. A counter that merely went back is raised by the scripts.
    Fault {
        what: "counters are beyond what a script can count",
        shown_by: &[above_zero("Token regressions", &[("shard", "shard-0")])],
        inject: |scene| {
            for counter in scene.first.keys().iter().filter(|key| key.contains("%fence:")) {
                scene.first.command(&["SET", counter, BEYOND_COUNTING]);
            }
        },
        is_unmistakable: true,
        ..PLAIN
    },
];

/// Numbers in scripts are floating-point: there, this plus one is the same number again.
const BEYOND_COUNTING: &str = "9000000000000000000";

/// The keys of leases that are held for long.
fn remove_reports(server: &RedisServer) {
    for key in server.keys() {
        if key.contains("lock:report:") && !key.starts_with('{') {
            server.command(&["DEL", &key]);
        }
    }
}
