//! One round: an agent with clients, workers with managers of their own, faults for some time, and
//! the verdict on the histories.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use support::{ClientType, RedisServer, directory};

use super::checker::{self, Terms, Verdict};
use super::clock::{nanos, now};
use super::crew::Crew;
use super::faults::{Deck, Fault, some_time};
use super::history::{self, Event, Journal};
use super::machine::Watch;

/// Time limit for processes to finish, and for leftover keys to expire from the server.
const END_WITHIN: Duration = Duration::from_secs(30);

const TTL: Duration = Duration::from_secs(1);

/// What happens to the agent, to its clients, to others and to the server.
const FAULTS: &[Fault] = &[
    Fault::KillClient,
    Fault::StopClient,
    Fault::KillAgent,
    Fault::DrainAgent,
    Fault::StopAgent,
    Fault::KillWorker,
    Fault::StopWorker,
    Fault::BlockRuntime,
    Fault::HungServer,
    Fault::RestartServer,
    Fault::CutConnections,
    Fault::CutSubscriptions,
];

/// All clients of the agent.
const ALL_CLIENTS: &str = "agent-*";

pub struct Plan<'a> {
    pub seed: u64,
    /// Duration of the fault phase. If `None`, each fault occurs once.
    pub lasts: Option<Duration>,
    /// Maximum pause between two faults.
    pub pause: Duration,
    /// Duration of the fault-free phases: one at the end, and occasional ones in between.
    pub calm: Duration,
    /// Restricts the round to these faults, by name. Empty means all faults.
    pub only: &'a [String],
}

pub struct Outcome {
    pub faults: BTreeMap<&'static str, u64>,
    pub verdict: Verdict,
    pub lasted: Duration,
}

impl Plan<'_> {
    pub fn run(&self) -> Outcome {
        let begun = Instant::now();
        let dir = directory("chaos-agent");
        let mut rng = SmallRng::seed_from_u64(self.seed);
        // A killed server forgets nothing that it has answered: it writes before it answers. It
        // does not wait for the disk: a kill does not need that, and a slow disk costs leases.
        let server = RedisServer::start_with(&["--appendonly", "yes", "--appendfsync", "no"]);
        let watch = Watch::start(dir.path());
        let mut crew = Crew::start(dir.path().to_owned(), self.seed, &server, TTL);
        let journal = Journal::create(dir.path(), "nemesis");
        let faults = self.strike(&server, &mut crew, &journal, &mut rng);
        for late in crew.end(END_WITHIN) {
            let what = format!("{late} does not end");
            journal.note(now(), 0, Event::Left { what });
        }
        for name in left(&server) {
            let what = format!("{name} is on the server");
            journal.note(now(), 0, Event::Left { what });
        }
        drop(watch);
        let terms = Terms {
            ttl: nanos(TTL),
            is_confirmed: false,
        };
        let verdict = checker::check(&history::read(dir.path()), terms);
        if !(verdict.violations.is_empty() && verdict.worth_a_look.is_empty()) {
            self.keep(dir.path());
        }
        Outcome {
            faults,
            verdict,
            lasted: begun.elapsed(),
        }
    }

    fn strike(
        &self,
        server: &RedisServer,
        crew: &mut Crew,
        journal: &Journal,
        rng: &mut SmallRng,
    ) -> BTreeMap<&'static str, u64> {
        let mut counts = BTreeMap::new();
        let wanted = |fault: &Fault| self.only.is_empty() || self.only.iter().any(|name| name == fault.name());
        let mut deck = Deck::new(FAULTS.iter().copied().filter(wanted).collect());
        let begun = Instant::now();
        let mut number = 0;
        while number == 0 || self.lasts.map_or(!deck.is_through(), |lasts| begun.elapsed() < lasts) {
            number += 1;
            thread::sleep(some_time(rng, 100, self.pause.as_millis() as u64));
            let (fault, which) = (deck.draw(rng), rng.random_range(0..6));
            let target = match fault {
                Fault::KillClient | Fault::StopClient => crew.client(which).name.clone(),
                Fault::KillWorker | Fault::StopWorker | Fault::BlockRuntime => crew.worker(which).name.clone(),
                Fault::KillAgent | Fault::DrainAgent | Fault::StopAgent => ALL_CLIENTS.to_owned(),
                _ => "-".to_owned(),
            };
            let name = fault.name().to_owned();
            journal.note(now(), number, Event::FaultBegun { fault: name, target });
            strike(fault, which, server, crew, rng);
            journal.note(now(), number, Event::FaultOver);
            *counts.entry(fault.name()).or_default() += 1;
            if number % 10 == 0 {
                thread::sleep(self.calm);
            }
        }
        thread::sleep(self.calm);
        counts
    }

    /// Keeps the histories of a round with findings.
    fn keep(&self, dir: &Path) {
        let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("chaos-agent-{}", self.seed));
        drop(fs::remove_dir_all(&kept));
        fs::create_dir_all(&kept).expect("make a directory");
        for entry in fs::read_dir(dir).expect("read a directory") {
            let entry = entry.expect("read a directory");
            fs::copy(entry.path(), kept.join(entry.file_name())).expect("copy a history");
        }
        println!("the histories are in {}", kept.display());
    }
}

