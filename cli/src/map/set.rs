//! `shardlock map set`.

use std::collections::BTreeSet;

use anyhow::anyhow;
use serde_json::json;
use shardlock::tool::printable;

use super::locations::Leases;
use super::{NONE, SetArgs, StoredMap, expect_option, read_all, without_shard};
use crate::exit::{self, Failure};
use crate::output;
use crate::servers::Connector;

pub(super) async fn run(args: SetArgs) -> Result<u8, Failure> {
    let config = args.shards.load_for_servers()?;
    config.validate().map_err(Failure::config)?;
    let connector = Connector::new(&config).map_err(Failure::config)?;
    let maps = read_all(&config, &connector).await?;
    check_stored(&maps, &args.expected)?;
    if !args.force {
        check_unused(&maps, &connector).await?;
    }
    let mut replaced = Vec::new();
    for map in maps.iter().filter(|map| !map.agrees()) {
        let stored = map.stored.as_ref().ok().and_then(Option::as_deref);
        let swapped = map.location.swap(&connector, stored, &map.configured).await;
        swapped.map_err(|reason| {
            let done = replaced.len();
            refused(anyhow!(
                "{}: the map was not replaced: {reason}; it was replaced on {done} other servers; fix the cause and repeat the command",
                map.location.label()
            ))
        })?;
        replaced.push(map.location.label());
    }
    if !args.force && !replaced.is_empty() {
        // A manager that has started in the meantime has read the old map.
        let maps = read_all(&config, &connector).await.map_err(|failure| {
            let context = "the map was replaced, but it can't be checked whether managers listen";
            Failure::new(failure.code, failure.error.context(context))
        })?;
        if let Some(warning) = Listeners::of(&maps).warning() {
            output::eprint(warning);
        }
    }
    let text = match &replaced[..] {
        [] => "all servers have this map already; nothing was written".to_owned(),
        replaced => format!("the map was stored on {}", replaced.join(", ")),
    };
    args.format.print(&json!({ "stored": replaced }), &printable(&text))?;
    Ok(exit::OK)
}

/// A refusal. Nothing was written, unless the message reports otherwise.
fn refused(error: anyhow::Error) -> Failure {
    Failure::new(exit::UNAVAILABLE, error)
}

/// Checks that each server has the new map, no map, or one that is expected.
fn check_stored(maps: &[StoredMap<'_>], expected: &[String]) -> Result<(), Failure> {
    let is_expected = |stored: &str| {
        let is = |old: &String| old == stored || old == without_shard(stored);
        expected.iter().any(is)
    };
    let mut found_any = maps.iter().any(StoredMap::agrees);
    for map in maps {
        let location = map.location.label();
        match &map.stored {
            Err(reason) => {
                return Err(refused(anyhow!(
                    "{location}: the map can't be read: {reason}; nothing was written"
                )));
            }
            Ok(None) => found_any |= expected.iter().any(|old| old == NONE),
            Ok(Some(_)) if map.agrees() => {}
            Ok(Some(stored)) if is_expected(stored) => found_any = true,
            Ok(Some(stored)) => {
                return Err(Failure::config(anyhow!(
                    "{location} has `{stored}`, which is not expected; nothing was written; if that is the one to replace, add {}",
                    expect_option(stored)
                )));
            }
        }
    }
    match found_any {
        true => Ok(()),
        false => Err(Failure::config(anyhow!(
            "no server has a map to replace; nothing was written; the first lock stores one, and so does --expect {NONE}"
        ))),
    }
}

/// Checks that no manager listens, holds or waits.
async fn check_unused(maps: &[StoredMap<'_>], connector: &Connector<'_>) -> Result<(), Failure> {
    if let Some(refusal) = Listeners::of(maps).refusal() {
        return Err(refused(anyhow!(refusal)));
    }
    for map in maps {
        let location = map.location.label();
        let in_use = match map.location.leases(connector).await {
            Ok(Leases::None) => continue,
            Ok(Leases::Some { example, owner }) => format!("{example:?} is held or waited for by {owner}"),
            Ok(Leases::Unknown) => "there are too many keys to search all of them".to_owned(),
            Err(reason) => format!("the search for leases failed: {reason}"),
        };
        return Err(refused(anyhow!(
            "{location}: {in_use}; nothing was written; stop all managers and wait until their leases have ended, or use --force"
        )));
    }
    Ok(())
}

/// The managers that listen on any server.
#[derive(Debug, PartialEq, Eq)]
enum Listeners {
    None,
    Some { count: usize, example: String },
    Unknown { location: String, reason: String },
}

impl Listeners {
    fn of(maps: &[StoredMap<'_>]) -> Self {
        let mut names = BTreeSet::new();
        for map in maps {
            match &map.listeners {
                Ok(found) => names.extend(found),
                Err(reason) => {
                    return Self::Unknown {
                        location: map.location.label(),
                        reason: reason.clone(),
                    };
                }
            }
        }
        names.first().map_or(Self::None, |first| Self::Some {
            count: names.len(),
            example: (*first).clone(),
        })
    }

    /// Why the map is not replaced.
    fn refusal(&self) -> Option<String> {
        match self {
            Self::None => None,
            Self::Some { count, example } => Some(format!(
                "{count} managers listen, such as {example}; nothing was written; stop them, or use --force"
            )),
            Self::Unknown { location, reason } => Some(format!(
                "{location}: can't check whether managers listen: {reason}; nothing was written; --force skips this check"
            )),
        }
    }

    /// What to do after the map was replaced.
    fn warning(&self) -> Option<String> {
        match self {
            Self::None => None,
            Self::Some { count, example } => Some(format!(
                "the map was replaced, but {count} managers listen, such as {example}; restart them"
            )),
            Self::Unknown { location, reason } => Some(format!(
                "the map was replaced, but it can't be checked on {location} whether managers listen: {reason}; restart \
                 those that started in the meantime"
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listeners_are_refused_before_the_swap_and_reported_after_it() {
        let some = Listeners::Some {
            count: 2,
            example: "vm-1-0123456789abcdef".to_owned(),
        };
        assert_eq!(
            some.refusal().unwrap(),
            "2 managers listen, such as vm-1-0123456789abcdef; nothing was written; stop them, or use --force"
        );
        assert_eq!(
            some.warning().unwrap(),
            "the map was replaced, but 2 managers listen, such as vm-1-0123456789abcdef; restart them"
        );
        assert_eq!((Listeners::None.refusal(), Listeners::None.warning()), (None, None));
    }

    #[test]
    fn unknown_listeners_are_refused_before_the_swap_and_reported_after_it() {
        let unknown = Listeners::Unknown {
            location: "a:1".to_owned(),
            reason: "NOPERM".to_owned(),
        };
        assert_eq!(
            unknown.refusal().unwrap(),
            "a:1: can't check whether managers listen: NOPERM; nothing was written; --force skips this check"
        );
        assert_eq!(
            unknown.warning().unwrap(),
            "the map was replaced, but it can't be checked on a:1 whether managers listen: NOPERM; restart those that \
             started in the meantime"
        );
    }
}
