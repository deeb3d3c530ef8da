//! One round: workers and servers of one kind, faults for some time, and the verdict on the
//! histories.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use support::directory;

use super::checker::{self, Terms, Verdict};
use super::clock::{nanos, now};
use super::crew::{Crew, PLACES};
use super::faults::{Deck, Fault, some_time};
use super::history::{self, Event, Journal};
use super::machine::Watch;
use super::scene::{self, Scene};

/// Time limit for workers to finish, and for leftover keys to expire from the servers.
const END_WITHIN: Duration = Duration::from_secs(30);

pub struct Plan<'a> {
    pub kind: &'a str,
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
        let dir = directory("chaos");
        let mut rng = SmallRng::seed_from_u64(self.seed);
        let scene = scene::start(self.kind, self.seed);
        let watch = Watch::start(dir.path());
        let mut crew = Crew::start(dir.path().to_owned(), self.seed, &*scene);
        let journal = Journal::create(dir.path(), "nemesis");
        let faults = self.strike(&*scene, &mut crew, &journal, &mut rng);
        for late in crew.end(END_WITHIN) {
            let what = format!("{late} does not end");
            journal.note(now(), 0, Event::Left { what });
        }
        for name in left(&*scene) {
            let what = format!("{name} is on a server");
            journal.note(now(), 0, Event::Left { what });
        }
        drop(watch);
        let lines = history::read(dir.path());
        let terms = Terms {
            ttl: nanos(scene.ttl()),
            is_confirmed: scene.is_confirmed(),
        };
        let verdict = checker::check(&lines, terms);
        if !verdict.violations.is_empty() {
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
        scene: &dyn Scene,
        crew: &mut Crew,
        journal: &Journal,
        rng: &mut SmallRng,
    ) -> BTreeMap<&'static str, u64> {
        let mut counts = BTreeMap::new();
        let faults: Vec<Fault> = scene.faults().to_vec();
        let wanted = |fault: &Fault| self.only.is_empty() || self.only.iter().any(|name| name == fault.name());
        let mut deck = Deck::new(faults.into_iter().filter(wanted).collect());
        let begun = Instant::now();
        let mut number = 0;
        while number == 0 || self.lasts.map_or(!deck.is_through(), |lasts| begun.elapsed() < lasts) {
            number += 1;
            thread::sleep(some_time(rng, 100, self.pause.as_millis() as u64));
            let (fault, place) = (deck.draw(rng), rng.random_range(0..PLACES));
            let target = match fault {
                Fault::KillWorker | Fault::StopWorker | Fault::BlockRuntime => crew.at(place).name.clone(),
                _ => "-".to_owned(),
            };
            let name = fault.name().to_owned();
            journal.note(now(), number, Event::FaultBegun { fault: name, target });
            match fault {
                Fault::KillWorker => crew.replace(place, scene),
                Fault::StopWorker => {
                    let time = some_time(rng, 50, 3 * scene.ttl().as_millis() as u64);
                    crew.at(place).worker.stop();
                    thread::sleep(time);
                    crew.at(place).worker.cont();
                }
                Fault::BlockRuntime => {
                    let time = some_time(rng, 50, 3 * scene.ttl().as_millis() as u64);
                    crew.at(place).worker.send(&format!("block {}", time.as_millis()));
                    thread::sleep(time);
                }
                fault => scene.strike(fault, rng),
            }
            journal.note(now(), number, Event::FaultOver);
            *counts.entry(fault.name()).or_default() += 1;
            if number % 10 == 0 {
                thread::sleep(self.calm);
            }
        }
        thread::sleep(self.calm);
        counts
    }

    /// Keeps the histories of a round with violations.
    fn keep(&self, dir: &Path) {
        let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("chaos-{}-{}", self.kind, self.seed));
        drop(fs::remove_dir_all(&kept));
        fs::create_dir_all(&kept).expect("make a directory");
        for entry in fs::read_dir(dir).expect("read a directory") {
            let entry = entry.expect("read a directory");
            fs::copy(entry.path(), kept.join(entry.file_name())).expect("copy a history");
        }
        println!("the histories are in {}", kept.display());
    }
}

/// Keys that are left on the servers after everything has had time to expire.
fn left(scene: &dyn Scene) -> Vec<String> {
    let mut left = scene.left();
    // Count polls instead of measuring time, because time during which the machine is stalled must
    // not count.
    for _ in 0..END_WITHIN.as_millis() / 50 {
        if left.is_empty() {
            break;
        }
        thread::sleep(Duration::from_millis(50));
        left = scene.left();
    }
    left
}
