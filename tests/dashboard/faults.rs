//! Faults, and the panels that show them.

use std::time::{Duration, Instant};

use rustix::process::{Signal, kill_process};

use crate::scene::Scene;
use crate::support::{ClientType, PATIENCE, RedisServer, quorum, wait_until};

/// Something that goes wrong.
pub struct Fault {
    pub what: &'static str,
    /// The panels that are above 0 then, and 0 without it.
    pub shown_by: &'static [&'static str],
    /// Done once, or again and again until it shows.
    pub inject: fn(&Scene),
    pub is_repeated: bool,
    pub mend: fn(&Scene),
}

const fn nothing(_: &Scene) {}

pub const FAULTS: &[Fault] = &[
    Fault {
        what: "somebody deletes the keys of leases",
        shown_by: &["Leases lost", "Leases lost, by reason"],
        inject: |scene| {
            for server in [&scene.first, &scene.second] {
                remove_reports(server);
            }
        },
        is_repeated: true,
        mend: nothing,
    },
    Fault {
        what: "subscriptions are cut off",
        shown_by: &["Subscriptions made again", "Connections opened"],
        inject: |scene| {
            scene.second.client_kill(ClientType::PubSub);
        },
        is_repeated: false,
        mend: nothing,
    },
    Fault {
        what: "a grant comes for nobody",
        shown_by: &["Stale grants"],
        inject: |scene| {
            let inboxes = scene.second.channels();
            let inbox = inboxes
                .iter()
                .find(|channel| channel.contains("in:"))
                .expect("an inbox");
            scene
                .second
                .command(&["PUBLISH", inbox, "g 990 90 8 1500 0 nobody-wants-it"]);
        },
        is_repeated: true,
        mend: nothing,
    },
    Fault {
        what: "counters of tokens go back",
        shown_by: &["Token regressions"],
        inject: |scene| {
            for counter in scene.second.keys().iter().filter(|key| key.contains("%fence:")) {
                scene.second.command(&["SET", counter, "1"]);
            }
        },
        is_repeated: true,
        mend: nothing,
    },
    Fault {
        what: "the clock of a server jumps",
        shown_by: &["Clock jumps of servers"],
        inject: |scene| scene.clock.jump_to(1),
        is_repeated: false,
        mend: nothing,
    },
    Fault {
        what: "a process stands still for longer than its TTL",
        shown_by: &["Stalls", "Time stood still"],
        inject: |scene| {
            let worker = scene.worker();
            kill_process(worker, Signal::STOP).expect("stop a worker");
            let (stopped_at, long) = (Instant::now(), quorum::MAX_TTL + Duration::from_millis(500));
            wait_until("it has stood still", PATIENCE, || stopped_at.elapsed() > long);
            kill_process(worker, Signal::CONT).expect("let a worker go on");
        },
        is_repeated: false,
        mend: nothing,
    },
    Fault {
        what: "a server is silent",
        shown_by: &["Failed requests", "Shards down", "Abandoned cycles"],
        inject: |scene| scene.second.stop(),
        is_repeated: false,
        mend: |scene| scene.second.cont(),
    },
    Fault {
        what: "a node of a quorum is down",
        shown_by: &["Suspects of a quorum"],
        inject: |scene| scene.quorum.nodes()[2].kill(),
        is_repeated: false,
        mend: nothing,
    },
];

/// The keys of leases that are held for long.
fn remove_reports(server: &RedisServer) {
    for key in server.keys() {
        if key.contains("lock:report:") && !key.starts_with('{') {
            server.command(&["DEL", &key]);
        }
    }
}
