//! The keys and the command on the command line.

use std::ffi::{OsStr, OsString};

use anyhow::anyhow;
use shardlock::{LockAllRequest, LockKey};

use super::Args;
use crate::exit::Failure;

/// The locks, and the command that runs under them.
pub(super) struct Work<'a> {
    /// At least one, each once, in the order in which they were given.
    pub(super) keys: Vec<LockKey>,
    /// Whether the keys were given with `-k`.
    pub(super) has_key_options: bool,
    pub(super) program: &'a OsStr,
    pub(super) arguments: &'a [OsString],
}

impl<'a> Work<'a> {
    pub(super) fn parse(args: &'a Args) -> Result<Self, Failure> {
        let (keys, command) = match &*args.key_and_command {
            command if !args.keys.is_empty() => (keys_of(&args.keys)?, command),
            [key, dashes, command @ ..] if dashes == "--" => (vec![key_of(key)?], command),
            [key, option, ..] if option.as_encoded_bytes().starts_with(b"-") => {
                let (key, option) = (key.display(), option.display());
                return Err(Failure::usage(anyhow!(
                    "{option} stands after the key {key}, where the command begins: give the options of exec before the \
                     key, or `--` before a command with such a name"
                )));
            }
            [key, command @ ..] => (vec![key_of(key)?], command),
            [] => return Err(Failure::usage(anyhow!("the key and the command are missing"))),
        };
        let (program, arguments) = command.split_first().ok_or_else(|| {
            let key = keys.last().map(LockKey::as_str).unwrap_or_default();
            Failure::usage(anyhow!("no command is given after the key {key:?}"))
        })?;
        Ok(Self {
            keys,
            has_key_options: !args.keys.is_empty(),
            program,
            arguments,
        })
    }

    /// The locks, for messages.
    pub(super) fn describe_locks(&self) -> String {
        let names: Vec<String> = self.keys.iter().map(|key| format!("{:?}", key.as_str())).collect();
        match &*names {
            [name] => format!("lock {name}"),
            names => format!("locks {}", names.join(", ")),
        }
    }
}

fn key_of(key: &OsStr) -> Result<LockKey, Failure> {
    let key = key
        .to_str()
        .ok_or_else(|| Failure::usage(anyhow!("key is {key:?}, but must be UTF-8")))?;
    Ok(LockKey::new(key)?)
}

/// Each key once.
fn keys_of(given: &[String]) -> Result<Vec<LockKey>, Failure> {
    let mut keys = Vec::new();
    for key in given {
        let key = LockKey::new(key)?;
        if !keys.contains(&key) {
            keys.push(key);
        }
    }
    let most = LockAllRequest::KEYS_MAX;
    if keys.len() > most {
        let count = keys.len();
        return Err(Failure::usage(anyhow!(
            "{count} different keys are given, but at most {most} are allowed"
        )));
    }
    Ok(keys)
}
