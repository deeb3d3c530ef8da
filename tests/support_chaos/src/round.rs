//! One round: processes and servers, faults for some time, and the verdict on the histories.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use support::directory;

use crate::checker::{self, Terms, Verdict};
use crate::clock::now;
use crate::faults::{Deck, Fault, some_time};
use crate::history::{self, Event, Journal};
use crate::machine::Watch;

/// Time limit for processes to finish, and for leftover keys to expire from the servers.
const END_WITHIN: Duration = Duration::from_secs(30);

/// What a round attacks: servers, the processes that contend for locks on them, and their faults.
pub trait Attacked {
    /// What the checker needs to know.
    fn terms(&self) -> Terms;

    /// The faults that can be injected.
    fn faults(&self) -> &'static [Fault];

    /// The number of processes that a fault chooses from.
    fn choices(&self) -> usize;

    /// What the history says of the processes that the fault is about to affect: a name, the
    /// beginning of names with a `*`, or `-` if it affects the servers.
    fn victim(&self, fault: Fault, choice: usize) -> String;

    /// Injects the fault, and waits until it has ended and the servers are healthy.
    fn strike(&mut self, fault: Fault, choice: usize, rng: &mut SmallRng);

    /// Asks all processes to finish, and returns what did not finish in time.
    fn end(&mut self, within: Duration) -> Vec<String>;

    /// Keys of individual locks that are left on the servers.
    fn left(&self) -> Vec<String>;
}

/// Starts what a round attacks. The processes write their histories into the folder.
pub type Start<'a> = &'a dyn Fn(&Plan<'_>, &Path) -> Box<dyn Attacked>;

/// What happens in a round.
pub struct Plan<'a> {
    /// The kind of what is attacked, for reports.
    pub kind: &'a str,
    /// Determines the faults, their times and their victims.
    pub seed: u64,
    /// Duration of the fault phase. If `None`, each fault occurs once.
    pub lasts: Option<Duration>,
    /// Maximum pause between two faults.
    pub pause: Duration,
    /// Duration of the fault-free phases: one at the end, and occasional ones in between.
    pub calm: Duration,
    /// Restricts the round to these faults, by name. Empty means all faults.
    pub only: &'a [String],
    /// The folder in which the histories of a round with findings are kept.
    pub keep_in: &'a Path,
}

pub(crate) struct Outcome {
    pub(crate) faults: BTreeMap<&'static str, u64>,
    pub(crate) verdict: Verdict,
    pub(crate) lasted: Duration,
}

impl Plan<'_> {
    pub(crate) fn run(&self, start: Start<'_>) -> Outcome {
        let begun = Instant::now();
        let dir = directory("chaos");
        let mut rng = SmallRng::seed_from_u64(self.seed);
        let watch = Watch::start(dir.path());
        let mut attacked = start(self, dir.path());
        let journal = Journal::create(dir.path(), "nemesis");
        let faults = self.strike(&mut *attacked, &journal, &mut rng);
        for late in attacked.end(END_WITHIN) {
            let what = format!("{late} does not end");
            journal.note(now(), 0, Event::Left { what });
        }
        for name in left(&*attacked) {
            let what = format!("{name} is on a server");
            journal.note(now(), 0, Event::Left { what });
        }
        drop(watch);
        let verdict = checker::check(&history::read(dir.path()), attacked.terms());
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
        attacked: &mut dyn Attacked,
        journal: &Journal,
        rng: &mut SmallRng,
    ) -> BTreeMap<&'static str, u64> {
        let mut counts = BTreeMap::new();
        let wanted = |fault: &Fault| self.only.is_empty() || self.only.iter().any(|name| name == fault.name());
        let mut deck = Deck::new(attacked.faults().iter().copied().filter(wanted).collect());
        let begun = Instant::now();
        let mut number = 0;
        while number == 0 || self.lasts.map_or(!deck.is_through(), |lasts| begun.elapsed() < lasts) {
            number += 1;
            thread::sleep(some_time(rng, 100, self.pause.as_millis() as u64));
            let (fault, choice) = (deck.draw(rng), rng.random_range(0..attacked.choices()));
            let (name, target) = (fault.name().to_owned(), attacked.victim(fault, choice));
            journal.note(now(), number, Event::FaultBegun { fault: name, target });
            attacked.strike(fault, choice, rng);
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
        let kept = self.keep_in.join(format!("chaos-{}-{}", self.kind, self.seed));
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
fn left(attacked: &dyn Attacked) -> Vec<String> {
    let mut left = attacked.left();
    // Count polls instead of measuring time, because time during which the machine is stalled must
    // not count.
    for _ in 0..END_WITHIN.as_millis() / 50 {
        if left.is_empty() {
            break;
        }
        thread::sleep(Duration::from_millis(50));
        left = attacked.left();
    }
    left
}
