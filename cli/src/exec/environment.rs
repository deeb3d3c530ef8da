//! How the command learns of its locks: variables in its environment.

use std::env;
use std::process::Command;

use super::arguments::Work;
use super::holding::{Described, Holding};

/// The variables of a lock.
const VARIABLES: [&str; 3] = ["LOCK_KEY", "LOCK_TOKEN", "LOCK_OWNER"];

/// What the variables of a lock contain, in their order.
fn values(key: &str, lock: &Described) -> [Option<String>; 3] {
    [Some(key.to_owned()), Some(lock.token.to_string()), lock.owner.clone()]
}

/// The number of locks that were given with `-k`.
const COUNT: &str = "LOCK_COUNT";

/// Adds the locks to the environment of the command, in the order in which they were given. The
/// variables of an outer `exec` are removed.
pub(super) fn describe(command: &mut Command, work: &Work<'_>, held: &Holding) {
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(|name| name == COUNT || is_numbered(name)) {
            command.env_remove(name);
        }
    }
    let locks = work
        .keys
        .iter()
        .filter_map(|key| Some((key.as_str(), held.describe(key.as_str())?)));
    for (index, (key, lock)) in locks.enumerate() {
        for (name, value) in VARIABLES.into_iter().zip(values(key, &lock)) {
            if index == 0 {
                set(command, name, value.as_deref());
            }
            if work.has_key_options {
                set(command, &format!("{name}_{}", index + 1), value.as_deref());
            }
        }
    }
    if work.has_key_options {
        command.env(COUNT, work.keys.len().to_string());
    }
}

fn set(command: &mut Command, name: &str, value: Option<&str>) {
    match value {
        Some(value) => command.env(name, value),
        // That of an outer `exec` would mislead.
        None => command.env_remove(name),
    };
}

/// Whether this is a variable of one lock among several.
fn is_numbered(name: &str) -> bool {
    let number = VARIABLES
        .iter()
        .find_map(|known| name.strip_prefix(known)?.strip_prefix('_'));
    number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}
