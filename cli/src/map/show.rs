//! `shardlock map show`.

use std::collections::BTreeSet;
use std::fmt::Write;

use serde_json::json;
use shardlock::tool::printable;

use super::{NONE, ShowArgs, StoredMap, expect_option, read_all, without_shard};
use crate::exit::{self, Failure};
use crate::servers::Connector;

pub(super) async fn run(args: ShowArgs) -> Result<u8, Failure> {
    let config = args.shards.load_for_servers()?;
    config.validate().map_err(Failure::config)?;
    let connector = Connector::new(&config).map_err(Failure::config)?;
    let maps = read_all(&config, &connector).await?;
    let to_replace = to_replace(&maps);
    args.format
        .print(&as_json(&maps, &to_replace), &as_text(&maps, &to_replace))?;
    let all_answered = maps.iter().all(|map| map.stored.is_ok());
    Ok(if all_answered { exit::OK } else { exit::UNAVAILABLE })
}

/// The maps to pass to `map set --expect`.
fn to_replace(maps: &[StoredMap<'_>]) -> BTreeSet<String> {
    let others = maps.iter().filter(|map| !map.agrees());
    let stored = others.filter_map(|map| map.stored.as_ref().ok()?.as_deref());
    stored.map(|stored| without_shard(stored).to_owned()).collect()
}

fn as_json(maps: &[StoredMap<'_>], to_replace: &BTreeSet<String>) -> serde_json::Value {
    let shards: Vec<_> = maps
        .iter()
        .map(|map| {
            json!({
                "shard": map.shard,
                "server": map.location.label(),
                "stored": map.stored.as_ref().ok(),
                "error": map.stored.as_ref().err(),
                "configured": map.configured,
                "agrees": map.agrees(),
                "listening": map.listeners.as_ref().ok().map(Vec::len),
            })
        })
        .collect();
    json!({
        "agrees": maps.iter().all(StoredMap::agrees),
        "expect": to_replace,
        "shards": shards,
    })
}

fn as_text(maps: &[StoredMap<'_>], to_replace: &BTreeSet<String>) -> String {
    let mut text = String::new();
    // Writing to a `String` can't fail.
    for map in maps {
        writeln!(text, "{}  {}", printable(map.shard), printable(&map.location.label())).ok();
        let stored = match &map.stored {
            Ok(Some(stored)) => printable(stored).into_owned(),
            Ok(None) => NONE.to_owned(),
            Err(reason) => format!("unknown: {}", printable(reason)),
        };
        writeln!(text, "  stored      {stored}").ok();
        if map.agrees() {
            writeln!(text, "  configured  the same").ok();
        } else {
            writeln!(text, "  configured  {}", printable(&map.configured)).ok();
        }
        match &map.listeners {
            Ok(listeners) => writeln!(text, "  listening   {} managers", listeners.len()).ok(),
            Err(reason) => writeln!(text, "  listening   unknown: {}", printable(reason)).ok(),
        };
    }
    if !to_replace.is_empty() {
        let expected: Vec<_> = to_replace.iter().map(|map| expect_option(map)).collect();
        writeln!(
            text,
            "\nto replace it: stop all managers, run `shardlock map set {}` with these shards, start the managers with them",
            expected.join(" ")
        )
        .ok();
    }
    text
}
