//! Turns history lines into acquisitions.

use std::collections::HashMap;

use crate::clock::Nanos;
use crate::history::{Event, Line};

#[derive(Clone, Debug)]
pub(super) struct Acquisition {
    pub(super) who: String,
    pub(super) number: u64,
    pub(super) key: String,
    pub(super) asked: Nanos,
    pub(super) limit: Nanos,
    /// `None` if the process died first or is still waiting.
    pub(super) outcome: Option<Outcome>,
}

#[derive(Clone, Debug)]
pub(super) enum Outcome {
    Granted(Hold),
    Failed { at: Nanos, why: String },
}

#[derive(Clone, Debug)]
pub(super) struct Hold {
    /// When the guard was acquired.
    pub(super) at: Nanos,
    pub(super) token: u64,
    /// Readings of the guard: the time, and the remaining validity at that time.
    pub(super) readings: Vec<(Nanos, Nanos)>,
    pub(super) loss_reported: Option<(Nanos, String)>,
    pub(super) ending: Option<Nanos>,
    pub(super) ended: Option<(Nanos, String)>,
}

impl Hold {
    /// The end of the time in which the holder could rely on exclusive access. Never later than the
    /// actual end.
    pub(super) fn until(&self) -> Nanos {
        let claimed = self.claimed_until();
        match (&self.ended, self.ending) {
            // The release confirmed that the lock was held until then.
            (Some((_, outcome)), Some(ending)) if outcome == "ok" => ending,
            _ => {
                let reported = self.loss_reported.as_ref().map_or(Nanos::MAX, |(at, _)| *at);
                claimed.min(reported).min(self.ending.unwrap_or(Nanos::MAX))
            }
        }
    }

    /// The latest end of validity among the readings, whatever happened afterwards.
    pub(super) fn claimed_until(&self) -> Nanos {
        let ends = self
            .readings
            .iter()
            .filter(|(_, left)| *left > 0)
            .map(|(at, left)| at + left);
        ends.max().unwrap_or(self.at)
    }

    /// Whether the guard was valid when it was acquired.
    pub(super) fn was_valid(&self) -> bool {
        self.readings[0].1 > 0
    }
}

impl Acquisition {
    pub(super) fn hold(&self) -> Option<&Hold> {
        match &self.outcome {
            Some(Outcome::Granted(hold)) => Some(hold),
            _ => None,
        }
    }

    /// When the request succeeded or failed.
    pub(super) fn answered(&self) -> Option<Nanos> {
        match &self.outcome {
            Some(Outcome::Granted(hold)) => Some(hold.at),
            Some(Outcome::Failed { at, .. }) => Some(*at),
            None => None,
        }
    }

    /// The name used in reports.
    pub(super) fn name(&self) -> String {
        format!("{}#{}", self.who, self.number)
    }
}

/// The fault that kills a client of an agent. A lock of an agent ends with the connection of its
/// holder, so a client relies on its locks until it is killed, and no longer.
const CLIENT_KILLED: &str = "kill-client";

fn end_holds(all: &mut [Acquisition], who: &str, at: Nanos) {
    for acquisition in all.iter_mut().filter(|acquisition| acquisition.who == who) {
        if let Some(Outcome::Granted(hold)) = &mut acquisition.outcome {
            hold.ending.get_or_insert(at);
        }
    }
}

/// Sorted by the time of the request.
pub(super) fn collect(lines: &[Line]) -> Vec<Acquisition> {
    let mut all: Vec<Acquisition> = Vec::new();
    let mut places: HashMap<(&str, u64), usize> = HashMap::new();
    for line in lines {
        if let Event::Asked { key, limit } = &line.event {
            let before = places.insert((&line.who, line.number), all.len());
            assert!(before.is_none(), "a number was used twice: {line}");
            all.push(Acquisition {
                who: line.who.clone(),
                number: line.number,
                key: key.clone(),
                asked: line.at,
                limit: *limit,
                outcome: None,
            });
        }
    }
    for line in lines {
        if let Event::FaultBegun { fault, target } = &line.event
            && fault == CLIENT_KILLED
        {
            end_holds(&mut all, target, line.at);
        }
        let Some(&place) = places.get(&(line.who.as_str(), line.number)) else {
            continue;
        };
        let outcome = &mut all[place].outcome;
        match (&line.event, outcome) {
            (Event::Granted { token, left }, outcome @ None) => {
                *outcome = Some(Outcome::Granted(Hold {
                    at: line.at,
                    token: *token,
                    readings: vec![(line.at, *left)],
                    loss_reported: None,
                    ending: None,
                    ended: None,
                }));
            }
            (Event::Failed { why }, outcome @ None) => {
                let (at, why) = (line.at, why.clone());
                *outcome = Some(Outcome::Failed { at, why });
            }
            (Event::Valid { left }, Some(Outcome::Granted(hold))) => hold.readings.push((line.at, *left)),
            (Event::LossReported { reason }, Some(Outcome::Granted(hold))) => {
                hold.loss_reported = Some((line.at, reason.clone()))
            }
            (Event::Ending { left }, Some(Outcome::Granted(hold))) => {
                hold.readings.push((line.at, *left));
                hold.ending = Some(line.at);
            }
            (Event::Ended { outcome }, Some(Outcome::Granted(hold))) => hold.ended = Some((line.at, outcome.clone())),
            (Event::Asked { .. }, _) => {}
            _ => panic!("out of order: {line}"),
        }
    }
    all
}
