//! Whether a shard belongs to this configuration's map.

use std::collections::BTreeMap;

use shardlock::{Endpoint, ShardConfig, ShardMap};

use super::finding::Finding;
use crate::map::expectation;

/// `ours` is what a manager of this configuration would store where `stored` was found.
pub(super) fn fingerprint(stored: &Result<Option<String>, String>, ours: &str) -> Option<Finding> {
    const CHECK: &str = "shard-map";
    let theirs = match stored {
        Ok(Some(theirs)) => theirs,
        Ok(None) => return Some(Finding::ok(CHECK, "none is stored yet; the first lock stores it")),
        // The permission is another check's matter, and in a cluster some other node has the key.
        Err(_) => return None,
    };
    if ShardMap::agree(ours, theirs) {
        return Some(Finding::ok(CHECK, format!("as configured: {theirs}")));
    }
    let version = |text: &str| text.split(' ').next().unwrap_or_default().to_owned();
    if version(theirs) != version(ours) {
        return Some(Finding::error(
            CHECK,
            format!("stored by another version of shardlock: {theirs:?}, where this one stores {ours:?}"),
            "versions that differ in how they store locks would not see one another's, so a manager is refused",
            "use the same version everywhere, or a namespace of its own for this one (the setting namespace)",
        ));
    }
    Some(Finding::error(
        CHECK,
        format!("{theirs:?} is stored, but this configuration has {ours:?}"),
        "with different maps one key is locked in two places at a time, so a manager is refused",
        format!(
            "give the same shards in the same order in every process, or another namespace; if the change is meant, stop all processes that lock \
             here and then `shardlock map set {}`",
            expectation(theirs)
        ),
    ))
}

/// Whether two shards are the same place, by their names and URLs.
pub(super) fn places(shards: &[ShardConfig]) -> Option<Finding> {
    const CHECK: &str = "shards";
    let mut seen: BTreeMap<String, &str> = BTreeMap::new();
    for shard in shards {
        let endpoint = Endpoint::parse(&shard.url).ok()?;
        // Whoever logs in, it is the same place.
        let shown = endpoint.to_string();
        let place = shown.split_once("://").map_or("", |(_, rest)| rest);
        let place = place.rsplit_once('@').map_or(place, |(_, place)| place).to_owned();
        if let Some(other) = seen.insert(place, &shard.name) {
            return Some(Finding::error(
                CHECK,
                format!("{other} and {} are the same place, {shown}", shard.name),
                "each shard must have a server, or a database of it, of its own: a manager is refused by the shard map of the other",
                "correct one of the two URLs, or leave one of the shards out, in every process",
            ));
        }
    }
    (shards.len() > 1).then(|| Finding::ok(CHECK, format!("{} shards, each at a place of its own", shards.len())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::finding::Level;

    const OURS: &str = "v2 a:0-8191,b:8192-16383 here=a";

    fn found(theirs: Option<&str>) -> Finding {
        let stored = Ok(theirs.map(str::to_owned));
        fingerprint(&stored, OURS).unwrap()
    }

    #[test]
    fn another_map_is_an_error_that_shows_both() {
        assert_eq!(found(None).level, Level::Ok);
        assert_eq!(found(Some(OURS)).level, Level::Ok);
        assert_eq!(found(Some("v2 x:0-8191,y:8192-16383 here=x")).level, Level::Ok);
        let other = found(Some("v2 a:0-16383 here=a"));
        assert_eq!(other.level, Level::Error);
        assert!(other.found.contains("a:0-16383") && other.found.contains("b:8192-16383"));
        assert!(other.mend.unwrap().contains("map set --expect 'v2 a:0-16383'"));
    }

    #[test]
    fn another_version_is_told_apart() {
        let finding = found(Some("v3 a:0-8191,b:8192-16383 here=a"));
        assert!(finding.level == Level::Error && finding.found.contains("another version"));
    }

    #[test]
    fn two_shards_must_not_be_the_same_place() {
        let level = |urls: &[&str]| {
            let shards: Vec<_> = urls.iter().map(|url| ShardConfig::new("a", *url)).collect();
            places(&shards).map(|finding| finding.level)
        };
        assert_eq!(level(&["redis://a"]), None);
        assert_eq!(level(&["redis://a", "redis://b", "redis://a/1"]), Some(Level::Ok));
        assert_eq!(level(&["redis://a", "redis://u:s3cret@a:6379/0"]), Some(Level::Error));
    }
}