/// Injects the fault, and waits until it has ended.
fn strike(fault: Fault, which: usize, server: &RedisServer, crew: &mut Crew, rng: &mut SmallRng) {
    let longer_than_a_lease = 3 * TTL.as_millis() as u64;
    match fault {
        Fault::KillClient => crew.replace_client(which),
        Fault::StopClient => {
            crew.client(which).worker.stop();
            thread::sleep(some_time(rng, 50, longer_than_a_lease));
            crew.client(which).worker.cont();
        }
        Fault::KillAgent => {
            crew.agent.kill();
            thread::sleep(some_time(rng, 10, longer_than_a_lease));
            crew.agent.restart();
        }
        Fault::DrainAgent => {
            let ended = crew.agent.drain();
            assert_eq!(ended.code, 0, "the agent has not released everything: {}", ended.stderr);
            crew.agent.restart();
        }
        Fault::StopAgent => {
            crew.agent.stop();
            thread::sleep(some_time(rng, 50, longer_than_a_lease));
            crew.agent.cont();
        }
        Fault::KillWorker => crew.replace_worker(which),
        Fault::StopWorker => {
            crew.worker(which).worker.stop();
            thread::sleep(some_time(rng, 50, longer_than_a_lease));
            crew.worker(which).worker.cont();
        }
        Fault::BlockRuntime => {
            let time = some_time(rng, 50, longer_than_a_lease);
            crew.worker(which).worker.send(&format!("block {}", time.as_millis()));
            thread::sleep(time);
        }
        Fault::HungServer => {
            server.stop();
            thread::sleep(some_time(rng, 100, 4_000));
            server.cont();
        }
        Fault::RestartServer => {
            server.kill();
            thread::sleep(some_time(rng, 10, 1_500));
            server.restart();
        }
        Fault::CutConnections => drop(server.client_kill(ClientType::Normal)),
        Fault::CutSubscriptions => drop(server.client_kill(ClientType::PubSub)),
        other => panic!("not of an agent: {other:?}"),
    }
}

/// Keys of individual locks that are left on the server after everything has had time to expire.
fn left(server: &RedisServer) -> Vec<String> {
    let lock_keys = || {
        let mut keys = server.keys();
        keys.retain(|key| !key.contains("%map") && !key.contains("%fence:"));
        keys
    };
    let mut left = lock_keys();
    // Count polls instead of measuring time, because time during which the machine is stalled must
    // not count.
    for _ in 0..END_WITHIN.as_millis() / 50 {
        if left.is_empty() {
            break;
        }
        thread::sleep(Duration::from_millis(50));
        left = lock_keys();
    }
    left
}
