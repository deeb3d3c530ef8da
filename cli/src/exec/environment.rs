//! How the command learns of its locks: variables in its environment.

use std::env;
use std::process::Command;

use shardlock::{LockAllGuard, LockGuard};

use super::arguments::Work;

/// A variable of a lock, and what it contains.
type Variable = (&'static str, fn(&LockGuard) -> String);

const VARIABLES: [Variable; 3] = [
    ("LOCK_KEY", |guard| guard.key().to_owned()),
    ("LOCK_TOKEN", |guard| guard.token().to_string()),
    ("LOCK_OWNER", LockGuard::owner),
];

/// The number of locks that were given with `-k`.
const COUNT: &str = "LOCK_COUNT";

/// Adds the locks to the environment of the command, in the order in which they were given. The
/// variables of an outer `exec` are removed.
pub(super) fn describe(command: &mut Command, work: &Work<'_>, held: &LockAllGuard) {
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(|name| name == COUNT || is_numbered(name)) {
            command.env_remove(name);
        }
    }
    let guards = work.keys.iter().filter_map(|key| held.guard(key.as_str()));
    for (index, guard) in guards.enumerate() {
        for (name, value) in VARIABLES {
            if index == 0 {
                command.env(name, value(guard));
            }
            if work.has_key_options {
                command.env(format!("{name}_{}", index + 1), value(guard));
            }
        }
    }
    if work.has_key_options {
        command.env(COUNT, work.keys.len().to_string());
    }
}

/// Whether this is a variable of one lock among several.
fn is_numbered(name: &str) -> bool {
    let number = VARIABLES
        .iter()
        .find_map(|(known, _)| name.strip_prefix(known)?.strip_prefix('_'));
    number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}
