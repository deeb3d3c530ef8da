//! `shardlock map set`.

use std::collections::BTreeSet;

use anyhow::anyhow;
use serde_json::json;
use shardlock::printable;

use super::places::Leases;
use super::{NONE, Seen, SetArgs, expectation, look, whole};
use crate::exit::{self, Failure};
use crate::output;
use crate::servers::Connector;

pub(super) async fn run(args: SetArgs) -> Result<u8, Failure> {
    let config = args.shards.load_with_shards()?;
    config.validate().map_err(Failure::config)?;
    let connector = Connector::new(&config).map_err(Failure::config)?;
    let seen = look(&config, &connector).await?;
    check_stored(&seen, &args.expected)?;
    if !args.force {
        check_unused(&seen, &connector).await?;
    }
    let mut replaced = Vec::new();
    for seen in seen.iter().filter(|seen| !seen.agrees()) {
        let stored = seen.stored.as_ref().ok().and_then(Option::as_deref);
        let swapped = seen.place.swap(&connector, stored, &seen.ours).await;
        swapped.map_err(|reason| {
            let done = replaced.len();
            refused(anyhow!(
                "{}: the map was not replaced: {reason}; it was replaced on {done} other servers; fix the cause and repeat the command",
                seen.place.label()
            ))
        })?;
        replaced.push(seen.place.label());
    }
    if !args.force {
        // A manager that has started in the meantime has read the old map.
        let now = look(&config, &connector).await?;
        if let Err(failure) = nobody_listens(&now) {
            output::eprint(format_args!(
                "the map was replaced, but {:#}; restart them",
                failure.error
            ));
        }
    }
    let text = match &replaced[..] {
        [] => "all servers have this map already; nothing was written".to_owned(),
        replaced => format!("the map was stored on {}", replaced.join(", ")),
    };
    args.format.print(&json!({ "stored": replaced }), &printable(&text))?;
    Ok(exit::OK)
}

/// A refusal. Nothing was written, unless the message says otherwise.
fn refused(error: anyhow::Error) -> Failure {
    Failure::new(exit::UNAVAILABLE, error)
}

/// Checks that each server has the new map, no map, or one that is expected.
fn check_stored(seen: &[Seen<'_>], expected: &[String]) -> Result<(), Failure> {
    let is_expected = |stored: &str| {
        let is = |old: &String| old == stored || old == whole(stored);
        expected.iter().any(is)
    };
    let mut found_any = seen.iter().any(Seen::agrees);
    for seen in seen {
        let place = seen.place.label();
        match &seen.stored {
            Err(reason) => {
                return Err(refused(anyhow!(
                    "{place}: the map can't be read: {reason}; nothing was written"
                )));
            }
            Ok(None) => found_any |= expected.iter().any(|old| old == NONE),
            Ok(Some(_)) if seen.agrees() => {}
            Ok(Some(stored)) if is_expected(stored) => found_any = true,
            Ok(Some(stored)) => {
                return Err(Failure::config(anyhow!(
                    "{place} has `{stored}`, which is not expected; nothing was written; if that is the one to replace, add {}",
                    expectation(stored)
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
async fn check_unused(seen: &[Seen<'_>], connector: &Connector<'_>) -> Result<(), Failure> {
    nobody_listens(seen)?;
    for seen in seen {
        let place = seen.place.label();
        let in_use = match seen.place.leases(connector).await {
            Ok(Leases::None) => continue,
            Ok(Leases::Some { example, owner }) => format!("{example:?} is held or waited for by {owner}"),
            Ok(Leases::Unknown) => "there are too many keys to search all of them".to_owned(),
            Err(reason) => format!("the search for leases failed: {reason}"),
        };
        return Err(refused(anyhow!(
            "{place}: {in_use}; nothing was written; stop all managers and wait until their leases have ended, or use --force"
        )));
    }
    Ok(())
}

fn nobody_listens(seen: &[Seen<'_>]) -> Result<(), Failure> {
    let mut listeners = BTreeSet::new();
    for seen in seen {
        match &seen.listeners {
            Ok(found) => listeners.extend(found),
            Err(reason) => {
                return Err(refused(anyhow!(
                    "{}: can't check whether managers listen: {reason}; nothing was written; --force skips this check",
                    seen.place.label()
                )));
            }
        }
    }
    match listeners.first() {
        None => Ok(()),
        Some(first) => Err(refused(anyhow!(
            "{} managers listen, such as {first}; nothing was written; stop them, or use --force",
            listeners.len()
        ))),
    }
}
