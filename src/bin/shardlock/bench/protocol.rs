//! What the bench and its workers say to each other.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::keys::Wanted;
use crate::load::counters::Counters;

/// The first line that a worker gets.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Setup {
    /// The same sources of settings as the parent has.
    pub(super) shards: crate::shards::Options,
    /// The shards that the parent started, in place of those of the settings.
    pub(super) started: Vec<String>,
    pub(super) namespace: String,
    pub(super) tasks: u32,
    pub(super) wanted: Wanted,
    pub(super) hold: Duration,
    /// In place of what the settings say.
    pub(super) linger: Option<Duration>,
    /// How many threads its tasks run on.
    pub(super) threads: usize,
}

/// What a worker is told to do. The answer to [`Order::Close`] is a [`Measured`], the others have nothing to tell.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Order {
    /// The tasks begin to want locks.
    Start,
    /// From now on it is measured.
    Open,
    /// Until now. The tasks end.
    Close,
    Leave,
}

/// What a worker measured between [`Order::Open`] and [`Order::Close`].
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Measured {
    pub(super) seconds: f64,
    /// How many locks were had, by their paths.
    pub(super) locks: Counters,
    /// How many locks the task had that had the fewest, and the most.
    pub(super) task_min: u64,
    pub(super) task_max: u64,
    /// A histogram of the waits: nanoseconds, and how many waits lasted so long.
    pub(super) waits: Vec<(u64, u64)>,
    /// How many holds were timed, and how long they were together.
    pub(super) holds: u64,
    pub(super) held: Duration,
    pub(super) token_regressions: u64,
    pub(super) overlaps: u64,
    /// What failed since the start, warm-up included.
    pub(super) errors: Vec<Errors>,
}

/// Errors of one kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Errors {
    pub(super) kind: String,
    pub(super) count: u64,
    /// The first of them, in words.
    pub(super) first: String,
}
