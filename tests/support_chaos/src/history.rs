//! The history of a round: one line per event, in one file per process.
//!
//! A line is written with one system call before the process continues, so the history of a killed
//! process is complete up to the kill. Times are read *before* an action that begins and before a
//! guard is read, and *after* an outcome is known. A hold is therefore never shorter than its
//! history states.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::clock::Nanos;

/// One line of a history.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Line {
    pub(crate) at: Nanos,
    /// The process.
    pub(crate) who: String,
    /// The number of the acquisition or fault, unique within a process.
    pub(crate) number: u64,
    pub(crate) event: Event,
}

/// What happened.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Event {
    /// A lock was requested, with this timeout.
    Asked {
        /// The name of the lock.
        key: String,
        /// The timeout.
        limit: Nanos,
    },
    /// The guard was acquired, with this remaining validity.
    Granted {
        /// The fencing token.
        token: u64,
        /// The remaining validity.
        left: Nanos,
    },
    /// A later reading of the remaining validity.
    Valid {
        /// The remaining validity.
        left: Nanos,
    },
    /// `lost()` has returned.
    LossReported {
        /// The reason of the loss.
        reason: String,
    },
    /// The guard is about to be released.
    Ending {
        /// The remaining validity.
        left: Nanos,
    },
    /// The guard was released: `ok`, `lost`, `error`, or `unknown` if the outcome was not awaited.
    Ended {
        /// One of these words.
        outcome: String,
    },
    /// The request failed, for this reason.
    Failed {
        /// The kind of the error.
        why: String,
    },
    /// The process has shut its manager down.
    Down,
    /// A fault begins. `target` may be a worker.
    FaultBegun {
        /// The name of the fault.
        fault: String,
        /// The process that it affects, or `-`.
        target: String,
    },
    /// The fault has ended.
    FaultOver,
    /// Something was left over after the end.
    Left {
        /// What it was.
        what: String,
    },
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {} ", self.at, self.who, self.number)?;
        match &self.event {
            Event::Asked { key, limit } => write!(f, "asked {key} {limit}"),
            Event::Granted { token, left } => write!(f, "granted {token} {left}"),
            Event::Valid { left } => write!(f, "valid {left}"),
            Event::LossReported { reason } => write!(f, "loss {reason}"),
            Event::Ending { left } => write!(f, "ending {left}"),
            Event::Ended { outcome } => write!(f, "ended {outcome}"),
            Event::Failed { why } => write!(f, "failed {why}"),
            Event::Down => f.write_str("down"),
            Event::FaultBegun { fault, target } => write!(f, "fault {fault} {target}"),
            Event::FaultOver => f.write_str("over"),
            Event::Left { what } => write!(f, "left {what}"),
        }
    }
}

impl Line {
    pub(crate) fn parse(line: &str) -> Option<Self> {
        let mut words = line.splitn(5, ' ');
        let at = words.next()?.parse().ok()?;
        let who = words.next()?.to_owned();
        let number = words.next()?.parse().ok()?;
        let name = words.next()?;
        let rest = words.next().unwrap_or_default();
        let pair = || rest.split_once(' ');
        let event = match name {
            "asked" => {
                let (key, limit) = pair()?;
                Event::Asked {
                    key: key.to_owned(),
                    limit: limit.parse().ok()?,
                }
            }
            "granted" => {
                let (token, left) = pair()?;
                Event::Granted {
                    token: token.parse().ok()?,
                    left: left.parse().ok()?,
                }
            }
            "valid" => Event::Valid {
                left: rest.parse().ok()?,
            },
            "loss" => Event::LossReported {
                reason: rest.to_owned(),
            },
            "ending" => Event::Ending {
                left: rest.parse().ok()?,
            },
            "ended" => Event::Ended {
                outcome: rest.to_owned(),
            },
            "failed" => Event::Failed { why: rest.to_owned() },
            "down" => Event::Down,
            "fault" => {
                let (fault, target) = pair()?;
                Event::FaultBegun {
                    fault: fault.to_owned(),
                    target: target.to_owned(),
                }
            }
            "over" => Event::FaultOver,
            "left" => Event::Left { what: rest.to_owned() },
            _ => return None,
        };
        Some(Self { at, who, number, event })
    }
}

/// The history file of one process.
pub struct Journal {
    who: String,
    file: File,
}

impl Journal {
    /// Creates the file of a process in this folder.
    pub fn create(dir: &Path, who: &str) -> Self {
        let file = OpenOptions::new()
            .create_new(true)
            .append(true)
            .open(path(dir, who))
            .expect("make a history");
        let who = who.to_owned();
        Self { who, file }
    }

    /// Uses a single system call, so that lines of different threads are not interleaved.
    pub fn note(&self, at: Nanos, number: u64, event: Event) {
        let who = self.who.clone();
        let line = format!("{}\n", Line { at, who, number, event });
        (&self.file).write_all(line.as_bytes()).expect("write the history");
    }
}

fn path(dir: &Path, who: &str) -> PathBuf {
    dir.join(format!("{who}.history"))
}

/// All lines of all processes, sorted by time.
pub(crate) fn read(dir: &Path) -> Vec<Line> {
    let mut lines = Vec::new();
    for entry in fs::read_dir(dir).expect("read a directory") {
        let path = entry.expect("read a directory").path();
        if path.extension().is_some_and(|extension| extension == "history") {
            let text = fs::read_to_string(&path).expect("read a history");
            // A killed process may have left a partial last line.
            let whole = text.rfind('\n').map_or(0, |end| end + 1);
            let parse = |line| Line::parse(line).unwrap_or_else(|| panic!("{}: {line:?}", path.display()));
            lines.extend(text[..whole].lines().map(parse));
        }
    }
    lines.sort_by_key(|line| line.at);
    lines
}
