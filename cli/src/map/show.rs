//! `shardlock map show`.

use std::collections::BTreeSet;
use std::fmt::Write;

use serde_json::json;
use shardlock::printable;

use super::{NONE, Seen, ShowArgs, expectation, look, whole};
use crate::exit::{self, Failure};
use crate::servers::Connector;

pub(super) async fn run(args: ShowArgs) -> Result<u8, Failure> {
    let config = args.shards.load_with_shards()?;
    config.validate().map_err(Failure::config)?;
    let connector = Connector::new(&config).map_err(Failure::config)?;
    let seen = look(&config, &connector).await?;
    let to_replace = to_replace(&seen);
    args.format
        .print(&as_json(&seen, &to_replace), &as_text(&seen, &to_replace))?;
    let all_answered = seen.iter().all(|seen| seen.stored.is_ok());
    Ok(if all_answered { exit::OK } else { exit::UNAVAILABLE })
}

/// The maps to pass to `map set --expect`.
fn to_replace(seen: &[Seen<'_>]) -> BTreeSet<String> {
    let others = seen.iter().filter(|seen| !seen.agrees());
    let stored = others.filter_map(|seen| seen.stored.as_ref().ok()?.as_deref());
    stored.map(|stored| whole(stored).to_owned()).collect()
}

fn as_json(seen: &[Seen<'_>], to_replace: &BTreeSet<String>) -> serde_json::Value {
    let shards: Vec<_> = seen
        .iter()
        .map(|seen| {
            json!({
                "shard": seen.shard,
                "server": seen.place.label(),
                "stored": seen.stored.as_ref().ok(),
                "error": seen.stored.as_ref().err(),
                "configured": seen.ours,
                "agrees": seen.agrees(),
                "listening": seen.listeners.as_ref().ok().map(Vec::len),
            })
        })
        .collect();
    json!({
        "agrees": seen.iter().all(Seen::agrees),
        "expect": to_replace,
        "shards": shards,
    })
}

fn as_text(seen: &[Seen<'_>], to_replace: &BTreeSet<String>) -> String {
    let mut text = String::new();
    // Writing to a `String` can't fail.
    for seen in seen {
        writeln!(text, "{}  {}", printable(seen.shard), printable(&seen.place.label())).ok();
        let stored = match &seen.stored {
            Ok(Some(stored)) => printable(stored).into_owned(),
            Ok(None) => NONE.to_owned(),
            Err(reason) => format!("unknown: {}", printable(reason)),
        };
        writeln!(text, "  stored      {stored}").ok();
        if seen.agrees() {
            writeln!(text, "  configured  the same").ok();
        } else {
            writeln!(text, "  configured  {}", printable(&seen.ours)).ok();
        }
        match &seen.listeners {
            Ok(listeners) => writeln!(text, "  listening   {} managers", listeners.len()).ok(),
            Err(reason) => writeln!(text, "  listening   unknown: {}", printable(reason)).ok(),
        };
    }
    if !to_replace.is_empty() {
        let expected: Vec<_> = to_replace.iter().map(|map| expectation(map)).collect();
        writeln!(
            text,
            "\nto replace it: stop all managers, run `shardlock map set {}` with these shards, start the managers with them",
            expected.join(" ")
        )
        .ok();
    }
    text
}
