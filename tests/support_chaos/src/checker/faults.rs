//! Which faults were active, and when.

use std::collections::BTreeMap;

use crate::clock::Nanos;
use crate::history::{Event, Line};

/// The target of a fault that stops the whole machine. A target may also be a group: `agent-*` is
/// every process whose name begins with `agent-`.
pub(crate) const EVERYBODY: &str = "everybody";

#[derive(Clone, Debug)]
pub(crate) struct Fault {
    pub(crate) name: String,
    pub(crate) target: String,
    pub(crate) begun: Nanos,
    /// `Nanos::MAX` if the fault never ended.
    pub(crate) over: Nanos,
}

#[derive(Clone, Debug)]
pub(crate) struct Faults(Vec<Fault>);

impl Fault {
    fn is_about(&self, who: &str) -> bool {
        let group = self.target.strip_suffix('*');
        self.target == who || self.target == EVERYBODY || group.is_some_and(|group| who.starts_with(group))
    }
}

impl Faults {
    pub(crate) fn of(lines: &[Line]) -> Self {
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
                    fault.expect("the fault has begun").over = line.at;
                }
                _ => {}
            }
        }
        Self(faults.into_values().collect())
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Fault> {
        self.0.iter()
    }

    /// Whether no fault was active in this period, nor within `settled` before it.
    pub(crate) fn none_between(&self, from: Nanos, to: Nanos, settled: Nanos) -> bool {
        !self
            .0
            .iter()
            .any(|fault| fault.begun < to && fault.over.saturating_add(settled) > from)
    }

    /// For how long, within this period, the process, its runtime or the whole machine was stopped.
    pub(crate) fn still(&self, who: &str, from: Nanos, to: Nanos) -> Nanos {
        let of_it = self.0.iter().filter(|fault| fault.is_about(who));
        of_it
            .map(|fault| fault.over.min(to).saturating_sub(fault.begun.max(from)))
            .sum()
    }
}
