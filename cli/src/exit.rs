//! The exit codes of the tool.
//!
//! Errors of the tool itself use the codes of `sysexits.h`, like flock(1), because 1, 2 and codes
//! from 126 up mean something else to callers of commands. `doctor` runs no command and uses 1 and
//! 2 for the severity of its findings.

use std::time::Duration;

use anyhow::Error;
use shardlock::LockError;
use shardlock::error::{InvalidSetting, LockErrorKind};

pub(crate) const OK: u8 = 0;
/// `doctor` found warnings.
pub(crate) const WARNINGS: u8 = 1;
/// `doctor` found errors.
pub(crate) const ERRORS: u8 = 2;
/// `break`: the key is not held by that owner.
pub(crate) const NOT_HELD: u8 = 1;
/// The command line is invalid (EX_USAGE).
pub(crate) const USAGE: u8 = 64;
/// A shard can't be reached, or refused the request (EX_UNAVAILABLE).
pub(crate) const UNAVAILABLE: u8 = 69;
/// The operating system reported an error (EX_OSERR).
pub(crate) const SYSTEM: u8 = 71;
/// The environment, the configuration file or the shard map is invalid (EX_CONFIG).
pub(crate) const CONFIG: u8 = 78;
/// The lock was lost while the command ran. Neither `sysexits.h` nor shells use this code.
pub(crate) const LOST: u8 = 117;
pub(crate) const NOT_EXECUTABLE: u8 = 126;
pub(crate) const NOT_FOUND: u8 = 127;

/// The code that shells report for a process terminated by this signal.
pub(crate) const fn by_signal(signal: i32) -> u8 {
    128_u8.saturating_add(signal as u8)
}

/// An error of the tool itself, with its exit code.
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

impl From<InvalidSetting> for Failure {
    /// For a value from the command line. Errors in values from other sources use [`CONFIG`].
    fn from(error: InvalidSetting) -> Self {
        Self::usage(error)
    }
}

impl From<LockError> for Failure {
    fn from(error: LockError) -> Self {
        Self::from(&error)
    }
}

impl From<&LockError> for Failure {
    fn from(error: &LockError) -> Self {
        let code = match error.kind() {
            LockErrorKind::Invalid => USAGE,
            LockErrorKind::ShardMapMismatch => CONFIG,
            _ => UNAVAILABLE,
        };
        Self::new(code, Error::msg(describe_error(error)))
    }
}

/// The error, and how long the request waited if that is known.
pub(crate) fn describe_error(error: &LockError) -> String {
    match error.waited() {
        Some(waited) => describe_after(error, waited),
        None => error.to_string(),
    }
}

/// The error, and how long the request has waited in all its attempts.
pub(crate) fn describe_after(error: &LockError, waited: Duration) -> String {
    format!("{error} (waited {waited:.3?})")
}
