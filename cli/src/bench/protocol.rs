//! The messages between the bench and its workers.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::keys::KeyChoice;
use super::mode::ModeChoice;
use crate::load::counters::Counters;

/// The first line that a worker receives.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct WorkerSettings {
    /// The parent's sources of settings.
    pub(super) shards: crate::shards::Options,
    /// The shards that the parent started; they replace those of the settings.
    pub(super) started: Vec<String>,
    pub(super) namespace: String,
    pub(super) tasks: u32,
    pub(super) key_choice: KeyChoice,
    pub(super) mode: ModeChoice,
    pub(super) hold: Duration,
    /// Replaces the value of the settings.
    pub(super) linger: Option<Duration>,
    /// The socket of the agent to take locks through.
    pub(super) agent: Option<PathBuf>,
    /// The number of threads that run its tasks.
    pub(super) threads: usize,
}

/// The commands to a worker. [`Command::Close`] is answered with [`Measurements`], the others
/// without data.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Command {
    /// The tasks start to request locks.
    Start,
    /// The measured window starts.
    Open,
    /// The measured window and the tasks end.
    Close,
    Shutdown,
}

/// What a worker measured between [`Command::Open`] and [`Command::Close`].
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Measurements {
    pub(super) seconds: f64,
    /// The number of locks acquired, by path.
    pub(super) locks: Counters,
    /// The locks of the task that had the fewest, and of the one that had the most.
    pub(super) task_min: u64,
    pub(super) task_max: u64,
    /// A histogram of the waits: nanoseconds, and the number of waits of that length.
    pub(super) waits: Vec<(u64, u64)>,
    /// The same of the waits for exclusive locks beside shared ones.
    pub(super) writer_waits: Vec<(u64, u64)>,
    /// How many holds were timed, and their total length.
    pub(super) holds: u64,
    pub(super) held: Duration,
    pub(super) token_regressions: u64,
    pub(super) overlaps: u64,
    /// All failures since the start, including the warm-up.
    pub(super) errors: Vec<ErrorCount>,
}

/// Errors of one kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ErrorCount {
    pub(super) kind: String,
    pub(super) count: u64,
    /// The message of the first one.
    pub(super) first: String,
}
