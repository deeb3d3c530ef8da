//! Finds the shortest story of a failing seed.
//!
//! # Implementation details
//!
//! A failing run is simplified step by step: one kind of fault less; fewer managers, keys and
//! tasks; half of the time. A step is kept if the run still fails in the same way. Each step
//! changes what is drawn from the random numbers after it, so it is tried with several sequences of
//! them ([`Case::salt`]). Of the remaining runs, the one with the shortest trace is reported.

use std::fmt;

use super::plan::{Plan, Variant};
use super::run::{Failure, run};
use crate::engine::Flaw;

/// The inputs that determine a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Case {
    pub(super) seed: u64,
    pub(super) variant: Variant,
    pub(super) flaw: Option<Flaw>,
    /// The steps that simplify the plan of the seed, as indices into [`STEPS`].
    steps: Vec<usize>,
    /// The sequence of random numbers used after the plan is drawn; zero is the seed's own.
    pub(super) salt: u64,
}

/// A way to simplify a run, with its description.
type Step = (&'static str, fn(&mut Plan));

/// The steps that remove the most come first.
const STEPS: &[Step] = &[
    ("half of the time", |plan| plan.faults_end /= 2),
    ("two managers", |plan| plan.managers = 2),
    ("one key", |plan| plan.keys = 1),
    ("one task in each", |plan| plan.tasks = 1),
    ("one TTL", |plan| plan.ttls.truncate(1)),
    ("no linger", |plan| plan.lingers = vec![std::time::Duration::ZERO]),
    ("no minimum hold", |plan| {
        plan.min_holds = vec![std::time::Duration::ZERO]
    }),
    ("no pauses", |plan| plan.pauses = 0),
    ("no pauses of tasks", |plan| plan.task_pauses = 0),
    ("no crashes", |plan| plan.crashes = 0),
    ("no resets", |plan| plan.resets = 0),
    ("no stalls", |plan| plan.stalls = 0),
    ("no slow times", |plan| plan.slow_times = 0),
    ("no lost subscriptions", |plan| plan.subscription_losses = 0),
    ("no inboxes elsewhere", |plan| plan.inboxes_elsewhere = 0),
    ("no shutdowns", |plan| plan.shutdowns = 0),
    ("no evictions", |plan| plan.evictions = 0),
    ("no foreign owners", |plan| plan.foreigners = 0),
    ("nothing forgotten", |plan| plan.forgettings = 0),
    ("no failovers", |plan| plan.failovers = 0),
    ("no late commands", |plan| plan.ghosts = false),
    ("no slow messages", |plan| plan.slow_chance = 0.0),
    ("no refusals", |plan| plan.refuse_chance = 0.0),
    ("no unknown scripts", |plan| plan.unknown_script_chance = 0.0),
    ("no tries", |plan| plan.try_chance = 0.0),
    ("no longest hold", |plan| plan.max_hold_chance = 0.0),
    ("no long holds", |plan| plan.long_hold_chance = 0.0),
    ("nobody gives up", |plan| plan.give_up_chance = 0.0),
    ("one pause", |plan| plan.pauses = plan.pauses.min(1)),
    ("one reset", |plan| plan.resets = plan.resets.min(1)),
    ("one stall", |plan| plan.stalls = plan.stalls.min(1)),
];
/// The number of steps at the start that remove much and are worth more attempts, and the maximum
/// number of times that the first step is applied.
const LARGE_STEPS: usize = 4;
const HALVINGS_MAX: usize = 4;
/// The number of random sequences tried for a step, and the number that compete for the shortest
/// story.
const SALTS: u64 = 8;
const SALTS_OF_LARGE_STEPS: u64 = 60;
const SALTS_AT_THE_END: u64 = 100;

impl Case {
    pub(super) const fn new(seed: u64, variant: Variant, flaw: Option<Flaw>) -> Self {
        Self {
            seed,
            variant,
            flaw,
            steps: Vec::new(),
            salt: 0,
        }
    }

    /// Applies the steps of this case to the plan of the seed.
    pub(super) fn simplify(&self, plan: &mut Plan) {
        self.steps.iter().for_each(|&step| STEPS[step].1(plan));
    }

    fn with_step(&self, step: usize, salt: u64) -> Self {
        let mut case = Self { salt, ..self.clone() };
        case.steps.push(step);
        case
    }

    fn failure(&self) -> Option<Failure> {
        run(self, false).err()
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "seed {} of {:?}", self.seed, self.variant)?;
        for &step in &self.steps {
            write!(f, ", {}", STEPS[step].0)?;
        }
        if self.salt > 0 {
            write!(f, "; random numbers {}", self.salt)?;
        }
        Ok(())
    }
}

/// Returns the simplest case found that fails in the same way, with its trace.
pub(super) fn shortest(mut case: Case) -> Option<Failure> {
    let kind = case.failure()?.kind();
    let fails = |case: &Case| case.failure().is_some_and(|failure| failure.kind() == kind);
    for step in 0..STEPS.len() {
        let repeats = if step == 0 { HALVINGS_MAX } else { 1 };
        let salts_max = if step < LARGE_STEPS {
            SALTS_OF_LARGE_STEPS
        } else {
            SALTS
        };
        for _ in 0..repeats {
            let salts = std::iter::once(case.salt).chain(1..salts_max);
            match salts.map(|salt| case.with_step(step, salt)).find(fails) {
                Some(simpler) => case = simpler,
                None => break,
            }
        }
    }
    let traced = |salt| run(&Case { salt, ..case.clone() }, true).err();
    let stories = std::iter::once(case.salt).chain(1..SALTS_AT_THE_END).filter_map(traced);
    stories
        .filter(|failure| failure.kind() == kind)
        .min_by_key(Failure::length)
}
