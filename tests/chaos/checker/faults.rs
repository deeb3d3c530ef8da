//! Which faults were at work, and when.

use std::collections::BTreeMap;

use super::super::clock::Nanos;
use super::super::history::{Event, Line};

/// The target of what stops the whole machine.
pub const EVERYBODY: &str = "everybody";

#[derive(Clone, Debug)]
pub struct Fault {
    pub name: String,
    pub target: String,
    pub begun: Nanos,
    /// The end of time if it was never over.
    pub over: Nanos,
}

#[derive(Clone, Debug)]
pub struct Faults(Vec<Fault>);

impl Faults {
    pub fn of(lines: &[Line]) -> Self {
        let mut faults: BTreeMap<(&str, u64), Fault> = BTreeMap::new();
        for line in lines {
            match &line.event {
                Event::FaultBegun { fault, target } => {
                    let fault = Fault {
                        name: fault.clone(),
                        target: target.clone(),
                        begun: line.at,
                        over: Nanos::MAX,
                    };
                    faults.insert((&line.who, line.number), fault);
                }
                Event::FaultOver => {
                    let fault = faults.get_mut(&(line.who.as_str(), line.number));
                    fault.expect("it began").over = line.at;
                }
                _ => {}
            }
        }
        Self(faults.into_values().collect())
    }

    pub fn iter(&self) -> impl Iterator<Item = &Fault> {
        self.0.iter()
    }

    /// Whether nothing was at work in that time, nor had been for so long before.
    pub fn none_between(&self, from: Nanos, to: Nanos, settled: Nanos) -> bool {
        !self
            .0
            .iter()
            .any(|fault| fault.begun < to && fault.over.saturating_add(settled) > from)
    }

    /// For how long a process stood still, or its runtime did, or the whole machine, in that time.
    pub fn still(&self, who: &str, from: Nanos, to: Nanos) -> Nanos {
        let of_it = self
            .0
            .iter()
            .filter(|fault| fault.target == who || fault.target == EVERYBODY);
        of_it
            .map(|fault| fault.over.min(to).saturating_sub(fault.begun.max(from)))
            .sum()
    }
}
