//! How the tool ends: its exit codes, in one place.
//!
//! Codes for its own errors are those of `sysexits.h`, as with flock(1), since 1, 2 and 126 and more mean something
//! else to the callers of commands. `doctor` runs no command, and says with 1 and 2 how bad it is.

use anyhow::Error;
use shardlock::{Invalid, LockError};

pub(crate) const OK: u8 = 0;
/// `doctor` found what can go wrong.
pub(crate) const WARNINGS: u8 = 1;
/// `doctor` found what is wrong.
pub(crate) const ERRORS: u8 = 2;
/// The command line is wrong (EX_USAGE).
pub(crate) const USAGE: u8 = 64;
/// A shard can't be reached, or says no (EX_UNAVAILABLE).
pub(crate) const UNAVAILABLE: u8 = 69;
/// The operating system refused something (EX_OSERR).
pub(crate) const SYSTEM: u8 = 71;
/// The environment, the configuration file, or the shard map is wrong (EX_CONFIG).
pub(crate) const CONFIG: u8 = 78;
/// The lock was lost while the command ran. Neither `sysexits.h` nor shells use it.
pub(crate) const LOST: u8 = 117;
pub(crate) const NOT_EXECUTABLE: u8 = 126;
pub(crate) const NOT_FOUND: u8 = 127;

/// The code of a process that was ended by a signal, as shells have it.
pub(crate) const fn by_signal(signal: i32) -> u8 {
    128_u8.saturating_add(signal as u8)
}

/// An error of the tool itself, with the code to exit with.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) code: u8,
    pub(crate) error: Error,
}

impl Failure {
    pub(crate) fn new(code: u8, error: impl Into<Error>) -> Self {
        Self {
            code,
            error: error.into(),
        }
    }

    pub(crate) fn usage(error: impl Into<Error>) -> Self {
        Self::new(USAGE, error)
    }

    pub(crate) fn config(error: impl Into<Error>) -> Self {
        Self::new(CONFIG, error)
    }

    pub(crate) fn system(error: impl Into<Error>) -> Self {
        Self::new(SYSTEM, error)
    }
}

impl From<Invalid> for Failure {
    /// A value that stood on the command line. Those from elsewhere are a matter of configuration.
    fn from(error: Invalid) -> Self {
        Self::usage(error)
    }
}

impl From<LockError> for Failure {
    fn from(error: LockError) -> Self {
        let code = match error {
            LockError::Invalid(_) => USAGE,
            LockError::ShardMapMismatch { .. } => CONFIG,
            _ => UNAVAILABLE,
        };
        Self::new(code, error)
    }
}
